"""Every module of the package behaves as torch's under what nn.Module offers: copies and conversions."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from every_module import ADDED, MAKERS, E, make, output, twins
from torch import nn
from torch.nn.utils import parametrize

import fusednorm

EVERY = pytest.mark.parametrize("name", [*MAKERS, *ADDED])
TWINS = pytest.mark.parametrize("name", MAKERS)
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def test_every_module_of_the_package_is_here():
    public = (getattr(fusednorm, name) for name in fusednorm.__all__)
    assert {c.__name__ for c in public if isinstance(c, type) and issubclass(c, nn.Module)} == {*MAKERS, *ADDED}


def saved(module: nn.Module | dict[str, Any]) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


def through_weights_only(module: nn.Module) -> nn.Module:
    """What a careful reader loads: the classes that the file names, and no other."""
    functions = [torch.nn.functional.relu, torch._C._nn.gelu, set]
    with torch.serialization.safe_globals([*{type(m) for m in module.modules()}, *functions]):
        return torch.load(saved(module), weights_only=True)


def through_its_state(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7.0)
    other.load_state_dict(torch.load(saved(module.state_dict()), weights_only=True))
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: torch.load(saved(module), weights_only=False),
    "weights_only": through_weights_only,
    "state": through_its_state,
    "copy": copy.copy,
}


@EVERY
@COMPILED
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_with_its_own_parameters(name, compiled, how):
    module = make(name)
    expected = output(module, name)
    if compiled:
        module.compile(backend="eager")
    other = COPIES[how](module)
    assert type(other) is type(module) and other.training == module.training
    assert other._compiled_call_impl is None  # as torch's copies
    assert set(vars(other)) == set(vars(module)) - {"_compiled_call_impl"}
    assert repr(other) == repr(module) and list(other.state_dict()) == list(module.state_dict())
    assert torch.equal(output(other, name), expected)
    shared = [a is b for a, b in zip(module.parameters(), other.parameters(), strict=True)]
    assert shared == [how == "copy"] * len(shared)
    reference = make(name)
    with torch.no_grad():
        for parameter in (*other.parameters(), *reference.parameters()):
            parameter.fill_(0.25)
    changed = output(reference, name)
    assert not torch.equal(changed, expected)
    assert torch.equal(output(other, name), changed)


@TWINS
@COMPILED
def test_a_pickle_holds_what_torchs_holds(name, compiled):
    theirs, ours = twins(name)
    if compiled:
        theirs.compile(backend="eager")
        ours.compile(backend="eager")
    own = {"recompute"}
    for one, other in zip(theirs.modules(), ours.modules(), strict=True):
        assert set(other.__getstate__()) - own == set(one.__getstate__())


CONVERSIONS = {
    "to(float64)": lambda module: module.to(torch.float64),
    "double": lambda module: module.double(),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "type": lambda module: module.type(torch.float64),
    "float": lambda module: module.float(),
    "cpu": lambda module: module.cpu(),
    "share_memory": lambda module: module.share_memory(),
    "to(meta).to_empty": lambda module: module.to("meta").to_empty(device="cpu"),
    "requires_grad_": lambda module: module.requires_grad_(False),
    "train": lambda module: module.train(),
    "_apply": lambda module: module._apply(torch.clone),
    "_apply without recursion": lambda module: module._apply(torch.clone, recurse=False),
}


@TWINS
@COMPILED
def test_conversions_do_to_parameters_what_they_do_to_torchs(name, compiled):
    for how, swap in itertools.product(CONVERSIONS, (False, True)):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            seen = [_converted(module, compiled, CONVERSIONS[how]) for module in twins(name)]
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert seen[0] == seen[1], (how, swap)


def _converted(module: nn.Module, compiled: bool, convert: Any) -> list:
    """What became of each parameter, of the state and of the modes."""
    if compiled:
        module.compile(backend="eager")
    before = list(module.parameters())
    assert convert(module) is module
    found: list = [
        (a is b, a.dtype, a.device, a.requires_grad, a.is_shared(), a.is_leaf)
        for a, b in zip(module.parameters(), before, strict=True)
    ]
    found += [(key, value.dtype) for key, value in module.state_dict().items()]
    return found + [(key, part.training) for key, part in module.named_modules()]


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_converted_module_computes_in_its_dtype(name, dtype):
    module = make(name).to(dtype)
    assert output(module, name, dtype).dtype == dtype
    assert output(module, name, dtype).isfinite().all()


@TWINS
def test_what_walks_a_module_meets_what_it_meets_in_torchs(name):
    theirs, ours = twins(name)
    visited: list[list[str]] = [[], []]
    for module, names in zip((theirs, ours), visited, strict=True):
        module.apply(lambda part, names=names: names.append(part._get_name()))
    assert visited[0] == visited[1]
    for walk in ("named_modules", "named_children", "named_parameters", "named_buffers"):
        assert [n for n, _ in getattr(ours, walk)()] == [n for n, _ in getattr(theirs, walk)()]
    assert repr(ours) == repr(theirs)
    assert dir(theirs) == [n for n in dir(ours) if n in dir(theirs)]
    for key, _ in theirs.named_parameters():
        assert ours.get_parameter(key).shape == theirs.get_parameter(key).shape


@TWINS
def test_construction_on_meta_then_to_empty_and_a_state(name):
    theirs, ours = twins(name)
    expected = output(ours, name)
    for device in ("meta", torch.device("meta")):
        other = make(name, device=device)
        assert all(p.is_meta for p in other.parameters())
        other.to_empty(device="cpu").load_state_dict(theirs.state_dict())
        assert torch.equal(output(other, name), expected)
    with torch.device("meta"):
        other = make(name)
    assert all(p.is_meta for p in other.parameters())
    other.load_state_dict(theirs.state_dict(), assign=True)
    assert torch.equal(output(other, name), expected)


ARGUMENTS = {
    **dict.fromkeys(("LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm"), (E,)),
    **dict.fromkeys(("TransformerEncoderLayer", "TransformerDecoderLayer"), (E, 2, 16)),
    "MultiheadAttention": (E, 2),
    "Transformer": (E, 2, 1, 1, 16),
}


@pytest.mark.parametrize(("name", "arguments"), ARGUMENTS.items())
def test_skip_init(name, arguments):
    """Torch's own Transformer warns of its layout; ours of nothing."""
    module = nn.utils.skip_init(getattr(fusednorm, name), *arguments, dtype=torch.float64)
    plain = getattr(fusednorm, name)(*arguments, dtype=torch.float64)
    assert [(k, v.shape, v.dtype) for k, v in module.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in plain.state_dict().items()
    ]
    module.load_state_dict(plain.state_dict())
    assert torch.equal(output(module.eval(), name, torch.float64), output(plain.eval(), name, torch.float64))


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x


@TWINS
def test_parametrised_weights_are_used_as_torchs_are(name):
    theirs, ours = twins(name)
    plain = output(ours, name)
    for module in (theirs, ours):
        for part in list(module.modules()):
            for key in [k for k, _ in part.named_parameters(recurse=False)]:
                parametrize.register_parametrization(part, key, Doubled())
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    found = output(ours, name)
    assert not torch.equal(found, plain)
    # normal weights doubled make logits of some tens: a rounding is worth 1e-5 of the output
    torch.testing.assert_close(found, output(theirs, name), rtol=1e-4, atol=1e-4)
    copied = copy.deepcopy(ours)
    assert torch.equal(output(copied, name), found)
    for part in list(ours.modules()):
        for key in list(getattr(part, "parametrizations", ())):
            parametrize.remove_parametrizations(part, key)
    torch.testing.assert_close(output(ours, name), found)


@EVERY
@COMPILED
def test_swapped_tensors_are_what_the_module_computes_with(name, compiled):
    module, other = make(name), make(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    expected = output(other, name)
    if compiled:
        module.compile(backend="eager")
    for mine, new in zip(module.parameters(), copy.deepcopy(other).parameters(), strict=True):
        torch.utils.swap_tensors(mine, new)
    with torch.no_grad():  # else Dynamo looks for the gradient of what is no leaf, and torch warns of it
        torch.testing.assert_close(output(module, name), expected)
