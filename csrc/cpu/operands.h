// Tensors as the kernels address them: fresh outputs, folded dimensions.
#pragma once

#include "../handles.h"
#include "norm_args.h"

namespace fusednorm_cpu {

using fusednorm::Handle;
using fusednorm::Sizes;
using fusednorm::data_of;
using fusednorm::numel_of;
using fusednorm::sizes_of;
using fusednorm::take_optional;
using fusednorm::take_tensor;

Dtype dtype_of(const Handle& tensor);
Handle empty(int64_t ndim, const int64_t* sizes, Dtype dtype);
Handle undefined();

// `lead` dimensions of rows, the others columns.
void describe(const Handle& tensor, int64_t lead, Operand& operand);

// A tensor of as many elements, in any shape, as one row.
void describe_parameter(const Handle& tensor, Operand& operand);

constexpr int64_t kItemSize[] = {8, 4, 2, 2};

}  // namespace fusednorm_cpu
