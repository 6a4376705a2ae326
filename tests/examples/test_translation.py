"""The task translate: its pairs, its batches, its twins, greedy decoding, training and checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fusednorm
from examples.training import shared as train_shared
from examples.translation import data as translate_data
from examples.translation import job as translate_job
from examples.translation import report as translate_report
from examples.translation.data import (
    BEGIN_ID,
    END_ID,
    PAD_ID,
    Batch,
    Encoded,
    Pair,
    batch_of,
    buckets,
    clean,
    normalized,
    padded,
    split_pairs,
)
from examples.translation.loop import Settings, evaluate, measure_memory, train_twins
from examples.translation.model import VARIANTS, ModelConfig, Translator, loss_of, make_twins, translate

CPU = torch.device("cpu")
CONFIG = ModelConfig(vocab=61, positions=14, layers=2, width=32, heads=2)
SETTINGS = Settings(epochs=2, batch=4, learning_rate=5e-3, decay=0.1, seed=3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads and lose much where other work runs beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def need(*modules: str) -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"{module} is missing; the extra translate brings it: '.[translate]'")


@pytest.fixture(scope="module")
def raw() -> list[Pair]:
    """All pairs of the three packages."""
    need(*translate_data.PACKAGES)
    return translate_data.load_pairs()


def drawn(count: int, longest: int = 11) -> Encoded:
    """Pairs of random tokens, sources and targets of 1 to `longest` tokens beside the marks."""
    generator = torch.Generator().manual_seed(11)

    def tokens() -> list[int]:
        size = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(3, CONFIG.vocab, (size,), generator=generator).tolist()

    return [([*tokens(), END_ID], [BEGIN_ID, *tokens(), END_ID]) for _ in range(count)]


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
    assert clean(text) == wanted
    assert clean(wanted) == wanted


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
    assert translate_data.fault_of(Pair(source, target, "here"), 10) == fault


def many(count: int) -> list[Pair]:
    return [Pair(f"Word {i}", f"词 {i}", "here") for i in range(count)]


def test_split_keeps_one_pair_of_each_source_whatever_its_case_spaces_and_punctuation():
    pairs = [Pair("Save  file…", "保存文件", "a"), Pair("save file", "存文件", "b"), *many(50), Pair("x", "x", "c")]
    split = split_pairs(pairs, 40)
    kept = split.train + split.test
    assert len(kept) == 51 and split.left_out == {"repeated": 1, "untranslated": 1}
    assert [p.target for p in kept if normalized(p.source) == "save file"] == ["保存文件"]


def test_split_moves_no_pair_across_when_others_come_or_go():
    whole, half = split_pairs(many(400), 40), split_pairs(many(400)[::2], 40)
    assert set(half.train) < set(whole.train) and set(half.test) < set(whole.test)
    assert 0.05 < len(whole.test) / 400 < 0.15


def test_split_refuses_pairs_that_leave_a_side_empty():
    with pytest.raises(ValueError, match="allow longer sentences"):
        split_pairs(many(400), 3)


def test_pairs_of_the_packages_split_without_a_leak(raw):
    split = split_pairs(raw, 120)
    sides = [{normalized(p.source) for p in side} for side in (split.train, split.test)]
    assert not sides[0] & sides[1]
    assert sum(map(len, sides)) == len(split.train) + len(split.test) > 4000
    assert {p.origin for p in split.test} == {p.origin for p in split.train} == {"babel", "django", "jupyterlab"}
    for pair in split.train + split.test:
        assert pair.source.count("{}") == pair.target.count("{}")
        assert not translate_data.PLACEHOLDER.search(pair.source.replace("{}", ""))
        assert translate_data.CHINESE.search(pair.target) and not translate_data.CHINESE.search(pair.source)
    assert raw == translate_data.load_pairs()


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
    found = set(translate_data.catalogue_pairs(tmp_path / "x.mo", "x"))
    assert found == {Pair("Save", "保存", "x"), Pair("%d files", "%d 个文件", "x"), Pair("Open", "打开", "x")}


def test_tokenizer_has_the_marks_first_and_gives_every_text_back(raw):
    need("tokenizers")
    split = split_pairs(raw[::20], 40)
    tokenizer = translate_data.train_tokenizer(split.train, 500)
    assert [tokenizer.token_to_id(mark) for mark in translate_data.SPECIAL] == [PAD_ID, BEGIN_ID, END_ID]
    for (source, target), pair in zip(translate_data.encode(tokenizer, split.test), split.test):
        assert source[-1] == target[-1] == END_ID and target[0] == BEGIN_ID
        assert tokenizer.decode(source[:-1]) == pair.source and tokenizer.decode(target[1:-1]) == pair.target


# batches


def test_buckets_take_every_pair_once_and_pad_little():
    encoded = drawn(103)
    for seed in (None, 1):
        batches = buckets(encoded, 8, seed)
        assert sorted(i for batch in batches for i in batch) == list(range(103))
        assert sorted(map(len, batches)) == [7] + [8] * 12
        padding = sum(int((batch_of(encoded, batch).target == PAD_ID).sum()) for batch in batches)
        assert padding <= 0.1 * sum(len(target) for _, target in encoded)


def test_buckets_are_drawn_from_the_seed_alone():
    encoded = drawn(103)
    first = buckets(encoded, 8, 1)
    torch.rand(3)
    assert first == buckets(encoded, 8, 1) != buckets(encoded, 8, 2)
    lengths = [len(encoded[i][1]) for batch in buckets(encoded, 8) for i in batch]
    assert lengths == sorted(lengths)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in buckets(encoded, 8, 2)}


def test_padded_rows_end_in_pad():
    assert padded([[5], [6, 7, 8]]).tolist() == [[5, PAD_ID, PAD_ID], [6, 7, 8]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(variant):
    model = make_twins(CONFIG, 5, CPU)[variant].eval()
    encoded = drawn(6, longest=6)
    batch = batch_of(encoded, range(6))
    wider = Batch(nn.functional.pad(batch.source, (0, 3)), nn.functional.pad(batch.target, (0, 4)))
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, wider), loss_of(model, batch), rtol=1e-6, atol=0.0)
        length = batch.target.shape[1]
        real = (batch.target != PAD_ID)[..., None]
        ours, theirs = model(wider.source, wider.target)[:, :length] * real, model(batch.source, batch.target) * real
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        alone = batch_of(encoded, [2])
        row = model(alone.source, alone.target)[0]
        torch.testing.assert_close(theirs[2, : len(row)], row, rtol=1e-5, atol=1e-5)
    assert translate(model, wider.source) == translate(model, batch.source)


# the models


@pytest.mark.parametrize("provider", [None, "reference"])
def test_twins_have_equal_parameters_losses_and_gradients(provider):
    twins = make_twins(CONFIG, 5, CPU)
    batch = batch_of(drawn(6), range(6))
    losses, gradients = {}, {}
    for variant, model in twins.items():
        with train_shared.provider_context(provider):
            losses[variant] = loss_of(model.train(), batch)
        losses[variant].backward()
        gradients[variant] = {name: p.grad for name, p in model.named_parameters()}
    eager, fused = (twins[v].state_dict() for v in ("eager", "fused"))
    assert list(eager) == list(fused) and all(torch.equal(eager[name], fused[name]) for name in eager)
    assert losses["fused"].item() == pytest.approx(losses["eager"].item(), rel=1e-6)
    for name, gradient in gradients["eager"].items():
        # float32 gradients of a whole model: sums over every token, in another order
        torch.testing.assert_close(gradients["fused"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_only_the_fused_twin_is_ours():
    twins = make_twins(CONFIG, 5, CPU)
    assert type(twins["fused"].transformer) is fusednorm.Transformer
    assert type(twins["eager"].transformer) is nn.Transformer


def test_decoder_does_not_look_ahead():
    model = make_twins(CONFIG, 5, CPU)["fused"].eval()
    batch = batch_of(drawn(1, longest=12), [0])
    target = torch.arange(3, 13)[None]
    changed = target.clone()
    changed[:, 6:] += 1
    with torch.no_grad():
        before, after = model(batch.source, target), model(batch.source, changed)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


class Planned(nn.Module):
    """A model whose next token hangs on the row and on how many came before: plan[row][place]."""

    def __init__(self, plan: list[list[int]], positions: int) -> None:
        super().__init__()
        self.plan, self.config, self.longest = plan, SimpleNamespace(positions=positions), 0

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


def test_greedy_decoding_ends_a_row_at_its_end_and_the_batch_with_the_last():
    plan = [[4, 5, END_ID, 9, 9, 9], [END_ID, 9, 9, 9, 9, 9], [7, 7, 7, 7, END_ID, 9]]
    model = Planned(plan, positions=20).train()
    assert translate(model, torch.tensor([[2], [0], [1]])) == [[7, 7, 7, 7], [4, 5], []]
    assert model.longest == 5 and model.training


def test_greedy_decoding_stops_at_the_last_position():
    model = Planned([[4] * 9], positions=6)
    assert translate(model, torch.tensor([[0]])) == [[4] * 6] and model.longest == 6


@torch.no_grad()
def by_hand(model: Translator, source: list[int]) -> list[int]:
    """Greedy decoding of one sentence without any bookkeeping."""
    target = [BEGIN_ID]
    while len(target) <= model.config.positions:
        logits = model.eval()(torch.tensor([source]), torch.tensor([target]))[0, -1]
        logits[[PAD_ID, BEGIN_ID]] = -torch.inf
        if (token := int(logits.argmax())) == END_ID:
            break
        target.append(token)
    return target[1:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_batch_are_translated_as_by_hand(variant):
    model = make_twins(CONFIG, 5, CPU)[variant]
    settings = replace(SETTINGS, epochs=4)
    curves, _ = train_twins({variant: model}, drawn(40), drawn(4), settings, CPU, say=lambda line: None)
    assert curves[variant]["train"][-1] < curves[variant]["train"][0]
    sources = [source for source, _ in drawn(12)]
    together = translate(model, padded(sources))
    assert together == [by_hand(model, source) for source in sources]
    assert len({len(row) for row in together}) > 1


# training


def test_training_repeats_bit_for_bit_with_dropout():
    encoded, runs = drawn(22), []
    for _ in range(2):
        with train_shared.deterministic():
            twins = make_twins(replace(CONFIG, dropout=0.2), 5, CPU)
            runs.append(train_twins(twins, encoded, encoded[:5], SETTINGS, CPU, say=lambda line: None)[0])
    assert runs[0] == runs[1]
    fused = runs[0]["fused"]
    assert len(fused["steps"]) == 12 and len(fused["test"]) == 3 and fused["train"][-1] < fused["train"][0]


def test_curves_of_the_twins_agree():
    encoded = drawn(40)
    twins = make_twins(CONFIG, 5, CPU)
    curves, speed = train_twins(twins, encoded, encoded[:5], SETTINGS, CPU, say=lambda line: None)
    assert translate_report.verdict(curves, "float32", 0.0)["faults"] == []
    assert all(speed[v]["tokens_per_s"] > 0 and speed[v]["steps"] == 20 for v in VARIANTS)


def test_loss_is_a_mean_over_tokens_whatever_the_batch():
    model = make_twins(CONFIG, 5, CPU)["fused"]
    encoded = drawn(23)
    losses = [evaluate(model, encoded, replace(SETTINGS, batch=size), CPU) for size in (1, 4, 23)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_memory_is_measured_and_repeats():
    batch = batch_of(drawn(4), range(4))
    first, second = (measure_memory("fused", CONFIG, SETTINGS, batch, CPU) for _ in range(2))
    assert first == second
    parameters = sum(p.numel() for p in Translator("fused", CONFIG).parameters())
    # Parameters, gradients and two moments of AdamW, four bytes each, are held at once.
    assert first["peak_bytes"] > 4 * 4 * parameters
    assert first["saved_bytes"] > 0


def test_checkpoint_reloads_bit_for_bit(tmp_path, raw):
    need("tokenizers")
    tokenizer = translate_data.train_tokenizer(split_pairs(raw[::50], 40).train, 300)
    model = make_twins(replace(CONFIG, vocab=300), 5, CPU)["fused"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path / "folder" / "c.pt"
    translate_job.save_checkpoint(path, model, tokenizer)
    reloaded, reloaded_tokenizer = translate_job.load_checkpoint(path, CPU)
    saved = model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in reloaded.state_dict().items())
    assert reloaded.config == model.config and reloaded_tokenizer.to_str() == tokenizer.to_str()
    encoded = drawn(9)
    assert evaluate(reloaded, encoded, SETTINGS, CPU) == evaluate(model, encoded, SETTINGS, CPU)
    fresh = Translator("fused", model.config)
    assert evaluate(fresh, encoded, SETTINGS, CPU) != evaluate(model, encoded, SETTINGS, CPU)
