// Nodes of the autograd graph, one kind for each operator.
//
// An operator `Op` says what its node is made of:
//   kName, kModule  the node's name, and the module in Python whose fastpath_backward serves what this one does not
//   kInputs, kSaved  how many inputs have a gradient, and how many tensors are saved
//   Options  what is saved besides tensors, and `each(options, f)`, which gives all of it to f
//   python_options(options, wanted)  the last arguments of fastpath_backward
//   gradients(options, wanted, cotangents, saved)  what the node computes
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#include "plain.h"

namespace fusednorm_fastpath {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

using NodePointer = decltype(torch::autograd::Edge::function);  // shared or intrusive, by the release of torch

template <class Type, class Pointer = NodePointer>
Pointer make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return Pointer(new Type(), [](auto* node) { deleteNode(node); });  // torch's own, found by its argument
  else
    return c10::make_intrusive<Type>();
}

template <class Type, class Pointer = NodePointer>
Pointer pointer_to(Type* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return node->getptr();
  else
    return Pointer::reclaim_copy(node);
}

template <class Op>
using Wanted = std::array<bool, Op::kInputs>;  // gradients: of which inputs
template <class Op>
using Saved = std::array<at::Tensor, Op::kSaved>;  // undefined where not given

// Second derivatives, batched cotangents, tensors of other kinds.
template <class Op>
variable_list gradients_in_python(const typename Op::Options& options, const Wanted<Op>& wanted,
                                  const variable_list& cotangents, const Saved<Op>& saved) {
  pybind11::gil_scoped_acquire gil;
  pybind11::list args;
  const auto add = [&](const at::Tensor& t) {
    args.append(t.defined() ? pybind11::cast(t) : pybind11::object(pybind11::none()));
  };
  for (const at::Tensor& cotangent : cotangents) add(cotangent);
  for (const at::Tensor& tensor : saved) add(tensor);
  for (const pybind11::handle option : Op::python_options(options, wanted)) args.append(option);
  const pybind11::tuple found = pybind11::module_::import(Op::kModule).attr("fastpath_backward")(*args);
  variable_list gradients(Op::kInputs);
  for (size_t i = 0; i < gradients.size(); ++i)
    if (!pybind11::object(found[i]).is_none()) gradients[i] = pybind11::cast<at::Tensor>(found[i]);
  return gradients;
}

// Whether a library's kernels may compute a gradient: nobody differentiates it, and nothing but them would see it.
template <class Op>
bool plain_backward(const variable_list& cotangents, const Saved<Op>& saved,
                    c10::DispatchKey device = c10::DispatchKey::CPU) {
  if (at::GradMode::is_enabled() || !plain_thread()) return false;
  const auto is_plain = [&](const at::Tensor& tensor) { return plain(tensor, device); };
  return std::all_of(cotangents.begin(), cotangents.end(), is_plain) &&
         std::all_of(saved.begin(), saved.end(), is_plain);
}

// It saves what the operator's Function in Python saves.
template <class Op>
struct OperatorNode : public torch::autograd::Node {
  typename Op::Options options;
  std::array<SavedVariable, Op::kSaved> kept;
  std::array<bool, Op::kSaved> given{};  // which of them are tensors
  int output = -1;  // which of them the node made itself

  std::string name() const override { return Op::kName; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : kept) variable.reset_data();
  }

  variable_list apply(variable_list&& cotangents) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return Op::gradients(options, wanted(), cotangents, saved());
  }

  Wanted<Op> wanted() const {
    Wanted<Op> found;  // an input that was not given has an edge to nowhere
    for (size_t i = 0; i < found.size(); ++i) found[i] = task_should_compute_output(i);
    return found;
  }

  Saved<Op> saved() {
    Saved<Op> found;
    for (size_t i = 0; i < found.size(); ++i)
      found[i] = int(i) == output ? kept[i].unpack(pointer_to(this)) : kept[i].unpack();
    return found;
  }

  // --- compiled autograd: what the node depends on, and the same computation as a function that it can trace ---

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    for (size_t i = 0; i < kept.size(); ++i) {
      args.collect(given[i]);  // with hooks, a saved tensor says nothing of itself
      args.collect(kept[i], int(i) == output);
    }
    Op::each(options, [&](const auto& option) { args.collect(option); });
  }

  variable_list apply_with_saved(const variable_list& cotangents,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (SavedVariable& variable : kept) swap.before(variable);
    variable_list tensors;
    for (const at::Tensor& tensor : saved())
      if (tensor.defined()) tensors.push_back(tensor);
    PackedArgs packed;
    packed.pack(tensors);
    for (const bool one : given) packed.pack(one);
    for (const bool one : wanted()) packed.pack(one);
    Op::each(options, [&](const auto& option) { packed.pack(option); });
    const std::vector<c10::IValue> args = packed.vec();
    std::vector<c10::TypePtr> schema;
    for (const c10::IValue& arg : args) schema.push_back(arg.type());
    const auto metadata = get_input_metadata(next_edges());
    const auto& python = getPyCompilerInterface();
    const std::string function = python->bind_function(swap.get_py_compiler(), name(), traced, schema, true, true);
    variable_list found = python->call_function(swap.get_py_compiler(), "apply_functional", function, cotangents, args,
                                                IValuePacker<std::decay_t<decltype(metadata)>>::pack(metadata));
    for (SavedVariable& variable : kept) swap.after(variable);
    return found;
  }

  static variable_list traced(const variable_list& cotangents, const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    const auto tensors = packed.unpack<variable_list>();
    std::array<bool, Op::kSaved> given;
    for (bool& one : given) one = packed.unpack<bool>();
    Wanted<Op> wanted;
    for (bool& one : wanted) one = packed.unpack<bool>();
    typename Op::Options options;
    Op::each(options, [&](auto& option) { option = packed.unpack<std::decay_t<decltype(option)>>(); });
    Saved<Op> saved;
    size_t next = 0;
    for (size_t i = 0; i < saved.size(); ++i)
      if (given[i]) saved[i] = tensors[next++];
    return Op::gradients(options, wanted, cotangents, saved);
  }
};

// Makes the node that `outputs` come from; `output` says which of the saved tensors is one of them.
template <class Op, class... Inputs>
void record(const typename Op::Options& options, std::initializer_list<const at::Tensor*> outputs,
            const std::array<const at::Tensor*, Op::kSaved>& saved, int output, const Inputs&... inputs) {
  static_assert(sizeof...(inputs) == Op::kInputs);
  const NodePointer pointer = make_node<OperatorNode<Op>>();
  auto& node = static_cast<OperatorNode<Op>&>(*pointer);
  node.set_next_edges(torch::autograd::collect_next_edges(inputs...));
  for (const at::Tensor* made : outputs)
    if (made->defined()) torch::autograd::set_history(*made, pointer);
  node.options = options;
  node.output = output;
  for (size_t i = 0; i < saved.size(); ++i)
    if ((node.given[i] = saved[i]->defined())) node.kept[i] = SavedVariable(*saved[i], int(i) == output);
}

}  // namespace fusednorm_fastpath
