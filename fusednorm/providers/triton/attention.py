"""The Triton provider of attention: what it takes, how operands are addressed, and the launches."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..._options import AttentionInputs, AttentionOptions
from ..strides import contiguous, gradient_of_shifts, rows_like
from . import attention_config as table
from . import host

if TYPE_CHECKING:
    from .launch import Variant

_LONGEST = 2**29  # positions, and sums of a few, are 32-bit numbers
_MAX_STRIDE = 2**23  # a stride at which a tile may span 2**31 elements
_FOLDED = (1e-30, 1e30)  # scales that may be folded into an exponent
INTERPRETED = (9, 0)  # the capability whose tiles the interpreter takes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(op: str, inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    q = inputs.q
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}: the matrix units' are float32, bfloat16 and float16"
    if options.max_seqlen_q > _LONGEST or options.max_seqlen_k > _LONGEST:
        return f"a sequence has more than {_LONGEST} positions"
    return host.refusal(q, q.shape[-1])


def _scalars(options: AttentionOptions) -> tuple[int | float, ...]:
    """What every kernel takes last: the window, the scale, the soft cap and dropout's numbers."""
    right, scale = 0 if options.causal else options.window_right, options.scale
    windows = min(max(options.window_left, 0), _LONGEST), min(max(right, 0), _LONGEST)
    return *windows, scale, scale * math.log2(math.e), options.softcap, *host.dropout_scalars(options.dropout_p)


def _batches(inputs: AttentionInputs) -> int:
    return inputs.q.shape[0] if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.shape[0] - 1


def _masks(inputs: AttentionInputs) -> tuple[Tensor | None, ...]:
    bounds = contiguous(inputs.cu_seqlens_q), contiguous(inputs.cu_seqlens_k)
    return _bounded_stride(inputs.attn_mask), inputs.key_mask, inputs.seed, *bounds


# --- addresses ---


def _strides(tensor: Tensor, packed: bool) -> tuple[int, int, int]:
    """Of (batch, head, position) in vectors of 16 bytes; 0 where there is one."""
    vec = 16 // tensor.element_size()
    own = [stride // vec if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride())]
    return (0, own[1], own[0]) if packed else (own[0], own[1], own[2])


def _strides_of(tensors: Sequence[Tensor], packed: bool) -> tuple[int, ...]:
    return tuple([stride for t in tensors for stride in _strides(t, packed)])


def _aligned(tensor: Tensor, packed: bool) -> bool:
    """Whether kernels can address it: rows of whole 16-byte vectors, and a tile that spans less than 2**31 elements.

    Only the stride of positions is multiplied in 32 bits (`row_pointers`).
    """
    vec = 16 // tensor.element_size()
    shape, (*outer, column) = tensor.shape, tensor.stride()
    if shape[-1] % vec or column != 1 or tensor.data_ptr() % 16:
        return False
    if any(stride % vec and size != 1 for size, stride in zip(shape, outer)):
        return False
    position = 0 if packed else -2
    return shape[position] == 1 or tensor.stride(position) < _MAX_STRIDE


def _padded(tensor: Tensor) -> Tensor:
    """Uninitialised, of a shape with whole vectors of 16 bytes."""
    *rows, d = tensor.shape
    return tensor.new_empty((*rows, d + -d % (16 // tensor.element_size())))


def _operands(packed: bool, *tensors: Tensor) -> list[Tensor]:
    """What kernels can address, copied where need be.

    A copy moves 3 S D elements a head, read an element at a time they would be moved S / BLOCK times as often; and
    pointers to single elements are as many registers as the products, so the kernels would spill.
    """
    found = []
    for tensor in tensors:
        if tensor.is_neg():  # memory of `.conj().imag` holds the negated values
            tensor = tensor.resolve_neg()
        if not _aligned(tensor, packed):
            original, tensor = tensor, _padded(tensor)
            d = original.shape[-1]
            tensor[..., :d] = original
            tensor[..., d:] = 0
        found.append(tensor)
    return found


def _writable(result: Tensor | None, packed: bool) -> Tensor | None:
    """The result itself, or where kernels cannot address it what `_deliver` copies into it."""
    return result if result is None or _aligned(result, packed) else _padded(result)


def _deliver(written: Tensor | None, result: Tensor | None) -> None:
    if result is not None and written is not None and written is not result:
        result.copy_(written[..., : result.shape[-1]])


def _bounded_stride(mask: Tensor | None) -> Tensor | None:
    """attn_mask with tiles that span less than 2**31 elements; what does not is a part of something vast."""
    if mask is None or all(
        size == 1 or stride < _MAX_STRIDE for size, stride in zip(mask.shape[-2:], mask.stride()[-2:])
    ):
        return mask
    return mask.contiguous()


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
    device: host.Device

    @property
    def need(self) -> table.Need:
        columns = max(table.columns(self.d), table.columns(self.dv))
        # A scale of its own takes a register for each logit, as a softcap does.
        apart = self.dtype.itemsize == 2 and not self.fold
        bounded, heavy = self.lower or self.upper, self.softcap or self.mask != "none" or apart
        return table.Need(columns, self.dtype.itemsize, self.dropout, heavy, bounded, *self.device, host.version())


def _problem(q: Tensor, v: Tensor, attn_mask: Tensor | None, options: AttentionOptions) -> _Problem:
    mask = "none" if attn_mask is None else "bool" if attn_mask.dtype == torch.bool else "additive"
    lower, upper, softcap = options.window_left >= 0, options.causal or options.window_right >= 0, options.softcap
    # not where folding the scale into the exponent would err by more than float32 does
    fold = q.element_size() == 2 and not softcap and mask != "additive" and _FOLDED[0] < options.scale < _FOLDED[1]
    return _Problem(
        *(q.shape[-1], v.shape[-1], q.dtype, _precision(q.dtype), fold, softcap != 0.0, mask),
        *(options.dropout_p > 0.0, lower, upper, options.lower_right and (lower or upper)),
        host.device(q.get_device()) if q.is_cuda else host.compiled_for(INTERPRETED),
    )


@functools.lru_cache(4096)
def _plan(kernel: str, problem: _Problem, sum_q: bool = False) -> tuple[Variant, table.Tile]:
    """A kernel of the name, compiled for these constants, and its tile."""
    from . import attention_bwd_dkv as triton_attention_bwd
    from . import attention_bwd_dq as triton_attention_bwd_dq
    from . import attention_fwd as triton_attention_fwd

    function, choose = {
        "fwd": (triton_attention_fwd._attention_fwd_kernel, table.forward),
        "delta": (triton_attention_bwd._attention_bwd_delta_kernel, table.delta),
        "dkv": (triton_attention_bwd._attention_bwd_dkv_kernel, table.backward_keys),
        "dq": (triton_attention_bwd_dq._attention_bwd_dq_kernel, table.backward_queries),
        "dmask": (triton_attention_bwd_dq._attention_bwd_dmask_kernel, table.backward_mask),
    }[kernel]
    tile = choose(problem.need)
    d, dv, dtype, precision, *switches, _ = problem
    vec = 16 // dtype.itemsize
    constants: tuple[Any, ...] = (d, table.columns(d), dv, table.columns(dv), vec, precision, *switches)
    if kernel == "delta":
        constants = (dv, table.columns(dv), vec, precision, tile.block_m)
    elif kernel == "dmask":
        constants = (*constants[:6], problem.softcap, *switches[3:], sum_q, tile.block_m, tile.block_n)
    else:
        parts = {"dkv": table.part, "dq": table.part_of_queries}
        part = (parts[kernel](problem.need),) if kernel in parts else ()
        constants += (*part, tile.block_m, tile.block_n)
    return host.variant(function, constants, tile, True), tile


def forget_variants() -> None:
    """After the table was changed."""
    _plan.cache_clear()


# --- the ops ---


def attention_fwd(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """(out, lse) in one launch."""
    q, k, v = inputs[:3]
    packed, n_batches = inputs.cu_seqlens_q is not None, _batches(inputs)
    out = rows_like(q) if v.shape[-1] == q.shape[-1] else q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty((q.shape[1], q.shape[0]) if packed else q.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0 or k.numel() == 0 == v.numel() or n_batches == 0:
        return out.zero_(), lse.fill_(-math.inf)
    q, k, v = _operands(packed, q, k, v)
    written = out if _aligned(out, packed) else _padded(out)
    masks = attn_mask, key_mask, *_ = _masks(inputs)
    variant, tile = _plan("fwd", _problem(q, v, attn_mask, options))
    n_tiles, n_heads = host.ceil(options.max_seqlen_q, tile.block_m), q.shape[1]
    variant.launch(
        (n_tiles * n_heads * n_batches, 1),
        (q, k, v, *masks, written, lse),
        (
            *(n_tiles, n_heads, n_heads // k.shape[1], options.max_seqlen_q, options.max_seqlen_k),
            *_strides_of((q, k, v, written), packed),
            *(*_mask_strides(attn_mask), *_key_mask_strides(key_mask), *_lse_strides(lse), *_scalars(options)),
        ),
    )
    _deliver(written, out)
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, v, attn_mask): delta, then a launch over queries and one or two over keys.

    Beside the rounding of 16-bit results it is no matter in which order dlse is added, nor how out and lse were
    rounded. For `exact` results, and for a mask's gradient, in which such errors add up, the launch over queries makes
    delta and the inverse of the weights' sum itself.
    """
    q, k, v, mask, *_ = inputs
    wants_q, wants_k, wants_v, wants_mask = output_mask
    packed, n_batches = inputs.cu_seqlens_q is not None, _batches(inputs)
    wants_mask = wants_mask and mask is not None and mask.is_floating_point()
    logits = (q.shape[0], q.shape[1], q.shape[-2], k.shape[-2])
    exact = q.element_size() == 4 or wants_mask
    direct = wants_mask and mask is not None and mask.shape == logits
    dq = rows_like(q) if wants_q else None
    dk, dv = rows_like(k) if wants_k else None, rows_like(v) if wants_v else None
    dmask = rows_like(mask).zero_() if wants_mask and mask is not None else None
    gradients = (dq, dk, dv, dmask)
    if lse.numel() == 0 or k.numel() == 0 == v.numel() or n_batches == 0:
        return tuple([None if g is None else g.zero_() for g in gradients])

    operands = dout, q, k, v = _operands(packed, dout, q, k, v)
    dq, dk, dv = written = [_writable(g, packed) for g in (dq, dk, dv)]
    strides = _strides_of(operands, packed)
    masks = attn_mask, key_mask, *_ = _masks(inputs)
    lse_strides, problem = _lse_strides(lse), _problem(q, v, attn_mask, options)
    dlse, inverse = contiguous(dlse), torch.empty_like(lse) if exact else None
    delta = torch.empty_like(lse)
    if not exact:
        _delta(delta, dout, out, dlse, packed, problem)
    rows = (lse, delta, dlse if exact else None, inverse)
    mask_strides = (*_mask_strides(attn_mask), *_key_mask_strides(key_mask))
    group = q.shape[1] // k.shape[1]
    lengths = (group, options.max_seqlen_q, options.max_seqlen_k)
    if dq is not None or direct or exact:
        variant, tile = _plan("dq", problem)
        n_tiles = host.ceil(options.max_seqlen_q, tile.block_m)
        dmask_strides = _mask_strides(dmask if direct else None)
        variant.launch(
            (n_tiles * q.shape[1] * n_batches, 1),
            (*operands, *masks, *rows, dq, dmask if direct else None),
            (
                *(n_tiles, q.shape[1], *lengths, *strides, *_strides(q if dq is None else dq, packed)),
                *(*dmask_strides, *mask_strides, *lse_strides, *_scalars(options)),
            ),
        )
    if wants_k or wants_v:
        strides += _strides_of((k if dk is None else dk, v if dv is None else dv), packed)  # a wanted one's are read
        variant, tile = _plan("dkv", problem)
        n_tiles = host.ceil(options.max_seqlen_k, tile.block_n)
        for pair in ((dk, None), (None, dv)) if table.splits(problem.need) else ((dk, dv),):
            if pair[0] is not None or pair[1] is not None:
                variant.launch(
                    (n_tiles * k.shape[1] * n_batches, 1),
                    (*operands, *masks, *rows, *pair),
                    (n_tiles, k.shape[1], *lengths, *strides, *mask_strides, *lse_strides, *_scalars(options)),
                )
    if dmask is not None and dmask.shape[-1] == 1 != options.max_seqlen_k:
        gradient_of_shifts(dmask, dlse, lse)
    elif dmask is not None and not direct:
        _mask_gradient(dmask, problem, operands, masks[:3], rows, options)
    for gradient, own in zip(gradients, written):
        _deliver(own, gradient)
    return gradients


def _delta(delta: Tensor, dout: Tensor, out: Tensor, dlse: Tensor | None, packed: bool, problem: _Problem) -> None:
    """rowsum(dout out) - dlse; packed sequences are one to it."""
    dout, out = _operands(packed, dout, out)
    variant, tile = _plan("delta", problem)
    n_heads, n_queries = delta.shape[-2:]
    n_tiles = host.ceil(n_queries, tile.block_m)
    variant.launch(
        (n_tiles * n_heads * (1 if packed else delta.shape[0]), 1),
        (dout, out, dlse, delta),
        (n_tiles, n_heads, n_queries, *_strides_of((dout, out), packed), *_lse_strides(delta)),
    )


def _mask_gradient(
    dmask: Tensor,
    problem: _Problem,
    operands: list[Tensor],
    masks: tuple[Tensor | None, ...],
    rows: tuple[Tensor | None, ...],
    options: AttentionOptions,
) -> None:
    """Of a mask that is broadcast: partial sums of as many splits as fill the device, then their sum.

    `rows` are lse, delta, dlse and the weights' inverse sums.
    """
    _, q, k, _ = operands
    logits = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    lse_strides = (logits[1] * logits[2], logits[2])
    shape = (*[1] * (4 - dmask.ndim), *dmask.shape)
    variant, tile = _plan("dmask", problem, shape[2] == 1 != logits[2])
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
            *(*logits[:2], q.shape[1] // k.shape[1], *logits[2:], *shape[:3], splits),
            *_strides_of(operands, False),
            *(*_mask_strides(masks[0]), *_key_mask_strides(masks[1]), *lse_strides, *_scalars(options)),
        ),
    )
    flat = dmask if dmask.is_contiguous() else torch.empty_like(dmask, memory_format=torch.contiguous_format)
    host.sum_partials(partials, (flat, None, None, None))
    if flat is not dmask:
        dmask.copy_(flat)
