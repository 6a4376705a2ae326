#include "partials.h"

#include "launch.cuh"
#include "partials.cuh"

namespace fusednorm_cuda {

namespace {

// Of one group of samples, for `programs` partial sums of a column at most.
Grid finalize_grid(int n_columns, int64_t programs, int n_sums, bool wide, bool early) {
  const int64_t blocks = (int64_t(n_columns) + kFinalizeColumns - 1) / kFinalizeColumns;
  const int rows = programs < 4 * kFinalizeRows ? kFinalizeRows / 4 : kFinalizeRows;
  return {blocks, n_sums, kFinalizeColumns, rows, 1, kFinalizeColumns * rows * (wide ? 8 : 4), early};
}

}  // namespace

void sum_partials(const Finalize& a, int n_sums, bool wide, bool early, void* cuda_stream) {
  const Grid grid = finalize_grid(a.n_columns, a.programs, n_sums, wide, early);
  launch<const Finalize>(wide ? sum_partials_kernel<double> : sum_partials_kernel<float>, a, grid, cuda_stream);
}

void sum_sample_partials(SampleFinalize a, int n_sums, bool wide, bool early, void* cuda_stream) {
  Grid grid = finalize_grid(a.n_columns, int64_t(a.programs) * a.samples, n_sums, wide, early);
  a.lanes = 1;  // a thread has so many loads on their way at once
  while (a.lanes < grid.block_y && a.lanes * kFinalizeTogether < a.programs) a.lanes *= 2;
  const int side_by_side = grid.block_y / a.lanes;
  grid.x *= (a.samples + side_by_side - 1) / side_by_side;
  launch<const SampleFinalize>(wide ? sum_sample_partials_kernel<double> : sum_sample_partials_kernel<float>, a, grid,
                               cuda_stream);
}

}  // namespace fusednorm_cuda
