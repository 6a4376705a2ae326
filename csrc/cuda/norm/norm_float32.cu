#include "norm_launch.cuh"

namespace fusednorm_cuda {

Launchers float32_launchers() { return launchers_of<float, float>(); }

}  // namespace fusednorm_cuda
