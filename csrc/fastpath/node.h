// Nodes of the autograd graph, whose pointers are shared or intrusive, by the release of torch.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace fusednorm_fastpath {

using NodePointer = decltype(torch::autograd::Edge::function);

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

// A node's gradients in compiled autograd: `traced`, which unpacks what was packed, becomes a call in the graph.
template <class Traced>
torch::autograd::variable_list apply_traced(const torch::autograd::Node& node, Traced traced,
                                            const torch::dynamo::autograd::PackedArgs& packed,
                                            const torch::autograd::variable_list& cotangents,
                                            torch::dynamo::autograd::SwapSavedVariables& swap) {
  using namespace torch::dynamo::autograd;
  const std::vector<c10::IValue> args = packed.vec();
  std::vector<c10::TypePtr> schema;
  for (const c10::IValue& arg : args) schema.push_back(arg.type());
  const auto metadata = get_input_metadata(node.next_edges());
  const auto& python = getPyCompilerInterface();
  const std::string function = python->bind_function(swap.get_py_compiler(), node.name(), traced, schema, true, true);
  return python->call_function(swap.get_py_compiler(), "apply_functional", function, cotangents, args,
                               IValuePacker<std::decay_t<decltype(metadata)>>::pack(metadata));
}

}  // namespace fusednorm_fastpath
