"""Which operands the Triton attention kernels read in place, and which as copies. Nothing is launches.

Shapes that would be large are of the meta device: they have strides, and no memory.
"""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch

from fusednorm._options import AttentionInputs, AttentionOptions

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CONTIGUOUS = [(1, 32, 2048, 128), (4, 16, 4096, 128), (1, 16, 8192, 64)]
FUSED = [(4, 16, 4096, 64), (1, 32, 1024, 128)]
MASKS = ((20, 48), (1, 48), (20, 1))


def attend(q, k, v, mask=None, dout=None):
    """Forward and backward by the provider, causal."""
    from fusednorm.providers.triton import attention as triton_attention

    inputs = AttentionInputs(q, k, v, mask)
    options = AttentionOptions(q.shape[-2], k.shape[-2], 0.1, causal=True)
    out, lse = triton_attention.attention_fwd(inputs, options)
    dout = torch.empty_like(out) if dout is None else dout
    grads = triton_attention.attention_bwd(dout, None, inputs, out, lse, options, [True, True, True, False])
    return out, grads


def fused(shape, device="meta"):
    """Views of a fused projection, (B, S, 3, H, D), as MultiheadAttention has them."""
    batch, heads, length, d = shape
    return torch.empty(batch, length, 3, heads, d, dtype=torch.bfloat16, device=device).permute(2, 0, 3, 1, 4).unbind(0)


def read_in_place(launches, operands):
    assert len(launches) == 4 or len(launches) == 5  # forward, delta, queries, and keys and values
    for launch in launches:
        assert launch.variant.aligned, launch.kernel
        if "delta" not in launch.kernel:
            read = launch.pointers[1:4] if "bwd" in launch.kernel else launch.pointers[:3]
            assert all(a is b for a, b in zip(read, operands, strict=True)), launch.kernel


@pytest.mark.parametrize("shape", CONTIGUOUS, ids=str)
def test_triton_attention_reads_long_contiguous_sequences_in_place(shape, launches):
    operands = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    attend(*operands)
    read_in_place(launches, operands)


@pytest.mark.parametrize("shape", FUSED, ids=str)
def test_triton_attention_reads_a_long_fused_projection_in_place(shape, launches):
    operands = fused(shape)
    out, grads = attend(*operands)
    read_in_place(launches, operands)
    assert all(t.stride() == torch.empty_like(operands[0]).stride() for t in (out, *grads[:3]))


def test_triton_attention_reads_strides_of_dimensions_of_one_nowhere(launches):
    """Neither their alignment nor their size is anything to a kernel."""
    operands = [torch.empty(1, 1, 48, 64, dtype=torch.bfloat16).as_strided((1, 1, 48, 64), (7, 2**40 + 3, 64, 1))] * 3
    attend(*operands)
    read_in_place(launches, operands)
    one = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16).as_strided((1, 1, 1, 64), (64, 64, 2**31 + 1, 1))
    launches.clear()
    attend(one, *operands[1:])
    read_in_place(launches, [one, *operands[1:]])


def test_triton_attention_reads_a_far_batch_and_a_far_head_in_place_and_copies_far_positions(launches):
    def meta(*strides):
        return torch.empty_strided((2, 2, 48, 64), strides, dtype=torch.bfloat16, device="meta")

    for operands in ([meta(2**33, 64 * 48, 64, 1)] * 3, [meta(64 * 48, 2**33, 64, 1)] * 3):
        launches.clear()
        attend(*operands)
        read_in_place(launches, operands)
    for stride, copied in ((2**23 - 8, False), (2**23, True)):
        launches.clear()
        q = meta(2**33, 2**32, stride, 1)
        attend(q, *[meta(2 * 48 * 64, 48 * 64, 64, 1)] * 2)
        assert (launches[0].pointers[0] is not q) == copied


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_triton_attention_reads_masks_with_strides_of_dimensions_of_one_in_place(shape, launches):
    strides = [2**40 if size == 1 else stride for size, stride in zip(shape, (48, 1), strict=True)]
    mask = torch.empty_strided(shape, strides, device="meta")
    operands = [torch.empty(2, 2, n, 64, dtype=torch.bfloat16, device="meta") for n in (20, 48, 48)]
    attend(*operands, mask)
    assert launches[0].pointers[3] is mask


def vectors(mask, launches):
    """How many elements of the mask each launch of a forward and a backward reads at once."""
    n_keys = 48 if mask.shape[-1] == 1 else mask.shape[-1]
    operands = [torch.empty(2, 2, n, 64, dtype=torch.bfloat16) for n in (20, n_keys, n_keys)]
    launches.clear()
    attend(*operands, mask)
    found = set()
    for launch in launches:
        names = [*inspect.signature(launch.variant.function.fn).parameters]
        if "MASK_VEC" in names:
            found.add(launch.variant.constants[names.index("MASK_VEC") - len(names)])
    return found


MASKS_IN_VECTORS = {
    "whole": lambda dtype: torch.zeros(2, 2, 20, 48, dtype=dtype),
    "of_every_head": lambda dtype: torch.zeros(20, 48, dtype=dtype),
    "of_every_query": lambda dtype: torch.zeros(1, 48, dtype=dtype),
    "expanded": lambda dtype: torch.zeros(48, dtype=dtype).expand(2, 2, 20, 48),
    "rows_of_64": lambda dtype: torch.zeros(20, 64, dtype=dtype)[:, :48],
}
MASKS_BY_ELEMENT = {
    "odd_keys": lambda dtype: torch.zeros(20, 45, dtype=dtype),
    "keys_of_half_a_vector": lambda dtype: torch.zeros(20, 32 + 8 // dtype.itemsize, dtype=dtype),
    "an_element_off": lambda dtype: torch.zeros(20 * 48 + 1, dtype=dtype)[1:].view(20, 48),
    "rows_of_49": lambda dtype: torch.zeros(20, 49, dtype=dtype)[:, :48],
    "transposed": lambda dtype: torch.zeros(48, 20, dtype=dtype).mT,
    "of_every_key": lambda dtype: torch.zeros(20, 1, dtype=dtype),
    "every_other_key": lambda dtype: torch.zeros(20, 96, dtype=dtype)[:, ::2],
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32], ids=str)
def test_triton_attention_reads_masks_with_rows_of_whole_vectors_16_bytes_at_a_time(dtype, launches):
    for name, make in MASKS_IN_VECTORS.items():
        assert vectors(make(dtype), launches) == {16 // dtype.itemsize}, name
    for name, make in MASKS_BY_ELEMENT.items():
        assert vectors(make(dtype), launches) == {1}, name


def test_triton_attention_looks_at_a_masks_address_in_each_call(launches):
    memory = torch.zeros(20 * 48 + 1)
    aligned, off = memory[:-1].view(20, 48), memory[1:].view(20, 48)
    assert [vectors(mask, launches) for mask in (aligned, off, aligned)] == [{4}, {1}, {4}]


UNALIGNED = {
    "odd_columns": lambda dtype: torch.randn(2, 2, 20, 33).to(dtype),
    "transposed": lambda dtype: torch.randn(2, 2, 64, 20).to(dtype).mT,
    "every_other_column": lambda dtype: torch.randn(2, 2, 20, 128).to(dtype)[..., ::2],
    "an_element_off": lambda dtype: torch.randn(1 + 2 * 2 * 20 * 64).to(dtype)[1:].view(2, 2, 20, 64),
    "rows_of_66": lambda dtype: torch.randn(2, 2, 20, 66).to(dtype)[..., 1:65],
    "broadcast": lambda dtype: torch.ones((), dtype=dtype).expand(2, 2, 20, 64),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", UNALIGNED)
def test_triton_attention_copies_what_has_no_whole_vectors(name, dtype, launches):
    """Element by element, kernels would spill."""
    x = UNALIGNED[name](dtype)
    d = x.shape[-1]
    plain = torch.randn(2, 2, 20, d).to(dtype)
    out, grads = attend(plain, x, x, dout=x)
    assert out.shape == x.shape and [g.shape for g in grads[:3]] == [x.shape] * 3
    vec = 16 // dtype.itemsize
    for launch in launches:
        assert launch.variant.aligned, launch.kernel
        rows = [t for t in launch.pointers if t is not None and t.ndim == 4]
        assert len(rows) >= 2
        for t in rows:
            assert t.data_ptr() % 16 == 0 and t.stride(-1) == 1
            assert all(stride % vec == 0 for stride in t.stride()[:-1])
            assert t.shape[-1] == d + -d % vec


def test_triton_attention_of_transposed_queries_has_rows_of_columns_that_lie_together(launches):
    x = torch.randn(2, 2, 16, 9).mT
    out, _ = attend(x, x, x)
    assert out.is_contiguous()


def test_triton_attention_pads_with_zeros(launches):
    x = torch.full((2, 2, 20, 33), torch.nan).to(torch.float16)
    attend(x, x, x)
    q = launches[0].pointers[0]
    assert q.shape[-1] == 40
    assert q[..., 33:].eq(0).all()
    assert q[..., :33].isnan().all()
