"""``generate``: greedy decoding, sampling and beam search with a ``KVCache``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from .modules._arguments import check_count
from .modules.cache import KVCache

Step = Callable[[Tensor, KVCache], Tensor]


class Generated(NamedTuple):
    """What `generate` returns."""

    tokens: Tensor  # (batch, new positions), int64; `pad` after the end token
    scores: Tensor  # (batch,): the sum of the log probabilities of a sequence's tokens, under temperature 1


@torch.no_grad()
def generate(
    step: Step,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    end: int | None = None,
    pad: int | None = None,
    forbidden: Iterable[int] = (),
    beams: int = 1,
    length_penalty: float = 1.0,
    sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
) -> Generated:
    r"""Continue a batch of prompts, a token at a time, by a model that takes a :class:`KVCache`.

    The likeliest token is taken, or with `sample` one is drawn, or with `beams` the sequence of the highest

    .. math:: \frac{1}{n^{\mathrm{length\_penalty}}} \sum_{t=1}^{n} \log p(y_t \mid y_{<t})

    of those that beam search finds.

    Args:
        step: ``step(tokens, cache)`` gives logits (batch, n, vocab), or those of the last position (batch, vocab), for
            tokens (batch, n) int64, which continue what `cache` holds. ``cache.positions(tokens)`` has their positions.
        prompt: (batch, length) int64. Shorter prompts are filled with `pad` on the left or on the right.
        max_new_tokens: the most tokens after the prompt.
        end: the token that ends a sequence.
        pad: the token that fills; no query attends to it in the prompt. It follows `end` in the result.
        forbidden: tokens that are never taken.
        beams: sequences of a prompt that are kept; 1 is no beam search.
        length_penalty: see above; above 1 it prefers longer sequences.
        sample: draw from the distribution.
        temperature: the logits are divided by it before a draw.
        top_k: draw from the k likeliest tokens alone.
        top_p: draw from the likeliest tokens that together have this probability at least.
        generator: of the draws; None: torch's own.
        cache: an empty one to use, such as one with a `max_length`.

    Returns:
        (tokens, scores): the new tokens (batch, at most max_new_tokens), and the sums of their log probabilities.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a number is out of range, options exclude each other, or the logits are not finite.

    Source: A. Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv:1904.09751 (top_p).

    Example:
        >>> table, layer = torch.nn.Embedding(9, 8), fusednorm.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        >>> def step(tokens, cache):
        ...     return layer(table(tokens), cache=cache) @ table.weight.T
        >>> tokens, scores = fusednorm.generate(step, torch.tensor([[1, 2, 3]]), 4)
        >>> tokens.shape, scores.shape
        (torch.Size([1, 4]), torch.Size([1]))
    """
    cache = _checked_cache(cache)
    _check(prompt, end, pad, max_new_tokens, beams, sample, temperature, top_k, top_p)
    padding = prompt == pad if pad is not None else None
    if padding is not None and padding.any():
        _check_padding(padding)
        cache.hide(padding)
    else:
        padding = None
    logits = _last(step(prompt, cache), prompt, padding)
    banned = torch.tensor(sorted(set(forbidden)), dtype=torch.int64, device=logits.device)
    draw = _Draw(temperature, top_k, top_p, generator) if sample else None
    fill = pad if pad is not None else end
    ends = _Ends(end, 0 if fill is None else fill)
    if beams > 1:
        return _beam_search(step, cache, logits, banned, max_new_tokens, ends, beams, length_penalty)
    return _one_by_one(step, cache, logits, banned, max_new_tokens, ends, draw)


class _Ends(NamedTuple):
    token: int | None
    fill: int  # what follows it


class _Draw(NamedTuple):
    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def __call__(self, log_probabilities: Tensor) -> Tensor:
        kept = log_probabilities / self.temperature
        if self.top_k is not None and self.top_k < kept.shape[-1]:
            least = kept.topk(self.top_k).values[:, -1:]
            kept = kept.masked_fill(kept < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = kept.sort(descending=True)
            probabilities = ordered.softmax(-1)
            unneeded = probabilities.cumsum(-1) - probabilities >= self.top_p  # what comes before is enough
            kept = kept.scatter(-1, order, ordered.masked_fill(unneeded, -torch.inf))
        return torch.multinomial(kept.softmax(-1), 1, generator=self.generator)[:, 0]


def _one_by_one(
    step: Step, cache: KVCache, logits: Tensor, banned: Tensor, most: int, ends: _Ends, draw: _Draw | None
) -> Generated:
    batch = logits.shape[0]
    rows: list[Tensor] = []
    scores = logits.new_zeros(batch, dtype=torch.float32)
    going = torch.ones(batch, dtype=torch.bool, device=logits.device)
    for i in range(most):
        likely = _log_probabilities(logits, banned)
        chosen = likely.argmax(-1) if draw is None else draw(likely)
        scores += likely.gather(1, chosen[:, None])[:, 0].where(going, 0.0)
        if ends.token is not None:
            chosen = chosen.where(going, ends.fill)
            going = going & (chosen != ends.token)
        rows.append(chosen)
        if i + 1 == most or not going.any():
            break
        logits = _last(step(chosen[:, None], cache))
    return Generated(torch.stack(rows, 1) if rows else logits.new_zeros((batch, 0), dtype=torch.int64), scores)


def _beam_search(
    step: Step,
    cache: KVCache,
    logits: Tensor,
    banned: Tensor,
    most: int,
    ends: _Ends,
    beams: int,
    length_penalty: float,
) -> Generated:
    """`beams` open sequences of each prompt, and as many ended ones, until no open one can become better."""
    batch, device = logits.shape[0], logits.device
    first = torch.arange(batch, device=device).repeat_interleave(beams)
    cache.reorder(first)
    logits = logits[first]
    tokens = torch.zeros((batch, beams, 0), dtype=torch.int64, device=device)
    scores = torch.full((batch, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all are the prompt: one of them is enough
    best: list[list[tuple[float, float, Tensor]]] = [[] for _ in range(batch)]  # (by length, sum, tokens)
    for i in range(most):
        likely = _log_probabilities(logits, banned).view(batch, beams, -1)
        vocab = likely.shape[-1]
        total = (scores[:, :, None] + likely).view(batch, -1)
        # every open one may end: then there are as many left that go on
        scores, places = total.topk(min(2 * beams, total.shape[1]))
        origin, chosen = places // vocab, places % vocab
        ended = torch.zeros_like(chosen, dtype=torch.bool) if ends.token is None else chosen == ends.token
        ended &= scores > -torch.inf
        for b, k in ended.nonzero().tolist():
            if k < beams:
                row = torch.cat((tokens[b, origin[b, k]], chosen[b, k : k + 1]))
                _keep(best[b], (scores[b, k].item() / len(row) ** length_penalty, scores[b, k].item(), row), beams)
        order = ended.to(torch.int8).argsort(stable=True)[:, :beams]
        scores = scores.masked_fill(ended, -torch.inf).gather(1, order)
        origin, chosen = origin.gather(1, order), chosen.gather(1, order)
        tokens = torch.cat((tokens.gather(1, origin[:, :, None].expand(-1, -1, i)), chosen[:, :, None]), 2)
        if i + 1 == most or all(
            _is_final(best[b], scores[b], i + 1, most, beams, length_penalty) for b in range(batch)
        ):
            break
        rows = (origin + beams * torch.arange(batch, device=device)[:, None]).view(-1)
        cache.reorder(rows)
        logits = _last(step(chosen.reshape(-1, 1), cache))
    for b in range(batch):
        for k in range(beams):
            value = scores[b, k].item()
            if value > -torch.inf:
                _keep(best[b], (value / max(tokens.shape[2], 1) ** length_penalty, value, tokens[b, k]), beams)
    longest = max(len(found[0][2]) for found in best)
    result = torch.full((batch, longest), ends.fill, dtype=torch.int64, device=device)
    for b, found in enumerate(best):
        result[b, : len(found[0][2])] = found[0][2]
    return Generated(result, torch.tensor([found[0][1] for found in best], device=device))


def _keep(found: list[tuple[float, float, Tensor]], new: tuple[float, float, Tensor], most: int) -> None:
    found.append(new)
    found.sort(key=lambda one: -one[0])
    del found[most:]


def _is_final(
    found: list[tuple[float, float, Tensor]], scores: Tensor, length: int, most: int, beams: int, penalty: float
) -> bool:
    """Whether no open sequence can come before the last of those that ended: each further token lowers its sum."""
    if len(found) < beams:
        return False
    longest = most if penalty > 0.0 else length
    return found[-1][0] >= scores.max().item() / longest**penalty


def _last(logits: Tensor, tokens: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
    """(batch, vocab), of each sequence's last position that is no padding."""
    _checks.check_is_tensor("step", logits, "logits as a torch.Tensor")
    if logits.ndim not in (2, 3):
        shape = tuple(logits.shape)
        raise ValueError(f"step: expected logits (batch, n, vocab) or (batch, vocab), got shape {shape}")
    if padding is not None and padding[:, -1].any():
        if logits.ndim == 2:
            raise ValueError(
                "step: prompts are filled on the right, so logits of all positions (batch, n, vocab) are needed, got "
                f"{tuple(logits.shape)}; return those, or fill prompts on the left"
            )
        last = padding.shape[1] - 1 - (~padding).flip(1).to(torch.int8).argmax(1)
        return logits[torch.arange(len(last), device=last.device), last]
    return logits[:, -1] if logits.ndim == 3 else logits


def _log_probabilities(logits: Tensor, banned: Tensor) -> Tensor:
    """In float32."""
    logits = logits.float()
    if logits.isnan().any() or logits.isposinf().any():
        raise ValueError("step: its logits have NaN or Inf; the model has diverged, or its input has them")
    return logits.index_fill(1, banned, -torch.inf).log_softmax(-1) if len(banned) else logits.log_softmax(-1)


def _checked_cache(cache: KVCache | None) -> KVCache:
    if cache is None:
        return KVCache()
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a fusednorm.KVCache or None, got {type(cache).__name__}")
    if cache.length:
        raise ValueError(f"cache: expected an empty one, it holds {cache.length} positions; call reset() first")
    return cache


def _check(
    prompt: Tensor,
    end: int | None,
    pad: int | None,
    max_new_tokens: int,
    beams: int,
    sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    _checks.check_is_tensor("prompt", prompt)
    if prompt.dtype != torch.int64 or prompt.ndim != 2:
        raise TypeError(f"prompt: expected int64 (batch, length), got {prompt.dtype} of shape {tuple(prompt.shape)}")
    if not prompt.numel():
        raise ValueError(
            f"prompt: expected a token at least, got shape {tuple(prompt.shape)}; begin with a start token"
        )
    for name, token in (("end", end), ("pad", pad)):
        if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
            raise TypeError(f"{name}: expected a token's number or None, got {type(token).__name__}")
    check_count("max_new_tokens", max_new_tokens)
    check_count("beams", beams, 1)
    if beams > 1 and sample:
        raise ValueError(f"sample: beam search draws nothing; leave it out, or pass beams=1 in place of {beams}")
    if not sample:
        for name, value, unset in (("temperature", temperature, 1.0), ("top_k", top_k, None), ("top_p", top_p, None)):
            if value != unset:
                raise ValueError(f"{name}: only what is drawn depends on it; pass sample=True, or leave it out")
    if not _checks.check_number("temperature", temperature) > 0.0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}; sample=False takes the likeliest")
    if top_k is not None:
        check_count("top_k", top_k, 1)
    if top_p is not None and not 0.0 < _checks.check_number("top_p", top_p) <= 1.0:
        raise ValueError(f"top_p: expected a probability in (0, 1], got {top_p}")


def _check_padding(padding: Tensor) -> None:
    """On one side of each prompt, and not the whole of it."""
    if padding.all(1).any():
        empty = padding.all(1).nonzero()[0].item()
        raise ValueError(f"prompt: row {empty} is all padding; give it a token at least")
    changes = (padding[:, 1:] != padding[:, :-1]).sum(1)
    inside = (changes > 1).nonzero()
    if len(inside):
        raise ValueError(f"prompt: row {inside[0].item()} has `pad` between its tokens; fill on one side alone")
