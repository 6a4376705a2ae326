"""Generation with a `KVCache` beside computing the whole sequence again, and attention of one query beside torch's.

    python3 -m benchmarks.generation --report DIR

The model is a GPT of 4 layers, width 256, 8 heads. Both ways take the likeliest token; their tokens are compared before
anything is timed. Attention is that of one query to the keys of a cache: with padding, which a `key_mask` hides from
ours and a full mask from torch's, and without, where automatic choice takes torch's operator. Writes generation.json
and generation.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednorm
from benchmarks.measure.machine import environment
from benchmarks.measure.turns import in_turns
from benchmarks.report.files import write_pair
from benchmarks.report.table import table
from fusednorm.tuning.measure import paired

VOCAB, WIDTH, HEADS, LAYERS, PROMPT = 1000, 256, 8, 4, 4


class Gpt(nn.Module):
    """A causal stack between a table of tokens and its transpose."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(positions, WIDTH)
        layer = fusednorm.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = fusednorm.TransformerEncoder(layer, LAYERS, fusednorm.LayerNorm(WIDTH))
        self.register_buffer("future", torch.ones(positions, positions).triu(1).bool(), persistent=False)

    def step(self, tokens: Tensor, cache: fusednorm.KVCache) -> Tensor:
        x = self.token(tokens) + self.position(cache.positions(tokens))
        return self.layers(x, cache=cache)[:, -1] @ self.token.weight.T

    def whole(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        x = self.layers(self.token(tokens) + self.position.weight[:n], mask=self.future[:n, :n], is_causal=True)
        return x[:, -1] @ self.token.weight.T

    def recompute(self, prompt: Tensor, count: int) -> Tensor:
        tokens = prompt
        for _ in range(count):
            tokens = torch.cat((tokens, self.whole(tokens).argmax(-1, keepdim=True)), 1)
        return tokens[:, prompt.shape[1] :]


def record(name: str, ours: list[float], theirs: list[float], calls: int = 1) -> dict[str, Any]:
    ratio, *interval = paired(theirs, ours)
    seconds = {"ours": statistics.median(ours) / calls, "theirs": statistics.median(theirs) / calls}
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"name": name, **seconds, "ratio": ratio, "interval": interval, "ratios": ratios}


@torch.no_grad()
def generation(batch: int, count: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Gpt(PROMPT + count).eval()
    prompt = torch.randint(VOCAB, (batch, PROMPT))

    def cached() -> Tensor:
        return fusednorm.generate(model.step, prompt, count).tokens

    if not torch.equal(cached(), model.recompute(prompt, count)):
        raise AssertionError("the tokens of both ways differ")
    ours, theirs = in_turns((cached, lambda: model.recompute(prompt, count)), rounds, f"{count} tokens")
    return record(f"generate, batch {batch}, {count} tokens", ours, theirs)


@torch.no_grad()
def one_query(batch: int, keys: int, padded: bool, rounds: int) -> dict[str, Any]:
    q, k, v = (torch.randn(batch, 12, n, 64) for n in (1, keys, keys))
    shown = torch.arange(keys) >= torch.arange(batch)[:, None] if padded else None
    mask = None if shown is None else shown[:, None, None]

    def ours() -> None:
        for _ in range(calls):
            fusednorm.scaled_dot_product_attention(q, k, v, key_mask=shown)

    def theirs() -> None:
        for _ in range(calls):
            F.scaled_dot_product_attention(q, k, v, mask)

    calls = 1
    start = time.perf_counter()
    theirs()
    calls = max(1, int(0.002 / (time.perf_counter() - start)))
    times = in_turns((ours, theirs), rounds, f"{keys} keys")
    how = "padded" if padded else "no mask"
    return record(f"attention of one query, batch {batch}, 12 heads of 64, {keys} keys, {how}", *times, calls)


def interval_of(case: dict[str, Any]) -> str:
    return "{:.2f} to {:.2f}".format(*case["interval"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="folder for generation.json and generation.md")
    parser.add_argument("--rounds", type=int, default=21, help="pairs of each case")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--keys", type=int, nargs="+", default=[64, 256, 1024, 4096])
    args = parser.parse_args(argv)
    cases = [generation(batch, n, max(3, args.rounds * 64 // n)) for n in args.tokens for batch in (1, 4)]
    cases += [one_query(4, n, padded, args.rounds * 5) for n in args.keys for padded in (False, True)]
    rows = [
        (c["name"], *(f"{1e3 * c[who]:.3f}" for who in ("ours", "theirs")), f"{c['ratio']:.2f}", interval_of(c))
        for c in cases
    ]
    threads, machine = torch.get_num_threads(), environment(torch.device("cpu"))
    text = "\n".join(
        [
            "# Generation",
            "",
            "Written by `python3 -m benchmarks.generation`: do not edit. Milliseconds are medians of interleaved",
            "calls. The ratio is the median of paired ratios, with its 95 % interval. Others: the whole sequence",
            "computed again for each token, and torch's `scaled_dot_product_attention`.",
            "",
            f"Machine: {machine['cpu']}, {threads} threads, float32.",
            "",
            table(["case", "ours, ms", "others, ms", "ratio", "95 % interval"], rows),
            "",
        ]
    )
    raw = {"environment": machine, "threads": threads, "cases": cases}
    write_pair(args.report, "generation", raw, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
