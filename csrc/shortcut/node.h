// Nodes of the autograd graph, whose pointers are shared or intrusive, by the release of torch.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>

namespace fusednorm_shortcut {

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

}  // namespace fusednorm_shortcut
