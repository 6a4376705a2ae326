// fusednorm_cpu::attention_fwd and _bwd: arguments checked, blocks given to the kernels. Outputs are the caller's, who
// lays them out.
#include <algorithm>

#include "attention.h"
#include "attention_args.h"
#include "../support/operands.h"
#include "../support/workspace.h"

namespace fusednorm_cpu {

namespace {

constexpr int64_t kGrain = 1 << 18;  // multiplications that are worth another thread
constexpr int64_t kMostOfHead = 16 << 20;  // bytes of a thread, for a head; at 15.7 MiB still faster

// The boundaries of packed sequences, and the longest of these.
const int32_t* boundaries(const char* name, const Handle& tensor, int64_t batches, int64_t total, int64_t& longest) {
  const int32_t* const bounds = boundaries_of(name, tensor, batches);
  longest = 0;
  bool sound = bounds[0] == 0 && bounds[batches] == total;
  for (int64_t b = 0; b < batches; ++b) {
    sound &= bounds[b] <= bounds[b + 1];
    longest = std::max<int64_t>(longest, int64_t(bounds[b + 1]) - bounds[b]);
  }
  STD_TORCH_CHECK(sound, name, ": expected boundaries from 0 to ", total, " that never decrease");
  return bounds;
}

AttentionArguments described(const AttentionTensors& tensors, const AttentionOptions& options) {
  AttentionArguments given(tensors, options, boundaries);
  if (given.call.element.on) given.call.seed = uint64_t(*given.call.seed_data);
  return given;
}

int64_t blocks(int64_t n) { return pieces(n, kBlockSize); }

using Kernel = void (*)(const AttentionCall&, void* workspace, int64_t begin, int64_t end);

// `kernel` over `count` items of so many multiplications.
void run(Kernel kernel, const AttentionCall& a, int64_t count, int64_t cost, int64_t workspace) {
  if (!count) return;
  parallel(count, std::max<int64_t>(kGrain / std::max<int64_t>(cost, 1), 1), workspace,
           [&](void* memory, int64_t begin, int64_t end) { kernel(a, memory, begin, end); });
}

int64_t cost_of(const AttentionCall& a, int64_t positions, int64_t others) {
  return times(positions, std::max<int64_t>(times(others, a.dim + a.value_dim), 1));
}

// `kernel` over `count` blocks of `positions`, against all `others`.
void run_blocks(Kernel kernel, const AttentionCall& a, int64_t count, int64_t positions, int64_t others) {
  run(kernel, a, count, cost_of(a, std::min(positions, kBlockSize), others), kernels().attention->workspace(a));
}

// Whether to compute each tile once, a head of keys on one thread: five products instead of seven (with few keys nine), but
// no thread gets less than a head. Either way gives the same bits, so the number of threads may decide.
bool by_heads(const AttentionCall& a, bool few) {
  const bool of_keys = a.dk.data || a.dv.data;
  if ((a.dq.data || !a.precise) + of_keys + few < 2) return false;  // as many products
  if (kernels().attention->head_workspace(a) > kMostOfHead) return false;
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  const int64_t heads = times(a.n_batches, a.n_key_heads);
  return 5 * threads * pieces(heads, threads) <= 7 * heads;
}

void forward_op(StableIValue* stack, uint64_t, uint64_t) {
  StableIValue* rest = stack + 3;
  const AttentionTensors tensors = parse_attention_tensors(stack, rest);
  run_attention_forward(tensors, parse_attention_options(rest), parse_tensor(stack[14]), parse_tensor(stack[15]));
}

void backward_op(StableIValue* stack, uint64_t, uint64_t) {
  StableIValue* rest = stack + 7;
  const AttentionTensors tensors = parse_attention_tensors(stack + 2, rest);
  const AttentionKept kept{parse_tensor(stack[5]), parse_tensor(stack[6])};
  const AttentionCotangents cotangents{parse_tensor(stack[0]), parse_optional(stack[1])};
  const AttentionGradients wanted{parse_optional(stack[18]), parse_optional(stack[19]), parse_optional(stack[20]),
                                  parse_optional(stack[21])};
  run_attention_backward(tensors, parse_attention_options(rest), kept, cotangents, wanted);
}

}  // namespace

void run_attention_forward(const AttentionTensors& tensors, const AttentionOptions& options, const Handle& out,
                           const Handle& lse) {
  AttentionArguments given = described(tensors, options);
  AttentionCall& a = given.call;
  a.out = given.like_queries("out", out, a.value_dim);
  a.lse = given.statistics("lse", lse);
  run_blocks(kernels().attention->forward, a, times(a.n_batches, a.n_heads, blocks(a.n_queries)), a.n_queries, a.n_keys);
}

void run_attention_backward(const AttentionTensors& tensors, const AttentionOptions& options, const AttentionKept& kept,
                            const AttentionCotangents& cotangents, const AttentionGradients& wanted) {
  AttentionArguments given = described(tensors, options);
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
  const bool few = a.n_keys <= kBlockSize, whole = by_heads(a, few);
  if (a.precise && (!few || !whole)) run_blocks(k.precise_delta, a, query_blocks, a.n_queries, a.n_keys);
  if (whole) {
    const int64_t queries = times(a.n_queries, a.n_heads / a.n_key_heads);
    run(k.head_gradients, a, times(a.n_batches, a.n_key_heads), cost_of(a, queries, a.n_keys), k.head_workspace(a));
  } else {
    if (!a.precise) run_blocks(k.delta, a, query_blocks, a.n_queries, 1);
    if (a.dq.data || !a.precise) run_blocks(k.query_gradient, a, query_blocks, a.n_queries, a.n_keys);
    if (a.dk.data || a.dv.data)
      run_blocks(k.key_gradients, a, times(a.n_batches, a.n_key_heads, blocks(a.n_keys)), a.n_keys, a.n_queries);
  }
  if (!dmask) return;
  int64_t own[4];
  const int64_t sizes[4] = {a.mask_batches, a.mask_heads, a.mask_queries, a.mask_keys};
  const Mask m = describe_mask("dmask", dmask, sizes, own);
  STD_TORCH_CHECK(std::equal(own, own + 4, sizes) && m.dtype == a.attn_mask.dtype && m.dtype != kMaskBool,
                  "dmask: its shape or dtype is not attn_mask's");
  if (!m.data) return;
  a.dmask = {const_cast<char*>(m.data), m.batch, m.head, m.query, m.key};
  const int64_t tiles = times(a.mask_batches, a.mask_heads, blocks(a.mask_queries), blocks(a.mask_keys));
  run_blocks(k.mask_gradient, a, tiles, a.n_queries, times(a.n_batches, a.n_heads, a.n_keys) / tiles);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cpu, m) {
  m.def((std::string("attention_fwd(Tensor q, Tensor k, Tensor v, ") + kAttentionArguments +
         "Tensor(a!) out, Tensor(b!) lse) -> ()").c_str());
  m.def((std::string("attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, ") +
         kAttentionArguments + "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dmask) -> ()").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cpu, CPU, m) {
  m.impl("attention_fwd", forward_op);
  m.impl("attention_bwd", backward_op);
}

}  // namespace fusednorm_cpu
