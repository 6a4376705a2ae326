"""Small inputs of accelerated modules: methods that fuse large tensors alone run their own code."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import pytest
import torch
from torch import nn

import fusednorm
from fusednorm.acceleration import fused

D = 16
HELPERS = ("add", "activate", "following", "gated", "later", "modulate", "settled")


class Modulated(nn.Module):
    """A gate and a modulation before a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.last = nn.Linear(D, D), nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, condition, x):
        scale, shift, gate = condition.chunk(3, dim=-1)
        h = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        x = x + gate[:, None] * self.fc(h)
        return self.last(x)


class Dropped(nn.Module):
    """A sum with dropout, and the norm that reads it."""

    def __init__(self, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.fc, self.norm, self.dropout = nn.Linear(D, D, bias=False), norm, nn.Dropout(dropout)

    def forward(self, x):
        return self.norm(x + self.dropout(self.fc(x)))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.act = nn.Linear(D, D), nn.LayerNorm(D), nn.GELU()

    def forward(self, x):
        return self.norm(x + self.act(self.fc(x)))


class Embedded(nn.Module):
    """Its sum is far larger than its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.norm = nn.Embedding(10, D), nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, tokens):
        x = self.table(tokens)
        return self.norm(x + self.fc(x))


class Repeated(Embedded):
    """An argument that is assigned something larger."""

    def forward(self, x):
        x = self.fc(x).repeat(4096, 1, 1)
        return self.norm(x + self.fc(x))


class Blocks(Embedded):
    """The residual is in a list."""

    def forward(self, xs):
        return self.norm(xs[0] + self.fc(xs[0]))


@pytest.fixture
def calls(monkeypatch):
    """The names of the helpers that rewritten methods called."""
    ran: list[str] = []
    for helper in HELPERS:
        monkeypatch.setattr(fused, helper, functools.partial(noted, ran, getattr(fused, helper)))
    return ran


def noted(ran: list[str], helper, /, *args, **kwargs):
    ran.append(helper.__name__)
    return helper(*args, **kwargs)


def wide(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, fused._LARGE // (rows * D), D)


@pytest.mark.parametrize("copied", [False, True])
def test_the_size_of_any_argument_decides(copied, calls):
    own = Modulated()
    ours = copy.deepcopy(own)
    assert fusednorm.accelerate(ours).fused
    if copied:
        ours = pickle.loads(pickle.dumps(ours))
    condition, small, large = torch.randn(2, 3 * D), torch.randn(2, 5, D), wide()
    torch.testing.assert_close(ours(condition, small), own(condition, small))
    torch.testing.assert_close(ours(condition, x=small), own(condition, small))
    assert not calls
    torch.testing.assert_close(ours(condition, large), own(condition, large))
    assert "later" in calls and "add" in calls
    calls.clear()
    ours(x=large, condition=condition)
    assert "later" in calls and "add" in calls


@pytest.mark.parametrize("module", [Dropped(nn.RMSNorm(D), 0.0), Dropped(nn.LayerNorm(D), 0.1), FeedForward()])
def test_what_pays_on_small_tensors_too_is_always_fused(module, calls):
    assert fusednorm.accelerate(module).fused
    module(torch.randn(2, 5, D))
    assert calls


@pytest.mark.parametrize("kind", [Embedded, Repeated, Blocks])
def test_sums_larger_than_the_arguments_are_fused(kind, monkeypatch):
    own = kind()
    ours = copy.deepcopy(own)
    assert fusednorm.accelerate(ours).fused
    rows = fused._BARE * fused._LARGE // D
    given = {
        Embedded: torch.randint(10, (1, rows)),
        Repeated: torch.randn(1, rows // 4096, D),
        Blocks: [torch.randn(1, rows, D)],
    }[kind]
    taken = []
    hand_over = fused.hand_over
    monkeypatch.setattr(fused, "hand_over", lambda *args: taken.append(args[0]) or hand_over(*args))
    torch.testing.assert_close(ours(given), own(given))
    assert taken == [ours.norm]


def test_an_example_tests_the_rewritten_code_on_small_inputs(calls):
    ours = Modulated()
    fusednorm.accelerate(ours, example=(torch.randn(2, 3 * D), torch.randn(2, 5, D)))
    assert "later" in calls and "add" in calls


def test_signature_and_name_are_the_methods_own():
    module = Modulated()
    own = inspect.signature(module.forward)
    fusednorm.accelerate(module)
    assert inspect.signature(module.forward) == own
    assert module.forward.__name__ == "forward" and module.forward.__qualname__ == "Modulated.forward"


def test_compiled_it_is_one_graph_for_all_sizes():
    module = Modulated()
    ours = copy.deepcopy(module)
    fusednorm.accelerate(ours)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, backend=count, fullgraph=True, dynamic=True)
    condition = torch.randn(2, 3 * D)
    for x in (torch.randn(2, 5, D), wide()):
        torch.testing.assert_close(compiled(condition, x), module(condition, x))
    assert len(graphs) == 1
