"""fusednorm.accelerate on tiny models of other packages: the same results, and everything back by restore.

Each model is compared with an untouched copy, and both with a float64 copy. The error may be twice the untouched
model's, as everywhere here, and `floor` more.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fusednorm
from tests.helpers.model_figures import (
    Figures,
    Float64,
    checkpoint,
    differences,
    doubled,
    exact,
    figures,
    floor,
    kept,
    losses,
    same,
    same_figures,
    scattered,
    state,
)
from tests.helpers.model_zoo import Batch, Model, models, tensors

# torch's own fast path of an encoder, once a process
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@pytest.fixture(autouse=True)
def always_fused(monkeypatch):
    """Layer scale and drop path of small tensors too."""
    monkeypatch.setattr("fusednorm.acceleration.fused._LARGE", 0)


MODELS = models()
HUGGING_FACE = [name for name, model in MODELS.items() if model.package == "transformers"]
DROPPING = [name for name, model in MODELS.items() if model.drops]
GENERATING = [name for name, model in MODELS.items() if model.prompt is not None]
PRE_NORM = "nn.Transformer, pre-norm"
QUICK = (
    "BERT",
    "GPT-2",
    "Llama",
    "Gemma 3",
    "T5",
    "ViT",
    "DINOv2",
    "timm ViT",
    "Flux block",
    "diffusers DiT",
    PRE_NORM,
)
STEPS = 20


def of(names: Iterable[str], quick: Iterable[str] = MODELS) -> pytest.MarkDecorator:
    """Runs a test on these models, on those that are not `quick` as a slow test."""
    made = [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]
    return pytest.mark.parametrize("entry", made, indirect=True)


@pytest.fixture
def entry(request: pytest.FixtureRequest) -> Model:
    made = MODELS[request.param]
    if importlib.util.find_spec(made.package) is None:
        pytest.skip(f"{made.package} is not installed")
    return made


def accelerated(model: nn.Module) -> nn.Module:
    """A copy of it, that is."""
    model = copy.deepcopy(model)
    report = fusednorm.accelerate(model)
    assert len(report.fused)
    return model


def test_timm_is_imported_without_a_trace_of_torchvision() -> None:
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is not None:
        pytest.skip("timm is missing, or torchvision is there")
    MODELS["timm ViT"].build()
    assert not [name for name in sys.modules if name.partition(".")[0] == "torchvision"]
    assert importlib.util.find_spec("torchvision") is None


@of(MODELS)
def test_a_model_is_built_the_same_every_time_and_all_its_norms_have_gradients(entry: Model) -> None:
    first, second, batch = entry.build(), entry.build(), entry.batch(3)
    (outputs, gradients), (again, _) = figures(entry, first, batch), figures(entry, second, batch)
    assert all(value.isfinite().all() for value in outputs.values())
    assert same_figures(outputs, again)
    assert norms(first) or entry is MODELS["diffusers DiT"]  # whose norms have no weights of their own
    for name in norms(first):
        assert gradients[name].any(), name


def norms(model: nn.Module) -> list[str]:
    """Names of their parameters."""
    return [
        name
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(path, recurse=False)
    ]


@of(MODELS, QUICK)
def test_the_comparison_sees_one_changed_weight(entry: Model) -> None:
    model, batch = entry.build(), entry.batch(3)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter((norms(changed) or ["proj_out_2.bias"])[0]).view(-1)[0] += 1e-3
    made = (figures(entry, changed, batch), figures(entry, model, batch), exact(entry, model, batch))
    for ours, theirs, reference in zip(*made):
        assert not differences(theirs, theirs, reference)
        assert differences(ours, theirs, reference)


@of(HUGGING_FACE, QUICK)
def test_the_comparison_allows_other_roundings(entry: Model) -> None:
    model, batch = entry.build(), entry.batch(3)
    if model.config._attn_implementation != "sdpa":
        pytest.skip("it has one implementation of attention")
    other = entry.build(attention="eager")
    reference = exact(entry, model, batch)
    for ours, theirs, true in zip(figures(entry, other, batch), figures(entry, model, batch), reference):
        assert not differences(ours, theirs, true)


@of(MODELS)
def test_outputs_and_gradients_are_the_untouched_models(entry: Model) -> None:
    model, batch = entry.build(), entry.batch(3)
    ours = accelerated(model)
    for mode in (True, False):
        reference = exact(entry, model.train(mode), batch)
        made = figures(entry, ours.train(mode), batch), figures(entry, model, batch), reference
        for figure, theirs, true in zip(*made):
            assert not differences(figure, theirs, true)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")  # of torch's encoder, where one row is padded
@of(MODELS, QUICK)
def test_without_gradients_outputs_are_the_untouched_models(entry: Model) -> None:
    model, batch = entry.build().eval(), entry.batch(3)
    ours = accelerated(model)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            figure, theirs = (
                {f"output {i}": output for i, output in enumerate(entry.run(each, batch))} for each in (ours, model)
            )
        with torch.no_grad(), Float64():
            outputs = entry.run(copy.deepcopy(model).double(), doubled(batch))
        true = {f"output {i}": output for i, output in enumerate(outputs)}
        assert not differences(figure, theirs, true)


@of(HUGGING_FACE, QUICK)
def test_hidden_states_are_the_untouched_models(entry: Model) -> None:
    """They are read between the layers, where a fused sum could be missing."""
    model, batch = entry.build(), entry.batch(3)
    ours = accelerated(model)
    with torch.no_grad():
        figure, theirs = hidden_states(ours, batch), hidden_states(model, batch)
        with Float64():
            true = hidden_states(copy.deepcopy(model).double(), doubled(batch))
    assert len(true) > 2
    assert not differences(figure, theirs, true)


def hidden_states(model: nn.Module, batch: Batch) -> Figures:
    outputs = tensors(model(**batch, output_hidden_states=True).to_tuple())
    return {f"output {i}": output for i, output in enumerate(outputs)}


@of(MODELS, QUICK)
def test_training_goes_as_the_untouched_models(entry: Model) -> None:
    """The loss after some steps has the rounding of each: the floor is an ulp a step, besides that of one step."""
    model, batches = entry.build(), [entry.batch(seed % 4) for seed in range(STEPS)]
    with Float64():
        true = losses(entry, copy.deepcopy(model).double(), list(map(doubled, batches)))
    ours, theirs = losses(entry, accelerated(model), batches), losses(entry, copy.deepcopy(model), batches)
    assert true[-4:].mean() < true[:4].mean()
    error, allowed = ((figure - true).abs().max().item() for figure in (ours, theirs))
    assert error <= 2 * allowed + floor("losses", {"losses": true}, 8 + STEPS)


@of(GENERATING)
def test_generated_tokens_are_the_untouched_models(entry: Model) -> None:
    model, prompt = entry.build().eval(), entry.prompt(5)
    ours = accelerated(model)
    theirs = entry.generate(model, prompt)
    assert len(theirs.unique()) >= 3
    assert torch.equal(entry.generate(ours, prompt), theirs)


@of(MODELS)
def test_restore_leaves_nothing_behind(entry: Model) -> None:
    model, batch = entry.build(), entry.batch(3)
    outputs = figures(entry, model, batch)  # the first call notes things in some models
    weights, seen = kept(model), state(model)
    fusednorm.accelerate(model)
    assert same_figures(kept(model), weights)
    figures(entry, model, batch)
    assert same_figures(kept(model), weights)
    fusednorm.restore(model)
    assert same_figures(kept(model), weights)
    assert state(model) == seen
    assert all(map(same_figures, figures(entry, model, batch), outputs))
    fusednorm.restore(model)
    assert state(model) == seen


@of(MODELS, QUICK)
def test_a_copy_by_any_means_gives_the_same_outputs(entry: Model) -> None:
    model, batch = entry.build().eval(), entry.batch(3)
    ours = accelerated(model)
    with torch.no_grad():
        theirs = entry.run(ours, batch)
        for copied in (copy.deepcopy(ours), *([pickled(ours), saved(ours)] if can_be_pickled(model) else [])):
            assert same(entry.run(copied, batch), theirs)
            assert same_figures(kept(copied), kept(model))
            fusednorm.restore(copied)
            assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
            assert same(entry.run(copied, batch), entry.run(model, batch))


def can_be_pickled(model: nn.Module) -> bool:
    """Torch refuses parametrized modules, which Wav2Vec2 and HuBERT have."""
    return not any(map(parametrize.is_parametrized, model.modules()))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@of(HUGGING_FACE, QUICK)
def test_it_is_saved_and_loaded_as_a_model_of_its_package(entry: Model, tmp_path: Path) -> None:
    model, batch = entry.build().eval(), entry.batch(3)
    ours = accelerated(model)
    ours.save_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name
    known, _ = figures(entry, ours, batch)
    for architecture in (type(model), type(ours)):
        loaded = architecture.from_pretrained(tmp_path / "ours").eval()
        assert same_figures(kept(loaded), kept(model))
        for _ in range(2):
            # Weights read from a file may be aligned otherwise, and a product then has another order.
            assert not differences(figures(entry, loaded, batch)[0], known, known, ulps=16)
            fusednorm.accelerate(loaded)


@of(MODELS, QUICK)
def test_twice_is_as_once(entry: Model) -> None:
    model, batch = entry.build(), entry.batch(3)
    seen, ours = state(model), copy.deepcopy(model)
    fusednorm.accelerate(ours)
    once = [type(module) for module in ours.modules()], figures(entry, ours, batch)
    fusednorm.accelerate(ours)
    twice = [type(module) for module in ours.modules()], figures(entry, ours, batch)
    assert once[0] == twice[0]
    assert all(map(same_figures, once[1], twice[1]))
    fusednorm.accelerate(model)
    fusednorm.accelerate(model)
    fusednorm.restore(model)
    assert state(model) == seen


@of(MODELS, QUICK)
def test_a_dry_run_changes_nothing(entry: Model) -> None:
    model = entry.build()
    seen = state(model)
    report = fusednorm.accelerate(model, dry_run=True)
    assert state(model) == seen
    assert [each.path for each in report.fused] == [each.path for each in fusednorm.accelerate(model).fused]


@of(MODELS, QUICK)
def test_with_dropout_gradients_reach_the_same_parameters(entry: Model) -> None:
    model, batch = entry.build(dropout=0.1), entry.batch(3)
    (_, theirs), (outputs, ours) = figures(entry, model, batch), figures(entry, accelerated(model), batch)
    assert outputs["output 0"].isfinite()
    assert ours.keys() == theirs.keys()
    assert all(gradient.isfinite().all() for gradient in ours.values())


@of(MODELS, QUICK)
def test_outside_training_nothing_is_dropped(entry: Model) -> None:
    model, batch = entry.build(dropout=0.5).eval(), entry.batch(3)
    made = figures(entry, accelerated(model), batch), figures(entry, model, batch), exact(entry, model, batch)
    for ours, theirs, true in zip(*made):
        assert not differences(ours, theirs, true)


@of(MODELS, QUICK)
def test_with_everything_dropped_the_same_is_left(entry: Model) -> None:
    """No chance is in it then: a dropout left out, or in another place, shows in the outputs."""
    model, batch = entry.build(dropout=1.0), entry.batch(3)
    true, _ = exact(entry, model, batch)
    if not true["output 0"].isfinite():
        pytest.skip("the model divides by the probability that a layer is kept")
    (ours, _), (theirs, _) = figures(entry, accelerated(model), batch), figures(entry, model, batch)
    assert not differences(ours, theirs, true)


@of(DROPPING, QUICK)
def test_dropout_scatters_outputs_as_it_does_the_untouched_models(entry: Model) -> None:
    """Mean and variance over seeds agree to five standard errors, which groups of seeds tell."""
    model, batch = entry.build(dropout=0.3), entry.batch(3)
    ours, theirs = scattered(entry, accelerated(model), batch), scattered(entry, model, batch)
    for one, other in zip(ours, theirs):
        error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
        assert (one.mean(0) - other.mean(0)).abs() <= 5 * error


@of(DROPPING, QUICK)
def test_with_dropout_a_seed_gives_the_same_gradients_again(entry: Model) -> None:
    """And another seed others: dropout is there at all."""
    ours, batch = accelerated(entry.build(dropout=0.1)), entry.batch(3)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(figures(entry, ours, batch))
    assert all(map(same_figures, made[0], made[1]))
    assert not same_figures(made[0][0], made[2][0])


@of(MODELS, QUICK)
def test_with_dropout_gradients_are_slopes_of_the_loss(entry: Model) -> None:
    check_slope(entry, accelerated(entry.build(dropout=0.1)))


def check_slope(entry: Model, model: nn.Module) -> None:
    """Along the gradient the loss of one seed grows by its length. The backward must drop what the forward dropped."""
    model, batch, step = model.double(), doubled(entry.batch(3)), 1e-3
    torch.manual_seed(1)
    _, gradients = figures(entry, model, batch)
    length = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    found = []
    for distance in (-step, 2 * step):
        with torch.no_grad():
            for name, gradient in gradients.items():
                model.get_parameter(name).add_(gradient / length, alpha=distance)
        torch.manual_seed(1)
        found.append(entry.loss(model, batch).item())
    slope = (found[1] - found[0]) / (2 * step)
    # the step squared, times curvature; float32 inside a model gives a loss of 5 an error of 3e-7, and this 3e-4
    assert slope == pytest.approx(length.item(), rel=5e-3)


@of(HUGGING_FACE, QUICK)
def test_checkpointed_gradients_are_the_untouched_models(entry: Model) -> None:
    model, batch = entry.build(), entry.batch(3)
    made = figures(entry, model, batch), exact(entry, model, batch)
    for each in checkpointed(model):
        for ours, theirs, true in zip(figures(entry, each, batch), *made):
            assert not differences(ours, theirs, true)


@of(HUGGING_FACE, QUICK)
def test_checkpointed_gradients_are_slopes_of_the_loss_with_dropout(entry: Model) -> None:
    for each in checkpointed(entry.build(dropout=0.1)):
        check_slope(entry, each)


def checkpointed(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Accelerated copies with gradient checkpointing, switched on before and after."""
    if not model.supports_gradient_checkpointing:
        pytest.skip("the model has no gradient checkpointing")
    before, after = copy.deepcopy(model), accelerated(model)
    checkpoint(before)
    checkpoint(after)
    return accelerated(before), after
