// The norms' node of the autograd graph, and the call that makes it.
#pragma once

#include <ATen/core/Tensor.h>

#include "../cpu/norm.h"

namespace fusednorm_shortcut {

struct NormCall {
  at::Tensor x, residual, weight, bias;  // undefined where not given
  int64_t normalized_ndim;
  double eps;
  bool rms, needs_grad;
};

struct NormResult {
  at::Tensor normed, z;  // z is undefined without a residual
};

NormResult norm(const NormCall& call);

}  // namespace fusednorm_shortcut
