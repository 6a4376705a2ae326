// What the bindings of attention hand to the kernels: plain data.
#pragma once

#include "../../common/attention_data.h"
#include "../support/args.h"

namespace fusednorm_cuda {

// (batch, heads, position, feature), strides in bytes; absent when data is null.
struct Operand {
  char* data;
  int64_t batch, head, position, feature;
  bool aligned;  // rows are whole vectors of 16 bytes, and begin where one may
};

// Of every kernel. Positions are 32-bit numbers, and so are sums of a few of them.
struct Attention {
  int n_heads, n_key_heads, dim, value_dim;
  int n_queries, n_keys;  // of a batch, or the most of a packed sequence
  int n_tiles;            // of what a block owns
  const int32_t *first_queries, *first_keys;  // of packed sequences, or null
  int64_t total_queries;
  Operand q, k, v, out;
  Mask attn_mask, key_mask;
  bool lower_right;
  int window_left, window_right;  // past any position where unbounded
  bool hides;     // some key from some query, or drops: then what is not finite may have to be kept from a product
  float scale;    // of products
  float natural;  // from logits as the kernel keeps them to natural ones: scale, where these are the products themselves
  float factor;   // from these to exponents of 2
  float softcap;
  Dropout element;
  const int64_t* seed;
  float* lse;  // (batch, heads, query), packed (heads, total_queries): rows of the dropout mask are numbered as its elements

  // of the backward; gradients that are not wanted have no data
  Operand dout, dq, dk, dv;
  const float* dlse;
  float *delta, *inverse;  // inverse: 1 over the sum of probabilities, or null where that does not matter
  Strided dmask;           // or where `splits` > 1 float32 partial sums, (splits, elements of the mask)
  MaskDtype dmask_dtype;
  int mask_batches, mask_heads, mask_queries, n_batches, splits;
};

}  // namespace fusednorm_cuda
