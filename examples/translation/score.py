"""How good translations are: chrF and exact matches, and what the nearest known sentence alone would score."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from examples.training.machine import progress_bar
from examples.translation.data import Encoded, Pair, buckets_of, padded
from examples.translation.model import Translator, translate


def chrf(translations: Sequence[str], references: Sequence[str]) -> float:
    """chrF of a corpus, 0 to 100: F2 of the n-grams of 1 to 6 characters (Popovic 2015), as sacrebleu computes it."""
    from sacrebleu import corpus_chrf

    return float(corpus_chrf(list(translations), [list(references)]).score)


def scores(translations: Sequence[str], pairs: Sequence[Pair]) -> dict[str, Any]:
    """chrF over all pairs and over those of each package, and the share of translations that are the reference."""
    by_origin = {}
    for origin in sorted({pair.origin for pair in pairs}):
        chosen = [(text, pair.target) for text, pair in zip(translations, pairs) if pair.origin == origin]
        by_origin[origin] = {"chrf": chrf(*zip(*chosen)), "pairs": len(chosen)}
    equal = sum(text == pair.target for text, pair in zip(translations, pairs))
    return {
        "chrf": chrf(translations, [pair.target for pair in pairs]),
        "exact": equal / len(pairs),
        "by_origin": by_origin,
    }


def translate_all(
    model: Translator, tokenizer: Any, encoded: Encoded, batch: int, device: torch.device, label: str
) -> list[str]:
    """The model's greedy translation of every source, in the order given."""
    texts = [""] * len(encoded)
    batches = buckets_of(encoded, batch)
    for chosen in progress_bar(batches, len(batches), f"translating, {label}"):
        rows = translate(model, padded([encoded[i][0] for i in chosen]).to(device))
        for i, text in zip(chosen, tokenizer.decode_batch(rows)):
            texts[i] = " ".join(text.split())
    return texts


def ngrams(text: str) -> Counter[str]:
    text = f" {text.casefold()} "
    return Counter(text[i : i + n] for n in (2, 3, 4) for i in range(len(text) - n + 1))


def nearest(train: Sequence[Pair], sources: Sequence[str]) -> list[Pair]:
    """For each source the training pair whose source is most like it, the first of equals.

    Likeness is the cosine of the counts of 2-, 3- and 4-grams of characters, each weighted by how rare it is among the
    training sources (tf-idf).
    """
    counts = [ngrams(pair.source) for pair in train]
    seen_in = Counter(gram for count in counts for gram in count)
    rarity = {gram: math.log(1.0 + len(train) / times) for gram, times in seen_in.items()}
    postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for i, count in enumerate(counts):
        norm = math.sqrt(sum((times * rarity[gram]) ** 2 for gram, times in count.items()))
        for gram, times in count.items():
            postings[gram].append((i, times * rarity[gram] / norm))
    found = []
    for source in sources:
        likeness: dict[int, float] = defaultdict(float)
        for gram, times in ngrams(source).items():
            for i, weight in postings.get(gram, ()):
                likeness[i] += times * rarity[gram] * weight
        best = max(likeness, key=lambda i: (likeness[i], -i)) if likeness else 0
        found.append(train[best])
    return found
