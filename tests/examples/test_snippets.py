"""Every small example runs as it stands, and gives what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import examples
import fusednorm
from examples.attention_with_padding import step_seed
from examples.pre_norm_block import FeedForward
from examples.swap_layer_norm import swap_layer_norms

FOLDER = Path(examples.__file__).parent
LONGER = ("__init__.py", "distributed.py", "tour.py", "train.py")  # which have tests of their own
SNIPPETS = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in LONGER)


def test_there_are_examples_and_each_is_short():
    assert len(SNIPPETS) >= 4
    assert all(20 <= len((FOLDER / name).read_text("utf-8").splitlines()) <= 40 for name in SNIPPETS)


@pytest.mark.parametrize("name", SNIPPETS)
def test_example_runs_from_anywhere(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.LayerNorm(8, 1e-3, bias=False), nn.LayerNorm(8, elementwise_affine=False)]
)
def test_swapped_norms_keep_parameters_mode_and_results(norm):
    class Own(nn.LayerNorm):
        """A subclass may do anything, so it stays."""

    model = nn.Sequential(nn.Linear(4, 8), nn.ModuleDict({"a": norm})["a"], Own(8)).eval()
    before, parameters, x = dict(model.state_dict()), list(model.parameters()), torch.randn(5, 4)
    expected = model(x)
    assert swap_layer_norms(model) is model and type(model[1]) is fusednorm.LayerNorm and type(model[2]) is Own
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(before) and not model[1].training and model[1].eps == norm.eps
    torch.testing.assert_close(model(x), expected)


def test_pre_norm_blocks_are_torchs_in_eval_mode():
    block = FeedForward(16, 32, dropout=0.5).eval()
    branch, stream = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    out, summed = block(branch, stream)
    torch.testing.assert_close(summed, stream + branch)
    normed = F.layer_norm(stream + branch, (16,), block.norm.weight, block.norm.bias)
    torch.testing.assert_close(out, block.down(F.gelu(block.up(normed))))
    assert not torch.equal(block.train()(branch, stream)[0], block(branch, stream)[0])


def test_seeds_of_steps_and_layers_differ():
    assert len({step_seed(step, layer, 12) for step in range(100) for layer in range(12)}) == 1200
