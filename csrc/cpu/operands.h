// Tensors as the kernels address them, over the C shim: owned handles, fresh outputs, folded dimensions.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <utility>

#include "norm_args.h"

namespace fusednorm_cpu {

// An owned tensor handle, or none. Cheaper than stable::Tensor, whose shared_ptr allocates.
class Handle {
 public:
  Handle() = default;
  explicit Handle(AtenTensorHandle tensor) : tensor_(tensor) {}
  Handle(Handle&& other) noexcept : tensor_(other.release()) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(tensor_, other.tensor_);
    return *this;
  }
  ~Handle() {
    if (tensor_) aoti_torch_delete_tensor_object(tensor_);
  }
  AtenTensorHandle get() const { return tensor_; }
  explicit operator bool() const { return tensor_ != nullptr; }
  AtenTensorHandle release() {
    AtenTensorHandle tensor = tensor_;
    tensor_ = nullptr;
    return tensor;
  }

 private:
  AtenTensorHandle tensor_ = nullptr;
};

// Takes an argument off the dispatcher's stack.
inline Handle take_tensor(StableIValue value) { return Handle(torch::stable::detail::to<AtenTensorHandle>(value)); }

inline Handle take_optional(StableIValue value) {
  auto* boxed = torch::stable::detail::to<StableIValue*>(value);
  if (!boxed) return Handle();
  Handle tensor = take_tensor(*boxed);
  delete boxed;
  return tensor;
}

struct Sizes {
  int64_t *sizes, *strides, ndim;
};

inline Sizes sizes_of(const Handle& tensor) {
  Sizes s;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &s.ndim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &s.sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &s.strides));
  return s;
}

inline char* data_of(const Handle& tensor) {
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &data));
  return (char*)data;
}

inline int64_t numel_of(const Handle& tensor) {
  int64_t numel;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor.get(), &numel));
  return numel;
}

Dtype dtype_of(const Handle& tensor);
Handle empty(int64_t ndim, const int64_t* sizes, Dtype dtype);
Handle undefined();

// `lead` dimensions of rows, the others columns.
void describe(const Handle& tensor, int64_t lead, Operand& operand);

// A tensor of as many elements, in any shape, as one row.
void describe_parameter(const Handle& tensor, Operand& operand);

constexpr int64_t kItemSize[] = {8, 4, 2, 2};

}  // namespace fusednorm_cpu
