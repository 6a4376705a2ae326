"""`accelerate` on norms with a scale and a shift for each sample, and branches with a gate, as in diffusion models."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm.acceleration import fused, handover
from tests.helpers.model_figures import Float64, doubled, floor, losses
from tests.helpers.model_zoo import Model, models, randomise

B, S, D = 2, 6, 16
needs_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """As in DiT's own code."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.vectors = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_b, scale_b, gate_b = self.vectors(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.mix(modulate(self.norm1(x), shift_a, scale_a))
        x = x + gate_b.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_b, scale_b))
        return x


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(D)

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return self.norm(x)


class Step(nn.Module):
    """One sum and one modulated norm, with the vectors given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x, gate, scale, shift):
        y = self.fc(x)
        y = gate * y
        x = x + y
        n = self.norm(x)
        n = n * (1 + scale) + shift
        return n, x * 2


class Shifted(Step):
    """Scale is changed between the sum and the norm's modulation."""

    def forward(self, x, gate, scale, shift):
        scale = scale * 1.0
        x = x + gate * self.fc(x)
        with torch.no_grad():
            scale.mul_(3.0)
        n = self.norm(x) * (1 + scale) + shift
        return n, x * 2


class Inside(nn.Module):
    """A part that is computed again in the backward has the norm of a sum outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.inside = nn.Linear(D, D), nn.LayerNorm(D), False

    def part(self, x, scale, shift):
        return self.norm(x) * (1 + scale) + shift

    def forward(self, x, scale, shift):
        x = x + self.fc(x)
        if self.inside:
            return checkpoint(self.part, x, scale, shift, use_reentrant=False)
        return self.norm(x)


@pytest.fixture
def always_fused(monkeypatch):
    monkeypatch.setattr(fused, "_LARGE", 0)


@contextlib.contextmanager
def counted(monkeypatch):
    """The steps of each call of a fused norm."""
    calls, original = [], handover.NormForm.add

    def add(self, own, eps, residual, x, bias, steps):
        calls.append((residual is not None, steps.gate is not None, steps.scale is not None))
        return original(self, own, eps, residual, x, bias, steps)

    with monkeypatch.context() as patch:
        patch.setattr(handover.NormForm, "add", add)
        yield calls


def made(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return module


def results(module: nn.Module, *given: torch.Tensor) -> list[torch.Tensor]:
    """Outputs and all gradients."""
    given = [tensor.detach().clone().requires_grad_() for tensor in given]
    outputs = module(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((o.double() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(total, [*given, *module.parameters()])]


def check(ours: nn.Module, theirs: nn.Module, *given: torch.Tensor) -> None:
    """Twice the error of the untouched module against float64, and 8 ulps of the largest value."""
    exact = results(copy.deepcopy(theirs).double(), *(tensor.double() for tensor in given))
    for mine, own, true in zip(results(ours, *given), results(theirs, *given), exact, strict=True):
        assert mine.dtype == own.dtype
        error, allowed = ((figure - true).abs().max() for figure in (mine, own))
        assert error <= 2 * allowed + 8 * torch.finfo(own.dtype).eps * true.abs().max()


def vectors(dtype: torch.dtype = torch.float32, *sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(sizes or (B, 1, D), generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.usefixtures("always_fused")
def test_dits_own_blocks_take_their_vectors_into_the_sum(monkeypatch):
    own = made(Stack())
    ours = copy.deepcopy(own)
    report = fusednorm.accelerate(ours)
    assert [entry.into for entry in report.fused if entry.kind == "modulation"] == [
        *("self.norm1 + scale + shift", "self.norm2 + scale + shift") * 2
    ]
    sums = [entry.into for entry in report.fused if entry.kind == "residual"]
    first, second = (
        "bias + gate + sum, with self.norm2 and its modulation",
        "gate + sum, with the norm of the next block",
    )
    assert sums == [first, second] * 2
    with counted(monkeypatch) as calls:
        ours(torch.randn(B, S, D), torch.randn(B, D))
    # the first norm alone; the first sum with its norm's vectors; the second with the next block's norm
    assert calls == [(False, False, True), *[(True, True, True), (True, True, False)] * 2]
    check(ours, own, torch.randn(B, S, D), torch.randn(B, D))
    copied = pickle.loads(pickle.dumps(ours))
    check(copied, own, torch.randn(B, S, D), torch.randn(B, D))
    fusednorm.restore(ours)
    x, c = torch.randn(B, S, D), torch.randn(B, D)
    assert torch.equal(ours(x, c), own(x, c))


@pytest.mark.usefixtures("always_fused")
def test_another_function_of_that_name_is_called(monkeypatch):
    own = made(Block())
    ours = copy.deepcopy(own)
    fusednorm.accelerate(ours)
    x, c = torch.randn(B, S, D), torch.randn(B, D)
    for other in (lambda x, shift, scale: x - shift.unsqueeze(1) * scale.unsqueeze(1), lambda x, *rest: x * 2):
        monkeypatch.setitem(globals(), "modulate", other)
        assert not results(own, x, c)[0].allclose(x)
        check(ours, own, x, c)


@pytest.mark.usefixtures("always_fused")
@pytest.mark.parametrize(
    ("sizes", "fits"),
    [((B, 1, D), True), ((1, 1, D), True), ((D,), True), ((B, S, D), False), ((S, D), False), ((B, 1, 1), False)],
)
def test_shapes_are_looked_at_in_each_call(sizes, fits, monkeypatch):
    own = made(Step())
    ours = copy.deepcopy(own)
    fusednorm.accelerate(ours)
    given = torch.randn(B, S, D), *vectors(torch.float32, *sizes)
    with counted(monkeypatch) as calls:
        ours(*given)
    assert ((True, True, True) in calls) is fits
    check(ours, own, *given)


@pytest.mark.usefixtures("always_fused")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_vectors", [torch.float32, torch.bfloat16, torch.float64])
def test_results_have_the_dtypes_of_torchs_promotion(dtype, of_vectors):
    own = made(Cast()).to(dtype)
    ours = copy.deepcopy(own)
    fusednorm.accelerate(ours, linear=False)
    given = torch.randn(B, S, D).to(dtype), *vectors(of_vectors)
    mine, theirs = ours(*given), own(*given)
    assert [m.dtype for m in mine] == [t.dtype for t in theirs]
    for m, t in zip(mine, theirs, strict=True):
        torch.testing.assert_close(m, t, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x, gate, scale, shift):
        y = x + gate * self.fc(x)
        n = self.norm(x) * (1 + scale) + shift
        return n, y


def test_small_ones_are_left_to_torch(monkeypatch):
    own = made(Step())
    ours = copy.deepcopy(own)
    fusednorm.accelerate(ours)
    given = torch.randn(B, S, D), *vectors()
    with counted(monkeypatch) as calls:
        mine = ours(*given)
    assert not calls
    torch.testing.assert_close(mine, own(*given))
    wide = torch.randn(2, fused._LARGE // (2 * D), D)
    with counted(monkeypatch) as calls:
        ours(wide, *vectors())
    assert calls == [(True, True, True)]


@pytest.mark.usefixtures("always_fused")
def test_a_scale_that_changed_since_the_sum_is_read_again():
    own = made(Shifted())
    ours = copy.deepcopy(own)
    report = fusednorm.accelerate(ours)
    assert "bias + gate + sum, with self.norm and its modulation" in [entry.into for entry in report.fused]
    given = torch.randn(B, S, D), *vectors()
    for mine, theirs in zip(ours(*given), own(*given), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("always_fused")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, monkeypatch):
    own = made(Stack())
    ours = copy.deepcopy(own)
    fusednorm.accelerate(ours)
    x, c = torch.randn(B, S, D), torch.randn(B, D)
    with context(), counted(monkeypatch) as calls:
        torch.testing.assert_close(ours(x, c), own(x, c))
    assert (False, False, True) in calls


@pytest.mark.usefixtures("always_fused")
def test_a_checkpointed_part_takes_nothing_from_outside(monkeypatch):
    own = made(Inside())
    ours = copy.deepcopy(own)
    assert [e.into for e in fusednorm.accelerate(ours).fused if e.kind == "residual"] == ["bias + sum, with self.norm"]
    ours.inside = own.inside = True
    with counted(monkeypatch) as calls:
        check(ours, own, torch.randn(B, S, D), *vectors()[:2])
    assert calls == [(True, False, False), (False, False, True), (False, False, True)]


@pytest.mark.usefixtures("always_fused")
def test_compiled_it_is_torchs_own_code():
    own = made(Stack())
    ours = copy.deepcopy(own)
    fusednorm.accelerate(ours)
    x, c = torch.randn(B, S, D), torch.randn(B, D)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, c), own(x, c))


@pytest.mark.usefixtures("always_fused")
def test_hooks_of_a_norm_see_its_own_output():
    own = made(Step())
    ours = copy.deepcopy(own)
    fusednorm.accelerate(ours)
    seen = []
    for module in (ours, own):
        module.norm.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    check(ours, own, torch.randn(B, S, D), *vectors())
    torch.testing.assert_close(*seen[1:])  # the first is the float64 copy's


EXPECTED = {  # what is fused of a block and what its vectors are left for
    "diffusers block, adaptive": {"self.norm3 + scale + shift", "gate + sum, with self.norm3 and its modulation"},
    "PixArt block": {"self.norm1 + scale + shift", "sum, with self.norm2 and its modulation"},
    "SD3 block": {"self.norm2 + scale + shift", "gate + sum, with self.norm2_context and its modulation"},
    "SD3.5 block": {"gate + sum, with self.norm2 and its modulation"},
    "Flux block": {"self.norm + scale + shift", "gate + sum, with self.norm2 and its modulation"},
    "Flux single block": {"self.norm + scale + shift"},
    "Wan block": set(),
}


@needs_diffusers
@pytest.mark.parametrize("name", EXPECTED)
def test_diffusers_blocks_are_fused_as_far_as_said(name):
    report = fusednorm.accelerate(models()[name].build())
    assert EXPECTED[name] <= {entry.into for entry in report.fused}
    left = [entry.reason for entry in report.left if entry.kind == "modulation"]
    own_forward = "diffusers.models.normalization.FP32LayerNorm has a forward of its own"
    assert (left == [own_forward] * 2) is (name == "Wan block")
    if name == "SD3.5 block":
        assert left == ["norm_hidden_states is no norm's output alone, or is read elsewhere too"] * 2


@needs_diffusers
@pytest.mark.slow
def test_a_dit_block_of_full_width_trains_as_the_untouched_one():
    """The bound is that of the small models: an ulp a step, besides the floor of one step."""
    from diffusers.models.attention import BasicTransformerBlock

    steps, small = 50, models()["diffusers block, adaptive"]

    def batch(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"hidden_states": (1, 256, 1152), "target": (1, 256, 1152)}
        given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return given | {"timestep": torch.tensor([7 * seed]), "class_labels": torch.tensor([seed % 5])}

    torch.manual_seed(0)
    own = BasicTransformerBlock(1152, 16, 72, num_embeds_ada_norm=5, attention_bias=True, norm_type="ada_norm_zero")
    randomise(own)
    own.norm1.emb.class_embedder.dropout_prob = 0.0
    entry = Model("diffusers", small.make, batch, small.run)
    batches = [batch(seed % 4) for seed in range(steps)]
    ours = copy.deepcopy(own)
    fusednorm.accelerate(ours)
    with Float64():
        true = losses(entry, copy.deepcopy(own).double(), list(map(doubled, batches)))
    mine, theirs = losses(entry, ours, batches), losses(entry, own, batches)
    error, allowed = ((figure - true).abs().max().item() for figure in (mine, theirs))
    assert true[-4:].mean() < true[:4].mean()
    assert error <= 2 * allowed + floor("losses", {"losses": true}, 8 + steps)
