"""The Triton provider of attention: what it takes, how operands are addressed, and the launches."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import triton_attention_table as table
from . import triton_host as host
from .layout import contiguous, rows_like
from .triton_host import reluctance as reluctance

if TYPE_CHECKING:
    from .triton_launch import Variant

_LONGEST = 2**29  # positions, and sums of a few, are 32-bit numbers
_FAR = 2**23  # a stride at which a tile may span 2**31 elements
_FOLDED = (1e-30, 1e30)  # scales that may be folded into an exponent
INTERPRETED = (9, 0)  # the capability whose tiles the interpreter takes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(op: str, *args: Any) -> str | None:
    q, longest_q, longest_k = args[0], args[8], args[9]
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}: the matrix units' are float32, bfloat16 and float16"
    if longest_q > _LONGEST or longest_k > _LONGEST:
        return f"a sequence has more than {_LONGEST} positions"
    return host.refusal(q, q.shape[-1])


class _Call(NamedTuple):
    """The arguments that forward and backward share."""

    attn_mask: Tensor | None
    key_mask: Tensor | None
    seed: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    dropout_p: float
    causal: bool
    lower_right: bool
    window_left: int
    window_right: int
    softcap: float

    @property
    def numbers(self) -> tuple[int | float, ...]:
        right = 0 if self.causal else self.window_right
        windows = min(max(self.window_left, 0), _LONGEST), min(max(right, 0), _LONGEST)
        return *windows, self.scale, self.scale * math.log2(math.e), self.softcap, *host.numbers(self.dropout_p)

    def batches(self, q: Tensor) -> int:
        return q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1


# --- addresses ---


def _strides(tensor: Tensor, packed: bool) -> tuple[int, int, int, int]:
    """Of (batch, head, position, column); 0 where there is one."""
    shape, strides = tensor.shape, tensor.stride()
    own = [stride if size > 1 else 0 for size, stride in zip(shape, strides)]
    own[-1] = strides[-1] if shape[-1] > 1 else 1
    return (0, own[1], own[0], own[2]) if packed else (own[0], own[1], own[2], own[3])


def _aligned(tensor: Tensor, vec: int) -> bool:
    """Whether every row starts at a multiple of 16 bytes and has its columns one after another."""
    *outer, column = tensor.stride()
    fits = tensor.shape[-1] % vec == 0 and column == 1 and tensor.data_ptr() % 16 == 0 and max(outer) < _FAR
    return fits and all(stride % vec == 0 or size == 1 for size, stride in zip(tensor.shape, outer))


def _near(mask: Tensor | None) -> Tensor | None:
    """attn_mask with tiles that span less than 2**31 elements; what does not is a part of something vast."""
    if mask is None or max(mask.stride()[-2:]) < _FAR:
        return mask
    return mask.contiguous()


def _resolved(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Memory of `.conj().imag` holds the negated values."""
    return tuple([t.resolve_neg() if t.is_neg() else t for t in tensors])


def _addressed(tensors: tuple[Tensor, ...], packed: bool) -> tuple[int, tuple[int, ...]]:
    """(VEC, strides) of all together; see `row_pointers`."""
    vec = 16 // tensors[0].element_size()
    flat = [stride for t in tensors for stride in _strides(t, packed)]
    if all(_aligned(t, vec) for t in tensors):
        return vec, tuple([stride // vec if n % 4 != 3 else stride for n, stride in enumerate(flat)])
    return 0, tuple(flat)


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Of four dimensions, 0 where it is broadcast."""
    if mask is None:
        return (0, 0, 0, 0)
    own = [stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride())]
    return (*[0] * (4 - len(own)), *own)


def _key_mask_strides(key_mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if key_mask is None else tuple(key_mask.stride())


def _lse_strides(lse: Tensor) -> tuple[int, int]:
    """Of (batch, head)."""
    return (lse.stride(0), lse.stride(1)) if lse.ndim == 3 else (0, lse.stride(0))


# --- variants ---


def _precision(dtype: torch.dtype) -> str:
    """Of products of float32 operands; nothing to those of 16 bits, which are exact."""
    return "ieee" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32" else "tf32"


class _Problem(NamedTuple):
    """What kernels are compiled for and tiles chosen by, besides addresses; no length is among it."""

    d: int
    dv: int
    dtype: torch.dtype
    precision: str
    fold: bool
    softcap: bool
    mask: str
    dropout: bool
    lower: bool  # whether a query's keys are bounded below, and above
    upper: bool
    lower_right: bool
    capability: tuple[int, int]

    @property
    def need(self) -> table.Need:
        columns = max(table.columns(self.d), table.columns(self.dv))
        bounded = self.lower or self.upper
        mask = self.mask != "none"
        return table.Need(columns, self.dtype.itemsize, self.dropout, mask, bounded, self.capability, host.version())


def _problem(q: Tensor, v: Tensor, call: _Call) -> _Problem:
    mask = "none" if call.attn_mask is None else "bool" if call.attn_mask.dtype == torch.bool else "additive"
    lower, upper = call.window_left >= 0, call.causal or call.window_right >= 0
    # not where folding the scale into the exponent would err by more than float32 does
    fold = q.element_size() == 2 and not call.softcap and mask != "additive" and _FOLDED[0] < call.scale < _FOLDED[1]
    return _Problem(
        *(q.shape[-1], v.shape[-1], q.dtype, _precision(q.dtype), fold, call.softcap != 0.0, mask),
        *(call.dropout_p > 0.0, lower, upper, call.lower_right and (lower or upper)),
        host.capability(q.get_device()) if q.is_cuda else INTERPRETED,
    )


@functools.lru_cache(4096)
def _plan(kernel: str, problem: _Problem, vec: int, sum_q: bool = False) -> tuple[Variant, table.Tile]:
    """A kernel of the name, compiled for these constants, and its tile."""
    from . import triton_attention_bwd, triton_attention_bwd_dq, triton_attention_fwd

    function, choose = {
        "fwd": (triton_attention_fwd._attention_fwd_kernel, table.forward),
        "delta": (triton_attention_bwd._attention_bwd_delta_kernel, table.delta),
        "dkv": (triton_attention_bwd._attention_bwd_dkv_kernel, table.backward_keys),
        "dq": (triton_attention_bwd_dq._attention_bwd_dq_kernel, table.backward_queries),
        "dmask": (triton_attention_bwd_dq._attention_bwd_dmask_kernel, table.backward_mask),
    }[kernel]
    tile = choose(problem.need)
    d, dv, _, precision, *switches, _ = problem
    constants: tuple[Any, ...] = (d, table.columns(d), dv, table.columns(dv), vec, precision, *switches)
    if kernel == "delta":
        constants = (dv, table.columns(dv), vec, precision, tile.block_m)
    elif kernel == "dmask":
        constants = (*constants[:6], problem.softcap, *switches[3:], sum_q, tile.block_m, tile.block_n)
    else:
        constants += (tile.block_m, tile.block_n)
    return host.variant(function, constants, tile, vec > 0), tile


def forget_variants() -> None:
    """After the table was changed."""
    _plan.cache_clear()


# --- the ops ---


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) in one launch."""
    call, packed = _Call(_near(args[0]), *args[1:]), args[3] is not None
    out = rows_like(q) if v.shape[-1] == q.shape[-1] else q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty((q.shape[1], q.shape[0]) if packed else q.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0 or k.numel() == 0 == v.numel() or call.batches(q) == 0:
        return out.zero_(), lse.fill_(-math.inf)
    q, k, v = _resolved(q, k, v)
    vec, strides = _addressed((q, k, v, out), packed)
    variant, tile = _plan("fwd", _problem(q, v, call), vec)
    n_tiles, n_heads = host.ceil(call.max_seqlen_q, tile.block_m), q.shape[1]
    masks = (call.attn_mask, call.key_mask, call.seed, contiguous(call.cu_seqlens_q), contiguous(call.cu_seqlens_k))
    variant.launch(
        (n_tiles * n_heads * call.batches(q), 1),
        (q, k, v, *masks, out, lse),
        (
            *(n_tiles, n_heads, n_heads // k.shape[1], call.max_seqlen_q, call.max_seqlen_k, *strides),
            *(*_mask_strides(call.attn_mask), *_key_mask_strides(call.key_mask), *_lse_strides(lse), *call.numbers),
        ),
    )
    return out, lse


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, v, attn_mask): delta, then a launch over queries and one or two over keys.

    Beside the rounding of 16-bit results it is no matter in which order dlse is added, nor how out and lse were
    rounded. For `exact` results, and for a mask's gradient, in which such errors add up, the launch over queries makes
    delta and the inverse of the weights' sum itself.
    """
    call, (wants_q, wants_k, wants_v, wants_mask) = _Call(_near(args[0]), *args[1:-1]), args[-1]
    packed, mask = args[3] is not None, args[0]
    wants_mask = wants_mask and mask is not None and mask.is_floating_point()
    logits = (q.shape[0], q.shape[1], q.shape[-2], k.shape[-2])
    exact = q.element_size() == 4 or wants_mask
    direct = wants_mask and mask is not None and mask.shape == logits
    dq = rows_like(q) if wants_q else None
    dk, dv = rows_like(k) if wants_k else None, rows_like(v) if wants_v else None
    dmask = rows_like(mask).zero_() if wants_mask and mask is not None else None
    gradients = (dq, dk, dv, dmask)
    if lse.numel() == 0 or k.numel() == 0 == v.numel() or call.batches(q) == 0:
        return tuple([None if g is None else g.zero_() for g in gradients])

    dout, q, k, v = _resolved(dout, q, k, v)
    vec = 16 // q.element_size()
    if not _aligned(dout, vec) and all(_aligned(t, vec) for t in (q, k, v)):
        dout = dout.contiguous()  # (the cotangent of `.sum()`): else all would be read an element at a time
    lse_strides, problem = _lse_strides(lse), _problem(q, v, call)
    dlse, inverse = contiguous(dlse), torch.empty_like(lse) if exact else None
    delta = torch.empty_like(lse)
    if not exact:
        _delta(delta, dout, out, dlse, packed, problem)
    rows = (lse, delta, dlse if exact else None, inverse)
    masks = (call.attn_mask, call.key_mask, call.seed, contiguous(call.cu_seqlens_q), contiguous(call.cu_seqlens_k))
    mask_strides = (*_mask_strides(call.attn_mask), *_key_mask_strides(call.key_mask))
    group = q.shape[1] // k.shape[1]
    lengths = (group, call.max_seqlen_q, call.max_seqlen_k)
    if dq is not None or direct or exact:
        vec, strides = _addressed((dout, q, k, v) if dq is None else (dout, q, k, v, dq), packed)
        strides += (0,) * (20 - len(strides))
        variant, tile = _plan("dq", problem, vec)
        n_tiles = host.ceil(call.max_seqlen_q, tile.block_m)
        dmask_strides = _mask_strides(dmask if direct else None)
        variant.launch(
            (n_tiles * q.shape[1] * call.batches(q), 1),
            (dout, q, k, v, *masks, *rows, dq, dmask if direct else None),
            (n_tiles, q.shape[1], *lengths, *strides, *dmask_strides, *mask_strides, *lse_strides, *call.numbers),
        )
    if wants_k or wants_v:
        # one that is not wanted lies as its operand does
        vec, strides = _addressed((dout, q, k, v, k if dk is None else dk, v if dv is None else dv), packed)
        variant, tile = _plan("dkv", problem, vec)
        n_tiles = host.ceil(call.max_seqlen_k, tile.block_n)
        for pair in ((dk, None), (None, dv)) if table.splits(problem.need) else ((dk, dv),):
            if pair[0] is not None or pair[1] is not None:
                variant.launch(
                    (n_tiles * k.shape[1] * call.batches(q), 1),
                    (dout, q, k, v, *masks, *rows, *pair),
                    (n_tiles, k.shape[1], *lengths, *strides, *mask_strides, *lse_strides, *call.numbers),
                )
    if dmask is not None and dmask.shape[-1] == 1 != call.max_seqlen_k:
        _gradient_of_shifts(dmask, dlse, lse)
    elif dmask is not None and not direct:
        _mask_gradient(dmask, problem, (dout, q, k, v), masks[:3], rows, call)
    return gradients


def _delta(delta: Tensor, dout: Tensor, out: Tensor, dlse: Tensor | None, packed: bool, problem: _Problem) -> None:
    """rowsum(dout out) - dlse; packed sequences are one to it."""
    vec, strides = _addressed((dout, out), packed)
    variant, tile = _plan("delta", problem, vec)
    n_heads, n_queries = delta.shape[-2:]
    n_tiles = host.ceil(n_queries, tile.block_m)
    variant.launch(
        (n_tiles * n_heads * (1 if packed else delta.shape[0]), 1),
        (dout, out, dlse, delta),
        (n_tiles, n_heads, n_queries, *strides, *_lse_strides(delta)),
    )


def _gradient_of_shifts(dmask: Tensor, dlse: Tensor | None, lse: Tensor) -> None:
    """Of a mask that is broadcast along the keys: it moves all logits of a query, which the lse alone is told by."""
    if dlse is not None:
        seen = torch.where(lse > -math.inf, dlse, 0.0)
        dmask.copy_(seen[..., None].sum_to_size(*[1] * (4 - dmask.ndim), *dmask.shape).view(dmask.shape))


def _mask_gradient(
    dmask: Tensor,
    problem: _Problem,
    operands: tuple[Tensor, ...],
    masks: tuple[Tensor | None, ...],
    rows: tuple[Tensor | None, ...],
    call: _Call,
) -> None:
    """Of a mask that is broadcast: partial sums of as many splits as fill the device, then their sum.

    `rows` are lse, delta, dlse and the weights' inverse sums.
    """
    _, q, k, _ = operands
    logits = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    lse_strides = (logits[1] * logits[2], logits[2])
    shape = (*[1] * (4 - dmask.ndim), *dmask.shape)
    vec, strides = _addressed(operands, False)
    variant, tile = _plan("dmask", problem, vec, shape[2] == 1 != logits[2])
    blocks = (1, 1, tile.block_m, tile.block_n)
    tiles = [host.ceil(size, block) for size, block in zip(shape, blocks)]
    work = [host.ceil(size, block) for size, block in zip(logits, blocks)]
    programs = math.prod(tiles)
    shared = math.prod(work) // programs  # tiles of logits that one of the mask was added to
    splits = max(1, min(shared, 2 * host.processors(q.get_device()) // programs))
    partials = torch.empty((1, splits, dmask.numel()), dtype=torch.float32, device=q.device)
    variant.launch(
        (programs * splits, 1),
        (*operands, *masks, *rows, partials),
        (
            *(*logits[:2], q.shape[1] // k.shape[1], *logits[2:], *shape[:3], splits, *strides),
            *(*_mask_strides(call.attn_mask), *_key_mask_strides(call.key_mask), *lse_strides, *call.numbers),
        ),
    )
    flat = dmask if dmask.is_contiguous() else torch.empty_like(dmask, memory_format=torch.contiguous_format)
    host.sum_partials(partials, (flat, None, None, None))
    if flat is not dmask:
        dmask.copy_(flat)
