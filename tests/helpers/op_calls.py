"""Arguments for every operator of ``torch.ops.fusednorm``, with what is optional absent and with all of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

F32 = torch.float32
SCALE = 1.0 / 8**0.5


def norm_forward(seed=None, p=0.0, rms=False, store=True, ndim=1, dtype=F32, **given):
    optional = [given.get(name) for name in ("residual", "weight", "bias", "x_bias", "layer_scale")]
    return (torch.randn(3, 4, 8).to(dtype), *optional, seed, ndim, 1e-5, p, p, dtype, F32, rms, False, store)


def norm_backward(seed=None, p=0.0, mask=(True,) + (False,) * 5, saved_is_normed=False, stream=False, **given):
    """The gradient of the stream where there is one; x is saved where a branch is scaled."""
    *forward, _ = norm_forward(seed, p, **given)
    normed, z, stats = torch.ops.fusednorm.add_layer_norm_fwd(*forward, True, "reference")
    optional = [given.get(name) for name in ("weight", "bias", "x", "x_bias", "layer_scale")]
    dtype, residual_dtype, rms, ndim = forward[11], forward[12], forward[13], forward[7]
    dz = torch.randn_like(z) if stream else None
    return (
        *(torch.randn_like(normed), dz, normed if saved_is_normed else z, stats, *optional, seed, ndim, p, p),
        *(dtype, residual_dtype, rms, False, saved_is_normed, list(mask)),
    )


def activation(seed=None, p=0.0, bias=None):
    return (torch.randn(3, 4, 8), bias, seed, "gelu", p)


def activation_backward(mask=(True, False), **given):
    return (torch.randn(3, 4, 8), *activation(**given), list(mask))


def attention(seed=None, p=0.0, attn_mask=None, key_mask=None, packed=False, limited=False):
    """Limited: with a window and a cap, lower right, and heads in groups of two."""
    if packed:
        q, k, v = torch.randn(3, 6, 4, 8).unbind()
        bounds, longest = torch.tensor([0, 4, 6], dtype=torch.int32), (4, 4)
    else:  # some transposed, some contiguous
        q, k, v = torch.randn(2, 5, 4, 8).transpose(1, 2), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
        bounds, longest = None, (5, 7)
    if limited:
        k, v = (t[:, :2] for t in (k, v))
    last = (True, 3, 1, 2.0) if limited else (False, -1, -1, 0.0)
    return (q, k, v, attn_mask, key_mask, seed, bounds, bounds, *longest, SCALE, p, True, *last)


def everything(mask: Tensor) -> dict:
    masks = {"attn_mask": mask, "key_mask": torch.rand(2, 7) > 0.2}
    return {"seed": torch.tensor([5]), "p": 0.3, "limited": True, **masks}


def attention_backward(mask=(True, True, True, False), dlse=False, seed=None, p=0.0, **given):
    forward = attention(seed, p, **given)
    out, lse = torch.ops.fusednorm.attention_fwd(*forward, "reference")
    rest = (*forward[:3], out, lse, *forward[3:], list(mask))
    return (torch.randn_like(out), torch.randn_like(lse) if dlse else None, *rest)


def seed() -> Tensor:
    return torch.tensor([5])


def row() -> Tensor:
    return torch.randn(8)


def parameters() -> dict[str, Tensor]:
    return {name: row() for name in ("weight", "bias", "x_bias", "layer_scale")}


# everything optional absent, then everything there
CALLS = {
    "add_layer_norm_fwd": [
        norm_forward,
        lambda: norm_forward(store=False),
        lambda: norm_forward(seed(), 0.3, residual=torch.randn(3, 4, 8), **parameters()),
    ],
    "add_layer_norm_bwd": [
        norm_backward,
        lambda: norm_backward(mask=(False,) * 6),
        lambda: norm_backward(seed(), 0.3, (True,) * 6, x=torch.randn(3, 4, 8), **parameters()),
    ],
    "bias_act_dropout_fwd": [activation, lambda: activation(seed(), 0.3, row())],
    "bias_act_dropout_bwd": [
        activation_backward,
        lambda: activation_backward((False, False)),
        lambda: activation_backward((True, False), bias=row()),
        lambda: activation_backward((True, True), seed=seed(), p=0.3, bias=row()),
    ],
    "attention_fwd": [
        attention,
        lambda: attention(packed=True),
        lambda: attention(seed(), 0.3, packed=True, limited=True),
        lambda: attention(**everything(torch.randn(4, 5, 1))),
        lambda: attention(**everything(torch.randn(1, 1, 5, 7))),
    ],
    "attention_bwd": [
        attention_backward,
        lambda: attention_backward((False, True, False, False), packed=True),
        lambda: attention_backward(dlse=True, seed=seed(), p=0.3, packed=True, limited=True),
        lambda: attention_backward((True, True, True, True), True, **everything(torch.randn(4, 5, 1))),
        lambda: attention_backward((True, False, False, False), True, **everything(torch.randn(5, 7))),
        lambda: attention_backward((False, True, False, False), True, **everything(torch.randn(1, 1, 5, 7))),
    ],
}


RESIDUAL = torch.randn(3, 4, 8)
EPILOGUE = {"residual": RESIDUAL, "x": RESIDUAL, "x_bias": row(), "layer_scale": row(), "seed": seed(), "p": 0.3}
SAMPLES = {"layer_scale": torch.randn(3, 16)[:, :8]}
MATRICES = {"weight": torch.randn(4, 8), "bias": torch.randn(4, 8)}
NORMS = {  # what a norm is asked for beside the calls above
    "layer_norm": {"weight": row(), "bias": row(), "store": False},
    "rms_norm": {"weight": row(), "rms": True, "store": False},
    "everything": {"weight": row(), "bias": row(), **EPILOGUE},
    "rms_everything": {"weight": row(), "rms": True, **EPILOGUE},
    "normalized_2d": {"residual": RESIDUAL, **MATRICES, "ndim": 2},
    "a_vector_for_each_sample": {"weight": torch.randn(3, 8), "bias": torch.randn(3, 1, 8), **EPILOGUE, **SAMPLES},
    "bfloat16_on_float32_stream": {"residual": RESIDUAL, "weight": row(), "bias": row(), "dtype": torch.bfloat16},
}


def norm_calls() -> list:
    """Of each forward, and of each backward with every set of gradients wanted."""
    calls = []
    for case, given in NORMS.items():
        calls.append(pytest.param("add_layer_norm_fwd", lambda o=given: norm_forward(**o), id=f"forward-{case}"))
        there = [True, *(name in given for name in ("residual", "weight", "bias", "x_bias", "layer_scale"))]
        masks = {"all": there, "none": [False] * 6, "parameters": [False, False, *there[2:]]}
        for wanted, saved_is_normed in itertools.product(masks, (False, True)):
            options = {"mask": masks[wanted], "saved_is_normed": saved_is_normed, "stream": True, **given}
            name = f"backward-{case}-{wanted}-{'normed' if saved_is_normed else 'z'}"
            calls.append(pytest.param("add_layer_norm_bwd", lambda o=options: norm_backward(**o), id=name))
    return calls


CALL = ("name", "make")
FEW = [pytest.param(n, make, id=f"{n}-{i}") for n, calls in CALLS.items() for i, make in enumerate(calls)]
EVERY_CALL = pytest.mark.parametrize(CALL, FEW)
