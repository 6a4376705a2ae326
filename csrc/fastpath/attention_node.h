// Attention's node of the autograd graph, and the call that makes it.
#pragma once

#include <ATen/core/Tensor.h>

namespace fusednorm_fastpath {

struct AttentionOptions {
  double scale;
  bool native;  // by the library's kernels; by torch's, which know neither key_mask nor window, otherwise
  bool causal;
  int64_t window_left, window_right;  // -1: unbounded
};

struct AttentionCall : AttentionOptions {
  at::Tensor query, key, value;  // (batch, heads, length, head dim), not empty
  at::Tensor key_mask;           // undefined or (batch, keys)
  bool needs_grad;
};

at::Tensor attention(const AttentionCall& call);

bool bounded(const char* name, const at::Tensor& tensor);

}  // namespace fusednorm_fastpath
