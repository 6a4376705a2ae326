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

namespace fusednorm_fastpath {

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

struct SavedOptions {
  double scale;
  bool native, causal;
  int64_t window_left, window_right;
};

struct Saved {
  at::Tensor query, key, value, out, lse, key_mask;
};

using OutputMask = std::array<bool, 3>;  // gradients: of query, key, value

// Second derivatives, batched cotangents, tensors of other kinds, cotangents beside which torch's 0 * NaN would be NaN.
variable_list gradients_in_python(const SavedOptions& options, const OutputMask& output_mask, const at::Tensor& dout,
                                  const Saved& saved) {
  pybind11::gil_scoped_acquire gil;
  const pybind11::object backward = pybind11::module_::import("fusednorm.autograd.attention").attr("fastpath_backward");
  const pybind11::object key_mask =
      saved.key_mask.defined() ? pybind11::cast(saved.key_mask) : pybind11::object(pybind11::none());
  const pybind11::tuple found =
      backward(dout, saved.query, saved.key, saved.value, saved.out, saved.lse, key_mask, options.scale, options.native,
               options.causal, options.window_left, options.window_right, output_mask[0], output_mask[1], output_mask[2]);
  variable_list gradients(3);
  for (size_t i = 0; i < 3; ++i)
    if (!pybind11::object(found[i]).is_none()) gradients[i] = pybind11::cast<at::Tensor>(found[i]);
  return gradients;
}

fusednorm_cpu::AttentionTensors tensors(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                        const at::Tensor& key_mask) {
  return {handle(q), handle(k), handle(v), {}, handle(key_mask), {}, {}, {}};
}

fusednorm_cpu::AttentionOptions native_options(const SavedOptions& options) {
  return {options.scale, 0.0, false, options.window_left, options.causal ? 0 : options.window_right, 0.0};
}

// Memory for a result that lies as `tensor` does, or contiguously where its rows do not: torch's attention gives the same.
at::Tensor rows_like(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 ? at::empty_like(tensor) : at::empty(tensor.sizes(), tensor.options());
}

variable_list gradients_natively(const SavedOptions& options, const OutputMask& output_mask, const at::Tensor& dout,
                                 const Saved& saved) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (!options.native) {
    // hooks on saved tensors may bring them back with other strides, which the kernel does not look at
    const auto rows = [](const at::Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); };
    auto [dquery, dkey, dvalue] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        dout, rows(saved.query), rows(saved.key), rows(saved.value), rows(saved.out), saved.lse, 0.0, options.causal,
        std::nullopt, options.scale);
    return {dquery, dkey, dvalue};
  }
  RECORD_FUNCTION("fusednorm_cpu::attention_bwd", c10::ArrayRef<const c10::IValue>{});
  variable_list found(3);
  const std::array<const at::Tensor*, 3> operands{&saved.query, &saved.key, &saved.value};
  for (size_t i = 0; i < 3; ++i)
    if (output_mask[i]) found[i] = rows_like(*operands[i]);
  fusednorm_cpu::run_attention_backward(
      tensors(saved.query, saved.key, saved.value, saved.key_mask), native_options(options),
      // hooks on saved tensors may bring the statistics back with other strides
      {handle(saved.out), handle(saved.lse.contiguous())}, {handle(dout), {}},
      {handle(found[0]), handle(found[1]), handle(found[2]), {}});
  return found;
}

variable_list gradients(const SavedOptions& options, const OutputMask& output_mask, const at::Tensor& dout,
                        const Saved& saved) {
  if (!dout.defined()) return variable_list(3);
  bool native = !at::GradMode::is_enabled() && plain_thread() && plain(dout);
  for (const at::Tensor* tensor : {&saved.query, &saved.key, &saved.value, &saved.out, &saved.lse, &saved.key_mask})
    native = native && plain(*tensor);
  native = native && (options.native || !options.causal || bounded("dout", dout));
  variable_list found = (native ? gradients_natively : gradients_in_python)(options, output_mask, dout, saved);
  for (size_t i = 0; i < 3; ++i)
    if (!output_mask[i]) found[i].reset();
  return found;
}

// It saves what AttentionFunction saves.
struct AttentionBackward : public Node {
  SavedVariable query, key, value, out, lse, key_mask;
  SavedOptions options;
  bool masked;  // whether there is a key_mask

  std::array<SavedVariable*, 6> all() { return {&query, &key, &value, &out, &lse, &key_mask}; }

  std::string name() const override { return "FusedAttentionBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : all()) variable->reset_data();
  }

  variable_list apply(variable_list&& cotangents) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return gradients(options, output_mask(), cotangents[0], saved());
  }

  OutputMask output_mask() const {
    return {task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2)};
  }

  Saved saved() {
    return {query.unpack(), key.unpack(), value.unpack(), out.unpack(pointer_to(this)), lse.unpack(),
            masked ? key_mask.unpack() : at::Tensor()};
  }

  // --- compiled autograd: what the node depends on, and the same computation as a function that it can trace ---

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    for (const SavedVariable* variable : {&query, &key, &value, &lse, &key_mask}) args.collect(*variable, false);
    args.collect(out, true);
    args.collect(options.scale);
    for (const bool flag : {options.native, options.causal, masked}) args.collect(flag);
    for (const int64_t side : {options.window_left, options.window_right}) args.collect(side);
  }

  variable_list apply_with_saved(const variable_list& cotangents,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (SavedVariable* variable : all()) swap.before(*variable);
    const Saved k = saved();
    variable_list tensors{k.query, k.key, k.value, k.out, k.lse};
    if (masked) tensors.push_back(k.key_mask);
    PackedArgs packed;
    packed.pack(tensors);
    for (const bool one : output_mask()) packed.pack(one);
    for (const bool flag : {options.native, options.causal}) packed.pack(flag);
    packed.pack(options.scale);
    packed.pack(options.window_left);
    packed.pack(options.window_right);
    variable_list found = apply_traced(*this, traced, packed, cotangents, swap);
    for (SavedVariable* variable : all()) swap.after(*variable);
    return found;
  }

  static variable_list traced(const variable_list& cotangents, const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    const variable_list t = packed.unpack<variable_list>();
    OutputMask output_mask;
    for (bool& one : output_mask) one = packed.unpack<bool>();
    SavedOptions options;
    options.native = packed.unpack<bool>();
    options.causal = packed.unpack<bool>();
    options.scale = packed.unpack<double>();
    options.window_left = packed.unpack<int64_t>();
    options.window_right = packed.unpack<int64_t>();
    return gradients(options, output_mask, cotangents[0], {t[0], t[1], t[2], t[3], t[4], t.size() > 5 ? t[5] : at::Tensor()});
  }
};

struct Results {
  at::Tensor out, lse;
};

Results forward(const AttentionCall& call, const SavedOptions& options) {
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
  fusednorm_cpu::run_attention_forward(tensors(q, call.key, v, call.key_mask), native_options(options), handle(results.out),
                                       handle(results.lse));
  return results;
}

}  // namespace

bool bounded(const char* name, const at::Tensor& tensor) { return fusednorm_cpu::all_bounded(name, handle(tensor)); }

at::Tensor attention(const AttentionCall& call) {
  const SavedOptions options{call.scale, call.native, call.causal, call.window_left, call.window_right};
  const Results results = forward(call, options);
  const at::Tensor& out = results.out;
  if (!call.needs_grad) return out;
  const NodePointer pointer = make_node<AttentionBackward>();
  auto& node = static_cast<AttentionBackward&>(*pointer);
  node.set_next_edges(torch::autograd::collect_next_edges(call.query, call.key, call.value));
  torch::autograd::set_history(out, pointer);
  node.options = options;
  node.masked = call.key_mask.defined();
  node.query = SavedVariable(call.query, false);
  node.key = SavedVariable(call.key, false);
  node.value = SavedVariable(call.value, false);
  node.out = SavedVariable(out, true);
  node.lse = SavedVariable(results.lse, false);
  if (node.masked) node.key_mask = SavedVariable(call.key_mask, false);
  return out;
}

}  // namespace fusednorm_fastpath
