// Attention of the CPU library for those who link it: arguments checked, kernels run, outputs the caller's.
#pragma once

#include "../../common/handles.h"
#include "../../common/export.h"

namespace fusednorm_cpu {

using fusednorm::Handle;

// Undefined where not given. (batch, heads, positions, features), packed sequences (positions, heads, features).
struct AttentionTensors {
  Handle q, k, v, attn_mask, key_mask, seed, cu_queries, cu_keys;
};

struct AttentionOptions {
  double scale, dropout_p;
  bool lower_right;
  int64_t window_left, window_right;  // -1: unbounded; causal is a right of 0
  double softcap;
};

struct AttentionKept {
  Handle out, lse;
};

struct AttentionCotangents {
  Handle dout, dlse;  // dlse may be undefined
};

struct AttentionGradients {
  Handle dq, dk, dv, dmask;  // undefined where not wanted
};

FUSEDNORM_EXPORT void run_attention_forward(const AttentionTensors& tensors, const AttentionOptions& options,
                                            const Handle& out, const Handle& lse);

FUSEDNORM_EXPORT void run_attention_backward(const AttentionTensors& tensors, const AttentionOptions& options,
                                             const AttentionKept& kept, const AttentionCotangents& cotangents,
                                             const AttentionGradients& wanted);

// Whether a tensor has no NaN and nothing so large that products of two could overflow (bounded.h).
FUSEDNORM_EXPORT bool all_bounded(const char* name, const Handle& tensor);

}  // namespace fusednorm_cpu
