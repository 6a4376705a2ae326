"""Faults that users reported against packages that patch models, as properties `accelerate` has.

Each names the report. They are of three kinds: a patch reaches other models, a patched model lacks what it had, and no
word says why a fast path was not taken.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import linecache
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fusednorm

B, S, E, H = 2, 5, 16, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E)
        self.mix = nn.Linear(E, E)
        self.fc1, self.act, self.fc2 = nn.Linear(E, H), nn.GELU(), nn.Linear(H, E)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.mix(self.norm1(x)))
        return x + self.drop(self.fc2(self.act(self.fc1(self.norm2(x)))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(E)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# what Python's copy and transformers' set_attn_implementation note on a class that they meet for the first time
CACHES = {"__slotnames__", "_can_set_attn_implementation_cached_value"}


def torchs() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, H, batch_first=True), 2, enable_nested_tensor=False)


def bert(config: Any = None) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the model is transformers'")
    sizes = {"hidden_size": E, "intermediate_size": H, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = config or transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=16)
    return transformers.BertModel(config, add_pooling_layer=False)


def llama(config: Any = None) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the model is transformers'")
    sizes = {"hidden_size": E, "intermediate_size": H, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = config or transformers.LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=16)
    return transformers.LlamaModel(config)


MISSING = object()
MODELS = pytest.mark.parametrize("make", [Stack, torchs, bert, llama], ids=["own", "torch", "bert", "llama"])


def given(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if hasattr(model, "config"):
        return torch.randint(0, 50, (B, S), generator=generator)
    return torch.randn(B, S, E, generator=generator)


def result(model: nn.Module) -> torch.Tensor:
    out = model(given(model))
    return out if isinstance(out, torch.Tensor) else out[0]


def everything() -> dict[tuple[str, str], Any]:
    """What a patch might replace: functions and classes of torch.nn and transformers, and all those classes hold."""
    found = {}
    for name, module in list(sys.modules.items()):
        patched = name.startswith(("torch.nn", "transformers.models.", "transformers.modeling_", __name__))
        if not patched or not isinstance(module, ModuleType) or not isinstance(vars(module), dict):
            continue
        for key, value in list(vars(module).items()):
            if not key.startswith("__") and (inspect.isclass(value) or inspect.isroutine(value)):
                found[name, key] = value
            if inspect.isclass(value) and value.__module__ == name:
                found.update({(f"{name}.{key}", inner): held for inner, held in vars(value).items()})
    return found


# Liger-Kernel#242, #772: one patched model changed every other of its class, and reverting did not undo it;
# Liger-Kernel#834: a patch renamed the class where it meant the instance
@MODELS
def test_no_other_model_and_no_class_changes(make):
    model, other = make(), make()
    if hasattr(model, "config"):
        other = make(model.config)  # the configuration is one object
    other.eval()
    before, expected = everything(), result(other)
    classes = [(name, type(part)) for name, part in other.named_modules()]
    settings = copy.deepcopy(vars(other.config)) if hasattr(other, "config") else None
    report = fusednorm.accelerate(model)
    assert len(report.fused) > 0
    for training in (True, False):
        result(model.train(training)).sum().backward()
    after, places = everything(), {place for place, _ in before}
    changed = [key for key, value in before.items() if after.get(key) is not value]
    added = [key for key in after if key not in before and key[0] in places]  # else: imported by its first use
    assert not changed and {name for _, name in added} <= CACHES
    assert [(name, type(part)) for name, part in other.named_modules()] == classes
    assert [(name, type(part)) for name, part in make().named_modules()] == classes
    assert torch.equal(result(other), expected)
    assert settings is None or vars(other.config) == settings


# Liger-Kernel#772: the patched forward stayed after the model was reverted
@MODELS
def test_restore_leaves_no_trace(make):
    model = make().eval()
    expected = result(model)
    parts = [(part, type(part), dict(vars(part))) for part in model.modules()]
    settings = copy.deepcopy(vars(model.config)) if hasattr(model, "config") else None
    fusednorm.accelerate(model)
    result(model)
    fusednorm.restore(model)
    assert [id(part) for part in model.modules()] == [id(part) for part, _, _ in parts]
    for part, kind, held in parts:
        assert type(part) is kind
        assert vars(part).keys() == held.keys()
        assert all(vars(part)[key] is value for key, value in held.items())
    assert torch.equal(result(model), expected)
    assert settings is None or vars(model.config) == settings
    fusednorm.restore(model)  # once more: there is nothing to do


# Liger-Kernel#390, #764, #990: a patched module lacked in_place, row_mode, elementwise_affine, so that printing or
# running it failed
@MODELS
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_each_module_keeps_its_attributes(make, training):
    model = make().train(training)
    next(model.parameters()).requires_grad_(False)
    list(model.modules())[-1].register_forward_hook(lambda part, args, out: None)
    before = [(name, part, dict(vars(part)), set(dir(part))) for name, part in model.named_modules()]
    printed, state, grads = repr(model), model.state_dict(), [p.requires_grad for p in model.parameters()]
    fusednorm.accelerate(model)
    assert [name for name, _ in model.named_modules()] == [name for name, *_ in before]
    for (name, part), (_, old, held, names) in zip(model.named_modules(), before, strict=True):
        assert part is old, name
        lost = [key for key, value in held.items() if vars(part).get(key, MISSING) is not value]
        assert set(lost) <= {"config"}, f"{name}: {lost}"  # a copy, so that no other model's changes
        added = vars(part).keys() - held.keys()
        assert all(key.startswith("_fusednorm") for key in added), f"{name}: {added}"
        assert names <= set(dir(part)), f"{name}: {names - set(dir(part))}"
        assert part.training is training
    assert repr(model) == printed
    assert list(model.state_dict()) == list(state)
    assert all(model.state_dict()[key].data_ptr() == value.data_ptr() for key, value in state.items())
    assert [p.requires_grad for p in model.parameters()] == grads


# Liger-Kernel#625: a patched module had another class name; #739: isinstance was given no class
@MODELS
def test_each_class_keeps_its_name_its_bases_and_its_signature(make):
    model = make()
    before = [(part, type(part)) for part in model.modules()]
    fusednorm.accelerate(model)
    for part, kind in before:
        assert isinstance(part, kind)
        now = type(part)
        if not now.__module__.startswith("fusednorm"):  # torch's layers become ours of the same name
            assert now.__module__ == kind.__module__ and now.__qualname__ == kind.__qualname__
        assert now.__name__ == kind.__name__
        mine, theirs = (inspect.signature(c.forward).parameters.values() for c in (now, kind))
        own = [p for p in mine if p.name != "cache" or now.__module__.startswith(kind.__module__)]  # of our layers
        assert [(p.name, p.kind, p.default) for p in own] == [(p.name, p.kind, p.default) for p in theirs]


# pytorch#82919: the fast path of torch's encoder passes hooks by
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("make", [Stack, bert, llama], ids=["own", "bert", "llama"])
def test_hooks_fire_as_often_with_the_same_values(make, moment):
    model = make().eval()
    own = copy.deepcopy(model)
    mine, theirs = [], []

    def listen(root: nn.Module, log: list) -> None:
        for name, part in root.named_modules():
            if not isinstance(part, nn.ModuleList):

                def saw(part, args, out, name=name, log=log):
                    tensors = [t.detach() for t in (*args, out) if isinstance(t, torch.Tensor)]
                    log.append((name, tensors))

                part.register_forward_hook(saw)

    listen(own, theirs)
    if moment == "before":
        listen(model, mine)
    fusednorm.accelerate(model)
    if moment == "after":
        listen(model, mine)
    result(model), result(own)
    assert [name for name, _ in mine] == [name for name, _ in theirs]
    for (name, found), (_, expected) in zip(mine, theirs, strict=True):
        # float32 through two layers of width 16: roundings of 6e-8, amplified by two norms
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# the package's own: a copy of an accelerated model is accelerated, and stands alone
@MODELS
def test_a_copy_works_alone(make):
    model = make().eval()
    expected = result(model)
    fusednorm.accelerate(model)
    other = copy.deepcopy(model)
    fusednorm.restore(model)
    # the bound of the hooks' values, above
    torch.testing.assert_close(result(other), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(result(model), expected)


class StrangerRMSNorm(nn.Module):
    """A norm of no known formula."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().amax(-1, keepdim=True) * self.weight


class Refused(nn.Module):
    """One of each kind that cannot be fused, in modules of their own."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(E, E), nn.LayerNorm(E)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x + self.fc(x)
            h.mul_(2)
            return self.norm(h)

    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(E, H), nn.Hardswish(), nn.Linear(H, E)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.act(self.fc1(x)))

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(E, H), nn.GELU(), nn.Linear(H, E)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.fc1(x)
            return self.fc2(self.act(h) + h.mean())

    def __init__(self) -> None:
        super().__init__()
        self.total, self.ff, self.read = self.Sum(), self.FeedForward(), self.Read()
        self.strange = StrangerRMSNorm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.strange(self.read(self.ff(self.total(x))))


# pytorch#81013: nothing said why torch's encoder did not take its fast path
def test_what_was_left_is_listed_with_a_reason():
    model = Refused()
    own = copy.deepcopy(model)
    report = fusednorm.accelerate(model)
    left = {(entry.kind, entry.path): entry.reason for entry in report.left}
    for kind, path in [("feed_forward", "ff"), ("feed_forward", "read"), ("norm", "strange"), ("residual", "total")]:
        reasons = [why for (k, p), why in left.items() if k == kind and f"{p}.".startswith(f"{path}.")]
        assert reasons, f"no entry for {kind} of {path}: {left}"
        assert all(isinstance(why, str) and len(why.split()) >= 3 for why in reasons)
        assert any(why in str(report) or why.split(":")[0] in str(report) for why in reasons)
    x = torch.randn(B, S, E)
    torch.testing.assert_close(model(x), own(x))


FORMS = [
    *("h = x + self.fc(x)", "h = self.fc(x) + x", "h: torch.Tensor = x + self.fc(x)", "h = x.add(self.fc(x))"),
    *("h = torch.add(x, self.fc(x))", "h = self.fc(x)\n        h += x", "h, y = x + self.fc(x), x"),
    *("(h := x + self.fc(x))", "h = x * 2 + self.fc(x)"),
    *("h = x + 0.5 * self.fc(x)", "h = x + self.fc(x) + x", "h = F.relu(x + self.fc(x))", "h = x - self.fc(x) + x"),
]
WRITTEN = """
import torch
import torch.nn.functional as F

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = torch.nn.Linear(16, 16), torch.nn.LayerNorm(16)

    def forward(self, x):
        {form}
        return self.norm(h)
"""


# pytorch#81013 too: no sum beside a linear layer goes without a word
@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_sum_is_fused_or_listed(form, tmp_path):
    path = tmp_path / "written.py"
    path.write_text(WRITTEN.format(form=form))
    spec = importlib.util.spec_from_file_location("written", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    linecache.checkcache(str(path))
    report = fusednorm.accelerate(module.Block())
    sums = [entry for entry in report.entries if entry.kind == "residual"]
    assert sums and all(entry.fused or entry.reason for entry in sums)


# a norm called by its argument's name, as its class allows
def test_a_norm_takes_its_argument_by_name():
    x = torch.randn(B, S, E)
    modules = pytest.importorskip("transformers.models.llama.modeling_llama", reason="the norm is transformers'")
    for norm, name in ((nn.LayerNorm(E), "input"), (nn.RMSNorm(E), "x"), (modules.LlamaRMSNorm(E), "hidden_states")):
        expected = norm(**{name: x})
        fusednorm.accelerate(norm)
        # one row of 16: a few roundings of 6e-8
        torch.testing.assert_close(norm(**{name: x}), expected, rtol=1e-6, atol=1e-6)


# a hook saw what `accelerate` tried a norm with
@MODELS
def test_accelerate_itself_fires_no_hook_and_draws_no_random_number(make):
    model, fired = make(), []
    for part in model.modules():
        part.register_forward_hook(lambda part, args, out: fired.append(type(part)))
    state = torch.random.get_rng_state()
    fusednorm.accelerate(model)
    assert not fired
    assert torch.equal(torch.random.get_rng_state(), state)


@MODELS
def test_each_norm_and_block_has_an_entry(make):
    model = make()
    parts = dict(model.named_modules())
    report = fusednorm.accelerate(model, layers=False)
    assert {entry.kind for entry in report.entries} <= {"norm", "residual", "feed_forward", "attention", "layer"}
    assert len(report.entries) == len(report.fused) + len(report.left)
    assert all(entry.fused for entry in report.fused) and not any(entry.fused for entry in report.left)
    assert all(entry.reason for entry in report.left)
    listed = {entry.path for entry in report.entries if entry.kind == "norm"}
    norms = {name for name, part in parts.items() if "Norm" in type(part).__name__}
    assert norms <= listed, f"not listed: {norms - listed}"
    kinds = [entry.kind for entry in report.entries]
    if make is not torchs:  # its blocks have their own kind
        assert kinds.count("residual") >= 4 and kinds.count("feed_forward") >= 2
    if hasattr(model, "config"):
        assert "attention" in kinds
    assert json.loads(json.dumps(report.to_dict()))


# what is refused by an option has a word too
@pytest.mark.parametrize("option", ["norms", "residual", "feed_forward"])
def test_an_option_that_is_off_leaves_its_kind(option):
    kind = {"norms": "norm"}.get(option, option)
    fused = {entry.kind for entry in fusednorm.accelerate(Stack(), **{option: False}).fused}
    assert kind not in fused and fused
    everywhere = {entry.kind for entry in fusednorm.accelerate(Stack()).fused}
    assert {"norm", "residual", "feed_forward"} <= everywhere


@MODELS
def test_a_dry_run_says_the_same_and_changes_nothing(make):
    model = make()
    classes = [type(part) for part in model.modules()]
    held = [dict(vars(part)) for part in model.modules()]
    planned = fusednorm.accelerate(model, dry_run=True)
    assert [type(part) for part in model.modules()] == classes
    assert all(vars(part) == old for part, old in zip(model.modules(), held, strict=True))
    done = fusednorm.accelerate(model)
    assert [(e.kind, e.path, e.fused) for e in planned.entries] == [(e.kind, e.path, e.fused) for e in done.entries]
