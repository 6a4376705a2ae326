// Tensors over the C shim of the stable ABI: owned handles, cheaper than stable::Tensor, whose shared_ptr allocates.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <type_traits>

#include "checked.h"
#include "data.h"

namespace fusednorm {

struct DeleteTensor {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using Handle = std::unique_ptr<std::remove_pointer_t<AtenTensorHandle>, DeleteTensor>;

// Takes an argument off the dispatcher's stack.
inline Handle parse_tensor(StableIValue value) { return Handle(torch::stable::detail::to<AtenTensorHandle>(value)); }

inline Handle parse_optional(StableIValue value) {
  auto* boxed = torch::stable::detail::to<StableIValue*>(value);
  if (!boxed) return Handle();
  Handle tensor = parse_tensor(*boxed);
  delete boxed;
  return tensor;
}

struct Sizes {
  int64_t *sizes, *strides, ndim;
};

inline Sizes sizes_of(const char* name, const Handle& tensor) {
  Sizes s;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &s.ndim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &s.sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &s.strides));
  STD_TORCH_CHECK(s.ndim <= kMaxDims, name, ": expected at most ", kMaxDims, " dimensions, got ", s.ndim);
  return s;
}

inline int64_t product(const int64_t* sizes, int64_t count) {
  int64_t result = 1;
  for (int64_t d = 0; d < count; ++d) result = times(result, sizes[d]);
  return result;
}

// Where a tensor's elements of `item` bytes lie; null for a tensor without elements only. The storage may have been freed
// since the tensor was made, and the address of an element behind an offset does not show that.
char* data_of(const char* name, const Handle& tensor, const Sizes& s, int64_t item);

// Of a tensor that was made here.
inline char* fresh_data(const Handle& tensor) {
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &data));
  return static_cast<char*>(data);
}

bool has_dtype(const Handle& tensor, int32_t wanted);
Dtype dtype_of(const char* name, const Handle& tensor);

// The seed of dropout that is on: an int64 in a tensor of one element.
const int64_t* seed_of(const Handle& seed);

// A fresh contiguous tensor.
Handle empty(int64_t ndim, const int64_t* sizes, Dtype dtype, int32_t device_type, int32_t device_index);

// The fewest dimensions that address the same elements in the same order; their number. Of a tensor that has elements, and
// whose storage holds them: then no product of a size and a stride wraps.
int fold(const int64_t* sizes, const int64_t* strides, int64_t ndim, Dim* out);
int fold(Dim* dims, int64_t ndim);  // in place

}  // namespace fusednorm
