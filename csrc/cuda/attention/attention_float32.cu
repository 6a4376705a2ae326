#include "attention_launch.cuh"

namespace fusednorm_cuda {

AttentionLaunchers float32_attention() { return attention_launchers<float>(); }

}  // namespace fusednorm_cuda
