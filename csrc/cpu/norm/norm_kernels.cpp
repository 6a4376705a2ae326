// Compiled once for each instruction set, FN_ISA being its name (setup.py).
#include "norm_backward.h"

#define FN_TEXT_(name) #name
#define FN_TEXT(name) FN_TEXT_(name)

namespace fusednorm_cpu {
namespace FN_ISA {

extern const ActivationKernels activation_kernels;  // activation_kernels.cpp
extern const AttentionKernels attention_kernels;    // attention_kernels.cpp
extern const LinearKernels linear_kernels;          // linear_kernels.cpp

extern const Kernels kernels;
const Kernels kernels = {
    FN_TEXT(FN_ISA), forward_workspace, forward, backward_workspace, backward, reduce, parameter,
    &activation_kernels, &attention_kernels, &linear_kernels,
};

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
