"""``fusednorm doctor``: right where all is well, and each kind of fault is found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fusednorm
from fusednorm import dispatch, doctor
from fusednorm.__main__ import main


def outcomes(findings):
    return {finding.name: finding.outcome for finding in findings}


@pytest.fixture
def without_compile(monkeypatch):
    """It takes a dozen seconds."""
    monkeypatch.setattr(doctor, "_compiles", lambda device: doctor.Finding("torch.compile", "ok", ""))


def test_all_is_well_here(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("fusednorm ") and said.rstrip().endswith("All is well.")
    for name in ("torch: layer_norm", "reference: varlen_attention", "torch.compile", "memory"):
        assert any(name in line and line.startswith("ok") for line in said.splitlines())
    ready = [name for name in dispatch.PROVIDERS if dispatch.unavailable_reason(name) is None]
    assert all(f"{name}: add_rms_norm" in said for name in ready)


@pytest.mark.usefixtures("without_compile")
@pytest.mark.parametrize("fault", ["value", "gradient", "nan", "dtype", "shape", "error"])
def test_a_wrong_operator_fails_alone(fault, monkeypatch):
    own = fusednorm.rms_norm

    def wrong(x, *args):
        y = own(x, *args)
        if fault == "error":
            raise RuntimeError("out of luck\nand more")
        return {
            "value": lambda: y * 1.1,
            "gradient": lambda: y.detach() + 0.0 * y,
            "nan": lambda: y.masked_fill(torch.eye(*y.shape, dtype=torch.bool), torch.nan),
            "dtype": lambda: y.double(),
            "shape": lambda: y[1:],
        }[fault]()

    monkeypatch.setattr(fusednorm, "rms_norm", wrong)
    if fault == "shape":  # the cotangent does not fit: an error, which is a finding too
        monkeypatch.setattr(fusednorm, "rms_norm", lambda x, *args: own(x, *args)[None])
    findings = doctor.doctor("cpu")
    failed = [name for name, outcome in outcomes(findings).items() if outcome == "FAILED"]
    assert failed and all(name.endswith(": rms_norm") for name in failed)
    text = doctor.page(findings, "info")
    assert f"{len(failed)} of {len(findings)} checks failed" in text and "and more" not in text


@pytest.mark.usefixtures("without_compile")
def test_another_dropout_mask_is_found(monkeypatch):
    own = fusednorm.dropout_mask
    monkeypatch.setattr(fusednorm, "dropout_mask", lambda shape, p, seed, device: own(shape, p, seed + 1, device))
    failed = [name for name, outcome in outcomes(doctor.doctor("cpu")).items() if outcome == "FAILED"]
    assert failed and all(name.endswith("dropout's mask") for name in failed)


@pytest.mark.usefixtures("without_compile")
def test_a_layer_that_keeps_more_than_torchs_is_found(monkeypatch):
    class Keeps(fusednorm.TransformerEncoderLayer):
        def forward(self, x):
            return super().forward(x) + (x.repeat(50, 1, 1).exp() * 0).square()[: len(x)]

    monkeypatch.setattr(fusednorm, "TransformerEncoderLayer", Keeps)
    assert outcomes(doctor.doctor("cpu"))["memory"] == "FAILED"


def test_without_a_compiler_it_says_so(tmp_path):
    code = "import torch; from fusednorm import doctor; print(doctor._compiles(torch.device('cpu')))"
    environment = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert "left out" in done.stdout and "no C++ compiler" in done.stdout, done.stderr[-2000:]


def test_devices_that_are_not_here_are_named(capsys):
    assert main(["doctor", "--device", "meta"]) == 1
    assert "FAILED" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["doctor", "--device", "gpu"])
    assert "--device: " in capsys.readouterr().err


def test_an_unknown_provider_is_named_by_a_check_and_among_the_variables():
    code = "import sys; from fusednorm import doctor, __main__ as m; doctor.cases = list; sys.exit(m.main(['doctor']))"
    environment = os.environ | {"FUSEDNORM_PROVIDER": "abacus", "CXX": "/no/compiler"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert any(line.startswith("variables  ") and "FUSEDNORM_PROVIDER=abacus" in line for line in lines)
    call = next(line for line in lines if " a call " in line)
    assert call.startswith("FAILED") and "no provider is called 'abacus'" in call


def test_ctrl_c_ends_it_without_a_traceback(monkeypatch, capsys):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_fast_path", stopped)
    monkeypatch.setattr(doctor, "cases", list)
    assert main(["doctor", "--device", "cpu"]) == 130
    assert capsys.readouterr() == ("", "fusednorm: doctor was stopped\n")


def test_it_is_well_without_a_home_a_compiler_and_assertions(tmp_path):
    environment = {"PATH": "/nonexistent", "HOME": "/nonexistent", "FUSEDNORM_CACHE_DIR": "/proc/none"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-O", "-m", "fusednorm", "doctor", "--device", "cpu"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("All is well."), done.stdout + done.stderr
    assert not done.stderr, done.stderr
    assert "variables  FUSEDNORM_CACHE_DIR=/proc/none" in done.stdout
