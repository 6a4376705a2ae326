"""The CUDA library's host code is called for every operator, on GPUs that are not there (tests/helpers/standin.py)."""

from __future__ import annotations

import ctypes
import re
from functools import partial
from typing import Any

import emulated
import launched_cuda
import pytest
import standin
import torch
from launched import EPS, Known, Step, activation, norm, proves
from launched_cuda import Launch, modulated, strided

from tools.codegen.cuda import NVCC

pytest.importorskip("triton")  # whose package has CUDA's headers
pytestmark = [
    pytest.mark.skipif(emulated.compiler() is None or NVCC is None, reason="needs g++ and nvcc"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA operators, for GPUs that are there"),
]

F16, F32, F64 = torch.float16, torch.float32, torch.float64
BIASED, SCALED = "weight bias", "weight x_bias layer_scale"
EPILOGUE = {"dropout_p": 0.75, "drop_path_p": 0.5}  # words past 2**31
WIDE, WIDEST = 2**14, 2**17  # of float32: a cluster's row, and one that no cluster holds
CALLS = {
    "layer_norm": (norm, {"function": "layer_norm", "vectors": BIASED, "dtype": F16}),
    "layer_norm_without_parameters": (norm, {"function": "layer_norm", "vectors": ""}),
    "layer_norm_unaligned": (norm, {"function": "layer_norm", "vectors": BIASED, "offset": 1}),
    "rms_norm": (norm, {"function": "rms_norm", "vectors": "weight", "dtype": F64}),
    "add_layer_norm": (norm, {"function": "add_layer_norm", "vectors": f"{SCALED} bias", **EPILOGUE}),
    "add_rms_norm": (norm, {"function": "add_rms_norm", "vectors": "weight", "residual_dtype": F32}),
    "zero_centered": (strided, {"dtype": F32, "zero_centered_weight": True, "width": 33, "dropout_p": 0.75}),
    "memory_efficient": (norm, {"function": "add_rms_norm", "vectors": "weight", "memory_efficient": True}),
    "odd": (norm, {"function": "add_layer_norm", "vectors": BIASED, "dtype": F32, "width": 77}),
    "cluster": (norm, {"function": "add_layer_norm", "vectors": BIASED, "dtype": F32, "width": WIDE}),
    "slabs": (norm, {"function": "add_rms_norm", "vectors": SCALED, "dtype": F32, "width": WIDEST, "dropout_p": 0.5}),
    "strided": (strided, {"dtype": F32}),
    "modulated": (modulated, {"dtype": F32, "function": "add_layer_norm", "drop_path_p": 0.5}),
    "modulated_cluster": (modulated, {"dtype": F32, "function": "add_layer_norm", "width": WIDE}),
    "modulated_slabs": (modulated, {"dtype": F32, "function": "add_layer_norm", "width": WIDEST}),
    "bias_act_dropout": (activation, {"p": 0.75}),
    "bias_act": (activation, {"dtype": F64}),
    "act": (activation, {"vectors": "", "dtype": F16}),
}
# What the library makes for itself, and how it divides rows.
OWN = {"seed", "stats", "sums", "partials", "programs", "tiles", "tile_scale", "ranks_log2", "rounds"}
OWN |= {"blocks_per_sample", "lanes"}
DTYPES = (F64, F32, torch.bfloat16, F16)  # as csrc/common/data.h numbers them
MANGLED = {F16: "NS_7Float16E", F32: "f", F64: "d", torch.bfloat16: "NS_8BFloat16E"}
PARAMETERS = ("weight", "bias", "x_bias", "layer_scale")
FINALIZE = ("sum_partials_kernel", "sum_sample_partials_kernel")
GROUPED = 128  # multiprocessors of cuda:0 that clusters find, by the stand-in


@pytest.fixture(scope="module")
def gpus():
    with standin.process(cuda_library=True) as pool:
        pool.submit(launched_cuda.alike).result(600)
        yield lambda *call, **options: pool.submit(*call, **options).result(600)


def rows(name: str, tensor: Known) -> dict[str, int]:
    """Strides in bytes; dimensions that one stride addresses are one."""
    folded: list[tuple[int, int]] = []
    for size, elements in zip(tensor.shape[:-1], tensor.strides[:-1]):
        stride = elements * tensor.itemsize
        if folded and folded[-1][1] == size * stride:
            size *= folded.pop()[0]
        folded.append((size, stride))
    known = {f"{name}.data": tensor.address, f"{name}.stride": folded[-1][1]}
    return known if len(folded) == 1 else known | {f"{name}.outer": folded[0][1], f"{name}.inner": folded[1][0]}


def expected(step: Step, launch: Launch, options: dict[str, Any]) -> dict[str, Any]:
    """A kernel's struct, as far as the caller knows what stands in it. What he does not give is null."""
    tensors, x = step.tensors, step.tensors["x"]
    wanted, n = [name for name in PARAMETERS if name in tensors], x.shape[-1]
    known: dict[str, Any] = {name: tensor.address for name, tensor in tensors.items()}
    known |= {"n_rows": step.numbers["M"], "n_columns": n, "share": ctypes.c_float(1 / n).value, "eps": EPS}
    known |= {"rows_per_sample": x.shape[1] if len(x.shape) == 3 else 1, "rms": "rms" in options.get("function", "rms")}
    known |= {
        "saved_is_normed": options.get("memory_efficient"),
        "activation": 1,
        "z": known.get("residual_out"),
    }  # gelu
    known |= {"zero_centered": options.get("zero_centered_weight"), "residual_is_narrow": "residual_dtype" in options}
    for name, p in {"element": options.get("p", options.get("dropout_p")), "path": options.get("drop_path_p")}.items():
        if p:
            known |= {f"{name}.on": True, f"{name}.threshold": int(p * 2**32)}
        known[f"{name}.scale"] = 1 / (1 - (p or 0))
    of_rows = {name: tensors[name] for name in ("x", "residual", "dnormed", "dresidual_out", "dy") if name in tensors}
    of_rows["saved"] = tensors["normed"] if known["saved_is_normed"] else tensors.get("residual_out", x)
    if "norm_bwd" in launch.kernel and "layer_scale" not in tensors:  # which alone needs it
        del of_rows["x"]
    for name, tensor in of_rows.items():
        known |= rows(name, tensor)
    for name in PARAMETERS:
        known |= {f"{name}.data": known.get(name), f"d{name}": wanted.index(name) if name in wanted else -1}
    each = {name: tensors[name].strides[0] for name in wanted if len(tensors[name].shape) > 1}
    known |= {f"{name}.stride": stride for name, stride in each.items()}
    known |= {"samples": x.shape[0], "each": sum(1 << wanted.index(name) for name in each)}
    if known.get("dresidual") == known["dx"]:  # without an epilogue one gradient is both
        known["dresidual"] = None
    known["gradient"] = [*(tensors[f"d{name}"].address for name in wanted), None, None, None, None][:4]
    known["dtype"] = [DTYPES.index(dtype_of(options))] * len(wanted) + [0] * (4 - len(wanted))
    return {name: known.get(name) or type(value)() for name, value in launch.given.items() if name not in OWN}


def dtype_of(options: dict[str, Any]) -> torch.dtype:
    return options.get("dtype", torch.bfloat16)


def check_division(launch: Launch, step: Step) -> None:
    """Threads and turns cover the rows and columns, and none is idle as a whole."""
    given, (grid_x, grid_y, _), (threads, block_y, _) = launch.given, launch.note.grid, launch.note.block
    n, m, cluster, vector = given["n_columns"], step.numbers["M"], launch.note.cluster, 16 // step.tensors["x"].itemsize
    assert launch.note.early == (launch.kernel in FINALIZE)
    if given.get("blocks_per_sample") and "sums" not in launch.kernel:  # each sample has these to itself
        samples = step.tensors["x"].shape[0]
        assert grid_x == samples * given["blocks_per_sample"]
        m, grid_x = m // samples, given["blocks_per_sample"]
    if launch.kernel in FINALIZE:
        backward = step.launches[-2]
        if "lanes" in given:
            assert 1 <= given["lanes"] <= block_y and block_y % given["lanes"] == 0
            side_by_side, across = block_y // given["lanes"], -(-n // threads)
            assert grid_x == across * -(-given["samples"] // side_by_side)
            grid_x = across
        assert (grid_x - 1) * threads < n <= grid_x * threads
        assert grid_y == sum(gradient is not None for gradient in given["gradient"])
        assert (given["programs"], given["partials"]) == (backward.note.grid[1], backward.given["partials"])
    elif launch.kernel == "add_layer_norm_fwd_kernel":
        chunks = re.search(r"Li(\d)E", launch.template)
        assert chunks is not None
        tile = cluster * threads * vector * int(chunks[1])
        assert cluster == 1 << given["ranks_log2"]
        assert (given["tiles"] - 1) * tile < n <= given["tiles"] * tile
        assert (grid_x // cluster - 1) * block_y < m <= grid_x // cluster * block_y and grid_y == 1
        assert 1 / given["tile_scale"] / 2 < min(n, tile) <= 1 / given["tile_scale"]
    elif launch.kernel == "add_layer_norm_bwd_sums_kernel":
        assert (grid_x, grid_y, block_y) == (m, 1, 1)
    else:
        assert (grid_x - cluster) * threads * vector < n <= grid_x * threads * vector
        assert (grid_y - 1) * block_y < m
        if cluster > 1:
            most = min(m, GROUPED // cluster)
            assert grid_x == cluster and (grid_y <= most if given["blocks_per_sample"] else grid_y == most)
        rounds = given.get("rounds")
        assert rounds is None or (rounds - 1) * grid_y * block_y < m <= rounds * grid_y * block_y


def check(step: Step, options: dict[str, Any], device: int = 0) -> None:
    first, dtype = step.launches[0].given, dtype_of(options)
    op, has_sums = (
        "bias_act_dropout" if "y" in step.tensors else "add_layer_norm",
        not step.tensors.keys().isdisjoint(PARAMETERS),
    )
    names = [f"{op}_fwd", *(["add_layer_norm_bwd_sums"] if options.get("width") == WIDEST else []), f"{op}_bwd"]
    sampled = any(len(step.tensors[name].shape) > 1 for name in PARAMETERS if name in step.tensors)
    names += ["sum_sample_partials" if sampled else "sum_partials"] if has_sums else []
    assert [launch.kernel for launch in step.launches] == [f"{name}_kernel" for name in names]
    for launch in step.launches:
        given = launch.given
        assert (launch.note.device, launch.note.stream) == (device, standin.STREAMS[device])
        assert given == given | expected(step, launch, options)
        check_division(launch, step)
        if launch.kernel in FINALIZE:
            assert launch.template == ("d" if dtype is F64 else "f")
            continue
        assert launch.template.startswith(MANGLED[dtype])
        assert given["seed"] == first["seed"] and given.get("stats") == first.get("stats") != 0
        assert bool(given["seed"]) == (given["element.on"] or given.get("path.on", False))
        if "partials" in given:
            assert (bool(given["partials"]), bool(given.get("sums"))) == (has_sums, len(names) == 4)


@pytest.mark.parametrize("fastpath", [True, False])
@pytest.mark.parametrize(
    ("call", "options"),
    [pytest.param(*call, id=n, marks=proves(*call, "cuda", "forward", "backward")) for n, call in CALLS.items()],
)
def test_what_is_launched(gpus, call, options, fastpath):
    check(gpus(launched_cuda.step, call, fastpath=fastpath, **options), options)


def test_long_rows_take_a_cluster_and_longer_ones_slabs(gpus):
    forms = {n: gpus(launched_cuda.step, norm, **CALLS[n][1]).launches for n in ("odd", "cluster", "slabs")}
    assert [[launch.note.cluster for launch in launches] for launches in forms.values()] == [
        [1] * 3,
        [2, 8, 1],
        [8, 1, 1, 1],
    ]


@pytest.mark.parametrize("fastpath", [True, False])
@pytest.mark.parametrize(("current", "device"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("call", ["add_layer_norm", "bias_act_dropout"])
def test_launch_goes_to_the_device_of_the_tensors(gpus, call, current, device, fastpath):
    function, options = CALLS[call]
    gpus(standin.current_device, current)
    try:
        check(gpus(launched_cuda.step, function, device=device, fastpath=fastpath, **options), options, device)
        assert gpus(standin.current_device) == current
    finally:
        gpus(standin.current_device, 0)


@pytest.mark.parametrize(
    ("function", "calls", "text"),
    [
        ("cuLaunchKernelEx", 0, r"launch of .*add_layer_norm_fwd_kernel<float, float, .*>.*: too many resources"),
        ("cuLaunchKernelEx", 1, r"launch of .*add_layer_norm_bwd_kernel<float, float, .*>.*: too many resources"),
        ("cuLaunchKernelEx", 2, r"launch of .*sum_partials_kernel<float>.*: too many resources"),
        ("aten::empty_strided", 6, r"out of memory: no tensor of shape \(6, 64\), 1536 bytes, could be made"),
        ("aten::empty_strided", 11, r"out of memory: no tensor of shape \(6, 64\), 1536 bytes, could be made"),
    ],
)
def test_error_is_named_and_the_next_call_is_served(gpus, function, calls, text):
    """And the device that was current is so again."""
    call, options = CALLS["add_layer_norm"]
    options = options | {"dtype": F32, "device": 1}
    gpus(launched_cuda.step, call, **options)
    gpus(standin.fail, function, calls)
    with pytest.raises(RuntimeError, match=text):
        gpus(launched_cuda.step, call, **options)
    assert gpus(standin.current_device) == 0
    check(gpus(launched_cuda.step, call, **options), options, device=1)


def test_shared_memory_is_asked_for_once_for_each_kernel_and_device(gpus):
    """Again where it was refused, and for more."""
    options = {"function": "add_layer_norm", "vectors": BIASED, "dtype": F64}  # with a form of its own
    for device, width, asked in [(0, 4096, 1), (0, 2048, 0), (0, 4096, 0), (1, 4096, 1)]:
        gpus(standin.fail, "cuFuncSetAttribute", 0)
        call = partial(gpus, launched_cuda.step, norm, width=width, device=device, **options)
        if asked:
            with pytest.raises(RuntimeError, match=r"^shared memory: out of memory$"):
                call()
        check(call(), options, device)


CAPTURED = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "modulated", "bias_act_dropout")


@pytest.mark.parametrize(
    ("call", "options"),
    [pytest.param(*CALLS[name], id=name, marks=proves(*CALLS[name], "cuda", "CUDA graph")) for name in CAPTURED],
)
def test_while_capturing_what_is_loaded_is_launched(gpus, call, options):
    gpus(launched_cuda.step, call, **options)
    gpus(standin.capture, True)
    try:
        check(gpus(launched_cuda.step, call, **options), options)
    finally:
        gpus(standin.capture, False)


def test_gpu_where_no_kernel_runs_is_refused_and_nothing_is_left_of_the_error():
    with standin.process(cuda_library=True) as pool:
        gpus = lambda *call: pool.submit(*call).result(600)  # noqa: E731
        for device, text in (0, "out of memory"), (1, "no kernel image is available"):
            if device == 0:
                gpus(standin.fail, "cuModuleLoadData", 0)
            said, *left = gpus(launched_cuda.refused, device)
            assert text in said and f"cuda:{device}" in said and "FUSEDNORM_CUDA_ARCHITECTURES=native" in said
            assert (left, gpus(standin.current_device)) == ([0, 0], 0)
        gpus(standin.capture, True, True)
        assert gpus(launched_cuda.refused, 0) == (None, 0, 0)
