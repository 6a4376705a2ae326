// bias_act_dropout of the CPU library for those who link it: arguments checked, outputs allocated, kernels run.
#pragma once

#include "../../common/export.h"
#include "../../common/norm_call.h"

namespace fusednorm_cpu {

using fusednorm::Handle;

struct BiasActTensors {
  Handle x, bias, seed;  // bias and seed may be undefined
};

struct BiasActGradients {
  Handle dx, dbias;  // undefined where not wanted
};

FUSEDNORM_EXPORT Handle run_activation_forward(const BiasActTensors& tensors, const fusednorm::ActivationOptions& options,
                                               double dropout_p);
FUSEDNORM_EXPORT BiasActGradients run_activation_backward(const Handle& dy, const BiasActTensors& tensors,
                                                          const fusednorm::ActivationOptions& options, double dropout_p);

}  // namespace fusednorm_cpu
