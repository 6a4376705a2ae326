#include "operands.h"

#include <algorithm>

namespace fusednorm_cpu {

Handle empty(int64_t ndim, const int64_t* sizes, Dtype dtype) {
  return fusednorm::empty(ndim, sizes, dtype, aoti_torch_device_type_cpu(), -1);
}

Handle undefined() {
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_uninitialized_tensor(&tensor));
  return Handle(tensor);
}

Sizes check_shape(const char* name, const Handle& tensor, const int64_t* sizes, int64_t ndim) {
  const Sizes s = sizes_of(name, tensor);
  STD_TORCH_CHECK(s.ndim == ndim && std::equal(sizes, sizes + ndim, s.sizes), name, ": its shape does not fit");
  return s;
}

Sizes check_samples(const char* name, const Handle& tensor, const Sizes& s, int64_t lead) {
  const Sizes own = sizes_of(name, tensor);
  const int64_t columns = s.ndim - lead, ahead = own.ndim - columns;
  bool fits = ahead >= 0 && ahead <= lead && std::equal(s.sizes + lead, s.sizes + s.ndim, own.sizes + ahead);
  for (int64_t d = 0; fits && d < ahead; ++d) fits = own.sizes[d] == (d ? 1 : s.sizes[0]);
  STD_TORCH_CHECK(fits, name, ": its shape does not fit");
  return own;
}

void describe(const char* name, const Handle& tensor, const Sizes& s, int64_t lead, Operand& operand) {
  operand.dtype = dtype_of(name, tensor);
  operand.data = data_of(name, tensor, s, kItemSize[operand.dtype]);
  operand.unit = true, operand.row_dims = operand.col_dims = 0;
  if (!operand.data) return;
  operand.row_dims = fold(s.sizes, s.strides, lead, operand.rows);
  operand.col_dims = fold(s.sizes + lead, s.strides + lead, s.ndim - lead, operand.cols);
  operand.unit = operand.col_dims == 0 || (operand.col_dims == 1 && operand.cols[0].stride == 1);
}

void describe(const char* name, const Handle& tensor, const int64_t* sizes, int64_t ndim, int64_t lead, Operand& operand) {
  operand.data = nullptr;
  if (tensor) describe(name, tensor, check_shape(name, tensor, sizes, ndim), lead, operand);
}

}  // namespace fusednorm_cpu
