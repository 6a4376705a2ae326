#include "attention_launch.cuh"

namespace fusednorm_cuda {

AttentionLaunchers bfloat16_attention() { return attention_launchers<BFloat16>(); }

}  // namespace fusednorm_cuda
