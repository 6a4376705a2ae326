// The launch that adds partial sums.
#pragma once

#include "args.h"

namespace fusednorm_cuda {

void sum_partials(const Finalize& a, int n_sums, bool wide, void* stream);  // wide: of doubles

}  // namespace fusednorm_cuda
