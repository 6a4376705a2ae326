// A call of attention as both libraries describe it: plain data, as in data.h.
#pragma once

#include "data.h"

namespace fusednorm {

// A tensor (batch, heads, position, feature), strides in elements; absent when data is null.
struct Strided {
  char* data;
  int64_t batch, head, position, feature;
};

enum MaskDtype : int { kMaskFloat64, kMaskFloat32, kMaskBFloat16, kMaskFloat16, kMaskBool };  // as Dtype, and bool

// A mask (batch, heads, query, key), strides in elements, 0 along what it is broadcast over.
struct Mask {
  const char* data;
  MaskDtype dtype;
  int64_t batch, head, query, key;
};

// Arithmetic is in the compute type C (float or double), which statistics have too.
struct AttentionCall {
  int64_t n_batches, n_heads, n_key_heads, dim, value_dim;
  int64_t n_queries, n_keys;  // of a batch, or the most of a packed sequence
  // Where each packed sequence begins and the last one ends, or null; then all positions lie in one batch.
  const int32_t *first_queries, *first_keys;
  int64_t total_queries;
  Dtype dtype;
  bool wide;  // C is double
  Strided q, k, v, out;
  Mask attn_mask, key_mask;
  bool lower_right;
  int64_t window_left, window_right;  // -1: unbounded; causal is a right of 0
  double scale, softcap;
  const int64_t* seed_data;  // where the kernels run
  uint64_t seed;             // read from there, where that is the host
  Dropout element;
  void* lse;  // (batch, heads, query), packed (heads, total_queries): rows of the dropout mask are numbered as its elements

  // of the backward; gradients that are not wanted have no data
  Strided dout, dq, dk, dv;
  const void* dlse;  // as lse, or null
  void* delta;       // as lse: sum(dout * out), in exact arithmetic the sum of probabilities * their gradients
  void* norms;       // as lse: 1 over the sum of probabilities, which lse's rounding makes another number than 1
  bool precise;      // whether delta and norms are made of the probabilities, before all else
  Strided dmask;     // of the sizes that attn_mask has, 1 where it is broadcast
  int64_t mask_batches, mask_heads, mask_queries, mask_keys;
};

}  // namespace fusednorm
