// From a form to a grid: the launches of one pair of row dtypes.
#pragma once

#include <algorithm>

#include "../support/launch.cuh"
#include "norm_backward.cuh"
#include "norm_forward.cuh"
#include "norm_launch.h"

namespace fusednorm_cuda {

template <class T, class S, bool EPILOGUE>
auto aligned_forward_kernel(int chunks) {
  return chunks == 1   ? add_layer_norm_fwd_kernel<T, S, 1, EPILOGUE, true>
         : chunks == 2 ? add_layer_norm_fwd_kernel<T, S, 2, EPILOGUE, true>
                       : add_layer_norm_fwd_kernel<T, S, 4, EPILOGUE, true>;
}

template <class T, class S>
auto forward_kernel(const Form& f, bool epilogue) {
  if (!f.aligned) return add_layer_norm_fwd_kernel<T, S, 2, true, false>;
  return epilogue ? aligned_forward_kernel<T, S, true>(f.chunks) : aligned_forward_kernel<T, S, false>(f.chunks);
}

template <class T, class S>
void launch_forward(const Forward& a, const Form& f, bool epilogue, void* cuda_stream) {
  const int64_t groups = (a.n_rows + f.rows - 1) / f.rows;
  const Grid grid{groups * f.ranks, 1, f.threads, f.rows, f.ranks, RowGroup<Compute<T>>::kSharedBytes};
  launch<const Forward>(forward_kernel<T, S>(f, epilogue), a, grid, cuda_stream);
}

template <class T, class S>
int backward_shared_bytes(const Form& f) {
  using C = Compute<T>;
  constexpr int kVector = 16 / sizeof(T);
  const int stages = f.staged ? Stages<T, S, kVector>::kBytes * f.threads * f.rows : 0;
  const int sums = partial_columns(f, kVector) * int(sizeof(C));  // in the same place, afterwards
  return RowGroup<C>::kSharedBytes + std::max(stages, sums);
}

template <class T, class S>
struct BackwardLaunch {
  void (*kernel)(const Backward);
  Grid grid;

  BackwardLaunch(const Form& f, bool epilogue, int programs) {
    kernel = !f.aligned  ? add_layer_norm_bwd_kernel<T, S, kElements, true>
             : !f.staged ? add_layer_norm_bwd_kernel<T, S, kVectors, true>
             : epilogue  ? add_layer_norm_bwd_kernel<T, S, kStaged, true>
                         : add_layer_norm_bwd_kernel<T, S, kStaged, false>;
    grid = {int64_t(f.ranks) * f.tiles, programs, f.threads, f.rows, f.ranks, backward_shared_bytes<T, S>(f)};
  }
};

template <class T, class S>
void launch_backward(const Backward& a, const Form& f, bool epilogue, int programs, void* cuda_stream) {
  if (f.tiles > 1) {
    const auto sums = f.aligned ? add_layer_norm_bwd_sums_kernel<T, S, true> : add_layer_norm_bwd_sums_kernel<T, S, false>;
    launch<const Backward>(sums, a, {a.n_rows, 1, kSumsThreads, 1, 1, RowGroup<Compute<T>>::kSharedBytes}, cuda_stream);
  }
  const BackwardLaunch<T, S> main(f, epilogue, programs);
  launch<const Backward>(main.kernel, a, main.grid, cuda_stream);
}

template <class T, class S>
int resident_backward_clusters(const Form& f, bool epilogue, int device, int processors) {
  const BackwardLaunch<T, S> main(f, epilogue, 1);
  return resident_clusters<const Backward>(main.kernel, main.grid, device, processors);
}

template <class T, class S>
Launchers launchers_of() {
  return {launch_forward<T, S>, launch_backward<T, S>, backward_shared_bytes<T, S>, resident_backward_clusters<T, S>};
}

}  // namespace fusednorm_cuda
