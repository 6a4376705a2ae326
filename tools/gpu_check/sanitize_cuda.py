"""Which forms of the CUDA C++ kernels the calls of sanitize.py reach: their own tables say it.

Attention has no table: the calls' arguments say it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BODIES = ("causality, windows", "every mask", "float32")  # of attention's kernels
_CLUSTERS = ("forward, cluster", "backward, cluster")
FORMS = (
    *(f"forward, {form}" for form in ("rows side by side", "1 vector", "2 vectors", "4 vectors", "tiles", "unaligned")),
    *(f"backward, {form}" for form in ("rows side by side", "one block", "slabs", "unaligned")),
    *(f"activation, {form}" for form in ("rows side by side", "one block", "slabs", "unaligned")),
    *(f"attention, {columns} columns, {body}" for columns in (64, 128, 256) for body in BODIES),
    "attention, mask gradient",
    *("epilogue", "float32 stream", "two row strides", "many rounds", "many rounds of clusters", *_CLUSTERS),
)


def forms(device: str) -> tuple[str, ...]:
    """Those that this device has."""
    clusters = device == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)
    return FORMS if clusters else tuple(form for form in FORMS if form not in _CLUSTERS)


def attention(x: Tensor, options: Mapping[str, object], masked: bool) -> set[str]:
    """The kernels that a call of attention on x launches, as csrc/cuda/attention/attention_ops.cpp chooses them."""
    columns = max(64, 1 << (x.shape[-1] - 1).bit_length())
    if x.dtype == torch.float32:
        body = "float32"
    else:
        body = "every mask" if masked or options.keys() & {"dropout_p", "softcap"} else "causality, windows"
    return {f"attention, {columns} columns, {body}", *(["attention, mask gradient"] if masked else [])}


def reached(function: str, x: Tensor) -> set[str]:
    """The forms of a call on x and of its backward."""
    aligned = x.shape[-1] * x.element_size() % 16 == 0
    found: set[str] = set()
    for line in torch.ops.fusednorm_cuda.forms(x, aligned).splitlines():
        kernel, *numbers = line.split()
        if (kernel == "activation") != (function == "bias_act_dropout"):
            continue
        chunks, _, rows, ranks, tiles = map(int, numbers)
        wide = "tiles" if kernel == "forward" else "slabs"
        vectors = f"{chunks} vector{'s' * (chunks > 1)}" if kernel == "forward" else "one block"
        here = {wide} if tiles > 1 else {vectors} if ranks == 1 else set()
        here |= {"cluster"} if ranks > 1 else set()
        here |= {"rows side by side"} if rows > 1 else set()
        found |= {f"{kernel}, {form}" for form in here if aligned}
        found |= set() if aligned else {f"{kernel}, unaligned"}
    return found
