"""``bias_act_dropout``'s derivatives of every order and kind, checkpointing, torch.compile, autocast."""

from __future__ import annotations

import pytest
import torch
from oracle_activation import ACTIVATIONS, ActivationCall
from shapes import Shape, random_leaves
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fusednorm import bias_act_dropout

OP = "bias_act_dropout_fwd"

ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
DROPOUT = pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 2**63 + 5}], ids=["bare", "dropout"])
BOTH = ("x", "bias")
ODD = Shape("odd_width_masked_lanes", (9, 37))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def values(*shape: int, generator: torch.Generator, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


# --- gradients: which, and of which order ---


@ACTIVATION
def test_each_subset_of_gradients(activation, using, device, generator):
    leaves = random_leaves(ODD, BOTH, torch.float64, device, generator)
    dy = torch.randn(ODD.base, generator=generator, dtype=torch.float64).to(device)

    def gradients(*wanted: str) -> dict[str, torch.Tensor]:
        fresh = {name: leaf.clone().requires_grad_(name in wanted) for name, leaf in leaves.items()}
        y = bias_act_dropout(**fresh, activation=activation, dropout_p=0.2, seed=11)
        found = torch.autograd.grad(y, [fresh[name] for name in wanted], dy)
        assert all(leaf.grad is None for leaf in fresh.values())
        return dict(zip(wanted, found, strict=True))

    with using:
        both = gradients("x", "bias")
        for name in BOTH:
            # float64, whose rounding is 1e-16: alone or with the other, it may be summed in another order
            torch.testing.assert_close(gradients(name)[name], both[name], rtol=1e-12, atol=1e-12)


def test_nothing_is_recorded_without_a_gradient(using, device):
    x = torch.ones(3, 8, device=device, requires_grad=True)
    with using:
        with torch.no_grad():
            y = bias_act_dropout(x, x[0], "gelu", 0.1)
        with torch.inference_mode():
            other = bias_act_dropout(x, x[0], "gelu")
    assert not y.requires_grad and not other.requires_grad


def test_a_kernels_function_keeps_its_inputs_only(provider, using, device):
    if provider in ("automatic", "torch"):
        pytest.skip("no Function of ours runs: what torch's own operators keep is torch's affair")
    x = torch.ones(3, 8, device=device, requires_grad=True)
    bias = torch.ones(8, device=device, requires_grad=True)
    kept = []
    with using, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bias_act_dropout(x, bias, "gelu", 0.5, seed=torch.tensor([3], device=device))
    assert [t.data_ptr() for t in kept[:2]] == [x.data_ptr(), bias.data_ptr()]
    assert [t.dtype for t in kept[2:]] == [torch.int64] and kept[2].numel() == 1


def test_one_tensor_as_x_and_bias(using, device, generator):
    given = values(12, generator=generator, device=device, dtype=torch.float64)
    x = given.clone().requires_grad_()
    two = [given.clone().requires_grad_() for _ in range(2)]
    with using:
        (dx,) = torch.autograd.grad(bias_act_dropout(x, x, "silu").sum(), x)
        expected = torch.autograd.grad(bias_act_dropout(*two, "silu").sum(), two)
    torch.testing.assert_close(dx, sum(expected))


# float64 rounds at 1e-16; a derivative adds tens of terms of order one
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


def problem(activation, options, device, generator):
    leaves = random_leaves(Shape("few_odd", (3, 7)), BOTH, torch.float64, device, generator)
    return ActivationCall(activation, options=options), leaves


def scalar(run, weights):
    """A non-linear function of the result, so that second derivatives by the cotangent's path count too."""
    return lambda leaves: (torch.sin(run(leaves)[0]) * weights).sum()


@DROPOUT
@ACTIVATION
def test_gradcheck_and_gradgradcheck(activation, options, using, device, generator):
    call, leaves = problem(activation, options, device, generator)
    given = tuple(leaf.requires_grad_() for leaf in leaves.values())

    def run(*tensors):
        return call.ours(dict(zip(leaves, tensors, strict=True)))

    with using:
        assert torch.autograd.gradcheck(run, given)
        assert torch.autograd.gradgradcheck(run, given)


@DROPOUT
@ACTIVATION
def test_torch_func(activation, options, using, device, generator):
    """grad, jvp, the Hessian by forward over reverse, and gradients of each sample by vmap."""
    call, leaves = problem(activation, options, device, generator)
    weights, tangent = (torch.randn(3, 7, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    batch = torch.stack([leaves["x"] + i for i in range(3)])

    def derivatives(run):
        value = scalar(run, weights)
        return (
            torch.func.grad(value)(leaves),
            torch.func.jvp(lambda x: run(leaves | {"x": x}), (leaves["x"],), (tangent,)),
            torch.func.hessian(lambda bias: value(leaves | {"bias": bias}))(leaves["bias"]),
            torch.vmap(lambda x: torch.func.grad(value)(leaves | {"x": x}))(batch),
        )

    with using:
        ours = derivatives(call.ours)
    torch.testing.assert_close(ours, derivatives(lambda t: call.exact(t, torch.float64)), **FLOAT64)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpoint_recomputes_the_same_mask(use_reentrant, using, device, generator):
    x = values(6, 32, generator=generator, device=device).requires_grad_()
    bias = values(32, generator=generator, device=device).requires_grad_()
    dy = values(6, 32, generator=generator, device=device)

    def run(wrap):
        torch.manual_seed(3)
        y = wrap(lambda *args: bias_act_dropout(*args, "gelu", 0.5))
        torch.rand(5, device=device)  # the generator moves on between forward and backward
        x.grad = bias.grad = None
        y.backward(dy)
        return y.detach(), x.grad, bias.grad

    with using:
        plain = run(lambda function: function(x, bias))
        again = run(lambda f: checkpoint(f, x, bias, use_reentrant=use_reentrant))
    assert (plain[0] == 0).any()
    for expected, got in zip(plain, again, strict=True):
        assert torch.equal(expected, got)


# --- torch.compile and autocast ---


@pytest.mark.parametrize(("activation", "dropout_p"), [("gelu_tanh", 0.0), ("relu", 0.5)])
def test_compiles_once_for_every_row_count(activation, dropout_p, using, device, fresh_dynamo):
    counter = CompileCounterWithBackend("aot_eager")

    def run(x, bias, seed):
        return bias_act_dropout(x, bias, activation, dropout_p, seed=seed)

    def results(function, rows):
        generator = torch.Generator().manual_seed(rows)
        x = values(rows, 24, generator=generator, device=device).requires_grad_()
        bias = values(24, generator=generator, device=device).requires_grad_()
        y = function(x, bias, torch.tensor([rows], device=device))
        dy = values(rows, 24, generator=generator, device=device)
        return y.detach(), torch.autograd.grad(y, (x, bias), dy)

    with using:
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
        results(compiled, 10)
        first = counter.frame_count
        for rows in (33, 1, 0, 1000) if not dropout_p else (33, 1):  # the mask makes the graph a slow one to trace
            # a compiler may add in another order: 1000 float32 terms of order one, half an ulp each
            torch.testing.assert_close(results(compiled, rows), results(run, rows), rtol=1e-5, atol=1e-4)
    assert counter.frame_count - first <= 2  # 0 and 1 may be specialised


def test_compiled_calls_draw_anew(using, device, fresh_dynamo):
    x = torch.ones(16, 64, device=device)
    with using:
        compiled = torch.compile(
            lambda t: bias_act_dropout(t, None, dropout_p=0.5), fullgraph=True, backend="aot_eager"
        )
        first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_alone(dtype, using, device):
    x, bias = torch.ones(3, 8, device=device, dtype=dtype), torch.ones(8, device=device)
    with using, torch.autocast(device, dtype=torch.bfloat16):
        assert bias_act_dropout(x, bias, "gelu").dtype == dtype
