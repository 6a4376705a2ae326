"""First sentences of docstrings, and which package each comes from: read, clean, split, encode, batch.

The source files of installed packages are read, not run. A package's own names are blotted out, so that no text says
where it comes from.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.training.batches import buckets
from examples.training.machine import progress_bar
from examples.training.model import Batch

PAD, MASK, BLOT = "<|pad|>", "<|mask|>", "<|name|>"
SPECIAL = (PAD, MASK, BLOT)  # ids 0, 1, 2
PAD_ID, MASK_ID, BLOT_ID = range(3)
# Modules that torch needs, or an extra of this package brings, and what pip calls their packages.
PACKAGES = {
    "torch": "torch",
    "sympy": "sympy",
    "networkx": "networkx",
    "numpy": "numpy",
    "scipy": "scipy",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "django": "django",
}
CLASSES = ("Python's library", *PACKAGES.values())
NAMES = re.compile(
    r"\b(python|pytorch|torch|sympy|networkx|numpy|scipy|matplotlib|sklearn|scikit|django|np|nx|plt|mpl)\b",
    re.IGNORECASE,
)
TESTS = re.compile(r"tests?|testing|_?test_.*|.*_tests?(\.py)?|conftest\.py|site-packages|idlelib")
TEST_SHARE = 0.1
SHORTEST = 30  # characters


@dataclass(frozen=True)
class Text:
    words: str
    place: int  # of its package in CLASSES


@dataclass(frozen=True)
class Split:
    """No text stands twice, within a side or across, and no source file gives texts to both sides."""

    train: list[Text]
    test: list[Text]


def folders() -> list[Path]:
    """Where the source of each class is."""
    found = [Path(sysconfig.get_path("stdlib"))]
    for module in PACKAGES:
        found.append(Path(importlib.util.find_spec(module).submodule_search_locations[0]))  # type: ignore[union-attr,index]
    return found


def key_of(path: str) -> int:
    """A number that orders files as if drawn by chance, by their names alone."""
    return zlib.crc32(path.encode())


def clean(docstring: str) -> str:
    """The first paragraph in one line, without the names of packages."""
    return NAMES.sub(BLOT, " ".join(docstring.split("\n\n")[0].split()))


def docstrings_of(path: Path) -> Iterator[str]:
    """What the classes and functions of a source file say of themselves."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            said = ast.get_docstring(node)
            if said:
                yield clean(said)


def load_split(most: int) -> Split:
    """Read files of each package, ordered as by chance, until it has given `most` texts; hold out a tenth of files."""
    if most < 1:
        raise ValueError(f"texts is {most}; it must be at least 1")
    train: list[Text] = []
    test: list[Text] = []
    seen: set[str] = set()
    for place, folder in enumerate(progress_bar(folders(), len(CLASSES), "reading")):
        names = [path.relative_to(folder) for path in folder.rglob("*.py")]
        names = [name for name in names if not any(TESTS.fullmatch(part) for part in name.parts)]
        count = 0
        for name in sorted(names, key=lambda name: (key_of(name.as_posix()), name)):
            held_out = key_of(f"{place} {name.as_posix()}") < TEST_SHARE * 2**32
            for words in docstrings_of(folder / name):
                if len(words) >= SHORTEST and words.casefold() not in seen and count < most:
                    seen.add(words.casefold())
                    (test if held_out else train).append(Text(words, place))
                    count += 1
            if count == most:
                break
    if not train or not test:
        raise ValueError(f"{len(train)} texts to train on and {len(test)} held out; allow more texts")
    return Split(train, test)


Encoded = list[list[int]]


def encode(tokenizer: Any, texts: Sequence[Text], longest: int) -> Encoded:
    """The first tokens of each text."""
    found = tokenizer.encode_batch([text.words for text in texts], add_special_tokens=False)
    return [encoding.ids[:longest] for encoding in found]


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD_ID] * (width - len(row))] for row in rows], dtype=torch.int64)


@dataclass(frozen=True)
class Labelled:
    """Texts and the places of their packages, in batches of about equal length."""

    encoded: Encoded
    places: Sequence[int]

    def batches(self, size: int, seed: int | None = None) -> list[Batch]:
        return [
            Batch((padded([self.encoded[i] for i in chosen]),), torch.tensor([self.places[i] for i in chosen]))
            for chosen in buckets([len(row) for row in self.encoded], size, seed)
        ]


@dataclass(frozen=True)
class Masked:
    """Texts in which some tokens are hidden and asked for, as BERT does it: others in each epoch, the same held out."""

    encoded: Encoded
    vocab: int
    share: float = 0.3  # of a text's tokens, and one at least; BERT asks for half as many, and learns less in a step

    def batches(self, size: int, seed: int | None = None) -> list[Batch]:
        lengths = [len(row) for row in self.encoded]
        given, asked = self.hidden(padded(self.encoded), torch.tensor(lengths), 0 if seed is None else seed)
        return [self.batch_of(given, asked, chosen) for chosen in buckets(lengths, size, seed)]

    def hidden(self, tokens: torch.Tensor, lengths: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the tokens asked for, 8 in 10 are replaced by MASK and 1 by any token; 1 stays."""
        generator = torch.Generator().manual_seed(seed)
        drawn, fate = torch.rand(2, *tokens.shape, generator=generator)
        others = torch.randint(len(SPECIAL), self.vocab, tokens.shape, generator=generator)
        place = torch.arange(tokens.shape[1])
        rank = drawn.masked_fill(place >= lengths[:, None], 2.0).argsort(1).argsort(1)
        asked = rank < (self.share * lengths).round().clamp(min=1)[:, None]
        given = torch.where(asked & (fate < 0.8), MASK_ID, tokens)
        return torch.where(asked & (fate >= 0.9), others, given), asked

    def batch_of(self, given: torch.Tensor, asked: torch.Tensor, chosen: Sequence[int]) -> Batch:
        rows = [self.encoded[i] for i in chosen]
        tokens = padded(rows)
        width = tokens.shape[1]
        places = asked[chosen, :width].flatten().nonzero()[:, 0]
        return Batch((given[chosen, :width], places), tokens.flatten()[places])
