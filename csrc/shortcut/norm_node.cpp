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
  double eps, dropout_p;
  bool rms, stream, weight, bias, x_bias;  // `stream`: whether it is another tensor than x; the others: whether given
};

// As norm_call.h takes them apart: x and the stream have one dtype here.
fusednorm::Options options(const Facts& facts, at::ScalarType dtype, unsigned output_mask) {
  const int64_t bits = dtype_bits(dtype);
  return fusednorm::Options(facts.normalized_ndim | bits << 7 | bits << 9 | int64_t(facts.rms) << 11 |
                            int64_t(facts.stream) << 13 | int64_t(output_mask) << 15);
}

struct Kept {
  at::Tensor z, stats, weight, bias, x_bias, seed;
};

using Wanted = std::array<bool, 5>;  // gradients: of x, residual, weight, bias, x_bias
using Gradients = std::array<at::Tensor, 5>;

// Second derivatives, batched cotangents, tensors of other kinds, a norm that was not used: by _norm_function.py.
Gradients gradients_in_python(const Facts& facts, const Wanted& wanted, const at::Tensor& dnormed, const at::Tensor& dz,
                              const Kept& kept) {
  pybind11::gil_scoped_acquire gil;
  const auto optional = [](const at::Tensor& t) {
    return t.defined() ? pybind11::cast(t) : pybind11::object(pybind11::none());
  };
  const pybind11::object backward = pybind11::module_::import("fusednorm._norm_function").attr("shortcut_backward");
  const pybind11::tuple found =
      backward(optional(dnormed), optional(dz), kept.z, kept.stats, optional(kept.weight), optional(kept.bias),
               optional(kept.x_bias), optional(kept.seed), facts.normalized_ndim, facts.eps, facts.dropout_p, facts.rms, wanted);
  Gradients gradients;
  for (size_t i = 0; i < gradients.size(); ++i)
    if (!pybind11::object(found[i]).is_none()) gradients[i] = pybind11::cast<at::Tensor>(found[i]);
  return gradients;
}

Gradients gradients_natively(const Facts& facts, const Wanted& wanted, const at::Tensor& dnormed, const at::Tensor& dz,
                             const Kept& kept) {
  RECORD_FUNCTION("fusednorm_cpu::add_layer_norm_bwd", c10::ArrayRef<const c10::IValue>{});
  unsigned output_mask = 0;
  for (size_t i = 0; i < wanted.size(); ++i) output_mask |= unsigned(wanted[i]) << i;
  fusednorm_cpu::Gradients found = fusednorm_cpu::run_backward(
      // hooks on saved tensors may bring the statistics back in another layout
      {handle(dnormed), handle(dz), handle(kept.z), handle(kept.stats.contiguous()), handle(kept.weight), handle(kept.bias),
       {}, handle(kept.x_bias), {}, handle(kept.seed), options(facts, kept.z.scalar_type(), output_mask), facts.dropout_p, 0.0});
  Gradients gradients;
  for (size_t i = 0; i < gradients.size(); ++i) gradients[i] = take(found.of[i]);
  return gradients;
}

variable_list gradients(const Facts& facts, const Wanted& wanted, const variable_list& cotangents, const Kept& kept) {
  const at::Tensor dnormed = cotangents[0], dz = cotangents.size() > 1 ? cotangents[1] : at::Tensor();
  const bool shared = !(facts.dropout_p > 0);  // x and residual have the same gradient: it is computed once
  const Wanted asked{wanted[0] || (shared && wanted[1]), wanted[1] && !shared, wanted[2], wanted[3], wanted[4]};
  Gradients found{dz};
  if (dnormed.defined() || facts.x_bias || !shared) {
    const bool native = dnormed.defined() && !at::GradMode::is_enabled() && plain_thread() && plain(dnormed) && plain(dz) &&
                        plain(kept.z) && plain(kept.stats) && plain(kept.weight) && plain(kept.bias) &&
                        plain(kept.x_bias) && plain(kept.seed);
    found = (native ? gradients_natively : gradients_in_python)(facts, asked, dnormed, dz, kept);
  }
  if (shared && wanted[1]) found[1] = found[0];
  if (!wanted[0]) found[0] = at::Tensor();
  return {found.begin(), found.end()};
}

// What is kept is what AddLayerNormFunction keeps.
struct NormBackward : public Node {
  SavedVariable saved, stats, weight, bias, x_bias, seed;
  Facts facts;

  std::string name() const override { return "FusedNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : all()) variable->reset_data();
  }

  variable_list apply(variable_list&& cotangents) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return gradients(facts, wanted(), cotangents, kept());
  }

  std::array<SavedVariable*, 6> all() { return {&saved, &stats, &weight, &bias, &x_bias, &seed}; }

  Wanted wanted() const {
    Wanted found;  // an input that was not given has an edge to nowhere
    for (size_t i = 0; i < found.size(); ++i) found[i] = task_should_compute_output(i);
    return found;
  }

  Kept kept() {
    const NodePointer self = pointer_to(this);
    return {facts.stream ? saved.unpack(self) : saved.unpack(),  stats.unpack(),
            facts.weight ? weight.unpack() : at::Tensor(),       facts.bias ? bias.unpack() : at::Tensor(),
            facts.x_bias ? x_bias.unpack() : at::Tensor(),       facts.dropout_p > 0 ? seed.unpack() : at::Tensor()};
  }

  // --- compiled autograd: what the node depends on, and the same computation as a function that it can trace ---

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    args.collect(saved, facts.stream);
    for (const SavedVariable* variable : {&stats, &weight, &bias, &x_bias, &seed}) args.collect(*variable, false);
    args.collect(facts.normalized_ndim);
    args.collect(facts.eps);
    args.collect(facts.dropout_p);
    for (const bool fact : {facts.rms, facts.stream, facts.weight, facts.bias, facts.x_bias}) args.collect(fact);
  }

  variable_list apply_with_saved(const variable_list& cotangents,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (SavedVariable* variable : all()) swap.before(*variable);
    const Kept k = kept();
    variable_list tensors;
    for (const at::Tensor& tensor : {k.z, k.stats, k.weight, k.bias, k.x_bias, k.seed})
      if (tensor.defined()) tensors.push_back(tensor);
    PackedArgs packed;
    packed.pack(tensors);
    packed.pack(wanted());
    packed.pack(std::array<bool, 5>{facts.rms, facts.stream, facts.weight, facts.bias, facts.x_bias});
    packed.pack(facts.normalized_ndim);
    packed.pack(facts.eps);
    packed.pack(facts.dropout_p);
    variable_list found = apply_traced(*this, traced, packed, cotangents, swap);
    for (SavedVariable* variable : all()) swap.after(*variable);
    return found;
  }

  static variable_list traced(const variable_list& cotangents, const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    variable_list tensors = packed.unpack<variable_list>();
    const auto wanted = packed.unpack<Wanted>();
    const auto given = packed.unpack<std::array<bool, 5>>();
    const auto normalized_ndim = packed.unpack<int64_t>();
    const auto eps = packed.unpack<double>();
    const Facts facts{normalized_ndim, eps, packed.unpack<double>(), given[0], given[1], given[2], given[3], given[4]};
    size_t next = 2;
    const auto one = [&](bool is_there) { return is_there ? tensors[next++] : at::Tensor(); };
    Kept kept{tensors[0], tensors[1], one(facts.weight), one(facts.bias), one(facts.x_bias), one(facts.dropout_p > 0)};
    return gradients(facts, wanted, cotangents, kept);
  }
};

}  // namespace

NormResult norm(const NormCall& call) {
  const Facts facts{call.normalized_ndim,  call.eps,           call.dropout_p,       call.rms, call.makes_stream(),
                    call.weight.defined(), call.bias.defined(), call.x_bias.defined()};
  NormResult result;
  fusednorm_cpu::Outputs out;
  {
    RECORD_FUNCTION("fusednorm_cpu::add_layer_norm_fwd", c10::ArrayRef<const c10::IValue>{});
    out = fusednorm_cpu::run_forward(
        {handle(call.x), handle(call.residual), handle(call.weight), handle(call.bias), handle(call.x_bias), {},
         handle(call.seed), options(facts, call.x.scalar_type(), 0), call.eps, call.dropout_p, 0.0},
        call.needs_grad);
  }
  result.normed = take(out.normed);
  if (facts.stream) result.z = take(out.z);
  if (!call.needs_grad) return result;
  const NodePointer pointer = make_node<NormBackward>();
  auto& node = static_cast<NormBackward&>(*pointer);
  node.set_next_edges(torch::autograd::collect_next_edges(call.x, call.residual, call.weight, call.bias, call.x_bias));
  torch::autograd::set_history(result.normed, pointer);
  if (facts.stream) torch::autograd::set_history(result.z, pointer);
  node.facts = facts;
  node.saved = facts.stream ? SavedVariable(result.z, true) : SavedVariable(call.x, false);
  node.stats = SavedVariable(take(out.stats), false);
  if (facts.weight) node.weight = SavedVariable(call.weight, false);
  if (facts.bias) node.bias = SavedVariable(call.bias, false);
  if (facts.x_bias) node.x_bias = SavedVariable(call.x_bias, false);
  if (facts.dropout_p > 0) node.seed = SavedVariable(call.seed, false);
  return result;
}

}  // namespace fusednorm_shortcut
