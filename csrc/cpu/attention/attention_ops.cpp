// fusednorm_cpu::attention_fwd and _bwd: arguments checked, blocks given to the kernels. Outputs are the caller's, who
// lays them out.
#include <algorithm>

#include "../../common/norm_call.h"
#include "attention.h"
#include "attention_args.h"
#include "../support/operands.h"
#include "../support/workspace.h"

namespace fusednorm_cpu {

namespace {

using torch::stable::detail::to;

constexpr int64_t kMostHeadDim = 256;  // MOST_HEAD_DIM of fusednorm/_attention_checks.py
constexpr int64_t kGrain = 1 << 18;  // multiplications that are worth another thread

// A tensor (batch, heads, positions, features), or packed (positions, heads, features), of the sizes said.
Strided describe(const char* name, const Handle& tensor, Dtype dtype, bool packed, int64_t batches, int64_t heads,
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

// The boundaries of packed sequences, and the longest of these.
const int32_t* boundaries(const char* name, const Handle& tensor, int64_t batches, int64_t total, int64_t& longest) {
  const Sizes s = sizes_of(name, tensor);
  STD_TORCH_CHECK(has_dtype(tensor, aoti_torch_dtype_int32()) && s.ndim == 1 && s.sizes[0] == batches + 1 &&
                      (batches == 0 || s.strides[0] == 1),
                  name, ": expected contiguous int32 boundaries, one more than sequences");
  const auto* const bounds = (const int32_t*)data_of(name, tensor, s, sizeof(int32_t));
  longest = 0;
  bool sound = bounds[0] == 0 && bounds[batches] == total;
  for (int64_t b = 0; b < batches; ++b) {
    sound &= bounds[b] <= bounds[b + 1];
    longest = std::max<int64_t>(longest, int64_t(bounds[b + 1]) - bounds[b]);
  }
  STD_TORCH_CHECK(sound, name, ": expected boundaries from 0 to ", total, " that never decrease");
  return bounds;
}

// Its own sizes go to `own`, 1 where it is broadcast.
Mask describe_mask(const char* name, const Handle& tensor, const int64_t (&sizes)[4], int64_t (&own)[4]) {
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

constexpr char kArguments[] =
    "Tensor? attn_mask, Tensor? key_mask, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, "
    "float dropout_p, bool lower_right, int window_left, int window_right, float softcap, ";

// What both ops take, as the kernels want it; the handles live as long as the call.
struct Arguments {
  const AttentionTensors& tensors;
  AttentionCall call = {};

  Arguments(const AttentionTensors& given, const AttentionOptions& options) : tensors(given) {
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
    const Sizes bounds = packed ? sizes_of("cu_seqlens_q", cu_queries) : Sizes{};
    a.n_batches = packed ? product(bounds.sizes, bounds.ndim) - 1 : qs.sizes[0];
    STD_TORCH_CHECK(a.n_batches >= 0, "cu_seqlens_q: expected one boundary at least");
    a.q = describe("query", q, a.dtype, packed, a.n_batches, a.n_heads, queries, a.dim);
    a.k = describe("key", k, a.dtype, packed, a.n_batches, a.n_key_heads, keys, a.dim);
    a.v = describe("value", v, a.dtype, packed, a.n_batches, a.n_key_heads, keys, a.value_dim);
    a.n_queries = a.total_queries = queries, a.n_keys = keys;
    if (packed) {
      a.first_queries = boundaries("cu_seqlens_q", cu_queries, a.n_batches, queries, a.n_queries);
      a.first_keys = boundaries("cu_seqlens_k", cu_keys, a.n_batches, keys, a.n_keys);
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
    if (a.element.on) a.seed = uint64_t(*seed_of(seed));
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

int64_t blocks(int64_t n) { return pieces(n, kBlockSize); }

// `kernel` over `count` items of `positions` each, against all `others`.
void run(void (*kernel)(const AttentionCall&, void*, int64_t, int64_t), const AttentionCall& a, int64_t count,
         int64_t positions, int64_t others) {
  if (!count) return;
  const int64_t cost = times(std::min(positions, kBlockSize), std::max<int64_t>(times(others, a.dim + a.value_dim), 1));
  parallel(count, std::max<int64_t>(kGrain / std::max<int64_t>(cost, 1), 1), kernels().attention->workspace(a),
           [&](void* memory, int64_t begin, int64_t end) { kernel(a, memory, begin, end); });
}

AttentionTensors parse_tensors(StableIValue* operands, StableIValue* rest) {
  return {parse_tensor(operands[0]), parse_tensor(operands[1]),  parse_tensor(operands[2]),  parse_optional(rest[0]),
          parse_optional(rest[1]),   parse_optional(rest[2]),    parse_optional(rest[3]),    parse_optional(rest[4])};
}

AttentionOptions parse_options(StableIValue* rest) {
  return {to<double>(rest[5]),  to<double>(rest[6]),  to<bool>(rest[7]),
          to<int64_t>(rest[8]), to<int64_t>(rest[9]), to<double>(rest[10])};
}

void forward_op(StableIValue* stack, uint64_t, uint64_t) {
  StableIValue* rest = stack + 3;
  const AttentionTensors tensors = parse_tensors(stack, rest);
  run_attention_forward(tensors, parse_options(rest), parse_tensor(stack[14]), parse_tensor(stack[15]));
}

void backward_op(StableIValue* stack, uint64_t, uint64_t) {
  StableIValue* rest = stack + 7;
  const AttentionTensors tensors = parse_tensors(stack + 2, rest);
  const AttentionKept kept{parse_tensor(stack[5]), parse_tensor(stack[6])};
  const AttentionCotangents cotangents{parse_tensor(stack[0]), parse_optional(stack[1])};
  const AttentionGradients wanted{parse_optional(stack[18]), parse_optional(stack[19]), parse_optional(stack[20]),
                                  parse_optional(stack[21])};
  run_attention_backward(tensors, parse_options(rest), kept, cotangents, wanted);
}

}  // namespace

void run_attention_forward(const AttentionTensors& tensors, const AttentionOptions& options, const Handle& out,
                           const Handle& lse) {
  Arguments given(tensors, options);
  AttentionCall& a = given.call;
  a.out = given.like_queries("out", out, a.value_dim);
  a.lse = given.statistics("lse", lse);
  run(kernels().attention->forward, a, times(a.n_batches, a.n_heads, blocks(a.n_queries)), a.n_queries, a.n_keys);
}

void run_attention_backward(const AttentionTensors& tensors, const AttentionOptions& options, const AttentionKept& kept,
                            const AttentionCotangents& cotangents, const AttentionGradients& wanted) {
  Arguments given(tensors, options);
  const auto& [dq, dk, dv, dmask] = wanted;
  AttentionCall& a = given.call;
  STD_TORCH_CHECK(a.n_heads > 0, "query: has no heads, and keys no group");
  a.dout = given.like_queries("dout", cotangents.dout, a.value_dim);
  a.out = given.like_queries("out", kept.out, a.value_dim);
  a.dq = given.like_queries("dq", dq, a.dim);
  a.dk = given.like_keys("dk", dk, a.dim);
  a.dv = given.like_keys("dv", dv, a.value_dim);
  a.lse = given.statistics("lse", kept.lse);
  a.dlse = given.statistics("dlse", cotangents.dlse);
  const int64_t bytes = times(given.rows(), a.wide ? 8 : 4);
  const int64_t query_blocks = times(a.n_batches, a.n_heads, blocks(a.n_queries));
  a.precise = dmask || a.n_keys <= kBlockSize;
  const Buffer statistics = allocate("two numbers a query", std::max<int64_t>(times(2, bytes), 1));
  a.delta = statistics.get();
  a.norms = (char*)a.delta + bytes;
  const AttentionKernels& k = *kernels().attention;
  if (a.precise)
    run(k.precise_delta, a, query_blocks, a.n_queries, a.n_keys);
  else
    run(k.delta, a, query_blocks, a.n_queries, 1);
  if (a.dq.data || !a.precise) run(k.query_gradient, a, query_blocks, a.n_queries, a.n_keys);
  if (a.dk.data || a.dv.data)
    run(k.key_gradients, a, times(a.n_batches, a.n_key_heads, blocks(a.n_keys)), a.n_keys, a.n_queries);
  if (!dmask) return;
  int64_t own[4];
  const int64_t sizes[4] = {a.mask_batches, a.mask_heads, a.mask_queries, a.mask_keys};
  const Mask m = describe_mask("dmask", dmask, sizes, own);
  STD_TORCH_CHECK(std::equal(own, own + 4, sizes) && m.dtype == a.attn_mask.dtype && m.dtype != kMaskBool,
                  "dmask: its shape or dtype is not attn_mask's");
  if (!m.data) return;
  a.dmask = {const_cast<char*>(m.data), m.batch, m.head, m.query, m.key};
  const int64_t tiles = times(a.mask_batches, a.mask_heads, blocks(a.mask_queries), blocks(a.mask_keys));
  run(k.mask_gradient, a, tiles, a.n_queries, times(a.n_batches, a.n_heads, a.n_keys) / tiles);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cpu, m) {
  m.def((std::string("attention_fwd(Tensor q, Tensor k, Tensor v, ") + kArguments +
         "Tensor(a!) out, Tensor(b!) lse) -> ()").c_str());
  m.def((std::string("attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, ") +
         kArguments + "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dmask) -> ()").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cpu, CPU, m) {
  m.impl("attention_fwd", forward_op);
  m.impl("attention_bwd", backward_op);
}

}  // namespace fusednorm_cpu
