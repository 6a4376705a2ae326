#include "norm_node.h"

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

namespace fusednorm_shortcut {

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

int64_t dtype_bits(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return fusednorm::kFloat64;
    case at::kFloat: return fusednorm::kFloat32;
    case at::kBFloat16: return fusednorm::kBFloat16;
    default: return fusednorm::kFloat16;
  }
}

struct Facts {
  int64_t normalized_ndim;
  double eps;
  bool rms, residual, weight, bias;  // the last three: whether they were given
};

// As norm_call.h takes them apart: x and the stream have one dtype here.
fusednorm::Options options(const Facts& facts, at::ScalarType dtype, unsigned output_mask) {
  const int64_t bits = dtype_bits(dtype);
  return fusednorm::Options(facts.normalized_ndim | bits << 7 | bits << 9 | int64_t(facts.rms) << 11 |
                            int64_t(facts.residual) << 13 | int64_t(output_mask) << 15);
}

struct Kept {
  at::Tensor z, stats, weight, bias;  // z is x without a residual
};

using Wanted = std::array<bool, 4>;  // gradients: of x, residual, weight, bias

// Gradients of z, weight, bias: second derivatives, batched cotangents, tensors of other kinds, by _norm_function.py.
std::array<at::Tensor, 3> gradients_in_python(const Facts& facts, const std::array<bool, 3>& wanted, const at::Tensor& dnormed,
                                              const at::Tensor& dz, const Kept& kept) {
  pybind11::gil_scoped_acquire gil;
  const auto optional = [](const at::Tensor& t) {
    return t.defined() ? pybind11::cast(t) : pybind11::object(pybind11::none());
  };
  const pybind11::object backward = pybind11::module_::import("fusednorm._norm_function").attr("shortcut_backward");
  const pybind11::tuple found = backward(dnormed, optional(dz), kept.z, kept.stats, optional(kept.weight), optional(kept.bias),
                                         facts.normalized_ndim, facts.eps, facts.rms, wanted[0], wanted[1], wanted[2]);
  std::array<at::Tensor, 3> gradients;
  for (size_t i = 0; i < 3; ++i)
    if (!pybind11::object(found[i]).is_none()) gradients[i] = pybind11::cast<at::Tensor>(found[i]);
  return gradients;
}

std::array<at::Tensor, 3> gradients_natively(const Facts& facts, const std::array<bool, 3>& wanted, const at::Tensor& dnormed,
                                             const at::Tensor& dz, const Kept& kept) {
  RECORD_FUNCTION("fusednorm_cpu::add_layer_norm_bwd", c10::ArrayRef<const c10::IValue>{});
  const unsigned output_mask = wanted[0] | wanted[1] << 2 | wanted[2] << 3;
  fusednorm_cpu::Gradients found = fusednorm_cpu::run_backward(
      // hooks on saved tensors may bring the statistics back in another layout
      {handle(dnormed), handle(dz), handle(kept.z), handle(kept.stats.contiguous()), handle(kept.weight), handle(kept.bias),
       {}, {}, {}, {}, options(facts, kept.z.scalar_type(), output_mask), 0.0, 0.0});
  return {take(found.of[0]), take(found.of[2]), take(found.of[3])};
}

// Of x, residual, weight, bias. Without anything between x and z both have the same gradient: it is computed once.
variable_list gradients(const Facts& facts, const Wanted& wanted, const variable_list& cotangents, const Kept& kept) {
  const at::Tensor dnormed = cotangents[0], dz = cotangents.size() > 1 ? cotangents[1] : at::Tensor();
  const std::array<bool, 3> of_z{wanted[0] || wanted[1], wanted[2], wanted[3]};
  std::array<at::Tensor, 3> found{dz};  // `normed` was not used: nothing of the norm may touch the stream's gradient
  if (dnormed.defined()) {
    const bool native = !at::GradMode::is_enabled() && plain_thread() && plain(dnormed) && plain(dz) && plain(kept.z) &&
                        plain(kept.stats) && plain(kept.weight) && plain(kept.bias);
    found = (native ? gradients_natively : gradients_in_python)(facts, of_z, dnormed, dz, kept);
  }
  return {wanted[0] ? found[0] : at::Tensor(), wanted[1] ? found[0] : at::Tensor(), found[1], found[2]};
}

// What is kept is what AddLayerNormFunction keeps.
struct NormBackward : public Node {
  SavedVariable saved, stats, weight, bias;
  Facts facts;

  std::string name() const override { return "FusedNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&saved, &stats, &weight, &bias}) variable->reset_data();
  }

  variable_list apply(variable_list&& cotangents) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return gradients(facts, wanted(), cotangents, kept());
  }

  Wanted wanted() const {
    return {task_should_compute_output(0), facts.residual && task_should_compute_output(1),
            facts.weight && task_should_compute_output(2), facts.bias && task_should_compute_output(3)};
  }

  Kept kept() {
    const NodePointer self = pointer_to(this);
    return {facts.residual ? saved.unpack(self) : saved.unpack(), stats.unpack(),
            facts.weight ? weight.unpack() : at::Tensor(), facts.bias ? bias.unpack() : at::Tensor()};
  }

  // --- compiled autograd: what the node depends on, and the same computation as a function that it can trace ---

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    args.collect(saved, facts.residual);
    for (const SavedVariable* variable : {&stats, &weight, &bias}) args.collect(*variable, false);
    args.collect(facts.normalized_ndim);
    args.collect(facts.eps);
    for (const bool fact : {facts.rms, facts.residual, facts.weight, facts.bias}) args.collect(fact);
  }

  variable_list apply_with_saved(const variable_list& cotangents,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (SavedVariable* variable : {&saved, &stats, &weight, &bias}) swap.before(*variable);
    const Kept k = kept();
    variable_list tensors{k.z, k.stats};
    if (facts.weight) tensors.push_back(k.weight);
    if (facts.bias) tensors.push_back(k.bias);
    PackedArgs packed;
    packed.pack(tensors);
    packed.pack(wanted());
    packed.pack(std::array<bool, 4>{facts.rms, facts.residual, facts.weight, facts.bias});
    packed.pack(facts.normalized_ndim);
    packed.pack(facts.eps);
    std::vector<c10::IValue> args = packed.vec();
    std::vector<c10::TypePtr> schema;
    for (const c10::IValue& arg : args) schema.push_back(arg.type());
    const auto metadata = get_input_metadata(next_edges());
    const auto& python = getPyCompilerInterface();
    const std::string function = python->bind_function(swap.get_py_compiler(), name(), traced, schema, true, true);
    variable_list found = python->call_function(swap.get_py_compiler(), "apply_functional", function, cotangents, args,
                                                IValuePacker<std::decay_t<decltype(metadata)>>::pack(metadata));
    for (SavedVariable* variable : {&saved, &stats, &weight, &bias}) swap.after(*variable);
    return found;
  }

  static variable_list traced(const variable_list& cotangents, const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    variable_list tensors = packed.unpack<variable_list>();
    const auto wanted = packed.unpack<Wanted>();
    const auto given = packed.unpack<std::array<bool, 4>>();
    const auto normalized_ndim = packed.unpack<int64_t>();
    const Facts facts{normalized_ndim, packed.unpack<double>(), given[0], given[1], given[2], given[3]};
    Kept kept{tensors[0], tensors[1], facts.weight ? tensors[2] : at::Tensor(), facts.bias ? tensors.back() : at::Tensor()};
    return gradients(facts, wanted, cotangents, kept);
  }
};

}  // namespace

NormResult norm(const NormCall& call) {
  const Facts facts{call.normalized_ndim,   call.eps,
                    call.rms,               call.residual.defined(),
                    call.weight.defined(),  call.bias.defined()};
  NormResult result;
  fusednorm_cpu::Outputs out;
  {
    RECORD_FUNCTION("fusednorm_cpu::add_layer_norm_fwd", c10::ArrayRef<const c10::IValue>{});
    out = fusednorm_cpu::run_forward({handle(call.x), handle(call.residual), handle(call.weight), handle(call.bias), {}, {}, {},
                                      options(facts, call.x.scalar_type(), 0), call.eps, 0.0, 0.0},
                                     call.needs_grad);
  }
  result.normed = take(out.normed);
  if (facts.residual) result.z = take(out.z);
  if (!call.needs_grad) return result;
  const NodePointer pointer = make_node<NormBackward>();
  auto& node = static_cast<NormBackward&>(*pointer);
  node.set_next_edges(torch::autograd::collect_next_edges(call.x, call.residual, call.weight, call.bias));
  torch::autograd::set_history(result.normed, pointer);
  if (facts.residual) torch::autograd::set_history(result.z, pointer);
  node.facts = facts;
  node.saved = facts.residual ? SavedVariable(result.z, true) : SavedVariable(call.x, false);
  node.stats = SavedVariable(take(out.stats), false);
  if (facts.weight) node.weight = SavedVariable(call.weight, false);
  if (facts.bias) node.bias = SavedVariable(call.bias, false);
  return result;
}

}  // namespace fusednorm_shortcut
