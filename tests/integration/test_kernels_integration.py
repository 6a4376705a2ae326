"""The layer classes for Hugging Face `kernels`: its rules, the results, and what is left to the models."""

from __future__ import annotations

import copy
import doctest
import importlib.util
import inspect
import json
from types import MethodType

import pytest
import torch
from drop_in import error
from fresh import interpreter
from torch import nn

import fusednorm
from fusednorm.integrations import kernels as layers

transformers = pytest.importorskip("transformers", reason="the models are transformers'")
from transformers.models.bert import modeling_bert as bert  # noqa: E402
from transformers.models.llama import modeling_llama as llama  # noqa: E402

NAMES = ("BertOutput", "BertSelfOutput", "LayerNorm", "RMSNorm")
REPLACED = {
    "BertOutput": bert.BertOutput,
    "BertSelfOutput": bert.BertSelfOutput,
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": llama.LlamaRMSNorm,
}
B, S, E, H = 2, 5, 16, 32


def bert_config(dropout: float = 0.1):
    sizes = {"hidden_size": E, "intermediate_size": H, "num_hidden_layers": 2, "num_attention_heads": 2}
    rest = {"vocab_size": 50, "max_position_embeddings": 16, "attention_probs_dropout_prob": 0.0}
    return transformers.BertConfig(**sizes, **rest, hidden_dropout_prob=dropout)


def llama_config():
    sizes = {"hidden_size": E, "intermediate_size": H, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50, max_position_embeddings=16)


def shaken(model: nn.Module) -> nn.Module:
    """No parameter is left at zeros or ones, which hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def lend(module: nn.Module) -> int:
    """As `kernelize`: each class of this package lends its forward to the modules of the class it is for."""
    count = 0
    for part in module.modules():
        for name, kind in REPLACED.items():
            if type(part) is kind:
                part.forward = MethodType(getattr(layers, name).forward, part)
                count += 1
    return count


def run(model: nn.Module, *args: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of the floating-point arguments and the parameters."""
    args = tuple(a.detach().clone().requires_grad_() if a.is_floating_point() else a for a in args)
    out = model(*args)
    out = out if isinstance(out, torch.Tensor) else out[0]
    cotangent = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    leaves = [a for a in args if a.requires_grad] + list(model.parameters())
    grads = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
    return [out, *(g for g in grads if g is not None)]


def compared(model: nn.Module, *args: torch.Tensor) -> None:
    """Ours within twice the error of the model's own code, plus half an ulp (CONTRIBUTING.md, error budget)."""
    ours = copy.deepcopy(model)
    assert lend(ours) > 0
    wide = tuple(a.double() if a.is_floating_point() else a for a in args)
    exact = run(copy.deepcopy(model).double(), *wide)
    eager, found = run(model, *args), run(ours, *args)
    unit = torch.finfo(found[0].dtype).eps / 2
    assert [f.dtype for f in found] == [e.dtype for e in eager]
    for mine, own, truth in zip(found, eager, exact, strict=True):
        assert error([mine], [truth]) <= 2 * error([own], [truth]) + unit


@pytest.mark.parametrize("name", NAMES)
def test_the_class_keeps_the_rules_of_kernels(name):
    """Those of `kernels`' own check, 0.17.2 (`_validate_layer`)."""
    kind, replaced = getattr(layers, name), REPLACED[name]
    assert issubclass(kind, nn.Module) and kind.__init__ is nn.Module.__init__
    members = {n for n, _ in inspect.getmembers(kind)} - {n for n, _ in inspect.getmembers(nn.Module)}
    assert members == {"can_torch_compile", "has_backward"}
    mine, theirs = (inspect.signature(c.forward).parameters for c in (kind, replaced))
    assert [(p.name, p.kind) for p in mine.values()] == [(p.name, p.kind) for p in theirs.values()]
    assert [p.default for p in mine.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize("name", [*NAMES, "path"])
def test_example(name):
    text = inspect.cleandoc(getattr(layers, name).__doc__)
    assert "Example:" in text
    example = doctest.DocTestParser().get_doctest(text, {"torch": torch, "fusednorm": fusednorm}, name, None, None)
    said: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=said.append).failed == 0, "".join(said)


def test_path_names_the_folder_and_the_class():
    for name in NAMES:
        folder, _, last = layers.path(name).partition(":")
        assert last == name and folder == str(layers.FOLDER)
    assert json.loads((layers.FOLDER / "metadata.json").read_text())["id"].isidentifier()
    spec = importlib.util.spec_from_file_location("loaded_by_path", layers.FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.layers is layers
    with pytest.raises(ValueError, match="none of BertOutput"):
        layers.path("GroupNorm")


def test_import_fusednorm_imports_none_of_it():
    program = "import sys, fusednorm; print([n for n in sys.modules if n.startswith('fusednorm.integrations')])"
    assert interpreter("-c", program).strip() == "[]"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_bert_gives_the_same(training):
    model = shaken(bert.BertModel(bert_config(0.0), add_pooling_layer=False)).train(training)
    compared(model, torch.randint(0, 50, (B, S)))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_llama_gives_the_same(training):
    model = shaken(llama.LlamaForCausalLM(llama_config())).train(training)
    compared(model, torch.randint(0, 50, (B, S)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_each_class_in_each_dtype(name, dtype):
    kind = REPLACED[name]
    module = shaken(kind(bert_config(0.0)) if name.startswith("Bert") else kind(E)).to(dtype)
    widths = {"BertOutput": (H, E), "BertSelfOutput": (E, E)}.get(name, (E,))
    compared(module, *(torch.randn(B, S, width, dtype=dtype) for width in widths))


@pytest.mark.parametrize("name", ["BertOutput", "BertSelfOutput"])
def test_dropout_drops_in_training_only(name):
    module = REPLACED[name](bert_config(0.5))
    lend(module)
    x = torch.randn(B, S, module.dense.in_features), torch.randn(B, S, E)
    module.train()
    assert not torch.equal(module(*x), module(*x))
    torch.manual_seed(3)
    first = module(*x)
    torch.manual_seed(3)
    assert torch.equal(first, module(*x))
    module.eval()
    assert torch.equal(module(*x), module(*x))


def _quantised(module):
    module.dense = nn.Sequential(module.dense)


def _hooked(module):
    module.dense.register_forward_hook(lambda part, args, out: out * 2)


def _hooked_norm(module):
    module.LayerNorm.register_forward_pre_hook(lambda part, args: (args[0] * 3 + 1,))


def _parametrized(module):
    nn.utils.parametrizations.weight_norm(module.dense)


def _wrapped(module):
    inner = module.dense.forward
    module.dense.forward = lambda x: inner(x) + 1


CHANGES = [_quantised, _hooked, _hooked_norm, _parametrized, _wrapped]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_a_part_that_does_more_is_called(change):
    module = shaken(bert.BertOutput(bert_config(0.0)))
    change(module)
    x, residual = torch.randn(B, S, H), torch.randn(B, S, E)
    expected = module(x, residual)
    module.forward = MethodType(layers.BertOutput.forward, module)
    assert torch.equal(module(x, residual), expected)


def test_arguments_that_cannot_be_fused_run_the_models_code():
    module = shaken(bert.BertOutput(bert_config(0.0)))
    own = copy.deepcopy(module)
    module.forward = MethodType(layers.BertOutput.forward, module)  # alone: our LayerNorm takes mixed dtypes
    calls = [
        (torch.randn(B, S, H), torch.randn(1, S, E)),  # broadcasts
        (torch.randn(B, S, H), torch.randn(B, S, E).double()),
        (torch.randn(0, S, H), torch.randn(1, S, E)),
    ]
    for x, residual in calls:
        assert _outcome(module, x, residual) == _outcome(own, x, residual)
    for x, residual in [(torch.randn(B, S, E), calls[0][1]), (calls[0][0], torch.randn(B, S, H))]:
        assert _outcome(module, x, residual) == _outcome(own, x, residual)


def _outcome(module, *args):
    try:
        out = module(*args)
    except Exception as fault:
        return type(fault), str(fault)
    return out.dtype, out.shape, out.tolist()


def test_rms_norm_of_mixed_dtypes_gives_the_models_dtype():
    for weight, x in [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]:
        module = shaken(llama.LlamaRMSNorm(E)).to(weight)
        hidden = torch.randn(B, S, E, dtype=x)
        expected = module(hidden)
        lend(module)
        assert torch.equal(module(hidden), expected) and module(hidden).dtype == expected.dtype


@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_the_models_dtype_and_values(name):
    kind = REPLACED[name]
    module = shaken(kind(bert_config(0.0)) if name.startswith("Bert") else kind(E))
    args = tuple(torch.randn(B, S, w) for w in {"BertOutput": (H, E), "BertSelfOutput": (E, E)}.get(name, (E,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(*args)
        lend(module)
        found = module(*args)
    assert found.dtype == expected.dtype
    # the norms in float32; the blocks run the model's own code
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_as_one_graph(name):
    torch._dynamo.reset()
    kind = REPLACED[name]
    module = shaken(kind(bert_config(0.0)) if name.startswith("Bert") else kind(E))
    lend(module)
    args = tuple(torch.randn(B, S, w) for w in {"BertOutput": (H, E), "BertSelfOutput": (E, E)}.get(name, (E,)))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), module(*args))


@pytest.fixture
def library(monkeypatch):
    kernels = pytest.importorskip("kernels", reason="the library `kernels` is not installed")
    for name, kind in REPLACED.items():  # what transformers' decorator does, and monkeypatch undoes
        monkeypatch.setattr(kind, "kernel_layer_name", name, raising=False)
        monkeypatch.setattr(kind, "kernel_condition", staticmethod(lambda module: True), raising=False)
    return kernels


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_kernelize_takes_the_classes_by_the_path(kind, training, library):
    model = bert.BertModel(bert_config(0.0)) if kind == "bert" else llama.LlamaForCausalLM(llama_config())
    model = shaken(model).train(training)
    own, ids = copy.deepcopy(model), torch.randint(0, 50, (B, S))
    mode = library.Mode.TRAINING if training else library.Mode.INFERENCE
    mapping = {}
    for name in NAMES:
        folder, _, layer = layers.path(name).partition(":")
        mapping[name] = {"cpu": library.LocalLayerRepository(type(layers.FOLDER)(folder), layer_name=layer)}
    with library.use_kernel_mapping(mapping, inherit_mapping=False):
        library.kernelize(model, mode=mode, device="cpu", use_fallback=library.KernelizeFallback.NO_LAYER)
    lent = [type(p) for p in model.modules() if getattr(p.forward, "__func__", None) in _forwards()]
    assert set(lent) == ({llama.LlamaRMSNorm} if kind == "llama" else set(REPLACED.values()) - {llama.LlamaRMSNorm})
    # float32 through two layers: both are within the error budget of float64, see `compared`
    torch.testing.assert_close(model(ids)[0], own(ids)[0], rtol=1e-5, atol=1e-5)


def _forwards():
    return {getattr(layers, name).forward for name in NAMES}


def test_kernel_config_takes_the_path(library, monkeypatch):
    """Transformers lists no CPU among the devices of a mapping; all else is as on a GPU."""
    from transformers.utils import import_utils, kernel_config

    if not import_utils.is_kernels_available():
        pytest.skip("transformers takes no `kernels` of the installed version")
    monkeypatch.setattr(kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES", ["cpu"])
    model = shaken(llama.LlamaForCausalLM(llama_config())).eval()
    own, ids = copy.deepcopy(model), torch.randint(0, 50, (B, S))
    config = kernel_config.KernelConfig({"RMSNorm": layers.path("RMSNorm")}, use_local_kernel=True)
    model.set_use_kernels(True, config)
    lent = [p for p in model.modules() if getattr(p.forward, "__func__", None) is layers.RMSNorm.forward]
    assert len(lent) == 5
    torch.testing.assert_close(model(ids)[0], own(ids)[0], rtol=1e-5, atol=1e-5)
