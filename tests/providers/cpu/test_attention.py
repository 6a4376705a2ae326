"""What the native CPU provider of attention has of its own."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from fresh import python

import fusednorm
from fusednorm import dispatch
from fusednorm.providers.cpu import library as cpu

_missing = dispatch.unavailable_reason("cpu")
pytestmark = pytest.mark.skipif(_missing is not None, reason=f"provider cpu: {_missing}")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(1, 2),
    "packed": lambda t: t[..., 8:24],
    "step 2": lambda t: t[..., ::2],
    "offset": lambda t: t.flatten()[1:],
    "expanded": lambda t: t[:, :1].expand(-1, 5, -1, -1),
    "0-d": lambda t: t[0, 0, 0, 0],
    "reversed dims": lambda t: t.permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_bounded_sees_each_element_and_no_other(layout, dtype):
    large = {torch.float64: 2.0**500, torch.float16: torch.inf}.get(dtype, 2.0**56)
    most = torch.nextafter(torch.tensor(large, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    whole = torch.full((2, 3, 7, 32), -most.item(), dtype=dtype)
    view = LAYOUTS[layout](whole)
    assert cpu.all_bounded(view, None, None)
    for bad, at in itertools.product((torch.nan, torch.inf, -torch.inf, large, -large), (0, -1)):
        kept = whole.clone()
        LAYOUTS[layout](kept).reshape(-1)  # the same elements
        index = torch.arange(whole.numel()).view(whole.shape)
        seen = LAYOUTS[layout](index).reshape(-1)
        kept.view(-1)[seen[at]] = bad
        assert not cpu.all_bounded(LAYOUTS[layout](kept), None, None)
        assert not cpu.all_bounded(torch.ones(3), LAYOUTS[layout](kept), None)
        assert not cpu.all_bounded(torch.ones(3), None, LAYOUTS[layout](kept))
        others = torch.full_like(whole, bad)
        others.view(-1)[seen] = 1.0
        assert cpu.all_bounded(LAYOUTS[layout](others), None, None)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)], ids=str)
def test_all_bounded_of_nothing(shape):
    assert cpu.all_bounded(torch.empty(shape), torch.empty(shape), None)


def test_all_bounded_over_several_threads():
    x = torch.zeros(1 << 20)
    assert cpu.all_bounded(x, None, None)
    for at in (0, 1 << 19, (1 << 20) - 1):
        y = x.clone()
        y[at] = torch.inf
        assert not cpu.all_bounded(y, x, x)


# --- two forms of the backward ---

FORMS = {
    "bare": lambda n, m: {},
    "dropout": lambda n, m: {"dropout_p": 0.3, "seed": 5},
    "causal": lambda n, m: {"is_causal": True},
    "all": lambda n, m: {
        "window": (20, 30),
        "dropout_p": 0.2,
        "seed": 6,
        "softcap": 3.0,
        "key_mask": torch.rand(2, m) < 0.7,
    },
    "additive": lambda n, m: {"attn_mask": torch.randn(2, 1, n, m)},
    "trained": lambda n, m: {"attn_mask": torch.randn(2, 1, n, m, requires_grad=True), "dropout_p": 0.1, "seed": 7},
}


def on_threads(run):
    """Results on one thread, which computes tiles once, and on three, too many for two heads: they are made anew."""
    before = torch.get_num_threads()
    try:
        return [(torch.set_num_threads(count), run())[1] for count in (1, 3)]
    finally:
        torch.set_num_threads(before)


def same_bits(ours, others):
    """Equal, NaN where the other has NaN."""
    return all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()]) for a, b in zip(ours, others)
    )


@pytest.mark.parametrize("hostile", [False, True], ids=["finite", "hostile"])
@pytest.mark.parametrize("lengths", [(130, 200), (70, 64), (5, 129), (128, 1)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_backward_of_whole_heads_has_the_bits_of_that_of_blocks(form, lengths, hostile):
    torch.manual_seed(0)
    n, m = lengths
    options = FORMS[form](n, m)
    for dtype, heads in itertools.product((torch.float64, torch.float32, torch.bfloat16), (1, 2)):
        q, k, v = torch.randn(2, heads, n, 24), torch.randn(2, 1, m, 24), torch.randn(2, 1, m, 40)
        cotangent = torch.randn(2, heads, n, 40, dtype=dtype)
        if hostile:
            q[0, 0, 3] = k[0, 0, -1] = v[1, 0, m // 2] = torch.nan
            q[1, 0, 4], cotangent[0, 0, 1] = torch.inf, -torch.inf
        q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
        mask = options.get("attn_mask")
        given = options if mask is None else options | {"attn_mask": mask.to(dtype)}
        with fusednorm.use_provider("cpu"):
            out = fusednorm.scaled_dot_product_attention(q, k, v, enable_gqa=True, **given)
        for wanted in ([q, k, v], [q, v], [k, v], [q], [k], *([[q, k, v, mask]] if form == "trained" else [])):
            whole, blocks = on_threads(lambda: torch.autograd.grad(out, wanted, cotangent, retain_graph=True))  # noqa: B023
            assert same_bits(whole, blocks), (dtype, heads, len(wanted))


@pytest.mark.parametrize("heads", [1, 2])
def test_backward_of_packed_heads_has_the_bits_of_that_of_blocks(heads):
    torch.manual_seed(0)
    bounds = torch.tensor([0, 70, 200], dtype=torch.int32)
    q, k, v = (torch.randn(200, n, 24, requires_grad=True) for n in (heads, 1, 1))
    with fusednorm.use_provider("cpu"):
        out = fusednorm.varlen_attention(q, k, v, bounds, bounds, 130, 130, is_causal=True, dropout_p=0.1, seed=1)
    whole, blocks = on_threads(lambda: torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True))
    assert same_bits(whole, blocks)


# --- memory ---

LENGTH, HEADS, DIM = 4864, 2, 16
OPTIONS = {
    "bare": "{}",
    "causal": "{'is_causal': True}",
    "window": "{'window': (500, 500)}",
    "softcap": "{'softcap': 5.0}",
    "dropout": "{'dropout_p': 0.1, 'seed': 3}",
    "key_mask": "{'key_mask': torch.rand(1, LENGTH) < 0.7}",
    "bool": "{'attn_mask': torch.rand(LENGTH, 1) < 0.7}",
    "additive": "{'attn_mask': torch.zeros(1, LENGTH, requires_grad=True)}",
}
# prints by how many KB a forward and a backward raise what the process holds at most, case by case
SCRIPT = f"""
import torch, fusednorm
LENGTH, HEADS, DIM = {LENGTH}, {HEADS}, {DIM}

def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":"))

def call(length, options, provider):
    q, k, v = (torch.randn(1, HEADS, length, DIM, requires_grad=True) for _ in range(3))
    leaves = [q, k, v, *(t for t in options.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
    with fusednorm.use_provider(provider):
        out = fusednorm.scaled_dot_product_attention(q, k, v, **options)
    torch.autograd.grad(out, leaves, torch.ones_like(out))

for options, provider in [*((text, "cpu") for text in {list(OPTIONS.values())}), ("{{}}", "reference")]:
    call(64, {{}}, provider)  # what loads with the first call
    options = eval(options)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    call(LENGTH, options, provider)
    print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to see a process's largest memory"
)
def test_memory_is_of_the_operands_size():
    """A byte for each query and key of a head, 24 MB, would be seen: operands, gradients and outputs are 5 MB."""
    *ours, reference = (1024 * int(line) for line in python("-c", SCRIPT).split())
    most = 8 * 4 * HEADS * LENGTH * DIM + (16 << 20)
    assert most < LENGTH**2
    assert len(ours) == len(OPTIONS)
    assert {name: grown for name, grown in zip(OPTIONS, ours, strict=True) if grown >= most} == {}
    assert reference > 4 * LENGTH**2  # which holds the logits of a head: they would be seen
