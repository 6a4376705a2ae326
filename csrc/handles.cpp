#include "handles.h"

namespace fusednorm {

namespace {

const int32_t kTorchDtypes[] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                aoti_torch_dtype_float16()};

}  // namespace

Dtype dtype_of(const Handle& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  for (int i = 0; i < 4; ++i)
    if (kTorchDtypes[i] == dtype) return Dtype(i);
  STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16");
}

Handle empty(int64_t ndim, const int64_t* sizes, Dtype dtype, int32_t device_type, int32_t device_index) {
  int64_t strides[kMaxDims], step = 1;
  for (int64_t d = ndim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes, strides, kTorchDtypes[dtype], device_type, device_index, &tensor));
  return Handle(tensor);
}

int fold(const int64_t* sizes, const int64_t* strides, int64_t ndim, Dim* out) {
  int count = 0;
  for (int64_t d = 0; d < ndim; ++d) {
    if (sizes[d] == 1) continue;
    if (count && out[count - 1].stride == sizes[d] * strides[d])
      out[count - 1] = {out[count - 1].size * sizes[d], strides[d]};
    else
      out[count++] = {sizes[d], strides[d]};
  }
  return count;
}

}  // namespace fusednorm
