"""Bad input: an error of the right type that names the argument, what was given and what is accepted."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from shapes import FUSED, PLAIN

import fusednorm

EVERY = PLAIN + FUSED
MODULES = {
    "layer_norm": fusednorm.LayerNorm,
    "rms_norm": fusednorm.RMSNorm,
    "add_layer_norm": fusednorm.AddLayerNorm,
    "add_rms_norm": fusednorm.AddRMSNorm,
}
WIDTH = 6
X, ROW = torch.randn(4, WIDTH), torch.ones(WIDTH)
SIZES = {"residual": (4, WIDTH), "weight": (WIDTH,), "bias": (WIDTH,), "x_bias": (WIDTH,), "layer_scale": (WIDTH,)}


def call(function: str, x=X, normalized_shape=(WIDTH,), **given):
    """The functional form, positional as a user writes it; the residual is x itself where none is given."""
    args = (x, given.pop("residual", x)) if function in FUSED else (x,)
    return getattr(fusednorm, function)(*args, normalized_shape, **given)


def main_argument(function: str) -> str:
    return "input" if function in PLAIN else "x"


def refused(functions, error, said, *shown, **given) -> tuple:
    """A row of the table: the message matches `said`, X being x's name there, and has what is `shown` of the value."""
    return functions, error, said, shown, given


REFUSED = {
    "empty_normalized_shape": refused(EVERY, ValueError, "normalized_shape.*at least one", normalized_shape=()),
    "normalized_shape_of_float": refused(EVERY, TypeError, "normalized_shape.*float", normalized_shape=6.0),
    "normalized_shape_of_text": refused(
        PLAIN[:1], TypeError, "normalized_shape.*ints.*str", x=torch.randn(4, 64), normalized_shape="64"
    ),
    "zero_dimensional_x": refused(EVERY, ValueError, "normalized_shape", x=torch.tensor(1.0), normalized_shape=(1,)),
    "eps_none": refused(PLAIN[:1], TypeError, "eps", x=torch.randn(2, 8), normalized_shape=8, eps=None),
    "x_list": refused(EVERY, TypeError, "X.*Tensor.*list", x=[[1.0] * WIDTH]),
    "plain_weight_of_ints": refused(PLAIN, TypeError, r"weight.*float32.*torch\.int64", weight=ROW.long()),
    "plain_bias_size": refused(PLAIN[:1], ValueError, r"bias.*\(6,\).*\(7,\)", bias=torch.ones(7)),
    "weight_on_meta": refused(EVERY, ValueError, "weight.*meta.*cpu", weight=ROW.to("meta")),
    "weight_array": refused(EVERY, TypeError, r"weight.*ndarray.*torch\.from_numpy\(weight\)", weight=ROW.numpy()),
    "weight_number": refused(EVERY, TypeError, r"weight.*float.*torch\.full\(shape, 0\.5\)", weight=0.5),
    "weight_list": refused(EVERY, TypeError, r"weight.*list.*torch\.tensor\(weight\)", weight=[1.0] * WIDTH),
    "sparse_residual": refused(FUSED, TypeError, "residual.*dense", residual=torch.eye(4, WIDTH).to_sparse()),
}
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors|Sparse")
    for _layout in (torch.sparse_coo, torch.sparse_csr):
        REFUSED[f"x_{_layout}"] = refused(EVERY, TypeError, "X.*dense", x=torch.eye(WIDTH).to_sparse(layout=_layout))
    for _layout, _shape in itertools.product((torch.strided, torch.jagged), ((WIDTH,), WIDTH)):
        _nested = torch.nested.nested_tensor([torch.randn(2, WIDTH), torch.randn(3, WIDTH)], layout=_layout)
        _row = refused(EVERY, TypeError, "X.*nested.*pad", x=_nested, normalized_shape=_shape)
        REFUSED[f"x_nested_{_layout}_{_shape}"] = _row
for _dtype in (torch.int64, torch.int8, torch.bool):
    REFUSED[f"x_{_dtype}"] = refused(EVERY, TypeError, rf"X.*float32.*{_dtype}", x=X.to(_dtype))
for _shape in ((5,), (4, 5), (3, 4, WIDTH), (WIDTH, WIDTH)):
    _row = refused(EVERY, ValueError, "normalized_shape.*4, 6", str(_shape), normalized_shape=_shape)
    REFUSED[f"normalized_shape_{_shape}"] = _row
for _shape in ((5,), (1,), (1, WIDTH), (WIDTH, WIDTH), ()):
    REFUSED[f"weight_{_shape}"] = refused(EVERY, ValueError, r"weight.*\(6,\)", str(_shape), weight=torch.ones(_shape))
# broadcasting would be silent and is refused: a residual stream has one shape
for _shape in ((3, WIDTH), (1, WIDTH), (WIDTH,), (4, 5), (2, 4, WIDTH)):
    _row = refused(FUSED, ValueError, r"residual.*\(4, 6\)", str(_shape), residual=torch.ones(_shape))
    REFUSED[f"residual_{_shape}"] = _row
for _name, _size in SIZES.items():
    _given = {_name: torch.ones(_size, dtype=torch.int32)}
    REFUSED[f"{_name}_of_ints"] = refused(FUSED[:1], TypeError, rf"{_name}.*float32.*torch\.int32", **_given)
for _name in ("bias", "x_bias", "layer_scale"):
    _row = refused(FUSED[:1], ValueError, rf"{_name}.*\(6,\).*\(7,\)", **{_name: torch.ones(7)})
    REFUSED[f"{_name}_size"] = _row
for _name in ("residual", "x_bias", "layer_scale"):
    _given = {_name: torch.ones(SIZES[_name], device="meta")}
    REFUSED[f"{_name}_on_meta"] = refused(FUSED, ValueError, rf"{_name}.*meta.*cpu", **_given)
for _name in ("dropout_p", "drop_path_p"):
    REFUSED[f"{_name}_text"] = refused(FUSED, TypeError, rf"{_name}.*str", **{_name: "0.1"})
    for _p in (-0.1, 1.0001, 1.5, float("nan"), float("inf")):
        REFUSED[f"{_name}_{_p}"] = refused(FUSED, ValueError, rf"{_name}.*\[0, 1\].*{_p}", **{_name: _p})
for _seed in (1.5, "1", True, torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32), torch.tensor([1.0])):
    REFUSED[f"seed_{_seed!r}"] = refused(FUSED, TypeError, "seed.*int.*int64", dropout_p=0.5, seed=_seed)
for _dtype in (torch.int32, torch.bool, "float32"):
    _row = refused(FUSED, TypeError, "residual_dtype.*float32", residual_dtype=_dtype)
    REFUSED[f"residual_dtype_{_dtype}"] = _row
# `F.layer_norm(x, shape, weight)` with another name: the second argument is the residual here
ORDER = r"residual.*order.*\(x, residual, normalized_shape, weight\).*None"
for _shape in (WIDTH, (WIDTH,), [WIDTH]):
    _row = refused(FUSED, TypeError, ORDER, residual=_shape, normalized_shape=ROW)
    REFUSED[f"order_of_torchs_arguments_{_shape}"] = _row


@pytest.mark.parametrize(("case", "function"), [(case, function) for case in REFUSED for function in REFUSED[case][0]])
def test_error_names_argument_value_and_what_is_accepted(case, function, using):
    _, error, said, shown, given = REFUSED[case]
    with using, pytest.raises(error, match=said.replace("X", main_argument(function))) as raised:
        call(function, **given)
    assert all(value in str(raised.value) for value in shown)


@pytest.mark.parametrize(
    ("shape", "p", "said"),
    [
        ((2, 3), -0.5, r"\bp\b.*\[0, 1\].*-0.5"),
        ((2, 3), 1.5, r"\bp\b.*\[0, 1\].*1.5"),
        ((2, -3), 0.5, r"shape.*-3"),
        (("a",), 0.5, r"shape.*sizes.*'a'"),
    ],
    ids=["negative_p", "p_over_one", "negative_size", "size_that_is_no_number"],
)
def test_dropout_mask_names_what_it_refuses(shape, p, said):
    with pytest.raises(ValueError, match=said):
        fusednorm.dropout_mask(shape, p, 0, "cpu")


# refused when the module is built, not at its first training step
CONSTRUCTED = {
    "layer_scale_bool": (TypeError, {"layer_scale": True}, "layer_scale.*number.*bool.*copy"),
    "layer_scale_tensor": (TypeError, {"layer_scale": ROW}, "layer_scale.*number.*Tensor.*copy"),
    "x_bias": (TypeError, {"x_bias": torch.nn.Parameter(ROW)}, r"x_bias.*True or False.*Parameter.*copy"),
    "dropout_p": (ValueError, {"dropout_p": 1.5}, r"dropout_p.*\[0, 1\].*1\.5"),
    "drop_path_p": (ValueError, {"drop_path_p": 1.5}, r"drop_path_p.*\[0, 1\].*1\.5"),
}


@pytest.mark.parametrize("function", FUSED)
@pytest.mark.parametrize("case", CONSTRUCTED)
def test_module_is_not_built_of_what_it_cannot_take(case, function):
    error, given, said = CONSTRUCTED[case]
    with pytest.raises(error, match=said):
        MODULES[function](WIDTH, **given)


CALLED = {
    "another_width": (EVERY, ValueError, (torch.randn(4, 5),), r"normalized_shape.*\(6,\).*\(4, 5\)"),
    "integers": (EVERY, TypeError, (X.long(),), r"X.*float32.*torch\.int64"),
    "residual": (FUSED, ValueError, (X, torch.randn(1, WIDTH)), r"residual.*\(4, 6\).*\(1, 6\)"),
}


@pytest.mark.parametrize(("case", "function"), [(case, function) for case in CALLED for function in CALLED[case][0]])
def test_module_names_what_it_refuses(case, function, using):
    _, error, args, said = CALLED[case]
    with using, pytest.raises(error, match=said.replace("X", main_argument(function))):
        MODULES[function](WIDTH)(*args)


def test_module_moved_to_another_device_than_its_input():
    with pytest.raises(ValueError, match=r"weight.*meta.*cpu"):
        fusednorm.AddLayerNorm(WIDTH, device="meta")(X, X)
