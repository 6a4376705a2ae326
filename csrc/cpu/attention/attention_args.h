// What the bindings of attention hand to its kernels: plain data, as in norm_args.h.
#pragma once

#include "../norm/norm_args.h"

namespace fusednorm_cpu {

// Queries and keys are cut into blocks of this many, a tile of logits being a block of either. A multiple of the lanes of
// a vector and of the four columns that one evaluation of Philox serves.
constexpr int64_t kBlockSize = 64;
// From a row of a tile to the next one: with powers of two rows share the sets of the first cache (a product of tiles took
// 5.6 microseconds among others, 3.7 by itself).
constexpr int64_t kStride = kBlockSize + 16;

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
  uint64_t seed;
  Dropout element;
  void* lse;  // (batch, heads, query), packed (heads, total_queries): rows of the dropout mask are numbered as its elements

  // of the backward; gradients that are not wanted have no data
  Strided dout, dq, dk, dv;
  const void* dlse;  // as lse, or null
  void* delta;       // as lse: sum(dout * out), in exact arithmetic the sum of probabilities * their gradients
  void* norms;       // as lse: 1 over the sum of probabilities, which lse's rounding makes another number than 1
  bool precise;      // whether precise_delta finds norms, and not query_gradient
  Strided dmask;     // of the sizes that attn_mask has, 1 where it is broadcast
  int64_t mask_batches, mask_heads, mask_queries, mask_keys;
};

// Kernels take ranges of the work that is numbered by their *_items(); no item depends on another. A workspace of
// workspace() bytes belongs to one thread at a time.
struct AttentionKernels {
  int64_t (*workspace)(const AttentionCall&);
  void (*forward)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);         // blocks of queries
  void (*delta)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);           // blocks of queries
  void (*precise_delta)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);   // blocks of queries; norms too
  void (*query_gradient)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);  // blocks of queries; norms
  void (*key_gradients)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);   // blocks of keys
  void (*mask_gradient)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);   // tiles of the mask
  bool (*bounded)(const void* data, Dtype dtype, int64_t n, int64_t stride);
};

}  // namespace fusednorm_cpu
