// Attention's node of the autograd graph, and the call that makes it.
#pragma once

#include <ATen/core/Tensor.h>

namespace fusednorm_fastpath {

struct AttentionOptions {
  double scale;
  bool native;  // by a library's kernels; by torch's, which know neither key_mask nor window, otherwise
  bool by_cuda;
  bool causal;
  int64_t window_left, window_right;  // -1: unbounded
};

struct AttentionCall : AttentionOptions {
  at::Tensor query, key, value;  // (batch, heads, length, head dim), not empty
  at::Tensor key_mask;           // undefined or (batch, keys)
  bool needs_grad;
};

at::Tensor attention(const AttentionCall& call);

// Whether the CUDA library is there, and takes the call, whose operands fit together.
bool cuda_takes(const AttentionCall& call);

bool bounded(const char* name, const at::Tensor& tensor);

}  // namespace fusednorm_fastpath
