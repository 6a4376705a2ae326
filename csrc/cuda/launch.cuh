// A launch, on the GPU or in the emulation.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"

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
  if (error != cudaSuccess) throw std::runtime_error(std::string("launch of a kernel: ") + cudaGetErrorString(error));
#else
  Machine::get().run({{unsigned(grid_x), unsigned(grid_y)},
                      {unsigned(block_x), unsigned(block_y)},
                      cluster,
                      size_t(shared_bytes),
                      [=] { kernel(arguments); }});
#endif
}

}  // namespace fusednorm_cuda
