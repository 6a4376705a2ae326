#include "attention_launch.cuh"

namespace fusednorm_cuda {

AttentionLaunchers float16_attention() { return attention_launchers<Float16>(); }

}  // namespace fusednorm_cuda
