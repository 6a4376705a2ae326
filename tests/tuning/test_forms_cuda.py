"""Forms of the user's files as the CUDA library is given them, and files that it refuses."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from backends import EMULATED

import fusednorm
from fusednorm import dispatch
from fusednorm._once import _said
from fusednorm.dispatch import rules, tuned, tuned_forms
from fusednorm.providers.forms import Place
from fusednorm.tuning import store
from tests.helpers.tuning_records import CPU, GPU, record, with_forms, with_section

emulated = pytest.mark.skipif(not EMULATED, reason="there is no g++ to build the emulation with")


def normed(x: torch.Tensor) -> torch.Tensor:
    with fusednorm.use_provider("cuda"):
        return fusednorm.rms_norm(x, x.shape[-1])


@pytest.fixture
def on_the_emulation():
    assert dispatch.unavailable_reason("cuda") is None
    torch.ops.fusednorm_cuda.emulate(128, 512, 8, 2, 1)
    yield torch.ops.fusednorm_cuda.force
    torch.ops.fusednorm_cuda.force("forward", [])
    torch.ops.fusednorm_cuda.keep([])


CUDA = "cuda/forward/512/4/0"


@emulated
def test_the_cuda_library_takes_the_forms_of_the_file(on_the_emulation, generator, monkeypatch):
    x = torch.randn(5, 512, generator=generator)
    own = normed(x)
    on_the_emulation("forward", [1, 64, 1, 2])
    forced = normed(x)
    on_the_emulation("forward", [])
    assert torch.equal(normed(x), own) and not torch.equal(forced, own)
    path = store.save(CPU, [with_forms(record("8x512", "cuda"), CUDA, {"fast": ([1, 64, 1, 2], 1.2)})])
    assert torch.equal(normed(x), forced)
    with fusednorm.use_provider("cuda"):
        assert f"forms are kept for 512 columns ({path})" in fusednorm.explain(fusednorm.rms_norm, x, 512)
    monkeypatch.setenv(tuned.SWITCH_VARIABLE, "0")
    rules.forget()
    assert torch.equal(normed(x), own)


@emulated
def test_a_form_of_the_backward_has_three_numbers(on_the_emulation):
    packed = tuned_forms.packed(0, {Place("backward", 512, 4): (32, 1, 4)})
    assert packed == [0, 1, 512, 4, 32, 1, 4, 0]
    torch.ops.fusednorm_cuda.keep(packed)


@emulated
def test_the_cuda_library_takes_the_forms_when_a_gpu_is_first_asked(on_the_emulation, generator, monkeypatch):
    from fusednorm.providers.cuda import library

    x = torch.randn(5, 512, generator=generator)
    own = normed(x)
    store.save(CPU, [with_forms(record("8x512", "cuda"), CUDA, {"fast": ([1, 64, 1, 2], 1.2)})])
    torch.ops.fusednorm_cuda.keep([])  # as in a new process
    assert torch.equal(normed(x), own)
    library.forget_devices()
    dispatch.settings.forget()
    assert not torch.equal(normed(x), own)


@emulated
def test_a_file_whose_forms_the_cuda_library_refuses_is_damaged(on_the_emulation, generator, monkeypatch):
    monkeypatch.setattr("fusednorm._once._said", type(_said)())
    x = torch.randn(5, 512, generator=generator)
    own = normed(x)
    path = store.save(CPU, [record("8x64", "torch", "cpu")])
    with_section(path, {CUDA: [3, 64, 1, 1]})
    with pytest.warns(RuntimeWarning, match=r"it is damaged \(RuntimeError: .*chunks: 1, 2 or 4"):
        rules.forget()
    assert tuned.file(CPU) is None and torch.equal(normed(x), own)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(normed(x), own)
    finally:
        torch.set_num_threads(threads)
    assert tuned.file(CPU) is None
    assert fusednorm.explain(fusednorm.add_layer_norm, x[:, :64], x[:, :64], 64).startswith("add_layer_norm: cpu")
    with_section(path, {})
    rules.forget()
    assert tuned.file(CPU) is not None


# --- several GPUs ---


class Library:
    """What the CUDA library is given. It refuses lists with a number in them."""

    def __init__(self, refuses: int = -1) -> None:
        self.refuses, self.given = refuses, []

    def keep(self, forms: list[int]) -> None:
        self.given.append(forms)
        if self.refuses in forms:
            raise RuntimeError("no such form")


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs with a form each in their files, and a library that notes what it is given."""

    def give(refuses: int = -1, paths: tuple[str, str] = ("0.json", "1.json")) -> Library:
        library, loads = Library(refuses), []

        def load(device: torch.device) -> tuned.Tuned:
            loads.append(device.index)
            forms = {"triton": {}, "cuda": {Place("forward", 64, 4): (1, 100 + device.index, 1, 1)}}
            return tuned.Tuned(Path(paths[device.index]), "2026-01-01", {}, {}, forms)

        monkeypatch.setattr("fusednorm._once._said", type(_said)())
        monkeypatch.setattr(tuned, "_load", load)
        monkeypatch.setattr(tuned, "_files", {})
        monkeypatch.setattr(tuned, "_refused", set())
        monkeypatch.setattr(tuned.cuda, "EMULATED", None)
        monkeypatch.setattr(tuned.cuda, "ops", library)
        library.loads = loads
        return library

    return give


def packed(index: int) -> list[int]:
    return [index, 0, 64, 4, 1, 100 + index, 1, 1]


def test_the_forms_of_all_gpus_are_given_at_once(two_gpus):
    library = two_gpus()
    assert not tuned.keep_in_cuda([0, 1]) and library.given == [packed(0) + packed(1)]


def test_a_refused_file_of_a_gpu_stays_refused_and_costs_no_other(two_gpus):
    library = two_gpus(refuses=100)
    with pytest.warns(RuntimeWarning, match=r"0.json is not used: it is damaged \(RuntimeError: no such form"):
        assert tuned.keep_in_cuda([0, 1])
    assert library.given[-1] == packed(1)
    gpus = [torch.device("cuda", index) for index in (0, 1)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert tuned.file(gpus[0]) is None and tuned.file(gpus[1]) is not None and library.loads == [0, 1]
        tuned.keep_in_cuda([0, 1])
        assert library.given[-1] == packed(1)
    finally:
        torch.set_num_threads(threads)


def test_gpus_of_one_name_lose_their_file_together(two_gpus):
    library = two_gpus(refuses=101, paths=("both.json", "both.json"))
    with pytest.warns(RuntimeWarning, match="both.json is not used"):
        assert tuned.keep_in_cuda([0, 1])
    assert library.given[-1] == [] and tuned.file(GPU) is None


def test_nothing_that_went_by_a_refused_file_is_kept(two_gpus, monkeypatch):
    forgotten = []
    monkeypatch.setattr(tuned, "forget_planned", lambda: forgotten.append("launches"))
    monkeypatch.setattr(rules, "choose_anew", lambda: forgotten.append("choices"))
    two_gpus()
    rules.keep_in_cuda([0, 1])
    assert forgotten == []
    two_gpus(refuses=101)
    with pytest.warns(RuntimeWarning, match="1.json"):
        rules.keep_in_cuda([0, 1])
    assert forgotten == ["launches", "choices"]


def test_of_two_threads_the_one_that_knows_more_gpus_gives_their_forms_last(monkeypatch):
    from fusednorm.providers.cuda import library

    known: dict[int, str | None] = {0: None}
    first, given = threading.Event(), []

    def keep(indices: list[int]) -> None:
        if indices == [0]:
            first.set()
            time.sleep(0.1)
        given.append(indices)

    monkeypatch.setattr(library, "_unusable", known)
    monkeypatch.setattr(library, "keep_forms", keep)
    slow = threading.Thread(target=library.take_forms)
    slow.start()
    assert first.wait(10)
    known[1] = None
    library.take_forms()
    slow.join()
    assert given == [[0], [0, 1]]
