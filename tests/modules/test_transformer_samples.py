"""PyTorch's own module samples through our layers: torch's results and gradients."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch_samples
from drop_in import error, results, twins, wide

OP = "attention_fwd"
NAMES = (
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "Transformer",
)
EVERY_MODULE = pytest.mark.parametrize("name", NAMES)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# the quick tests take some of the samples, in each dtype and mode others
EVERY_SAMPLE = pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"]
)
MODE = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@functools.cache
def samples(name: str, dtype: torch.dtype, training: bool, first: int = 0, step: int = 1) -> list:
    """(torch's module, ours, arguments, keywords) of each, or of every so many from one on."""
    info = torch_samples.module(name)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's encoder says why it makes no nested tensors
        every = info.module_inputs_func(info, "cpu", dtype, True, training)
        assert len(every) >= 30, f"torch has no more samples of {name}"
        for sample in every[first::step]:
            made, call = sample.constructor_input, sample.forward_input
            device = {} if name == "TransformerEncoder" else {"device": "cpu", "dtype": dtype}
            theirs, ours = twins(name, *made.args, **{**made.kwargs, **device})
            found.append((theirs.train(training), ours.train(training), tuple(call.args), call.kwargs))
    return found


def check(name: str, dtype: torch.dtype, training: bool, using, first: int = 0, step: int = 1) -> None:
    """Errors over the samples at most twice torch's own, and a rounding for each of the dozen steps of a layer."""
    worst = {"theirs": 0.0, "ours": 0.0}
    for theirs, ours, args, kwargs in samples(name, dtype, training, first, step):
        found = exact = results(theirs, args, kwargs)
        if dtype != torch.float64:
            exact = results(wide(theirs), tuple(map(wide, args)), {n: wide(v) for n, v in kwargs.items()})
        worst["theirs"] = max(worst["theirs"], error(found, exact))
        with using:
            worst["ours"] = max(worst["ours"], error(results(ours, args, kwargs), exact))
    bound = 2.0 * worst["theirs"] + 12 * torch.finfo(dtype).eps
    if dtype == torch.float64:  # torch is its own reference: two orders of summation, over the few hundred terms here
        bound = 100 * torch.finfo(dtype).eps
    assert worst["ours"] <= bound, (worst, bound)


@EVERY_SAMPLE
@MODE
@DTYPE
@EVERY_MODULE
def test_samples_give_torchs_results_and_gradients(name, dtype, training, every):
    first = 4 * (dtype == torch.float64) + 2 * training
    check(name, dtype, training, nullcontext(), *(() if every else (first, 8)))


@EVERY_SAMPLE
@EVERY_MODULE
def test_samples_on_every_provider(name, provider, using, every):
    check(name, torch.float32, True, using, *(() if every else (1 + len(provider) % 3, 12)))


@DTYPE
@EVERY_MODULE
def test_samples_without_gradients_in_eval_mode(name, dtype):
    """Torch takes its fast path here, but for the nested tensors that have no result at a padded position."""
    for theirs, ours, args, kwargs in samples(name, dtype, False, 1, 6):
        for module in theirs.modules():
            if isinstance(module, torch.nn.TransformerEncoder):
                module.use_nested_tensor = False
        with torch.no_grad():
            torch.testing.assert_close(ours(*args, **kwargs), theirs(*args, **kwargs))


@EVERY_MODULE
def test_samples_with_strided_inputs(name):
    """The results of contiguous inputs."""
    for _, ours, args, kwargs in samples(name, torch.float64, True, 1, 6):
        strided = tuple(torch_samples.strides_apart(a) for a in args)
        masks = {n: torch_samples.strides_apart(v) for n, v in kwargs.items()}
        assert any(not a.is_contiguous() for a in strided)
        assert error(results(ours, strided, masks), results(ours, args, kwargs)) < 1e-14


@EVERY_MODULE
def test_samples_survive_pickling_copying_and_the_way_through_torchs_state(name):
    for theirs, ours, args, kwargs in samples(name, torch.float32, True, 1, 12):
        expected = ours(*args, **kwargs)
        for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert type(other) is type(ours) and repr(other) == repr(ours)
            torch.testing.assert_close(other(*args, **kwargs), expected, rtol=0.0, atol=0.0)
        assert theirs.load_state_dict(ours.state_dict()) == ours.load_state_dict(theirs.state_dict())
