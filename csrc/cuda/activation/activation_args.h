// What the bindings of bias_act_dropout hand to the kernels: plain data.
#pragma once

#include "../../common/activations.h"
#include "../support/args.h"

namespace fusednorm_cuda {

struct ActivationCommon {
  int64_t n_rows;
  int n_columns;
  Activation activation;
  Dropout element;
  const int64_t* seed;
  Parameter bias;
  Rows x;
};

// Outputs are contiguous, and absent ones are null.
struct ActivationForward : ActivationCommon {
  void* y;
};

struct ActivationBackward : ActivationCommon {
  Rows dy;
  void *dx, *partials;
};

}  // namespace fusednorm_cuda
