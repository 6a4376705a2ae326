// From a form to a grid: the launches of one pair of row dtypes.
#pragma once

#include <stdexcept>
#include <string>

#include "norm_backward.cuh"
#include "norm_forward.cuh"
#include "norm_launch.h"

namespace fusednorm_cuda {

template <class A>
void launch(void (*kernel)(A), const A& arguments, int64_t grid_x, int64_t grid_y, int block_x, int block_y, int cluster,
            int shared_bytes, [[maybe_unused]] void* stream) {
#if defined(__CUDACC__)
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid_x), unsigned(grid_y));
  config.blockDim = dim3(unsigned(block_x), unsigned(block_y));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments);
  if (error != cudaSuccess) throw std::runtime_error(std::string("launch of a norm kernel: ") + cudaGetErrorString(error));
#else
  Machine::get().run({{unsigned(grid_x), unsigned(grid_y)},
                      {unsigned(block_x), unsigned(block_y)},
                      cluster,
                      size_t(shared_bytes),
                      [=] { kernel(arguments); }});
#endif
}

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
    const int shared_columns = f.rows > 1 ? f.threads * f.rows / kWarp * f.threads * kVector : 0;
    launch<const Backward>(kernel, a, f.ranks * f.tiles, programs, f.threads, f.rows, f.ranks,
                           RowGroup<C>::kSharedBytes + shared_columns * int(sizeof(C)), stream);
  };
  if (f.tiles > 1) {
    const auto sums = f.aligned ? add_layer_norm_bwd_sums_kernel<T, S, true> : add_layer_norm_bwd_sums_kernel<T, S, false>;
    launch<const Backward>(sums, a, a.n_rows, 1, kSumsThreads, 1, 1, RowGroup<C>::kSharedBytes, stream);
  }
  if (!f.aligned) return run(add_layer_norm_bwd_kernel<T, S, true, false>);
  if (epilogue) return run(add_layer_norm_bwd_kernel<T, S, true, true>);
  run(add_layer_norm_bwd_kernel<T, S, false, true>);
}

template <class C>
void launch_finalize(const Finalize& a, int n_sums, void* stream) {
  const int64_t blocks = (int64_t(a.n_columns) + kFinalizeColumns - 1) / kFinalizeColumns;
  launch<const Finalize>(add_layer_norm_bwd_finalize_kernel<C>, a, blocks, n_sums, kFinalizeColumns, kFinalizeRows, 1,
                         kFinalizeColumns * kFinalizeRows * int(sizeof(C)), stream);
}

template <class T, class S>
Launchers launchers_of() {
  return {launch_forward<T, S>, launch_backward<T, S>, launch_finalize<Compute<T>>};
}

}  // namespace fusednorm_cuda
