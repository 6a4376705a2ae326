#include "handles.h"

#include <string>

namespace fusednorm {

namespace {

const int32_t kTorchDtypes[] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                aoti_torch_dtype_float16()};

}  // namespace

char* data_of(const char* name, const Handle& tensor, const Sizes& s, int64_t item) {
  int64_t last = 0, offset, bytes;  // elements from the first one to the last
  for (int64_t d = 0; d < s.ndim; ++d) {
    if (s.sizes[d] == 0) return nullptr;
    last = plus(last, times(s.sizes[d] - 1, s.strides[d]));
  }
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &data));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const int64_t needed = times(plus(plus(offset, last), 1), item);
  if (reinterpret_cast<intptr_t>(data) == times(offset, item)) bytes = 0;  // a storage without memory, whatever its size
  STD_TORCH_CHECK(bytes >= needed, name, ": its storage was freed or is too small (", bytes, " bytes, ", needed, " needed)");
  return static_cast<char*>(data);
}

bool has_dtype(const Handle& tensor, int32_t wanted) {
  int32_t dtype = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype == wanted;
}

Dtype dtype_of(const char* name, const Handle& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  for (int i = 0; i < 4; ++i)
    if (kTorchDtypes[i] == dtype) return Dtype(i);
  STD_TORCH_CHECK(false, name, ": expected float64, float32, bfloat16 or float16");
}

const int64_t* seed_of(const Handle& seed) {
  STD_TORCH_CHECK(seed && has_dtype(seed, aoti_torch_dtype_int64()), "seed: dropout needs an int64 in a tensor");
  const Sizes s = sizes_of("seed", seed);
  STD_TORCH_CHECK(product(s.sizes, s.ndim) == 1, "seed: expected a tensor of one element");
  return reinterpret_cast<const int64_t*>(data_of("seed", seed, s, sizeof(int64_t)));
}

Handle empty(int64_t ndim, const int64_t* sizes, Dtype dtype, int32_t device_type, int32_t device_index) {
  int64_t strides[kMaxDims], step = 1;
  for (int64_t d = ndim - 1; d >= 0; --d) {
    strides[d] = step;
    step = times(step, sizes[d] > 1 ? sizes[d] : 1);
  }
  AtenTensorHandle tensor;
  if (aoti_torch_empty_strided(ndim, sizes, strides, kTorchDtypes[dtype], device_type, device_index, &tensor)) {
    std::string shape;
    for (int64_t d = 0; d < ndim; ++d) shape += (d ? ", " : "") + std::to_string(sizes[d]);
    STD_TORCH_CHECK(false, "out of memory: no tensor of shape (", shape, "), ", times(product(sizes, ndim), kItemSize[dtype]),
                    " bytes, could be made");
  }
  return Handle(tensor);
}

int fold(Dim* dims, int64_t ndim) {
  int count = 0;
  for (int64_t d = 0; d < ndim; ++d) {
    const Dim dim = dims[d];
    if (dim.size == 1) continue;
    if (count && dims[count - 1].stride == dim.size * dim.stride)
      dims[count - 1] = {dims[count - 1].size * dim.size, dim.stride};
    else
      dims[count++] = dim;
  }
  return count;
}

int fold(const int64_t* sizes, const int64_t* strides, int64_t ndim, Dim* out) {
  for (int64_t d = 0; d < ndim; ++d) out[d] = {sizes[d], strides[d]};
  return fold(out, ndim);
}

}  // namespace fusednorm
