#include "norm_launch.cuh"

namespace fusednorm_cuda {

Launchers float16_launchers(bool float32_stream) {
  return float32_stream ? launchers_of<Float16, float>() : launchers_of<Float16, Float16>();
}

}  // namespace fusednorm_cuda
