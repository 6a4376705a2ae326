"""``bias_act_dropout``: contract and checks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, _ops, dispatch, dropout
from ._activations import FUNCTIONS as _TORCHS
from ._options import ActivationInputs, ActivationOptions
from ._transforms import traced, wants_gradients
from .autograd import activation as autograd_activation
from .dispatch.crossovers import OPERATIONS, torch_on_cpu, torch_on_gpu
from .providers.cpu import activation as native

_FLOATS = frozenset(_checks.FLOAT_DTYPES)
_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling


def bias_act_dropout(
    x: Tensor,
    bias: Tensor | None,
    activation: str = "relu",
    dropout_p: float = 0.0,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    r"""What stands between the two linear layers of a feed-forward block, in one pass each way.

    .. math:: y = \mathrm{dropout}(\mathrm{act}(x + b))

    .. math::
        \mathrm{relu}(u) = \max(u, 0), \qquad \mathrm{gelu}(u) = \frac{u}{2}\,(1 + \mathrm{erf}(u / \sqrt 2)), \qquad
        \mathrm{silu}(u) = u\,\sigma(u), \qquad \mathrm{quick\_gelu}(u) = u\,\sigma(1.702\,u),

    .. math:: \mathrm{gelu\_tanh}(u) = \frac{u}{2}\,(1 + \tanh(\sqrt{2 / \pi}\,(u + 0.044715\,u^3)))

    Kernels compute in float32 (float64 for float64 x) and round once; the backward computes x + b and the mask again.

    Args:
        x: (\*, N), what the first linear layer gives without its bias; float32, bfloat16, float16 or float64, any
            strides.
        bias: (N,), any of these dtypes, or None.
        activation: "relu", "gelu", "gelu_tanh" (torch's ``approximate="tanh"``), "silu" or "quick_gelu" (CLIP's).
        dropout_p: probability that an element is dropped, in [0, 1]; applied whenever it is > 0. A dropped element
            and its gradients are 0, whatever x is there.
        seed: int or one-element int64 tensor that fixes the mask, which is ``dropout_mask(x.shape, dropout_p, seed)``;
            drawn from torch's generator if not given. One seed gives every layer the same mask. A function drops in
            eval mode too: pass dropout_p=0.0 there.

    Returns:
        A tensor of x's shape and dtype, under autocast too.

    Raises:
        TypeError: an argument is no dense floating-point tensor, or of another type than said above.
        ValueError: the activation is unknown, or a shape, device or probability does not fit.

    Source: D. Hendrycks, K. Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415; S. Elfwing et al.,
    "Sigmoid-weighted linear units", arXiv:1702.03118, and P. Ramachandran et al., arXiv:1710.05941, for SiLU;
    A. Radford et al., "Learning transferable visual models from natural language supervision", arXiv:2103.00020, for
    quick_gelu.
    """
    # in this order: a graph is not to depend on it; looked up once: another thread may take it away
    if not _is_compiling() and (cpp := dispatch.shortcut) is not None:
        shortcut = cpp.bias_act_dropout(x, bias, activation, dropout_p, seed, dispatch.shortcut_asked)
        if shortcut is not None:
            return shortcut
    if has_torch_function_variadic(x, bias, seed):
        return handle_torch_function(
            bias_act_dropout, (x, bias, seed), x, bias, activation=activation, dropout_p=dropout_p, seed=seed
        )
    try:
        # On the CPU the native kernel or torch's own operators at once: a check costs more than the two microseconds
        # that a call may cost over eager's. What is not certain to be right goes the way below.
        if (
            type(dropout_p) is float
            and dropout_p == 0.0
            and seed is None
            and dispatch.short_cuts
            and not _functorch_active()
            and forward_ad._current_level < 0
            and not _is_compiling()
        ):
            y = _run_bare(x, bias, activation)
            if y is not None:
                return y
    except (RuntimeError, TypeError, AttributeError, LookupError):
        pass
    _checks.check_tensor("x", x)
    _checks.check_last_dimension("bias", bias, "x", x)
    _checks.check_choice("activation", activation, tuple(_TORCHS))
    dropout_p = _checks.check_probability("dropout_p", dropout_p)
    if seed is not None:
        _checks.check_seed(seed)
    if dropout_p == 1.0:
        dispatch.record(dispatch.Decision("bias_act_dropout", "torch", "zeros, because everything is dropped"))
        return dropout.all_dropped(x, bias)
    seed = dropout.seed_tensor(seed, x.device) if dropout_p and seed is not None else None
    return autograd_activation.run(ActivationInputs(x, bias, seed), ActivationOptions(activation, dropout_p))


def _run_bare(x: Tensor, bias: Tensor | None, activation: str) -> Tensor | None:
    """The way down of a call without dropout on the CPU, with nothing looked up that it does not need.

    Torch's operators and the native library check what is left unchecked here and raise, upon which the caller takes
    the way with messages; so it does for None.
    """
    if dispatch.torch_asked:
        return _run_torch(x, bias, activation)
    automatic = dispatch.automatic
    if x.is_cuda:
        return _run_torch(x, bias, activation) if automatic and _torch_is_faster_on_a_gpu(x, bias, activation) else None
    if bias is None or traced():
        return _run_torch(x, bias, activation) if automatic else None
    if dispatch.unavailable_reason("cpu") is not None:
        if automatic:
            dispatch.tell_missing_library()
        return _run_torch(x, bias, activation) if automatic else None
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad)
    if (
        (automatic and dispatch.by_shape and _torch_is_faster(x, activation, needs_grad))
        or type(x) not in _ops.PLAIN
        or type(bias) not in _ops.PLAIN
        or torch._C._len_torch_dispatch_stack()
        or is_functorch_wrapped_tensor(x)
    ):
        return _run_torch(x, bias, activation) if automatic else None
    if needs_grad:
        return autograd_activation.apply(x, bias, None, activation, 0.0, "cpu")
    return native.bias_act_bare(x, bias, activation)


def _torch_is_faster_on_a_gpu(x: Tensor, bias: Tensor | None, activation: str) -> bool:
    needs_grad = wants_gradients((x, bias))
    shape = x.dtype, x.numel(), x.size(-1)
    return dispatch.by_shape and torch_on_gpu(OPERATIONS[activation], *shape, needs_grad, x.device.index or 0)


def _torch_is_faster(x: Tensor, activation: str, needs_grad: bool) -> bool:
    dtype = x.dtype
    if dtype is torch.float64 and activation != "relu":
        return True  # what the provider is reluctant to take
    return torch_on_cpu(OPERATIONS[activation], dtype, x.numel(), x.size(-1), needs_grad)


def _run_torch(x: Tensor, bias: Tensor | None, activation: str) -> Tensor | None:
    """Torch's own operators, or None where they would not be the function that is documented."""
    function = _TORCHS[activation]
    if not ((x.is_cpu or x.is_cuda) and x.dtype in _FLOATS and x.layout is torch.strided and x.ndim) or x.is_nested:
        return None
    if bias is None:
        return function(x)
    if bias.dtype is x.dtype and bias.ndim == 1 and x.size(-1) == bias.numel() and bias.layout is torch.strided:
        return function(x + bias)
    return None
