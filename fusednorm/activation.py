"""``bias_act_dropout``: contract and checks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, dropout
from ._activations import ACTIVATIONS
from ._options import ActivationInputs, ActivationOptions
from .autograd import activation as autograd_activation
from .dispatch import eager, settings
from .dispatch.settings import Decision

_tuple = tuple.__new__
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

    Example:
        >>> hidden, bias = torch.randn(2, 5, 32), torch.zeros(32)
        >>> fusednorm.bias_act_dropout(hidden, bias, "gelu", dropout_p=0.1).shape
        torch.Size([2, 5, 32])
    """
    current = settings.current  # looked up once: another thread may replace it
    compiling = _is_compiling()
    if not compiling and current.fastpath is not None:
        y = current.fastpath.bias_act_dropout(x, bias, activation, dropout_p, seed, current.fastpath_mode)
        if y is not None:
            return y
    if has_torch_function_variadic(x, bias, seed):
        return handle_torch_function(
            bias_act_dropout, (x, bias, seed), x, bias, activation=activation, dropout_p=dropout_p, seed=seed
        )
    if type(x) not in eager.TENSORS and eager.is_sharded(x):
        from .integrations import dtensor

        return dtensor.bias_act_dropout(x, bias, activation, dropout_p, seed)
    signature = None
    if not compiling and type(dropout_p) is float and type(activation) is str and seed is None:
        inputs = _tuple(ActivationInputs, (x, bias, None))  # 0.08 microseconds less
        plan, signature = eager.find(inputs, "bias_act_dropout", activation, dropout_p)
        if plan is not None:
            return plan(inputs)
    _checks.check_tensor("x", x)
    _checks.check_last_dimension("bias", bias, "x", x)
    _checks.check_choice("activation", activation, tuple(ACTIVATIONS))
    dropout_p = _checks.check_probability("dropout_p", dropout_p)
    if seed is not None:
        _checks.check_seed(seed)
    if dropout_p == 1.0:
        settings.record(Decision("bias_act_dropout", "torch", "zeros, because everything is dropped"))
        return dropout.all_dropped(x, bias)
    seed = dropout.seed_tensor(seed, x.device) if dropout_p and seed is not None else None
    inputs = ActivationInputs(x, bias, seed)
    plan = autograd_activation.plan(inputs, ActivationOptions(activation, dropout_p))
    eager.keep(signature, plan)
    return plan(inputs)
