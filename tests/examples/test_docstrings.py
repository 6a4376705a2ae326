"""The tasks classify and mlm: texts without leaks, masks, what a classifier makes of padding."""

from __future__ import annotations

import pytest
import torch

from examples.docstrings import data
from examples.docstrings.data import BLOT, CLASSES, MASK_ID, PAD_ID, SPECIAL, Labelled, Masked
from examples.docstrings.model import TextClassifier
from examples.training.model import VARIANTS, ModelConfig


@pytest.fixture(scope="module")
def split() -> data.Split:
    for module in data.PACKAGES:
        pytest.importorskip(module, reason=f"{module} is missing; the extra examples brings it: '.[examples]'")
    return data.load_split(60)


def test_texts_stand_once_and_do_not_name_their_package(split):
    words = [text.words.casefold() for text in split.train + split.test]
    assert len(words) == len(set(words)) <= 60 * len(CLASSES)
    assert {text.place for text in split.train} == set(range(len(CLASSES)))
    assert not any(data.NAMES.search(word) for word in words)
    assert split == data.load_split(60)


def test_too_few_texts_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "folders", lambda: [tmp_path])
    with pytest.raises(ValueError, match="allow more texts"):
        data.load_split(5)
    with pytest.raises(ValueError, match="texts is 0"):
        data.load_split(0)


def test_docstrings_are_read_not_run(tmp_path):
    source = (
        '"""Of the module."""\nraise SystemExit\nclass A:\n    """Of numpy\'s A,\n    in two lines.\n\n    More."""\n'
    )
    (tmp_path / "a.py").write_text(source, encoding="utf-8")
    assert list(data.docstrings_of(tmp_path / "a.py")) == [f"Of {BLOT}'s A, in two lines."]
    (tmp_path / "b.py").write_text("print 1", encoding="utf-8")
    assert list(data.docstrings_of(tmp_path / "b.py")) == []


@pytest.mark.parametrize("name", ["tests", "test_x.py", "x_test.py", "conftest.py", "testing", "site-packages"])
def test_tests_are_no_source(name):
    assert data.TESTS.fullmatch(name) and not data.TESTS.fullmatch("latest.py")


def test_masks_ask_for_a_share_and_show_most_of_it_as_mask():
    rows = [[3 + (i + j) % 50 for j in range(20)] for i in range(400)] + [[7]]
    side = Masked(rows, 53)
    batches = side.batches(401)
    ((given, places),), wanted = [batch.inputs for batch in batches], batches[0].wanted
    assert len(places) == 400 * 6 + 1  # 30 % of 20, and of one token that one
    ordered = data.padded([rows[i] for i in data.buckets([len(row) for row in rows], 401)[0]])
    assert torch.equal(ordered.flatten()[places], wanted) and not (wanted == PAD_ID).any()
    shown = given.flatten()[places]
    shares = [float((shown == MASK_ID).float().mean()), float((shown == wanted).float().mean())]
    assert shares[0] == pytest.approx(0.8, abs=0.05) and shares[1] == pytest.approx(0.1, abs=0.04)
    rest = torch.ones(given.numel(), dtype=torch.bool).index_fill(0, places, False)
    assert torch.equal(given.flatten()[rest], ordered.flatten()[rest])
    assert ((shown == MASK_ID) | (shown >= len(SPECIAL))).all()


def test_masks_hang_on_the_seed_and_stay_held_out():
    side = Masked([[3, 4, 5, 6, 7, 8, 9, 10, 11]] * 30, 53)
    whole = [[batch.wanted.tolist() for batch in side.batches(8, seed)] for seed in (None, None, 1, 1, 2)]
    assert whole[0] == whole[1] != whole[2] == whole[3] != whole[4]


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_no_class(variant):
    torch.manual_seed(0)
    model = TextClassifier(variant, ModelConfig(vocab=61, context=14, classes=5, layers=2, width=32, heads=2)).eval()
    (batch,) = Labelled([[5, 6, 7], list(range(10, 24))], [0, 1]).batches(2)
    together = model(*batch.inputs)
    # float32 sums over padded rows, in another order
    torch.testing.assert_close(together[:1], model(torch.tensor([[5, 6, 7]])), rtol=1e-4, atol=1e-5)
