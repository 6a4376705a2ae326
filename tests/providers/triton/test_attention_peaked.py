"""Gradients of attention in 16 bits where few keys have all the weight: what the rounded output costs them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from backends import INTERPRETED
from oracle import assert_within_budget
from oracle_attention import AttentionCall, draw
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusednorm

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="compares kernels in Triton's interpreter with torch's CPU operator"
)


def error_bound(leaves: dict[str, Tensor], dout: Tensor, scale: float, causal: bool) -> dict[str, Tensor]:
    """The largest errors of dq, dk and dv, element by element, beside those of float32; leaves are in 16 bits.

    u is half a unit in the last place, and half the smallest number bounds what is rounded below the normal ones.
    The weights of the forward and its output are rounded: delta errs by 2 u |dout| P |v|. A gradient of a logit is
    P times (dp - delta), and is rounded; so are the weights of dv, and all results.
    """
    info = torch.finfo(dout.dtype)
    u, tiny = info.eps / 2, info.smallest_normal * info.eps / 2
    q, k, v = (leaf.double() for leaf in leaves.values())
    dout = dout.double()
    logits = q @ k.mT * scale
    if causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), float("-inf"))
    p = torch.softmax(logits, -1)
    dp = dout @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    of_delta = (dout.abs() * (2 * u * p + tiny).matmul(v.abs())).sum(-1, keepdim=True)
    of_ds = (1 + u) * p * of_delta + u * ds.abs() + tiny
    sums = {
        "dq": (scale * ds @ k, scale * of_ds @ k.abs()),
        "dk": (scale * ds.mT @ q, scale * of_ds.mT @ q.abs()),
        "dv": (p.mT @ dout, (u * p + tiny).mT @ dout.abs()),
    }
    return {name: (1 + u) * error + u * value.abs() + tiny for name, (value, error) in sums.items()}


QUICK = ((torch.bfloat16, False, 4.0), (torch.float16, True, 0.0))
CASES = itertools.product((torch.bfloat16, torch.float16), (False, True), (0.0, 4.0))


@pytest.mark.parametrize(
    ("dtype", "causal", "offset"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_gradients_of_peaked_attention(dtype, causal, offset, generator):
    """Within the bound, and within twice the error of torch's operator, which makes delta of its rounded output too.

    Logits of 30 and a head dim of 256; values far from zero have an output whose rounding is large beside gradients.
    """
    q, k, v, dout = draw(generator, "cpu", dtype, *[(1, 1, 16, 256)] * 4)
    leaves = {"q": q, "k": k, "v": v + offset}
    scale = 30 / 256**0.5
    call = AttentionCall({"is_causal": causal, "scale": scale})

    def gradients(run, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        given = [leaf.detach().requires_grad_() for leaf in leaves.values()]
        return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(run(*given), given, dout.to(given[0].dtype))))

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

    with fusednorm.use_provider("triton"):
        ours = gradients(lambda q, k, v: call.ours({"q": q, "k": k, "v": v})[0], leaves)
    exact = gradients(
        lambda q, k, v: call.explicit({"q": q, "k": k, "v": v}, torch.float64)[0],
        {name: leaf.double() for name, leaf in leaves.items()},
    )
    assert_within_budget(ours, gradients(torchs, leaves), exact)
    for name, bound in error_bound(leaves, dout, scale, causal).items():
        share = ((ours[name].double() - exact[name]).abs() / bound).max().item()
        assert share <= 1, f"{name}: {share:.2f} of the bound"
