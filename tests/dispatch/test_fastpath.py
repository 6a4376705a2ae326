"""The fast path gives what the long way gives, bit for bit, and takes no call that needs something of the long way."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import dispatch
from fusednorm.autograd import norm as autograd_norm
from fusednorm.dispatch import fastpath

_missing = fastpath.load()[1]
pytestmark = pytest.mark.skipif(bool(_missing), reason=f"no fast path: {_missing}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMS = ["rms_norm", "add_rms_norm", "add_layer_norm", "add_layer_norm without residual"]


def operands(form, shape=(5, 33), dtype=torch.float32, ndim=1, weight_dtype=None):
    """(x, residual, weight, bias), None where the form has none."""
    x = torch.randn(shape).to(dtype).requires_grad_()
    residual = torch.randn(shape).to(dtype).requires_grad_() if form in ("add_rms_norm", "add_layer_norm") else None
    parameters = [torch.randn(shape[-ndim:]).to(weight_dtype or dtype).requires_grad_() for _ in range(2)]
    return x, residual, parameters[0], None if "rms" in form else parameters[1]


def call(form, x, residual, weight, bias, ndim=1):
    """(normed, residual_out), of plain rms_norm (normed, x)."""
    shape = x.shape[x.ndim - ndim :]
    if form == "rms_norm":
        return fusednorm.rms_norm(x, shape, weight), x
    if form == "add_rms_norm":
        return fusednorm.add_rms_norm(x, residual, shape, weight)
    return fusednorm.add_layer_norm(x, residual, shape, weight, bias)


def differentiate(outputs, inputs, used, cotangents):
    chosen = [i for i in used if outputs[i].requires_grad]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return torch.autograd.grad([outputs[i] for i in chosen], wanted, [cotangents[i] for i in chosen], allow_unused=True)


def taken(x=None, residual=None, weight=None, bias=None, shape=None, eps=1e-5, rms=False):
    x, bare = torch.randn(4, 8) if x is None else x, (None, 0.0, None)
    return dispatch.settings.current.fastpath.add_norm(
        x, residual, (8,) if shape is None else shape, weight, bias, eps, *bare, rms, False
    )


@pytest.fixture
def by_fastpath():
    with fusednorm.use_provider("cpu"):
        yield


def same(a, b):
    assert (a is None) == (b is None)
    if a is not None:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "ndim"),
    [((5, 33), 1), ((3, 2, 4, 6), 2), ((7,), 1), ((0, 16), 1), ((4, 0), 1), ((1, 1), 1), ((64, 300), 1)],
    ids=["odd", "two-dimensions", "one-row", "no-rows", "no-columns", "one-element", "several-threads"],
)
def test_fastpath_gives_the_bits_of_the_long_way(form, shape, ndim, dtype, by_fastpath, monkeypatch):
    inputs = operands(form, shape, dtype, ndim)
    cotangents = [torch.randn(shape).to(dtype) for _ in range(2)]
    for used in ([0, 1], [0], [1]):
        outputs = call(form, *inputs, ndim)
        assert outputs[0].grad_fn.name() == "FusedNormBackward"
        found = differentiate(outputs, inputs, used, cotangents)
        with dispatch.settings.without_fastpath():
            expected = call(form, *inputs, ndim)
            assert expected[0].grad_fn.name() != "FusedNormBackward"
            gradients = differentiate(expected, inputs, used, cotangents)
        for a, b in zip((*outputs, *found), (*expected, *gradients), strict=True):
            same(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_fastpath_gives_the_bits_of_the_long_way_for_any_subset_of_gradients(form, by_fastpath, monkeypatch):
    base = operands(form)
    given = [i for i, t in enumerate(base) if t is not None]
    cotangents = [torch.randn(5, 33) for _ in range(2)]
    for count in range(1, len(given) + 1):
        for subset in itertools.combinations(given, count):
            inputs = [None if t is None else t.detach().requires_grad_(i in subset) for i, t in enumerate(base)]
            outputs = call(form, *inputs)
            with dispatch.settings.without_fastpath():
                expected = call(form, *inputs)
            gradients = [differentiate(o, inputs, [0, 1], cotangents) for o in (outputs, expected)]
            assert len(gradients[0]) == count
            for a, b in zip(*gradients, strict=True):
                same(a, b)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "parameters of another dtype", "no parameters"])
def test_fastpath_gives_the_bits_of_the_long_way_for_layouts(layout, by_fastpath, monkeypatch):
    x, residual, weight, bias = (t.detach() for t in operands("add_layer_norm", (6, 8)))
    if layout == "transposed":
        x, residual = x.t().contiguous().t(), residual.t().contiguous().t()
    elif layout == "expanded":
        x = x[:1].expand(6, 8)
    elif layout == "sliced":
        x = torch.randn(6, 17)[:, 1::2]
    elif layout == "parameters of another dtype":
        x, residual, weight = x.bfloat16(), residual.bfloat16(), weight.double()
    else:
        weight = bias = None
    inputs = [None if t is None else t.requires_grad_() for t in (x, residual, weight, bias)]
    cotangents = [torch.randn(8, 6, dtype=x.dtype).t(), torch.randn(1, 8, dtype=x.dtype).expand(6, 8)]
    outputs = call("add_layer_norm", *inputs)
    assert outputs[0].grad_fn.name() == "FusedNormBackward"
    with dispatch.settings.without_fastpath():
        expected = call("add_layer_norm", *inputs)
    gradients = [differentiate(o, inputs, [0, 1], cotangents) for o in (outputs, expected)]
    for a, b in zip((*outputs, *gradients[0]), (*expected, *gradients[1]), strict=True):
        same(a, b)


# --- what it leaves to the long way ---


class _Subclass(torch.Tensor):
    pass


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_fastpath_takes_what_is_plain(by_fastpath):
    assert taken() is not None
    assert taken(weight=nn.Parameter(torch.ones(8)), shape=8) is not None
    assert taken(shape=[8]) is not None and taken(shape=torch.Size([8])) is not None
    assert taken(eps=None, rms=True) is not None
    with torch.no_grad():
        assert taken() is not None
    with torch.inference_mode():
        normed, _ = taken(torch.randn(4, 8))
        assert normed.is_inference()


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": torch.randn(4, 8).as_subclass(_Subclass)},
        {"x": torch.randn(4, 8, device="meta")},
        {"x": torch.randn(4, 8).to_sparse()},
        {"x": torch.nested.nested_tensor([torch.randn(4, 8)], layout=torch.jagged)},
        {"x": torch.ones(4, 8, dtype=torch.int64)},
        {"x": torch.ones(4, 8, dtype=torch.complex64)},
        {"x": torch.ones(4, 8, dtype=torch.complex64).conj().imag},  # its negative bit is set
        {"x": torch.randn([1] * 64 + [8])},
        {"x": torch.randn(())},
        {"x": [1.0]},
        {"residual": torch.randn(4, 8).double()},
        {"residual": torch.randn(8)},
        {"weight": torch.randn(4)},
        {"weight": torch.randn(1, 8)},
        {"weight": 1.0},
        {"bias": torch.ones(8, dtype=torch.int32)},
        {"shape": (4,)},
        {"shape": ()},
        {"shape": (1, 4, 8)},
        {"shape": (8.0,)},
        {"shape": True},
        {"shape": 2**70},
        {"shape": "8"},
        {"shape": {8}},
        {"eps": 1},
        {"eps": None},
        {"eps": "small"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_fastpath_leaves_other_arguments_to_the_long_way(arguments, by_fastpath):
    assert taken(**arguments) is None


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu"),
        _Functions,
        _Dispatches,
        FakeTensorMode,
        lambda: torch._C._AutoDispatchBelowAutograd(),
    ],
    ids=["autocast", "function mode", "dispatch mode", "fake tensors", "below autograd"],
)
def test_fastpath_leaves_calls_that_somebody_watches_to_the_long_way(context, by_fastpath):
    x = torch.randn(4, 8)
    assert taken(x) is not None
    with context():
        assert taken(x) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_fastpath_leaves_transforms_to_the_long_way(by_fastpath):
    x = torch.randn(3, 4, 8)
    seen = []
    torch.vmap(lambda t: seen.append(taken(t)) or t)(x)
    torch.func.grad(lambda t: seen.append(taken(t)) or t.sum())(x)
    with forward_ad.dual_level():
        seen.append(taken(forward_ad.make_dual(x, torch.ones_like(x))))
    torch.jit.trace(lambda t: seen.append(taken(t)) or t + 1, (x,), check_trace=False)
    assert seen == [None, None, None, None]


def test_fastpath_is_taken_in_a_backward_too(by_fastpath, monkeypatch):
    def refuse(*_):
        raise AssertionError("the node's gradients were left to Python")

    monkeypatch.setattr(autograd_norm, "fastpath_backward", refuse)
    inputs = operands("add_layer_norm")
    assert all(g is not None for g in differentiate(call("add_layer_norm", *inputs), inputs, [0], [torch.ones(5, 33)]))


def test_fastpath_refuses_a_wrong_number_of_arguments():
    with pytest.raises(TypeError, match="expected 5 arguments, got 1"):
        dispatch.settings.current.fastpath.rms_norm(torch.randn(3))


# --- its node ---


@pytest.mark.parametrize("form", FORMS)
def test_fastpath_derivatives_of_second_order_and_batched(form, by_fastpath):
    inputs = [t for t in operands(form, (3, 5), torch.float64) if t is not None]

    def function(*tensors):
        rest = iter(tensors)
        full = [next(rest) if t is not None else None for t in operands(form, (3, 5), torch.float64)]
        normed, z = call(form, *full)
        return normed if z is full[0] else (normed, z)

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


def test_fastpath_graph_is_freed_after_one_backward(by_fastpath):
    x, residual, weight, bias = operands("add_layer_norm")
    normed, _ = call("add_layer_norm", x, residual, weight, bias)
    first = torch.autograd.grad(normed, x, torch.ones_like(normed), retain_graph=True)[0]
    same(first, torch.autograd.grad(normed, x, torch.ones_like(normed))[0])
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(normed, x, torch.ones_like(normed))


def test_fastpath_notices_what_was_changed_in_place(by_fastpath):
    inputs = operands("add_layer_norm")
    normed, z = call("add_layer_norm", *inputs)
    z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()
    normed, z = call("add_layer_norm", *inputs)
    with torch.no_grad():
        inputs[2].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()
    normed, z = call("add_layer_norm", *inputs)  # an output that is not kept may be changed
    cotangent = torch.randn(5, 33)
    expected = torch.autograd.grad(normed, inputs[0], 2.0 * cotangent, retain_graph=True)[0]
    same(torch.autograd.grad(normed.mul_(2.0), inputs[0], cotangent)[0], expected)


def test_fastpath_keeps_through_hooks_on_saved_tensors(by_fastpath):
    inputs = operands("add_layer_norm")
    cotangents = [torch.randn(5, 33) for _ in range(2)]
    expected = differentiate(call("add_layer_norm", *inputs), inputs, [0, 1], cotangents)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.detach().t() if tensor.ndim == 2 else tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.contiguous().t() if t.ndim == 2 else t):
        outputs = call("add_layer_norm", *inputs)
    assert sorted(map(len, packed)) == [1, 1, 2, 2]  # weight, bias, z, statistics
    for a, b in zip(differentiate(outputs, inputs, [0, 1], cotangents), expected, strict=True):
        same(a, b)
    outputs = checkpoint(call, "add_layer_norm", *inputs, use_reentrant=False)
    for a, b in zip(differentiate(outputs, inputs, [0, 1], cotangents), expected, strict=True):
        same(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's tracing looks at z's
def test_fastpath_under_compiled_autograd(by_fastpath):
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()
    inputs = operands("add_layer_norm")
    cotangents = [torch.randn(5, 33) for _ in range(2)]
    expected = differentiate(call("add_layer_norm", *inputs), inputs, [0, 1], cotangents)
    for _ in range(2):
        outputs = call("add_layer_norm", *inputs)
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
            found = differentiate(outputs, inputs, [0, 1], cotangents)
        for a, b in zip(found, expected, strict=True):
            same(a, b)


def test_fastpath_long_chain_is_destroyed_without_recursion(by_fastpath):
    h = weight = torch.ones(8, requires_grad=True)
    for _ in range(20_000):
        h = fusednorm.rms_norm(h, 8, weight)
    assert h.grad_fn is not None
    del h  # a recursion this deep would overflow the stack


def test_fastpath_in_several_threads_at_once(by_fastpath):
    inputs = operands("add_layer_norm", (64, 256))
    cotangents = [torch.randn(64, 256) for _ in range(2)]
    expected = differentiate(call("add_layer_norm", *inputs), inputs, [0, 1], cotangents)
    results: list = []

    def work():
        for _ in range(20):
            results.append(differentiate(call("add_layer_norm", *inputs), inputs, [0, 1], cotangents))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for found in results:
        for a, b in zip(found, expected, strict=True):
            same(a, b)


def test_fastpath_shows_in_the_profiler(by_fastpath):
    inputs = operands("add_layer_norm")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call("add_layer_norm", *inputs)[0].sum().backward()
    names = {event.name for event in profile.events()}
    assert {"fusednorm_cpu::add_layer_norm_fwd", "fusednorm_cpu::add_layer_norm_bwd"} <= names


def test_fastpath_leaks_nothing(by_fastpath):
    import gc
    import weakref

    x, residual, weight, bias = operands("add_layer_norm")
    normed, z = call("add_layer_norm", x, residual, weight, bias)
    (normed.sum() + z.sum()).backward()
    references = [weakref.ref(t) for t in (x, residual, weight, bias, normed, z)]
    del x, residual, weight, bias, normed, z
    gc.collect()
    assert [r() for r in references] == [None] * 6
