#include "norm_launch.cuh"

namespace fusednorm_cuda {

Launchers bfloat16_launchers(bool float32_residual) {
  return float32_residual ? launchers_of<BFloat16, float>() : launchers_of<BFloat16, BFloat16>();
}

}  // namespace fusednorm_cuda
