"""float64 oracle and eager twin of attention, in explicit softmax; nothing here uses the package's arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import DRAWS, assert_within_budget, keep_mask, keep_scale
from torch import Tensor


def draw(generator: torch.Generator, device: Any, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def operands(generator: torch.Generator, device: Any, *shapes: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Each is to have a gradient."""
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def visible(shape: torch.Size, options: Mapping[str, Any], attn_mask: Tensor | None, device: Any) -> Tensor:
    """True where query i sees key j, of the logits' shape (..., Sq, Sk), written element by element."""
    n_queries, n_keys = shape[-2:]
    offset = n_keys - n_queries if options.get("causal_align") == "lower_right" else 0
    left, right = options.get("window") or (None, None)

    def near(distance: int) -> bool:
        return (
            not (options.get("is_causal") and distance > 0)
            and (left is None or distance >= -left)
            and (right is None or distance <= right)
        )

    rows = [[near(j - (i + offset)) for j in range(n_keys)] for i in range(n_queries)]
    seen = torch.tensor(rows, dtype=torch.bool, device=device).reshape(n_queries, n_keys).expand(shape)
    if attn_mask is not None:
        seen = seen & (attn_mask if attn_mask.dtype == torch.bool else attn_mask > -math.inf)
    key_mask = options.get("key_mask")
    if key_mask is not None:
        batch = key_mask.shape[:-1]
        seen = seen & key_mask.reshape(*batch, *[1] * (len(shape) - len(batch) - 1), n_keys)
    return seen


@dataclass(frozen=True)
class AttentionCall:
    """One call of ``scaled_dot_product_attention``. Leaves: q, k, v and, if it is to have a gradient, mask."""

    options: Mapping[str, Any] = field(default_factory=dict)
    bool_mask: Tensor | None = None

    def ours(self, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        import fusednorm

        mask = leaves.get("mask", self.bool_mask)
        arguments = (leaves["q"], leaves["k"], leaves["v"], mask)
        return fusednorm.scaled_dot_product_attention(*arguments, **self.options, return_lse=True)

    def explicit(
        self, leaves: Mapping[str, Tensor], computed_in: torch.dtype, twin: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Out in the dtype of the leaves, and the log-sum-exp; each intermediate in `computed_in`.

        The twin adds in reverse order, so that its error against the oracle is a rounding error in float64 too.
        """
        o = self.options
        q, k, v = (leaves[name].to(computed_in) for name in "qkv")
        mask = leaves.get("mask", self.bool_mask)
        if q.shape[-3:-2] != k.shape[-3:-2] and q.ndim > 2 and o.get("enable_gqa"):
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        scale = o.get("scale")
        logits = (q.flip(-1) @ k.flip(-1).mT if twin else q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if o.get("softcap"):
            logits = o["softcap"] * torch.tanh(logits / o["softcap"])
        seen = visible(logits.shape, o, mask, q.device)
        if mask is not None and mask.dtype != torch.bool:
            logits = logits + torch.where(seen, mask.to(computed_in), 0)
        alive = seen.any(-1)
        logits = logits.masked_fill(~seen, -math.inf).masked_fill(~alive[..., None], 0)
        lse = torch.logsumexp(logits, -1).masked_fill(~alive, -math.inf)
        weights = torch.softmax(logits, -1).masked_fill(~alive[..., None], 0)
        if o.get("dropout_p"):
            p = o["dropout_p"]
            kept = keep_mask(weights.shape[:-1].numel(), weights.shape[-1], p, int(o["seed"]))
            weights = weights * kept.reshape(weights.shape).to(weights.device) * keep_scale(p)
        out = weights.flip(-1) @ v.flip(-2) if twin else weights @ v
        return out.to(leaves["q"].dtype), lse


def evaluate(run: Any, leaves: Mapping[str, Tensor], cotangents: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """(out, lse) and the gradients; leaves keep their strides. A row that sees nothing has an lse of -inf, here 0.

    Without cotangents there are no gradients.
    """
    given = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    out, lse = run(given)
    alive = lse.detach() > -math.inf
    lse = torch.where(alive, lse, 0.0)
    named = {}
    if cotangents:
        gradients = torch.autograd.grad(
            [out, lse], list(given.values()), [cotangents[0].to(out.dtype), cotangents[1].to(lse.dtype)]
        )
        named = {f"d{name}": gradient for name, gradient in zip(given, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), "alive": alive.to(out.dtype), **named}


def check(
    call: AttentionCall, leaves: Mapping[str, Tensor], generator: torch.Generator, gradients: bool = True
) -> None:
    """The errors of out, lse and every gradient for random cotangents, within the budget.

    The twin computes as torch's own attention does at these dtypes: in float32 for 16-bit ones, rounding its results.
    A largest error of few elements says little of a method: where one draw does not keep the budget, the largest
    errors of several draws must.
    """
    dtype = leaves["q"].dtype
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(leaves: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
        with torch.no_grad():
            out, lse = call.explicit(leaves, computed_in)
        cotangents = tuple(
            torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype)
            for t in ((out, lse) if gradients else ())
        )
        wide = {name: leaf.double() for name, leaf in leaves.items()}
        results = (
            evaluate(call.ours, leaves, cotangents),
            evaluate(lambda t: call.explicit(t, computed_in, True), leaves, cotangents),
            evaluate(lambda t: call.explicit(t, torch.float64), wide, tuple(c.double() for c in cotangents)),
        )
        alive = [result.pop("alive") for result in results]
        assert torch.equal(alive[0], alive[1])
        return results

    def fresh() -> dict[str, Tensor]:
        """Other values in the same layout; a mask keeps its -inf."""
        other = {}
        for name, leaf in leaves.items():
            values = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
            if 0 in leaf.stride():
                first = [0 if stride == 0 else slice(None) for stride in leaf.stride()]
                values = values[tuple(first)].reshape([1 if s == 0 else n for s, n in zip(leaf.stride(), leaf.shape)])
                other[name] = values.expand(leaf.shape)
            else:
                other[name] = torch.empty_like(leaf).copy_(torch.where(leaf == -math.inf, leaf, values))
        return other

    first = draw(leaves)
    try:
        assert_within_budget(*first, computed_in=computed_in)
    except AssertionError:
        draws = [first, *(draw(fresh()) for _ in range(DRAWS - 1))]
        stacked = [{name: torch.stack([r[name] for r in results]) for name in results[0]} for results in zip(*draws)]
        assert_within_budget(*stacked, computed_in=computed_in)
