"""The Triton provider of attention: what it takes, how operands are addressed, and the launches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..._options import AttentionInputs, AttentionOptions
from ..strides import contiguous, gradient_of_shifts, row_major, rows_like
from . import attention_config as table
from . import attention_memory as memory
from . import attention_split as split
from . import host

if TYPE_CHECKING:
    from .launch import Variant

    _Way = tuple[Variant, tuple[int, int], tuple[int | float, ...]]

_LONGEST = 2**29  # positions, and sums of a few, are 32-bit numbers
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
    return memory.bounded_stride(inputs.attn_mask), inputs.key_mask, inputs.seed, *bounds


# --- variants ---


def _precision(dtype: torch.dtype) -> str:
    """Of products of float32 operands; nothing to those of 16 bits, which are exact."""
    return "ieee" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32" else "tf32"


class _Problem(NamedTuple):
    """What kernels are compiled for and tiles chosen by. Of lengths and addresses only `mask_vec` follows."""

    d: int
    dv: int
    dtype: torch.dtype
    precision: str
    fold: bool
    softcap: bool
    mask: str
    mask_vec: int  # elements of the mask that are read at once
    dropout: bool
    lower: bool  # whether a query's keys are bounded below, and above
    upper: bool
    lower_right: bool
    device: host.Device

    @property
    def hides(self) -> bool:
        """Whether a query may see no key, a key mask aside."""
        return self.lower or self.upper or self.mask != "none"

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
        *(memory.mask_vec(attn_mask, options.max_seqlen_k), options.dropout_p > 0.0),
        *(lower, upper, options.lower_right and (lower or upper)),
        host.device(q.get_device()) if q.is_cuda else host.compiled_for(INTERPRETED),
    )


@functools.lru_cache(4096)
def _plan(kernel: str, problem: _Problem, more: bool = False) -> tuple[Callable[[], Variant], table.Tile]:
    """A kernel of the name, compiled for these constants, and its tile.

    `more`: of a mask's gradient, whether it is summed over queries; of splits, whether a query may see no key.
    """
    from . import attention_bwd_dkv as triton_attention_bwd
    from . import attention_bwd_dq as triton_attention_bwd_dq
    from . import attention_fwd as triton_attention_fwd

    function, choose = {
        "fwd": (triton_attention_fwd._attention_fwd_kernel, table.forward),
        "split": (triton_attention_fwd._attention_fwd_kernel, table.forward_split),
        "merge": (triton_attention_fwd._attention_fwd_merge_kernel, table.forward_merge),
        "delta": (triton_attention_bwd._attention_bwd_delta_kernel, table.delta),
        "dkv": (triton_attention_bwd._attention_bwd_dkv_kernel, table.backward_keys),
        "dq": (triton_attention_bwd_dq._attention_bwd_dq_kernel, table.backward_queries),
        "dmask": (triton_attention_bwd_dq._attention_bwd_dmask_kernel, table.backward_mask),
    }[kernel]
    tile = choose(problem.need)
    d, dv, dtype, precision, *switches, _ = problem
    vec = 16 // dtype.itemsize
    constants: tuple[Any, ...] = (d, table.columns(d), dv, table.columns(dv), vec, precision, *switches)
    parts = {
        "fwd": table.part_of_forward,
        "split": table.part_of_forward,
        "dkv": table.part_of_keys,
        "dq": table.part_of_queries,
        "dmask": table.part_of_mask,
    }
    part = (parts[kernel](problem.need),) if kernel in parts else ()
    if kernel == "delta":
        constants = (dv, table.columns(dv), vec, precision, tile.block_m)
    elif kernel == "merge":
        constants = (*constants[2:6], more, tile.block_n)
    elif kernel == "dmask":
        constants = (*constants[:6], problem.softcap, *switches[3:], more, *part, tile.block_m, tile.block_n)
    else:
        forms = (kernel == "split",) if kernel in ("fwd", "split") else ()
        constants += (*part, *forms, tile.block_m, tile.block_n)
    return functools.partial(host.variant, function, constants, tile, True), tile


def forget_variants() -> None:
    """After the table was changed."""
    _plan.cache_clear()
    host.forget_prepared()


# --- the ops ---


@host.prepared
def attention_fwd(inputs: AttentionInputs, options: AttentionOptions) -> Callable[..., tuple[Tensor, Tensor]]:
    """(out, lse) in one launch, or in two where programs share the keys."""
    q, k, v = inputs[:3]
    packed, n_batches, dtype = inputs.cu_seqlens_q is not None, _batches(inputs), q.dtype
    shape = q.shape[:-1]
    like = rows_like(q, "meta") if v.shape[-1] == q.shape[-1] else q.new_empty((*shape, v.shape[-1]), device="meta")
    out_like, lse_like = memory.like(like), (*row_major(shape[::-1] if packed else shape), torch.float32)
    nothing = 0 in shape or k.numel() == 0 == v.numel() or n_batches == 0
    operands, may_split = memory.Operands(packed, q, k, v, like), split.may(inputs)
    ways: dict[Any, tuple[_Way, tuple[split.Workspace, _Way] | None]] = {}

    def problem_of(call: split.Call) -> _Problem:
        return _problem(call.q, call.v, call.attn_mask, call.options)

    def way(given: split.Call, key_mask: Tensor | None) -> tuple[_Way, tuple[split.Workspace, _Way] | None]:
        """The launch, and where there are splits what they write and the launch that merges it."""
        call, n_splits = split.chosen(given, lambda call: problem_of(call).need) if may_split else (given, 1)
        q, k, v, out, lse, attn_mask, options = call
        problem, n_heads, n_queries = problem_of(call), q.shape[1], options.max_seqlen_q
        variant, tile = _plan("split" if n_splits > 1 else "fwd", problem)
        n_tiles = host.ceil(n_queries, tile.block_m)
        own, own_rows = memory.strides(out, packed), memory.lse_strides(lse)
        merge = None
        if n_splits > 1:
            between = split.workspace(call, n_splits)
            merging, _ = _plan("merge", problem, problem.hides or key_mask is not None)
            merged = (n_heads, n_queries, n_splits, *own, *own_rows)
            merge = between, (merging(), (n_queries * n_heads * n_batches, 1), merged)
            own, own_rows = between.strides, between.lse_strides
        numbers = (
            *(n_tiles, n_heads, n_heads // k.shape[1], n_queries, options.max_seqlen_k),
            *(*memory.strides_of((q, k, v), packed), *own, *memory.mask_strides(attn_mask, problem.mask_vec)),
            *(*memory.key_mask_strides(key_mask), *own_rows, *_scalars(options)),
        )
        return (variant(), (n_tiles * n_heads * n_batches, n_splits), numbers), merge

    def run(inputs: AttentionInputs, *_: object) -> tuple[Tensor, Tensor]:
        q, k, v = inputs[:3]
        empty = host.allocator(q)
        written = out = empty(*out_like)
        lse = empty(*lse_like)
        if nothing:
            return out.zero_(), lse.fill_(-math.inf)
        copied = operands.where(q, k, v, out)
        if True in copied:
            q, k, v = map(memory.read, (q, k, v), copied[:3])
            written = memory.padded(out) if copied[3] else out
        masks = _masks(inputs)
        key = copied, _precision(dtype), host.aligned(masks[0])
        found = ways.get(key)
        if found is None:
            found = ways.setdefault(key, way(split.Call(q, k, v, written, lse, masks[0], options), masks[1]))
        (variant, grid, numbers), merge = found
        if merge is None:
            variant.launch(grid, (q, k, v, *masks, written, lse), numbers)
        else:
            between, (merging, rows, merged) = merge
            parts, lses = empty(*between.parts, torch.float32), empty(*between.lses, torch.float32)
            variant.launch(grid, (q, k, v, *masks, parts, lses), numbers)
            merging.launch(rows, (parts, lses, written, lse), merged)
        memory.deliver(written, out)
        return out, lse

    return run


@host.prepared
def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    output_mask: Sequence[bool],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Gradients of (q, k, v, attn_mask): delta, then a launch over queries and one or two over keys.

    Beside the rounding of 16-bit results it is no matter in which order dlse is added, nor how out and lse were
    rounded. For `exact` results, and for a mask's gradient, in which such errors add up, the launch over queries makes
    delta and the inverse of the weights' sum itself.
    """
    q, k, v, mask, *_ = inputs
    wants_q, wants_k, wants_v, wants_mask = output_mask
    packed, n_batches, dtype = inputs.cu_seqlens_q is not None, _batches(inputs), q.dtype
    wants_mask = wants_mask and mask is not None and mask.is_floating_point()
    logits = (q.shape[0], q.shape[1], q.shape[-2], k.shape[-2])
    exact = q.element_size() == 4 or wants_mask
    direct = wants_mask and mask is not None and mask.shape == logits
    likes = [
        rows_like(t, "meta") if wanted and t is not None else None
        for t, wanted in zip((q, k, v, mask), (wants_q, wants_k, wants_v, wants_mask), strict=True)
    ]
    results = [None if t is None else memory.like(t) for t in likes]
    row_like = memory.like(torch.empty_like(lse, device="meta"))
    nothing = lse.numel() == 0 or k.numel() == 0 == v.numel() or n_batches == 0
    operands = memory.Operands(packed, dout, q, k, v, *likes[:3], None if exact else out)
    ways: dict[Any, dict[str, _Way]] = {}

    def way(
        tensors: list[Tensor],
        written: list[Tensor | None],
        out: Tensor,
        masks: tuple[Tensor | None, ...],
        lse: Tensor,
        dmask: Tensor | None,
    ) -> dict[str, _Way]:
        """The launches by kernel."""
        dout, q, k, v = tensors
        dq, dk, dv = written
        found: dict[str, _Way] = {}
        numbers: tuple[int | float, ...]
        own: tuple[int, ...]
        problem, strides = _problem(q, v, masks[0], options), memory.strides_of(tensors, packed)
        if direct and memory.mask_vec(dmask, options.max_seqlen_k) == 1:  # an expanded mask's gradient lies otherwise
            problem = problem._replace(mask_vec=1)
        lengths = (q.shape[1] // k.shape[1], options.max_seqlen_q, options.max_seqlen_k)
        mask_strides = (*memory.mask_strides(masks[0], problem.mask_vec), *memory.key_mask_strides(masks[1]))
        last = (*mask_strides, *memory.lse_strides(lse), *_scalars(options))
        if not exact:  # packed sequences are one to it
            variant, tile = _plan("delta", problem)
            n_heads, n_queries = lse.shape[-2:]
            n_tiles = host.ceil(n_queries, tile.block_m)
            numbers = (n_tiles, n_heads, n_queries, *memory.strides_of((dout, out), packed), *memory.lse_strides(lse))
            found["delta"] = variant(), (n_tiles * n_heads * (1 if packed else lse.shape[0]), 1), numbers
        if dq is not None or direct or exact:
            variant, tile = _plan("dq", problem)
            n_tiles = host.ceil(options.max_seqlen_q, tile.block_m)
            written_mask = memory.mask_strides(dmask if direct else None, problem.mask_vec)
            own = (*memory.strides(q if dq is None else dq, packed), *written_mask)
            numbers = (n_tiles, q.shape[1], *lengths, *strides, *own, *last)
            found["dq"] = variant(), (n_tiles * q.shape[1] * n_batches, 1), numbers
        if wants_k or wants_v:
            variant, tile = _plan("dkv", problem)
            n_tiles = host.ceil(options.max_seqlen_k, tile.block_n)
            read = (k if dk is None else dk, v if dv is None else dv)  # a wanted one's strides are read
            own = memory.strides_of(read, packed)
            numbers = (n_tiles, k.shape[1], *lengths, *strides, *own, *last)
            for name, there in (("dk", wants_k), ("dv", wants_v)) if table.splits(problem.need) else (("dkv", True),):
                if there:
                    found[name] = variant(), (n_tiles * k.shape[1] * n_batches, 1), numbers
        return found

    def run(
        dout: Tensor,
        dlse: Tensor | None,
        inputs: AttentionInputs,
        out: Tensor,
        lse: Tensor,
        options: AttentionOptions,
        _: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        q, k, v = inputs[:3]
        empty = host.allocator(q)
        written: list[Tensor | None]
        gradients = [None if like is None else empty(*like) for like in results]
        if nothing:
            return tuple([None if g is None else g.zero_() for g in gradients])
        *written, dmask = gradients
        if dmask is not None:
            dmask.zero_()
        copied = operands.where(dout, q, k, v, *written, None if exact else out)
        tensors = dout, q, k, v = [*map(memory.read, (dout, q, k, v), copied)]
        dq, dk, dv = written = [memory.written_to(g, c) for g, c in zip(written, copied[4:])]
        out, masks, delta = memory.read(out, copied[7]), _masks(inputs), empty(*row_like)
        dlse, inverse = contiguous(dlse), empty(*row_like) if exact else None
        key = copied, _precision(dtype), host.aligned(masks[0])
        found = ways.get(key) or ways.setdefault(key, way(tensors, written, out, masks, lse, dmask))
        rows = (lse, delta, dlse if exact else None, inverse)
        read, direct_dmask = (*tensors, *masks, *rows), dmask if direct else None
        pointers = {
            "delta": (dout, out, dlse, delta),
            "dq": (*read, dq, direct_dmask),
            "dkv": (*read, dk, dv),
            "dk": (*read, dk, None),
            "dv": (*read, None, dv),
        }
        for name, (variant, grid, numbers) in found.items():
            variant.launch(grid, pointers[name], numbers)
        if dmask is not None and dmask.shape[-1] == 1 != options.max_seqlen_k:
            gradient_of_shifts(dmask, dlse, lse)
        elif dmask is not None and not direct:
            _mask_gradient(dmask, _problem(q, v, masks[0], options), tensors, masks[:3], rows, options)
        for gradient, own in zip(gradients, written):
            memory.deliver(own, gradient)
        return tuple(gradients)

    return run


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
    variant().launch(
        (programs * splits, 1),
        (*operands, *masks, *rows, partials),
        (
            *(*logits[:2], q.shape[1] // k.shape[1], *logits[2:], *shape[:3], splits),
            *memory.strides_of(operands, False),
            *(*memory.mask_strides(masks[0], problem.mask_vec), *memory.key_mask_strides(masks[1])),
            *(*lse_strides, *_scalars(options)),
        ),
    )
    flat = dmask if dmask.is_contiguous() else torch.empty_like(dmask, memory_format=torch.contiguous_format)
    host.sum_partials((False,), 1, *partials.shape[1:])(partials, (flat, None, None, None))
    if flat is not dmask:
        dmask.copy_(flat)
