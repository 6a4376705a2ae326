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
        assert all(any(n.startswith(f"{op}/") and n.endswith("/4x64") for n in names) for op in sweep.operations())
    assert set(cases.SWEEPS["cpu", "grid"].operations()) == set(OPS) > set(cases.SWEEPS["cpu", "full"].operations())
    shapes = cases.SWEEPS["cpu", "default"].shapes + cases.SWEEPS["cuda", "default"].shapes
    assert [(min(sizes), max(sizes)) for sizes in zip(*shapes)] == [(1, 65536), (64, 262144)]


def test_operations_of_a_feed_forward_block_have_shapes_of_their_own():
    for sweep in cases.SWEEPS.values():
        shapes = {case.shape for case in sweep.cases() if case.op == "bias_relu"}
        assert shapes == set(sweep.ffn_shapes)
    assert (1, 4096) not in {case.shape for case in cases.sweep("cpu", "default") if case.op == "bias_relu"}


@pytest.mark.parametrize("name", ["liger_kernel", "quack", "fla", "flash_attn"])
def test_libraries_of_norms_say_that_they_have_no_activation(name):
    op = OPS["bias_relu"]
    leaves = {key: torch.ones(size) for key, size in op.inputs((2, 4)).items()}
    with pytest.raises(baselines.BaselineError, match="norms only"):
        baselines.BASELINES[name][1](op, leaves)
