"""The tokenizer of every job, and the packages that a job cannot do without."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any


class MissingPackage(RuntimeError):
    """A package that a job cannot do without is not installed."""


def require_packages(task: str, packages: Mapping[str, str]) -> None:
    """Refuse to start where a module's package is missing, naming all that are."""
    missing = [package for module, package in packages.items() if not found(module)]
    if missing:
        names = ", ".join(missing)
        raise MissingPackage(f"the task {task} needs the package(s) {names}: pip install {' '.join(missing)}")


def found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules holds None: importing it would fail
        return False


def check_vocab(vocab: int, special: Sequence[str]) -> None:
    """Refuse a vocabulary that cannot hold every byte and the special tokens."""
    least = 256 + len(special)
    if vocab < least:
        raise ValueError(f"vocab is {vocab}; a byte-level vocabulary has at least {least} entries")


def train_tokenizer(texts: Sequence[str], vocab: int, special: Sequence[str]) -> Any:
    """Train a byte-level BPE tokenizer of at most `vocab` entries; it can encode any text without loss.

    The special tokens, which no text is cut into, have the first ids, in their order.
    """
    import tokenizers

    check_vocab(vocab, special)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(serialized: str) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(serialized)
