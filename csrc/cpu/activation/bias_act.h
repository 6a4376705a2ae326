// bias_act_dropout of the CPU library for those who link it: arguments checked, outputs allocated, kernels run.
#pragma once

#include "../../common/export.h"
#include "../../common/norm_call.h"

namespace fusednorm_cpu {

using fusednorm::Handle;

struct BiasActGradients {
  Handle dx, dbias;  // undefined where not wanted
};

FUSEDNORM_EXPORT Handle run_activation_forward(const fusednorm::BiasActCall& call);
FUSEDNORM_EXPORT BiasActGradients run_activation_backward(const Handle& dy, const fusednorm::BiasActCall& call);

}  // namespace fusednorm_cpu
