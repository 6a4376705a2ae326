#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "forms.h"

namespace fusednorm_cuda {

namespace {

Limits ask(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
    if (error != cudaSuccess) throw std::runtime_error(std::string("cudaDeviceGetAttribute: ") + cudaGetErrorString(error));
    return value;
  };
  Limits limits;
  limits.processors = attribute(cudaDevAttrMultiProcessorCount);
  limits.clusters = attribute(cudaDevAttrClusterLaunch) ? 8 : 1;  // 8 is what every such device has
  limits.early = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  return limits;
}

}  // namespace

Limits limits(int device) {
  thread_local std::vector<Limits> known;  // of each device; an attribute costs more than a look here
  while (int(known.size()) <= device) known.push_back(ask(int(known.size())));
  return known[device];
}

}  // namespace fusednorm_cuda
