// Tensors as the kernels address them: fresh outputs, folded dimensions.
#pragma once

#include "../handles.h"
#include "norm_args.h"

namespace fusednorm_cpu {

Handle empty(int64_t ndim, const int64_t* sizes, Dtype dtype);
Handle undefined();

// `lead` dimensions of rows, the others columns.
void describe(const char* name, const Handle& tensor, int64_t lead, Operand& operand);

// A tensor of as many elements, in any shape, as one row.
void describe_parameter(const char* name, const Handle& tensor, Operand& operand);

}  // namespace fusednorm_cpu
