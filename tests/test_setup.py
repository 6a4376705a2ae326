"""What setup.py compiles the CUDA kernels for."""

from __future__ import annotations

import emulated
import pytest


@pytest.fixture
def architectures(tmp_path, monkeypatch):
    """`setup.cuda_architectures()` with an environment variable, and a machine whose nvidia-smi says something."""

    def ask(named=None, said=None):
        monkeypatch.setenv("PATH", str(tmp_path))
        if said is not None:
            program = tmp_path / "nvidia-smi"
            program.write_text(f"#!/bin/sh\nprintf '{said}'\n")
            program.chmod(0o755)
        if named is None:
            monkeypatch.delenv("FUSEDNORM_CUDA_ARCHITECTURES", raising=False)
        else:
            monkeypatch.setenv("FUSEDNORM_CUDA_ARCHITECTURES", named)
        return emulated.setup_script().cuda_architectures()

    return ask


def test_every_supported_generation_unless_named(architectures):
    assert architectures() == ["80", "90", "100"]
    assert architectures("100 90a 80") == ["80", "90a", "100"]


def test_native_is_what_the_machine_has(architectures):
    assert architectures("native", "9.0\\n") == ["90"]
    assert architectures("native", "10.0\\n9.0\\n9.0\\n") == ["90", "100"]


@pytest.mark.parametrize(
    ("named", "said", "message"),
    [
        ("native", None, "nvidia-smi does not answer"),
        ("native", "[N/A]\\n", "expected .native."),
        ("hopper", None, "got .'hopper'."),
        ("", None, "got .."),
    ],
)
def test_what_names_no_architecture_is_refused(architectures, named, said, message):
    with pytest.raises(RuntimeError, match=message):
        architectures(named, said)
