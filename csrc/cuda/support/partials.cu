#include "partials.h"

#include "launch.cuh"
#include "partials.cuh"

namespace fusednorm_cuda {

void sum_partials(const Finalize& a, int n_sums, bool wide, bool early, void* cuda_stream) {
  const int64_t blocks = (int64_t(a.n_columns) + kFinalizeColumns - 1) / kFinalizeColumns;
  const int rows = a.programs < 4 * kFinalizeRows ? kFinalizeRows / 4 : kFinalizeRows;
  const int shared_bytes = kFinalizeColumns * rows * (wide ? 8 : 4);
  launch<const Finalize>(wide ? sum_partials_kernel<double> : sum_partials_kernel<float>, a,
                         {blocks, n_sums, kFinalizeColumns, rows, 1, shared_bytes, early}, cuda_stream);
}

}  // namespace fusednorm_cuda
