// fusednorm_cuda::attention_fwd and _bwd: arguments checked, kernels launched. Outputs are the caller's, who lays them out.
#include "../../common/attention_call.h"
#include "../../common/export.h"
#include "../support/forms.h"
#include "../support/machine.h"
#include "../support/operands.h"
#include "../support/partials.h"
#include "attention_launch.h"

namespace fusednorm_cuda {

namespace {

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLeastFolded = 1e-30, kMostFolded = 1e30;  // scales that may be folded into an exponent
constexpr int64_t kLongest = int64_t(1) << 29;              // positions, and sums of a few, are 32-bit numbers

AttentionLaunchers launchers_of(Dtype dtype) {
  STD_TORCH_CHECK(dtype != kFloat64, "query: the kernels take float32, bfloat16 and float16, not float64");
  return dtype == kFloat32 ? float32_attention() : dtype == kBFloat16 ? bfloat16_attention() : float16_attention();
}

// What a kernel takes of a tensor with `batches`, `heads` and `positions` of them.
Operand operand_of(const Strided& s, Dtype dtype, int64_t batches, int64_t heads, int64_t positions, int64_t features) {
  const int64_t item = kItemSize[dtype];
  const auto even = [&](int64_t size, int64_t stride) { return size <= 1 || stride * item % 16 == 0; };
  const bool fits = aligned(s.data) && features * item % 16 == 0 && s.feature == 1 && even(batches, s.batch) &&
                    even(heads, s.head) && even(positions, s.position);
  return {s.data, s.batch * item, s.head * item, s.position * item, s.feature * item, fits};
}

// A call as the kernels take it.
struct Call {
  AttentionArguments given;
  Attention a = {};
  bool general;
  AttentionLaunchers launchers;

  Call(const AttentionTensors& tensors, const AttentionOptions& options, int64_t longest_query, int64_t longest_key)
      : given(tensors, options,
              [&](const char* name, const Handle& bounds, int64_t batches, int64_t, int64_t& longest) {
                longest = std::string(name) == "cu_seqlens_q" ? longest_query : longest_key;
                return fusednorm::boundaries_of(name, bounds, batches);
              }),
        launchers(launchers_of(given.call.dtype)) {
    const AttentionCall& c = given.call;
    const Handle& q = tensors.q;
    check_device("key", tensors.k, q), check_device("value", tensors.v, q);
    check_device("attn_mask", tensors.attn_mask, q), check_device("key_mask", tensors.key_mask, q);
    check_device("seed", tensors.seed, q);
    check_device("cu_seqlens_q", tensors.cu_queries, q), check_device("cu_seqlens_k", tensors.cu_keys, q);
    STD_TORCH_CHECK(c.n_queries <= kLongest && c.n_keys <= kLongest, "query: expected at most ", kLongest, " positions");
    STD_TORCH_CHECK(c.n_heads > 0 && c.n_batches > 0 && c.n_queries > 0, "query: expected no dimension of size 0");
    a.n_batches = int(c.n_batches), a.n_heads = int(c.n_heads), a.n_key_heads = int(c.n_key_heads);
    a.dim = int(c.dim), a.value_dim = int(c.value_dim);
    a.n_queries = int(c.n_queries), a.n_keys = int(c.n_keys), a.total_queries = c.total_queries;
    a.first_queries = c.first_queries, a.first_keys = c.first_keys;
    a.q = like_queries("query", tensors.q, c.dim);
    a.k = like_keys("key", tensors.k, c.dim), a.v = like_keys("value", tensors.v, c.value_dim);
    a.attn_mask = c.attn_mask, a.key_mask = c.key_mask;
    a.lower_right = c.lower_right;
    a.window_left = int(c.window_left < 0 ? kLongest : std::min(c.window_left, kLongest));
    a.window_right = int(c.window_right < 0 ? kLongest : std::min(c.window_right, kLongest));
    a.softcap = float(c.softcap), a.element = c.element, a.seed = c.seed_data;
    a.scale = float(c.scale);
    a.hides = a.attn_mask.data || a.key_mask.data || c.window_left >= 0 || c.window_right >= 0 || a.element.on;
    general = a.attn_mask.data || a.key_mask.data || a.softcap != 0 || a.element.on || c.dtype == kFloat32 ||
              !(kLeastFolded < c.scale && c.scale < kMostFolded);
    a.natural = general ? 1.0f : a.scale;
    a.factor = float(general ? kLog2E : c.scale * kLog2E);
  }

  Operand like_queries(const char* name, const Handle& tensor, int64_t features) const {
    const AttentionCall& c = given.call;
    check_device(name, tensor, given.tensors.q);
    return operand_of(given.like_queries(name, tensor, features), c.dtype, c.n_batches, c.n_heads, c.total_queries, features);
  }
  Operand like_keys(const char* name, const Handle& tensor, int64_t features) const {
    const AttentionCall& c = given.call;
    check_device(name, tensor, given.tensors.q);
    return operand_of(given.like_keys(name, tensor, features), c.dtype, c.n_batches, c.n_key_heads,
                      c.first_keys ? kLongest : c.n_keys, features);
  }
  float* statistics(const char* name, const Handle& tensor) const {
    check_device(name, tensor, given.tensors.q);
    return static_cast<float*>(given.statistics(name, tensor));
  }
};

void run_forward(const AttentionTensors& tensors, const AttentionOptions& options, int64_t longest_query,
                 int64_t longest_key, const Handle& out, const Handle& lse) {
  Call call(tensors, options, longest_query, longest_key);
  call.a.out = call.like_queries("out", out, call.given.call.value_dim);
  call.a.lse = call.statistics("lse", lse);
  const int device = device_of(tensors.q);
  const OnDevice guard(device);
  call.launchers.forward(call.a, call.general, current_cuda_stream(device));
}

void forward_op(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  StableIValue* rest = stack + 3;
  const AttentionTensors tensors = fusednorm::parse_attention_tensors(stack, rest);
  const AttentionOptions options = fusednorm::parse_attention_options(rest);
  const Handle out = parse_tensor(stack[16]), lse = parse_tensor(stack[17]);
  run_forward(tensors, options, to<int64_t>(stack[14]), to<int64_t>(stack[15]), out, lse);
}

// Of an additive mask: by one launch, or as sums of as many parts as fill the device.
void mask_gradient(Call& call, const Handle& dmask, const Limits& limit, void* cuda_stream) {
  Attention& a = call.a;
  const AttentionCall& c = call.given.call;
  int64_t own[4];
  const int64_t sizes[4] = {c.mask_batches, c.mask_heads, c.mask_queries, c.mask_keys};
  check_device("dmask", dmask, call.given.tensors.q);
  const Mask m = fusednorm::describe_mask("dmask", dmask, sizes, own);
  STD_TORCH_CHECK(std::equal(own, own + 4, sizes) && m.dtype == c.attn_mask.dtype && m.dtype != kMaskBool,
                  "dmask: its shape or dtype is not attn_mask's");
  STD_TORCH_CHECK(c.mask_keys == c.n_keys, "dmask: attn_mask is broadcast along the keys; its gradient follows from dlse");
  if (!m.data) return;
  a.mask_batches = int(c.mask_batches), a.mask_heads = int(c.mask_heads), a.mask_queries = int(c.mask_queries);
  a.dmask = {const_cast<char*>(m.data), m.batch, m.head, m.query, m.key};
  a.dmask_dtype = m.dtype;
  int64_t tiles;
  const int64_t blocks = call.launchers.mask_blocks(a, tiles);
  bool contiguous;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(dmask.get(), &contiguous));
  a.splits = contiguous ? int(std::max<int64_t>(1, std::min<int64_t>(tiles, 2 * limit.processors / blocks))) : 1;
  if (a.splits == 1) return call.launchers.mask(a, cuda_stream);
  const int64_t elements = fusednorm::product(sizes, 4), partial_sizes[2] = {a.splits, elements};
  const Handle partials = empty(call.given.tensors.q, 2, partial_sizes, kFloat32);
  a.dmask.data = fresh_data(partials);
  call.launchers.mask(a, cuda_stream);
  sum_partials({a.dmask.data, a.splits, int(elements), {const_cast<char*>(m.data)}, {Dtype(m.dtype)}}, 1, false, limit.early,
               cuda_stream);
}

void run_backward(const AttentionTensors& tensors, const AttentionOptions& options, int64_t longest_query,
                  int64_t longest_key, const AttentionKept& kept, const AttentionCotangents& cotangents,
                  const AttentionGradients& gradients) {
  const auto& [out, lse] = kept;
  const auto& [dout, dlse] = cotangents;
  const auto& [dq, dk, dv, dmask] = gradients;
  Call call(tensors, options, longest_query, longest_key);
  Attention& a = call.a;
  const AttentionCall& c = call.given.call;
  a.dout = call.like_queries("dout", dout, c.value_dim), a.out = call.like_queries("out", out, c.value_dim);
  a.dq = call.like_queries("dq", dq, c.dim);
  a.dk = call.like_keys("dk", dk, c.dim), a.dv = call.like_keys("dv", dv, c.value_dim);
  a.lse = call.statistics("lse", lse), a.dlse = call.statistics("dlse", dlse);
  const int device = device_of(tensors.q);
  const OnDevice guard(device);
  void* const cuda_stream = current_cuda_stream(device);
  // beside the rounding of 16-bit results it is no matter how out and lse were rounded, but for sums of them
  const bool precise = c.dtype == kFloat32 || dmask;
  const int64_t sizes[2] = {1 + precise, call.given.rows()};
  const Handle sums = empty(tensors.q, 2, sizes, kFloat32);
  a.delta = reinterpret_cast<float*>(fresh_data(sums));
  a.inverse = precise ? a.delta + sizes[1] : nullptr;
  call.launchers.queries(a, call.general, cuda_stream);
  if ((dk || dv) && c.n_keys > 0) call.launchers.keys(a, call.general, cuda_stream);
  if (dmask) mask_gradient(call, dmask, limits(device), cuda_stream);
}

void backward_op(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  StableIValue* rest = stack + 7;
  const AttentionTensors tensors = fusednorm::parse_attention_tensors(stack + 2, rest);
  const AttentionOptions options = fusednorm::parse_attention_options(rest);
  const AttentionCotangents cotangents{parse_tensor(stack[0]), parse_optional(stack[1])};
  const AttentionKept kept{parse_tensor(stack[5]), parse_tensor(stack[6])};
  run_backward(tensors, options, to<int64_t>(stack[18]), to<int64_t>(stack[19]), kept, cotangents,
               {parse_optional(stack[20]), parse_optional(stack[21]), parse_optional(stack[22]), parse_optional(stack[23])});
}

STABLE_TORCH_LIBRARY_FRAGMENT(fusednorm_cuda, m) {
  const std::string shared = std::string(fusednorm::kAttentionArguments) + "int max_seqlen_q, int max_seqlen_k, ";
  m.def(("attention_fwd(Tensor q, Tensor k, Tensor v, " + shared + "Tensor(a!) out, Tensor(b!) lse) -> ()").c_str());
  m.def(("attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, " + shared +
         "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dmask) -> ()").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(fusednorm_cuda, FN_DISPATCH_KEY, m) {
  m.impl("attention_fwd", &forward_op);
  m.impl("attention_bwd", &backward_op);
}

}  // namespace

}  // namespace fusednorm_cuda

extern "C" {
FUSEDNORM_EXPORT extern const fusednorm::Attentions fusednorm_cuda_attentions;  // as fusednorm_cuda_norms
const fusednorm::Attentions fusednorm_cuda_attentions = {fusednorm::kAttentionsAbi, fusednorm_cuda::run_forward,
                                                         fusednorm_cuda::run_backward};
}
