// From a form to a grid: the launches of one pair of row dtypes.
#pragma once

#include "launch.cuh"
#include "norm_backward.cuh"
#include "norm_forward.cuh"
#include "norm_launch.h"

namespace fusednorm_cuda {

template <class T, class S>
void launch_forward(const Forward& a, const Form& f, void* stream) {
  const auto run = [&](void (*kernel)(const Forward)) {
    const int64_t groups = (a.n_rows + f.rows - 1) / f.rows;
    launch<const Forward>(kernel, a, groups * f.ranks, 1, f.threads, f.rows, f.ranks, RowGroup<Compute<T>>::kSharedBytes, stream);
  };
  if (!f.aligned) return run(add_layer_norm_fwd_kernel<T, S, 2, false>);
  if (f.chunks == 1) return run(add_layer_norm_fwd_kernel<T, S, 1, true>);
  if (f.chunks == 2) return run(add_layer_norm_fwd_kernel<T, S, 2, true>);
  run(add_layer_norm_fwd_kernel<T, S, 4, true>);
}

template <class T, class S>
void launch_backward(const Backward& a, const Form& f, bool epilogue, int programs, void* stream) {
  using C = Compute<T>;
  constexpr int kVector = 16 / sizeof(T);
  const auto run = [&](void (*kernel)(const Backward)) {
    launch<const Backward>(kernel, a, f.ranks * f.tiles, programs, f.threads, f.rows, f.ranks,
                           RowGroup<C>::kSharedBytes + partial_columns(f, kVector) * int(sizeof(C)), stream);
  };
  if (f.tiles > 1) {
    const auto sums = f.aligned ? add_layer_norm_bwd_sums_kernel<T, S, true> : add_layer_norm_bwd_sums_kernel<T, S, false>;
    launch<const Backward>(sums, a, a.n_rows, 1, kSumsThreads, 1, 1, RowGroup<C>::kSharedBytes, stream);
  }
  if (!f.aligned) return run(add_layer_norm_bwd_kernel<T, S, true, false>);
  if (epilogue) return run(add_layer_norm_bwd_kernel<T, S, true, true>);
  run(add_layer_norm_bwd_kernel<T, S, false, true>);
}

template <class T, class S>
Launchers launchers_of() {
  return {launch_forward<T, S>, launch_backward<T, S>};
}

}  // namespace fusednorm_cuda
