#include "attention_node.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/record_function.h>

#include "../cpu/attention/attention.h"
#include "cuda_library.h"
#include "node.h"

namespace fusednorm_fastpath {

namespace {

fusednorm_cpu::AttentionTensors tensors(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                        const at::Tensor& key_mask) {
  return {handle(q), handle(k), handle(v), {}, handle(key_mask), {}, {}, {}};
}

fusednorm_cpu::AttentionOptions library_options(const AttentionOptions& options) {
  return {options.scale, 0.0, false, options.window_left, options.causal ? 0 : options.window_right, 0.0};
}

void run_forward(const AttentionOptions& options, const fusednorm_cpu::AttentionTensors& given, const at::Tensor& q,
                 const at::Tensor& k, const at::Tensor& out, const at::Tensor& lse) {
  if (options.by_cuda)
    cuda.attentions->forward(given, library_options(options), q.size(2), k.size(2), handle(out), handle(lse));
  else
    fusednorm_cpu::run_attention_forward(given, library_options(options), handle(out), handle(lse));
}

void run_backward(const AttentionOptions& options, const fusednorm_cpu::AttentionTensors& given, const at::Tensor& q,
                  const at::Tensor& k, const fusednorm::AttentionKept& kept, const fusednorm::AttentionCotangents& cotangents,
                  const fusednorm::AttentionGradients& gradients) {
  if (options.by_cuda)
    cuda.attentions->backward(given, library_options(options), q.size(2), k.size(2), kept, cotangents, gradients);
  else
    fusednorm_cpu::run_attention_backward(given, library_options(options), kept, cotangents, gradients);
}

// Memory for a result that lies as `tensor` does, or contiguously where its rows do not: torch's attention gives the same.
at::Tensor rows_like(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 ? at::empty_like(tensor) : at::empty(tensor.sizes(), tensor.options());
}

struct Attention {
  static constexpr char kName[] = "FusedAttentionBackward", kModule[] = "fusednorm.autograd.attention";
  static constexpr size_t kInputs = 3, kSaved = 6;  // query, key, value; these, out, lse, key_mask
  static constexpr int kOut = 3;
  using Options = AttentionOptions;

  template <class O, class F>
  static void each(O& o, const F& f) {
    f(o.scale), f(o.native), f(o.by_cuda), f(o.causal), f(o.window_left), f(o.window_right);
  }

  static pybind11::tuple python_options(const Options& o, const Wanted<Attention>& wanted) {
    const char* const by = !o.native ? "torch" : o.by_cuda ? "cuda" : "cpu";
    return pybind11::make_tuple(o.scale, by, o.causal, o.window_left, o.window_right, wanted[0], wanted[1], wanted[2]);
  }

  static variable_list gradients(const Options& options, const Wanted<Attention>& wanted,
                                 const variable_list& cotangents, const Saved<Attention>& saved) {
    const at::Tensor& dout = cotangents[0];
    if (!dout.defined()) return variable_list(3);
    // beside other cotangents torch's 0 * NaN would be NaN
    const bool natively = plain_backward<Attention>(cotangents, saved, device_key(options.by_cuda)) &&
                          (options.native || !options.causal || bounded("dout", dout));
    variable_list found = natively ? gradients_natively(options, wanted, dout, saved)
                                   : gradients_in_python<Attention>(options, wanted, cotangents, saved);
    for (size_t i = 0; i < 3; ++i)
      if (!wanted[i]) found[i].reset();
    return found;
  }

  static variable_list gradients_natively(const Options& options, const Wanted<Attention>& wanted,
                                          const at::Tensor& dout, const Saved<Attention>& saved) {
    const auto& [query, key, value, out, lse, key_mask] = saved;
    at::AutoDispatchBelowADInplaceOrView below;
    if (!options.native) {
      // hooks on saved tensors may bring them back with other strides, which the kernel does not look at
      const auto rows = [](const at::Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); };
      auto [dquery, dkey, dvalue] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          dout, rows(query), rows(key), rows(value), rows(out), lse, 0.0, options.causal, std::nullopt, options.scale);
      return {dquery, dkey, dvalue};
    }
    RECORD_FUNCTION(options.by_cuda ? "fusednorm_cuda::attention_bwd" : "fusednorm_cpu::attention_bwd",
                    c10::ArrayRef<const c10::IValue>{});
    variable_list found(3);
    for (size_t i = 0; i < 3; ++i)
      if (wanted[i]) found[i] = rows_like(saved[i]);
    // hooks on saved tensors may bring the statistics back with other strides
    run_backward(options, tensors(query, key, value, key_mask), query, key, {handle(out), handle(lse.contiguous())},
                 {handle(dout), {}}, {handle(found[0]), handle(found[1]), handle(found[2]), {}});
    return found;
  }
};

struct Results {
  at::Tensor out, lse;
};

Results forward(const AttentionCall& call) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (!call.native) {
    auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(call.query, call.key, call.value, 0.0, call.causal,
                                                                      std::nullopt, call.scale);
    return {out, lse};
  }
  RECORD_FUNCTION(call.by_cuda ? "fusednorm_cuda::attention_fwd" : "fusednorm_cpu::attention_fwd",
                  c10::ArrayRef<const c10::IValue>{});
  const at::Tensor &q = call.query, &v = call.value;
  const at::TensorOptions statistics = q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Results results{v.size(3) == q.size(3) ? rows_like(q) : at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options()),
                  at::empty({q.size(0), q.size(1), q.size(2)}, statistics)};
  run_forward(call, tensors(q, call.key, v, call.key_mask), q, call.key, results.out, results.lse);
  return results;
}

}  // namespace

bool bounded(const char* name, const at::Tensor& tensor) { return fusednorm_cpu::all_bounded(name, handle(tensor)); }

bool cuda_takes(const AttentionCall& call) {
  constexpr int64_t kLongest = int64_t(1) << 29;  // of csrc/cuda/attention/attention_ops.cpp
  const at::Tensor& q = call.query;
  if (q.scalar_type() == at::kDouble || q.size(2) > kLongest || call.key.size(2) > kLongest || !cuda.runs_on(q)) return false;
  for (const at::Tensor* other : {&call.key, &call.value, &call.key_mask})
    if (other->defined() && other->device() != q.device()) return false;
  return true;
}

at::Tensor attention(const AttentionCall& call) {
  const auto [out, lse] = forward(call);
  if (call.needs_grad)
    record<Attention>(call, {&out}, {&call.query, &call.key, &call.value, &out, &lse, &call.key_mask}, Attention::kOut,
                      call.query, call.key, call.value);
  return out;
}

}  // namespace fusednorm_fastpath
