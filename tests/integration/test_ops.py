"""The operators as ``torch.ops.fusednorm`` has them, which the public functions pass by: every one, with what is
optional absent, under modes, in a fresh process, and what it says of arguments that nobody checked."""

from __future__ import annotations

import pytest
import torch
from fresh import python
from op_calls import CALL, CALLS, EVERY_CALL, FEW, attention, norm_calls
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fusednorm
from fusednorm import _flops, _ops, dispatch


@pytest.fixture
def named(provider, name) -> str:
    """The provider under test, which an op names."""
    if provider == "automatic":
        pytest.skip("an op names its provider, and automatic choice is no name")
    if dispatch.serving(provider, name) is None:
        pytest.skip(f"provider {provider} has no {name}")
    return provider


def listed(outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def test_calls_above_are_those_of_every_operator():
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fusednorm::")}
    recorded = {f"fusednorm::{name}.recorded" for name in _ops.RECORDED}
    assert registered == {f"fusednorm::{name}" for name in CALLS} | recorded


@EVERY_CALL
def test_op_under_a_dispatch_mode_and_with_fake_tensors(name, make, named):
    """As many outputs as its schema says, what is not asked for too, and of the sizes that the fake kernel tells."""
    op = getattr(torch.ops.fusednorm, name)
    args = (*make(), named)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    plain = listed(op(*args))
    with Mode():
        watched = listed(op(*args))
    assert f"fusednorm.{name}.default" in seen
    assert len(plain) == len(op.default._schema.returns)
    if name == "add_layer_norm_fwd":  # without a stream to store, the second is empty
        assert plain[1].numel() == (args[0].numel() if args[-2] else 0)
    for one, other in zip(plain, watched, strict=True):
        assert torch.equal(one, other)
    with FakeTensorMode() as mode:
        fake = listed(op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]))
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in plain]


@pytest.mark.parametrize(CALL, [*FEW, *norm_calls()])
def test_opcheck(name, make, named, device):
    """Of every provider its results, none of which is an input or another result.

    What a compiler makes of the op is held to it by each provider at the call that has everything.
    The other calls go through the compiler by one provider: the graph is the same but for a name in it.
    """
    checks = ["test_schema", "test_faketensor"]
    if named == "reference" or make is CALLS[name][-1]:
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    args = [arg.to(device) if isinstance(arg, Tensor) else arg for arg in make()]
    library.opcheck(getattr(torch.ops.fusednorm, name).default, (*args, named), test_utils=checks)


@pytest.mark.parametrize("name", _ops.RECORDED)
def test_opcheck_of_recorded_overloads_with_gradients(name):
    """What exported programs hold: no provider named, gradients of its own."""
    for make in CALLS[name]:
        args = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in (*make(), None)]
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if make is CALLS[name][-1]:  # what a compiler makes of it takes seconds: of the call that has everything
            checks.append("test_aot_dispatch_dynamic")
        library.opcheck(getattr(torch.ops.fusednorm, name).recorded, tuple(args), test_utils=checks)


@pytest.mark.parametrize("name", _ops.RECORDED)
def test_recorded_overload_has_the_gradients_of_the_public_way(name):
    from fusednorm.autograd.activation import BiasActDropoutFunction
    from fusednorm.autograd.attention import AttentionFunction
    from fusednorm.autograd.norm import AddLayerNormFunction

    functions = {
        "add_layer_norm_fwd": lambda *args: AddLayerNormFunction.apply(*args, False),
        "bias_act_dropout_fwd": BiasActDropoutFunction.apply,
        "attention_fwd": AttentionFunction.apply,
    }
    with fusednorm.use_provider("reference"):
        for make in CALLS[name]:
            args = make()
            leaves = [a.requires_grad_() for a in args if isinstance(a, Tensor) and a.is_floating_point()]

            def gradients(outputs, leaves=leaves):
                out = listed(outputs)[0]
                cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
                return torch.autograd.grad(out, leaves, cotangent)

            op = getattr(torch.ops.fusednorm, name).recorded
            ours, expected = gradients(op(*args, None)), gradients(functions[name](*args, "reference"))
            for one, other in zip(ours, expected, strict=True):
                assert torch.equal(one, other)


FRESH = """
import os, sys, torch, fusednorm, traceback
from fusednorm import dispatch
from tests.integration import test_ops as test_ops
torch.testing.assert_close(torch.ones(1), torch.ones(1))  # its first call imports for a second
for name, calls in test_ops.CALLS.items():
    for i, make in enumerate(calls):
        args = make()
        assert "cpu" not in dispatch.registry._reasons
        if os.fork() == 0:
            code = 1
            try:
                outputs = test_ops.listed(getattr(torch.ops.fusednorm, name)(*args, sys.argv[1]))
                expected = test_ops.listed(getattr(torch.ops.fusednorm, name)(*args, "reference"))
                torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        print(name, i, os.wait()[1])
"""


def test_op_of_the_native_library_may_be_the_first_call_of_a_process():
    if dispatch.unavailable_reason("cpu") is not None:
        pytest.skip("the native library is not built")
    lines = python("-c", FRESH, "cpu").splitlines()
    assert lines == [f"{name} {i} 0" for name, calls in CALLS.items() for i in range(len(calls))]


@pytest.mark.parametrize("name", CALLS)
def test_unknown_provider_is_named(name):
    with pytest.raises(ValueError, match=f"provider: {name} knows no 'cpuu'; expected one of 'triton'"):
        getattr(torch.ops.fusednorm, name)(*CALLS[name][0](), "cpuu")


def bare_with(name: str, argument: str, value: object) -> list:
    """The first of an op's calls, with another value of one argument."""
    arguments = [a.name for a in getattr(torch.ops.fusednorm, name).default._schema.arguments]
    args = list(CALLS[name][0]())
    args[arguments.index(argument)] = value
    return args


@pytest.mark.parametrize("ndim", [-1, 0, 4, 128])
@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("name", ["add_layer_norm_fwd", "add_layer_norm_bwd"])
def test_normalized_ndim_out_of_range(name, fake, ndim):
    args = bare_with(name, "normalized_ndim", ndim)
    args = [a.to("meta") if fake and isinstance(a, Tensor) else a for a in args]
    with pytest.raises(ValueError, match=f"normalized_ndim: {name} expects 1 to 3, x's dimensions, got {ndim}"):
        getattr(torch.ops.fusednorm, name)(*args, "reference")


@pytest.mark.parametrize("name", CALLS)
def test_dropout_without_a_seed(name, provider):
    args = bare_with(name, "dropout_p", 0.5)
    with pytest.raises(ValueError, match=f"seed: {name} needs one where something is dropped"):
        getattr(torch.ops.fusednorm, name)(*args, "reference" if provider == "automatic" else provider)


@pytest.mark.parametrize(
    ("name", "argument", "value", "said"),
    [
        ("bias_act_dropout_fwd", "activation", "tanh", "activation: bias_act_dropout_fwd knows 'relu', .*, got 'tanh'"),
        ("bias_act_dropout_fwd", "x", torch.tensor(1.0), r"x: bias_act_dropout_fwd expects .* reshape it to \(1,\)"),
        ("attention_fwd", "k", torch.ones(2, 8), r"k: attention_fwd expects \(B, H, S, D\), got shape \(2, 8\)"),
        ("attention_fwd", "cu_seqlens_q", torch.tensor([0]), "cu_seqlens_k: attention_fwd got None beside the other"),
    ],
)
def test_arguments_that_no_kernel_can_take(name, argument, value, said):
    with pytest.raises(ValueError, match=said):
        getattr(torch.ops.fusednorm, name)(*bare_with(name, argument, value), "reference")


def layer(package, p=0.1):
    torch.manual_seed(0)
    return package.TransformerEncoderLayer(64, 4, 128, p, batch_first=True)


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flop_counter_counts_attention_as_torch_does(using):
    x = torch.randn(2, 32, 64)
    with using:
        assert flops(lambda: layer(fusednorm)(x)) == flops(lambda: layer(torch.nn)(x)) == 4718592


@EVERY_CALL
def test_flops_of_attention_are_its_products(name, make):
    """A formula has the op's arguments by position: held to the pairs and widths of these calls."""
    args = make()
    found = flops(lambda: getattr(torch.ops.fusednorm, name)(*args, "reference"))
    if not name.startswith("attention"):
        assert found == 0
        return
    packed = args[5 if name.endswith("bwd") else 0].ndim == 3
    pairs = 4 * (4 * 4 + 2 * 2) if packed else 2 * 4 * 5 * 7
    assert found == 2 * pairs * 8 * (5 if name.endswith("bwd") else 2)


def test_flops_of_packed_sequences_that_nobody_can_read():
    args = [a.to("meta") if isinstance(a, Tensor) else a for a in attention(packed=True)]
    assert _flops._attention_fwd(*args, "reference") == 2 * (2 * 4 * 4 * 4) * 16


@pytest.mark.parametrize("first", ["fusednorm", "torch.utils.flop_counter"])
def test_flop_formulas_are_there_whichever_is_imported_first(first):
    program = """
import sys, importlib, torch
importlib.import_module(sys.argv[1])
import fusednorm
from torch.utils.flop_counter import flop_registry
print(torch.ops.fusednorm.attention_fwd in flop_registry, torch.ops.fusednorm.attention_bwd in flop_registry,
      sum(type(finder).__module__.startswith("fusednorm") for finder in sys.meta_path))
"""
    assert python("-c", program, first).split() == ["True", "True", "0"]


def test_recorded_overloads_have_the_arguments_of_their_op():
    for name in _ops.RECORDED:
        op = getattr(torch.ops.fusednorm, name)
        ours, its = op.recorded._schema.arguments, op.default._schema.arguments
        assert [(a.name, str(a.type)) for a in ours[:-1]] == [(a.name, str(a.type)) for a in its[:-1]]


def test_a_mode_sees_in_the_first_call_of_a_process_what_it_sees_in_the_second():
    program = """
import torch, fusednorm
from torch.utils._python_dispatch import TorchDispatchMode
class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.append(str(func))
        return func(*args, **(kwargs or {}))
x = torch.randn(4, 8)
calls = (
    lambda: fusednorm.add_rms_norm(x, x, 8, x_bias=x[0]),
    lambda: fusednorm.bias_act_dropout(x, x[0], dropout_p=0.5),
    lambda: fusednorm.scaled_dot_product_attention(x, x, x, is_causal=True),
)
for call in calls:
    runs = []
    for _ in range(2):
        seen = []
        with Mode():
            call()
        runs.append(seen)
    print(runs[0] == runs[1])
"""
    assert python("-c", program).split() == ["True"] * 3
