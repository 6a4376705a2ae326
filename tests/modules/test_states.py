"""States saved and loaded by every module are taken and refused as torch's take and refuse them."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from every_module import MAKERS, E, make, twins
from torch import nn

import fusednorm

TWINS = pytest.mark.parametrize("name", MAKERS)
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@TWINS
@COMPILED
@pytest.mark.parametrize("assign", [False, True])
def test_states_go_both_ways_and_keep_parameters_as_torchs_do(name, compiled, assign):
    theirs, ours = twins(name)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    if compiled:
        ours.compile(backend="eager")
    for source, target in ((theirs, ours), (ours, theirs), (ours, make(name))):
        before = list(target.parameters())
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        assert str(target.load_state_dict(state, strict=True, assign=assign)) == "<All keys matched successfully>"
        after = list(target.parameters())
        assert [a is b for a, b in zip(after, before, strict=True)] == [not assign] * len(after)
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in after)
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value)
            assert (target.get_parameter(key).data_ptr() == state[key].data_ptr()) == assign


def _last(state: dict[str, Any]) -> str:
    return list(state)[-1]


def _renames_what_it_saves(module: nn.Module) -> None:
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state["renamed"] = state.pop(_last(state))

    module._register_state_dict_hook(rename)


STATES = {
    "as it is": lambda state: state,
    "a key is missing": lambda state: {k: v for k, v in state.items() if k != _last(state)},
    "a key too many": lambda state: {**state, "more.weight": torch.ones(1)},
    "another size": lambda state: {**state, _last(state): torch.ones(E + 1)},
    "a list for a tensor": lambda state: {**state, _last(state): [1.0] * E},
    "None for a tensor": lambda state: {**state, _last(state): None},
    "another dtype": lambda state: {k: v.double() for k, v in state.items()},
    "parameters": lambda state: {k: nn.Parameter(v) for k, v in state.items()},
    "a meta tensor": lambda state: {**state, _last(state): state[_last(state)].to("meta")},
    "no mapping": lambda state: list(state),
    "nothing": lambda state: {},
}
HOOKS = {
    "no hook": lambda module: None,
    "missing keys cleared": lambda m: m.register_load_state_dict_post_hook(lambda m, keys: keys.missing_keys.clear()),
    "renamed when saved": _renames_what_it_saves,
}


@TWINS
@pytest.mark.parametrize("hook", HOOKS)
def test_states_are_taken_and_refused_where_torchs_are(name, hook):
    for state, strict in itertools.product(STATES, (True, False)):
        theirs, ours = twins(name)
        given = STATES[state](dict(theirs.state_dict()))
        seen = []
        for module in (theirs, ours):
            HOOKS[hook](module)
            try:
                found = module.load_state_dict(given, strict=strict)
            except Exception as error:
                seen.append((type(error), [key for key in given if f'"{key}"' in str(error)]))
            else:
                seen.append((list(found.missing_keys), list(found.unexpected_keys)))
        assert seen[0] == seen[1], (state, strict)


@pytest.mark.parametrize("change", ["a child that is None", "a scalar saved with one element"])
def test_oddities_of_states_are_torchs(change):
    seen = []
    for space in (nn, fusednorm):
        module = MAKERS["TransformerEncoder"](space)
        state = module.state_dict()
        if change == "a child that is None":
            module.norm = None
        else:
            for layer in module.layers:
                layer.activation = nn.PReLU(init=0.5)
                layer.activation.weight = nn.Parameter(torch.tensor(0.5))
            state |= {f"layers.{i}.activation.weight": torch.ones(1) for i in range(2)}
        seen.append(str(module.load_state_dict(state)))
    assert seen == ["<All keys matched successfully>"] * 2


@pytest.mark.parametrize("name", [name for name in MAKERS if "Norm" not in name])
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("a list for a tensor", "expected a tensor"),
        ("a meta tensor", "no data"),
        ("a key is missing", 'nothing was loaded(.|\n)*Missing.*bias"'),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(name, state, message):
    ours = make(name)
    before = copy.deepcopy(ours.state_dict())
    given = {k: torch.zeros_like(v) for k, v in before.items()}
    with pytest.raises(RuntimeError, match=message):
        ours.load_state_dict(STATES[state](given))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
