// The launches of bias_act_dropout, one set for each dtype.
#pragma once

#include "activation_args.h"

namespace fusednorm_cuda {

// `cuda_stream` is a cudaStream_t; the emulation has none.
struct ActivationLaunchers {
  void (*forward)(const ActivationForward&, const Form&, int programs, void* cuda_stream);
  void (*backward)(const ActivationBackward&, const Form&, int programs, void* cuda_stream);
};

ActivationLaunchers activation_launchers(Dtype dtype);

}  // namespace fusednorm_cuda
