// Whether the library and those who link it are of one build.
#pragma once

#include "../attention/attention.h"
#include "../activation/bias_act.h"
#include "../norm/norm.h"

namespace fusednorm_cpu {

// What both sides of the calls must have compiled alike: a file left from another build may not.
constexpr int64_t kAbi =
    fusednorm::kNormsAbi * 4096 + sizeof(AttentionTensors) * 8 + sizeof(AttentionOptions) +
    sizeof(fusednorm::BiasActCall);
FUSEDNORM_EXPORT int64_t abi();

}  // namespace fusednorm_cpu
