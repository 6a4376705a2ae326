"""tools/count_calls.py counts the package's own Python frames, and nothing else."""

from __future__ import annotations

import torch

from fusednorm import _checks
from tools import count_calls


def test_calls_files_and_returns_are_counted():
    def call() -> None:
        torch.ones(2).sum()  # nothing of the package
        _checks.check_flag("a", True)
        _checks.check_flag("b", False)

    assert count_calls.count(call) == count_calls.Count(calls=2, files=1, returns=0)
    assert count_calls.count(lambda: None) == count_calls.Count(0, 0, 0)


def test_a_file_entered_again_is_a_return():
    from fusednorm import _dtypes

    def call() -> None:
        _checks.check_flag("a", True)
        _dtypes.compute_dtype(torch.float32)
        _checks.check_flag("b", False)

    assert count_calls.count(call) == count_calls.Count(calls=3, files=2, returns=1)


def test_the_table_has_each_call(capsys):
    assert count_calls.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(int(line.split("|")[2]) > 10 for line in lines[2:])
