// The norms' node of the autograd graph, and the call that makes it.
#pragma once

#include <ATen/core/Tensor.h>

#include "../cpu/norm.h"

namespace fusednorm_shortcut {

struct NormCall {
  at::Tensor x, residual, weight, bias, x_bias, seed;  // undefined where not given
  int64_t normalized_ndim;
  double eps, dropout_p;
  bool rms, needs_grad;

  // Whether the stream is another tensor than x.
  bool makes_stream() const { return residual.defined() || x_bias.defined() || dropout_p > 0; }
};

struct NormResult {
  at::Tensor normed, z;  // z is undefined where it is x
};

NormResult norm(const NormCall& call);

}  // namespace fusednorm_shortcut
