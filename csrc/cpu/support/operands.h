// Tensors as the kernels address them: fresh outputs, folded dimensions.
#pragma once

#include "../../common/handles.h"
#include "../norm/norm_args.h"

namespace fusednorm_cpu {

Handle empty(int64_t ndim, const int64_t* sizes, Dtype dtype);
Handle undefined();

// A tensor of sizes that are known: `lead` dimensions of rows, the others columns.
void describe(const char* name, const Handle& tensor, const Sizes& s, int64_t lead, Operand& operand);

// One that may be absent, and else has the `ndim` sizes said.
void describe(const char* name, const Handle& tensor, const int64_t* sizes, int64_t ndim, int64_t lead, Operand& operand);

// Its sizes, which must be those.
Sizes check_shape(const char* name, const Handle& tensor, const int64_t* sizes, int64_t ndim);

// The sizes of a parameter beside a tensor of sizes `s`: those behind `lead`, or the same for each index of dimension 0, with
// any number of ones between.
Sizes check_samples(const char* name, const Handle& tensor, const Sizes& s, int64_t lead);

}  // namespace fusednorm_cpu
