// A launch, on the GPU or in the emulation.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#if defined(__CUDACC__)
#include <cxxabi.h>
#endif

#include "device.cuh"

namespace fusednorm_cuda {

struct Grid {
  int64_t x, y;
  int block_x, block_y;
  int cluster = 1;  // blocks along x
  int shared_bytes = 0;
  bool early = false;  // may begin before what was launched before it has ended: the kernel waits for that by itself
};

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline std::string name_of([[maybe_unused]] const void* kernel) {
#if CUDART_VERSION >= 12030
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) == cudaSuccess) {
    const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr), std::free);
    if (name) return name.get();
  }
#endif
  return "a kernel";
}

// Asks for more shared memory than the 48 KiB of every launch: once for each kernel and device, again only for more. It
// holds the lock meanwhile, so that no thread takes back what another has asked for.
template <class A>
void allow_shared(void (*kernel)(A), int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{reinterpret_cast<const void*>(kernel), device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  most = bytes;
}

// What cudaLaunchKernelEx takes; `attributes` has room for two.
template <class A>
cudaLaunchConfig_t configured(void (*kernel)(A), const Grid& grid, void* cuda_stream, cudaLaunchAttribute* attributes) {
  constexpr int kWithoutAsking = 48 << 10;
  if (grid.shared_bytes > kWithoutAsking) allow_shared(kernel, grid.shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.x), unsigned(grid.y));
  config.blockDim = dim3(unsigned(grid.block_x), unsigned(grid.block_y));
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(cuda_stream);
  config.attrs = attributes;
  if (grid.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {unsigned(grid.cluster), 1, 1};
  }
  if (grid.early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

#endif

// The one place that launches a kernel. Under emulation a test replaces this function, and nothing else, to launch by
// other means or to see what would be launched. So it stays a function of its own, and no launch goes past it.
template <class A>
void launch(void (*kernel)(A), const A& arguments, const Grid& grid, [[maybe_unused]] void* cuda_stream) {
#if defined(__CUDACC__)
  cudaLaunchAttribute attributes[2]{};
  const cudaLaunchConfig_t config = configured(kernel, grid, cuda_stream, attributes);
  if (const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments))
    check(error, ("launch of " + name_of(reinterpret_cast<const void*>(kernel))).c_str());
#else
  Machine::get().run({{unsigned(grid.x), unsigned(grid.y)},
                      {unsigned(grid.block_x), unsigned(grid.block_y)},
                      grid.cluster,
                      size_t(grid.shared_bytes),
                      [=] { kernel(arguments); }});
#endif
}

// Returns when what was launched on `cuda_stream` has ended.
inline void wait_for([[maybe_unused]] void* cuda_stream) {
#if defined(__CUDACC__)
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(cuda_stream)), "a kernel");
#endif
}

// Clusters that run at the same time on `device`, which is the current one: its multiprocessors stand in groups, and a
// group's rest, smaller than a cluster, stays idle. A grid of one cluster more takes twice as long.
template <class A>
int resident_clusters([[maybe_unused]] void (*kernel)(A), const Grid& grid, [[maybe_unused]] int device,
                      [[maybe_unused]] int processors) {
#if defined(__CUDACC__)
  using Key = std::tuple<const void*, int, int, int, int>;
  thread_local std::map<Key, int> known;
  const Key key{reinterpret_cast<const void*>(kernel), device, grid.block_x, grid.cluster, grid.shared_bytes};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  cudaLaunchAttribute attributes[2]{};
  const cudaLaunchConfig_t config = configured(kernel, grid, nullptr, attributes);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "cudaOccupancyMaxActiveClusters");
  return known[key] = clusters;
#else
  return processors / grid.cluster;
#endif
}

}  // namespace fusednorm_cuda
