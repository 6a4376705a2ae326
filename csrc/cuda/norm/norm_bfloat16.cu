#include "norm_launch.cuh"

namespace fusednorm_cuda {

Launchers bfloat16_launchers(bool float32_stream) {
  return float32_stream ? launchers_of<BFloat16, float>() : launchers_of<BFloat16, BFloat16>();
}

}  // namespace fusednorm_cuda
