"""Norms with a gate, a scale and a shift for each sample (AdaLN-Zero), against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, MODULATION, Call, check
from shapes import FUSED, Shape, affine, random_leaves
from torch import Tensor

import fusednorm

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
FUNCTION = pytest.mark.parametrize("function", FUSED)
TOKENS = Shape("tokens", (3, 5, 40))
SEED = {"seed": 0x1234_5678_9ABC_DEF0}


def stream(shape: Shape, function: str, *names: str) -> tuple[str, ...]:
    return ("x", "residual", *affine(function), *names)


FORMS = {  # how (samples, columns) is passed
    "vectors": lambda leaf: leaf,
    "rows": lambda leaf: leaf[:, None],
    "chunks_of_one_projection": lambda leaf: torch.stack((leaf, leaf + 1, leaf + 2), 1).flatten(1)[:, : leaf.shape[-1]],
}


@pytest.mark.certifies("forward", "backward", op="modulation")
@DTYPE
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [("gate",), ("scale",), ("shift",), ("scale", "shift"), MODULATION], ids="_".join)
@FUNCTION
def test_modulation(function, names, form, dtype, using, device, generator):
    leaves = random_leaves(TOKENS, ("x", "residual", *names), dtype, device, generator)
    with using:
        check(Call(function, modulation=FORMS[form]), leaves, generator)


EPILOGUES = {
    "weight_and_bias": (("weight", "bias"), {}),
    "zero_centered": (("weight", "bias"), {"zero_centered_weight": True}),
    "layer_scale": (("layer_scale",), {}),
    "x_bias": (("x_bias",), {}),
    "dropout": ((), {"dropout_p": 0.3, **SEED}),
    "everything": (
        ("weight", "bias", "x_bias", "layer_scale"),
        {"dropout_p": 0.2, "drop_path_p": 0.4, "zero_centered_weight": True, "memory_efficient": True, **SEED},
    ),
}


@DTYPE
@pytest.mark.parametrize("epilogue", EPILOGUES)
@FUNCTION
def test_modulation_beside_what_all_samples_share(function, epilogue, dtype, using, device, generator):
    names, options = EPILOGUES[epilogue]
    names = tuple(name for name in names if name != "bias" or "bias" in affine(function))
    leaves = random_leaves(TOKENS, ("x", "residual", *names, *MODULATION), dtype, device, generator)
    with using:
        check(Call(function, options=options), leaves, generator)


@pytest.mark.parametrize("names", [("scale", "shift"), MODULATION], ids="_".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@FUNCTION
def test_float32_modulation_of_16_bit_rows(function, dtype, names, using, device, generator):
    dtypes = dict.fromkeys(MODULATION, torch.float32)
    leaves = random_leaves(TOKENS, ("x", "residual", *names), dtype, device, generator, dtypes)
    with using:
        check(Call(function), leaves, generator)


def test_vectors_and_rows_beside_one_another(using, device):
    """One modulation is (B, N), another (B, 1, N)."""
    x, bias = torch.randn(3, 5, 8, device=device), torch.randn(8, device=device)
    scale, shift, gate = torch.randn(3, 3, 8, device=device)
    with using:
        for how in ({"scale": scale[:, None], "shift": shift}, {"scale": scale, "shift": shift[:, None]}):
            normed, _ = fusednorm.add_layer_norm(x, None, 8, None, bias, gate=gate[:, None], **how)
            expected, _ = fusednorm.add_layer_norm(x, None, 8, None, bias, gate=gate, scale=scale, shift=shift)
            torch.testing.assert_close(normed, expected)


SHAPES = [
    Shape("one_row_a_sample", (7, 24)),
    Shape("one_sample", (1, 9, 24)),
    Shape("images", (2, 3, 4, 16)),
    Shape("many_samples", (70, 3, 8)),
    Shape("samples_of_many_rows", (2, 261, 40), interpreted=(2, 67, 40)),
    Shape("odd_width", (2, 3, 37)),
    Shape("wide", (2, 3, 4099)),
    Shape("wider_than_registers", (2, 2, 33_000), interpreted=(2, 2, 8_201)),
    Shape("normalized_2d", (3, 2, 4, 6), normalized_ndim=2),
    Shape("transposed", (5, 3, 24), lambda leaf: leaf.transpose(0, 1)),
    Shape("no_samples", (0, 3, 16)),
    Shape("no_rows", (2, 0, 16)),
    Shape("no_columns", (2, 3, 0)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@FUNCTION
def test_modulation_at_every_shape(function, shape, dtype, using, device, interpreted, generator):
    """Of no rows the gradients are zeros."""
    shape = shape.narrowed(interpreted)
    leaves = random_leaves(shape, ("x", "residual", *MODULATION), dtype, device, generator)
    with using:
        check(Call(function, shape.normalized_ndim, shape.view), leaves, generator)


@FUNCTION
def test_without_a_residual_the_rows_themselves_are_the_stream(function, using, device, generator):
    leaves = random_leaves(TOKENS, ("x", "scale", "shift"), torch.float32, device, generator)
    with using:
        check(Call(function), leaves, generator)
        _, z = getattr(fusednorm, function)(leaves["x"], None, 40, scale=leaves["scale"], shift=leaves["shift"])
    assert z is leaves["x"]


@pytest.mark.parametrize("names", [("gate",), ("scale",), ("shift",), MODULATION], ids="_".join)
@FUNCTION
def test_one_vector_for_all_samples_is_a_parameter(function, names, using, device):
    """(1, 1, N) broadcasts as it does in eager code; its gradient is the sum over all samples."""
    x, residual = torch.randn(2, 3, 5, 8, device=device)
    given = {name: torch.randn(1, 1, 8, device=device, requires_grad=True) for name in names}
    of_each = {name: t.detach().expand(3, 1, 8).clone().requires_grad_() for name, t in given.items()}
    with using:
        outputs = [getattr(fusednorm, function)(x, residual, 8, **passed) for passed in (given, of_each)]
        for normed, z in outputs:
            (normed * torch.arange(8.0, device=device) + z).square().sum().backward()
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs)
    for name in names:
        torch.testing.assert_close(given[name].grad, of_each[name].grad.sum(0, keepdim=True))


def test_a_gate_of_zero_and_not_a_number(using, device):
    """Zero times a NaN of the branch is a NaN, as in eager code. What dropout drops is zero before the gate."""
    x, residual = torch.randn(2, 2, 4, 8, device=device)
    x[0, 0, 0] = torch.nan
    gate = torch.zeros(2, 8, device=device)
    with using:
        normed, z = fusednorm.add_layer_norm(x, residual, 8, gate=gate)
        dropped, _ = fusednorm.add_layer_norm(x, residual, 8, gate=gate, dropout_p=1.0)
    assert normed[0, 0].isnan().all() and normed[0, 1:].isfinite().all() and normed[1].isfinite().all()
    assert torch.equal(z[1], residual[1])
    torch.testing.assert_close(dropped, F.layer_norm(residual, (8,)))


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads, using, device):
    before = torch.get_num_threads()
    x, residual = torch.randn(2, 5, 67, 72, device=device)
    given = {name: torch.randn(5, 72, device=device, requires_grad=True) for name in MODULATION}

    def run() -> tuple[Tensor, ...]:
        outputs = fusednorm.add_layer_norm(x, residual, 72, torch.ones(72, device=device), **given)
        return (*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), list(given.values())))

    try:
        with using:
            torch.set_num_threads(1)
            one = run()
            torch.set_num_threads(threads)
            assert all(map(torch.equal, one, run()))
    finally:
        torch.set_num_threads(before)


@FUNCTION
def test_second_derivatives(function, using, device):
    leaves = [torch.randn(2, 3, 6, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    leaves += [torch.randn(2, 6, dtype=torch.float64, device=device, requires_grad=True) for _ in MODULATION]

    def call(x, residual, gate, scale, shift):
        return getattr(fusednorm, function)(x, residual, 6, gate=gate, scale=scale, shift=shift)

    with using:
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


REFUSED = {
    "a_vector_for_all": ("gate", torch.ones(8), r"gate: expected shape \(2, 8\) or \(2, 1, 8\).*\(8,\).*layer_scale"),
    "a_number": ("scale", 0.5, r"scale: expected a torch.Tensor, got float"),
    "other_samples": ("shift", torch.ones(3, 8), r"shift.*\(3, 8\).*pass bias"),
    "other_columns": ("scale", torch.ones(2, 7), r"scale.*\(2, 7\).*zero_centered_weight=True"),
    "of_each_token": ("gate", torch.ones(2, 5, 8), r"gate.*\(2, 5, 8\).*flatten x's leading dimensions"),
    "of_integers": ("gate", torch.ones(2, 8, dtype=torch.int32), r"gate.*float32.*torch\.int32"),
    "elsewhere": ("shift", torch.ones(2, 8, device="meta"), r"shift.*meta"),
}


@pytest.mark.parametrize("case", REFUSED)
@FUNCTION
def test_errors_name_argument_value_and_remedy(function, case):
    name, value, said = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=said):
        getattr(fusednorm, function)(torch.ones(2, 5, 8), None, 8, **{name: value})


def test_rows_without_samples_are_refused():
    with pytest.raises(ValueError, match=r"gate.*x of shape \(8,\) has no dimension of samples; pass layer_scale"):
        fusednorm.add_layer_norm(torch.ones(8), None, 8, gate=torch.ones(1, 8))


def test_module_computes_what_diffusers_writes(device):
    """`norm(h) * (1 + scale[:, None]) + shift[:, None]` of ``h = h + gate.unsqueeze(1) * branch``."""
    norm = fusednorm.AdaptiveLayerNorm(16).to(device)
    assert not list(norm.parameters()) and norm.eps == 1e-6
    h, branch = torch.randn(2, 3, 7, 16, device=device)
    gate, scale, shift = torch.randn(3, 48, device=device).chunk(3, dim=1)
    normed, stream = norm(branch, h, gate=gate, scale=scale, shift=shift)
    expected = h + gate.unsqueeze(1) * branch
    torch.testing.assert_close(stream, expected)
    expected = F.layer_norm(expected, (16,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(normed, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_agree_with_eager_ones(dynamic):
    norm = fusednorm.AdaptiveLayerNorm(16)

    def step(branch, h, conditioning):
        gate, scale, shift = conditioning.chunk(3, dim=1)
        normed, stream = norm(branch, h, gate=gate, scale=scale, shift=shift)
        return normed.tanh().sum() + stream.square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for samples in (2, 3):
        inputs = [torch.randn(samples, 5, 16, requires_grad=True) for _ in range(2)]
        inputs.append(torch.randn(samples, 48, requires_grad=True))
        found = [torch.autograd.grad(run(*inputs), inputs) for run in (compiled, step)]
        torch.testing.assert_close(*found)
