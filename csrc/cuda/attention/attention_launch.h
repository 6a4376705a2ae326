// The launches of attention, and which kernels a call takes.
#pragma once

#include "attention_args.h"

namespace fusednorm_cuda {

// Of a head dim, and a body with every mask or one with causality, windows and lengths alone. `queries`: the kernel over
// tiles of queries, which makes their gradient if it is wanted, and delta.
struct AttentionLaunchers {
  void (*forward)(Attention& a, bool general, void* cuda_stream);
  void (*queries)(Attention& a, bool general, void* cuda_stream);
  void (*keys)(Attention& a, bool general, void* cuda_stream);  // where registers are too few for both, it is two launches
  void (*mask)(Attention& a, void* cuda_stream);
  int64_t (*mask_blocks)(const Attention& a, int64_t& tiles);  // but for splits; and tiles of logits that each sums up
};

AttentionLaunchers bfloat16_attention();
AttentionLaunchers float16_attention();
AttentionLaunchers float32_attention();

}  // namespace fusednorm_cuda
