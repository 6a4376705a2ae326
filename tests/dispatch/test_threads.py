"""Blocks, decisions and first use from several threads and asyncio tasks."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fresh import python

import fusednorm
from fusednorm import dispatch

THREADS = 8


@pytest.fixture
def many_switches():
    """Threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work, threads=THREADS):
    """Run work(number) in each of several threads that start at once; raises what one of them raised."""
    start = threading.Barrier(threads)

    def run(number):
        start.wait()
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


def untouched():
    settings = dispatch.settings.current
    return dispatch.requested() is None and settings.by_shape and not settings.listeners


def test_blocks_of_many_threads_leave_nothing_behind(many_switches):
    def work(number):
        for turn in range(400):
            with fusednorm.use_provider(("reference", "torch", "reference")[(number + turn) % 3]):
                assert dispatch.requested() in ("reference", "torch")
            with fusednorm.batch_invariant():
                assert not dispatch.settings.current.by_shape

    together(work)
    assert untouched()


def test_one_instance_and_one_decorated_function_serve_many_threads(many_switches):
    block = fusednorm.use_provider("reference")

    @fusednorm.use_provider("reference")
    def decorated():
        return dispatch.requested()

    def work(number):
        for _ in range(300):
            with block:
                assert dispatch.requested() == "reference"
            assert decorated() == "reference"

    together(work)
    assert untouched()


@pytest.mark.parametrize("turns", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_calls_go_on_while_other_threads_enter_and_leave(turns, many_switches):
    """The fast path of a call reads what a block changes in another thread."""
    x, weight = torch.randn(4, 8), torch.ones(8)
    expected = torch.nn.functional.layer_norm(x, (8,))
    names = ["reference", *(["cpu"] if "cpu" in fusednorm.available_providers() else [])]
    ended = threading.Event()

    def work(number):
        if number < 3:
            while not ended.is_set():
                with fusednorm.use_provider(names[number % len(names)]):
                    pass
            return
        try:
            for _ in range(turns):
                for y in (
                    fusednorm.layer_norm(x, 8),
                    fusednorm.add_layer_norm(x, torch.zeros(4, 8), 8, weight)[0],
                    fusednorm.rms_norm(x - x.mean(1, keepdim=True), 8, weight, 1e-5),
                ):
                    torch.testing.assert_close(y, expected)
                fusednorm.bias_act_dropout(x, weight)
                fusednorm.scaled_dot_product_attention(x[None], x[None], x[None])
        finally:
            ended.set()

    together(work, 6)
    assert untouched()


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("kind", ["use_provider", "batch_invariant"])
def test_blocks_left_in_any_order_each_remove_themselves(kind, order):
    arguments = [("torch",), ("reference",)] if kind == "use_provider" else [(), ()]
    blocks = [getattr(fusednorm, kind)(*given) for given in arguments]
    for block in blocks:
        block.__enter__()
    left, still = blocks if order == "first" else blocks[::-1]
    left.__exit__(None, None, None)
    assert dispatch.requested() == getattr(still, "name", None)
    assert dispatch.settings.current.by_shape == (kind == "use_provider")
    still.__exit__(None, None, None)
    assert untouched()


def test_tasks_that_interleave_leave_nothing_behind():
    async def task(block, inside, turns):
        with block:
            for _ in range(turns):
                await asyncio.sleep(0)
                assert inside()

    async def every():
        use, invariant = fusednorm.use_provider, fusednorm.batch_invariant
        await asyncio.gather(
            task(use("reference"), lambda: dispatch.requested() is not None, 5),
            task(use("torch"), lambda: dispatch.requested() is not None, 3),
            task(invariant(), lambda: not dispatch.settings.current.by_shape, 4),
            task(invariant(), lambda: not dispatch.settings.current.by_shape, 2),
        )

    asyncio.run(every())
    assert untouched()


@pytest.mark.parametrize("make", [lambda: fusednorm.use_provider("torch"), fusednorm.batch_invariant])
def test_one_instance_nests_and_says_when_it_is_left_too_often(make):
    block = make()
    for _ in range(2):
        with block, block:
            with block:
                assert not untouched()
            assert not untouched()
        assert untouched()
    with pytest.raises(RuntimeError, match="left once more than it was entered"):
        block.__exit__(None, None, None)
    assert untouched()


def test_explain_hears_its_own_thread_alone():
    x = torch.randn(2, 8)
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait()
        for _ in range(20):
            fusednorm.add_rms_norm(x, x, 8)
        done.set()

    def call():
        inside.set()
        assert done.wait(60)
        return fusednorm.layer_norm(x, 8)

    thread = threading.Thread(target=other)
    thread.start()
    said = fusednorm.explain(call)
    thread.join()
    assert "layer_norm: " in said and "add_rms_norm" not in said
    assert untouched()


def test_explain_in_many_threads_at_once(many_switches):
    x = torch.randn(2, 8)

    def work(number):
        function = (fusednorm.layer_norm, fusednorm.rms_norm)[number % 2]
        return [fusednorm.explain(function, x, 8).splitlines()[0].split(":")[0] for _ in range(20)]

    for number, said in enumerate(together(work)):
        assert set(said) == {("layer_norm", "rms_norm")[number % 2]}
    assert untouched()


# --- first use ---

FIRST_USE = """
import sys, threading, torch, fusednorm
from fusednorm import dispatch
sys.setswitchinterval(1e-6)
x, faults, found = torch.randn(4, 8), [], []
start = threading.Barrier(12)
def work(number):
    try:
        start.wait()
        if number % 3 == 0:
            found.append(tuple(fusednorm.available_providers()))
        fusednorm.add_layer_norm(x, x, 8, dropout_p=0.1)
        fusednorm.scaled_dot_product_attention(x[None], x[None], x[None], window=(1, 1))
        fusednorm.bias_act_dropout(x, x[0], "gelu", 0.5)
        with fusednorm.use_provider("reference"):
            fusednorm.rms_norm(x, 8)
    except BaseException as fault:
        faults.append(repr(fault))
threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(faults, len(set(found)), dispatch.requested(), not dispatch.settings.current.listeners)
"""


def test_the_first_calls_of_a_process_may_come_from_several_threads():
    chosen = {name: os.environ.get(name, "") for name in ("FUSEDNORM_EMULATE", "TRITON_INTERPRET")}
    assert python("-c", FIRST_USE, **chosen).strip() == "[] 1 None True"


# --- a block that is never entered ---


@pytest.mark.parametrize("make", [lambda: fusednorm.use_provider("torch"), fusednorm.batch_invariant])
def test_a_block_that_is_never_entered_says_that_it_has_no_effect(make):
    with pytest.warns(UserWarning, match=r"(use_provider\('torch'\)|batch_invariant\(True\)).*never entered.*`with "):
        make()
        gc.collect()


def test_what_was_used_or_never_made_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fusednorm.use_provider("torch"):
            pass
        fusednorm.use_provider("torch")(torch.sum)
        with pytest.raises(ValueError):
            fusednorm.use_provider("nothing")
        with pytest.raises(TypeError):
            fusednorm.use_provider()
        gc.collect()


class _TakenAway:
    """The settings as a call sees them while another thread enters a block: no fast path at the second look."""

    def __init__(self):
        self.looks = 0

    def __getattr__(self, name):
        found = getattr(dispatch.settings, name)
        if name != "current":
            return found
        self.looks += 1
        return found if self.looks == 1 else found._replace(fastpath=None, fastpath_mode="cuda", plans={})


@pytest.mark.parametrize("function", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "bias_act_dropout"])
def test_the_fast_path_and_what_it_is_asked_for_are_looked_up_at_once(function, monkeypatch):
    from fusednorm import activation, norm

    x = torch.randn(3, 8)
    args = {"bias_act_dropout": (x, x[0]), "layer_norm": (x, 8), "rms_norm": (x, 8)}.get(function, (x, x, 8))
    expected = getattr(fusednorm, function)(*args)
    for module in (norm, activation):
        monkeypatch.setattr(module, "settings", _TakenAway())
    found = getattr(fusednorm, function)(*args)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
