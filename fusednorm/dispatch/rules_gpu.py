"""What automatic choice takes on a GPU where nothing was measured: rules of estimates, each with where it is from.

- Norms and activations wait for the host while they are small. Python's way to a Triton kernel takes 21.8 us forward
  and 119 us with the backward, eager's 3.1 and 52.6 (benchmarks/NOTES.md). Torch's operators serve these calls.
- Attention that torch's own operator computes alike is torch's. Since torch 2.11 that is cuDNN on sm_90 and sm_100:
  on an H200 691 TFLOP/s forward and 594 backward at a head dim of 128, by published figures.
"""

from __future__ import annotations

from typing import NamedTuple

HOST_BOUND = {False: 32 << 20, True: 64 << 20}  # bytes of x, by whether gradients are wanted


def waits_for_host(n_bytes: int, needs_grad: bool) -> bool:
    """Whether Python's way to the launch is longer than the kernel of a norm or an activation."""
    return n_bytes <= HOST_BOUND[needs_grad]


class Attention(NamedTuple):
    """What the rule for attention looks at: a call that a Triton kernel could serve."""

    attn_mask: bool
    fused: bool  # whether torch's fused kernels take the operands
    needs_grad: bool
    deterministic: bool  # torch.use_deterministic_algorithms
    by_shape: bool  # False inside batch_invariant


def why_not_torchs(call: Attention) -> str:
    """Why our kernel serves a call though torch's operator means the same, or nothing."""
    if not call.by_shape:
        return "how it splits a sum depends on the batch, and this is a block of `batch_invariant`"
    if call.attn_mask:
        return "NaN and Inf of masked keys and values reach its results, and they are not looked for here"
    if not call.fused:
        return "its fused kernels do not take these operands"
    if call.needs_grad and call.deterministic:
        return "its gradients differ from run to run, and torch.use_deterministic_algorithms is on"
    return ""
