"""What setup.py compiles the CUDA kernels for."""

from __future__ import annotations

import emulated
import pytest

NEWEST = "50 52 75 80 86 87 88 89 90 100 103 110 120 121"  # of nvcc 13


@pytest.fixture
def architectures(tmp_path, monkeypatch):
    """`setup.cuda_architectures()` with an environment variable, beside a nvidia-smi and a nvcc that say something."""

    def ask(named=None, said=None, known=NEWEST):
        monkeypatch.setenv("PATH", str(tmp_path))
        codes = "".join(f"sm_{name}\\n" for name in known.split())
        for name, answer in {"nvidia-smi": said, "nvcc": codes}.items():
            if answer is not None:
                program = tmp_path / name
                program.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
                program.chmod(0o755)
        if named is None:
            monkeypatch.delenv("FUSEDNORM_CUDA_ARCHITECTURES", raising=False)
        else:
            monkeypatch.setenv("FUSEDNORM_CUDA_ARCHITECTURES", named)
        return emulated.setup_script().cuda_architectures([str(tmp_path / "nvcc")])

    return ask


def test_every_supported_generation_unless_named(architectures):
    assert architectures() == ["80", "89", "90a", "100", "120"]
    assert architectures("100 90a 80") == ["80", "90a", "100"]


def test_no_more_than_nvcc_compiles_for_unless_named(architectures):
    """nvcc 12.4 knows neither 100 nor 120."""
    older = "50 52 75 80 86 87 89 90 90a"
    assert architectures(known=older) == ["80", "89", "90a"]
    assert architectures("90a", known=older) == ["90a"]
    with pytest.raises(RuntimeError, match=r"does not compile for 100 120, but for 50 .*; install a newer CUDA \(12.8"):
        architectures("80 100 120", known=older)
    with pytest.raises(RuntimeError, match=r"does not compile for 120, but for 50 "):
        architectures("native", "12.0\\n", known=older)
    with pytest.raises(RuntimeError, match=r"compiles for 35 50, and for none of 80 "):
        architectures(known="35 50")
    with pytest.raises(RuntimeError, match=r"nvcc --list-gpu-code names no GPU"):
        architectures(known="")


def test_native_is_what_the_machine_has(architectures):
    assert architectures("native", "9.0\\n") == ["90a"]
    assert architectures("native", "10.0\\n9.0\\n9.0\\n") == ["90a", "100"]
    assert architectures("native", "7.5\\n8.6\\n") == ["86"]


@pytest.mark.parametrize(
    ("named", "said", "message"),
    [
        ("native", None, "nvidia-smi does not answer"),
        ("native", "[N/A]\\n", "expected .native."),
        ("native", "7.5\\n", "this machine's GPUs, 75, are older than 80"),
        ("75 90", None, "the kernels need 80 or newer, got 75"),
        ("hopper", None, "got .'hopper'."),
        ("", None, "got .."),
    ],
)
def test_what_names_no_architecture_is_refused(architectures, named, said, message):
    with pytest.raises(RuntimeError, match=message):
        architectures(named, said)


@pytest.mark.parametrize(
    ("architectures", "ptx"),
    [("80 89 90 100 120", {"100", "120"}), ("90", {"90"}), ("80 90a", {"90"}), ("80 100", {"80", "100"})],
)
def test_generations_without_code_of_their_own_find_ptx(architectures, ptx):
    flags = emulated.setup_script().code_for(architectures.split())
    found = [flag.removeprefix("arch=compute_") for flag in flags if flag != "-gencode"]
    assert {code.partition(",")[0] for code in found if ",code=compute_" in code} == ptx
    assert [code.partition(",")[0] for code in found if ",code=sm_" in code] == architectures.split()
    assert all(code.partition(",code=")[0] == code.partition("_")[2] for code in found)
