"""The text of the language model: split without repeats, tokenized, cut into rows that predict each token once."""

from __future__ import annotations

import pytest
import torch

from examples.language_model import data
from examples.training import text

pytest.importorskip("tokenizers", reason="the training job needs tokenizers")
SPECIAL = (data.END,)


@pytest.fixture(scope="module")
def split() -> data.Split:
    return data.split_documents(*data.load_documents())


def long_lines(chunks: list[str]) -> set[str]:
    """Lines of prose; rulers and heads of tables do recur."""
    return {
        " ".join(line.split())
        for chunk in chunks
        for line in chunk.splitlines()
        if len(line.strip()) >= 50 and line.strip()[0] not in "|+"
    }


def test_documents_do_repeat_each_other():
    """Why repeated paragraphs are removed: without that, whole paragraphs stand in several documents."""
    documents, _ = data.load_documents()
    keys = [data.normalized(p) for document in documents for p in data.paragraphs(document)]
    assert len(set(keys)) < 0.95 * len(keys)


def test_split_shares_no_lines_between_sides(split):
    shared = long_lines(split.train) & long_lines(split.test)
    assert len(shared) <= 0.01 * len(long_lines(split.test)), sorted(shared)


def test_split_keeps_every_paragraph_once_on_one_side(split):
    documents, _ = data.load_documents()
    expected = {data.normalized(p) for document in documents for p in data.paragraphs(document)}
    kept = [data.normalized(p) for chunk in split.train + split.test for p in data.paragraphs(chunk)]
    assert len(kept) == len(set(kept)) and set(kept) == expected
    test_share = sum(map(len, split.test)) / sum(map(len, split.train + split.test))
    assert 0.05 < test_share < 0.15


def test_split_refuses_a_text_too_short_for_two_sides():
    with pytest.raises(ValueError, match="longer text"):
        data.split_documents(["one paragraph\n\none paragraph"])


def test_tokenizer_round_trip_and_repeatability(split):
    tokenizer = text.train_tokenizer(split.train[:20], 600, SPECIAL)
    assert tokenizer.get_vocab_size() == 600
    assert tokenizer.to_str() == text.train_tokenizer(split.train[:20], 600, SPECIAL).to_str()
    reloaded = text.load_tokenizer(tokenizer.to_str())
    for sample in [*split.test[:2], "naïve — 日本語 🙂\t\x00\r\n  indented", ""]:
        assert reloaded.decode(reloaded.encode(sample).ids) == sample
    stream = data.encode(tokenizer, ["ab", "ab"])
    assert stream.dtype == torch.int64 and (stream == tokenizer.token_to_id(data.END)).sum() == 2


def test_vocabulary_smaller_than_the_alphabet_is_refused():
    with pytest.raises(ValueError, match="257"):
        text.train_tokenizer(["text"], 256, SPECIAL)


def test_blocks_predict_each_token_once():
    rows = data.blocks(torch.arange(30), 7)
    assert rows.shape == (4, 8)
    assert torch.equal(rows[:, 1:].flatten(), torch.arange(1, 29))
    with pytest.raises(ValueError, match="more text"):
        data.blocks(torch.arange(7), 7)


def test_unigram_loss_is_the_entropy_of_a_known_source():
    stream = torch.tensor([0] * 75_000 + [1] * 25_000)
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log()).item()
    assert data.unigram_loss(stream, stream, 2) == pytest.approx(entropy, abs=1e-4)
