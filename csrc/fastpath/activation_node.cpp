#include "activation_node.h"

#include <ATen/ops/add.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <mutex>

#include "node.h"
#include "plain.h"

namespace fusednorm_fastpath {

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

struct SavedOptions {
  int64_t activation;
  double dropout_p;
  bool bias;  // whether it was given
};

struct Saved {
  at::Tensor x, bias, seed;
};

using OutputMask = std::array<bool, 2>;  // gradients: of x, bias

fusednorm::BiasActCall library_call(const Saved& saved, const SavedOptions& options, const OutputMask& output_mask) {
  return {handle(saved.x), handle(saved.bias), handle(saved.seed),
          {options.activation, output_mask[0], output_mask[1]}, options.dropout_p};
}

// Second derivatives, batched cotangents, tensors of other kinds: by activation.py.
variable_list gradients_in_python(const SavedOptions& options, const OutputMask& output_mask, const at::Tensor& dy,
                                  const Saved& saved) {
  pybind11::gil_scoped_acquire gil;
  const auto optional = [](const at::Tensor& t) {
    return t.defined() ? pybind11::cast(t) : pybind11::object(pybind11::none());
  };
  const pybind11::object backward = pybind11::module_::import("fusednorm.autograd.activation").attr("fastpath_backward");
  const pybind11::tuple found =
      backward(dy, saved.x, optional(saved.bias), optional(saved.seed), options.activation, options.dropout_p, output_mask);
  variable_list gradients(2);
  for (size_t i = 0; i < 2; ++i)
    if (!pybind11::object(found[i]).is_none()) gradients[i] = pybind11::cast<at::Tensor>(found[i]);
  return gradients;
}

variable_list gradients_natively(const SavedOptions& options, const OutputMask& output_mask, const at::Tensor& dy,
                                 const Saved& saved) {
  RECORD_FUNCTION("fusednorm_cpu::bias_act_dropout_bwd", c10::ArrayRef<const c10::IValue>{});
  auto found = fusednorm_cpu::run_activation_backward(handle(dy), library_call(saved, options, output_mask));
  return {take(found.dx), take(found.dbias)};
}

variable_list gradients(const SavedOptions& options, const OutputMask& output_mask, const at::Tensor& dy, const Saved& saved) {
  if (!dy.defined()) return variable_list(2);
  const bool native = !at::GradMode::is_enabled() && plain_thread() && plain(dy) && plain(saved.x) && plain(saved.bias) &&
                      plain(saved.seed);
  return (native ? gradients_natively : gradients_in_python)(options, output_mask, dy, saved);
}

// It saves what BiasActDropoutFunction saves.
struct BiasActBackward : public Node {
  SavedVariable x, bias, seed;
  SavedOptions options;

  std::string name() const override { return "FusedBiasActBackward"; }

  std::array<SavedVariable*, 3> all() { return {&x, &bias, &seed}; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : all()) variable->reset_data();
  }

  variable_list apply(variable_list&& cotangents) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return gradients(options, output_mask(), cotangents[0], saved());
  }

  OutputMask output_mask() const { return {task_should_compute_output(0), task_should_compute_output(1)}; }

  Saved saved() {
    return {x.unpack(), options.bias ? bias.unpack() : at::Tensor(), options.dropout_p > 0 ? seed.unpack() : at::Tensor()};
  }

  // --- compiled autograd: what the node depends on, and the same computation as a function that it can trace ---

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    for (const SavedVariable* variable : {&x, &bias, &seed}) args.collect(*variable, false);
    args.collect(options.activation);
    args.collect(options.dropout_p);
    args.collect(options.bias);
  }

  variable_list apply_with_saved(const variable_list& cotangents,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (SavedVariable* variable : all()) swap.before(*variable);
    const Saved k = saved();
    variable_list found_tensors;
    for (const at::Tensor& tensor : {k.x, k.bias, k.seed})
      if (tensor.defined()) found_tensors.push_back(tensor);
    PackedArgs packed;
    packed.pack(found_tensors);
    packed.pack(output_mask());
    packed.pack(options.activation);
    packed.pack(options.dropout_p);
    packed.pack(options.bias);
    variable_list found = apply_traced(*this, traced, packed, cotangents, swap);
    for (SavedVariable* variable : all()) swap.after(*variable);
    return found;
  }

  static variable_list traced(const variable_list& cotangents, const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    const auto given = packed.unpack<variable_list>();
    const auto output_mask = packed.unpack<OutputMask>();
    const auto activation = packed.unpack<int64_t>();
    const auto dropout_p = packed.unpack<double>();
    const SavedOptions options{activation, dropout_p, packed.unpack<bool>()};
    Saved saved{given[0], options.bias ? given[1] : at::Tensor(), options.dropout_p > 0 ? given.back() : at::Tensor()};
    return gradients(options, output_mask, cotangents[0], saved);
  }
};

}  // namespace

at::Tensor bias_act_dropout(const BiasActCall& call) {
  at::Tensor y;
  {
    RECORD_FUNCTION("fusednorm_cpu::bias_act_dropout_fwd", c10::ArrayRef<const c10::IValue>{});
    fusednorm::Handle found = fusednorm_cpu::run_activation_forward(library_call(
        {call.x, call.bias, call.seed}, {call.activation, call.dropout_p, call.bias.defined()}, {false, false}));
    y = take(found);
  }
  if (!call.needs_grad) return y;
  const NodePointer pointer = make_node<BiasActBackward>();
  auto& node = static_cast<BiasActBackward&>(*pointer);
  node.set_next_edges(torch::autograd::collect_next_edges(call.x, call.bias));
  torch::autograd::set_history(y, pointer);
  node.options = {call.activation, call.dropout_p, call.bias.defined()};
  node.x = SavedVariable(call.x, false);
  if (node.options.bias) node.bias = SavedVariable(call.bias, false);
  if (node.options.dropout_p > 0) node.seed = SavedVariable(call.seed, false);
  return y;
}

at::Tensor bias_act_by_torch(const BiasActCall& call) {
  const at::Tensor u = call.bias.defined() ? at::add(call.x, call.bias) : call.x;
  switch (fusednorm::Activation(call.activation)) {
    case fusednorm::kRelu: return at::relu(u);
    case fusednorm::kGelu: return at::gelu(u, "none");
    case fusednorm::kGeluTanh: return at::gelu(u, "tanh");
    case fusednorm::kSilu: return at::silu(u);
    case fusednorm::kQuickGelu: return at::mul(u, at::sigmoid(at::mul(u, 1.702)));
  }
  TORCH_CHECK(false, "no activation has the number ", call.activation);
}

}  // namespace fusednorm_fastpath
