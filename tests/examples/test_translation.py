"""The task translate: its pairs, its batches, greedy decoding, scores."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from examples.training.loop import train_twins
from examples.training.model import IGNORED, VARIANTS, loss_of
from examples.training.text import train_tokenizer
from examples.translation import data
from examples.translation.data import BEGIN_ID, END_ID, PAD_ID, Pair, Sentences, padded
from examples.translation.model import Translator, translate
from examples.translation.score import chrf, nearest, scores


def need(*modules: str) -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"{module} is missing; the extra translate brings it: '.[translate]'")


@pytest.fixture(scope="module")
def raw() -> list[Pair]:
    """All pairs of the three packages."""
    need(*data.PACKAGES)
    return data.load_pairs()


# pairs


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Hello, %(name)s!", "Hello, {}!"),
        ("%s of %d", "{} of {}"),
        ("Line %1 of %22", "Line {} of {}"),
        ("{0} ({language})", "{} ({})"),
        ("100%% sure", "100% sure"),
        ("两  个\n空格\t", "两 个 空格"),
        ("（全角）ＡＢ", "(全角)AB"),
        ("a\u200bb\u200e", "ab"),
        ("5% off", "5% off"),
    ],
)
def test_clean_gives_placeholders_width_and_spaces_one_form(text, wanted):
    assert data.clean(text) == wanted
    assert data.clean(wanted) == wanted


@pytest.mark.parametrize(
    ("source", "target", "fault"),
    [
        ("Save", "保存", ""),
        ("Save {}", "保存 {}", ""),
        ("Save", "Save", "untranslated"),
        ("Save", "Sauver", "untranslated"),
        ("…", "省略", "untranslated"),
        ("保存", "保存文件", "not English"),
        ("<b>Save</b>", "保存", "markup or addresses"),
        ("Save", "保存 &nbsp; 到", "markup or addresses"),
        ("see https://a", "见 https://a", "markup or addresses"),
        ("{a, plural}", "{a, 复数}", "markup or addresses"),
        ("Save {}", "保存", "placeholders differ"),
        ("Save it all", "保存", "too long"),
    ],
)
def test_pairs_of_no_use_are_told_by_their_fault(source, target, fault):
    assert data.fault_of(Pair(source, target, "here"), 10) == fault


def many(count: int) -> list[Pair]:
    return [Pair(f"Word {i}", f"词 {i}", "here") for i in range(count)]


def test_split_keeps_one_pair_of_each_source_whatever_its_case_spaces_and_punctuation():
    pairs = [Pair("Save  file…", "保存文件", "a"), Pair("save file", "存文件", "b"), *many(50), Pair("x", "x", "c")]
    split = data.split_pairs(pairs, 40)
    kept = split.train + split.test
    assert len(kept) == 51 and split.left_out == {"repeated": 1, "untranslated": 1}
    assert [p.target for p in kept if data.normalized(p.source) == "save file"] == ["保存文件"]


def test_split_moves_no_pair_across_when_others_come_or_go():
    whole, half = data.split_pairs(many(400), 40), data.split_pairs(many(400)[::2], 40)
    assert set(half.train) < set(whole.train) and set(half.test) < set(whole.test)
    assert 0.05 < len(whole.test) / 400 < 0.15


def test_split_refuses_pairs_that_leave_a_side_empty():
    with pytest.raises(ValueError, match="allow longer sentences"):
        data.split_pairs(many(400), 3)


def test_pairs_of_the_packages_split_without_a_leak(raw):
    split = data.split_pairs(raw, 120)
    sides = [{data.normalized(p.source) for p in side} for side in (split.train, split.test)]
    assert not sides[0] & sides[1]
    assert sum(map(len, sides)) == len(split.train) + len(split.test) > 4000
    assert {p.origin for p in split.test} == {p.origin for p in split.train} == {"babel", "django", "jupyterlab"}
    for pair in split.train + split.test:
        assert pair.source.count("{}") == pair.target.count("{}")
        assert not data.PLACEHOLDER.search(pair.source.replace("{}", ""))
        assert data.CHINESE.search(pair.target) and not data.CHINESE.search(pair.source)
    assert raw == data.load_pairs()


def test_catalogue_gives_the_plural_and_no_header(tmp_path):
    need("babel")
    from babel.messages import Catalog
    from babel.messages.mofile import write_mo

    catalogue = Catalog(locale="zh_Hans")
    catalogue.add("Save", "保存")
    catalogue.add(("%d file", "%d files"), ("%d 个文件",))
    catalogue.add("Open", "打开", context="menu")
    with (tmp_path / "x.mo").open("wb") as file:
        write_mo(file, catalogue)
    found = set(data.catalogue_pairs(tmp_path / "x.mo", "x"))
    assert found == {Pair("Save", "保存", "x"), Pair("%d files", "%d 个文件", "x"), Pair("Open", "打开", "x")}


def test_tokenizer_has_the_marks_first_and_gives_every_text_back(raw):
    need("tokenizers")
    split = data.split_pairs(raw[::20], 40)
    tokenizer = train_tokenizer([t for p in split.train for t in (p.source, p.target)], 500, data.SPECIAL)
    assert [tokenizer.token_to_id(mark) for mark in data.SPECIAL] == [PAD_ID, BEGIN_ID, END_ID]
    for (source, target), pair in zip(data.encode(tokenizer, split.test), split.test):
        assert source[-1] == target[-1] == END_ID and target[0] == BEGIN_ID
        assert tokenizer.decode(source[:-1]) == pair.source and tokenizer.decode(target[1:-1]) == pair.target


# batches


def test_buckets_take_every_pair_once_and_pad_little(drawn):
    encoded = drawn(103)
    by_length, shuffled = data.buckets_of(encoded, 8), data.buckets_of(encoded, 8, 1)
    for batches in (by_length, shuffled):
        assert sorted(i for batch in batches for i in batch) == list(range(103))
        assert sorted(map(len, batches)) == [7] + [8] * 12
        padding = sum(int((data.batch_of(encoded, batch).wanted == IGNORED).sum()) for batch in batches)
        assert padding <= 0.1 * sum(len(target) for _, target in encoded)
    lengths = [len(encoded[i][1]) for batch in by_length for i in batch]
    assert lengths == sorted(lengths)
    assert {frozenset(batch) for batch in shuffled} != {frozenset(batch) for batch in data.buckets_of(encoded, 8, 2)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(translation, drawn, variant):
    model, encoded = translation.twins()[variant].eval(), drawn(6, longest=6)
    source, target = (padded([pair[side] for pair in encoded]) for side in (0, 1))
    wider = nn.functional.pad(source, (0, 3)), nn.functional.pad(target, (0, 4))
    with torch.no_grad():
        losses = [loss_of(model, data.make_batch(*given)).item() for given in (wider, (source, target))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        real = (target != PAD_ID)[..., None]
        ours, theirs = model(*wider)[:, : target.shape[1]] * real, model(source, target) * real
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        row = model(*(torch.tensor([tokens]) for tokens in encoded[2]))[0]
        torch.testing.assert_close(theirs[2, : len(row)], row, rtol=1e-5, atol=1e-5)
    assert translate(model, wider[0]) == translate(model, source)


# decoding


class Planned(nn.Module):
    """A model whose next token hangs on the row and on how many came before: plan[row][place]."""

    def __init__(self, plan: list[list[int]], positions: int) -> None:
        super().__init__()
        self.plan, self.config, self.longest = plan, SimpleNamespace(context=positions), 0
        self.variant = "eager"

    def encode(self, source: torch.Tensor) -> torch.Tensor:
        return source

    def decode(self, target: torch.Tensor, memory: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        assert not self.training and torch.equal(memory, source)
        self.longest = target.shape[1]
        scores = torch.zeros(*target.shape, 10)
        scores[..., [PAD_ID, BEGIN_ID]] = 9.0  # likeliest of all, yet never taken
        for row, first in enumerate(source[:, 0].tolist()):
            scores[row, -1, self.plan[first][self.longest - 1]] = 5.0
        return scores

    def logits(self, decoded: torch.Tensor) -> torch.Tensor:
        return decoded


@pytest.mark.parametrize(("positions", "steps"), [(20, 5), (3, 3)], ids=["enough_positions", "too_few_positions"])
def test_greedy_decoding_ends_a_row_at_its_end_and_the_batch_with_the_last_row_or_position(positions, steps):
    plan = [[4, 5, END_ID, 9, 9, 9], [END_ID, 9, 9, 9, 9, 9], [7, 7, 7, 7, END_ID, 9]]
    model = Planned(plan, positions).train()
    assert translate(model, torch.tensor([[2], [0], [1]])) == [[7] * min(4, steps), [4, 5], []]
    assert model.longest == steps and model.training


@torch.no_grad()
def by_hand(model: Translator, source: list[int]) -> list[int]:
    """Greedy decoding of one sentence without any bookkeeping."""
    target = [BEGIN_ID]
    while len(target) <= model.config.context:
        logits = model.eval()(torch.tensor([source]), torch.tensor([target]))[0, -1]
        logits[[PAD_ID, BEGIN_ID]] = -torch.inf
        if (token := int(logits.argmax())) == END_ID:
            break
        target.append(token)
    return target[1:]


@torch.no_grad()
def mean_log_probability(model: Translator, source: list[int], row: list[int]) -> float:
    """Of a translation's tokens and its END."""
    target = torch.tensor([[BEGIN_ID, *row, END_ID]])[:, : model.config.context + 1]
    logits = model.eval()(torch.tensor([source]), target[:, :-1])[0]
    logits[:, [PAD_ID, BEGIN_ID]] = -torch.inf
    return logits.log_softmax(-1).gather(1, target[0, 1:, None]).mean().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_batch_are_translated_as_by_hand(translation, drawn, variant):
    model, settings = translation.twins()[variant], replace(translation.settings, epochs=4)
    sides = Sentences(drawn(40)), Sentences(drawn(4))
    curves, _ = train_twins({variant: model}, *sides, settings, translation.device, print)
    assert curves[variant]["train"][-1] < curves[variant]["train"][0]
    sources = [source for source, _ in drawn(12)]
    together = translate(model, padded(sources))
    assert together == [by_hand(model, source) for source in sources]
    assert len({len(row) for row in together}) > 1
    if variant == "fused":
        by_beams = translate(model, padded(sources), beams=64)
        assert by_beams != together
        means = [[mean_log_probability(model, *pair) for pair in zip(sources, rows)] for rows in (together, by_beams)]
        assert sum(means[1]) > sum(means[0])


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
