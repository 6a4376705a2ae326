"""What the CUDA kernels of attention have of their own, emulated; tests/providers/test_attention.py has the rest.

`test_sanitizers.py` runs a part of both files once more on a library built with sanitizers.
"""

from __future__ import annotations

import pytest
import torch
from oracle_attention import AttentionCall, check

from fusednorm import scaled_dot_product_attention
from tests.providers.conftest import MACHINE
from tests.providers.test_attention import leaves_of

pytestmark = pytest.mark.usefixtures("cuda")
DTYPE = pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16))],
    ids=str,
)


@DTYPE
def test_cuda_attention_of_several_blocks(dtype, generator):
    check(AttentionCall({"is_causal": True}), leaves_of(generator, dtype, 137, 151, 64), generator)


@pytest.mark.parametrize("shape", [(75, 70), (1, 70)], ids=str)
def test_cuda_attention_with_masks_of_several_tiles(shape, generator):
    leaves = leaves_of(generator, torch.bfloat16, 75, 70, heads=2)
    leaves["mask"] = torch.randn(shape, generator=generator)
    check(AttentionCall({"is_causal": True}), leaves, generator)


@DTYPE
def test_cuda_attention_at_strides_of_its_own(dtype, generator):
    """Features two apart: 16-byte accesses do not reach them, and neither do rows of 40 bytes."""
    leaves = {n: torch.randn(1, 2, 20, 40, generator=generator).to(dtype)[..., ::2] for n in "qkv"}
    check(AttentionCall({"is_causal": True}), leaves, generator)


@pytest.mark.certifies("deterministic", op="scaled_dot_product_attention")
@pytest.mark.parametrize("seed", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_cuda_attention_does_not_depend_on_the_order_of_threads(seed, generator):
    leaves = leaves_of(generator, torch.bfloat16, 70, 70, 64, heads=2)
    found = []
    for order in (1, seed):
        torch.ops.fusednorm_cuda.emulate(*MACHINE, order)
        given = [leaf.detach().requires_grad_() for leaf in leaves.values()]
        out = scaled_dot_product_attention(*given, is_causal=True, dropout_p=0.1, seed=1)
        found.append((out, *torch.autograd.grad(out, given, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*found))
