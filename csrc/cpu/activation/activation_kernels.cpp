// Compiled once for each instruction set, FN_ISA being its name (setup.py).
#include "activation.h"

namespace fusednorm_cpu {
namespace FN_ISA {

extern const ActivationKernels activation_kernels;
const ActivationKernels activation_kernels = {activation_workspace, activation_forward, activation_backward, mask_tiles};

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
