// What the bindings of attention hand to its kernels: plain data, as in norm_args.h.
#pragma once

#include "../../common/attention_data.h"
#include "../norm/norm_args.h"

namespace fusednorm_cpu {

// Queries and keys are cut into blocks of this many, a tile of logits being a block of either. A multiple of the lanes of
// a vector and of the four columns that one evaluation of Philox serves.
constexpr int64_t kBlockSize = 64;
// From a row of a tile to the next one: with powers of two rows share the sets of the first cache (a product of tiles took
// 5.6 microseconds among others, 3.7 by itself).
constexpr int64_t kStride = kBlockSize + 16;

// Kernels take ranges of the work that is numbered by their *_items(); no item depends on another. A workspace of
// workspace() bytes belongs to one thread at a time.
struct AttentionKernels {
  int64_t (*workspace)(const AttentionCall&);
  int64_t (*head_workspace)(const AttentionCall&);  // of head_gradients
  void (*forward)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);         // blocks of queries
  void (*delta)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);           // blocks of queries
  void (*precise_delta)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);   // blocks of queries; norms too
  void (*query_gradient)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);  // blocks of queries; norms
  void (*key_gradients)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);   // blocks of keys
  // All four, but precise_delta only of at most kBlockSize keys: the same bits. Heads of keys.
  void (*head_gradients)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);
  void (*mask_gradient)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);   // tiles of the mask
  bool (*bounded)(const void* data, Dtype dtype, int64_t n, int64_t stride);
};

}  // namespace fusednorm_cpu
