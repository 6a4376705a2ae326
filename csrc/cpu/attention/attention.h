// Attention of the CPU library for those who link it: arguments checked, kernels run, outputs the caller's.
#pragma once

#include "../../common/attention_call.h"
#include "../../common/export.h"

namespace fusednorm_cpu {

using namespace fusednorm;

FUSEDNORM_EXPORT void run_attention_forward(const AttentionTensors& tensors, const AttentionOptions& options,
                                            const Handle& out, const Handle& lse);

FUSEDNORM_EXPORT void run_attention_backward(const AttentionTensors& tensors, const AttentionOptions& options,
                                             const AttentionKept& kept, const AttentionCotangents& cotangents,
                                             const AttentionGradients& wanted);

// Whether a tensor has no NaN and nothing so large that products of two could overflow (bounded.h).
FUSEDNORM_EXPORT bool all_bounded(const char* name, const Handle& tensor);

}  // namespace fusednorm_cpu
