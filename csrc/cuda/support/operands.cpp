#include "operands.h"

#include <algorithm>
#include <climits>

namespace fusednorm_cuda {

int device_of(const Handle& tensor) {
  int32_t index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  return index;
}

Handle empty(const Handle& like, int64_t ndim, const int64_t* sizes, Dtype dtype) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  return fusednorm::empty(ndim, sizes, dtype, type, device_of(like));
}

void check_device(const char* name, const Handle& tensor, const Handle& like) {
  if (!tensor) return;
  int32_t type, wanted;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &wanted));
  STD_TORCH_CHECK(type == wanted && device_of(tensor) == device_of(like), name,
                  ": is on another device than the rows; move it there");
}

Rows rows_of(const char* name, const Handle& tensor, const Handle& like, const Sizes& shape, int64_t lead,
             Dtype dtype) {
  Rows rows{};
  if (!tensor) return rows;
  check_device(name, tensor, like);
  const Sizes s = sizes_of(name, tensor);
  STD_TORCH_CHECK(s.ndim == shape.ndim && std::equal(s.sizes, s.sizes + s.ndim, shape.sizes), name,
                  ": its shape does not fit");
  STD_TORCH_CHECK(dtype_of(name, tensor) == dtype, name, ": its dtype does not fit");
  const int64_t item = kItemSize[dtype];
  rows.data = data_of(name, tensor, s, item);
  Dim dims[kMaxDims];
  const int columns = fold(s.sizes + lead, s.strides + lead, s.ndim - lead, dims);
  STD_TORCH_CHECK(columns == 0 || (columns == 1 && dims[0].stride == 1), name,
                  ": the columns of a row must lie one after another");
  const int levels = fold(s.sizes, s.strides, lead, dims);
  STD_TORCH_CHECK(levels <= 2, name, ": its rows take more than two strides");
  rows.stride = levels ? dims[levels - 1].stride * item : 0;
  if (levels == 2) rows.outer = dims[0].stride * item, rows.inner = dims[1].size;
  return rows;
}

Parameter parameter_of(const char* name, const Handle& tensor, const Handle& like, int64_t n_columns, Dtype row_dtype) {
  bool each = false;
  return parameter_of(name, tensor, like, n_columns, row_dtype, 0, each);
}

Parameter parameter_of(const char* name, const Handle& tensor, const Handle& like, int64_t n_columns, Dtype row_dtype,
                       int64_t samples, bool& each) {
  if (!tensor) return {nullptr, false, 0};
  check_device(name, tensor, like);
  const Dtype dtype = dtype_of(name, tensor), compute = row_dtype == kFloat64 ? kFloat64 : kFloat32;
  STD_TORCH_CHECK(dtype == row_dtype || dtype == compute, name, ": its dtype is neither the rows' nor the compute type");
  const Sizes s = sizes_of(name, tensor);
  const bool shared = product(s.sizes, s.ndim) == n_columns;
  each = samples && !shared && s.ndim > 1 && s.sizes[0] == samples && product(s.sizes + 1, s.ndim - 1) == n_columns;
  STD_TORCH_CHECK(shared || each, name, ": its shape does not fit");
  const Parameter parameter{data_of(name, tensor, s, kItemSize[dtype]), dtype != row_dtype, 0};
  if (each) {
    Dim dims[kMaxDims];
    const int columns = fold(s.sizes + 1, s.strides + 1, s.ndim - 1, dims);
    STD_TORCH_CHECK(columns == 0 || (columns == 1 && dims[0].stride == 1), name,
                    ": the columns of a vector must lie one after another");
    STD_TORCH_CHECK(s.strides[0] <= INT_MAX, name, ": its vectors lie 2**31 elements apart, or more");
    return {parameter.data, parameter.wide, int(s.strides[0])};
  }
  bool contiguous;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor.get(), &contiguous));
  STD_TORCH_CHECK(contiguous, name, ": must be contiguous");
  return parameter;
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool aligned(const Rows& rows) {
  return aligned(rows.data) && rows.stride % 16 == 0 && (rows.inner == 0 || rows.outer % 16 == 0);
}

}  // namespace fusednorm_cuda
