#include "operands.h"

#include <algorithm>

namespace fusednorm_cuda {

namespace {

constexpr int kMaxDims = 64;  // torch's own limit

const int32_t kTorchDtypes[] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                aoti_torch_dtype_float16()};

struct Dim {
  int64_t size, stride;
};

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

int device_of(const Handle& tensor) {
  int32_t index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  return index;
}

Handle empty(const Handle& like, int64_t ndim, const int64_t* sizes, Dtype dtype) {
  int64_t strides[kMaxDims], step = 1;
  for (int64_t d = ndim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes, strides, kTorchDtypes[dtype], type, device_of(like), &tensor));
  return Handle(tensor);
}

Rows rows_of(const char* name, const Handle& tensor, const Sizes& shape, int64_t lead, Dtype dtype) {
  Rows rows{};
  if (!tensor) return rows;
  const Sizes s = sizes_of(tensor);
  STD_TORCH_CHECK(s.ndim == shape.ndim && std::equal(s.sizes, s.sizes + s.ndim, shape.sizes), name,
                  ": its shape does not fit");
  STD_TORCH_CHECK(dtype_of(tensor) == dtype, name, ": its dtype does not fit");
  Dim dims[kMaxDims];
  const int columns = fold(s.sizes + lead, s.strides + lead, s.ndim - lead, dims);
  STD_TORCH_CHECK(columns == 0 || (columns == 1 && dims[0].stride == 1), name,
                  ": the columns of a row must lie one after another");
  const int levels = fold(s.sizes, s.strides, lead, dims);
  STD_TORCH_CHECK(levels <= 2, name, ": its rows take more than two strides");
  rows.data = data_of(tensor);
  const int64_t item = kItemSize[dtype];
  rows.stride = levels ? dims[levels - 1].stride * item : 0;
  if (levels == 2) rows.outer = dims[0].stride * item, rows.inner = dims[1].size;
  return rows;
}

Parameter parameter_of(const char* name, const Handle& tensor, int64_t n_columns, Dtype row_dtype) {
  if (!tensor) return {nullptr, false};
  const Dtype dtype = dtype_of(tensor), compute = row_dtype == kFloat64 ? kFloat64 : kFloat32;
  STD_TORCH_CHECK(dtype == row_dtype || dtype == compute, name, ": its dtype is neither the rows' nor the compute type");
  STD_TORCH_CHECK(fusednorm::numel_of(tensor) == n_columns, name, ": its shape does not fit");
  bool contiguous;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor.get(), &contiguous));
  STD_TORCH_CHECK(contiguous, name, ": must be contiguous");
  return {data_of(tensor), dtype != row_dtype};
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool aligned(const Rows& rows) {
  return aligned(rows.data) && rows.stride % 16 == 0 && (rows.inner == 0 || rows.outer % 16 == 0);
}

}  // namespace fusednorm_cuda
