"""Blocks and uses of blocks in which a fused sum is easily wrong. Each computes what an untouched copy does."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm.acceleration import fused, steps
from tests.helpers.small_blocks import D, Stack, sums


class Other:
    @staticmethod
    def dropout(x, p):
        return x * 5.0


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.drop, self.act = nn.Linear(D, D), nn.LayerNorm(D), nn.Dropout(0.0), nn.GELU()
        self.state, self.calls = torch.zeros(()), 0

    def keep(self, x):
        self.state = x * 3.0
        return x

    def bump(self, x):
        self.calls += 1
        return x


class Shadowed(Base):
    def forward(self, x, F=Other):
        h = x + F.dropout(self.lin(x), 0.0)
        return self.norm(h)


class StateFirst(Base):
    def forward(self, x):
        y = self.lin(self.keep(x))
        h = self.state + self.drop(y)
        return self.norm(h)


class Walrus(Base):
    def forward(self, x):
        y = self.lin(z := x * 2.0)
        h = z + self.drop(y)
        return self.norm(h)


class CountFirst(Base):
    def forward(self, x):
        y = self.lin(self.bump(x))
        return self.calls * self.act(y)


class Step(Base):
    def step(self, x):
        h = x + self.drop(self.lin(x))
        return self.norm(h)


class Borrowed(Base):
    forward = Step.step

    def step(self, x):
        return x * 0.0


class Named(Base):
    """The norm is where Python has no name for it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({"0": nn.LayerNorm(D), "in": nn.LayerNorm(D)})
        self.ffn = nn.Sequential(OrderedDict([("layer-norm", nn.LayerNorm(D)), ("lin", nn.Linear(D, D))]))

    def forward(self, x):
        h = x + self.lin(x)
        h = h + self.lin(self.norms["0"](h))
        h = h + self.lin(self.norms["in"](h))
        return h + self.ffn(h)


class Transposed(Base):
    def forward(self, x):
        h = x.transpose(0, 1) + self.drop(x.transpose(0, 1))
        n = self.norm(h)
        return n, h.transpose(0, 1).view(-1)


class Edited(Base):
    def forward(self, x):
        h = x + self.lin(x)
        n = self.norm(h).detach()
        h += 1.0
        return h * n


class EpsChanges(Base):
    def forward(self, x):
        h = x + self.lin(x)
        self.norm.eps = 1.0
        return self.norm(h)


class Scalar(Base):
    def forward(self, x):
        h = self.drop(self.lin(x)) + self.state
        return self.norm(h)


BLOCKS = [Shadowed, StateFirst, Walrus, CountFirst, Borrowed, Named, Transposed, Edited, EpsChanges, Scalar]


def flat(out):
    return torch.cat([t.reshape(-1) for t in (out if isinstance(out, tuple) else (out,))])


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_that_is_easily_wrong_computes_what_it_did(kind):
    torch.manual_seed(0)
    model = kind()
    own = copy.deepcopy(model)
    fusednorm.accelerate(model)
    found = []
    for m in (model, own):
        x = torch.randn(3, 4, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = flat(m(x))
        y.cos().sum().backward()
        found.append((y, x.grad, m.lin.weight.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    if hasattr(model, "step"):
        torch.testing.assert_close(model.step(x), own.step(x))


def test_a_part_with_the_norm_can_be_replaced_or_compiled():
    model = Named()
    assert len(sums(fusednorm.accelerate(model))) == 3
    x = torch.randn(2, D)
    own = copy.deepcopy(model)
    fusednorm.restore(own)
    torch.testing.assert_close(model(x), own(x))
    model.ffn = own.ffn = nn.Identity()
    torch.testing.assert_close(model(x), own(x))


def before(block, action):
    def hook(module, args):
        action(args[0])

    block.register_forward_pre_hook(hook)


def pair():
    torch.manual_seed(0)
    own = Stack()
    model = copy.deepcopy(own)
    assert len(sums(fusednorm.accelerate(model))) == 4
    return model, own


def inference(m, x):
    before(m.blocks[1], lambda h: h[..., 0].add_(3.0))
    with torch.inference_mode():
        return m(x)


def wants_gradient_later(m, x):
    m.requires_grad_(False)
    h = m.blocks[0](x).requires_grad_(True)
    m.blocks[1](h).cos().sum().backward()
    return h.grad


def thaws_later(m, x):
    m.requires_grad_(False)
    h = m.blocks[0](x)
    m.blocks[1].norm1.requires_grad_(True)
    m.blocks[1](h).cos().sum().backward()
    return m.blocks[1].norm1.weight.grad


def detached(m, x):
    h = m.blocks[0](x)
    h.detach_()
    m.blocks[1](h).cos().sum().backward()
    assert m.blocks[0].mix.weight.grad is None
    return m.blocks[1].norm1.weight.grad


def checkpointed(m, x):
    h = checkpoint(m.blocks[1], m.blocks[0](x), use_reentrant=False)
    m.norm(h).cos().sum().backward()
    return m.blocks[1].norm1.weight.grad


def bias_added(m, x):
    m.norm.bias = nn.Parameter(torch.full((D,), 0.7))
    m(x).cos().sum().backward()
    return m.norm.bias.grad


def weight_doubled(m, x):
    h = m.blocks[0](x)
    with torch.no_grad():
        m.blocks[1].norm1.weight.mul_(2.0)
    return m.blocks[1](h)


@pytest.mark.parametrize(
    "use", [inference, wants_gradient_later, thaws_later, detached, checkpointed, bias_added, weight_doubled]
)
def test_a_use_between_two_blocks_gives_what_it_did(use):
    model, own = pair()
    x = torch.randn(3, D)
    torch.testing.assert_close(use(model, x.clone()), use(own, x.clone()))


def test_a_saved_feature_is_a_plain_tensor():
    model, _ = pair()
    with torch.no_grad():
        h = model.blocks[0](torch.randn(3, D))
    file = io.BytesIO()
    torch.save(h, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), h) and not h.__dict__


def test_what_waits_dies_with_its_sum():
    from fusednorm.acceleration import handover

    model, _ = pair()
    count = len(handover.waiting)
    h = model.blocks[0](torch.randn(3, D))
    assert len(handover.waiting) == count + 1
    del h
    assert len(handover.waiting) == count


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_works(protocol):
    model, _ = pair()
    x = torch.randn(3, D)
    assert torch.equal(pickle.loads(pickle.dumps(model, protocol))(x), model(x))


def test_a_layer_scale_of_another_size_or_dtype_is_applied_by_itself(monkeypatch):
    monkeypatch.setattr(fused, "_LARGE", 0)

    class Scale(nn.Module):
        def __init__(self, size, dtype) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.full((size,), 0.5, dtype=dtype))

        def forward(self, x):
            return x * self.gamma

    norm = nn.LayerNorm(D, elementwise_affine=False)
    fusednorm.accelerate(norm)
    for size, dtype, kind in [(1, torch.float32, torch.float32), (D, torch.float32, torch.bfloat16)]:
        scale = Scale(size, dtype)
        steps.mark(scale, "layer_scale")
        x, r = torch.randn(2, 3, D).to(kind), torch.randn(2, 3, D).to(kind)
        total = fused.add(residual=r, branch=x, norm=norm, steps=(scale,))
        torch.testing.assert_close(total, r + scale(x))
    assert F.layer_norm(total, (D,)).dtype == norm(total).dtype
