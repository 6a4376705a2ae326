// Tensors as the kernels address them: rows with one or two strides, parameters, fresh outputs.
#pragma once

#include "../../common/handles.h"
#include "args.h"

namespace fusednorm_cuda {

int device_of(const Handle& tensor);

// A contiguous tensor on the device of `like`.
Handle empty(const Handle& like, int64_t ndim, const int64_t* sizes, Dtype dtype);

// Of an operand that the kernels read: they would take an address in the host's memory for one in theirs.
void check_device(const char* name, const Handle& tensor, const Handle& like);

// On the device of `like`: `lead` dimensions of rows, the others columns, which must lie one after another. Absent for
// no tensor.
Rows rows_of(const char* name, const Handle& tensor, const Handle& like, const Sizes& shape, int64_t lead, Dtype dtype);

// On the device of `like`: a contiguous tensor of the row dtype or the compute type.
Parameter parameter_of(const char* name, const Handle& tensor, const Handle& like, int64_t n_columns, Dtype row_dtype);

// The same, or one vector for each of several `samples` along dimension 0: then `each` is set. The columns of a vector lie
// one after another, the vectors at any stride that an int holds.
Parameter parameter_of(const char* name, const Handle& tensor, const Handle& like, int64_t n_columns, Dtype row_dtype,
                       int64_t samples, bool& each);

// Whether 16-byte accesses, of `vector` elements of a row, reach every row.
bool aligned(const Rows& rows);
bool aligned(const void* data);
inline bool aligned(const Parameter& parameter, int vector = 1) {
  return aligned(parameter.data) && parameter.stride % vector == 0;
}

}  // namespace fusednorm_cuda
