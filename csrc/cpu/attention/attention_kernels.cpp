// Compiled once for each instruction set, FN_ISA being its name (setup.py).
#include "attention_heads.h"
#include "../support/bounded.h"

namespace fusednorm_cpu {
namespace FN_ISA {

extern const AttentionKernels attention_kernels = {
    attention_workspace,      attention_head_workspace, attention_forward,        attention_delta, attention_precise_delta,
    attention_query_gradient, attention_key_gradients,  attention_head_gradients, attention_mask_gradient,
    bounded,
};

}  // namespace FN_ISA
}  // namespace fusednorm_cpu
