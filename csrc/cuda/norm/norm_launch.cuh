// From a form to a grid: the launches of one pair of row dtypes.
#pragma once

#include <algorithm>

#include "../support/launch.cuh"
#include "norm_backward.cuh"
#include "norm_forward.cuh"
#include "norm_launch.h"

namespace fusednorm_cuda {

// That kernels tell apart.
template <class Arguments>
int64_t samples_of(const Arguments& a) { return a.blocks_per_sample ? a.n_rows / a.rows_per_sample : 1; }

template <class T, class S, Epilogue EPILOGUE>
auto aligned_forward_kernel(int chunks) {
  return chunks == 1   ? add_layer_norm_fwd_kernel<T, S, 1, EPILOGUE, true>
         : chunks == 2 ? add_layer_norm_fwd_kernel<T, S, 2, EPILOGUE, true>
                       : add_layer_norm_fwd_kernel<T, S, 4, EPILOGUE, true>;
}

template <class T, class S>
auto forward_kernel(const Form& f, Epilogue epilogue) {
  const bool of_samples = epilogue == kSampleEpilogue;
  if (!f.aligned)
    return of_samples ? add_layer_norm_fwd_kernel<T, S, 2, kSampleEpilogue, false>
                      : add_layer_norm_fwd_kernel<T, S, 2, kEpilogue, false>;
  return of_samples ? aligned_forward_kernel<T, S, kSampleEpilogue>(f.chunks)
         : epilogue ? aligned_forward_kernel<T, S, kEpilogue>(f.chunks)
                    : aligned_forward_kernel<T, S, kNoEpilogue>(f.chunks);
}

template <class T, class S>
void launch_forward(const Forward& a, const Form& f, Epilogue epilogue, void* cuda_stream) {
  const int64_t samples = samples_of(a);
  const int64_t blocks = (a.n_rows / samples + f.rows - 1) / f.rows * f.ranks;
  const Grid grid{samples * blocks, 1, f.threads, f.rows, f.ranks, RowGroup<Compute<T>>::kSharedBytes};
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

template <class T, class S, bool OF_SAMPLES>
auto sums_kernel(bool aligned) {
  return aligned ? add_layer_norm_bwd_sums_kernel<T, S, OF_SAMPLES, true>
                 : add_layer_norm_bwd_sums_kernel<T, S, OF_SAMPLES, false>;
}

template <class T, class S>
struct BackwardLaunch {
  void (*kernel)(const Backward);
  Grid grid;

  BackwardLaunch(const Form& f, Epilogue epilogue, int64_t samples, int programs) {
    if (epilogue == kSampleEpilogue)
      kernel = f.aligned ? add_layer_norm_bwd_kernel<T, S, kVectors, kSampleEpilogue>
                         : add_layer_norm_bwd_kernel<T, S, kElements, kSampleEpilogue>;
    else
      kernel = !f.aligned  ? add_layer_norm_bwd_kernel<T, S, kElements, kEpilogue>
               : !f.staged ? add_layer_norm_bwd_kernel<T, S, kVectors, kEpilogue>
               : epilogue  ? add_layer_norm_bwd_kernel<T, S, kStaged, kEpilogue>
                           : add_layer_norm_bwd_kernel<T, S, kStaged, kNoEpilogue>;
    grid = {samples * f.ranks * f.tiles, programs, f.threads, f.rows, f.ranks, backward_shared_bytes<T, S>(f)};
  }
};

template <class T, class S>
void launch_backward(const Backward& a, const Form& f, Epilogue epilogue, int programs, void* cuda_stream) {
  if (f.tiles > 1) {
    const bool of_samples = epilogue == kSampleEpilogue;
    const auto sums = of_samples ? sums_kernel<T, S, true>(f.aligned) : sums_kernel<T, S, false>(f.aligned);
    launch<const Backward>(sums, a, {a.n_rows, 1, kSumsThreads, 1, 1, RowGroup<Compute<T>>::kSharedBytes}, cuda_stream);
  }
  const BackwardLaunch<T, S> main(f, epilogue, samples_of(a), programs);
  launch<const Backward>(main.kernel, a, main.grid, cuda_stream);
}

template <class T, class S>
int resident_backward_clusters(const Form& f, Epilogue epilogue, int device, int processors) {
  const BackwardLaunch<T, S> main(f, epilogue, 1, 1);
  return resident_clusters<const Backward>(main.kernel, main.grid, device, processors);
}

template <class T, class S>
Launchers launchers_of() {
  return {launch_forward<T, S>, launch_backward<T, S>, backward_shared_bytes<T, S>, resident_backward_clusters<T, S>};
}

}  // namespace fusednorm_cuda
