"""Triton's real launcher is called for every operator, on GPUs that are not there (tests/helpers/standin.py)."""

from __future__ import annotations

import struct

import emulated
import launched
import pytest
import standin
import torch
from launched import activation, attention, norm, proves, varlen
from launched_cuda import modulated

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(emulated.compiler() is None, reason="needs g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA operators, for GPUs that are there"),
]

PACKED = {"i32": "<i", "u32": "<I", "i64": "<q", "fp32": "<f", "fp64": "<d"}
IN_PTX = {"i32": "u32", "u32": "u32", "i64": "u64", "fp32": "f32", "fp64": "f64"}
DROPOUT, EPILOGUE = {"dropout_p": 0.75}, {"dropout_p": 0.75, "drop_path_p": 0.5}  # words past 2**31
BIASED, SCALED = "weight bias", "weight x_bias layer_scale"
F16, F32, F64 = torch.float16, torch.float32, torch.float64
FAST = {
    "layer_norm": (norm, {"function": "layer_norm", "vectors": BIASED}),
    "layer_norm_unaligned": (norm, {"function": "layer_norm", "vectors": BIASED, "offset": 1}),
    "rms_norm_float64": (norm, {"function": "rms_norm", "vectors": "weight", "dtype": F64}),
    "add_layer_norm": (norm, {"function": "add_layer_norm", "vectors": f"{SCALED} bias", **EPILOGUE}),
    "add_rms_norm": (norm, {"function": "add_rms_norm", "vectors": "weight", "dtype": F32}),
    "bias_act_dropout": (activation, {"p": 0.75}),
    "attention": (attention, {}),
    "attention_causal": (attention, {"is_causal": True}),
    "attention_mask_gradient": (attention, {"mask": "additive", **DROPOUT}),
    "varlen": (varlen, {"is_causal": True}),
}
SLOW = {
    "layer_norm_without_parameters": (norm, {"function": "layer_norm", "vectors": "", "dtype": F16}),
    "rms_norm": (norm, {"function": "rms_norm", "vectors": "weight"}),
    "add_layer_norm_plain": (norm, {"function": "add_layer_norm", "vectors": BIASED}),
    "add_layer_norm_dropout": (norm, {"function": "add_layer_norm", "vectors": f"{BIASED} x_bias", **DROPOUT}),
    "add_layer_norm_float64": (norm, {"function": "add_layer_norm", "vectors": BIASED, "dtype": F64, **DROPOUT}),
    "add_layer_norm_wide": (norm, {"function": "add_layer_norm", "vectors": BIASED, "width": 2**16, **DROPOUT}),
    "add_rms_norm_everything": (norm, {"function": "add_rms_norm", "vectors": SCALED, **EPILOGUE}),
    "add_rms_norm_memory_efficient": (
        norm,
        {"function": "add_rms_norm", "vectors": "weight", "memory_efficient": True},
    ),
    "bias_act": (activation, {"dtype": F32}),
    "act": (activation, {"vectors": "", "dtype": F64}),
    "attention_float32": (attention, {"dtype": F32}),
    "attention_key_mask": (attention, {"key_mask": True}),
    "attention_bool_mask": (attention, {"mask": "bool", "key_mask": True}),
    "attention_broadcast_mask_gradient": (attention, {"mask": "broadcast"}),
    "attention_window": (attention, {"window": (16, 8)}),
    "attention_softcap": (attention, {"softcap": 30.0, "is_causal": True}),
    "attention_dropout": (attention, {"dtype": F16, **DROPOUT}),
    "attention_lower_right": (attention, {"is_causal": True, "causal_align": "lower_right"}),
    "attention_grouped": (attention, {"heads": 2}),
    "varlen_window_dropout": (varlen, {"window": (16, 0), "softcap": 20.0, **DROPOUT}),
}
SHOWN = ("triton", "forward", "backward")
CALLS = [
    *(pytest.param(*call, id=name, marks=proves(*call, *SHOWN)) for name, call in FAST.items()),
    *(pytest.param(*call, id=name, marks=pytest.mark.slow) for name, call in SLOW.items()),
]


@pytest.fixture(scope="module")
def gpus():
    with standin.process() as pool:
        yield lambda *call, **options: pool.submit(*call, **options).result(600)


def check(launches: list[launched.Launch], device: int = 0) -> None:
    """Bit for bit; Triton adds two addresses of scratch memory, which our kernels have not."""
    for launch in launches:
        note, given = launch.note, launch.parameters.values()
        assert (note.kernel, note.grid, note.cluster) == (launch.kernel, (*launch.grid, 1), 1)
        assert note.block == (32 * launch.warps, 1, 1) == (launch.threads, 1, 1)
        assert (note.shared, note.device, note.stream) == (launch.shared, device, standin.STREAMS[device])
        assert launch.declared == [*(IN_PTX.get(kind, "u64") for kind, _ in given), "u64", "u64"]
        packed = [struct.pack(PACKED.get(kind, "<Q"), value) for kind, value in given]
        assert dict(zip(launch.parameters, note.parameters)) == dict(zip(launch.parameters, packed))
        assert note.parameters[len(packed) :] == (bytes(8), bytes(8))
        for name in launch.aligned & set(launch.parameters):
            assert launch.parameters[name][1] % 16 == 0, name


def strides_of(name: str, tensor: launched.Known) -> dict[str, int]:
    """In vectors of 16 bytes, but along keys, and of a key mask and of the lse; 0 along a dimension of one."""
    dims = len(tensor.shape)
    masks = {"mask": "bhqk", "dmask": "bhqk", "key_mask": "bk", "lse": "bh" if dims == 3 else "h"}
    letters = masks.get(name, "bhs" if dims == 4 else "sh")
    vector = 1 if name in ("key_mask", "lse") else 16 // tensor.itemsize  # KEYS are whole vectors of a mask
    units = [1 if letter == "k" else vector for letter in letters]
    along = zip(letters, tensor.shape, tensor.strides, units)
    return {f"stride_{name}_{letter}": stride // unit if size > 1 else 0 for letter, size, stride, unit in along}


@pytest.mark.parametrize(("call", "options"), CALLS)
def test_what_is_launched(gpus, call, options):
    step = gpus(launched.step, call, **options)
    known: dict[str, int | float] = {f"{name}_ptr": tensor.address for name, tensor in step.tensors.items()}
    known |= step.numbers
    check(step.launches)
    for launch in step.launches:
        given = {name: value for name, (_, value) in launch.parameters.items()}
        there = {name: tensor for name, tensor in step.tensors.items() if f"{name}_ptr" in given}
        expected = known | {n: stride for name, t in there.items() for n, stride in strides_of(name, t).items()}
        assert given == given | {name: expected[name] for name in given if name in expected}
    passed = {value for launch in step.launches for kind, value in launch.parameters.values() if kind[0] == "*"}
    unused = {name for name, tensor in step.tensors.items() if tensor.address not in passed}
    assert not unused


@pytest.mark.parametrize("name", ["rms_norm_float64", "add_layer_norm", "bias_act_dropout", "attention", "varlen"])
def test_one_graph_launches_the_same_and_no_warning_is_given(gpus, name):
    call, options = FAST[name]
    eager = gpus(launched.step, call, **options).launches
    step, warned = gpus(launched.compiled, call, **options)
    assert not warned
    check(step.launches)
    assert [(one.kernel, one.grid) for one in step.launches] == [(one.kernel, one.grid) for one in eager]


@pytest.mark.parametrize(
    ("function", "calls", "text", "options"),
    [
        pytest.param("cuLaunchKernelEx", 0, "too many resources requested for launch", {}, id="launch"),
        pytest.param("cuLaunchKernelEx", 1, "too many resources requested for launch", {}, id="launch-backward"),
        pytest.param("cuModuleLoadData", 0, "out of memory", {"zero_centered_weight": True}, id="load"),
        pytest.param("cuModuleLoadData", 1, "out of memory", {"dtype": F16}, id="load-backward"),
    ],
)
def test_driver_error_is_named_and_the_next_call_is_served(gpus, function, calls, text, options):
    gpus(standin.fail, function, calls)
    with pytest.raises(RuntimeError, match=rf"^Triton Error \[CUDA\]: {text}$"):
        gpus(launched.step, norm, "add_layer_norm", BIASED, **options)
    launches = gpus(launched.step, norm, "add_layer_norm", BIASED, **options).launches
    assert len(launches) == 3
    check(launches)


CAPTURED = {name: FAST[name] for name in FAST if name not in ("layer_norm_unaligned", "attention_causal")}
CAPTURED["modulated"] = (modulated, {"function": "add_layer_norm", "dtype": F32})


@pytest.mark.parametrize(
    ("call", "options"),
    [pytest.param(*call, id=name, marks=proves(*call, "triton", "CUDA graph")) for name, call in CAPTURED.items()],
)
def test_capture_launches_what_the_call_launches(gpus, call, options):
    expected = gpus(launched.step, call, **options).launches
    gpus(standin.capture, True)
    try:
        captured = gpus(launched.step, call, **options).launches
    finally:
        gpus(standin.capture, False)
    check(captured)
    assert [(one.kernel, one.grid) for one in captured] == [(one.kernel, one.grid) for one in expected]


def test_while_capturing_what_is_loaded_is_launched_and_nothing_is_loaded(gpus):
    loaded, other = ("add_rms_norm", "weight", F32), ("rms_norm", "weight", F16)
    gpus(launched.step, norm, *loaded)
    gpus(standin.capture, True)
    try:
        check(gpus(launched.step, norm, *loaded).launches)
        with pytest.raises(RuntimeError, match=r"^add_layer_norm_fwd: .*call once before capturing"):
            gpus(launched.step, norm, *other)
    finally:
        gpus(standin.capture, False)
    assert len(gpus(launched.step, norm, *other).launches) == 3


@pytest.mark.parametrize(("current", "device"), [(0, 1), (1, 0)])
def test_launch_goes_to_the_device_of_the_tensors(gpus, current, device):
    gpus(standin.current_device, current)
    try:
        launches = gpus(launched.step, norm, "layer_norm", BIASED, device=device).launches
        assert gpus(standin.current_device) == current
    finally:
        gpus(standin.current_device, 0)
    assert len(launches) == 3
    check(launches, device)


def test_the_gpu_of_the_tensors_is_asked_whether_it_captures(gpus):
    assert gpus(launched.asked_of_capture) == {1}


def test_profiler_is_told_of_each_launch_and_changes_none(gpus):
    step, told = gpus(launched.profiled, norm, function="layer_norm", vectors=BIASED)
    assert told == [launch.kernel for launch in step.launches for _ in ("before", "after")]
    check(step.launches)
