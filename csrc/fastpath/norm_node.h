// The norms' node of the autograd graph, and the call that makes it, by the CPU library or by the CUDA library.
#pragma once

#include <ATen/core/Tensor.h>

#include "../cpu/norm/norm.h"

namespace fusednorm_fastpath {

struct NormOptions {
  int64_t normalized_ndim;
  double eps, dropout_p;
  bool rms, zero_centered, by_cuda;
};

struct NormCall : NormOptions {
  at::Tensor x, residual, weight, bias, x_bias, layer_scale, seed;  // undefined where not given
  bool needs_grad;
  bool by_torch;  // a plain or residual norm that is torch's to serve

  // Whether anything but the addition stands between x and z.
  bool has_epilogue() const { return x_bias.defined() || layer_scale.defined() || dropout_p > 0; }
  // Whether z, the residual stream, is another tensor than x.
  bool has_residual() const { return residual.defined() || has_epilogue(); }
};

struct NormResult {
  at::Tensor normed, z;  // z is undefined where it is x
};

NormResult norm(const NormCall& call);

// By torch's own operators, as plain_add_layer_norm of fusednorm/providers/torch/norm.py.
NormResult norm_by_torch(const NormCall& call);

// Whether the CUDA library is there, and takes the call.
bool cuda_takes(const NormCall& call);

}  // namespace fusednorm_fastpath
