"""The functions behave in PyTorch's other machinery as torch's own do: fake tensors, subclasses, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from shapes import FUSED, PLAIN, Shape, inputs, outputs_of, random_leaves
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusednorm

BOTH = pytest.mark.parametrize("function", PLAIN + FUSED)
TWINS = {"layer_norm": F.layer_norm, "rms_norm": F.rms_norm}
SHAPE = Shape("few_odd", (3, 5, 7))


def call(function, x, residual=None, **kwargs):
    residual = x if residual is None else residual
    args = (x, residual) if function in FUSED else (x,)
    return getattr(fusednorm, function)(*args, x.shape[-1:], **kwargs)


@BOTH
def test_meta_device(function, using):
    x = torch.empty(3, 5, 7, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(7, device="meta", requires_grad=True)
    with using:
        outputs = outputs_of(call(function, x, weight=weight))
    for output in outputs:
        assert (output.device.type, output.shape, output.dtype) == ("meta", x.shape, torch.bfloat16)
    gradients = torch.autograd.grad(outputs, (x, weight), [torch.empty_like(o) for o in outputs])
    assert [(g.device.type, g.shape, g.dtype) for g in gradients] == [("meta", t.shape, t.dtype) for t in (x, weight)]


@pytest.mark.parametrize(
    ("function", "options"),
    [(f, {}) for f in PLAIN + FUSED]
    + [(f, o) for f in FUSED for o in ({"dropout_p": 0.5}, {"residual_dtype": torch.float64})],
    ids=str,
)
def test_fake_tensors_have_the_real_shapes_dtypes_and_strides(function, options, using):
    leaves = random_leaves(SHAPE, inputs(function), torch.float32, "cpu", torch.Generator().manual_seed(1))

    def run(leaves):
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        args = (leaves["x"], leaves["residual"]) if function in FUSED else (leaves["x"],)
        weight = leaves["weight"]
        outputs = outputs_of(getattr(fusednorm, function)(*args, (7,), weight, **options))
        return outputs + torch.autograd.grad(outputs, (*args, weight), [torch.ones_like(o) for o in outputs])

    with using:
        real = run(leaves)
        with FakeTensorMode() as mode:
            fake = run({name: mode.from_tensor(leaf) for name, leaf in leaves.items()})
    describe = [(t.shape, t.dtype, t.stride(), t.device) for t in real]
    assert [(t.shape, t.dtype, t.stride(), t.device) for t in fake] == describe


class Logging(torch.Tensor):
    """Notes the functions called on it and keeps its type, as torch's documentation has it."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@BOTH
@pytest.mark.parametrize("which", ["x", "weight"])
def test_tensor_subclass_is_asked_and_keeps_its_type(function, which, using):
    x, weight = torch.randn(3, 7), torch.randn(7)
    expected = outputs_of(call(function, x, weight=weight))
    if which == "x":
        x = x.as_subclass(Logging)
    else:
        weight = weight.as_subclass(Logging)
    Logging.seen.clear()
    with using:
        outputs = outputs_of(call(function, x, weight=weight))
    assert getattr(fusednorm, function) in Logging.seen
    for output, plain in zip(outputs, expected, strict=True):
        assert type(output) is Logging
        torch.testing.assert_close(output.as_subclass(torch.Tensor), plain)


@pytest.mark.parametrize("mode", [TorchFunctionMode, TorchDispatchMode], ids=["function", "dispatch"])
@BOTH
def test_modes_see_the_function_and_its_operators(function, mode, using):
    """What profilers and FLOP counters rely on: nothing is computed behind the dispatcher's back."""
    seen = []

    class Mode(mode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

        __torch_dispatch__ = __torch_function__

    with using, Mode():
        call(function, torch.ones(3, 7), weight=torch.ones(7))
    if mode is TorchFunctionMode:
        assert getattr(fusednorm, function) in seen
    else:
        assert any("norm" in str(op) or "rsqrt" in str(op) for op in seen), seen


@BOTH
def test_subclass_may_replace_the_function(function):
    class Replacing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return "replaced"

    assert call(function, torch.randn(3, 7).as_subclass(Replacing)) == "replaced"


@pytest.mark.certifies("autocast")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", PLAIN)
def test_plain_norm_under_autocast_has_torchs_dtype_and_values(function, low, dtype, using, device):
    x, weight = torch.randn(4, 9, device=device, dtype=dtype), torch.randn(9, device=device, dtype=dtype)
    with torch.autocast(device, dtype=low):
        expected = TWINS[function](x, (9,), weight)
        with using:
            ours = call(function, x, weight=weight)
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected)


@pytest.mark.certifies("autocast")
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stream", [torch.float32, None], ids=["float32_stream", "default_stream"])
@pytest.mark.parametrize("function", FUSED)
def test_residual_form_under_autocast(function, stream, low, using, device):
    """`normed` in the autocast dtype; a float32 stream stays float32; gradients in the leaves' dtypes."""
    x = torch.randn(4, 9, device=device, dtype=low, requires_grad=True)
    residual = torch.randn(4, 9, device=device, requires_grad=True)
    weight = torch.randn(9, device=device, requires_grad=True)
    with using, torch.autocast(device, dtype=low):
        normed, z = call(function, x, residual, weight=weight, residual_dtype=stream)
    assert (normed.dtype, z.dtype) == (low, torch.float32)
    torch.testing.assert_close(z, residual + x.float())
    gradients = torch.autograd.grad((normed, z), (x, residual, weight), (torch.ones_like(normed), z.detach()))
    assert [g.dtype for g in gradients] == [low, torch.float32, torch.float32]


@BOTH
def test_inference_mode_and_no_grad(function, using):
    x, weight = torch.randn(3, 7), torch.randn(7, requires_grad=True)
    with using, torch.inference_mode():
        outputs = outputs_of(call(function, x, weight=weight))
    with using, torch.no_grad():
        again = outputs_of(call(function, x, weight=weight))
    for one, other in zip(outputs, again, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
        assert not other.requires_grad


@BOTH
def test_inputs_are_left_untouched(function, using):
    tensors = {name: torch.randn(3, 7) for name in ("x", "residual")} | {"weight": torch.randn(7)}
    copies = copy.deepcopy(tensors)
    versions = {name: tensor._version for name, tensor in tensors.items()}
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    with using:
        outputs = outputs_of(call(function, tensors["x"], tensors["residual"], weight=tensors["weight"]))
        torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, copies[name])
        assert tensor._version == versions[name]


@pytest.mark.quick_on("automatic", "reference")  # the others' programs differ by a name in an op
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@BOTH
def test_export_with_a_dynamic_batch(function, strict, using):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(7))

        def forward(self, x):
            return (
                call(function, x, x * 2, weight=self.weight)
                if function in FUSED
                else call(function, x, weight=self.weight)
            )

    model = Model()
    with using:
        program = torch.export.export(
            model, (torch.randn(4, 7),), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=1)}}, strict=strict
        )
        written = program.module()
        for rows in (1, 4, 33):
            x = torch.randn(rows, 7)
            torch.testing.assert_close(written(x), model(x))


@pytest.mark.parametrize("epilogue", [{"dropout_p": 0.5, "seed": 1}, {"drop_path_p": 0.5, "seed": 1}, {}], ids=str)
@pytest.mark.parametrize("provider", ["reference", "cpu"])
def test_checkpoint_of_a_call_whose_normed_is_unused(provider, epilogue):
    """The backward asks for its saved tensors once: non-reentrant checkpointing refuses a second time."""
    if provider not in fusednorm.available_providers():
        pytest.skip("the native library is not built")
    leaves = [torch.randn(4, 8, requires_grad=True) for _ in range(2)]

    def stream(x, residual):
        return fusednorm.add_rms_norm(x, residual, 8, **epilogue)[1]

    with fusednorm.use_provider(provider):
        expected = torch.autograd.grad(stream(*leaves).square().sum(), leaves)
        found = torch.autograd.grad(checkpoint(stream, *leaves, use_reentrant=False).square().sum(), leaves)
    for gradient, right in zip(found, expected, strict=True):
        assert torch.equal(gradient, right)
