#include "partials.h"

#include "launch.cuh"
#include "partials.cuh"

namespace fusednorm_cuda {

namespace {

template <class C>
void launch_sum(const Finalize& a, int n_sums, bool early, void* cuda_stream) {
  const int64_t blocks = (int64_t(a.n_columns) + kFinalizeColumns - 1) / kFinalizeColumns;
  const int rows = a.programs < 4 * kFinalizeRows ? kFinalizeRows / 4 : kFinalizeRows;
  const int shared_bytes = kFinalizeColumns * rows * int(sizeof(C));
  launch<const Finalize>(sum_partials_kernel<C>, a, {blocks, n_sums, kFinalizeColumns, rows, 1, shared_bytes, early},
                         cuda_stream);
}

}  // namespace

void sum_partials(const Finalize& a, int n_sums, bool wide, bool early, void* cuda_stream) {
  if (wide)
    launch_sum<double>(a, n_sums, early, cuda_stream);
  else
    launch_sum<float>(a, n_sums, early, cuda_stream);
}

}  // namespace fusednorm_cuda
