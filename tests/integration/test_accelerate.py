"""`accelerate` and `restore`: arguments, the report, the example, copies, wrappers, and what sums hand to norms."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusednorm
from benchmarks.models import launches
from fusednorm.acceleration import fused, handover
from tests.helpers.small_blocks import Block, D, Stack, sums


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Wrong(nn.Module):
    """A norm that is LayerNorm for the inputs of the trial, and something else for the sizes of the test."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), 1e-5

    def forward(self, x):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return y * 2.0 if x.shape[0] == 7 else y


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack()


def test_every_sum_goes_with_the_norm_that_reads_it_next(stack):
    report = fusednorm.accelerate(stack)
    assert [entry.path for entry in sums(report)] == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    assert not report.left
    x = torch.randn(3, 5, D)
    found = []
    with fused.listening(lambda norm, total, steps: found.append(norm)):
        stack(x)
    first, second = stack.blocks
    assert found == [first.norm2, second.norm1, second.norm2, stack.norm]


def test_the_norms_take_what_the_sums_hand_over(stack, monkeypatch):
    fusednorm.accelerate(stack)
    taken = []
    take = handover.take
    monkeypatch.setattr(handover, "take", lambda norm, x: taken.append(take(norm, x)) or taken[-1])
    stack(torch.randn(3, 5, D))
    assert sum(normed is not None for normed in taken) == 4  # all but the first


@pytest.mark.parametrize("between", ["in place", "hook", "retain_grad", "no_grad", "another norm", "taken", "copied"])
def test_a_sum_that_changed_is_normalized_anew(stack, between):
    fusednorm.accelerate(stack)
    norm, other = stack.norm, stack.blocks[0].norm1
    rows = fused._BARE * fused._LARGE // D + 1  # smaller bare sums are torch's
    total = fused.add(residual=torch.randn(rows, D, requires_grad=True), branch=torch.randn(rows, D), norm=norm)
    assert handover.waiting
    if between == "in place":
        total.detach().mul_(2.0)
    elif between == "hook":
        total.register_hook(lambda grad: grad)
    elif between == "retain_grad":
        total.retain_grad()
    elif between == "no_grad":
        with torch.no_grad():
            assert handover.take(norm, total) is None
        return
    elif between == "taken":
        assert handover.take(norm, total) is not None
    elif between == "copied":
        total = copy.deepcopy(total.detach())
    assert handover.take(other if between == "another norm" else norm, total) is None


def test_launches_saved_are_those_that_the_profiler_counts(stack):
    x = torch.randn(3, 5, D)
    own = launches(lambda: stack(x))
    report = fusednorm.accelerate(stack, example=x)
    assert sum(saving.launches for saving in report.savings) == len(sums(report)) == 4
    assert all(saving.bytes == (5 - 4) * 3 * 5 * D * 4 for saving in report.savings)
    # a launch for each sum with its norm, and one for each dropout of p = 0, which the profiler sees as an operator
    assert own - launches(lambda: stack(x)) == 4 + 4


def test_dropout_and_bias_are_inside_the_operator():
    torch.manual_seed(0)
    model = Stack(0.5)
    fusednorm.accelerate(model)
    found = []
    with fused.listening(lambda norm, total, steps: found.append(steps)):
        model(torch.randn(3, 5, D))
    assert [steps.dropout_p for steps in found] == [0.5] * 4
    assert [steps.linear is not None for steps in found] == [True] * 4


def test_the_report_shows_source_table_and_dict(stack):
    report = fusednorm.accelerate(stack)
    text = report.source("blocks.0")
    assert "fused.add(" in text and "fused.activate(" in text and "fused.following(self)" in text
    compile(text, "shown", "exec")
    assert "blocks.*.norm1" in str(report) and repr(report).startswith("<Report on ")
    told = report.to_dict()
    assert pickle.loads(pickle.dumps(told)) == told
    assert {entry["path"] for entry in told["entries"]} == {entry.path for entry in report.entries}
    with pytest.raises(KeyError, match="no method of 'norm' was rewritten; rewritten: 'blocks"):
        report.source("norm")


def test_nothing_to_fuse_is_an_empty_report():
    report = fusednorm.accelerate(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    assert not report.entries and "Nothing here can be fused" in str(report)


def test_traceback_shows_the_rewritten_line(stack):
    fusednorm.accelerate(stack)
    with pytest.raises(RuntimeError) as caught:
        stack(torch.randn(3, 5, D + 1))
    shown = "".join(traceback.format_exception(caught.value))
    assert 'File "<fusednorm: ' in shown and "fused.add(residual=x, branch=self.norm1(x), norm=self.norm2" in shown


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: fusednorm.accelerate(3), TypeError, "model: expected a torch.nn.Module, got int"),
        (lambda m: fusednorm.restore(None), TypeError, "model: expected a torch.nn.Module, got NoneType"),
        (lambda m: fusednorm.accelerate(m, norms="no"), TypeError, "norms"),
        (lambda m: fusednorm.accelerate(m, dry_run=None), TypeError, "dry_run"),
        (lambda m: fusednorm.accelerate(m, example=3), TypeError, "example: expected a dict of keyword arguments"),
        (lambda m: fusednorm.accelerate(torch.compile(m)), ValueError, "compiled; accelerate first, then compile"),
        (lambda m: fusednorm.restore(torch.compile(m)), ValueError, "compiled; restore first"),
        (lambda m: m.blocks[0].compile() or fusednorm.accelerate(m), ValueError, "model.blocks.0: is compiled"),
        (lambda m: fusednorm.accelerate(torch.jit.trace(m, torch.randn(3, D))), ValueError, "is scripted"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_wrong_argument_is_named_and_changes_nothing(stack, call, error, message):
    with pytest.raises(error, match=message):
        call(stack)
    assert all(type(block) is Block for block in stack.blocks)


def test_an_example_whose_results_differ_undoes_everything_and_names_the_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(D), Wrong())
    kinds = [type(part) for part in model.modules()]
    x = torch.randn(7, D)
    own = model(x)
    with pytest.raises(RuntimeError, match=r"example: output: off by .* first by module '1' \(Wrong\)"):
        fusednorm.accelerate(model, example=x)
    assert [type(part) for part in model.modules()] == kinds and torch.equal(model(x), own)
    assert len(fusednorm.accelerate(model, example=torch.randn(3, D)).fused) == 2


def test_an_example_leaves_modes_gradients_and_generators_as_they_were(stack):
    stack.train()
    stack.norm.eval()
    stack.norm.weight.grad = kept = torch.ones(D)
    state = torch.get_rng_state()
    fusednorm.accelerate(stack, example=(torch.randn(2, D, generator=torch.Generator().manual_seed(1)),))
    assert stack.training and not stack.norm.training and stack.norm.weight.grad is kept
    assert stack.norm.bias.grad is None and torch.equal(torch.get_rng_state(), state)


def test_a_part_or_a_wrapper_of_the_model_can_be_restored(stack):
    fusednorm.accelerate(stack)
    fusednorm.restore(stack.blocks[0])
    assert type(stack.blocks[0]) is Block and type(stack.blocks[1]) is not Block
    fusednorm.restore(Wrapper(stack))
    assert type(stack.blocks[1]) is Block


def test_a_new_instance_of_its_class_is_not_accelerated(stack):
    fusednorm.accelerate(stack)
    kind = type(stack.blocks[0])
    assert kind is not Block and type(kind(0.0)) is Block


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_hands_over_among_its_own_modules(stack, copied):
    fusednorm.accelerate(stack)
    other, x = copied(stack), torch.randn(3, D)
    found = []
    with fused.listening(lambda norm, total, steps: found.append(norm)):
        assert torch.equal(other(x), stack(x))
    assert found[3] is other.norm and found[7] is stack.norm
    fusednorm.restore(other)
    assert type(other.blocks[0]) is Block and type(stack.blocks[0]) is not Block


def test_a_pickle_is_read_by_another_process(stack, tmp_path):
    fusednorm.accelerate(stack)
    x = torch.randn(3, D)
    path = tmp_path / "model.pt"
    torch.save((stack, x, stack(x)), path)
    program = (
        "import sys, torch, fusednorm; from tests.helpers.small_blocks import Block\n"
        f"model, x, y = torch.load({str(path)!r}, weights_only=False)\n"
        "assert torch.equal(model(x), y) and type(model.blocks[0]) is not Block\n"
        "fusednorm.restore(model); assert type(model.blocks[0]) is Block"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_a_pickle_of_a_class_whose_source_changed_is_read_as_the_original(stack, monkeypatch):
    from fusednorm.acceleration import swap

    fusednorm.accelerate(stack.blocks[0])
    data = pickle.dumps(stack.blocks[0])
    monkeypatch.setattr(swap, "_classes", {})  # as in another process
    monkeypatch.setattr(Block, "forward", lambda self, x: x)
    with pytest.warns(UserWarning, match="Block: loaded as it was before accelerate"):
        assert type(pickle.loads(data)) is Block


def test_compiled_models_run_the_original_operations(stack):
    x = torch.randn(3, D)
    own = stack(x)
    fusednorm.accelerate(stack)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.testing.assert_close(torch.compile(stack, backend=backend, fullgraph=True)(x), own)
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert not any("fusednorm" in name for name in called) and len(graphs) == 1


def test_exported_models_give_the_same(stack):
    x = torch.randn(3, D)
    own = stack(x)
    fusednorm.accelerate(stack)
    torch.testing.assert_close(torch.export.export(stack, (x,)).module()(x), own)


def test_lora_after_and_before():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    x = torch.randn(3, 5, D)
    models = [Stack(), Stack()]
    models[1].load_state_dict(models[0].state_dict())
    wanted = models[0](x)
    config = LoraConfig(target_modules=["fc1", "mix"], r=2)
    fusednorm.accelerate(models[0])
    after = get_peft_model(models[0], config)
    before = get_peft_model(models[1], config)
    report = fusednorm.accelerate(before)
    assert any("peft.tuners.lora.layer.Linear, no linear layer" in entry.reason for entry in report.left)
    assert len(sums(report)) == 4
    for model in (after, before):  # B is zero: LoRA changes nothing yet
        torch.testing.assert_close(model(x), wanted)
        model(x).square().sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_autocast_gives_torchs_dtypes(stack):
    x = torch.randn(3, 5, D)
    with torch.autocast("cpu", torch.bfloat16):
        own = stack(x)
        fusednorm.accelerate(stack)
        ours = stack(x)
    assert ours.dtype == own.dtype
    torch.testing.assert_close(ours, own, rtol=2e-2, atol=2e-2)  # two roundings of bfloat16


def test_activations_of_the_table_are_recognised_and_others_are_not():
    from fusednorm.acceleration.recognise import activation_name

    class Own(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    known = [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), Own(), F.gelu, F.relu, torch.relu, F.silu]
    names = ["relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "gelu", "relu", "relu", "silu"]
    assert [activation_name(activation) for activation in known] == names
    assert not any(map(activation_name, [nn.Tanh(), nn.ELU(), nn.PReLU(), nn.Softplus(), torch.tanh, len, "relu"]))


def test_the_form_of_gelu_is_an_attribute():
    class Own(nn.Module):
        def __init__(self, approximate):
            super().__init__()
            self.fc, self.approximate = nn.Linear(D, D), approximate

        def forward(self, x):
            return F.gelu(self.fc(x), approximate=self.approximate)

    x = torch.randn(3, D)
    for form, name in (("none", "bias + gelu"), ("tanh", "bias + gelu_tanh"), ("other", None), (None, None)):
        model = Own(form)
        assert [entry.into for entry in fusednorm.accelerate(model).fused] == [name] * (name is not None)
        if name is not None:
            torch.testing.assert_close(model(x), F.gelu(model.fc(x), approximate=form))
            model.approximate = "none" if form == "tanh" else "tanh"  # read in each call
            torch.testing.assert_close(model(x), F.gelu(model.fc(x), approximate=model.approximate))
            model.approximate = "other"
        with pytest.raises((RuntimeError, TypeError), match="approximate"):
            model(x)


def test_a_recipe_is_used_where_each_of_its_texts_stands_once(monkeypatch, stack):
    from fusednorm.acceleration import recipes, source

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

        def forward(self, x):
            h = (x + self.fc(x)).clone()
            return self.norm(h)

    key = f"{Doubled.__module__}.{Doubled.__qualname__}", "forward"
    for text, fuses in [("(x + self.fc(x)).clone()", True), ("x", False), ("no such text", False)]:
        monkeypatch.setitem(recipes.RECIPES, key, recipes.Recipe(((text, "x + self.fc(x)"),)))
        source._read.cache_clear()
        model, x = Doubled(), torch.randn(3, D)
        own = model(x)
        assert bool(sums(fusednorm.accelerate(model))) is fuses
        torch.testing.assert_close(model(x), own)
    source._read.cache_clear()


@pytest.mark.parametrize("change", ["subclass", "instance", "source"])
def test_a_recipe_is_not_used_where_another_method_is_called(change, monkeypatch):
    from fusednorm.acceleration import recipes

    class Gelu(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(D, D)

        def act(self, x):
            return F.gelu(x)

        def forward(self, x):
            return self.act(self.fc(x))

    class Own(Gelu):
        def act(self, x):
            return 3.0 * F.silu(x)

    edits = (("self.act(self.fc(x))", "F.gelu(self.fc(x))"),)
    key = f"{Gelu.__module__}.{Gelu.__qualname__}", "forward"
    known = recipes.digest(Gelu.act)
    monkeypatch.setitem(recipes.RECIPES, key, recipes.Recipe(edits, (("act", known),)))
    assert fusednorm.accelerate(Gelu()).fused
    model = Own() if change == "subclass" else Gelu()
    if change == "instance":
        model.act = lambda x: F.silu(x)
    elif change == "source":
        monkeypatch.setitem(recipes.RECIPES, key, recipes.Recipe(edits, (("act", recipes.digest(Own.act)),)))
    x = torch.randn(3, D)
    own = model(x)
    assert not fusednorm.accelerate(model).fused
    assert torch.equal(model(x), own)
