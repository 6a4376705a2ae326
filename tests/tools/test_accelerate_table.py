"""The page of accelerated models: a row for each model of the zoo, as the tool writes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.model_zoo import models
from tools import accelerate_table

PAGE = Path(__file__).parents[2] / "docs" / "accelerated-models.md"
SAID = re.compile(r"in (\d+) models")
QUICK = ("BERT", "GPT-2", "Llama", "timm ViT", "nn.Transformer, pre-norm")


def check(names, tmp_path):
    accelerate_table.main(["--models", *names, "--write", str(tmp_path / "page.md")])
    made = (tmp_path / "page.md").read_text(encoding="utf-8").splitlines()
    committed = PAGE.read_text(encoding="utf-8").splitlines()
    for name in names:
        rows = [line for line in made if line.startswith(f"| {name} |")]
        kept = [line for line in committed if line.startswith(f"| {name} |")]
        assert rows and rows == kept  # what is fused, then what is left


def test_the_page_has_a_row_for_each_model():
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in models() if f"| {name} |" not in text] == []


def test_pages_say_how_many_models_there_are():
    said = [SAID.findall(page.read_text(encoding="utf-8")) for page in sorted(PAGE.parent.glob("*.md"))]
    numbers = [int(number) for found in said for number in found]
    assert numbers and set(numbers) == {len(models())}


def test_rows_of_the_page_are_what_is_fused_now(tmp_path):
    check(QUICK, tmp_path)


@pytest.mark.slow
def test_every_row_of_the_page_is_what_is_fused_now(tmp_path):
    check(list(models()), tmp_path)
