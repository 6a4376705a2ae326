"""Training steps of whole models before and after `fusednorm.accelerate`, interleaved.

    python3 -m benchmarks.models --report DIR                # BERT-base and GPT-2 blocks, then small models
    python3 -m benchmarks.models --only '^(bert|gpt2)' --rounds 20 --compile

A step is forward, backward and the gradients set to None, in training mode with the dropout of the models' own
configurations. The ratio is the median of the ratios of neighbouring steps: above 1, the accelerated model is faster.
Launches are the operators that torch's profiler counts in one step. Writes models.json and models.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import fusednorm
from benchmarks.measure.machine import environment
from benchmarks.measure.turns import in_turns
from benchmarks.report.files import write_pair
from fusednorm.tuning.measure import paired

VIEWS = {"view", "t", "transpose", "as_strided", "expand", "detach", "alias", "reshape", "unsqueeze", "select", "slice"}
VIEWS |= {"permute", "unflatten", "flatten", "squeeze", "_unsafe_view", "unbind", "split", "chunk", "narrow", "detach_"}

LONG, PLACES = 0.1, 8  # seconds of a step, and pairs of models of shorter ones


class Case(NamedTuple):
    name: str
    build: Callable[[], nn.Module]
    step: Callable[[nn.Module], Any]  # the loss


def headline() -> list[Case]:
    """Two layers of BERT-base and of GPT-2, and their blocks alone, without embeddings and head.

    Width 768, 128 tokens, batch 8, the dropout of their configurations.
    """
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    ids = torch.randint(0, 1000, (8, 128), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 96:] = 0
    embedded = torch.randn(8, 128, 768, generator=torch.Generator().manual_seed(0))

    def bert() -> nn.Module:
        return BertForMaskedLM(BertConfig(num_hidden_layers=2, vocab_size=1000))

    def gpt2() -> nn.Module:
        sizes = {"n_layer": 2, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(**sizes))

    def bert_blocks() -> nn.Module:
        model = bert().bert
        model.embeddings = GivenEmbeddings()
        return model

    def whole(model: nn.Module) -> Any:
        return model(input_ids=ids, attention_mask=mask, labels=ids).loss

    def blocks(model: nn.Module) -> Any:
        return model(inputs_embeds=embedded, attention_mask=mask)[0].square().mean()

    return [
        Case("bert", bert, whole),
        Case("gpt2", gpt2, whole),
        Case("bert blocks", bert_blocks, blocks),
        Case("gpt2 blocks", lambda: gpt2().transformer, blocks),
    ]


class GivenEmbeddings(nn.Module):
    """Stands for BERT's embeddings where the embedded tokens are given."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> torch.Tensor:
        return inputs_embeds


def small() -> list[Case]:
    """Every model that the tests prove, with dropout 0.1 and 16 times the batch of the tests."""
    from tests.helpers.model_zoo import BATCH, models

    def repeated(value: torch.Tensor) -> torch.Tensor:
        has_rows = value.ndim and value.shape[0] == BATCH
        return value.repeat(16, *[1] * (value.ndim - 1)) if has_rows else value

    def case(name: str, entry: Any) -> Case:
        batch = {key: repeated(value) for key, value in entry.batch(0).items()}
        return Case(name, lambda: entry.build(0.1), lambda model: entry.loss(model, batch))

    return [case(name, entry) for name, entry in models().items()]


def run(case: Case, model: nn.Module) -> None:
    case.step(model).backward()
    model.zero_grad(set_to_none=True)


def launches(function: Callable[[], Any]) -> int:
    """Operators that no other operator calls, views left out."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        function()
    names = [event.name for event in profiled.events() if _outermost(event)]
    return sum(name.rpartition("::")[2] not in VIEWS for name in names)


def _outermost(event: Any) -> bool:
    """An operator whose callers are no operators: autograd's nodes are none."""
    if "::" not in event.name or event.name.startswith("autograd::"):
        return False
    parent = event.cpu_parent
    while parent is not None:
        if "::" in parent.name and not parent.name.startswith("autograd::"):
            return False
        parent = parent.cpu_parent
    return True


def pair_of(case: Case, compiled: bool, after_first: bool) -> tuple[nn.Module, nn.Module, fusednorm.Report]:
    """The model before and after, warmed up, and what was fused."""
    torch.manual_seed(0)
    before = case.build().train()
    after = copy.deepcopy(before)
    if after_first:  # in memory
        before, after = after, before
    report = fusednorm.accelerate(after)
    pair = (torch.compile(before), torch.compile(after)) if compiled else (before, after)
    for model in pair:
        for _ in range(3):
            run(case, model)
    return *pair, report


def measure(case: Case, rounds: int, seconds: float, compiled: bool = False) -> dict[str, Any]:
    """Small models are made several times: where parameters lie in memory changes a step by half a percent."""
    before, after, report = pair_of(case, compiled, after_first=False)
    pair = before, after
    counts = [launches(functools.partial(run, case, model)) for model in pair]
    ((once,),) = in_turns([functools.partial(run, case, before)], 1)
    rounds = max(rounds, min(400, int(seconds / max(2 * once, 1e-6))))
    places = 1 if compiled or once > LONG else PLACES
    times: tuple[list[float], list[float]] = ([], [])
    for place in range(places):
        if place:
            pair = pair_of(case, compiled, after_first=place % 2 == 1)[:2]
        found = in_turns([functools.partial(run, case, model) for model in pair], -(-rounds // places))
        for all_places, taken in zip(times, found, strict=True):
            all_places += taken
    ratio, *interval = paired(*times)
    return {
        "model": case.name,
        "before_ms": 1e3 * statistics.median(times[0]),
        "after_ms": 1e3 * statistics.median(times[1]),
        "ratio": ratio,
        "interval": interval,
        "rounds": len(times[0]),
        "places": places,
        "launches": counts,
        "fused": len(report.fused),
        "left": len(report.left),
    }


def page(result: dict[str, Any]) -> str:
    machine = result["environment"]
    lines = [
        "# Training steps before and after `fusednorm.accelerate`",
        "",
        "Written by `python3 -m benchmarks.models`. Milliseconds are medians of interleaved steps. The ratio is the",
        "median of paired ratios, with its 95 % interval. Launches are the operators of one step, views left out.",
        f"Models of less than {1e3 * LONG:.0f} ms a step are made {PLACES} times, in other places of memory.",
        "",
        f"Machine: {machine.get('device', 'CPU')}, {machine.get('threads', torch.get_num_threads())} threads.",
        "",
        "| model | before, ms | after, ms | ratio | 95 % interval | launches before | after |",
        "|---|--:|--:|--:|:-:|--:|--:|",
    ]
    for row in result["rows"]:
        low, high = row["interval"]
        lines.append(
            f"| {row['model']} | {row['before_ms']:.2f} | {row['after_ms']:.2f} | {row['ratio']:.3f} | "
            f"{low:.3f} to {high:.3f} | {row['launches'][0]} | {row['launches'][1]} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="folder for models.json and models.md")
    parser.add_argument("--only", default="", help="a regular expression for the names of models")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps of each model, at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each model, if more rounds fit")
    parser.add_argument("--compile", action="store_true", help="compile both models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    chosen = [case for case in (*headline(), *small()) if re.search(args.only, case.name)]
    if not chosen:
        parser.error(f"--only: no model is named like {args.only!r}")
    result: dict[str, Any] = {"environment": environment(torch.device("cpu")), "rows": []}
    for case in tqdm(chosen, desc="models", disable=None):
        result["rows"].append(measure(case, args.rounds, args.seconds, args.compile))
    text = page(result)
    write_pair(args.report, "models", result, text)


if __name__ == "__main__":
    main()
