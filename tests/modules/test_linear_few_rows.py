"""Linear layers of few rows without gradients, which our own product serves, and what leaves them to torch."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import fusednorm
from fusednorm.autograd import linear as module
from fusednorm.dispatch import rules
from tests.modules.test_linear import error, measured_faster, pytestmark

__all__ = ["measured_faster", "pytestmark"]  # which pytest finds by name


def ours(call) -> bool:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        call()
    return any(event.name == "fusednorm_cpu::few_rows" for event in profiled.events())


@pytest.mark.parametrize(
    ("dtype", "elements", "most"),
    [
        (torch.float32, 16383, 0),
        (torch.float32, 16384, 3),
        (torch.float32, 196607, 3),
        (torch.float32, 196608, 4),
        (torch.float32, 1 << 30, 4),
        (torch.bfloat16, 16383, 0),
        (torch.bfloat16, 1 << 30, 2),
        (torch.float16, 16384, 8),
        (torch.float16, (1 << 24) - 1, 8),
        (torch.float16, 1 << 24, 0),
        (torch.float64, 1 << 20, 0),
    ],
)
def test_where_few_rows_were_measured_faster(dtype, elements, most) -> None:
    found = [rows for rows in range(12) if rules.few_rows_are_faster(rows, elements, dtype)]
    assert found == list(range(1, most + 1))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 8)], ids=str)
def test_few_rows_without_gradients_are_ours(dtype, most) -> None:
    weight, bias = torch.randn(384, 512).to(dtype), torch.randn(384).to(dtype)
    for rows in (1, 2, most, most + 1):
        x = torch.randn(rows, 1, 512).to(dtype)
        for b in (bias, None):
            assert ours(lambda x=x, b=b: module.linear(x, weight, b)) == (rows <= most)
            exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
            assert error(module.linear(x, weight, b), exact) <= 2 * error(F.linear(x, weight, b), exact)


@pytest.mark.parametrize(
    "without", ["gradients", "autocast", "provider", "vmap", "small", "strided", "transposed", "bias", "dtype", "none"]
)
def test_few_rows_that_stay_torchs(without: str) -> None:
    x, weight, bias = torch.randn(2, 512), torch.randn(384, 512), torch.randn(384)
    assert ours(lambda: module.linear(x, weight, bias))
    if without == "gradients":
        weight.requires_grad_()
        assert not ours(lambda: module.linear(x, weight, bias))
        with torch.no_grad():
            assert ours(lambda: module.linear(x, weight, bias))
    elif without == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert not ours(lambda: module.linear(x, weight, bias))
    elif without == "provider":
        with fusednorm.use_provider("torch"):
            assert not ours(lambda: module.linear(x, weight, bias))
    elif without == "vmap":
        assert not ours(lambda: torch.vmap(module.linear, in_dims=(0, None, None))(x, weight, bias))
    else:
        given = {
            "small": (x[:, :64].contiguous(), weight[:100, :64].contiguous(), bias[:100]),
            "strided": (torch.randn(2, 1024)[:, ::2], weight, bias),
            "transposed": (x, torch.randn(512, 384).t(), bias),
            "bias": (x, weight, torch.randn(1).expand(384)),
            "dtype": (x.double(), weight.double(), bias.double()),
            "none": (x[:0], weight, bias),
        }[without]
        assert not ours(lambda: module.linear(*given))
        torch.testing.assert_close(module.linear(*given), F.linear(*given))


FRESH = """
import torch, fusednorm
from fusednorm.dispatch import rules
{before}
m = fusednorm.TransformerEncoderLayer(512, 8, 1024, batch_first=True).eval()
x = torch.randn(1, 2, 512)
with torch.no_grad():
    {call}
"""


@pytest.mark.parametrize(
    ("before", "call"),
    [
        ("", "traced = torch.jit.trace(m, x, check_trace=False); torch.testing.assert_close(traced(x), m(x))"),
        ('torch.backends.mkldnn.matmul.fp32_precision = "bf16"', "m(x); m(torch.randn(8, 64, 512))"),
    ],
    ids=["trace", "precision"],
)
def test_the_first_call_of_a_process(before: str, call: str) -> None:
    code = FRESH.format(before=before, call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_operands_elsewhere_are_torchs() -> None:
    x, weight, bias = torch.randn(2, 512), torch.randn(384, 512), torch.randn(384)
    zeros = torch._efficientzerotensor((2, 512))
    for given in ((x, weight.to("meta"), bias), (x, weight, bias.to("meta")), (zeros, weight, bias)):
        outcomes = []
        for function in (F.linear, module.linear):
            try:
                found = function(*given)
                outcomes.append((found.shape, found.device.type))
            except (RuntimeError, NotImplementedError) as fault:
                outcomes.append(str(fault).splitlines()[0])
        assert outcomes[0] == outcomes[1]
