"""Text for the language model: load, remove repetitions, split, tokenize, cut into blocks.

The default text is `pydoc_data.topics`, the English reference text inside every CPython. A fifth of it is
repeated: whole sections stand in several topics ("compound" contains "with", "specialnames" contains
"customization"). Splitting by topic would put the test text into the training text, so repeated paragraphs are
removed first, keeping the first of each, and only then is the text split.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.training.model import Batch

END = "<|end|>"
CHUNK_CHARACTERS = 4000
TEST_EVERY = 10


@dataclass(frozen=True)
class Split:
    """Chunks of consecutive paragraphs; no paragraph occurs twice, within a side or across."""

    train: list[str]
    test: list[str]
    repeated_characters: int
    source: str


def load_documents(path: str | None = None) -> tuple[list[str], str]:
    """Return the documents and a name for them: pydoc's topics in sorted order, or one file."""
    if path is not None:
        return [Path(path).read_text(encoding="utf-8")], Path(path).name
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)], "pydoc_data.topics"


def paragraphs(document: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n[ \t]*\n", document) if part.strip()]


def normalized(paragraph: str) -> str:
    """What makes two paragraphs the same: their words, not indentation or line breaks."""
    return " ".join(paragraph.split())


def chunks_of(parts: list[str], characters: int = CHUNK_CHARACTERS) -> list[str]:
    """Join consecutive paragraphs into chunks of at least `characters` each (the last may be shorter)."""
    chunks: list[str] = []
    current: list[str] = []
    size = 0
    for part in parts:
        current.append(part)
        size += len(part)
        if size >= characters:
            chunks.append("\n\n".join(current) + "\n\n")
            current, size = [], 0
    if current:
        chunks.append("\n\n".join(current) + "\n\n")
    return chunks


def split_documents(documents: list[str], source: str = "text", characters: int = CHUNK_CHARACTERS) -> Split:
    """Remove repeated paragraphs, cut each document into chunks, give every tenth chunk to the test side."""
    seen: set[str] = set()
    repeated = 0
    chunks: list[str] = []
    for document in documents:
        fresh: list[str] = []
        for part in paragraphs(document):
            key = normalized(part)
            if key in seen:
                repeated += len(part)
            else:
                seen.add(key)
                fresh.append(part)
        chunks.extend(chunks_of(fresh, characters))
    if len(chunks) < 2:
        raise ValueError(
            f"the text has {len(chunks)} chunk(s) of {characters} characters after repeated paragraphs were removed; "
            "a train and a test side need at least 2: give a longer text"
        )
    # The last of each ten, or the last of all where there are fewer.
    test = set(range(TEST_EVERY - 1, len(chunks), TEST_EVERY)) or {len(chunks) - 1}
    return Split(
        train=[chunk for i, chunk in enumerate(chunks) if i not in test],
        test=[chunk for i, chunk in enumerate(chunks) if i in test],
        repeated_characters=repeated,
        source=source,
    )


def encode(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return one int64 stream: every text's tokens, each text closed by END."""
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int64)


def blocks(stream: torch.Tensor, context: int) -> torch.Tensor:
    """Cut a stream into (n, context + 1) rows which overlap by one token; the rest that fills no row is dropped."""
    count = (stream.numel() - 1) // context
    if count < 1:
        raise ValueError(f"{stream.numel()} tokens do not fill one block of {context} + 1: give more text")
    return torch.stack([stream[i * context : (i + 1) * context + 1] for i in range(count)])


@dataclass(frozen=True)
class Rows:
    """Rows of tokens (n, context + 1), each of which predicts all its tokens but the first."""

    tokens: torch.Tensor

    def batches(self, size: int, seed: int | None = None) -> list[Batch]:
        rows = self.tokens
        if seed is not None:
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        # Copies: what a forward keeps of a view is the storage of all rows.
        return [Batch((part[:, :-1].clone(),), part[:, 1:].clone()) for part in rows.split(size)]


def unigram_loss(train: torch.Tensor, targets: torch.Tensor, vocab: int) -> float:
    """Mean loss (nats a token) of always predicting the training text's token frequencies, add-one smoothed."""
    counts = torch.bincount(train, minlength=vocab).double() + 1.0
    return float(-(counts / counts.sum()).log()[targets.flatten()].mean())


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Turn nats a token into bits a byte of text, which does not depend on the vocabulary."""
    return loss / math.log(2.0) * tokens / text_bytes
