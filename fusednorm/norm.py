"""``layer_norm``, ``rms_norm`` and their residual forms: contract, checks, and the autograd Function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _norm_calls
from .dispatch import eager, settings

_TORCH_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)  # what torch's operators raise
_OF_TRACER = "Cannot insert a Tensor that requires grad as a constant"  # it ends the trace: what follows would crash
_is_compiling = torch.compiler.is_compiling


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Layer normalization over the trailing dimensions, as :func:`torch.nn.functional.layer_norm`.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \odot w + b

    The variance is the biased one, computed in two passes in float32 (float64 for float64 input).

    Args:
        input: (\*, \*normalized_shape); float32, bfloat16, float16 or float64, any strides.
        normalized_shape: the trailing sizes to normalize over; an int is one size.
        weight, bias: of shape normalized_shape, any of these dtypes, or None.
        eps: added to the variance.

    Returns:
        A tensor of `input`'s shape and dtype (under autocast: of the dtype torch's own function gives).

    Raises:
        TypeError: an argument is no dense floating-point tensor.
        ValueError: a shape or device does not match.

    Source: J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", arXiv:1607.06450.

    Example:
        >>> x = torch.randn(2, 5, 8)
        >>> fusednorm.layer_norm(x, 8, torch.ones(8), torch.zeros(8)).shape
        torch.Size([2, 5, 8])
    """
    if has_torch_function_variadic(input, weight, bias):
        _checks.refuse_nested_subclass("input", input)
        return handle_torch_function(
            layer_norm, (input, weight, bias), input, normalized_shape, weight=weight, bias=bias, eps=eps
        )
    try:  # torch's own at once, unless another was measured to be faster: a call takes 7 microseconds
        current = settings.current  # looked up once: another thread may replace it
        if current.use_torch_layer_norm and type(eps) is float and eager.plain_on_cpu(input):
            shape = (normalized_shape,) if type(normalized_shape) is int else normalized_shape
            return torch.layer_norm(input, shape, weight, bias, eps)  # type: ignore[arg-type]
    except _TORCH_ERRORS as fault:  # what follows takes what torch does not, or says what is wrong with it
        if _OF_TRACER in str(fault):
            raise
    fast, mode = current.fastpath, current.fastpath_mode
    if not _is_compiling() and fast is not None:
        no_epilogue, rms = (None, None, None, None, None, 0.0, None), False
        outputs = fast.add_norm(input, None, normalized_shape, weight, bias, eps, *no_epilogue, rms, mode)
        if outputs is not None:
            return outputs[0]
    return _norm_calls.plain("input", input, normalized_shape, weight, bias, eps, rms=False)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    r"""Root-mean-square normalization over the trailing dimensions, as :func:`torch.nn.functional.rms_norm`.

    .. math:: y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \odot w

    Args:
        input: (\*, \*normalized_shape); float32, bfloat16, float16 or float64, any strides.
        normalized_shape: the trailing sizes to normalize over; an int is one size.
        weight: of shape normalized_shape, any of these dtypes, or None.
        eps: added to the mean square; None takes the machine epsilon of the dtype computed in (float32's for 16-bit
            input), as torch does.

    Returns:
        A tensor of `input`'s shape and dtype (under autocast: of the dtype torch's own function gives).

    Raises:
        TypeError: an argument is no dense floating-point tensor.
        ValueError: a shape or device does not match.

    Source: B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Example:
        >>> x = torch.randn(2, 5, 8)
        >>> fusednorm.rms_norm(x, 8, torch.ones(8)).shape
        torch.Size([2, 5, 8])
    """
    current = settings.current  # looked up once: another thread may replace it
    if not _is_compiling() and current.fastpath is not None:
        normed = current.fastpath.rms_norm(input, normalized_shape, weight, eps, current.fastpath_mode)
        if normed is not None:
            return normed
    if has_torch_function_variadic(input, weight):
        _checks.refuse_nested_subclass("input", input)
        return handle_torch_function(rms_norm, (input, weight), input, normalized_shape, weight=weight, eps=eps)
    try:
        if current.use_torch_rms_norm and (eps is None or type(eps) is float) and eager.plain_on_cpu(input):
            shape = (normalized_shape,) if type(normalized_shape) is int else normalized_shape
            if weight is None or weight.dtype is input.dtype:  # else torch would take the wider dtype
                return torch.rms_norm(input, shape, weight, eps)  # type: ignore[arg-type]
    except _TORCH_ERRORS as fault:  # as for layer_norm
        if _OF_TRACER in str(fault):
            raise
    return _norm_calls.plain("input", input, normalized_shape, weight, None, eps, rms=True)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    seed: int | Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    zero_centered_weight: bool = False,
    memory_efficient: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The residual step of a Transformer and the LayerNorm after it, in one pass each way.

    .. math::
        z = \mathrm{residual} + \mathrm{drop\_path}(\mathrm{layer\_scale} \odot \mathrm{gate} \odot
        \mathrm{dropout}(x + x_\mathrm{bias})), \qquad
        \mathrm{normed} = \mathrm{layer\_norm}(z) \odot (1 + \mathrm{scale}) + \mathrm{shift}

    z is rounded to the dtype it is stored in before its statistics are taken, as in ``layer_norm(x + residual)``.

    Args:
        x: (\*, \*normalized_shape), the branch's output; float32, bfloat16, float16 or float64, any strides.
        residual: of x's shape, any of these dtypes; None stands for zeros (the first layer of a stream).
        normalized_shape: the trailing sizes to normalize over; an int is one size.
        weight, bias: of shape normalized_shape, or None.
        eps: added to the variance.
        x_bias: of shape normalized_shape: the bias of the linear layer that made x.
        layer_scale: of shape normalized_shape: a factor for each channel of the branch.
        gate, scale, shift: one vector for each sample (index along dimension 0), of shape (B, \*normalized_shape) or
            (B, 1, \*normalized_shape), as in diffusers' AdaLN-Zero blocks. They may have a finer dtype than x.
        dropout_p: probability that an element of the branch is dropped, in [0, 1]; applied whenever it is > 0.
        drop_path_p: probability that a sample (index along dimension 0) loses its whole branch, in [0, 1].
        seed: int or one-element int64 tensor that fixes both masks; drawn from torch's generator if not given. One
            seed gives every layer the same masks. A function drops in eval mode too: pass dropout_p=0.0 there.
        residual_dtype: dtype of residual_out; residual's (x's without one) if not given.
        zero_centered_weight: normalize with ``1 + weight``.
        memory_efficient: keep `normed` instead of z for the backward and rebuild z from it. Where a weight is too near
            zero for that to be accurate, where a gradient is kept in a finer dtype than `normed`, and under
            ``torch.compile``, z is kept. On a GPU the weights are looked at once for each of their versions: what
            changes them without one (``.data``, sharded parameters gathered anew, a replayed CUDA graph) is not seen.
            While a CUDA graph is captured they are not looked at: the last verdict holds, and without one z is kept.

    Returns:
        (normed, residual_out): normed has x's dtype (autocast's where it is enabled), residual_out is z. Where nothing
        is added to x and no dtype changes, residual_out is x itself, as ``z = x`` would have it.

    Raises:
        TypeError: an argument is no dense floating-point tensor.
        ValueError: a shape, device or probability does not fit.

    Example:
        >>> branch, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> normed, residual = fusednorm.add_layer_norm(branch, residual, 8, torch.ones(8), dropout_p=0.1)
        >>> normed.shape, residual.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 8]))
    """
    if (
        not _is_compiling()
        and zero_centered_weight is memory_efficient is False
        and type(drop_path_p) is float
        and drop_path_p == 0.0
        and residual_dtype is None
        and (current := settings.current).fastpath is not None
    ):
        norm = x, residual, normalized_shape, weight, bias, eps
        branch = x_bias, layer_scale, gate, scale, shift, dropout_p, seed
        outputs = current.fastpath.add_norm(*norm, *branch, False, current.fastpath_mode)  # False: not RMS
        if outputs is not None:
            return outputs
    if has_torch_function_variadic(x, residual, weight, bias, x_bias, layer_scale, gate, scale, shift, seed):
        return handle_torch_function(
            add_layer_norm,
            (x, residual, weight, bias, x_bias, layer_scale, gate, scale, shift, seed),
            x,
            residual,
            normalized_shape,
            weight=weight,
            bias=bias,
            eps=eps,
            x_bias=x_bias,
            layer_scale=layer_scale,
            gate=gate,
            scale=scale,
            shift=shift,
            dropout_p=dropout_p,
            drop_path_p=drop_path_p,
            seed=seed,
            residual_dtype=residual_dtype,
            zero_centered_weight=zero_centered_weight,
            memory_efficient=memory_efficient,
        )
    # fmt: off
    return _norm_calls.residual_step(
        x, residual, normalized_shape, weight, bias, eps, x_bias, layer_scale, (gate, scale, shift),
        dropout_p, drop_path_p, seed, residual_dtype, zero_centered_weight, memory_efficient, False,  # not RMS
    )
    # fmt: on


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    x_bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    seed: int | Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    zero_centered_weight: bool = False,
    memory_efficient: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The residual step of a Transformer and the RMSNorm after it, in one pass each way.

    .. math::
        z = \mathrm{residual} + \mathrm{drop\_path}(\mathrm{layer\_scale} \odot \mathrm{gate} \odot
        \mathrm{dropout}(x + x_\mathrm{bias})), \qquad
        \mathrm{normed} = \mathrm{rms\_norm}(z) \odot (1 + \mathrm{scale}) + \mathrm{shift}

    Arguments, results and errors are those of :func:`add_layer_norm`, without `bias`; `eps` None takes the machine
    epsilon of the dtype computed in.

    Example:
        >>> branch, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> normed, residual = fusednorm.add_rms_norm(branch, residual, 8, torch.ones(8))
        >>> normed.shape, residual.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 8]))
    """
    if (
        not _is_compiling()
        and zero_centered_weight is memory_efficient is False
        and type(drop_path_p) is float
        and drop_path_p == 0.0
        and residual_dtype is None
        and (current := settings.current).fastpath is not None
    ):
        norm = x, residual, normalized_shape, weight, None, eps
        branch = x_bias, layer_scale, gate, scale, shift, dropout_p, seed
        outputs = current.fastpath.add_norm(*norm, *branch, True, current.fastpath_mode)  # True: RMS
        if outputs is not None:
            return outputs
    if has_torch_function_variadic(x, residual, weight, x_bias, layer_scale, gate, scale, shift, seed):
        return handle_torch_function(
            add_rms_norm,
            (x, residual, weight, x_bias, layer_scale, gate, scale, shift, seed),
            x,
            residual,
            normalized_shape,
            weight=weight,
            eps=eps,
            x_bias=x_bias,
            layer_scale=layer_scale,
            gate=gate,
            scale=scale,
            shift=shift,
            dropout_p=dropout_p,
            drop_path_p=drop_path_p,
            seed=seed,
            residual_dtype=residual_dtype,
            zero_centered_weight=zero_centered_weight,
            memory_efficient=memory_efficient,
        )
    # fmt: off
    return _norm_calls.residual_step(
        x, residual, normalized_shape, weight, None, eps, x_bias, layer_scale, (gate, scale, shift),
        dropout_p, drop_path_p, seed, residual_dtype, zero_centered_weight, memory_efficient, True,  # RMS
    )
    # fmt: on
