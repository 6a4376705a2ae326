"""Faults that users reported against other fused norms, as properties this package has. Each names the public report.

Reported faults that other files test: recompilation when the row count varies (flash-linear-attention#533,
xformers#1037; test_compile), the memory-efficient backward at zero weight (Fast-LLM#220; test_memory_efficient), double
backward refused (apex#410; test_transforms), another mask on checkpoint recomputation (OLMo-core#828; test_transforms),
a deferred launch error of zero rows (flash-attention#1620; the empty shapes of norm/test_norm). Those that need a GPU
are in test_norm_gpu.
"""

from __future__ import annotations

import functools
import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, Call, check
from shapes import FUSED, PLAIN, Shape, affine, inputs, outputs_of, random_leaves

import fusednorm
from fusednorm import dispatch
from tests.helpers.dispatching import unavailable

BOTH = pytest.mark.parametrize("function", PLAIN + FUSED)


def call(function, x, *parameters, **options):
    args = (x, torch.zeros_like(x)) if function in FUSED else (x,)
    return outputs_of(getattr(fusednorm, function)(*args, x.shape[-1:], *parameters, **options))


SHAPES = [
    # flash-attention#295, #144, apex#403: a list of supported widths
    *(((2, width), torch.bfloat16) for width in (6145, 12288, 12289, 16385, 32768, 65537)),
    # flash-attention#781: the weight gradient of a 1-D input was uninitialized memory
    *(((64,), torch.float32), ((1, 64), torch.float32)),
    # FlagGems#5392: wrong and out of bounds from rank 3 on
    *(((*(2, 3, 2, 1, 2)[:lead], 10), torch.float32) for lead in range(6)),
]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
@BOTH
def test_no_shape_is_refused(function, shape, dtype, using, device, interpreted, generator):
    if interpreted and shape[-1] > 17_000:
        pytest.skip("the interpreter takes minutes; 16385 columns take the same path")
    leaves = random_leaves(Shape("", shape), inputs(function), dtype, device, generator)
    with using:
        check(Call(function), leaves, generator)


# Liger-Kernel#945: atomics; also the promise of the default backward
@pytest.mark.certifies("deterministic")
@BOTH
def test_backward_is_bit_identical_from_run_to_run(function, using, device):
    x = torch.randn(301, 129, device=device, requires_grad=True)
    parameters = [torch.randn(129, device=device, requires_grad=True) for _ in affine(function)]
    options = {"dropout_p": 0.1, "seed": 1} if function in FUSED else {}
    cotangents = [torch.randn(301, 129, device=device) for _ in range(2)]

    def run():
        outputs = call(function, x, *parameters, **options)
        grads = torch.autograd.grad(outputs, (x, *parameters), cotangents[: len(outputs)])
        return [*outputs, *grads]

    with using:
        first = run()
        for _ in range(4):
            assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))


@pytest.mark.certifies("batch-invariant")
@pytest.mark.parametrize("function", FUSED)
def test_a_row_does_not_depend_on_the_batch_around_it(function, provider, using, device):
    if provider == "automatic":
        pytest.skip("automatic choice may depend on the row count; the promise is a fixed provider's")
    many = [((517, 100), dtype) for dtype in DTYPES if device == "cpu"]
    for shape, dtype in (((37, 130), torch.float32), *many):
        x, residual = torch.randn(2, *shape, device=device).to(dtype)
        weight = torch.randn(shape[1], device=device).to(dtype)
        norm = functools.partial(getattr(fusednorm, function), normalized_shape=shape[1:], weight=weight)
        with using:
            whole = norm(x, residual)
            for rows in (slice(0, 1), slice(1, 2), slice(5, 12), slice(300, 301), slice(shape[0] - 1, shape[0])):
                part = norm(x[rows], residual[rows])
                assert all(torch.equal(one[rows], other) for one, other in zip(whole, part, strict=True))


# pytorch#166005, Liger-Kernel: mean and rstd stored in the input's 16 bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_statistics_of_16_bit_input_are_float32(rms, dtype, provider, device):
    provider = "reference" if provider == "automatic" else provider
    x = (torch.randn(5, 40, device=device) + 3).to(dtype)
    stats = torch.ops.fusednorm.add_layer_norm_fwd(
        *(x, None, None, None, None, None, None, 1, 1e-5, 0.0, 0.0, dtype, dtype, rms, False, False, provider)
    )[2]
    wide = x.double()
    variance = wide.square().mean(1) if rms else wide.var(1, correction=0)
    expected = [] if rms else [wide.mean(1)]
    expected = torch.stack([*expected, (variance + 1e-5).rsqrt()])
    assert stats.dtype == torch.float32
    # float32 sums over a row: the square root of its length in roundings of 6e-8
    torch.testing.assert_close(stats.double(), expected, rtol=2e-6, atol=1e-6)


# pytorch#177163: E[x^2] - E[x]^2 drifts where the mean is large
@pytest.mark.parametrize("mean", [1e2, 1e4, -3e5])
@pytest.mark.parametrize("function", ["layer_norm", "add_layer_norm"])
def test_variance_under_a_large_mean(function, mean, using, device, generator):
    leaves = random_leaves(Shape("", (6, 200)), inputs(function), torch.float32, device, generator)
    leaves["x"] = leaves["x"] + mean
    with using:
        check(Call(function), leaves, generator)


# pytorch#173793: NaN where eager is finite
@pytest.mark.parametrize("magnitude", [1e15, 1e18, 1e30, 1e37, 3e38])
@BOTH
def test_finite_wherever_eager_is_finite(function, magnitude, using, device):
    twin = F.rms_norm if "rms" in function else F.layer_norm
    x = (torch.rand(4, 100, device=device) * 2 - 1) * magnitude
    x[1] = magnitude  # a constant row, at whose sum float32 overflows
    eager = twin(x, (100,))
    with using:
        ours = call(function, x)[0]
    finite = eager.isfinite()
    assert ours[finite].isfinite().all(), f"{int((~ours[finite].isfinite()).sum())} elements are not finite"


# quack#52, #53: lanes past an odd width entered the variance; the residual gradient with an output unused
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("width", [1, 3, 5, 127, 129, 1023])
@pytest.mark.parametrize("function", FUSED)
def test_odd_widths_with_every_set_of_outputs_used(function, width, used, using, device, generator):
    leaves = random_leaves(Shape("", (3, width)), inputs(function), torch.float32, device, generator)
    with using:
        check(Call(function), leaves, generator, used)


def layouts(dtype: torch.dtype, device: str):
    """Every permutation of a 3-D tensor, each dimension whole, stepped or cut out of a larger one, or expanded."""
    for order in itertools.permutations(range(3)):
        for cuts in itertools.product(("whole", "step", "slice"), repeat=3):
            sizes = [{"whole": n, "step": 2 * n, "slice": n + 3}[c] for n, c in zip((2, 3, 9), cuts, strict=True)]
            stored = torch.randn([sizes[i] for i in order], device=device).to(dtype)
            view = stored.permute([order.index(i) for i in range(3)])
            slices = {"whole": slice(None), "step": slice(None, None, 2), "slice": slice(2, -1)}
            yield view[tuple(slices[c] for c in cuts)]
    yield torch.randn(3, 9, device=device).to(dtype).expand(2, 3, 9)
    yield torch.randn(2, 1, 9, device=device).to(dtype).expand(2, 3, 9)
    yield torch.randn(1, device=device).to(dtype).expand(2, 3, 9)


# unsloth#10617: 254 of 472 layouts wrong; LightLLM#1467, vllm#36551: the last stride honoured in one pass only
@pytest.mark.certifies("strided")
@pytest.mark.parametrize(
    ("function", "dtype"),
    [(name, (torch.float32, torch.bfloat16)[i % 2]) for i, name in enumerate((*PLAIN, *reversed(FUSED)))],
    ids=str,
)
def test_every_layout_gives_what_a_contiguous_copy_gives(function, dtype, using, device, interpreted):
    weight = torch.randn(9, device=device).to(dtype)
    cotangents = [torch.randn(2, 3, 9, device=device).to(dtype) for _ in range(2)]
    chosen = list(layouts(dtype, device))
    assert len(chosen) == 165
    with using:
        for x in chosen[:: 12 if interpreted else 1]:
            results = []
            for given in (x.detach(), x.detach().contiguous()):
                leaf = given.requires_grad_()
                outputs = call(function, leaf, weight)
                results.append([*outputs, *torch.autograd.grad(outputs, leaf, cotangents[: len(outputs)])])
            for strided, contiguous in zip(*results, strict=True):
                torch.testing.assert_close(
                    strided, contiguous, msg=lambda m, x=x: f"shape {tuple(x.shape)} strides {x.stride()}: {m}"
                )


# LightLLM#1467: gradients reach the slice of a fused projection, and nothing beside it
@BOTH
def test_gradient_of_a_slice_stays_in_the_slice(function, using, device):
    projection = torch.randn(5, 3, 24, device=device, requires_grad=True)
    with using:
        outputs = call(function, projection[:, 1])
        torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
    assert projection.grad[:, 1].abs().sum() > 0
    assert not projection.grad[:, (0, 2)].any()


# apex#411, #1866: affine off broken, wrong from 65536 rows on
@pytest.mark.parametrize("with_affine", [True, False], ids=["affine", "no_affine"])
@BOTH
def test_more_than_65536_rows(function, with_affine, using, device, interpreted, generator):
    rows = 1037 if interpreted else 65_537 + 70
    names = tuple(n for n in inputs(function) if with_affine or n in ("x", "residual"))
    leaves = random_leaves(Shape("", (rows, 3)), names, torch.float32, device, generator)
    with using:
        check(Call(function), leaves, generator)


# sglang#2258, Liger-Kernel: statistics of the unrounded sum beside a stored rounded one
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", FUSED)
def test_the_sum_is_rounded_before_its_statistics_are_taken(function, dtype, using, device):
    """A sum whose rounding moves every element: 256 + 1/8 becomes 256 in bfloat16."""
    x, residual = (torch.randn(64, 48, device=device).to(dtype) for _ in range(2))
    residual = residual * 64
    with using:
        normed, z = getattr(fusednorm, function)(x, residual, (48,))
    assert torch.equal(z, x + residual)
    exact = Call(function).exact
    rounded = exact({"x": z.double()}, dtype)[0]
    unrounded = exact({"x": x.double() + residual.double()}, dtype)[0]
    unit = torch.finfo(dtype).eps / 2
    assert ((normed.double() - rounded).abs() <= unit * rounded.abs() + 1e-6).all()
    assert ((unrounded - rounded).abs() > unit * rounded.abs() + 1e-6).any()  # the two could be told apart


# vllm#48324: float32 weights beside 16-bit input
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", FUSED)
def test_float32_weights_are_not_rounded_to_the_input_dtype(function, dtype, using, device):
    x = torch.randn(8, 32, device=device).to(dtype)
    weight = torch.full((32,), 1 + 2.0**-12, device=device)  # rounds to one in either 16-bit dtype
    with using:
        stream = getattr(fusednorm, function)(x.float(), None, (32,), weight)[0]
        normed = getattr(fusednorm, function)(x, None, (32,), weight)[0]
    assert normed.dtype == dtype
    torch.testing.assert_close(normed, stream.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


# Liger-Kernel#871: all zeros under compile; pytorch#128071: a misaligned pointer broke the graph
@pytest.mark.parametrize("function", ["layer_norm", "add_layer_norm"])
def test_compiled_on_a_misaligned_view_is_one_graph_with_the_eager_values(function, using, device):
    torch._dynamo.reset()
    storage = torch.randn(1 + 4 * 33, device=device)
    weight = torch.randn(33, device=device)
    with using:
        compiled = torch.compile(lambda x: call(function, x, weight), fullgraph=True, backend="aot_eager")
        for offset in (0, 1):
            x = storage[offset : offset + 4 * 33].view(4, 33)
            ours = compiled(x)
            torch.testing.assert_close(ours, call(function, x, weight))
            assert ours[0].abs().max() > 0.1


# Liger-Kernel#302, #392: patching that leaks
def test_importing_patches_nothing_of_torch():
    for function in (F.layer_norm, F.rms_norm, torch.nn.LayerNorm.forward, torch.nn.RMSNorm.forward):
        assert not function.__module__.startswith("fusednorm")
    assert type(torch.nn.LayerNorm(3)) is torch.nn.LayerNorm
    assert torch.nn.LayerNorm.__subclasses__().count(fusednorm.LayerNorm) == 1


# flash-attention#783, Liger-Kernel#323: slower than eager, bound by the host
@pytest.mark.alone
@pytest.mark.parametrize("function", PLAIN)
def test_plain_norm_on_torchs_own_operator_adds_at_most_2_microseconds(function, monkeypatch):
    """Where automatic choice on the CPU ends in the very operator that eager calls, what is left is the way to it.

    The operator is replaced by a stub for the measurement, because its own time varies by more than 2 us.
    """
    ours, eager = getattr(fusednorm, function), getattr(F, function)
    calls = []
    monkeypatch.setattr(torch, function, lambda x, *_: calls.append(1) or x)
    x, weight = torch.randn(4, 64), torch.randn(64, requires_grad=True)
    with unavailable("cpu"):
        pairs = [(_seconds(ours, x, weight), _seconds(eager, x, weight)) for _ in range(60)]
    assert len(calls) == 2 * 60 * 500
    over = min(pair[0] for pair in pairs) - min(pair[1] for pair in pairs)
    assert over <= 2e-6, f"{over * 1e6:.2f} us"


@pytest.mark.alone
@pytest.mark.skipif(
    dispatch.unavailable_reason("cpu") is not None, reason=f"provider cpu: {dispatch.unavailable_reason('cpu')}"
)
def test_native_rms_norm_is_no_slower_than_eager_on_tiny_rows():
    x, weight = torch.randn(4, 64), torch.randn(64)
    pairs = [(_seconds(fusednorm.rms_norm, x, weight), _seconds(F.rms_norm, x, weight)) for _ in range(20)]
    assert min(pair[0] for pair in pairs) <= min(pair[1] for pair in pairs)


def _seconds(function, x, weight):
    start = time.perf_counter()
    for _ in range(500):
        function(x, (64,), weight)
    return (time.perf_counter() - start) / 500
