#include "attention_node.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <mutex>

#include "../cpu/attention/attention.h"
#include "node.h"
#include "plain.h"

namespace fusednorm_shortcut {

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

struct Facts {
  double scale;
  bool native, causal;
  int64_t window_left, window_right;
};

struct Kept {
  at::Tensor query, key, value, out, lse, key_mask;
};

using Wanted = std::array<bool, 3>;  // gradients: of query, key, value

// Second derivatives, batched cotangents, tensors of other kinds, cotangents beside which torch's 0 * NaN would be NaN.
variable_list gradients_in_python(const Facts& facts, const Wanted& wanted, const at::Tensor& dout, const Kept& kept) {
  pybind11::gil_scoped_acquire gil;
  const pybind11::object backward = pybind11::module_::import("fusednorm._attention_function").attr("shortcut_backward");
  const pybind11::object key_mask =
      kept.key_mask.defined() ? pybind11::cast(kept.key_mask) : pybind11::object(pybind11::none());
  const pybind11::tuple found =
      backward(dout, kept.query, kept.key, kept.value, kept.out, kept.lse, key_mask, facts.scale, facts.native, facts.causal,
               facts.window_left, facts.window_right, wanted[0], wanted[1], wanted[2]);
  variable_list gradients(3);
  for (size_t i = 0; i < 3; ++i)
    if (!pybind11::object(found[i]).is_none()) gradients[i] = pybind11::cast<at::Tensor>(found[i]);
  return gradients;
}

fusednorm_cpu::AttentionTensors tensors(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                        const at::Tensor& key_mask) {
  return {handle(q), handle(k), handle(v), {}, handle(key_mask), {}, {}, {}};
}

fusednorm_cpu::AttentionOptions options(const Facts& facts) {
  return {facts.scale, 0.0, false, facts.window_left, facts.causal ? 0 : facts.window_right, 0.0};
}

// Memory for a result that lies as `tensor` does, or contiguously where its rows do not: torch's attention gives the same.
at::Tensor rows_like(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 ? at::empty_like(tensor) : at::empty(tensor.sizes(), tensor.options());
}

variable_list gradients_natively(const Facts& facts, const Wanted& wanted, const at::Tensor& dout, const Kept& kept) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (!facts.native) {
    // hooks on saved tensors may bring them back in another layout, which the kernel does not look at
    const auto rows = [](const at::Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); };
    auto [dquery, dkey, dvalue] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        dout, rows(kept.query), rows(kept.key), rows(kept.value), rows(kept.out), kept.lse, 0.0, facts.causal, std::nullopt, facts.scale);
    return {dquery, dkey, dvalue};
  }
  RECORD_FUNCTION("fusednorm_cpu::attention_bwd", c10::ArrayRef<const c10::IValue>{});
  variable_list found(3);
  const std::array<const at::Tensor*, 3> operands{&kept.query, &kept.key, &kept.value};
  for (size_t i = 0; i < 3; ++i)
    if (wanted[i]) found[i] = rows_like(*operands[i]);
  fusednorm_cpu::run_attention_backward(
      tensors(kept.query, kept.key, kept.value, kept.key_mask), options(facts),
      // hooks on saved tensors may bring the statistics back in another layout
      {handle(kept.out), handle(kept.lse.contiguous())}, {handle(dout), {}},
      {handle(found[0]), handle(found[1]), handle(found[2]), {}});
  return found;
}

variable_list gradients(const Facts& facts, const Wanted& wanted, const at::Tensor& dout, const Kept& kept) {
  if (!dout.defined()) return variable_list(3);
  bool native = !at::GradMode::is_enabled() && plain_thread() && plain(dout);
  for (const at::Tensor* tensor : {&kept.query, &kept.key, &kept.value, &kept.out, &kept.lse, &kept.key_mask})
    native = native && plain(*tensor);
  native = native && (facts.native || !facts.causal || moderate("dout", dout));
  variable_list found = (native ? gradients_natively : gradients_in_python)(facts, wanted, dout, kept);
  for (size_t i = 0; i < 3; ++i)
    if (!wanted[i]) found[i].reset();
  return found;
}

// What is kept is what AttentionFunction keeps.
struct AttentionBackward : public Node {
  SavedVariable query, key, value, out, lse, key_mask;
  Facts facts;
  bool masked;  // whether there is a key_mask

  std::array<SavedVariable*, 6> saved() { return {&query, &key, &value, &out, &lse, &key_mask}; }

  std::string name() const override { return "FusedAttentionBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : saved()) variable->reset_data();
  }

  variable_list apply(variable_list&& cotangents) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return gradients(facts, wanted(), cotangents[0], kept());
  }

  Wanted wanted() const {
    return {task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2)};
  }

  Kept kept() {
    return {query.unpack(), key.unpack(), value.unpack(), out.unpack(pointer_to(this)), lse.unpack(),
            masked ? key_mask.unpack() : at::Tensor()};
  }

  // --- compiled autograd: what the node depends on, and the same computation as a function that it can trace ---

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    for (const SavedVariable* variable : {&query, &key, &value, &lse, &key_mask}) args.collect(*variable, false);
    args.collect(out, true);
    args.collect(facts.scale);
    for (const bool fact : {facts.native, facts.causal, masked}) args.collect(fact);
    for (const int64_t side : {facts.window_left, facts.window_right}) args.collect(side);
  }

  variable_list apply_with_saved(const variable_list& cotangents,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (SavedVariable* variable : saved()) swap.before(*variable);
    const Kept k = kept();
    variable_list tensors{k.query, k.key, k.value, k.out, k.lse};
    if (masked) tensors.push_back(k.key_mask);
    PackedArgs packed;
    packed.pack(tensors);
    for (const bool one : wanted()) packed.pack(one);
    for (const bool fact : {facts.native, facts.causal}) packed.pack(fact);
    packed.pack(facts.scale);
    packed.pack(facts.window_left);
    packed.pack(facts.window_right);
    variable_list found = apply_traced(*this, traced, packed, cotangents, swap);
    for (SavedVariable* variable : saved()) swap.after(*variable);
    return found;
  }

  static variable_list traced(const variable_list& cotangents, const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    const variable_list t = packed.unpack<variable_list>();
    Wanted wanted;
    for (bool& one : wanted) one = packed.unpack<bool>();
    Facts facts;
    facts.native = packed.unpack<bool>();
    facts.causal = packed.unpack<bool>();
    facts.scale = packed.unpack<double>();
    facts.window_left = packed.unpack<int64_t>();
    facts.window_right = packed.unpack<int64_t>();
    return gradients(facts, wanted, cotangents[0], {t[0], t[1], t[2], t[3], t[4], t.size() > 5 ? t[5] : at::Tensor()});
  }
};

struct Results {
  at::Tensor out, lse;
};

Results forward(const AttentionCall& call, const Facts& facts) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (!call.native) {
    auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(call.query, call.key, call.value, 0.0, call.causal,
                                                                      std::nullopt, call.scale);
    return {out, lse};
  }
  RECORD_FUNCTION("fusednorm_cpu::attention_fwd", c10::ArrayRef<const c10::IValue>{});
  const at::Tensor &q = call.query, &v = call.value;
  const at::TensorOptions statistics = q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  Results results{v.size(3) == q.size(3) ? rows_like(q) : at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options()),
                  at::empty({q.size(0), q.size(1), q.size(2)}, statistics)};
  fusednorm_cpu::run_attention_forward(tensors(q, call.key, v, call.key_mask), options(facts), handle(results.out),
                                       handle(results.lse));
  return results;
}

}  // namespace

bool moderate(const char* name, const at::Tensor& tensor) { return fusednorm_cpu::all_moderate(name, handle(tensor)); }

at::Tensor attention(const AttentionCall& call) {
  const Facts facts{call.scale, call.native, call.causal, call.window_left, call.window_right};
  const Results results = forward(call, facts);
  const at::Tensor& out = results.out;
  if (!call.needs_grad) return out;
  const NodePointer pointer = make_node<AttentionBackward>();
  auto& node = static_cast<AttentionBackward&>(*pointer);
  node.set_next_edges(torch::autograd::collect_next_edges(call.query, call.key, call.value));
  torch::autograd::set_history(out, pointer);
  node.facts = facts;
  node.masked = call.key_mask.defined();
  node.query = SavedVariable(call.query, false);
  node.key = SavedVariable(call.key, false);
  node.value = SavedVariable(call.value, false);
  node.out = SavedVariable(out, true);
  node.lse = SavedVariable(results.lse, false);
  if (node.masked) node.key_mask = SavedVariable(call.key_mask, false);
  return out;
}

}  // namespace fusednorm_shortcut
