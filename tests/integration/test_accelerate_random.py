"""`accelerate` on modules drawn at random: each computes what it did before, or is left as it was.

A failure names its seed and shows the drawn source.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import linecache
import random
import sys
import traceback
from typing import Any

import pytest
import torch
from random_adaptive import Adaptive
from random_blocks import B, Block, D, S, draw
from torch import nn

import fusednorm

SEEDS, GROUP = 200, 10
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch, once


@pytest.fixture(autouse=True)
def always_fused(monkeypatch):
    """Layer scale and drop path of small tensors too."""
    monkeypatch.setattr("fusednorm.acceleration.fused._LARGE", 0)


@pytest.fixture
def load(tmp_path):
    """Writes a block into a file and imports that."""
    names = []

    def imported(block: Block, exact: bool):
        name = f"random_block_{block.seed}{'_exact' * exact}"
        path = tmp_path / f"{name}.py"
        path.write_text(block.source(exact))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        names.append(name)
        spec.loader.exec_module(module)
        return module

    yield imported
    for name in names:
        del sys.modules[name]
    linecache.clearcache()


class Twin:
    """A model with its source's module, what was logged by its hooks, and the dtype it computes in."""

    def __init__(self, model: nn.Module, module: Any, dtype: torch.dtype) -> None:
        self.model, self.module, self.dtype, self.log = model, module, dtype, []

    def run(self, given: dict[str, torch.Tensor | None]) -> list[torch.Tensor | None] | type[Exception]:
        """Outputs, gradients and what hooks saw; or the type of what it raised."""
        self.log.clear()
        x = given["x"].detach().to(self.dtype).requires_grad_()
        try:
            out = self.model(x, given["ids"], mask=given["mask"])
            outputs = out if isinstance(out, tuple) else (out,)
            leaves = [x, *(p for p in self.model.parameters() if p.requires_grad)]
            weights = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape).to(o) for o in outputs]
            grads = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
        except Exception as fault:
            return type(fault)
        return [*(o.detach() for o in outputs), *grads, *self.log]

    def forward(self, given: dict[str, torch.Tensor | None]) -> list[torch.Tensor] | type[Exception]:
        self.log.clear()
        try:
            with torch.no_grad():
                out = self.model(given["x"].to(self.dtype, copy=True), given["ids"], mask=given["mask"])
        except Exception as fault:
            return type(fault)
        return [*(o.detach() for o in (out if isinstance(out, tuple) else (out,))), *self.log]

    def hook(self, seed: int) -> None:
        """On up to three modules; some change what passes."""
        rng = random.Random(seed)
        names = [n for n, m in self.model.named_modules() if n and not isinstance(m, nn.ModuleList)]
        for name in rng.sample(names, min(len(names), rng.choice((1, 2, 3)))):
            part, kind = self.model.get_submodule(name), rng.choice(("see", "change", "pre", "pre change", "backward"))
            if kind == "backward":
                part.register_full_backward_hook(self._see_backward)
            elif kind.startswith("pre"):
                part.register_forward_pre_hook(functools.partial(self._before, factor=1.25 if "c" in kind else None))
            else:
                part.register_forward_hook(functools.partial(self._after, factor=1.25 if kind == "change" else None))

    def _before(self, part: nn.Module, args: tuple, factor: float | None) -> tuple | None:
        self.log += [a.detach().clone() for a in args if isinstance(a, torch.Tensor)]
        return None if factor is None or not args[0].is_floating_point() else (args[0] * factor, *args[1:])

    def _after(self, part: nn.Module, args: tuple, out: torch.Tensor, factor: float | None) -> torch.Tensor | None:
        self.log += [a.detach().clone() for a in (*args, out) if isinstance(a, torch.Tensor)]
        return None if factor is None else out * factor

    def _see_backward(self, part: nn.Module, grads_in: tuple, grads_out: tuple) -> None:
        self.log += [g.detach().clone() for g in grads_out if g is not None]

    def change(self, what: str, seed: int) -> None:
        """As a user might once the model was accelerated."""
        rng, modules = random.Random(seed), dict(self.model.named_modules())
        torch.manual_seed(seed)
        if what == "flag":
            for part in modules.values():
                part.__dict__["flag"] = True
        elif what == "scale":
            self.module.SCALE = 0.25
        elif what == "helper":
            self.module.helper = lambda t: t + 0.5
            self.module.modulate = getattr(self.module, "other", None)
        elif what == "norm":
            names = [n for n, m in modules.items() if "norm" in n.rpartition(".")[2]]
            if names:
                self._put(rng.choice(names), shaken(nn.LayerNorm(D)).to(self.dtype))
        else:
            names = [n for n, m in modules.items() if n.rpartition(".")[2].startswith("fc") and type(m) is nn.Linear]
            if names and what == "linear":
                name = rng.choice(names)
                added = self.module.LowRank(nn.Linear(modules[name].in_features, modules[name].out_features))
                self._put(name, shaken(added).to(self.dtype))
            elif names:
                part = modules[rng.choice(names)]
                part.forward = functools.partial(_and_half, part.forward)

    def _put(self, name: str, part: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(parent), last, part)

    def drop(self, p: float) -> None:
        for part in self.model.modules():
            if isinstance(getattr(part, "p", None), float):
                part.p = p


def _and_half(forward: Any, x: torch.Tensor) -> torch.Tensor:
    return forward(x) + 0.5


def shaken(model: nn.Module) -> nn.Module:
    """No parameter is left at zeros or ones, which hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter), alpha=0.3)
    return model


def scaled_errors(found: list, exact: list) -> list[float]:
    """The largest error of each result, beside its own largest entry."""
    assert len(found) == len(exact), f"{len(found)} results instead of {len(exact)}: hooks fired another time"
    errors = []
    for mine, truth in zip(found, exact, strict=True):
        assert (mine is None) == (truth is None), "a gradient is missing, or one is there that was not"
        if truth is not None:
            assert mine.shape == truth.shape
            distance = (mine.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-2)
            errors.append(float(distance))
            assert not distance.isnan()
    return errors


def compare(kind: str, found: Any, own: Any, exact: Any, roundings: float) -> None:
    """Twice the error of the model's own code, and half an ulp for each operation that may round another way."""
    if isinstance(own, type) or isinstance(found, type):
        assert found is own, f"{kind}: {found} was raised instead of {own}"
        return
    assert [None if t is None else t.dtype for t in found] == [None if t is None else t.dtype for t in own], kind
    bound = 2 * max(scaled_errors(own, exact), default=0.0) + roundings
    errors = scaled_errors(found, exact)
    assert max(errors) <= bound, f"{kind}: off by {max(errors):.2g}, allowed are {bound:.2g}; all: {errors}"


def inputs(seed: int, width: int = D) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, S, width, generator=generator)
    ids = torch.randint(0, 11, (B, S), generator=generator)
    mask = torch.rand(B, S, generator=generator) < 0.3 if seed % 2 else None
    return {"x": x, "ids": ids if width == D else ids + 11, "mask": mask}


def made(block: Block, load: Any) -> tuple[Twin, Twin, Twin]:
    """The model twice, and in float64."""
    module, wide = load(block, exact=False), load(block, exact=True)
    torch.manual_seed(block.seed)
    model = shaken(module.make())
    exact = wide.make().double()
    exact.load_state_dict(model.state_dict())
    own = Twin(model, module, torch.float32)
    return own, Twin(copy.deepcopy(model), module, torch.float32), Twin(exact, wide, torch.float64)


def check(block: Block, load: Any) -> None:
    seed, given = block.seed, inputs(block.seed)
    own, ours, exact = twins = made(block, load)
    if seed % 3 == 0:
        for twin in twins:
            twin.hook(seed)
    classes = [type(part) for part in ours.model.modules()]
    report = fusednorm.accelerate(ours.model)
    assert all(entry.reason for entry in report.left), "an entry without a reason"
    assert [type(part) for part in own.model.modules()] == classes
    for what in block.after:
        for twin in twins:
            twin.change(what, seed)
    if seed % 5 == 0:
        for twin in twins:
            twin.hook(seed + 1)
    unit = torch.finfo(torch.bfloat16 if "branch: low" in block.drawn else torch.float32).eps / 2
    modulations = sum(line.startswith("modulation") for line in block.drawn)
    operations = block.text.count("\n") + 2 * modulations  # three to a modulation
    roundings = unit * operations * (2 if modulations else 1)  # both blocks of the model run them
    for training in (False, True):
        for twin in twins:
            twin.model.train(training)
            twin.drop(0.0)
        name = "training" if training else "eval"
        compare(name, ours.run(given), own.run(given), exact.run(given), roundings)
        compare(f"{name}, no_grad", ours.forward(given), own.forward(given), exact.forward(given), roundings)
    check_dropout(own, ours, exact, given, roundings)
    fusednorm.restore(ours.model)
    check_restored(own, ours, given)


def check_dropout(own: Twin, ours: Twin, exact: Twin, given: dict, roundings: float) -> None:
    """In training: nothing is dropped at 1e-9; at 0.3 the same parameters have gradients."""
    for twin in (own, ours):
        twin.drop(1e-9)
    compare("p = 1e-9", ours.run(given), own.run(given), exact.run(given), roundings)
    for twin in (own, ours):
        twin.drop(0.3)
    found, expected = ours.run(given), own.run(given)
    if isinstance(expected, type) or isinstance(found, type):
        assert found is expected, f"p = 0.3: {found} instead of {expected}"
        return
    assert [None if t is None else (t.shape, t.dtype) for t in found] == [
        None if t is None else (t.shape, t.dtype) for t in expected
    ], "p = 0.3"


def check_restored(own: Twin, ours: Twin, given: dict) -> None:
    assert [type(p) for p in ours.model.modules()] == [type(p) for p in own.model.modules()], "restored classes"
    for training in (False, True):
        for twin in (own, ours):
            twin.model.train(training)
            twin.drop(0.0)
        found, expected = ours.run(given), own.run(given)
        if isinstance(expected, type):
            assert found is expected
            continue
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine is theirs or torch.equal(mine, theirs), "restored, but not bit for bit"


def check_errors(block: Block, load: Any) -> None:
    """A width that does not fit, or an index out of range."""
    own, ours, _ = made(block, load)
    fusednorm.accelerate(ours.model)
    for training in (False, True):
        for twin in (own, ours):
            twin.model.train(training)
        wrong = inputs(block.seed, D + 1)
        found, expected = ours.run(wrong), own.run(wrong)
        raised = [result if isinstance(result, type) else None for result in (found, expected)]
        assert raised[0] is raised[1], f"{raised[0]} was raised instead of {raised[1]}"


def each(checked: Any, group: int, load: Any, writer: type | None = None) -> None:
    """All seeds of a group; what failed is shown with its source."""
    failures = []
    for seed in range(group * GROUP, (group + 1) * GROUP):
        block = draw(seed, writer)
        try:
            checked(block, load)
        except Exception:
            drawn = "\n".join(["drawn:", *block.drawn, f"after accelerate: {block.after}"])
            failures.append(f"seed {seed}\n{traceback.format_exc(limit=-3)}\n{drawn}\n{block.text}")
    assert not failures, f"{len(failures)} of {GROUP} seeds\n" + "\n".join(failures)


GROUPS = pytest.mark.parametrize("group", range(SEEDS // GROUP))


@GROUPS
def test_every_block_is_right_or_left_alone(group, load):
    each(check, group, load)


@GROUPS
def test_every_block_raises_what_it_did(group, load):
    each(check_errors, group, load)


@GROUPS
def test_every_adaptive_block_is_right_or_left_alone(group, load):
    each(check, group, load, Adaptive)


def test_a_fair_share_of_gates_and_modulations_is_fused(load):
    counts = dict.fromkeys(("gate", "modulation", "both"), 0)
    for seed in range(SEEDS):
        fused = fusednorm.accelerate(made(draw(seed, Adaptive), load)[1].model).fused
        counts["gate"] += any("gate" in entry.into for entry in fused)
        counts["modulation"] += any(entry.kind == "modulation" for entry in fused)
        counts["both"] += any("gate" in entry.into and "modulation" in entry.into for entry in fused)
    assert min(counts.values()) >= 0.15 * SEEDS, counts


def test_a_fair_share_is_fused(load):
    """Else the test above would compare models with themselves."""
    fused = dict.fromkeys(("norm", "residual", "feed_forward"), 0)
    some = 0
    for seed in range(SEEDS):
        report = fusednorm.accelerate(made(draw(seed), load)[1].model)
        kinds = {entry.kind for entry in report.fused}
        some += bool(kinds & {"residual", "feed_forward"})
        for kind in fused:
            fused[kind] += kind in kinds
    assert some >= 0.4 * SEEDS, f"{some} of {SEEDS}"
    assert min(fused.values()) >= 0.15 * SEEDS, fused
