"""Faults reported against other fused norms that show on a GPU only. Each names the public report."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, Call, check
from shapes import FUSED, PLAIN, Shape, inputs, outputs_of, random_leaves

import fusednorm

pytestmark = pytest.mark.gpu
ALONE = pytest.mark.alone
BOTH = pytest.mark.parametrize("function", PLAIN + FUSED)
MANY = 2**31 + 2**16  # elements: past every signed 32-bit offset


def call(function, x, *parameters, **options):
    args = (x, x) if function in FUSED else (x,)
    return outputs_of(getattr(fusednorm, function)(*args, x.shape[-1:], *parameters, **options))


def needs(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GiB of free GPU memory, {free:.0f} are there")


def other_gpu() -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return torch.device("cuda", 1)


def fastest_ms(run, repeats: int = 20) -> float:
    """Device time: the host has queued the call before the device comes to it."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


# Liger-Kernel#1303, #593, apex#1022, mamba#103
@BOTH
def test_tensors_on_a_gpu_that_is_not_the_current_one(function):
    device = other_gpu()
    torch.cuda.set_device(0)
    x = torch.randn(9, 130, device=device, requires_grad=True)
    weight = torch.randn(130, device=device, requires_grad=True)
    options = {"dropout_p": 0.5, "seed": 3} if function in FUSED else {}
    outputs = call(function, x, weight, **options)
    gradients = torch.autograd.grad(outputs, (x, weight), [torch.ones_like(o) for o in outputs])
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(device):
        again = call(function, x, weight, **options)
        expected = torch.autograd.grad(again, (x, weight), [torch.ones_like(o) for o in again])
    for one, other in zip((*outputs, *gradients), (*again, *expected), strict=True):
        assert one.device == device
        assert torch.equal(one, other)


# cuEquivariance#149: a scalar bound to device 0 when compiled
@pytest.mark.parametrize("function", FUSED)
def test_compiled_on_a_gpu_that_is_not_the_current_one(function):
    device = other_gpu()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(function, x, dropout_p=0.5), fullgraph=True)
    x = torch.randn(9, 130, device=device)
    assert all(output.device == device for output in compiled(x))


# Liger-Kernel#1483, #804, pytorch#181555, #181600, #184826, flashinfer#3391
@ALONE
@pytest.mark.parametrize("width", [1024, 2**16], ids=str)
@BOTH
def test_tensors_past_2_to_the_31_elements(function, width):
    """The last rows equal those rows alone, forward and backward; the weight's gradient is the sum of four parts'."""
    needs(10 * MANY * 2 / 2**30)
    rows = MANY // width
    x = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16)
    for start in range(0, rows, rows // 8 + 1):
        x[start : start + rows // 8 + 1].normal_()
    x.requires_grad_()
    weight = torch.randn(width, device="cuda", requires_grad=True)
    cotangent = x.detach().roll(1, 0)
    outputs = call(function, x, weight)
    gradient, dweight = torch.autograd.grad(outputs[0], (x, weight), cotangent)
    tail = x.detach()[-3:].clone().requires_grad_()
    alone = call(function, tail, weight)
    (expected,) = torch.autograd.grad(alone[0], tail, cotangent[-3:])
    torch.testing.assert_close(outputs[0][-3:], alone[0])
    torch.testing.assert_close(gradient[-3:], expected)
    in_parts = torch.zeros(width, device="cuda", dtype=torch.float64)
    for part, dy in zip(x.detach().chunk(4), cotangent.chunk(4)):
        in_parts += torch.autograd.grad(call(function, part, weight)[0], weight, dy)[0]
    torch.testing.assert_close(dweight.double(), in_parts, rtol=1e-4, atol=1e-4 * rows**0.5)


@ALONE
def test_dropout_mask_past_2_to_the_31_elements():
    needs(30)
    width = 2**15
    rows = MANY // width
    x = torch.ones(rows, width, device="cuda", dtype=torch.bfloat16)
    z = fusednorm.add_layer_norm(x, None, (width,), dropout_p=0.5, seed=9)[1]
    from oracle import keep_mask

    expected = keep_mask(2, width, 0.5, 9, first_row=rows - 2).cuda()
    assert torch.equal(z[-2:] != 0, expected)


# Liger-Kernel#945
@BOTH
def test_backward_is_bit_identical_from_run_to_run(function):
    x = torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1024, device="cuda", requires_grad=True)
    cotangents = [torch.randn_like(x) for _ in range(2)]

    def run():
        outputs = call(function, x, weight)
        return torch.autograd.grad(outputs, (x, weight), cotangents[: len(outputs)])

    first = run()
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))


# pytorch#150625: a launch that a new architecture refuses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 33, 128, 1000, 4096, 16384, 65537, 262144])
@BOTH
def test_every_width_and_dtype_launches_here(function, width, dtype, generator):
    leaves = random_leaves(Shape("", (4, width)), inputs(function), dtype, "cuda", generator)
    check(Call(function), leaves, generator)


@pytest.mark.parametrize("width", [64, 1024, 16384], ids=str)
@BOTH
def test_parameter_gradients_over_many_rows_a_program(function, width, generator):
    """A persistent program sums the gradients of several groups of rows before it writes them."""
    rows = 20_000 if width < 16384 else 3_000
    leaves = random_leaves(Shape("", (rows, width)), inputs(function), torch.bfloat16, "cuda", generator)
    check(Call(function), leaves, generator)


# flash-attention#1620: the launch error of an empty grid came up in a later call
@BOTH
def test_zero_rows_leave_no_error_behind(function):
    x = torch.empty(0, 64, device="cuda", requires_grad=True)
    outputs = call(function, x)
    torch.autograd.grad(outputs, x, [torch.ones_like(o) for o in outputs])
    torch.cuda.synchronize()
    torch.testing.assert_close(torch.ones(3, device="cuda").sum().item(), 3.0)


# triton.jit compiles another variant for a row count that is 1 or a multiple of 16
@pytest.mark.parametrize("function", FUSED)
def test_row_counts_compile_nothing_anew(function, monkeypatch):
    from fusednorm.providers.triton import launch as triton_launch
    from fusednorm.providers.triton import norm as triton_norm

    compiled = []
    compile_kernel = triton_launch.compile_kernel
    monkeypatch.setattr(triton_launch, "compile_kernel", lambda *a, **k: compiled.append(a) or compile_kernel(*a, **k))
    triton_norm.forget_variants()
    counts = []
    for rows in (1, 16, 17, 4096):
        x = torch.randn(rows, 1024, device="cuda", requires_grad=True)
        with fusednorm.use_provider("triton"):
            outputs = call(function, x, torch.ones(1024, device="cuda", requires_grad=True))
            torch.autograd.grad(outputs, x, [torch.ones_like(o) for o in outputs])
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts == counts[:1] * 4


@BOTH
def test_runs_on_the_current_stream(function):
    """What a side stream computes is complete once that stream is, without the default stream's help."""
    x = torch.randn(4096, 1024, device="cuda")
    expected = call(function, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        scaled = x * 1.0
        torch.cuda._sleep(20_000_000)
        scaled = scaled + 0.0
        outputs = call(function, scaled)
    stream.synchronize()
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("function", FUSED)
def test_cuda_graph_replay_draws_a_new_mask(function):
    x = torch.ones(64, 256, device="cuda")
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        call(function, x, dropout_p=0.5)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = call(function, x, dropout_p=0.5)[1]
    graph.replay()
    first = z.clone()
    graph.replay()
    assert not torch.equal(first, z)


# flash-attention#783, Liger-Kernel#323, flashinfer#2771
@ALONE
@pytest.mark.parametrize("rows", [1, 16, 128, 2048, 32768], ids=str)
@pytest.mark.parametrize("function", PLAIN)
def test_plain_norm_is_never_slower_than_eager(function, rows):
    """5%: what the fastest of twenty event timings of one and the same kernel differ by, and event resolution."""
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # poisoned outputs cost a pass over memory
    ours = fastest_ms(lambda: getattr(fusednorm, function)(x, (4096,), weight))
    eager = fastest_ms(lambda: getattr(F, function)(x, (4096,), weight))
    assert ours <= 1.05 * eager + 0.002, f"{ours:.4f} ms against eager's {eager:.4f}"
