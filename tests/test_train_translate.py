"""The task translate: its pairs, its twins, decoding, scores, checkpoint, verdict, and one tiny run to the report."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator

import pytest
import torch

import fusednorm
from benchmarks import train, translate_job, translate_report, translate_score
from benchmarks import translate_data as data
from benchmarks.translate_data import BEGIN_ID, END_ID, PAD_ID, Pair
from benchmarks.translate_loop import Settings, evaluate, train_twins
from benchmarks.translate_model import VARIANTS, ModelConfig, Translator, loss_of, make_twins, translate

for package in ("tokenizers", "sacrebleu", "babel", "django", "jupyterlab_language_pack_zh_CN"):
    pytest.importorskip(package, reason="the task needs the packages of fusednorm[translate]")

CPU = torch.device("cpu")
CONFIG = ModelConfig(vocab=40, positions=9, layers=1, width=16, heads=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads and lose much where other work runs beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return data.load_pairs()


@pytest.fixture(scope="module")
def split(pairs) -> data.Split:
    return data.split_pairs(pairs, 40)


def encoded(count: int = 12) -> data.Encoded:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(count):
        lengths = torch.randint(1, 6, (2,), generator=generator).tolist()
        source, target = (torch.randint(3, CONFIG.vocab, (n,), generator=generator).tolist() for n in lengths)
        rows.append(([*source, END_ID], [BEGIN_ID, *target, END_ID]))
    return rows


# --- data ---


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Enter  %(name)s\n or %s", "Enter {} or {}"),
        ("%1 of {count}", "{} of {}"),
        ("100%% done", "100% done"),
        ("ｗｉｄｅ，full", "wide,full"),
        ("zero\u200bwidth", "zerowidth"),
    ],
)
def test_sentences_are_brought_to_one_form(raw, cleaned):
    assert data.clean(raw) == cleaned


@pytest.mark.parametrize(
    ("source", "target", "fault"),
    [
        ("French", "法语", ""),
        ("French", "French", "untranslated"),
        ("French", "français", "untranslated"),
        ("...", "法语", "untranslated"),
        ("法 language", "法语", "not English"),
        ("<b>French</b>", "<b>法语</b>", "markup or addresses"),
        ("{} cells", "单元格", "placeholders differ"),
        ("French " * 8, "法语", "too long"),
    ],
)
def test_pairs_of_no_use_are_left_out_with_a_reason(source, target, fault):
    assert data.fault_of(Pair(source, target, "x"), 40) == fault


def test_no_source_stands_on_both_sides(split):
    sides = [{data.normalized(pair.source) for pair in side} for side in (split.train, split.test)]
    assert not sides[0] & sides[1]
    assert len(sides[0]) == len(split.train) and len(sides[1]) == len(split.test)
    assert 0.05 < len(split.test) / (len(split.train) + len(split.test)) < 0.15
    assert {pair.origin for pair in split.test} == {"babel", "django", "jupyterlab"}
    assert len(split.train) > 3000 and all(split.left_out.values())


def test_another_version_of_a_package_moves_no_sentence_across(pairs, split):
    fewer = data.split_pairs(pairs[::2], 40)
    assert not {p.source for p in fewer.test} & {p.source for p in split.train}


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="allow longer sentences"):
        data.split_pairs([Pair("French", "法语", "x")], 40)


def test_batches_are_of_like_lengths_and_drawn_by_the_seed():
    rows = encoded(50)
    first, again, other = (data.buckets(rows, 8, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(i for batch in first for i in batch) == list(range(50))
    spread = [max(len(rows[i][1]) for i in batch) - min(len(rows[i][1]) for i in batch) for batch in first]
    assert max(spread) <= 2


def test_batches_are_padded_at_the_end():
    batch = data.batch_of([([5, END_ID], [BEGIN_ID, 6, 7, END_ID]), ([5, 6, END_ID], [BEGIN_ID, END_ID])], [0, 1])
    assert batch.source.tolist() == [[5, END_ID, PAD_ID], [5, 6, END_ID]]
    assert batch.target.tolist() == [[BEGIN_ID, 6, 7, END_ID], [BEGIN_ID, END_ID, PAD_ID, PAD_ID]]


# --- model ---


def test_twins_start_with_equal_loss_and_gradients():
    twins = make_twins(CONFIG, 5, CPU)
    assert type(twins["fused"].transformer) is fusednorm.Transformer
    assert type(twins["eager"].transformer) is torch.nn.Transformer
    assert list(twins["eager"].state_dict()) == list(twins["fused"].state_dict())
    rows = encoded()
    batch = data.batch_of(rows, range(len(rows)))
    losses = {variant: loss_of(model.train(), batch) for variant, model in twins.items()}
    assert losses["fused"].item() == pytest.approx(losses["eager"].item(), rel=1e-6)
    gradients = [torch.autograd.grad(losses[v], list(twins[v].parameters())) for v in VARIANTS]
    for a, b in zip(*gradients, strict=True):
        # float32 gradients of a whole model: sums over every token, in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_no_logits_of_what_is_there(variant):
    model = make_twins(CONFIG, 5, CPU)[variant].eval()
    rows = encoded(2)
    alone = data.batch_of(rows, [0])
    both = data.Batch(*(torch.nn.functional.pad(t, (0, 2)) for t in (alone.source, alone.target)))
    length = alone.target.shape[1]
    torch.testing.assert_close(model(*vars(alone).values()), model(*vars(both).values())[:, :length])


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_is_what_taking_the_likeliest_token_by_hand_gives(variant):
    model = make_twins(CONFIG, 7, CPU)[variant].eval()
    rows = encoded(5)
    found = translate(model, data.padded([source for source, _ in rows]))
    assert all(END_ID not in row and len(row) <= CONFIG.positions for row in found)
    for (source, _), row in zip(rows, found, strict=True):
        target = [BEGIN_ID]
        while len(target) <= CONFIG.positions:
            logits = model(torch.tensor([source]), torch.tensor([target]))[0, -1]
            logits[[PAD_ID, BEGIN_ID]] = -torch.inf
            target.append(int(logits.argmax()))
            if target[-1] == END_ID:
                break
        assert row == [token for token in target[1:] if token != END_ID]


def test_training_repeats_bit_for_bit_and_learns():
    rows, runs = encoded(), []
    for _ in range(2):
        settings = Settings(epochs=3, batch=4, learning_rate=1e-2, seed=1)
        runs.append(train_twins(make_twins(CONFIG, 5, CPU), rows, rows[:4], settings, CPU, say=lambda line: None)[0])
    assert runs[0] == runs[1]
    assert runs[0]["fused"]["train"][-1] < runs[0]["fused"]["train"][0]


def test_checkpoint_reloads_to_the_same_loss(tmp_path, split):
    tokenizer = data.train_tokenizer(split.train[:200], 300)
    rows = data.encode(tokenizer, split.test[:20])
    config = ModelConfig(vocab=tokenizer.get_vocab_size(), positions=120, layers=1, width=16, heads=2)
    model, settings = make_twins(config, 5, CPU)["fused"], Settings(epochs=1, batch=8, learning_rate=1e-3)
    translate_job.save_checkpoint(tmp_path / "folder" / "c.pt", model, tokenizer)
    reloaded, again = translate_job.load_checkpoint(tmp_path / "folder" / "c.pt", CPU)
    assert evaluate(reloaded, rows, settings, CPU) == evaluate(model, rows, settings, CPU)
    assert again.to_str() == tokenizer.to_str()
    torch.manual_seed(1)
    assert evaluate(Translator("fused", config), rows, settings, CPU) != evaluate(model, rows, settings, CPU)


# --- scores and verdict ---


def test_chrf_knows_what_is_right_and_what_is_wrong():
    references = ["法语", "阿根廷时间", "北达科他州"]
    assert translate_score.chrf(references, references) == pytest.approx(100.0)
    assert translate_score.chrf(["甲", "乙", "丙"], references) < 1.0
    half = translate_score.chrf(["法语", "阿根廷", "州"], references)
    assert 20.0 < half < 90.0
    pairs = [Pair("a", text, origin) for text, origin in zip(references, "xxy")]
    scores = translate_score.scores(["法语", "阿根廷", "州"], pairs)
    assert scores["exact"] == pytest.approx(1 / 3) and scores["chrf"] == pytest.approx(half)
    assert scores["by_origin"]["x"]["pairs"] == 2 and scores["by_origin"]["y"]["pairs"] == 1


def test_the_nearest_training_source_is_the_one_most_like_it():
    known = [Pair("Argentina time", "一", "x"), Pair("Central African time", "二", "x"), Pair("Save all", "三", "x")]
    found = translate_score.nearest(known, ["Argentina", "Save", "African", "zzz"])
    assert [pair.target for pair in found] == ["一", "三", "二", "一"]  # of none at all the first


def curve(*losses: float) -> dict[str, list[float]]:
    return {"train": list(losses), "test": [5.0, *losses], "steps": list(losses)}


@pytest.mark.parametrize("planted", [3.1, math.nan])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_verdict_names_a_planted_difference(planted, dropout):
    eager = curve(4.0, 2.5 if dropout else 3.0)
    assert translate_report.verdict({"fused": eager, "eager": eager}, "float32", dropout)["faults"] == []
    assert translate_report.verdict({"fused": curve(4.0, planted), "eager": eager}, "float32", dropout)["faults"]


# --- the command ---

SIZES = {"epochs": 1, "layers": 1, "width": 32, "vocab": 400, "batch": 32, "length": 12, "dropout": 0.0}
OPTIONS = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
TINY = ["--task", "translate", "--device", "cpu", *OPTIONS]


def test_run_from_catalogues_to_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(translate_job, "load_pairs", lambda: data.load_pairs()[::12])
    assert train.main([*TINY, "--rate", "1e-2", "--report", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "translate.json").read_text(encoding="utf-8"))
    assert set(report["scores"]) == {"untrained", "nearest", "eager", "fused"}
    assert report["checks"]["reload_equal"] is True and report["checks"]["faults"] == []
    assert report["curves"]["fused"]["test"][-1] < report["curves"]["fused"]["test"][0]
    text = (tmp_path / "translate.md").read_text(encoding="utf-8")
    assert "Curves agree" in text and "nearest training source" in text
    assert report["examples"][0]["reference"] in text
    if "matplotlib" in sys.modules:
        for name in ("curves", "chrf"):
            assert (tmp_path / f"translate_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Curves agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dropout", "1.0"], "dropout"),
        (["--epochs", "0"], "epochs"),
        (["--layers", "0"], "layers"),
        (["--vocab", "10"], "vocab"),
        (["--width", "200"], "6 heads"),
        (["--rate", "nan"], "rate"),
        (["--decay", "-1"], "decay"),
        (["--length", "1"], "allow longer sentences"),
        (["--threads", "0"], "threads"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(tmp_path, capsys, monkeypatch, arguments, named):
    def trained(*_):
        raise AssertionError("the tokenizer was trained first")

    monkeypatch.setattr(translate_job, "train_tokenizer", trained)
    assert train.main([*TINY, "--report", str(tmp_path), *arguments]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("module", ["sacrebleu", "django", "tokenizers"])
def test_missing_packages_are_named_with_their_remedy(monkeypatch, capsys, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert train.main([*TINY, "--report", str(tmp_path)]) == 2
    assert f"pip install {module}" in capsys.readouterr().err
