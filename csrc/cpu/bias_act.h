// bias_act_dropout of the CPU library for those who link it: arguments checked, outputs allocated, kernels run.
#pragma once

#include "../handles.h"
#include "../export.h"

namespace fusednorm_cpu {

using fusednorm::Handle;

struct BiasActTensors {
  Handle x, bias, seed;  // bias and seed may be undefined
};

struct BiasActGradients {
  Handle dx, dbias;  // undefined where not wanted
};

// `options` holds the activation (activation_args.h) in two bits; for gradients, then one for dx and one for d(bias).
FUSEDNORM_EXPORT Handle run_activation_forward(const BiasActTensors& tensors, int64_t options, double dropout_p);
FUSEDNORM_EXPORT BiasActGradients run_activation_backward(const Handle& dy, const BiasActTensors& tensors, int64_t options,
                                                          double dropout_p);

}  // namespace fusednorm_cpu
