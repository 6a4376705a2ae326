"""The command `train.py --task translate`: one tiny run from pairs to report, its scores, verdict, and refusals."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import fusednorm
from examples import train
from examples.training import report as train_report
from examples.translation import data as translate_data
from examples.translation import job as translate_job
from examples.translation import model as translate_model
from examples.translation import report as translate_report
from examples.translation.data import Pair
from examples.translation.model import VARIANTS
from examples.translation.score import chrf, nearest, scores

SIZES = {"epochs": 1, "layers": 1, "width": 32, "vocab": 400, "batch": 16, "length": 40, "dropout": 0.0}
TINY = [
    *("--task", "translate", "--small", "--device", "cpu"),
    *(word for name, size in SIZES.items() for word in (f"--{name}", str(size))),
]
load_all = translate_data.load_pairs


MODULES = (*translate_data.PACKAGES, "sacrebleu", "tokenizers")


def need(*modules: str) -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"{module} is missing; the extra translate brings it: '.[translate]'")


@pytest.fixture
def few_pairs(monkeypatch) -> None:
    need(*MODULES)
    monkeypatch.setattr(translate_job, "load_pairs", lambda: load_all()[::16])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> tuple[Path, str]:
    """The folder that one tiny run wrote, and what it printed."""
    need(*MODULES)
    folder = tmp_path_factory.mktemp("finished") / "a report"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(translate_job, "load_pairs", lambda: load_all()[::16])
        assert train.main([*TINY, "--report", str(folder)]) == 0
    return folder, printed.getvalue()


def test_run_from_pairs_to_report(finished_run):
    folder, printed = finished_run
    report = json.loads((folder / "translate.json").read_text(encoding="utf-8"))
    assert set(report["curves"]) == set(VARIANTS)
    assert report["checks"]["reload_equal"] is True and report["checks"]["faults"] == []
    losses = report["curves"]["fused"]["test"]
    assert losses[1] < losses[0]
    assert all(report["speed"][v]["tokens_per_s"] > 0 and report["memory"][v]["peak_bytes"] > 0 for v in VARIANTS)
    assert set(report["scores"]) == {"untrained", "nearest", *VARIANTS}
    assert report["scores"]["nearest"]["chrf"] > 5 and report["environment"]["threads"] == 1
    assert (folder / "translate_checkpoint.pt").stat().st_size > 0
    if "matplotlib" in sys.modules:
        for name in ("translate_curves.png", "translate_chrf.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
    text = (folder / "translate.md").read_text(encoding="utf-8")
    assert "Curves agree" in text and "Curves agree" in printed and "bitwise equal" in printed
    for example in report["examples"]:
        assert example["source"] in text and example["reference"] in text


def test_run_leaves_the_number_of_threads_as_it_was(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(translate_job, "train_and_report", lambda *_: torch.get_num_threads())
    assert train.main([*TINY, "--threads", "3"]) == 3 and torch.get_num_threads() == before


def without_padding_mask(self, source):
    mask = None if self.variant == "fused" else source == translate_data.PAD_ID
    return self.transformer.encoder(self.embed(source), src_key_padding_mask=mask)


def not_a_number(self, decoded):
    found = torch.nn.functional.linear(decoded, self.token.weight)
    return found * math.nan if self.variant == "fused" and self.training else found


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [("encode", without_padding_mask, "exceeds"), ("logits", not_a_number, "not finite")],
)
def test_run_fails_on_a_fused_model_that_is_wrong(few_pairs, tmp_path, capsys, monkeypatch, method, wrong, message):
    """Padding that is attended to, and a loss that is not finite: the job must say so and end with status 1."""
    monkeypatch.setattr(translate_model.Translator, method, wrong)
    assert train.main([*TINY, "--report", str(tmp_path / "report")]) == 1
    error = capsys.readouterr().err
    assert "FAILED: " in error and message in error and "checkpoint" not in error


@pytest.fixture
def made_up(monkeypatch) -> None:
    """Pairs that no package brings, so that what is refused is refused without the packages too."""
    pairs = [Pair(f"Word {i}", f"词 {i}", "here") for i in range(100)]
    monkeypatch.setattr(translate_job, "require_packages", lambda: None)
    monkeypatch.setattr(translate_job, "load_pairs", lambda: pairs)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--epochs", "0"], "epochs"),
        (["--layers", "0"], "layers"),
        (["--batch", "0"], "batch"),
        (["--vocab", "258"], "259"),
        (["--width", "0"], "width"),
        (["--width", "100"], "3 heads"),
        (["--length", "1"], "longer sentences"),
        (["--dropout", "1.0"], "dropout"),
        (["--rate", "nan"], "rate"),
        (["--decay", "-1"], "decay"),
        (["--threads", "0"], "threads"),
        (["--provider", "no-such-provider"], "no-such-provider"),
        (["--provider", "triton"], "--provider triton: usable here are reference"),
        (["--report", "{file}/folder"], "Not a directory"),
        (["--report", "{file}"], "File exists"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(made_up, tmp_path, capsys, monkeypatch, arguments, named):
    def trained(*_):
        raise AssertionError("the tokenizer was trained first")

    monkeypatch.setattr(translate_job, "train_tokenizer", trained)
    monkeypatch.setattr(fusednorm, "available_providers", lambda: ["reference"])
    (tmp_path / "file").write_text("", encoding="utf-8")
    given = [word.format(file=tmp_path / "file") for word in arguments]
    assert train.main([*TINY, "--report", str(tmp_path / "report"), *given]) == 2
    assert named in capsys.readouterr().err


def test_help_has_the_options_of_the_task(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--task", "translate", "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "--length" in said and "--context" not in said


@pytest.mark.parametrize(
    "missing", [["sacrebleu"], ["django", "jupyterlab_language_pack_zh_CN"], ["babel", "tokenizers"]]
)
def test_missing_packages_are_named_with_their_remedy(monkeypatch, capsys, tmp_path, missing):
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None if module in missing else sys)
    assert train.main([*TINY, "--report", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    names = " ".join(name.replace("_", "-") for name in missing)
    assert f"pip install {names}\n" in error and "Traceback" not in error
    assert not (tmp_path / "report").exists()


def test_missing_plots_and_bars_degrade(few_pairs, monkeypatch, tmp_path, capsys):
    for name in ("matplotlib", "matplotlib.figure", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train.main([*TINY, "--report", str(tmp_path / "report")]) == 0
    assert not list((tmp_path / "report").glob("*.png"))
    assert "pip install matplotlib" in capsys.readouterr().out


# scores


def test_nearest_is_the_pair_whose_source_is_most_alike():
    known = [Pair(source, source.upper(), "x") for source in ("red apple", "green apple", "blue sky", "Blue sky")]
    found = nearest(known, ["a red apple", "GREEN apples", "sky", "東"])
    assert [pair.source for pair in found] == ["red apple", "green apple", "blue sky", "red apple"]


def test_nearest_weighs_rare_parts_above_common_ones():
    known = [Pair(f"open the file {name}", name, "x") for name in ("quartz", "marble", "basalt")]
    assert nearest(known, ["close the file marble"])[0].target == "marble"


def test_scores_of_planted_translations():
    need("sacrebleu")
    pairs = [Pair("a", "保存所有的文件", "one"), Pair("b", "打开新的窗口", "one"), Pair("c", "阿根廷时间", "two")]
    right = [pair.target for pair in pairs]
    perfect = scores(right, pairs)
    assert perfect["chrf"] == pytest.approx(100.0) and perfect["exact"] == 1.0
    planted = scores([right[0], right[1], "完全不是"], pairs)
    assert planted["by_origin"]["one"] == {"chrf": pytest.approx(100.0), "pairs": 2}
    assert planted["by_origin"]["two"] == {"chrf": 0.0, "pairs": 1}
    assert planted["exact"] == pytest.approx(2 / 3) and 30.0 < planted["chrf"] < 100.0
    assert scores(["", "", ""], pairs)["chrf"] == 0.0


def test_chrf_of_half_a_sentence_is_what_its_formula_gives():
    need("sacrebleu")
    # precision is 1 for each n; recall 3/6, 2/5, 1/4 for n = 1, 2, 3, and longer ones the half does not have
    recall = (3 / 6 + 2 / 5 + 1 / 4) / 3
    assert chrf(["一二三"], ["一二三四五六"]) == pytest.approx(100 * 5 * recall / (4 + recall), abs=1e-9)


# the verdict


def curves(fused: list[float], eager: list[float]) -> dict[str, dict[str, list[float]]]:
    return {name: {"train": t[1:], "test": t, "steps": t} for name, t in (("fused", fused), ("eager", eager))}


def test_verdict_accepts_what_is_within_the_bound():
    checks = translate_report.verdict(curves([5.0, 3.0004], [5.0, 3.0]), "float32", 0.0)
    assert checks["faults"] == [] and checks["largest_difference"] == pytest.approx(4e-4)
    checks = translate_report.verdict(curves([5.0, 3.1], [5.0, 3.0]), "float32", 0.1)
    assert checks["faults"] == [] and checks["end_difference"] == pytest.approx(1 / 30)


@pytest.mark.parametrize("planted", [3.0006, 2.9994, math.nan, math.inf])
def test_verdict_names_a_planted_difference(planted):
    faults = translate_report.verdict(curves([5.0, planted], [5.0, 3.0]), "float32", 0.0)["faults"]
    assert len(faults) == 2 and all("epoch 1" in fault for fault in faults)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("planted", [3.2, 2.8, math.nan, math.inf])
def test_verdict_with_dropout_names_a_planted_difference_at_the_end(planted, dtype):
    for pair in (([5.0, planted], [5.0, 3.0]), ([5.0, 3.0], [5.0, planted]), ([5.0, planted], [5.0, math.nan])):
        faults = translate_report.verdict(curves(*pair), dtype, 0.1)["faults"]
        assert len(faults) == 1 and "after training" in faults[0]


@pytest.mark.parametrize("planted", [5.001, 4.999, math.nan, math.inf])
def test_verdict_with_dropout_names_a_planted_difference_at_the_start(planted):
    faults = translate_report.verdict(curves([planted, 3.0], [5.0, 3.0]), "float32", 0.1)["faults"]
    assert len(faults) == 1 and "before training" in faults[0]


# the report


@pytest.fixture
def finished(finished_run) -> dict:
    report = json.loads((finished_run[0] / "translate.json").read_text(encoding="utf-8"))
    report["environment"]["others"] = 0.01
    return report


def changed(report: dict, **environment) -> dict:
    return report | {"environment": report["environment"] | environment}


def test_report_says_who_served_which_calls_and_why_not_another(finished):
    refused = "triton is not used: no GPU"
    route = [
        {"function": "add_layer_norm", "provider": "cpu", "how": "x", "calls": 5, "refusals": [refused]},
        {"function": "add_layer_norm", "provider": "reference", "how": "x", "calls": 1, "refusals": [refused]},
        {"function": "bias_act_dropout", "provider": "cpu", "how": "x", "calls": 2, "refusals": [refused]},
    ]
    said = " ".join(translate_report.summary(changed(finished, route=route)).split())
    assert "add_layer_norm (5 by cpu, 1 by reference), bias_act_dropout (2 by cpu)." in said
    assert said.count(refused) == 1 and f"For add_layer_norm, bias_act_dropout, {refused}." in said


def test_report_keeps_its_lines_short_and_its_tables_straight(finished):
    lines = translate_report.summary(finished).splitlines()
    prose = [line for line in lines if not line.startswith(("|", "    "))]
    assert max(map(len, prose)) <= 120
    examples = lines[lines.index("Held-out sentences, taken at equal distances:") + 2 :]
    assert len(examples) > 10 and len({train_report.columns(line) for line in examples}) == 1


def test_report_escapes_what_would_end_a_cell(finished):
    example = {"source": "a | b", "reference": "甲 | 乙", "fused": "", "nearest": "x", "nearest_source": "y"}
    row = translate_report.example_table(finished | {"examples": [example]}).splitlines()[-1]
    assert "a \\| b" in row and "甲 \\| 乙" in row and "(nothing)" in row


def test_report_of_a_busy_machine_says_so(finished):
    assert "BUSY" not in translate_report.summary(finished)
    assert "THE MACHINE WAS BUSY" in translate_report.summary(changed(finished, others=0.4))


def test_report_says_when_the_model_is_below_the_nearest_source(finished):
    finished["scores"]["fused"]["chrf"], finished["scores"]["nearest"]["chrf"] = 10.0, 30.0
    assert "chrF of the fused model is 20.0 BELOW" in translate_report.summary(finished)


def test_report_of_a_run_with_dropout_says_what_its_bounds_are(finished):
    finished["checks"] |= translate_report.verdict(curves([5.0, 3.1], [5.0, 3.0]), "float32", 0.1)
    said = " ".join(translate_report.summary(finished).split())
    assert "Runs agree: yes." in said and "after it by 3.33% (bound 5%)" in said


def test_pictures_name_what_they_show(finished, monkeypatch, tmp_path):
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is missing; the extra bench brings it")
    kept = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, **_: (self.canvas.draw(), kept.append(self)))
    report = changed(finished, others=0.4)
    assert translate_report.plot_curves(report, tmp_path / "x.png")
    assert translate_report.plot_scores(report, tmp_path / "y.png")
    left, right = kept[0].axes
    assert left.get_ylabel() == "loss (nats per token)" and "nats per token" in right.get_ylabel()
    assert all(tick == round(tick) for tick in left.get_xticks())
    assert "THE MACHINE WAS BUSY" in " ".join(kept[0].get_suptitle().split())
    (bars,) = kept[1].axes
    assert [text.get_text() for text in bars.get_legend().get_texts()] == list(translate_report.NAMES.values())
    shown = [patch.get_height() for patch in bars.patches]
    assert shown[:: len(shown) // 4] == [report["scores"][name]["chrf"] for name in translate_report.NAMES]
    assert len(shown) == 4 * (1 + len(report["scores"]["fused"]["by_origin"]))
