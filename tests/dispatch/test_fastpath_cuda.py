"""The fast path to the CUDA library: the bits of the Python path, and nothing that the library does not read.

On a GPU, or without one on the emulation.
"""

from __future__ import annotations

import ctypes
import json

import pytest
import torch
from backends import EMULATED
from fastpath_calls import (
    DTYPES,
    EPILOGUES,
    NEEDS_FASTPATH,
    NORMS,
    Form,
    both_ways,
    chosen,
    cotangents_of,
    cuda_forms,
    gradients,
    hold_to_python_path,
    on_cuda,
    same,
)
from oracle import MODULATION
from torch._subclasses.fake_tensor import FakeTensorMode

import fusednorm
from fusednorm import dispatch
from fusednorm._options import from_flat
from fusednorm.dispatch import crossovers as choice
from fusednorm.dispatch import fastpath, rules
from fusednorm.providers.cuda import library as cuda_library

pytestmark = [NEEDS_FASTPATH, *([] if EMULATED else [pytest.mark.gpu])]
NODE = "FusedNormBackward"
PLAIN = {"layer_norm": Form("layer_norm", ("x", "weight", "bias"))}
OF_SAMPLES = {name: EPILOGUES[name] for name in ("layer scale", "gate, scale and shift", "scale and shift")}
FORMS = {name: on_cuda(form) for name, form in {**NORMS, **PLAIN, **OF_SAMPLES}.items()}
LAYER = FORMS["add_layer_norm"]
DEVICE = LAYER.device


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.fixture
def by_cuda():
    with fusednorm.use_provider("cuda"):
        yield


def taken(
    x,
    residual=None,
    weight=None,
    bias=None,
    *,
    x_bias=None,
    gate=None,
    scale=None,
    shift=None,
    p=0.0,
    seed=None,
    ndim=1,
):
    shape = x.shape[x.ndim - ndim :]
    return dispatch.settings.current.fastpath.add_norm(
        x, residual, shape, weight, bias, 1e-5, x_bias, None, gate, scale, shift, p, seed, False, "cuda"
    )


SHAPES = [(7,), (5, 33), (1, 1), (64, 304)]  # one row, odd, one element, aligned
WIDE = (2, 20000)  # which the emulation takes a second for: of the two dtypes whose kernels differ in their tiles


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_fastpath_to_cuda_gives_the_bits_of_the_python_path(name, dtype, by_cuda):
    form = FORMS[name]
    wide = not EMULATED or dtype in (torch.float32, torch.bfloat16)
    of_samples = not set(MODULATION).isdisjoint(form.names)
    for shape in [*SHAPES[of_samples:], *([WIDE] if wide else []), *([(3, 4, 40)] if of_samples else [])]:
        hold_to_python_path(form, form.leaves(shape, dtype), what=shape)
    hold_to_python_path(form, form.leaves((3, 2, 4, 6), dtype, 2), ndim=2)


def test_fastpath_to_cuda_draws_the_seed_and_drops_what_dropout_mask_says(by_cuda):
    x = torch.ones(8, 64, device=DEVICE)
    torch.manual_seed(3)
    seed = fusednorm.dropout.default_seed(x.device)
    torch.manual_seed(3)
    _, z = taken(x, p=0.25)
    assert torch.equal(z != 0, fusednorm.dropout_mask((8, 64), 0.25, seed))
    assert torch.equal(taken(x, p=0.25, seed=seed)[1], z)


def test_fastpath_to_cuda_reads_chunks_of_one_projection(by_cuda):
    x, (gate, scale, shift) = randn(3, 4, 40), randn(3, 120).chunk(3, dim=1)
    normed, z = taken(x, x, gate=gate, scale=scale, shift=shift)
    own = [t.contiguous() for t in (gate, scale, shift)]
    same((normed, z), taken(x, x, gate=own[0], scale=own[1], shift=own[2]))
    assert taken(x, x, gate=torch.stack((gate, gate), -1)[..., 0]) is None


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_fastpath_to_cuda_takes_parameters_of_the_rows_dtype_and_of_float32(parameters, by_cuda):
    leaves = LAYER.leaves((6, 40), torch.bfloat16, weight=parameters, bias=parameters)
    hold_to_python_path(LAYER, leaves)


REFUSED = {
    "transposed": lambda: (randn(8, 4).t(), {}),
    "expanded": lambda: (randn(1, 8).expand(4, 8), {}),
    "no rows": lambda: (randn(0, 8), {}),
    "no columns": lambda: (randn(4, 0), {}),
    "residual transposed": lambda: (randn(4, 8), {"residual": randn(8, 4).t()}),
    "residual of another dtype": lambda: (randn(4, 8), {"residual": randn(4, 8).double()}),
    "weight of another dtype": lambda: (randn(4, 8), {"weight": randn(8, dtype=torch.bfloat16)}),
    "weight with gaps": lambda: (randn(4, 8), {"weight": randn(16)[::2]}),
    "bias expanded": lambda: (randn(4, 8), {"x_bias": randn(1).expand(8)}),
    "meta": lambda: (torch.randn(4, 8, device="meta"), {}),
    "weight elsewhere": lambda: (randn(4, 8), {"weight": torch.randn(8, device="meta")}),
    "dropout over two dimensions": lambda: (randn(2, 2, 8), {"p": 0.5, "ndim": 2}),
    "seed elsewhere": lambda: (randn(4, 8), {"p": 0.5, "seed": torch.ones(1, dtype=torch.int64, device="meta")}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fastpath_to_cuda_leaves_what_its_kernels_do_not_read_to_the_python_path(case, by_cuda):
    x, options = REFUSED[case]()
    assert taken(x, **options) is None
    assert taken(randn(4, 8)) is not None


@pytest.mark.parametrize("layout", ["expanded", "transposed", "kept transposed by a hook"])
@chosen(*cuda_forms("add_layer_norm", "causal"))
def test_fastpath_to_cuda_copies_cotangents_and_saved_tensors_that_its_kernels_do_not_read(form, layout):
    leaves = form.leaves((6, 40))

    def run():
        if layout != "kept transposed by a hook":
            return form.call(leaves)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, transposed):
            return form.call(leaves)

    outputs = both_ways(run, form.node)
    cotangents = [c.mT.contiguous().mT for c in cotangents_of(outputs[0])]
    if layout == "expanded":
        cotangents = [c.flatten(0, -2)[0].expand(c.shape) for c in cotangents]
    same(*[gradients(found, leaves, cotangents) for found in outputs])


def transposed(tensor):
    """The same values, where the first two dimensions lie the other way round."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.ndim > 1 else tensor


def test_a_request_for_cuda_is_no_request_for_the_cpu_library(by_cuda):
    assert dispatch.settings.current.fastpath_mode == "cuda"
    x, bias = randn(4, 8).requires_grad_(), randn(8)
    assert dispatch.settings.current.fastpath.bias_act_dropout(x, bias, "relu", 0.0, None, "cuda") is None
    assert fusednorm.bias_act_dropout(x, bias, "relu").grad_fn.name() == "BiasActDropoutFunctionBackward"
    with pytest.raises(ValueError, match="'cuda' cannot run attention_fwd"):
        fusednorm.scaled_dot_product_attention(*[randn(1, 1, 4, 8).double()] * 3)


def test_automatic_choice_on_the_cpu_is_not_the_emulation():
    with fusednorm.use_provider("cuda"):
        pass
    assert dispatch.unavailable_reason("cpu") is None and dispatch.settings.current.fastpath_mode is True
    x = torch.randn(4, 8, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fusednorm.add_layer_norm(x, x, 8)
    assert "fusednorm_cpu::add_layer_norm_fwd" in {event.key for event in profile.key_averages()}


def test_fastpath_refuses_a_library_of_another_build():
    other = torch.zeros(3, dtype=torch.int64).data_ptr()  # where its layout would be
    library = ctypes.CDLL(str(cuda_library._library()))
    norms, attentions = (
        ctypes.addressof(ctypes.c_char.in_dll(library, f"fusednorm_cuda_{name}")) for name in ("norms", "attentions")
    )
    for tables in ((other, attentions), (norms, other)):
        with pytest.raises(RuntimeError, match="libfusednorm_cuda"):
            dispatch.settings.current.fastpath.attach_cuda(*tables, True, 1)
    for missing in ((0, other), (other, 0)):
        with pytest.raises(ValueError, match="addresses"):
            dispatch.settings.current.fastpath.attach_cuda(*missing, True, 1)
    with pytest.raises(TypeError):
        dispatch.settings.current.fastpath.attach_cuda("here", other, True, 1)


# --- which calls on a GPU it is for ---


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "_architecture", lambda index: "sm_90")
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    rules.forget()
    yield tmp_path
    rules.forget()


def test_small_norms_on_a_gpu_are_for_the_fastpath_until_something_is_measured(on_a_gpu):
    assert rules.fastpath_serves("layer_norm", torch.bfloat16, 4 * 64, 64, False, 0)
    assert rules.fastpath_serves("add_rms_norm", torch.float32, 1 << 21, 1024, True, 0)
    assert not rules.fastpath_serves("add_rms_norm", torch.float32, (1 << 21) + 1024, 1024, True, 0)
    steps = {"add_rms_norm/4/both": [[1, 1, "triton"], [1, 1 << 22, "cuda"]]}
    table = {"device": "a GPU", "source": "raw.json", "worst_loss": 0.0, "steps": steps}
    (on_a_gpu / "sm_90.json").write_text(json.dumps(table))
    rules.forget()
    assert not rules.fastpath_serves("add_rms_norm", torch.float32, 1 << 18, 1024, True, 0)
    assert rules.fastpath_serves("add_rms_norm", torch.float32, 1 << 26, 1024, True, 0)
    assert rules.fastpath_serves("layer_norm", torch.float32, 4 * 64, 64, False, 0)


def test_the_python_path_on_a_gpu_prefers_what_the_fastpath_takes(on_a_gpu, monkeypatch):
    with FakeTensorMode():
        x = torch.empty(4, 64, device="cuda")
        large = torch.empty(4096, 1024, device="cuda")
    bare = (None, None, None, None, None, 1, 1e-5, 0.0)

    def preferred(x, residual=None, drop_path_p=0.0):
        rest = (x.dtype, x.dtype, False, False, True)
        call = from_flat("add_layer_norm_fwd", (x, residual, *bare, drop_path_p, *rest))
        found = rules.preference(*call)
        return found and found.provider

    assert preferred(x) == preferred(x, x) == "cuda"
    # the fast path takes up to 8 MiB and no drop path; up to 32 MiB a call waits for the host
    assert preferred(large) == preferred(x, x, drop_path_p=0.5) == "torch"
    call = from_flat("add_layer_norm_fwd", (x, x, *bare, 0.0, x.dtype, x.dtype, False, False, True))
    assert "waits for the host" in rules.preference(*call).why
    monkeypatch.setattr(fastpath, "load", lambda: (None, "left out"))
    rules.forget()
    assert preferred(x) == "torch"


@pytest.mark.gpu
def test_a_small_norm_on_a_gpu_takes_the_fastpath_once_the_library_is_loaded():
    assert dispatch.unavailable_reason("cuda") is None
    x, weight = torch.randn(4, 64, device="cuda", requires_grad=True), torch.ones(64, device="cuda")
    for function in (fusednorm.layer_norm, fusednorm.rms_norm):
        expected = rules.fastpath_serves(function.__name__, x.dtype, x.numel(), 64, True, 0)
        assert (function(x, 64, weight).grad_fn.name() == NODE) == expected
