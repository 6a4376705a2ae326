"""Bad input: an error of the right type that names the argument, what was given and what is accepted."""

from __future__ import annotations

import pytest
import torch
from shapes import FUSED, PLAIN

import fusednorm

BOTH = pytest.mark.parametrize("function", PLAIN + FUSED)
RESIDUAL_FORM = pytest.mark.parametrize("function", FUSED)
MODULES = {
    "layer_norm": fusednorm.LayerNorm,
    "rms_norm": fusednorm.RMSNorm,
    "add_layer_norm": fusednorm.AddLayerNorm,
    "add_rms_norm": fusednorm.AddRMSNorm,
}
WIDTH = 6


def call(function: str, x, normalized_shape=(WIDTH,), residual="like_x", **kwargs):
    """The functional form, positional as a user writes it."""
    if function in PLAIN:
        return getattr(fusednorm, function)(x, normalized_shape, **kwargs)
    residual = x if isinstance(residual, str) else residual
    return getattr(fusednorm, function)(x, residual, normalized_shape, **kwargs)


def main_argument(function: str) -> str:
    return "input" if function in PLAIN else "x"


@BOTH
@pytest.mark.parametrize("given", [(5,), (4, 5), (3, 4, WIDTH), (WIDTH, WIDTH)], ids=str)
def test_wrong_trailing_shape_names_normalized_shape(function, given, using):
    with using, pytest.raises(ValueError, match=r"normalized_shape.*4, 6") as error:
        call(function, torch.randn(4, WIDTH), given)
    assert str(given) in str(error.value)


@BOTH
def test_empty_normalized_shape(function, using):
    with using, pytest.raises(ValueError, match=r"normalized_shape.*at least one"):
        call(function, torch.randn(4, WIDTH), ())


@BOTH
def test_normalized_shape_of_another_type(function, using):
    with using, pytest.raises(TypeError, match=r"normalized_shape.*float"):
        call(function, torch.randn(4, WIDTH), 6.0)


@BOTH
def test_zero_dimensional_input(function, using):
    with using, pytest.raises(ValueError, match="normalized_shape"):
        call(function, torch.tensor(1.0), (1,))


@BOTH
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool], ids=str)
def test_dtype_that_is_not_floating_point(function, dtype, using):
    with using, pytest.raises(TypeError, match=rf"{main_argument(function)}.*float32.*{dtype}"):
        call(function, torch.ones(4, WIDTH, dtype=dtype))


@pytest.mark.parametrize("name", ["residual", "weight", "bias", "x_bias", "layer_scale"])
def test_other_argument_of_integer_dtype(name, using):
    given = torch.ones((4, WIDTH) if name == "residual" else (WIDTH,), dtype=torch.int32)
    with using, pytest.raises(TypeError, match=rf"{name}.*float32.*torch\.int32"):
        call("add_layer_norm", torch.randn(4, WIDTH), **{name: given})


@pytest.mark.parametrize("function", PLAIN)
def test_plain_norm_weight_of_integer_dtype(function, using):
    with using, pytest.raises(TypeError, match=r"weight.*float32.*torch\.int64"):
        call(function, torch.randn(4, WIDTH), weight=torch.ones(WIDTH, dtype=torch.int64))


@BOTH
def test_input_that_is_no_tensor(function, using):
    with using, pytest.raises(TypeError, match=rf"{main_argument(function)}.*Tensor.*list"):
        call(function, [[1.0] * WIDTH])


@BOTH
@pytest.mark.parametrize("shape", [(5,), (1,), (1, WIDTH), (WIDTH, WIDTH), ()], ids=str)
def test_weight_of_the_wrong_size(function, shape, using):
    with using, pytest.raises(ValueError, match=r"weight.*\(6,\)") as error:
        call(function, torch.randn(4, WIDTH), weight=torch.ones(shape))
    assert str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize("name", ["bias", "x_bias", "layer_scale"])
def test_other_parameter_of_the_wrong_size(name, using):
    with using, pytest.raises(ValueError, match=rf"{name}.*\(6,\).*\(7,\)"):
        call("add_layer_norm", torch.randn(4, WIDTH), **{name: torch.ones(7)})


def test_plain_bias_of_the_wrong_size(using):
    with using, pytest.raises(ValueError, match=r"bias.*\(6,\).*\(7,\)"):
        call("layer_norm", torch.randn(4, WIDTH), bias=torch.ones(7))


@RESIDUAL_FORM
@pytest.mark.parametrize("shape", [(3, WIDTH), (1, WIDTH), (WIDTH,), (4, 5), (2, 4, WIDTH)], ids=str)
def test_residual_of_another_shape(function, shape, using):
    """Broadcasting would be silent and is refused: a residual stream has one shape."""
    with using, pytest.raises(ValueError, match=r"residual.*\(4, 6\)") as error:
        call(function, torch.randn(4, WIDTH), residual=torch.randn(shape))
    assert str(tuple(shape)) in str(error.value)


@BOTH
def test_weight_on_another_device(function, using):
    with using, pytest.raises(ValueError, match=r"weight.*meta.*cpu"):
        call(function, torch.randn(4, WIDTH), weight=torch.ones(WIDTH, device="meta"))


@RESIDUAL_FORM
@pytest.mark.parametrize("name", ["residual", "x_bias", "layer_scale"])
def test_argument_on_another_device(function, name, using):
    given = torch.ones((4, WIDTH) if name == "residual" else (WIDTH,), device="meta")
    with using, pytest.raises(ValueError, match=rf"{name}.*meta.*cpu"):
        call(function, torch.randn(4, WIDTH), **{name: given})


@RESIDUAL_FORM
@pytest.mark.parametrize("name", ["dropout_p", "drop_path_p"])
@pytest.mark.parametrize("p", [-0.1, 1.0001, 1.5, float("nan"), float("inf")])
def test_probability_out_of_range(function, name, p, using):
    with using, pytest.raises(ValueError, match=rf"{name}.*\[0, 1\].*{p}"):
        call(function, torch.randn(4, WIDTH), **{name: p})


@RESIDUAL_FORM
@pytest.mark.parametrize("name", ["dropout_p", "drop_path_p"])
def test_probability_of_another_type(function, name, using):
    with using, pytest.raises(TypeError, match=rf"{name}.*str"):
        call(function, torch.randn(4, WIDTH), **{name: "0.1"})


@RESIDUAL_FORM
@pytest.mark.parametrize(
    "seed",
    [1.5, "1", True, torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32), torch.tensor([1.0])],
    ids=["float", "str", "bool", "two", "int32", "float_tensor"],
)
def test_seed_of_another_type(function, seed, using):
    with using, pytest.raises(TypeError, match=r"seed.*int.*int64"):
        call(function, torch.randn(4, WIDTH), dropout_p=0.5, seed=seed)


@RESIDUAL_FORM
@pytest.mark.parametrize("given", [torch.int32, torch.bool, "float32"], ids=str)
def test_residual_dtype_that_is_no_float(function, given, using):
    with using, pytest.raises(TypeError, match=r"residual_dtype.*float32"):
        call(function, torch.randn(4, WIDTH), residual_dtype=given)


@BOTH
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensor_is_refused_with_the_remedy(function, layout, using):
    nested = torch.nested.nested_tensor([torch.randn(2, WIDTH), torch.randn(3, WIDTH)], layout=layout)
    with using, pytest.raises(TypeError, match=rf"{main_argument(function)}.*nested.*pad"):
        call(function, nested)


@BOTH
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_tensor_is_refused_with_the_remedy(function, layout, using):
    dense = torch.eye(WIDTH)
    sparse = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()
    with using, pytest.raises(TypeError, match=rf"{main_argument(function)}.*dense"):
        call(function, sparse)


@RESIDUAL_FORM
def test_sparse_residual_is_refused(function, using):
    with using, pytest.raises(TypeError, match=r"residual.*dense"):
        call(function, torch.eye(WIDTH), residual=torch.eye(WIDTH).to_sparse())


@pytest.mark.parametrize("p", [-0.5, 1.5])
def test_dropout_mask_probability_out_of_range(p):
    with pytest.raises(ValueError, match=rf"\bp\b.*\[0, 1\].*{p}"):
        fusednorm.dropout_mask((2, 3), p, 0, "cpu")


def test_dropout_mask_of_negative_size():
    with pytest.raises(ValueError, match=r"shape.*-3"):
        fusednorm.dropout_mask((2, -3), 0.5, 0, "cpu")


def test_dropout_mask_of_a_size_that_is_no_number():
    with pytest.raises(ValueError, match=r"shape.*sizes.*'a'"):
        fusednorm.dropout_mask(("a",), 0.5, 0, "cpu")


def test_normalized_shape_as_text(using):
    with using, pytest.raises(TypeError, match=r"normalized_shape.*ints.*str"):
        fusednorm.layer_norm(torch.randn(4, 64), "64")


@RESIDUAL_FORM
@pytest.mark.parametrize("given", [True, torch.ones(WIDTH)], ids=["bool", "tensor"])
def test_module_with_a_layer_scale_that_is_no_number(function, given):
    with pytest.raises(TypeError, match=rf"layer_scale.*number.*{type(given).__name__}.*copy"):
        MODULES[function](WIDTH, layer_scale=given)


@RESIDUAL_FORM
def test_module_with_an_x_bias_that_is_a_tensor(function):
    with pytest.raises(TypeError, match=r"x_bias.*True or False.*Parameter.*copy"):
        MODULES[function](WIDTH, x_bias=torch.nn.Parameter(torch.ones(WIDTH)))


@BOTH
def test_module_given_another_width(function, using):
    module = MODULES[function](WIDTH)
    with using, pytest.raises(ValueError, match=r"normalized_shape.*\(6,\).*\(4, 5\)"):
        module(torch.randn(4, 5))


@BOTH
def test_module_given_integers(function, using):
    with using, pytest.raises(TypeError, match=rf"{main_argument(function)}.*float32.*torch\.int64"):
        MODULES[function](WIDTH)(torch.ones(4, WIDTH, dtype=torch.int64))


@RESIDUAL_FORM
def test_module_given_a_residual_of_another_shape(function, using):
    with using, pytest.raises(ValueError, match=r"residual.*\(4, 6\).*\(1, 6\)"):
        MODULES[function](WIDTH)(torch.randn(4, WIDTH), torch.randn(1, WIDTH))


@RESIDUAL_FORM
@pytest.mark.parametrize("name", ["dropout_p", "drop_path_p"])
def test_module_with_probability_out_of_range(function, name):
    """Refused when the module is built, not at its first training step."""
    with pytest.raises(ValueError, match=rf"{name}.*\[0, 1\].*1\.5"):
        MODULES[function](WIDTH, **{name: 1.5})


def test_module_moved_to_another_device_than_its_input():
    with pytest.raises(ValueError, match=r"weight.*meta.*cpu"):
        fusednorm.AddLayerNorm(WIDTH, device="meta")(torch.randn(4, WIDTH), torch.randn(4, WIDTH))


@RESIDUAL_FORM
@pytest.mark.parametrize("shape", [WIDTH, (WIDTH,), [WIDTH]], ids=str)
def test_the_order_of_torchs_arguments(function, shape, using):
    """`F.layer_norm(x, shape, weight)` with another name: the second argument is the residual here."""
    with using, pytest.raises(TypeError, match=r"residual.*order.*\(x, residual, normalized_shape, weight\).*None"):
        getattr(fusednorm, function)(torch.randn(4, WIDTH), shape, torch.ones(WIDTH))


@BOTH
@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (torch.ones(WIDTH).numpy(), r"torch\.from_numpy\(weight\)"),
        (0.5, r"torch\.full\(shape, 0\.5\)"),
        ([1.0] * WIDTH, r"torch\.tensor\(weight\)"),
    ],
    ids=["array", "number", "list"],
)
def test_what_is_no_tensor_is_refused_with_what_makes_one(function, given, remedy, using):
    with using, pytest.raises(TypeError, match=rf"weight.*{type(given).__name__}.*{remedy}"):
        call(function, torch.randn(4, WIDTH), weight=given)


@BOTH
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensor_beside_a_shape_that_is_a_number(function, layout, using):
    nested = torch.nested.nested_tensor([torch.randn(2, WIDTH), torch.randn(3, WIDTH)], layout=layout)
    with using, pytest.raises(TypeError, match=rf"{main_argument(function)}.*nested.*pad"):
        call(function, nested, WIDTH)
