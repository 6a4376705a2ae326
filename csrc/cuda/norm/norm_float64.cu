#include "norm_launch.cuh"

namespace fusednorm_cuda {

Launchers float64_launchers() { return launchers_of<double, double>(); }

}  // namespace fusednorm_cuda
