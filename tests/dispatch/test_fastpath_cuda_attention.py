"""The fast path to attention by the CUDA library: the bits of the Python path, by the node in C++.

On a GPU, or without one on the emulation.
"""

from __future__ import annotations

import pytest
import torch
from backends import EMULATED
from fastpath_calls import (
    ATTENTION,
    KEY_MASK,
    NEEDS_FASTPATH,
    both_ways,
    heads,
    hold_to_python_path,
    on_cuda,
    same,
)

import fusednorm
from fusednorm import dispatch
from fusednorm.dispatch import registry, rules_attention

pytestmark = [NEEDS_FASTPATH, *([] if EMULATED else [pytest.mark.gpu])]
NODE = "FusedAttentionBackward"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = {name: on_cuda(form) for name, form in ATTENTION.items()}
DEVICE = FORMS["plain"].device
EVERY_FORM = pytest.mark.parametrize("name", FORMS)


@pytest.fixture(autouse=True)
def by_cuda():
    with fusednorm.use_provider("cuda"):
        yield


def operands(**how):
    return heads(device=DEVICE, **how)


def taken(leaves, key_mask=None, is_causal=False, window=None, scale=None, grouped=False):
    fast = dispatch.settings.current.fastpath
    return fast.attention(*leaves.values(), key_mask, is_causal, window, scale, grouped, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_FORM
def test_fastpath_to_cuda_attention_gives_the_bits_of_the_python_path(name, dtype):
    leaves = operands(dtype=dtype)
    hold_to_python_path(FORMS[name], leaves)
    with torch.no_grad():
        options = {"grouped" if k == "enable_gqa" else k: v for k, v in FORMS[name].options.items()}
        assert taken(leaves, **options) is not None
        found = FORMS[name].call(leaves)
        with dispatch.settings.without_fastpath():
            same(found, FORMS[name].call(leaves))


REFUSED = {
    "float64": lambda: (operands(dtype=torch.float64), {}),
    "no keys": lambda: (operands(lengths=(5, 0)), {}),
    "no queries": lambda: (operands(lengths=(0, 7)), {}),
    "on no device": lambda: ({name: t.to("meta") for name, t in operands().items()}, {}),
    "a key on no device": lambda: (operands() | {"key": torch.randn(2, 2, 7, 8, device="meta")}, {}),
    "another dtype": lambda: (operands() | {"key": torch.randn(2, 2, 7, 8, device=DEVICE).half()}, {}),
    "heads that do not divide": lambda: (operands(counts=(3, 2)), {"grouped": True}),
    "heads without grouping": lambda: (operands(counts=(4, 2)), {}),
    "heads too wide": lambda: (operands(dims=(264, 8)), {}),
    "a mask of other sizes": lambda: (operands(), {"key_mask": KEY_MASK[:, :5].to(DEVICE)}),
    "a mask of numbers": lambda: (operands(), {"key_mask": KEY_MASK.to(DEVICE).float()}),
    "negated": lambda: (
        operands() | {"key": torch.randn(2, 2, 7, 8, dtype=torch.cfloat, device=DEVICE).conj().imag},
        {},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fastpath_to_cuda_attention_leaves_what_its_kernels_do_not_read_to_the_python_path(case):
    leaves, options = REFUSED[case]()
    assert taken(leaves, **options) is None
    assert taken(operands()) is not None


@EVERY_FORM
def test_fastpath_to_cuda_attention_second_derivatives(name):
    leaves = operands()

    def second(outputs):
        first = torch.autograd.grad(outputs[0].square().sum(), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))

    ours, expected = (second(outputs) for outputs in both_ways(lambda: FORMS[name].call(leaves), NODE))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("triton", "cuda", "gpu", "serves"),
    [
        (None, None, None, False),
        ("absent", None, None, True),
        ("absent", "absent", None, False),
        ("absent", None, "old", False),
    ],
)
def test_automatic_choice_leads_to_cuda_where_triton_cannot_serve(triton, cuda, gpu, serves, monkeypatch):
    reasons = {"triton": triton, "cuda": cuda}
    monkeypatch.setattr(registry, "unavailable_reason", lambda name: reasons[name])
    asked = []
    monkeypatch.setattr(rules_attention.cuda, "unusable", lambda index: asked.append(index) or gpu)
    assert rules_attention.cuda_serves(0) is serves
    assert asked == ([0] if triton and cuda is None else [])  # a first launch, of a library that is there


def test_a_request_for_the_cpu_library_is_none_for_the_fast_path():
    with fusednorm.use_provider("cpu"):
        out = fusednorm.scaled_dot_product_attention(*heads().values())
    assert out.grad_fn.name() != NODE
