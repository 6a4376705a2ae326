#include "operands.h"

namespace fusednorm_cpu {

namespace {

const int32_t kTorchDtypes[] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                aoti_torch_dtype_float16()};

// The fewest dimensions that address the same elements in the same order; their number.
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

}  // namespace

Dtype dtype_of(const Handle& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  for (int i = 0; i < 4; ++i)
    if (kTorchDtypes[i] == dtype) return Dtype(i);
  STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16");
}

Handle empty(int64_t ndim, const int64_t* sizes, Dtype dtype) {
  int64_t strides[kMaxDims], step = 1;
  for (int64_t d = ndim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(ndim, sizes, strides, kTorchDtypes[dtype],
                                                  aoti_torch_device_type_cpu(), -1, &tensor));
  return Handle(tensor);
}

Handle undefined() {
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&tensor));
  return Handle(tensor);
}

void describe(const Handle& tensor, int64_t lead, Operand& operand) {
  if (!tensor) {
    operand.data = nullptr;
    return;
  }
  const Sizes s = sizes_of(tensor);
  operand.data = data_of(tensor);
  operand.dtype = dtype_of(tensor);
  operand.row_dims = fold(s.sizes, s.strides, lead, operand.rows);
  operand.col_dims = fold(s.sizes + lead, s.strides + lead, s.ndim - lead, operand.cols);
  operand.unit = operand.col_dims == 0 || (operand.col_dims == 1 && operand.cols[0].stride == 1);
}

void describe_parameter(const Handle& tensor, Operand& operand) { describe(tensor, 0, operand); }

}  // namespace fusednorm_cpu
