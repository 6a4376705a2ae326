"""The training job: its twins, its checkpoint, its verdict, and one tiny run from text to report."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fusednorm
from examples import train
from examples.language_model import data as lm_data
from examples.language_model import job as lm_job
from examples.language_model import loop as lm_loop
from examples.language_model import report as lm_report
from examples.language_model.model import VARIANTS, LanguageModel, ModelConfig, loss_of, make_twins
from examples.training import report as train_report
from examples.training import shared as train_shared

pytest.importorskip("tokenizers", reason="the training job needs tokenizers")

CPU = torch.device("cpu")
CONFIG = ModelConfig(vocab=97, context=12, layers=2, width=32, heads=2)
SETTINGS = lm_loop.Settings(epochs=2, batch=4, learning_rate=1e-2, seed=3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads and lose much where other work runs beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def split() -> lm_data.Split:
    return lm_data.split_documents(*lm_data.load_documents())


def rows_of(count: int, config: ModelConfig = CONFIG) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(config.vocab, (count, config.context + 1), generator=generator)


@pytest.mark.parametrize("provider", [None, "reference"])
def test_twins_start_with_equal_loss_and_gradients(provider):
    twins = make_twins(CONFIG, 5, CPU)
    assert isinstance(twins["fused"].layers, fusednorm.TransformerEncoder)
    assert type(twins["eager"].layers) is torch.nn.TransformerEncoder
    assert list(twins["eager"].state_dict()) == list(twins["fused"].state_dict())
    rows = rows_of(4)
    gradients, losses = {}, {}
    for variant, model in twins.items():
        with train_shared.provider_context(provider):
            loss = loss_of(model.train(), rows)
        loss.backward()
        losses[variant] = loss.item()
        gradients[variant] = {name: p.grad for name, p in model.named_parameters()}
    assert losses["fused"] == pytest.approx(losses["eager"], rel=1e-6)
    for name, gradient in gradients["eager"].items():
        # float32 gradients of a whole model: sums over every token, in another order
        torch.testing.assert_close(gradients["fused"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_changes_the_loss_and_eval_ignores_it(variant):
    model = make_twins(replace(CONFIG, dropout=0.3), 5, CPU)[variant].train()
    rows = rows_of(4)
    assert loss_of(model, rows) != loss_of(model, rows)
    model.eval()
    assert loss_of(model, rows) == loss_of(model, rows)


def test_model_does_not_look_ahead():
    model = make_twins(CONFIG, 5, CPU)["fused"].eval()
    rows = rows_of(2)[:, :-1]
    changed = rows.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % CONFIG.vocab
    assert torch.equal(model(rows)[:, :7], model(changed)[:, :7])
    assert not torch.equal(model(rows)[:, 7:], model(changed)[:, 7:])


def test_checkpoint_reloads_to_the_same_loss(tmp_path, split):
    tokenizer = lm_data.train_tokenizer(split.train[:5], 300)
    model = make_twins(replace(CONFIG, vocab=300), 5, CPU)["fused"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    rows = rows_of(6)
    lm_job.save_checkpoint(tmp_path / "folder" / "c.pt", model, tokenizer)
    reloaded, reloaded_tokenizer = lm_job.load_checkpoint(tmp_path / "folder" / "c.pt", CPU)
    assert lm_loop.evaluate(reloaded, rows, 4, "float32") == lm_loop.evaluate(model, rows, 4, "float32")
    assert reloaded_tokenizer.to_str() == tokenizer.to_str()
    fresh = LanguageModel("fused", model.config)
    assert lm_loop.evaluate(fresh, rows, 4, "float32") != lm_loop.evaluate(model, rows, 4, "float32")


def test_training_repeats_bit_for_bit():
    rows = rows_of(10)
    runs = []
    for _ in range(2):
        with train_shared.deterministic():
            twins = make_twins(replace(CONFIG, dropout=0.2), 5, CPU)
            runs.append(lm_loop.train_twins(twins, rows, rows[:3], SETTINGS, say=lambda line: None))
    assert runs[0] == runs[1]
    assert len(runs[0]["fused"].steps) == 6 and len(runs[0]["fused"].test) == 3
    assert runs[0]["fused"].train[-1] < runs[0]["fused"].train[0]


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_restores_what_it_found(before):
    found = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = True
        with pytest.raises(KeyError), train_shared.deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() is before
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(found[0])
        torch.utils.deterministic.fill_uninitialized_memory = found[1]


def curve(*train_losses: float) -> dict[str, list[float]]:
    return {"train": list(train_losses), "test": [5.0, *train_losses], "steps": list(train_losses)}


def test_check_curves_accepts_what_is_within_the_bound():
    assert train_report.check_curves(curve(4.0, 3.0), curve(4.009, 2.991), 0.01) == []


@pytest.mark.parametrize("planted", [3.02, 2.98, float("nan"), float("inf")])
def test_check_curves_names_a_planted_divergence(planted):
    faults = train_report.check_curves(curve(4.0, planted), curve(4.0, 3.0), 0.01)
    assert len(faults) == 2 and all("epoch 2" in fault for fault in faults)


def test_verdict_with_dropout_compares_where_the_runs_begin_and_end():
    def judged(fused):
        return train_report.verdict({"fused": fused, "eager": curve(4.0, 3.0)}, 0.01, 0.1)["faults"]

    assert judged(curve(5.0, 3.1)) == []  # in between the masks decide
    assert len(judged(curve(4.0, 3.4))) == len(judged(curve(4.0, float("nan")))) == 1
    early = curve(4.0, 3.0)
    early["test"][0] = 5.1
    assert "before training" in judged(early)[0]


def test_check_curves_refuses_curves_of_unequal_length():
    assert train_report.check_curves(curve(4.0), curve(4.0, 3.0), 0.01)
    assert train_report.check_curves(curve(), curve(), 0.01)


def test_memory_is_measured_and_repeats():
    first, second = (lm_loop.measure_memory("eager", CONFIG, SETTINGS, CPU) for _ in range(2))
    assert first == second
    parameters = sum(p.numel() for p in LanguageModel("eager", CONFIG).parameters())
    # Parameters, gradients and two Adam moments, four bytes each, are held at once.
    assert first["peak_bytes"] > 4 * 4 * parameters
    wider = lm_loop.measure_memory("eager", replace(CONFIG, width=64), SETTINGS, CPU)
    assert all(wider[key] > first[key] for key in first)


SIZES = {"epochs": 1, "layers": 1, "width": 32, "vocab": 300, "context": 64, "batch": 16, "dropout": 0.0}
TINY = ["--device", "cpu", *(word for name, size in SIZES.items() for word in (f"--{name}", str(size)))]


@pytest.fixture
def tiny_text(tmp_path, split):
    path = tmp_path / "text.txt"
    path.write_text("".join(split.train[:3]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, split) -> tuple[Path, str]:
    """The folder that one tiny run wrote, its text within, and what it printed."""
    folder, before = tmp_path_factory.mktemp("finished"), torch.get_num_threads()
    (folder / "a text.txt").write_text("".join(split.train[:3]), encoding="utf-8")
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert train.main([*TINY, "--text", str(folder / "a text.txt"), "--report", str(folder)]) == 0
    torch.set_num_threads(before)
    return folder, printed.getvalue()


def test_run_from_text_to_report(finished_run):
    folder, printed = finished_run
    report = json.loads((folder / "train.json").read_text())
    assert set(report["curves"]) == set(VARIANTS)
    assert report["checks"]["reload_equal"] is True and report["checks"]["faults"] == []
    losses = report["curves"]["fused"]["test"]
    assert losses[1] < losses[0]
    assert all(report["speed"][v]["tokens_per_s"] > 0 and report["memory"][v]["peak_bytes"] > 0 for v in VARIANTS)
    assert (folder / "train_checkpoint.pt").stat().st_size > 0
    if "matplotlib" in sys.modules:
        assert (folder / "train_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "Curves agree" in (folder / "train.md").read_text(encoding="utf-8")
    assert "Curves agree" in printed


def test_run_with_dropout_says_that_masks_differ(tmp_path, tiny_text):
    """Torch's masks and ours are drawn apart: the runs are compared where they begin and end."""
    assert train.main([*TINY, "--dropout", "0.2", "--text", str(tiny_text), "--report", str(tmp_path)]) == 0
    checks = json.loads((tmp_path / "train.json").read_text())["checks"]
    assert checks["largest_difference"] < checks["bound"] and 0 < checks["end_difference"] < checks["drawn_bound"]
    assert "each variant draws its own dropout masks" in " ".join((tmp_path / "train.md").read_text("utf-8").split())


@pytest.mark.parametrize(("factor", "message"), [(0.5, "exceeds"), (float("nan"), "not finite")])
def test_run_fails_on_a_fused_layer_that_is_wrong(tmp_path, tiny_text, capsys, monkeypatch, factor, message):
    """Fused layers that spoil what they return: the job must say so and end with status 1."""
    correct = fusednorm.TransformerEncoder.forward

    def wrong(self, src, *args, **kwargs):
        return correct(self, src, *args, **kwargs) - factor * src

    monkeypatch.setattr(fusednorm.TransformerEncoder, "forward", wrong)
    status = train.main([*TINY, "--rate", "1e-2", "--text", str(tiny_text), "--report", str(tmp_path / "report")])
    assert status == 1
    error = capsys.readouterr().err
    assert "FAILED: test loss" in error and message in error and "checkpoint" not in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--text", "no-such-file.txt"], "no-such-file.txt"),
        (["--dropout", "1.0"], "dropout"),
        (["--epochs", "0"], "epochs"),
        (["--layers", "0"], "layers"),
        (["--vocab", "10"], "vocab"),
        (["--width", "0"], "width"),
        (["--width", "200"], "3 heads"),
        (["--context", "0"], "context"),
        (["--rate", "nan"], "rate"),
        (["--rate", "0"], "rate"),
        (["--provider", "no-such-provider"], "no-such-provider"),
        (["--provider", "triton"], "--provider triton: usable here are reference"),
        (["--report", "{file}/folder"], "Not a directory"),
        (["--report", "{file}"], "File exists"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(
    tiny_text, tmp_path, capsys, monkeypatch, arguments, named
):
    def trained(*_):
        raise AssertionError("the tokenizer was trained first")

    monkeypatch.setattr(lm_data, "train_tokenizer", trained)
    monkeypatch.setattr(fusednorm, "available_providers", lambda: ["reference"])
    arguments = [word.format(file=tiny_text) for word in arguments]
    given = [*TINY, "--text", str(tiny_text), "--report", str(tmp_path / "report"), *arguments]
    assert train.main(given) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("task", [[], ["--task", "lm"], ["--task=lm"]])
def test_dispatcher_hands_the_command_line_to_the_task(task, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main([*task, "--help"])
    assert ended.value.code == 0 and "--context" in capsys.readouterr().out


def test_unknown_task_is_refused_with_the_names_of_those_there_are(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--task", "paint"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and all(name in error for name in train.TASKS)


def test_missing_tokenizers_is_named_with_its_remedy(monkeypatch, capsys, tiny_text):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert train.main([*TINY, "--text", str(tiny_text)]) == 2
    assert "pip install tokenizers" in capsys.readouterr().err


def test_missing_plots_and_bars_degrade(monkeypatch, tmp_path, tiny_text, capsys):
    for name in ("matplotlib", "matplotlib.figure", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train.main([*TINY, "--text", str(tiny_text), "--report", str(tmp_path / "report")]) == 0
    assert not (tmp_path / "report" / "train_curves.png").exists()
    assert "pip install matplotlib" in capsys.readouterr().out


@pytest.fixture
def finished(finished_run) -> dict:
    """What one tiny run reports, made plain: torch's own operators served it, on a calm CPU."""
    folder, _ = finished_run
    report = json.loads((folder / "train.json").read_text())
    assert {route["function"] for route in report["environment"]["route"]} == {
        *("add_layer_norm", "scaled_dot_product_attention", "bias_act_dropout")
    }
    route = {"provider": "reference", "how": "torch's own operators: no kernel of ours serves this call"}
    route |= {"function": "add_layer_norm", "calls": 3, "refusals": ["triton is not used: no GPU"]}
    report["environment"] |= {"route": [route], "others": 0.01}
    assert report["environment"]["fused_command"] == (
        f"python3 examples/train.py {' '.join(TINY)} --text '{folder}/a text.txt' --report {folder} "
        "--provider reference"
    )
    return report


def changed(report: dict, **environment) -> dict:
    return report | {"environment": report["environment"] | environment}


def test_report_says_what_was_trained_and_how_to_train_the_fused_op(finished):
    text = lm_report.summary(finished)
    top, _, rest = text.partition("Text: ")
    assert "No kernel of ours ran" in top and finished["environment"]["fused_command"] in top.splitlines()[-2]
    lines = rest.splitlines()
    assert "Calls of one forward of the fused model: add_layer_norm (3 by reference)." in lines
    assert "- For add_layer_norm, triton is not used: no GPU." in lines
    prose = [line for line in text.partition("```")[0].splitlines() if "python3" not in line]
    assert max(map(len, prose)) <= 120
    fused = {
        "function": "add_layer_norm",
        "provider": "cpu",
        "how": "one fused op each way",
        "calls": 2,
        "refusals": [],
    }
    text = lm_report.summary(changed(finished, route=[fused]))
    assert "No kernel" not in text and "of the fused model: add_layer_norm (2 by cpu)." in text


def test_report_of_a_busy_machine_says_so(finished):
    assert "BUSY" not in lm_report.summary(finished)
    assert "THE MACHINE WAS BUSY" in lm_report.summary(changed(finished, others=0.4))
    assert "BUSY" not in lm_report.summary(changed(finished, others=0.4, device_type="cuda"))
    assert "not known here" in " ".join(lm_report.summary(changed(finished, others=None)).split())


@pytest.mark.parametrize("differences", [(0.0, 0.0, 0.0, 0.0), (0.0, 1e-6, 0.0, 2e-6)])
def test_picture_joins_no_steps_and_names_what_it_shows(finished, monkeypatch, tmp_path, differences):
    figure_type = pytest.importorskip("matplotlib.figure").Figure
    kept = []
    monkeypatch.setattr(figure_type, "savefig", lambda self, path, **_: (self.canvas.draw(), kept.append(self)))
    curves = {"eager": finished["curves"]["eager"] | {"steps": [5.0] * 4}}
    curves["fused"] = curves["eager"] | {"steps": [5.0 + d for d in differences]}
    assert lm_report.plot(changed(finished, others=0.4) | {"curves": curves}, tmp_path / "x.png")
    right = kept[0].axes[1]
    steps = [line for line in right.lines if len(line.get_xdata()) and line.get_label().startswith("a step")]
    assert all(line.get_linestyle() == "None" for line in steps)
    assert [list(line.get_xdata()) for line in steps] == ([[2, 4]] if any(differences) else [])
    said = [text.get_text() for text in [*right.texts, *right.get_legend().get_texts()]]
    assert ("exactly equal at 2 of 4 steps" if any(differences) else "exactly equal at all 4 steps") in said
    assert all(tick == round(tick) for tick in right.get_xticks())
    title = " ".join(kept[0].get_suptitle().split())
    assert "calls of a fused forward: add_layer_norm (3 by reference)" in title and "THE MACHINE WAS BUSY" in title
