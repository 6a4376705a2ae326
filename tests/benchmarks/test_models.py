"""The benchmark's models, statistics, sweeps and baselines: bytes, FLOPs, the roofline, the interval of a median."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baselines, cases, measure
from benchmarks.cases import OPS, Case

# Counted by hand for 4 rows of 64, in elements of the tensor T = 4 * 64; a matrix is 64 * 64.
T, MATRIX = 4 * 64, 64 * 64
LAYERS = {  # forward, backward
    # what stands between two matrix products is one kernel; q, k, v and the projection are 4 matrices, the block 8
    "encoder_layer": (
        (4 + 4 + 2 + 3 + 5 + 8 + 5 + 3) * T + 12 * MATRIX,
        (8 + 8 + 4 + 4 + 10 + 12 + 10 + 4) * T + 24 * MATRIX,
    ),
    # three norms and adds of 2, 4 and 3 tensors instead of two of 3; their gradients 4, 5 and 2 instead of 4 and 4
    "encoder_layer_pre_norm": (
        (4 + 4 + 2 + 5 + 8 + 5 + 9) * T + 12 * MATRIX,
        (8 + 8 + 4 + 10 + 12 + 10 + 11) * T + 24 * MATRIX,
    ),
    # a second attention: queries, keys and values, attention, projection, norm
    "decoder_layer": (
        (34 + 2 + 3 + 4 + 2 + 3) * T + 16 * MATRIX,
        (60 + 4 + 6 + 8 + 4 + 4) * T + 32 * MATRIX,
    ),
}


def moved(op, shape, itemsize):
    return [op.bytes_moved(shape, itemsize, direction) for direction in cases.DIRECTIONS]


@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.family == "layer"], ids=lambda op: op.name)
def test_byte_model_of_a_layer(op, itemsize):
    forward, backward = (elements * itemsize for elements in LAYERS[op.name])
    assert moved(op, (1, 4, 64), itemsize) == [forward, backward, forward + backward]


@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.family != "layer"], ids=lambda op: op.name)
def test_byte_model_counts_each_tensor_once(op, itemsize):
    """The model of every direction against the tensors themselves, at a shape where nothing cancels."""
    shape = (2, 8, 3, 5) if op.family == "attention" else (6, 40)
    leaves = {name: torch.randn(size, requires_grad=True) for name, size in op.inputs(shape).items()}
    outputs = op.eager(leaves)()
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [torch.randn(shape) for _ in outputs])

    def size(tensors):
        return sum(itemsize * t.numel() for t in tensors)

    forward = size(leaves.values()) + size(outputs)
    shared = statistics = 0
    if isinstance(op, cases.Norm):
        shared = itemsize * 240 if op.add and not op.epilogue else 0  # one gradient for both operands
        statistics = 6 * 4 * (1 if op.rms else 2)
    kept = itemsize * (240 + 40)  # the stream and the weight, or x and the bias
    if op.family == "attention":
        statistics = 48 * 4
        kept = forward  # the operands and the output
    backward = size(outputs) + kept + statistics + size(gradients) - shared
    assert moved(op, shape, itemsize) == [forward, backward, forward + statistics + backward]


def test_flop_model():
    counted = {
        op: [Case(op, (2, 8), "float32", d).flops // 16 for d in cases.DIRECTIONS]
        for op in OPS
        if OPS[op].family not in ("attention", "layer")
    }
    assert counted["layer_norm"] == [7, 13, 20]
    assert counted["rms_norm"] == [4, 9, 13]
    assert counted["add_layer_norm"] == [8, 14, 22]
    assert counted["bias_dropout_add_layer_norm"] == [10, 16, 26]
    assert counted["bias_dropout_add_rms_norm"] == [7, 12, 19]
    assert counted["bias_relu"] == [2, 4, 6]
    assert counted["bias_gelu_dropout"] == [7, 14, 21]
    assert counted["bias_gelu_tanh"] == [10, 20, 30]
    assert counted["bias_silu"] == [4, 10, 14]


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.family == "layer"], ids=lambda op: op.name)
def test_flop_model_of_a_layer_is_what_torch_counts(op):
    """But for two differences: torch computes the pairs that causality masks, and keeps the logits."""
    shape = batch, length, width = 2, 6, 128
    leaves = {name: torch.randn(size, requires_grad=True) for name, size in op.inputs(shape).items()}
    call = op.eager(leaves)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            (out,) = call()
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(out, list(leaves.values()), torch.randn(shape))
    masked = batch * length * (length - 1) // 2 * width if op.decoder else 0
    pairs = batch * length**2 * width * (2 if op.decoder else 1)
    assert op.flops(shape, "forward") == forward.get_total_flops() - 4 * masked
    assert op.flops(shape, "backward") == backward.get_total_flops() + 2 * pairs - 10 * masked
    assert op.flops(shape, "both") == op.flops(shape, "forward") + op.flops(shape, "backward")


def test_median_interval_covers_the_median():
    assert measure.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert measure.median_interval(list(range(9))) == (1, 7)  # 2 P(Binomial(9, 1/2) <= 1) = 0.039, <= 2 is 0.18
    missed = 0
    for draw in torch.randn(2000, 15, generator=torch.Generator().manual_seed(0)).tolist():
        missed += not measure.median_interval(draw)[0] <= 0.0 <= measure.median_interval(draw)[1]
    assert 0 < missed / 2000 < 0.05


def test_roofline_interpolates_and_takes_the_binding_limit():
    roofline = measure.Roofline(((100, 1e-6), (10_000, 1e-5)), {"float32": 1e9})
    assert roofline.copy_seconds(10) == 1e-6
    assert roofline.copy_seconds(1000) == pytest.approx(10**-5.5)
    assert roofline.copy_seconds(20_000) == pytest.approx(2e-5)
    assert roofline.seconds(100, 10, torch.float32) == 1e-6
    assert roofline.seconds(100, 5000, torch.float32) == pytest.approx(5e-6)


# --- sweeps and baselines ---


def test_every_sweep_has_the_tiny_case_and_unique_names():
    for (device, level), sweep in cases.SWEEPS.items():
        names = [case.name for case in cases.sweep(device, level)]
        assert len(set(names)) == len(names)
        for op, operation in sweep.operations().items():
            sizes = [n.rsplit("/", 1)[1] for n in names if n.startswith(f"{op}/")]
            tiny = {"attention": "1x4x16x16", "layer": "2x8x64"}.get(operation.family, "4x64")
            assert tiny in sizes or level == "grid"
    assert set(cases.SWEEPS["cpu", "grid"].operations()) == set(OPS) > set(cases.SWEEPS["cpu", "full"].operations())
    shapes = cases.SWEEPS["cpu", "default"].shapes + cases.SWEEPS["cuda", "default"].shapes
    assert [(min(sizes), max(sizes)) for sizes in zip(*shapes)] == [(1, 65536), (64, 262144)]


def test_operations_of_a_feed_forward_block_have_shapes_of_their_own():
    for sweep in cases.SWEEPS.values():
        shapes = {case.shape for case in sweep.cases() if case.op == "bias_relu"}
        assert shapes == set(sweep.ffn_shapes)
    assert (1, 4096) not in {case.shape for case in cases.sweep("cpu", "default") if case.op == "bias_relu"}


def test_baselines_apply_to_operations_of_their_kind():
    applied = {op.family: {n for n in baselines.BASELINES if baselines.applies(n, op)} for op in OPS.values()}
    torchs = {"eager", "compile", "compile-max-autotune"}
    assert applied["feed_forward"] == applied["layer"] == torchs
    assert applied["norm"] == torchs | {"liger_kernel", "quack", "fla", "flash_attn"}
    assert applied["attention"] == torchs | {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math"}


def test_a_forced_backend_of_attention_is_that_one_or_refuses():
    """On the CPU torch has two of them; none serves in another's name."""
    op = OPS["attention_causal"]
    leaves = {key: torch.randn(size, requires_grad=True) for key, size in op.inputs((1, 2, 8, 16)).items()}
    nodes = {name: baselines.BASELINES[name][1](op, leaves) for name in baselines.ATTENTION}
    assert "FlashAttention" in nodes["sdpa-flash"]()[0].grad_fn.name()
    assert "FlashAttention" not in nodes["sdpa-math"]()[0].grad_fn.name()
    for absent in ("sdpa-cudnn", "sdpa-efficient"):
        with pytest.raises(RuntimeError, match="No viable backend"):
            nodes[absent]()


@pytest.mark.parametrize("name", [op.name for op in OPS.values() if op.family == "attention"])
def test_attention_sees_the_pairs_that_its_model_counts(name):
    op, shape = OPS[name], (3, 4, 150, 8)
    query = torch.randn(shape)
    seen = torch.ones(3, 150, 150, dtype=torch.bool)
    if op.causal:
        seen = seen.tril()
    mask = op.attn_mask(query)
    if mask is not None:
        seen = seen & mask.reshape(-1, mask.shape[-2], 150)
    assert op.pairs(shape) == seen.sum()
    # two products forward and five backward, of 2 * 8 for each of the pairs of 4 heads
    assert [op.flops(shape, direction) for direction in cases.DIRECTIONS] == [
        n * 16 * 4 * seen.sum() for n in (2, 5, 7)
    ]
