"""What `accelerate` must leave alone, and when a fused sum must not be used: instances, kept sums, changed weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusednorm
from fusednorm.acceleration import fused, handover
from tests.helpers.small_blocks import D, Stack, sums


@pytest.fixture
def stack() -> Stack:
    torch.manual_seed(0)
    return Stack()


class Scaled(nn.Module):
    """A layer scale whose instances may differ in more than their parameter."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.gamma, self.factor = nn.Parameter(torch.full((D,), 0.5)), factor

    def forward(self, x):
        return x * self.gamma * self.factor


class Path(nn.Module):
    """A drop path that may leave what it keeps as it is."""

    def __init__(self, drop_prob: float, scale: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale = drop_prob, scale

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1)) >= self.drop_prob
        return x * kept / (1.0 - self.drop_prob if self.scale else 1.0)


class Elementwise(Path):
    def forward(self, x):
        return F.dropout(x, self.drop_prob, self.training)


class Quick(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.702

    def forward(self, x):
        return x * torch.sigmoid(self.factor * x)


class Between(nn.Module):
    """A sum with a module between branch and sum, and an activation."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.fc, self.step, self.act, self.norm = nn.Linear(D, D), step, Quick(), nn.LayerNorm(D)

    def forward(self, x):
        h = self.act(self.fc(x))
        x = x + self.step(h)
        return self.norm(x)


@pytest.fixture
def always_fused(monkeypatch):
    monkeypatch.setattr(fused, "_LARGE", 0)


@pytest.mark.usefixtures("always_fused")
def test_each_instance_is_judged_by_itself():
    torch.manual_seed(0)
    steps = [Scaled(1.0), Scaled(3.0), Path(0.1), Path(0.1, scale=False), Elementwise(1e-3)]
    model = nn.Sequential(*map(Between, steps))
    own = copy.deepcopy(model)
    report = fusednorm.accelerate(model)
    found = ["layer scale" in entry.into or "drop path" in entry.into for entry in sums(report)]
    assert found == [True, False, True, False, False]
    x = torch.randn(3, D)
    torch.testing.assert_close(model.eval()(x), own.eval()(x))
    model[0].step.factor = own[0].step.factor = 2.0  # what was seen holds no more
    model[1].act.factor = own[1].act.factor = 5.0
    torch.testing.assert_close(model(x), own(x))


@pytest.mark.usefixtures("always_fused")
def test_drop_path_loses_whole_samples_as_often():
    torch.manual_seed(0)
    model = Between(Path(0.5))
    fusednorm.accelerate(model)
    x = torch.randn(400, 2, D)
    h = model.act(model.fc(x))
    found = []
    with fused.listening(lambda norm, total, steps: found.append(total)):
        model(x)
    dropped = (found[0] == x).flatten(1)
    assert bool((dropped.all(1) | ~dropped.any(1)).all())
    kept = ~dropped.all(1)
    torch.testing.assert_close(found[0][kept], (x + 2.0 * h)[kept])
    assert 140 < int(kept.sum()) < 260  # 200 +- 6 sigma


def test_a_norm_whose_weight_changed_since_the_sum_is_computed_anew(stack):
    fusednorm.accelerate(stack)
    norm = stack.norm
    for change in (lambda: norm.weight.fill_(3.0), lambda: setattr(norm, "bias", None)):
        total = fused.add(residual=torch.randn(3, D), branch=torch.randn(3, D), norm=norm)
        with torch.no_grad():
            change()
        assert handover.take(norm, total) is None
    total = fused.add(residual=torch.randn(3, D), branch=torch.randn(3, D), norm=norm)
    other = {"weight": torch.full((D,), 2.0)}
    expected = F.layer_norm(total, (D,), other["weight"], None, norm.eps)
    torch.testing.assert_close(torch.func.functional_call(norm, other, (total,)), expected)


class Keeps(nn.Module):
    """A block that keeps its sum, in a way that the text between the braces says."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.kept = nn.Linear(D, D), nn.LayerNorm(D), []


class KeepsAttribute(Keeps):
    def forward(self, x):
        h = x + self.fc(x)
        y = self.norm(h)
        self.last = h
        return y


class KeepsElement(Keeps):
    def forward(self, x):
        h = x + self.fc(x)
        y = self.norm(h)
        self.kept.append(h)
        return y


class KeepsHook(Keeps):
    def forward(self, x):
        h = x + self.fc(x)
        y = self.norm(h)
        h.register_hook(self.kept.append)
        return y


class Differentiates(Keeps):
    def forward(self, x):
        h = x + self.fc(x)
        y = self.norm(h)
        return torch.autograd.grad(y.square().sum(), h, create_graph=True)[0]


class UsesLater(Keeps):
    def forward(self, x):
        h = x + self.fc(x)
        y = self.norm(h)
        return torch.cat([y, h], -1) + h.mean()


@pytest.mark.parametrize("kind", [KeepsAttribute, KeepsElement, KeepsHook, Differentiates])
def test_a_sum_that_is_kept_elsewhere_is_left(kind):
    report = fusednorm.accelerate(kind())
    assert not sums(report) and "the sum is kept or changed after the norm too" in str(report)
    assert sums(fusednorm.accelerate(UsesLater()))


class Inplace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.norm = nn.Linear(D, D), nn.Dropout(0.5, inplace=True), nn.LayerNorm(D)

    def forward(self, x):
        h = self.fc(x)
        x = x + self.drop(h)
        return self.norm(x), (h == 0).sum()


def test_dropout_in_place_changes_what_it_did():
    model = Inplace()
    fusednorm.accelerate(model)
    assert model(torch.randn(50, D))[1] > 300


def test_a_dry_run_of_an_accelerated_model_is_refused(stack):
    fusednorm.accelerate(stack, feed_forward=False)
    kinds = [type(part) for part in stack.modules()]
    with pytest.raises(ValueError, match="dry_run: the model is accelerated already"):
        fusednorm.accelerate(stack, dry_run=True)
    with pytest.raises(TypeError, match="example"):
        fusednorm.accelerate(stack, example=3)
    assert [type(part) for part in stack.modules()] == kinds


class Strict(nn.LayerNorm):
    """A class that cannot be derived from without a word."""

    def __init_subclass__(cls, *, word: str) -> None:
        super().__init_subclass__()

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def test_an_error_while_changing_undoes_everything(monkeypatch):
    model = nn.Sequential(nn.LayerNorm(D), Strict(D))
    report = fusednorm.accelerate(model)
    assert [entry.reason for entry in report.left] == [
        f"{Strict.__module__}.Strict can only be derived from with keywords"
    ]
    monkeypatch.setattr("fusednorm.acceleration.swap.swap_norm", lambda module, form: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fusednorm.accelerate(model)
    assert type(model[0]) is nn.LayerNorm and type(model[1]) is Strict


class Answer:
    def __init__(self, x) -> None:
        self.x = x


def test_an_example_with_nothing_to_compare_is_refused():
    class Opaque(nn.LayerNorm):
        def forward(self, x):
            return Answer(super().forward(x))

    with pytest.raises(ValueError, match="example: the model's output has no floating-point tensor"):
        fusednorm.accelerate(Opaque(D), example=torch.randn(3, D))


class Upcasting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), 1e-6

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Moody(Upcasting):
    def forward(self, x):
        y = super().forward(x)
        return y * 2.0 if self.training else y


def test_norms_are_tried_in_both_modes_and_in_16_bits():
    model = Upcasting().bfloat16()
    x = torch.randn(3, D, dtype=torch.bfloat16)
    own = model(x)
    assert len(fusednorm.accelerate(model).fused) == 1
    assert model(x).dtype == own.dtype == torch.float32
    assert not fusednorm.accelerate(Moody()).fused


def test_a_norm_parametrized_since_is_refused(stack):
    fusednorm.accelerate(stack)
    nn.utils.parametrizations.weight_norm(stack.norm, "weight", dim=None)
    with pytest.raises(ValueError, match=r"model\.norm: was given the class .*Parametrized.* after accelerate"):
        fusednorm.restore(stack)
    nn.utils.parametrize.remove_parametrizations(stack.norm, "weight")
    fusednorm.restore(stack)
    assert type(stack.norm) is nn.LayerNorm


def test_data_parallel_replicas_can_be_made(stack):
    x = torch.randn(3, D)
    own = stack(x)
    fusednorm.accelerate(stack)
    with pytest.raises(ValueError, match="several devices"):
        fusednorm.accelerate(nn.DataParallel(stack))
    replica = stack.norm._replicate_for_data_parallel()
    replica.weight, replica.bias = stack.norm.weight * 1.0, stack.norm.bias * 1.0  # as torch's replicate() does
    torch.testing.assert_close(replica(stack.blocks[1](stack.blocks[0](x))), own)


def test_a_file_edited_since_its_import_is_left(tmp_path, monkeypatch):
    text = "from torch import nn\nclass Own(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    text += "        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)\n"
    text += "    def forward(self, x):\n        return self.norm(x + self.fc(x) * 2.0)\n"
    (tmp_path / "edited.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import edited

    assert sums(fusednorm.accelerate(edited.Own()))
    (tmp_path / "edited.py").write_text(text.replace("2.0", "4.0"))
    from fusednorm.acceleration import source

    source._read.cache_clear()
    report = fusednorm.accelerate(edited.Own())
    assert not sums(report) and "the source of forward is not that of the running code" in str(report)
