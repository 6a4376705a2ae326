// The norms of the CPU library for those who link it: arguments checked, outputs allocated, kernels run.
#pragma once

#include "../norm_call.h"
#include "export.h"

namespace fusednorm_cpu {

struct Outputs {
  fusednorm::Handle normed, z, stats;
};

// With `keep_statistics` false nobody will ask for a gradient, and the statistics go to a buffer.
FUSEDNORM_EXPORT Outputs run_forward(const fusednorm::ForwardCall& call, bool keep_statistics);

struct Gradients {
  fusednorm::Handle of[6];  // x, residual, weight, bias, x_bias, layer_scale; undefined where not wanted
};

FUSEDNORM_EXPORT Gradients run_backward(const fusednorm::BackwardCall& call);

}  // namespace fusednorm_cpu
