"""Forward and every gradient of the norms against the float64 oracle, within the error budget."""

from __future__ import annotations

import pytest
import torch
from derivatives import gradients_of
from oracle import DTYPES, Call, check
from shapes import COTANGENTS, EMPTY_SHAPES, FUSED, PLAIN, SHAPES, Shape, affine, inputs, random_leaves

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
SEED = {"seed": 0x1234_5678_9ABC_DEF0}

ODD = Shape("odd_width_masked_lanes", (9, 37))
BATCHED = Shape("batched_3d", (3, 5, 40))


@pytest.mark.certifies("forward", "backward")
@DTYPE
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("function", PLAIN + FUSED)
def test_norm_at_every_shape(function, shape, dtype, using, device, interpreted, generator):
    """Gradients of the parameters over zero rows are zeros, not uninitialized memory."""
    shape = shape.narrowed(interpreted)
    leaves = random_leaves(shape, inputs(function), dtype, device, generator)
    with using:
        check(Call(function, shape.normalized_ndim, shape.view), leaves, generator)


@DTYPE
@pytest.mark.parametrize(
    ("function", "names"),
    [(f, names) for f in PLAIN + FUSED for names in [(), *([] if "rms" in f else [("weight",), ("bias",)])]],
    ids=lambda value: value if isinstance(value, str) else "_".join(value) or "no_affine",
)
def test_norm_without_weight_or_bias(function, names, dtype, using, device, generator):
    names = ("x", "residual", *names) if function in FUSED else ("x", *names)
    with using:
        check(Call(function), random_leaves(ODD, names, dtype, device, generator), generator)


EPILOGUES: dict[str, tuple[tuple[str, ...], dict]] = {
    "x_bias": (("x_bias",), {}),
    "layer_scale": (("layer_scale",), {}),
    "x_bias_layer_scale": (("x_bias", "layer_scale"), {}),
    "dropout": ((), {"dropout_p": 0.3, **SEED}),
    "drop_path": ((), {"drop_path_p": 0.4, **SEED}),
    "dropout_drop_path": ((), {"dropout_p": 0.1, "drop_path_p": 0.25, **SEED}),
    "everything": (("x_bias", "layer_scale"), {"dropout_p": 0.2, "drop_path_p": 0.3, "seed": 2**63 + 5}),
    "zero_centered": ((), {"zero_centered_weight": True}),
    "eps": ((), {"eps": 0.1}),
    "memory_efficient": ((), {"memory_efficient": True}),
    "memory_efficient_everything": (
        ("x_bias", "layer_scale"),
        {"dropout_p": 0.2, "drop_path_p": 0.3, "memory_efficient": True, "zero_centered_weight": True, **SEED},
    ),
}


@pytest.mark.certifies("forward", "backward")
@DTYPE
@pytest.mark.parametrize(
    ("shape", "with_residual"), [(BATCHED, True), (ODD, False)], ids=["batched-residual", "odd-no_residual"]
)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("function", FUSED)
def test_add_norm_epilogue(function, epilogue, shape, with_residual, dtype, using, device, generator):
    names, options = EPILOGUES[epilogue]
    stream = ("x", "residual") if with_residual else ("x",)
    leaves = random_leaves(shape, (*stream, *affine(function), *names), dtype, device, generator)
    if options.get("zero_centered_weight"):
        leaves["weight"] = leaves["weight"] - 1
    with using:
        check(Call(function, options=options), leaves, generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["keep_z", "keep_normed"])
@pytest.mark.parametrize("case", ["option", "option_widens_residual", "from_residual", "no_residual", "narrowed"])
@pytest.mark.parametrize("function", FUSED)
def test_add_norm_residual_dtype(function, case, memory_efficient, dtype, using, device, generator):
    """A float32 stream beside low-precision activations, given by the option or by the residual itself."""
    wide, options = torch.float32, {"memory_efficient": memory_efficient, "dropout_p": 0.1, **SEED}
    names = inputs(function)
    dtypes = {"residual": wide}
    if case == "narrowed":
        options["residual_dtype"], dtypes = torch.bfloat16, {"residual": torch.bfloat16}
    elif case == "option_widens_residual":
        options["residual_dtype"], dtypes = wide, {"residual": dtype}
    elif case != "from_residual":
        options["residual_dtype"] = wide
    if case == "no_residual":
        names = tuple(name for name in names if name != "residual")
    leaves = random_leaves(BATCHED, names, dtype, device, generator, dtypes)
    with using:
        check(Call(function, options=options), leaves, generator)


MIXED_BY_TORCH = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=["bf16_fp32", "fp16_fp32", "fp32_bf16", "fp32_fp64"],
)
@pytest.mark.parametrize(
    ("function", "options"),
    [
        *(pytest.param(f, {}, marks=MIXED_BY_TORCH) for f in PLAIN),
        *((f, {"memory_efficient": kept}) for f in FUSED for kept in (False, True)),
    ],
    ids=str,
)
def test_norm_mixed_parameter_dtype(function, options, dtype, parameter_dtype, using, device, generator):
    """Also where torch's own CPU kernel refuses the mixture."""
    dtypes = dict.fromkeys(("weight", "bias", "layer_scale"), parameter_dtype)
    names = (*inputs(function), "layer_scale") if function in FUSED else inputs(function)
    leaves = random_leaves(ODD, names, dtype, device, generator, dtypes)
    with using:
        check(Call(function, options=options), leaves, generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["keep_z", "keep_normed"])
@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["residual_out_unused", "normed_unused"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("function", FUSED)
def test_add_norm_outputs_used(function, with_residual, used, memory_efficient, dtype, using, device, generator):
    names = inputs(function) if with_residual else ("x", *affine(function))
    leaves = random_leaves(ODD, (*names, "x_bias"), dtype, device, generator)
    with using:
        check(Call(function, options={"memory_efficient": memory_efficient}), leaves, generator, used)


@DTYPE
@pytest.mark.parametrize("function", FUSED)
def test_add_norm_of_a_tensor_and_itself(function, dtype, using, device, generator):
    leaves = random_leaves(ODD, ("x", *affine(function)), dtype, device, generator)
    with using:
        check(Call(function, shared=True), leaves, generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if "transposed" in s.name or "step" in s.name or "lead" in s.name], ids=str
)
@pytest.mark.parametrize("function", FUSED)
def test_add_norm_epilogue_on_strided_input(function, shape, dtype, using, provider, device, generator):
    """Masks are by logical position, whatever the strides."""
    if provider == "triton" and shape.normalized_ndim > 1:
        pytest.skip("refused: the kernels count a mask's columns along the whole normalized row")
    options = {"dropout_p": 0.5, "seed": -3}
    if len(shape.shape()) > shape.normalized_ndim:
        options["drop_path_p"] = 0.5
    leaves = random_leaves(shape, (*inputs(function), "x_bias", "layer_scale"), dtype, device, generator)
    with using:
        check(Call(function, shape.normalized_ndim, shape.view, options=options), leaves, generator)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "step_2"])
@pytest.mark.parametrize("function", PLAIN + FUSED)
def test_norm_with_strided_cotangents(function, layout, using, device, generator):
    leaves = random_leaves(Shape("", (6, 24)), inputs(function), torch.float32, device, generator)
    with using:
        check(Call(function), leaves, generator, lay=COTANGENTS[layout])


@pytest.mark.parametrize("function", FUSED)
def test_add_norm_frozen_inputs_get_no_gradient(function, using, device, generator):
    """Every subset of one leaf that requires a gradient gives the same gradient as all together."""
    names = (*inputs(function), "x_bias", "layer_scale")
    leaves = random_leaves(ODD, names, torch.float64, device, generator)
    cotangents = [torch.randn(ODD.base, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]
    run = Call(function, options={"dropout_p": 0.2, "seed": 11}).ours
    with using:
        expected = gradients_of(names, run, leaves, cotangents)
        for name in names:
            (gradient,) = gradients_of([name], run, leaves, cotangents).values()
            # float64, whose rounding is 1e-16: alone or with others, a gradient may be summed in another order
            torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12, msg=name)
