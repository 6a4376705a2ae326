"""The command `train.py`: one tiny run of each task from its data to its report."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import made_once
from training_runs import SCORED, little_data, tiny

import fusednorm
from benchmarks.report.table import columns
from examples import train
from examples.training import report, run
from examples.training.job import Size
from examples.training.machine import threads
from examples.training.model import VARIANTS, make_twins
from examples.training.pictures import plot_curves
from examples.training.scores import TRAINED
from examples.translation import job as translation
from examples.translation.data import PAD_ID
from examples.translation.model import Translator


@pytest.fixture(params=train.TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def given(task, tmp_path) -> Iterator[list[str]]:
    with little_data(task, tmp_path, share=64) as arguments:
        yield [*arguments, "--report", str(tmp_path / "report")]


class Run:
    """One tiny run: its job, its folder, what it was given and what it printed."""

    def __init__(self, task: str, folder: Path) -> None:
        self.job, self.folder = train.TASKS[task], folder
        with little_data(task, folder) as arguments, contextlib.redirect_stdout(io.StringIO()) as printed:
            self.given = [*arguments, "--report", str(folder)]
            assert train.main(self.given) == 0
        self.printed = printed.getvalue()

    def report(self, **environment: Any) -> dict[str, Any]:
        """As it was written, of a calm machine."""
        written = json.loads((self.folder / f"{self.job.files}.json").read_text(encoding="utf-8"))
        return written | {"environment": written["environment"] | {"others": 0.01} | environment}

    def summary(self, changed: dict[str, Any] | None = None, **environment: Any) -> str:
        return report.summary(self.job, self.report(**environment) | (changed or {}))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Callable[[str], Run]:
    """One run of each task that is asked for, on one thread."""

    def made(task: str) -> Run:
        with threads(1):
            return made_once(tmp_path_factory, f"a report of {task}", functools.partial(Run, task))

    return made


@pytest.fixture(params=train.TASKS)
def finished(request, finished_run) -> Run:
    return finished_run(request.param)


@pytest.fixture
def translated(finished_run) -> Run:
    return finished_run("translate")


def words(text: str) -> str:
    return " ".join(text.split())


# runs


def test_run_from_data_to_report(finished):
    written, folder, files = finished.report(), finished.folder, finished.job.files
    assert set(written["curves"]) == set(VARIANTS)
    assert written["checks"]["reload_equal"] is True and written["checks"]["faults"] == []
    losses = written["curves"]["fused"]["test"]
    assert losses[1] < losses[0]
    assert all(written["speed"][v]["tokens_per_s"] > 0 and written["memory"][v]["peak_bytes"] > 0 for v in VARIANTS)
    dropped = written["with_dropout"]
    assert dropped["fused"]["saved_bytes"] < dropped["eager"]["saved_bytes"]  # masks are not kept
    assert all(entries["steps"] > 30 and entries["step_ms_median"] > 0 for entries in dropped.values())
    assert written["environment"]["threads"] == 1
    assert (folder / f"{files}_checkpoint.pt").stat().st_size > 0
    markdown = (folder / f"{files}.md").read_text(encoding="utf-8")
    for said in (markdown, finished.printed):
        assert "with dropout: kept by one forward" in said
        assert "Curves agree" in said and "bitwise equal" in said
    if "matplotlib" in sys.modules:
        pictures = {path.name: path for path in folder.glob("*.png")}
        own = {"translate_chrf.png"} if finished.job.task == "translate" else set()
        own |= {f"{files}_scores.png"} if finished.job.task in SCORED else set()
        assert set(pictures) == {f"{files}_curves.png"} | own
        for name, path in pictures.items():
            assert path.read_bytes().startswith(b"\x89PNG") and f"({name})" in markdown


def test_run_scores_what_was_learned(finished):
    written, markdown = finished.report(), (finished.folder / f"{finished.job.files}.md").read_text(encoding="utf-8")
    if finished.job.task == "lm":
        quality = written["quality"]
        assert quality["perplexity"] == pytest.approx(math.exp(written["curves"]["fused"]["test"][-1]))
        assert quality["unigram_perplexity"] == pytest.approx(math.exp(written["unigram_loss"]))
        assert f"{written['sample']['prompt']} [...] {written['sample']['continuation']}" in markdown
        return
    if finished.job.task in SCORED:
        assert {finished.job.floor, *TRAINED.values()} <= set(written["scores"])
        for label, value in written["scores"].items():
            row = next(line for line in markdown.splitlines() if line.startswith(f"| {label} "))
            assert f" {value:.3f} |" in row
        assert written["scores"][TRAINED["fused"]] == pytest.approx(written["scores"][TRAINED["eager"]], abs=0.05)
        return
    assert set(written["scores"]) == {"untrained", "nearest", *VARIANTS}
    assert written["scores"]["nearest"]["chrf"] > 5
    for example in written["examples"]:
        assert example["source"] in markdown and example["reference"] in markdown


def test_run_with_dropout_says_that_masks_differ(tmp_path):
    """Torch's masks and ours are drawn apart: the runs are compared where they begin and end."""
    with little_data("lm", tmp_path) as arguments:
        assert train.main([*arguments, "--dropout", "0.2", "--report", str(tmp_path)]) == 0
    checks = json.loads((tmp_path / "train.json").read_text())["checks"]
    assert checks["largest_difference"] < checks["bound"] and 0 < checks["end_difference"] < checks["drawn_bound"]
    assert "each variant draws its own dropout masks" in words((tmp_path / "train.md").read_text("utf-8"))


def test_run_leaves_the_number_of_threads_as_it_was(task, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(run, "train_and_report", lambda job: torch.get_num_threads())
    assert train.main([*tiny(task), "--threads", "3"]) == 3 and torch.get_num_threads() == before


encoder = fusednorm.TransformerEncoder.forward


def spoiled_by(share):
    return lambda self, src, *args, **kwargs: encoder(self, src, *args, **kwargs) - share * src


def without_padding_mask(self, source):
    mask = None if self.variant == "fused" else source == PAD_ID
    return self.transformer.encoder(self.embed(source), src_key_padding_mask=mask)


def not_a_number(self, decoded):
    found = torch.nn.functional.linear(decoded, self.token.weight)
    return found * math.nan if self.variant == "fused" and self.training else found


def wrong_eps(model):
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-2


def missing_bias(model):
    """A sublayer whose bias is not added is one whose bias stays 0."""
    for layer in model.layers.layers:
        layer.linear1.bias.requires_grad_(False)


@pytest.mark.parametrize("spoil", [wrong_eps, missing_bias])
@pytest.mark.parametrize("task", SCORED)
def test_run_fails_on_a_layer_with_a_planted_bug(given, capsys, monkeypatch, spoil):
    def planted(*arguments):
        twins = make_twins(*arguments)
        spoil(twins["fused"])
        return twins

    monkeypatch.setattr(run, "make_twins", planted)
    assert train.main([*given, "--rate", "1e-2"]) == 1
    assert "FAILED: test loss after epoch" in capsys.readouterr().err


def test_run_fails_on_a_model_that_learned_nothing(tmp_path, capsys, monkeypatch):
    """One too short to learn is held to nothing, and passes."""
    with little_data("speech", tmp_path) as arguments:
        given = [*arguments, "--rate", "1e-9", "--report", str(tmp_path)]
        assert train.main(given) == 0
        monkeypatch.setitem(train.TASKS["speech"].sizes, "epochs", Size(1, 1))
        assert train.main(given) == 1
    assert "FAILED: character error rate of fused, trained is" in capsys.readouterr().err
    assert "NOT LEARNED: character error rate of eager, trained is" in words(
        (tmp_path / "speech.md").read_text("utf-8")
    )


@pytest.mark.parametrize(
    ("task", "kind", "method", "wrong", "message"),
    [
        ("lm", fusednorm.TransformerEncoder, "forward", spoiled_by(0.5), "exceeds"),
        ("lm", fusednorm.TransformerEncoder, "forward", spoiled_by(math.nan), "not finite"),
        ("translate", Translator, "encode", without_padding_mask, "exceeds"),
        ("translate", Translator, "logits", not_a_number, "not finite"),
    ],
)
def test_run_fails_on_a_fused_model_that_is_wrong(given, capsys, monkeypatch, task, kind, method, wrong, message):
    """Layers that spoil what they return, padding that is attended to, a loss that is not finite: status 1."""
    monkeypatch.setattr(kind, method, wrong)
    assert train.main([*given, "--rate", "1e-2"]) == 1
    error = capsys.readouterr().err
    assert "FAILED: test loss" in error and message in error and "checkpoint" not in error


def test_missing_plots_and_bars_degrade(task, given, tmp_path, monkeypatch, capsys):
    if "matplotlib" in train.TASKS[task].packages:
        pytest.skip("its texts come from matplotlib")
    for name in ("matplotlib", "matplotlib.figure", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train.main(given) == 0
    assert not list((tmp_path / "report").glob("*.png"))
    assert "pip install matplotlib" in capsys.readouterr().out


# the report


def test_report_says_who_served_which_calls_and_why_not_another(finished):
    served = {route["function"] for route in finished.report()["environment"]["route"]}
    assert served == {"add_layer_norm", "scaled_dot_product_attention", "bias_act_dropout"}
    refused = "triton is not used: no GPU"
    route = [
        {"function": "add_layer_norm", "provider": "cpu", "how": "x", "calls": 5, "refusals": [refused]},
        {"function": "add_layer_norm", "provider": "reference", "how": "x", "calls": 1, "refusals": [refused]},
        {"function": "bias_act_dropout", "provider": "cpu", "how": "x", "calls": 2, "refusals": [refused]},
    ]
    said = words(finished.summary(route=route))
    assert "add_layer_norm (5 by cpu, 1 by reference), bias_act_dropout (2 by cpu)." in said
    assert said.count(refused) == 1 and f"For add_layer_norm, bias_act_dropout, {refused}." in said


def test_report_says_first_that_no_kernel_ran_and_how_to_train_the_fused_op(finished):
    quoted = " ".join(f"'{word}'" if " " in word else word for word in finished.given)
    command = finished.report()["environment"]["fused_command"]
    assert command == f"python3 examples/train.py {quoted} --provider reference"
    how = {"torch's own operators: no kernel of ours serves this call": True, "one fused op each way": False}
    for said, none_ran in how.items():
        route = [{"function": "add_layer_norm", "provider": "x", "how": said, "calls": 3, "refusals": []}]
        top = finished.summary(route=route).partition("- Model: ")[0]
        assert ("No kernel of ours ran" in top) is none_ran and (f"    PYTHONPATH=. {command}\n" in top) is none_ran


def test_report_keeps_its_lines_short_and_its_tables_straight(finished):
    lines = finished.summary().partition("```")[0].splitlines()
    prose = [line for line in lines if not line.startswith(("|", "    "))]
    assert max(map(len, prose)) <= 120
    tables = [[]]
    for line in lines:
        tables[-1].append(columns(line)) if line.startswith("|") else tables.append([])
    assert all(len(set(widths)) == 1 for widths in tables if widths)
    assert sum(map(bool, tables)) == {"lm": 2, "translate": 4, "speech": 4}.get(finished.job.task, 3)


def test_report_of_a_busy_machine_says_so(finished):
    assert "BUSY" not in finished.summary()
    assert "THE MACHINE WAS BUSY" in finished.summary(others=0.4)
    assert "BUSY" not in finished.summary(others=0.4, device_type="cuda")
    assert "not known here" in words(finished.summary(others=None))


def test_report_of_a_run_with_dropout_says_what_its_bounds_are(finished):
    curves = {v: {"train": [t], "test": [5.0, t], "steps": [t]} for v, t in (("fused", 3.1), ("eager", 3.0))}
    checks = finished.report()["checks"] | report.verdict(curves, 5e-4, 0.1)
    said = words(finished.summary({"checks": checks}))
    assert "Runs agree: yes." in said and "after it by 3.33% (bound 5%)" in said


def test_report_escapes_what_would_end_a_cell(translated):
    example = {"source": "a | b", "reference": "甲 | 乙", "fused": "", "nearest": "x", "nearest_source": "y"}
    row = translated.summary({"examples": [example]}).splitlines()[-1]
    assert "a \\| b" in row and "甲 \\| 乙" in row and "(nothing)" in row


def test_report_says_when_the_model_is_below_the_nearest_source(translated):
    scores = translated.report()["scores"]
    scores["fused"]["chrf"], scores["nearest"]["chrf"] = 10.0, 30.0
    assert "chrF of the fused model is 20.0 BELOW" in words(translated.summary({"scores": scores}))


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    """The pictures that are drawn, in place of their files."""
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is missing; the extra bench brings it")
    kept: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, **_: (self.canvas.draw(), kept.append(self)))
    return kept


@pytest.mark.parametrize("differences", [(0.0, 0.0, 0.0, 0.0), (0.0, 1e-6, 0.0, 2e-6)])
def test_picture_joins_no_steps_and_names_what_it_shows(finished, drawn, tmp_path, differences):
    written = finished.report(others=0.4)
    curves = {"eager": written["curves"]["eager"] | {"steps": [5.0] * 4}}
    curves["fused"] = curves["eager"] | {"steps": [5.0 + d for d in differences]}
    assert plot_curves(written | {"curves": curves}, tmp_path / "x.png")
    left, right = drawn[0].axes
    unit = finished.job.unit
    assert left.get_ylabel() == f"loss (nats per {unit})" and f"nats per {unit}" in right.get_ylabel()
    steps = [line for line in right.lines if len(line.get_xdata()) and line.get_label().startswith("a step")]
    assert all(line.get_linestyle() == "None" for line in steps)
    assert [list(line.get_xdata()) for line in steps] == ([[2, 4]] if any(differences) else [])
    said = [text.get_text() for text in [*right.texts, *right.get_legend().get_texts()]]
    assert ("exactly equal at 2 of 4 steps" if any(differences) else "exactly equal at all 4 steps") in said
    assert all(tick == round(tick) for axes in (left, right) for tick in axes.get_xticks())
    title = words(drawn[0].get_suptitle())
    assert f"calls of a fused forward: {report.calls_text(written)}" in title and "THE MACHINE WAS BUSY" in title


def test_picture_of_scores_names_what_it_shows(translated, drawn, tmp_path):
    written = translated.report()
    assert translated.job.draw(written, tmp_path) == {tmp_path / "translate_chrf.png": "chrF"}
    (bars,) = drawn[0].axes
    assert [text.get_text() for text in bars.get_legend().get_texts()] == list(translation.NAMES.values())
    shown = [patch.get_height() for patch in bars.patches]
    assert shown[:: len(shown) // 4] == [written["scores"][name]["chrf"] for name in translation.NAMES]
    assert len(shown) == 4 * (1 + len(written["scores"]["fused"]["by_origin"]))


@pytest.mark.parametrize("task", SCORED)
def test_picture_of_scores_has_a_bar_for_each_and_what_the_job_shows(task, finished_run, drawn, tmp_path):
    finished = finished_run(task)
    written = finished.report()
    assert finished.job.draw(written, tmp_path) == {tmp_path / f"{task}_scores.png": finished.job.measure}
    left, right = drawn[0].axes
    assert [bar.get_width() for bar in left.patches] == pytest.approx(list(written["scores"].values()))
    assert [words(label.get_text()) for label in left.get_yticklabels()] == list(written["scores"])
    assert finished.job.measure in left.get_xlabel() and right.get_title()
