"""docs/fused-layer-norm.md: its kernels against float64, its pictures and tables against what it computes.

tests/integration/test_readme.py runs the page itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_within_budget

import fusednorm
from docs.figures import fused_layer_norm as figures
from docs.figures import page as pages

pytest.importorskip("triton", reason="the page is about Triton's kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((37, 100), (2, 1500), (60, 33))
RESULTS = ("normed", "z", "dx", "dresidual", "dx_bias", "dweight", "dbias")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The page's program, after it ran."""
    return pages.load(figures.PAGE, tmp_path_factory.mktemp("page"))


def results_of(function, leaves, cotangents, p, seed):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = function(*leaves, p, seed)
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return dict(zip(RESULTS, (*outputs, *gradients), strict=True))


@pytest.mark.parametrize("p", [0.1, 0.6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_kernels_are_as_exact_as_eager(program, dtype, shape, p):
    leaves, cotangents = program.example(*shape, dtype)
    seed = torch.tensor([-5], device=DEVICE)
    ours = results_of(program.FusedAddLayerNorm.apply, leaves, cotangents, p, seed)
    eager = results_of(program.with_mask, leaves, cotangents, p, seed)
    wide = [leaf.double() for leaf in leaves], [c.double() for c in cotangents]
    exact = results_of(program.with_mask, *wide, p, seed)
    assert_within_budget(ours, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_forward_is_as_exact_as_eager(program, dtype):
    (x, _, _, weight, bias), _ = program.example(37, 100, dtype)
    ours = program.forward(x, weight, bias)[0]
    exact = F.layer_norm(x.double(), (100,), weight.double(), bias.double())
    assert_within_budget(ours, F.layer_norm(x, (100,), weight, bias), exact)


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 3])
def test_mask_is_the_packages(program, seed):
    x, zero = torch.ones(33, 101, device=DEVICE), torch.zeros(33, 101, device=DEVICE)
    vector = torch.ones(101, device=DEVICE)
    _, z = program.FusedAddLayerNorm.apply(
        x, zero, 0 * vector, vector, vector, 0.7, torch.tensor([seed], device=DEVICE)
    )
    assert torch.equal(z != 0, fusednorm.dropout_mask(x.shape, 0.7, seed, DEVICE))


def test_backward_repeats_bit_for_bit(program):
    leaves, cotangents = program.example(50, 64)
    seed = torch.tensor([3], device=DEVICE)
    first, second = (results_of(program.FusedAddLayerNorm.apply, leaves, cotangents, 0.1, seed) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)


COMPILED = """
import importlib.util
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
spec = importlib.util.spec_from_file_location("kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
types = {"seed_ptr": "*i64", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "partials_ptr": "*fp32", "sums_ptr": "*fp32"}
types |= {"M": "i32", "N": "i32", "P": "i32", "eps": "fp32", "threshold": "i64", "scale": "fp32", "BLOCK": "constexpr"}
for name in ("forward_kernel", "add_partials", "fused_forward", "fused_backward"):
    kernel = getattr(kernels, name)
    signature = {n: types.get(n, "*bf16") for n in kernel.arg_names}
    for arch in (80, 90):
        source = ASTSource(kernel, signature, {"BLOCK": 1024})
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32))
        assert made.asm["cubin"], name
        print(name, arch)
"""


def test_kernels_compile_for_gpus(tmp_path):
    """The interpreter takes more than the compiler does."""
    kernels = [text for _, text in pages.blocks(figures.PAGE, "python") if "@triton.jit" in text]
    definitions = [text.split("\n\n\nP = 4\n")[0] for text in kernels]
    (tmp_path / "kernels.py").write_text("from torch import Tensor\nimport torch\n" + "\n\n".join(definitions))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", COMPILED, str(tmp_path / "kernels.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) == 2 * 4


def test_tables_follow_the_program_and_the_raw_data(program):
    """After a change: python docs/figures/fused_layer_norm.py --draw"""
    text = figures.PAGE.read_text(encoding="utf-8")
    assert text == figures.with_tables(text, program)


def test_bytes_of_a_bare_sum_are_those_of_the_byte_model(program):
    cases = figures.measured_on_a_cpu()["cases"]
    (case,) = (c for c in cases if c["name"] == f"{figures.ADD}/both/float32/2048x4096")
    floor = (sum(map(sum, program.FLOOR.values())) - program.T) / (program.M * program.N)  # of an element
    assert floor * 2048 * 4096 == pytest.approx(case["bytes"], rel=0.01)


def test_time_follows_bytes_without_dropout(program):
    """The page says so."""
    time = figures.groups_by_key(figures.measured_on_a_cpu())[figures.ADD, "both", "float32"].mean
    assert time == pytest.approx(figures.bytes_ratios(program)[figures.ADD], rel=0.2)


@pytest.fixture(scope="module")
def drawn(program, tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("images")
    figures.draw(program, folder)
    return folder


def numbers(path):
    from PIL import Image

    with Image.open(path) as image:
        return json.loads(image.text["Description"])


@pytest.mark.parametrize("name", ["passes", "partial-sums"])
def test_pictures_follow_the_program(drawn, name):
    assert numbers(drawn / f"{name}.png") == numbers(figures.IMAGES / f"{name}.png")


def test_errors_drawn_are_those_of_the_program(drawn):
    """Sums in another order, as another processor takes them, round otherwise: the same to a factor of three."""
    now, kept = (numbers(folder / "variance-error.png") for folder in (drawn, figures.IMAGES))
    assert now.keys() == kept.keys() and now["offset"] == kept["offset"]
    for name in ("two_passes", "difference"):
        assert all(a < 3 * b and b < 3 * a for a, b in zip(now[name], kept[name], strict=True)), name
