"""``autotune``: a class is measured when it is first called, within bounds, and only where that is allowed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import fusednorm
from fusednorm.dispatch import tuned
from fusednorm.tuning import auto, store
from tests.helpers.tuning_records import record


@pytest.fixture(autouse=True)
def not_deterministic():
    """The other tests run with torch.use_deterministic_algorithms, under which nothing is measured."""
    torch.use_deterministic_algorithms(False)


def call(rows: int = 16, columns: int = 64, grad: bool = False) -> torch.Tensor:
    x = torch.randn(rows, columns, requires_grad=grad)
    return fusednorm.layer_norm(x, columns, torch.ones(columns), torch.zeros(columns))


@pytest.fixture
def counted(monkeypatch):
    """The classes that were measured, which takes no time here: the slower provider wins."""
    found = []

    def measured(of, device):
        found.append(of)
        return tuned.Point("cpu", 1.5, ("cpu", "torch"), "in this process")

    monkeypatch.setattr(auto, "_measured", measured)
    return found


def test_a_class_is_measured_once_and_its_winner_kept(counted):
    shipped = fusednorm.explain(fusednorm.layer_norm, torch.randn(17, 64), 64)
    with fusednorm.autotune():
        for _ in range(3):
            call(), call(grad=True), call(32)
    assert [(of.name) for of in counted] == [
        "layer_norm/float32/forward/16x64",
        "layer_norm/float32/both/16x64",
        "layer_norm/float32/forward/32x64",
    ]
    assert {key[1:] for key in tuned.process} == {
        ("layer_norm/4/forward", 16, 64),
        ("layer_norm/4/both", 16, 64),
        ("layer_norm/4/forward", 32, 64),
    }
    x = torch.randn(16, 64)
    said = fusednorm.explain(fusednorm.layer_norm, x, 64)
    assert said.startswith("layer_norm: cpu") and len(counted) == 3  # what was found serves after the block too
    assert fusednorm.explain(fusednorm.layer_norm, torch.randn(17, 64), 64) == shipped


def test_every_family_is_measured(counted):
    x = torch.randn(16, 64)
    q = torch.randn(2, 2, 16, 16, requires_grad=True)
    with fusednorm.autotune():
        fusednorm.rms_norm(x, 64)
        fusednorm.add_rms_norm(x, x, 64)
        fusednorm.bias_act_dropout(x, x[0], "gelu")
        fusednorm.scaled_dot_product_attention(q, q, q, is_causal=True)
        fusednorm.scaled_dot_product_attention(q, q, q, torch.ones(16, 16, dtype=torch.bool))
    assert [of.name for of in counted] == [
        "rms_norm/float32/forward/16x64",
        "add_rms_norm/float32/forward/16x64",
        "bias_gelu/float32/forward/16x64",
        "attention_causal/float32/both/2x8x16x16x16",
        "attention_masked/float32/both/2x8x16x16x16",
    ]


@pytest.mark.parametrize(
    "where", ["off", "inner off", "compile", "deterministic", "batch_invariant", "explain", "autocast"]
)
def test_where_nothing_is_measured(where: str, counted):
    def inside() -> None:
        with fusednorm.autotune(where != "off"):
            if where == "inner off":
                with fusednorm.autotune(False):
                    call()
            elif where == "compile":
                torch.compile(call, backend="eager")()
            elif where == "batch_invariant":
                with fusednorm.batch_invariant():
                    call()
            elif where == "explain":
                fusednorm.explain(call)
            elif where == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    call()
            else:
                call()

    if where == "deterministic":
        torch.use_deterministic_algorithms(True)
    try:
        inside()
    finally:
        torch.use_deterministic_algorithms(False)
    assert counted == []


def test_what_the_users_file_holds_is_not_measured_again(counted):
    store.save(torch.device("cpu"), [record("16x64", "cpu", operation="layer_norm")])
    with fusednorm.autotune():
        call()
        call(24)
    assert [of.shape for of in counted] == [(24, 64)]


def test_measuring_changes_nothing_of_the_users():
    torch.manual_seed(3)
    x = torch.randn(64, 256, requires_grad=True)
    weight, bias = torch.randn(256, requires_grad=True), torch.randn(256, requires_grad=True)
    kept, state = [t.detach().clone() for t in (x, weight, bias)], torch.get_rng_state()
    threads = torch.get_num_threads()
    with fusednorm.autotune():
        ours = torch.autograd.grad(fusednorm.layer_norm(x, 256, weight, bias).square().sum(), (x, weight, bias))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, weight, bias), strict=True)) and x.grad is None
    theirs = torch.autograd.grad(torch.layer_norm(x, (256,), weight, bias).square().sum(), (x, weight, bias))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    point = tuned.process["cpu", "layer_norm/4/both", 64, 256]
    assert point.provider in ("cpu", "torch") and point.where.endswith("in this process")
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_dropout_draws_the_seed_that_it_draws_without():
    x, bias = torch.randn(16, 64), torch.randn(64)
    results = []
    for enabled in (False, True):
        with fusednorm.autotune(enabled):
            torch.manual_seed(5)
            results.append(fusednorm.add_layer_norm(x, x, 64, x_bias=bias, dropout_p=0.5)[1])
    assert torch.equal(*results)


def test_it_takes_its_time_at_most():
    call(8, 8)
    rows, columns = 1 << 14, 1 << 11  # 128 MiB
    shipped = fusednorm.explain(fusednorm.layer_norm, torch.empty(rows, columns), columns)
    with fusednorm.autotune():
        call(4, 32)  # loads what a first measurement loads
        start = time.thread_time()  # what other tests take does not count
        call(64, 1024, grad=True)
        assert time.thread_time() - start < 4 * auto.SECONDS
        begin = len(tuned.process)
        call(rows, columns)
    big = tuned.process["cpu", "layer_norm/4/forward", rows, columns]
    assert len(tuned.process) == begin + 1 and big.tried == ()
    assert shipped.startswith(f"layer_norm: {big.provider},")


def test_threads_may_call_while_one_measures():
    faults = []

    def work(columns: int) -> None:
        try:
            for rows in (3, 5, 7, 9):
                x = torch.randn(rows, columns)
                normed = fusednorm.add_layer_norm(x, x, columns)[0]
                torch.testing.assert_close(normed, torch.layer_norm(x + x, (columns,)), rtol=1e-4, atol=1e-5)
        except Exception as fault:
            faults.append(fault)

    with fusednorm.autotune():
        threads = [threading.Thread(target=work, args=(16 * i,)) for i in range(1, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert faults == [] and all(point.where.endswith("in this process") for point in tuned.process.values())


def test_as_a_decorator_and_by_the_environment(counted):
    @fusednorm.autotune()
    def step() -> None:
        call()

    step()
    assert len(counted) == 1 and tuned.measure is None
    program = "import fusednorm; from fusednorm.dispatch import tuned; print(tuned.measure is not None)"
    for value, expected in (("1", "True"), ("0", "False"), ("", "False")):
        environment = {**os.environ, "FUSEDNORM_AUTOTUNE": value}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


def test_one_that_was_made_and_never_entered_says_so():
    with pytest.warns(UserWarning, match=r"autotune\(True\) was never entered"):
        fusednorm.autotune()


def test_measuring_requests_no_provider(monkeypatch):
    """A request would hold for other threads' calls too, and raise where a provider cannot take them."""

    def refused(self):
        raise AssertionError("use_provider was entered")

    monkeypatch.setattr(fusednorm.use_provider, "__enter__", refused)
    monkeypatch.setattr(auto, "SECONDS", 10.0)  # other tests run beside it
    with fusednorm.autotune():
        x = torch.randn(16, 64)
        fusednorm.layer_norm(x, 64)
        fusednorm.add_layer_norm(x, x, 64, x_bias=x[0], dropout_p=0.5)
        fusednorm.bias_act_dropout(x, x[0], "gelu")
        q = torch.randn(2, 2, 16, 16)
        fusednorm.scaled_dot_product_attention(q, q, q)
    assert {key[1] for key in tuned.process} >= {"layer_norm/4/forward", "bias_gelu/4/forward", "attention/4/forward"}
    assert tuned.process["cpu", "layer_norm/4/forward", 16, 64].tried == ("cpu", "torch")


def test_what_was_measured_before_is_kept_while_another_class_is_measured():
    kept = tuned.Point("torch", 1.3, ("cpu", "torch"), "in this process")
    tuned.process["cpu", "add_layer_norm/4/forward", 64, 64] = kept
    with fusednorm.autotune():
        x = torch.randn(256, 64)
        fusednorm.add_layer_norm(x, x, 64)
    assert tuned.process["cpu", "add_layer_norm/4/forward", 64, 64] is kept
