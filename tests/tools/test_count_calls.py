"""tools/count_calls.py counts the package's own Python frames, and nothing else."""

from __future__ import annotations

import torch

from fusednorm import _checks, _dtypes
from tools import count_calls


def test_calls_files_and_returns_are_counted():
    """A return is a file entered again after another."""

    def call() -> None:
        _checks.check_flag("a", True)
        torch.ones(2).sum()  # nothing of the package
        _checks.check_flag("b", False)
        _dtypes.compute_dtype(torch.float32)
        _checks.check_flag("c", True)

    assert count_calls.count(call) == count_calls.Count(calls=4, files=2, returns=1)
    assert count_calls.count(lambda: None) == count_calls.Count(0, 0, 0)


# calls, files, returns: at most half of what the package needed before it chose once for each signature
LIMITS = {"add_layer_norm": (38, 5, 7), "causal attention": (15, 4, 3), "encoder layer": (125, 13, 35)}


def test_a_call_stays_short(capsys):
    assert count_calls.main() == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == len(LIMITS)
    for (name, limits), (said, *counts) in zip(LIMITS.items(), rows, strict=True):
        assert said.startswith(name)
        assert int(counts[0]) > 0 and all(int(count) <= limit for count, limit in zip(counts, limits, strict=True)), (
            said
        )
