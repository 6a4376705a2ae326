// Tensors over the C shim of the stable ABI: owned handles, cheaper than stable::Tensor, whose shared_ptr allocates.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "data.h"

namespace fusednorm {

class Handle {
 public:
  Handle() = default;
  explicit Handle(AtenTensorHandle tensor) : tensor_(tensor) {}
  Handle(Handle&& other) noexcept : tensor_(other.release()) {}
  Handle& operator=(Handle&& other) noexcept {
    AtenTensorHandle tensor = other.release();
    reset();
    tensor_ = tensor;
    return *this;
  }
  ~Handle() { reset(); }
  AtenTensorHandle get() const { return tensor_; }
  explicit operator bool() const { return tensor_ != nullptr; }
  AtenTensorHandle release() {
    AtenTensorHandle tensor = tensor_;
    tensor_ = nullptr;
    return tensor;
  }

 private:
  void reset() {
    if (tensor_) aoti_torch_delete_tensor_object(tensor_);
  }
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
  STD_TORCH_CHECK(s.ndim <= kMaxDims, "expected at most ", kMaxDims, " dimensions, got ", s.ndim);
  return s;
}

inline int64_t numel_of(const Handle& tensor) {
  int64_t numel;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor.get(), &numel));
  return numel;
}

// Null for a tensor without elements only: one whose storage was freed would pass for one that was not given.
inline char* data_of(const Handle& tensor) {
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &data));
  STD_TORCH_CHECK(data || numel_of(tensor) == 0, "the memory of a tensor of ", numel_of(tensor), " elements has been freed");
  return static_cast<char*>(data);
}

Dtype dtype_of(const Handle& tensor);

// A fresh contiguous tensor.
Handle empty(int64_t ndim, const int64_t* sizes, Dtype dtype, int32_t device_type, int32_t device_index);

// The fewest dimensions that address the same elements in the same order; their number.
int fold(const int64_t* sizes, const int64_t* strides, int64_t ndim, Dim* out);

}  // namespace fusednorm
