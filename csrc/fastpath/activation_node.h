// The node of bias_act_dropout in the autograd graph, and the call that makes it.
#pragma once

#include <ATen/core/Tensor.h>

#include "../cpu/activation/bias_act.h"

namespace fusednorm_fastpath {

struct BiasActOptions {
  int64_t activation;  // as in activations.h
  double dropout_p;
};

struct BiasActCall : BiasActOptions {
  at::Tensor x, bias, seed;  // the last two undefined where not given
  bool needs_grad;
};

at::Tensor bias_act_dropout(const BiasActCall& call);

// act(x + bias) by torch's own operators, which may be the faster ones.
at::Tensor bias_act_by_torch(const BiasActCall& call);

}  // namespace fusednorm_fastpath
