// The norms of the CPU library for those who link it: arguments checked, outputs allocated, kernels run.
#pragma once

#include "../../common/export.h"
#include "../../common/norm_call.h"

namespace fusednorm_cpu {

using fusednorm::Gradients;
using fusednorm::Outputs;

// With `keep_statistics` false nobody will ask for a gradient, and the statistics go to a buffer.
FUSEDNORM_EXPORT Outputs run_forward(const fusednorm::ForwardCall& call, bool keep_statistics);

FUSEDNORM_EXPORT Gradients run_backward(const fusednorm::BackwardCall& call);

}  // namespace fusednorm_cpu
