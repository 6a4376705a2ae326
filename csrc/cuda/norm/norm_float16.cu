#include "norm_launch.cuh"

namespace fusednorm_cuda {

Launchers float16_launchers(bool float32_residual) {
  return float32_residual ? launchers_of<Float16, float>() : launchers_of<Float16, Float16>();
}

}  // namespace fusednorm_cuda
