// The launches of bias_act_dropout.
#pragma once

#include "activation_args.h"

namespace fusednorm_cuda {

// Of rows of `dtype`. `cuda_stream` is a cudaStream_t; the emulation has none.
void launch_activation(Dtype dtype, const ActivationForward& a, const Form& f, int programs, void* cuda_stream);
void launch_activation(Dtype dtype, const ActivationBackward& a, const Form& f, int programs, void* cuda_stream);

}  // namespace fusednorm_cuda
