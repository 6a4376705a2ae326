// Compiled once for each instruction set, FN_ISA being its name (setup.py).
#include "few_rows.h"
#include "../support/transpose.h"

namespace fusednorm_cpu {
namespace FN_ISA {

extern const LinearKernels linear_kernels = {transpose_columns, few_rows_workspace, few_rows};

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
