// A call of attention from the dispatcher's stack to plain data, which both libraries have in common.
#pragma once

#include <algorithm>
#include <string>

#include "attention_data.h"
#include "checked.h"
#include "norm_call.h"

namespace fusednorm {

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

// As Norms of norm_call.h.
struct Attentions {
  int64_t abi;
  void (*forward)(const AttentionTensors& tensors, const AttentionOptions& options, int64_t longest_query,
                  int64_t longest_key, const Handle& out, const Handle& lse);
  void (*backward)(const AttentionTensors& tensors, const AttentionOptions& options, int64_t longest_query,
                   int64_t longest_key, const AttentionKept& kept, const AttentionCotangents& cotangents,
                   const AttentionGradients& gradients);
};
constexpr int64_t kAttentionsAbi = ((int64_t(sizeof(AttentionTensors)) * 4096 + sizeof(AttentionOptions)) * 4096 +
                                    sizeof(AttentionKept)) * 4096 + sizeof(AttentionCotangents) * 64 + sizeof(AttentionGradients);

constexpr int64_t kMostHeadDim = 256;  // MOST_HEAD_DIM of fusednorm/_attention_checks.py

// A tensor (batch, heads, positions, features), or packed (positions, heads, features), of the sizes said.
inline Strided describe(const char* name, const Handle& tensor, Dtype dtype, bool packed, int64_t batches, int64_t heads,
                 int64_t positions, int64_t features) {
  if (!tensor) return {};
  const Sizes s = sizes_of(name, tensor);
  const int64_t four[] = {batches, heads, positions, features}, three[] = {positions, heads, features};
  const bool fits = packed ? s.ndim == 3 && std::equal(three, three + 3, s.sizes)
                           : s.ndim == 4 && std::equal(four, four + 4, s.sizes);
  STD_TORCH_CHECK(fits && dtype_of(name, tensor) == dtype, name, ": its shape or dtype does not fit");
  char* const data = data_of(name, tensor, s, kItemSize[dtype]);
  if (packed) return {data, 0, s.strides[1], s.strides[0], s.strides[2]};
  return {data, s.strides[0], s.strides[1], s.strides[2], s.strides[3]};
}

// Its own sizes go to `own`, 1 where it is broadcast.
inline Mask describe_mask(const char* name, const Handle& tensor, const int64_t (&sizes)[4], int64_t (&own)[4]) {
  std::fill(own, own + 4, 1);
  if (!tensor) return {};
  const Sizes s = sizes_of(name, tensor);
  STD_TORCH_CHECK(s.ndim <= 4, name, ": expected at most 4 dimensions");
  int64_t strides[4] = {};
  for (int64_t d = 4 - s.ndim; d < 4; ++d) {
    own[d] = s.sizes[d - (4 - s.ndim)];
    STD_TORCH_CHECK(own[d] == 1 || own[d] == sizes[d], name, ": its shape does not fit");
    strides[d] = own[d] == 1 ? 0 : s.strides[d - (4 - s.ndim)];
  }
  const MaskDtype dtype = has_dtype(tensor, aoti_torch_dtype_bool()) ? kMaskBool : MaskDtype(dtype_of(name, tensor));
  return {data_of(name, tensor, s, dtype == kMaskBool ? 1 : kItemSize[dtype]), dtype, strides[0], strides[1], strides[2], strides[3]};
}

// Boundaries of packed sequences, wherever they lie.
inline const int32_t* boundaries_of(const char* name, const Handle& tensor, int64_t batches) {
  const Sizes s = sizes_of(name, tensor);
  STD_TORCH_CHECK(has_dtype(tensor, aoti_torch_dtype_int32()) && s.ndim == 1 && s.sizes[0] == batches + 1 &&
                      (batches == 0 || s.strides[0] == 1),
                  name, ": expected contiguous int32 boundaries, one more than sequences");
  return (const int32_t*)data_of(name, tensor, s, sizeof(int32_t));
}

constexpr char kAttentionArguments[] =
    "Tensor? attn_mask, Tensor? key_mask, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, "
    "float dropout_p, bool lower_right, int window_left, int window_right, float softcap, ";

// What both ops take, as the kernels want it, but for the boundaries of packed sequences and the seed, which lie where the
// kernels run. The handles live as long as the call.
struct AttentionArguments {
  const AttentionTensors& tensors;
  AttentionCall call = {};

  // `bounds(name, tensor, sequences, total, longest)` checks boundaries, says where they are and how long a sequence is.
  template <class Bounds>
  AttentionArguments(const AttentionTensors& given, const AttentionOptions& options, const Bounds& bounds) : tensors(given) {
    const Handle &q = given.q, &k = given.k, &v = given.v, &attn_mask = given.attn_mask, &key_mask = given.key_mask,
                 &seed = given.seed, &cu_queries = given.cu_queries, &cu_keys = given.cu_keys;
    AttentionCall& a = call;
    const bool packed = bool(cu_queries);
    STD_TORCH_CHECK(packed == bool(cu_keys), "cu_seqlens_k: give both boundaries or none");
    const Sizes qs = sizes_of("query", q), ks = sizes_of("key", k), vs = sizes_of("value", v);
    const int64_t ndim = packed ? 3 : 4;
    STD_TORCH_CHECK(qs.ndim == ndim && ks.ndim == ndim && vs.ndim == ndim, "query: expected ", ndim, " dimensions");
    a.dtype = dtype_of("query", q);
    a.wide = a.dtype == kFloat64;
    a.n_heads = qs.sizes[1], a.n_key_heads = ks.sizes[1];
    a.dim = qs.sizes[ndim - 1], a.value_dim = vs.sizes[ndim - 1];
    STD_TORCH_CHECK(a.dim <= kMostHeadDim, "query: expected a head dim of at most ", kMostHeadDim, ", got ", a.dim);
    STD_TORCH_CHECK(a.value_dim <= kMostHeadDim, "value: expected a head dim of at most ", kMostHeadDim, ", got ",
                    a.value_dim);
    STD_TORCH_CHECK(a.n_heads == 0 || (a.n_key_heads > 0 && a.n_heads % a.n_key_heads == 0),
                    "key: its number of heads does not divide query's");
    const int64_t queries = qs.sizes[ndim == 4 ? 2 : 0], keys = ks.sizes[ndim == 4 ? 2 : 0];
    const Sizes sequences = packed ? sizes_of("cu_seqlens_q", cu_queries) : Sizes{};
    a.n_batches = packed ? product(sequences.sizes, sequences.ndim) - 1 : qs.sizes[0];
    STD_TORCH_CHECK(a.n_batches >= 0, "cu_seqlens_q: expected one boundary at least");
    a.q = describe("query", q, a.dtype, packed, a.n_batches, a.n_heads, queries, a.dim);
    a.k = describe("key", k, a.dtype, packed, a.n_batches, a.n_key_heads, keys, a.dim);
    a.v = describe("value", v, a.dtype, packed, a.n_batches, a.n_key_heads, keys, a.value_dim);
    a.n_queries = a.total_queries = queries, a.n_keys = keys;
    if (packed) {
      a.first_queries = bounds("cu_seqlens_q", cu_queries, a.n_batches, queries, a.n_queries);
      a.first_keys = bounds("cu_seqlens_k", cu_keys, a.n_batches, keys, a.n_keys);
      STD_TORCH_CHECK(!attn_mask && !key_mask, "attn_mask: packed sequences take no mask");
    }
    const int64_t sizes[4] = {a.n_batches, a.n_heads, a.n_queries, a.n_keys};
    int64_t own[4], key_own[4];
    a.attn_mask = describe_mask("attn_mask", attn_mask, sizes, own);
    a.mask_batches = own[0], a.mask_heads = own[1], a.mask_queries = own[2], a.mask_keys = own[3];
    if (key_mask) {
      const int64_t key_sizes[4] = {1, 1, a.n_batches, a.n_keys};
      const Mask mask = describe_mask("key_mask", key_mask, key_sizes, key_own);
      STD_TORCH_CHECK(mask.dtype == kMaskBool, "key_mask: expected bool");
      a.key_mask = {mask.data, kMaskBool, mask.query, 0, 0, mask.key};
    }
    a.scale = options.scale;
    a.element = dropout("dropout_p", options.dropout_p);
    a.lower_right = options.lower_right;
    constexpr int64_t kFar = int64_t(1) << 60;  // past any position, and far from where sums of positions overflow
    a.window_left = std::min(options.window_left, kFar), a.window_right = std::min(options.window_right, kFar);
    a.softcap = options.softcap;
    if (a.element.on) a.seed_data = seed_of(seed);
  }

  Strided like_queries(const char* name, const Handle& tensor, int64_t features) const {
    return describe(name, tensor, call.dtype, bool(tensors.cu_queries), call.n_batches, call.n_heads, call.total_queries, features);
  }
  Strided like_keys(const char* name, const Handle& tensor, int64_t features) const {
    const bool packed = bool(tensors.cu_keys);
    const int64_t keys = sizes_of("key", tensors.k).sizes[packed ? 0 : 2];
    return describe(name, tensor, call.dtype, packed, call.n_batches, call.n_key_heads, keys, features);
  }
  // A number for each head and query, one after another.
  void* statistics(const char* name, const Handle& tensor) const {
    if (!tensor) return nullptr;
    const Sizes s = sizes_of(name, tensor);
    const Dtype dtype = call.wide ? kFloat64 : kFloat32;
    int64_t step = 1;
    bool fits = dtype_of(name, tensor) == dtype && product(s.sizes, s.ndim) == rows();
    for (int64_t d = s.ndim - 1; d >= 0; --d) {
      fits &= s.sizes[d] == 1 || s.strides[d] == step || rows() == 0;
      step = times(step, s.sizes[d]);
    }
    STD_TORCH_CHECK(fits, name, ": expected a contiguous number of the compute type for each head and query");
    return data_of(name, tensor, s, kItemSize[dtype]);
  }
  int64_t rows() const { return times(tensors.cu_queries ? 1 : call.n_batches, call.n_heads, call.total_queries); }
};

inline AttentionTensors parse_attention_tensors(StableIValue* operands, StableIValue* rest) {
  return {parse_tensor(operands[0]), parse_tensor(operands[1]),  parse_tensor(operands[2]),  parse_optional(rest[0]),
          parse_optional(rest[1]),   parse_optional(rest[2]),    parse_optional(rest[3]),    parse_optional(rest[4])};
}

inline AttentionOptions parse_attention_options(StableIValue* rest) {
  using torch::stable::detail::to;
  return {to<double>(rest[5]),  to<double>(rest[6]),  to<bool>(rest[7]),
          to<int64_t>(rest[8]), to<int64_t>(rest[9]), to<double>(rest[10])};
}

}  // namespace fusednorm
