"""What the fast path leaves to the Python path: arguments that are not plain, and calls that somebody watches."""

from __future__ import annotations

import pytest
import torch
from fastpath_calls import KEY_MASK, NEEDS_FASTPATH
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusednorm import dispatch

pytestmark = [NEEDS_FASTPATH, pytest.mark.usefixtures("native")]
X = torch.ones(4, 8)
QUERY, KEY = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8)


def norm(
    x=X,
    residual=None,
    weight=None,
    bias=None,
    shape=8,
    eps=1e-5,
    rms=False,
    x_bias=None,
    layer_scale=None,
    gate=None,
    scale=None,
    shift=None,
    dropout_p=0.0,
    seed=None,
):
    epilogue = (x_bias, layer_scale, gate, scale, shift, dropout_p, seed)
    return dispatch.settings.current.fastpath.add_norm(x, residual, shape, weight, bias, eps, *epilogue, rms, False)


def activation(x=X, bias=X[0], activation="relu", dropout_p=0.0, seed=None):
    return dispatch.settings.current.fastpath.bias_act_dropout(x, bias, activation, dropout_p, seed, False)


def attention(query=QUERY, key=KEY, value=KEY, key_mask=None, is_causal=False, window=None, scale=None, gqa=False):
    fast = dispatch.settings.current.fastpath
    return fast.attention(query, key, value, key_mask, is_causal, window, scale, gqa, True)


OPERATORS = (norm, activation, attention)


class _Subclass(torch.Tensor):
    pass


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_what_is_plain_is_taken():
    assert norm() is not None
    assert norm(weight=nn.Parameter(torch.ones(8)), shape=8) is not None
    assert norm(shape=[8]) is not None and norm(shape=torch.Size([8])) is not None
    assert norm(eps=None, rms=True) is not None
    assert norm(dropout_p=0) is not None and norm(dropout_p=0.0, seed=3) is not None
    assert norm(dropout_p=0.5) is not None
    assert norm(layer_scale=torch.ones(8)) is not None
    assert norm(gate=torch.ones(4, 8), scale=torch.ones(4, 24)[:, :8], shift=torch.ones(4, 8)) is not None
    assert norm(torch.ones(2, 3, 4, 8), scale=torch.ones(2, 1, 1, 8), shift=torch.ones(2, 8)) is not None
    assert norm(dropout_p=0.5, seed=torch.tensor([[3]]), x_bias=torch.ones(8)) is not None
    assert attention(scale=0.1, is_causal=True, window=(0, None), key_mask=KEY_MASK) is not None
    for operator in OPERATORS:
        with torch.no_grad():
            assert operator() is not None
    with torch.inference_mode():
        normed, _ = norm(torch.randn(4, 8))
        assert normed.is_inference()
        assert attention(*(torch.randn(2, 2, n, 8) for n in (5, 7, 7))).is_inference()


DROPOUT = [
    *({"dropout_p": p} for p in (1.0, 1, 10**400, -0.1, float("nan"), True, "0.1")),
    *({"dropout_p": 0.5, "seed": seed} for seed in (1.0, 1.5, True, torch.tensor([1, 2]), torch.tensor([1.0]))),
    {"dropout_p": 0.5, "seed": torch.tensor([1], dtype=torch.int32)},
    {"dropout_p": 0.5, "seed": torch.empty(1, dtype=torch.int64, device="meta")},
]
ROWS = [  # of x
    torch.randn(4, 8).as_subclass(_Subclass),
    torch.randn(4, 8, device="meta"),
    torch.randn(4, 8).to_sparse(),
    torch.nested.nested_tensor([torch.randn(4, 8)], layout=torch.jagged),
    torch.ones(4, 8, dtype=torch.int64),
    torch.ones(4, 8, dtype=torch.complex64),
    torch.ones(4, 8, dtype=torch.complex64).conj().imag,  # its negative bit is set
    torch.randn([1] * 64 + [8]),
    torch.randn(()),
    [1.0],
    1.0,
]
REFUSED = {
    norm: [
        *({"x": x} for x in ROWS),
        *({"residual": residual} for residual in (torch.randn(4, 8).double(), torch.randn(8))),
        *({"weight": weight} for weight in (torch.randn(4), torch.randn(1, 8), 1.0)),
        {"bias": torch.ones(8, dtype=torch.int32)},
        *({"shape": shape} for shape in ((4,), (), (1, 4, 8), (8.0,), True, 2**70, "8", {8})),
        *({"eps": eps} for eps in (1, None, "small")),
        *({"dropout_p": 0.5, "x_bias": bias} for bias in (torch.randn(4), torch.ones(8, dtype=torch.int64))),
        *({"gate": gate} for gate in (torch.randn(8), torch.randn(1, 8), torch.randn(4, 7), torch.randn(4, 1, 8), 1.0)),
        {"gate": torch.randn(4, 8), "layer_scale": torch.randn(8)},  # whose product is taken in Python
        {"scale": torch.randn(4, 8), "weight": torch.randn(8)},
        {"shift": torch.randn(4, 8), "bias": torch.randn(8)},
        {"x": X[0], "gate": torch.randn(1, 8)},
        *DROPOUT,
    ],
    activation: [
        *({"x": x} for x in ROWS),
        *({"bias": bias} for bias in (torch.randn(4), torch.randn(1, 8), 1.0)),
        *({"activation": name} for name in ("tanh", "RELU", None, "relu\0")),
        *DROPOUT,
    ],
    attention: [
        {"query": torch.randn(2, 2, 5, 8).as_subclass(_Subclass)},
        {"key": torch.randn(2, 2, 7, 8, device="meta")},
        {"query": torch.randn(2, 5, 8)},
        {"query": torch.randn(2, 2, 0, 8)},
        {"query": torch.randn(2, 2, 5, 9)},
        {"query": torch.randn(2, 4, 5, 8)},  # heads that enable_gqa alone allows
        {"query": torch.randn(1, 2, 5, 8)},
        {"key": torch.randn(2, 2, 7, 8).double()},
        {"value": torch.randn(2, 2, 6, 8)},
        {"value": torch.randn(2, 1, 7, 8)},
        {"value": torch.randn(2, 2, 7, 257)},
        {"key": torch.ones(2, 2, 7, 8, dtype=torch.int64)},
        {"key": None},
        {"key": [1.0]},
        {"key_mask": torch.ones(2, 7)},
        {"key_mask": torch.ones(1, 7, dtype=torch.bool)},
        {"key_mask": torch.ones(2, 6, dtype=torch.bool)},
        {"key_mask": KEY_MASK.as_subclass(_Subclass)},
        {"key_mask": True},
        {"is_causal": 1},
        *({"window": window} for window in (3, [1, 1], (1,), (-1, 0), (1.0, 0), (True, 0), (2**70, 0))),
        *({"scale": scale} for scale in (1, "large")),
        {"gqa": None},
    ],
}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_other_arguments_are_left_to_the_python_path(operator):
    assert operator() is not None
    taken = [arguments for arguments in REFUSED[operator] if operator(**arguments) is not None]
    assert not taken, "\n".join(map(str, taken))
    with pytest.raises(TypeError, match="expected 5 arguments, got 1"):
        dispatch.settings.current.fastpath.rms_norm(torch.randn(3))


WATCHING = {
    "autocast": lambda: torch.autocast("cpu"),
    "function mode": _Functions,
    "dispatch mode": _Dispatches,
    "fake tensors": FakeTensorMode,
    "below autograd": lambda: torch._C._AutoDispatchBelowAutograd(),
}


@pytest.mark.parametrize("context", WATCHING)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_calls_that_somebody_watches_are_left_to_the_python_path(operator, context):
    assert operator() is not None
    with WATCHING[context]():
        assert operator() is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_transforms_are_left_to_the_python_path(operator):
    count, rows = (3, torch.randn(2, 2, 5, 8)) if operator is attention else (1, torch.randn(4, 8))
    seen = []

    def look(t):
        seen.append(operator(*[t] * count))
        return t

    torch.vmap(look)(torch.stack([rows] * 3))
    torch.func.grad(lambda t: look(t).sum())(rows)
    with forward_ad.dual_level():
        look(forward_ad.make_dual(rows, torch.ones_like(rows)))
    torch.jit.trace(lambda t: look(t) + 1, (rows,), check_trace=False)
    assert seen == [None] * 4
