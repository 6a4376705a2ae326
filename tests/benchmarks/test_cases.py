"""The benchmark's sweeps and baselines."""

from __future__ import annotations

import pytest
import torch

from benchmarks import baselines, cases
from benchmarks.cases import OPS


def test_every_sweep_has_the_tiny_case_and_unique_names():
    for (device, level), sweep in cases.SWEEPS.items():
        names = [case.name for case in cases.sweep(device, level)]
        assert len(set(names)) == len(names)
        for op, operation in sweep.operations().items():
            sizes = [n.rsplit("/", 1)[1] for n in names if n.startswith(f"{op}/")]
            tiny = {"attention": "1x4x16x16", "layer": "2x8x64"}.get(operation.family, "4x64")
            assert tiny in sizes or level == "grid"
    assert set(cases.SWEEPS["cpu", "grid"].operations()) == set(OPS) > set(cases.SWEEPS["cpu", "full"].operations())
    shapes = cases.SWEEPS["cpu", "default"].shapes + cases.SWEEPS["cuda", "default"].shapes
    assert [(min(sizes), max(sizes)) for sizes in zip(*shapes)] == [(1, 65536), (64, 262144)]


def test_operations_of_a_feed_forward_block_have_shapes_of_their_own():
    for sweep in cases.SWEEPS.values():
        shapes = {case.shape for case in sweep.cases() if case.op == "bias_relu"}
        assert shapes == set(sweep.ffn_shapes)
    assert (1, 4096) not in {case.shape for case in cases.sweep("cpu", "default") if case.op == "bias_relu"}


def test_baselines_apply_to_operations_of_their_kind():
    applied = {op.family: {n for n in baselines.BASELINES if baselines.applies(n, op)} for op in OPS.values()}
    torchs = {"eager", "compile", "compile-max-autotune"}
    assert applied["feed_forward"] == applied["layer"] == torchs
    assert applied["norm"] == torchs | {"liger_kernel", "quack", "fla", "flash_attn"}
    assert applied["attention"] == torchs | {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math"}


def test_a_forced_backend_of_attention_is_that_one_or_refuses():
    """On the CPU torch has two of them; none serves in another's name."""
    op = OPS["attention_causal"]
    leaves = {key: torch.randn(size, requires_grad=True) for key, size in op.inputs((1, 2, 8, 16)).items()}
    nodes = {name: baselines.BASELINES[name][1](op, leaves) for name in baselines.ATTENTION}
    assert "FlashAttention" in nodes["sdpa-flash"]()[0].grad_fn.name()
    assert "FlashAttention" not in nodes["sdpa-math"]()[0].grad_fn.name()
    for absent in ("sdpa-cudnn", "sdpa-efficient"):
        with pytest.raises(RuntimeError, match="No viable backend"):
            nodes[absent]()


@pytest.mark.parametrize("name", [op.name for op in OPS.values() if op.family == "attention"])
def test_attention_sees_the_pairs_that_its_model_counts(name):
    op, shape = OPS[name], (3, 4, 150, 8)
    query = torch.randn(shape)
    seen = torch.ones(3, 150, 150, dtype=torch.bool)
    if op.causal:
        seen = seen.tril()
    mask = op.attn_mask(query)
    if mask is not None:
        seen = seen & mask.reshape(-1, mask.shape[-2], 150)
    assert op.pairs(shape) == seen.sum()
    # two products forward and five backward, of 2 * 8 for each of the pairs of 4 heads
    assert [op.flops(shape, direction) for direction in cases.DIRECTIONS] == [
        n * 16 * 4 * seen.sum() for n in (2, 5, 7)
    ]
