#include <optional>
#include <vector>

#include "forms.h"
#include "launch.cuh"

namespace fusednorm_cuda {

namespace {

__global__ void any_kernel() {}

// Of `device`, which is the current one.
Limits ask(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  };
  // What runs may have been compiled for an older architecture than the device's, and knows nothing of clusters then.
  cudaFuncAttributes compiled{};
  check(cudaFuncGetAttributes(&compiled, any_kernel), "cudaFuncGetAttributes");
  const bool since_hopper = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && compiled.ptxVersion >= 90;
  Limits limits;
  limits.processors = attribute(cudaDevAttrMultiProcessorCount);
  limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  limits.clusters = since_hopper && attribute(cudaDevAttrClusterLaunch) ? 8 : 1;  // 8 is what every such device has
  limits.early = since_hopper;
  return limits;
}

}  // namespace

Limits limits(int device) {
  thread_local std::vector<std::optional<Limits>> known;  // of each device; an attribute costs more than a look here
  if (int(known.size()) <= device) known.resize(device + 1);
  if (!known[device]) known[device] = ask(device);
  return *known[device];
}

}  // namespace fusednorm_cuda
