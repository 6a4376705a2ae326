"""English-Chinese pairs from the translation catalogues of installed packages: load, clean, split, encode, batch.

Three packages bring them: Django (messages of the framework and its applications), jupyterlab-language-pack-zh-CN
(messages of JupyterLab and its extensions) and Babel (the Unicode locale data: names of languages, territories,
scripts, currencies, time zones and units, and the names of all its locales, which are put together from these).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.training.batches import buckets
from examples.training.model import IGNORED, Batch

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
SPECIAL = (PAD, BEGIN, END)  # ids 0, 1, 2
PAD_ID, BEGIN_ID, END_ID = range(3)
PACKAGES = {"django": "django", "babel": "babel", "jupyterlab_language_pack_zh_CN": "jupyterlab-language-pack-zh-CN"}
TEST_SHARE = 0.1

# %(name)s and %s of Python, %1 of Qt and JupyterLab, {name} of str.format and of locale patterns
PLACEHOLDER = re.compile(r"%\(\w+\)[sd]|%[sd]|%\d+|\{\w*\}")
MARK = "{}"
MARKUP = re.compile(r"</?[a-z]+[^>]*>|https?:|&[a-z]+;|\{(?!\})|(?<!\{)\}")  # and braces which hold something
CHINESE = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True)
class Pair:
    source: str
    target: str
    origin: str


@dataclass(frozen=True)
class Split:
    """No source stands twice, within a side or across, whatever its case, spaces and punctuation."""

    train: list[Pair]
    test: list[Pair]
    left_out: dict[str, int]


def load_pairs() -> list[Pair]:
    """All pairs as the packages have them, in an order that depends on nothing but their versions."""
    pairs = list(locale_pairs())
    for module in ("django", "jupyterlab_language_pack_zh_CN"):
        folder = Path(str(importlib.util.find_spec(module).submodule_search_locations[0]))  # type: ignore[union-attr,index]
        for path in sorted(folder.rglob("zh_*/LC_MESSAGES/*.mo")):
            if "zh_Hant" not in path.parts:
                pairs.extend(catalogue_pairs(path, module.split("_")[0]))
    return pairs


def catalogue_pairs(path: Path, origin: str) -> Iterator[Pair]:
    """The messages of a compiled catalogue; of singular and plural the plural, which Chinese does not tell apart."""
    from babel.messages.mofile import read_mo

    with path.open("rb") as file:
        for message in read_mo(file):
            source, target = message.id, message.string
            source = source if isinstance(source, str) else source[-1]
            target = target if isinstance(target, str) else target[-1]
            if source:  # the catalogue's header has none
                yield Pair(source, target, origin)


def locale_pairs() -> Iterator[Pair]:
    """The Unicode locale data of Babel: each entry that English and simplified Chinese both have."""
    from babel import Locale
    from babel.localedata import load, locale_identifiers

    english, chinese = load("en"), load("zh_Hans")
    for table in ("languages", "territories", "scripts", "variants", "currency_names"):
        yield from paired(english[table], chinese[table])
    for table, path in (("unit_display_names", ("long",)), ("unit_patterns", ("long", "other"))):
        for key, entry in english[table].items():
            yield from paired({key: at(entry, path)}, {key: at(chinese[table].get(key), path)})
    for key, entry in english["date_fields"].items():
        for when in ("past", "future"):
            path = (when, "other")
            yield from paired({key: at(entry, path)}, {key: at(chinese["date_fields"].get(key), path)})
    for key, entry in english["meta_zones"].items():
        long, other = entry.get("long", {}), chinese["meta_zones"].get(key, {})
        yield from paired(long, other.get("long", {}))
    for zone, entry in chinese["time_zones"].items():
        # Where English names no city, the rule of the Unicode locale data takes it from the zone's own name.
        city = at(english["time_zones"].get(zone), ("city",)) or zone.rpartition("/")[2].replace("_", " ")
        yield from paired({zone: city}, {zone: at(entry, ("city",))})
    for identifier in sorted(locale_identifiers()):
        locale = Locale.parse(identifier)
        yield from paired({0: locale.get_display_name("en")}, {0: locale.get_display_name("zh_Hans")})


def at(entry: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        entry = entry.get(key) if hasattr(entry, "get") else None
    return entry


def paired(english: Any, chinese: Any) -> Iterator[Pair]:
    for key in english:
        source, target = english[key], chinese.get(key)
        if isinstance(source, str) and isinstance(target, str):
            yield Pair(source, target, "babel")


def clean(text: str) -> str:
    """One form of a sentence: each placeholder the same mark, one width of each character, single spaces."""
    text = PLACEHOLDER.sub(MARK, unicodedata.normalize("NFKC", text)).replace("%%", "%")
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # zero-width spaces and the like
    return " ".join(text.split())


def normalized(source: str) -> str:
    """What makes two sources the same: their words, not case, spaces or punctuation."""
    return " ".join(re.findall(r"\w+", source.casefold()))


def fault_of(pair: Pair, length: int) -> str:
    """Why a cleaned pair is of no use, or nothing."""
    if not normalized(pair.source) or pair.source == pair.target or not CHINESE.search(pair.target):
        return "untranslated"
    if CHINESE.search(pair.source):
        return "not English"
    if MARKUP.search(pair.source) or MARKUP.search(pair.target):
        return "markup or addresses"
    if pair.source.count(MARK) != pair.target.count(MARK):
        return "placeholders differ"
    return "too long" if max(len(pair.source), len(pair.target)) > length else ""


def on_test_side(key: str) -> bool:
    """A tenth of all sources, by their text alone: another version of a package moves no sentence across."""
    return zlib.crc32(key.encode()) < TEST_SHARE * 2**32


def split_pairs(pairs: Sequence[Pair], length: int) -> Split:
    """Clean the pairs, keep the first of each source, and give a tenth to the test side."""
    left_out: dict[str, int] = {}
    kept: dict[str, Pair] = {}
    for raw in pairs:
        pair = Pair(clean(raw.source), clean(raw.target), raw.origin)
        key = normalized(pair.source)
        fault = fault_of(pair, length) or ("repeated" if key in kept else "")
        if fault:
            left_out[fault] = left_out.get(fault, 0) + 1
        else:
            kept[key] = pair
    train = [pair for key, pair in kept.items() if not on_test_side(key)]
    test = [pair for key, pair in kept.items() if on_test_side(key)]
    if not train or not test:
        raise ValueError(
            f"{len(kept)} pairs of at most {length} characters remain, {len(train)} to train on and {len(test)} to "
            "test on; both sides need at least one: allow longer sentences"
        )
    return Split(train, test, left_out)


Encoded = list[tuple[list[int], list[int]]]


def encode(tokenizer: Any, pairs: Sequence[Pair]) -> Encoded:
    sources = tokenizer.encode_batch([pair.source for pair in pairs], add_special_tokens=False)
    targets = tokenizer.encode_batch([pair.target for pair in pairs], add_special_tokens=False)
    return [([*s.ids, END_ID], [BEGIN_ID, *t.ids, END_ID]) for s, t in zip(sources, targets)]


def padded(rows: Sequence[list[int]]) -> torch.Tensor:
    """Token ids (rows, length), filled at the end with PAD."""
    width = max(map(len, rows))
    return torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows], dtype=torch.int64)


def make_batch(source: torch.Tensor, target: torch.Tensor) -> Batch:
    """A target stands between BEGIN and END: the decoder is given all but the last token, and asked for the next."""
    wanted = target[:, 1:]
    return Batch((source, target[:, :-1]), wanted.masked_fill(wanted == PAD_ID, IGNORED))


def batch_of(encoded: Encoded, chosen: Sequence[int]) -> Batch:
    return make_batch(padded([encoded[i][0] for i in chosen]), padded([encoded[i][1] for i in chosen]))


def buckets_of(encoded: Encoded, size: int, seed: int | None = None) -> list[list[int]]:
    """Indices in batches whose targets, then sources, are of about equal length."""
    return buckets([(len(target), len(source)) for source, target in encoded], size, seed)


@dataclass(frozen=True)
class Sentences:
    """Pairs of sentences, in batches of about equal length."""

    encoded: Encoded

    def batches(self, size: int, seed: int | None = None) -> list[Batch]:
        return [batch_of(self.encoded, chosen) for chosen in buckets_of(self.encoded, size, seed)]
