"""Bias, activation and dropout in readable PyTorch: forward and backward by hand.

Both are elementary differentiable operators, which transforms and double backward go through. What is dropped is taken
out before anything is computed of it: a NaN there reaches neither the result nor a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import dropout
from ..._activations import sigmoid_form
from ..._dtypes import compute_dtype
from ..._options import ActivationInputs, ActivationOptions, Inputs, Options

_ROOT_HALF = math.sqrt(0.5)
_DENSITY = 1.0 / math.sqrt(2.0 * math.pi)  # of the normal distribution at 0
_SATURATED = 1000.0  # past where a sigmoid(w) with a cube in w is 0 or 1 in every dtype; its cube is finite


def refusal(op: str, inputs: Inputs, options: Options) -> str | None:
    return None


def _keep(x: Tensor, seed: Tensor | None, p: float) -> Tensor | None:
    if not p:
        return None
    assert seed is not None
    return dropout.element_mask(x.shape, p, seed)


def _biased(x: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
    """x + bias in the compute dtype, with 0 where an element is dropped: each activation makes 0 of it."""
    acc = compute_dtype(x.dtype)
    u = x.to(acc) if bias is None else x.to(acc) + bias.to(acc)
    return u if keep is None else torch.where(keep, u, 0.0)


def _activate(u: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(u)
    if activation == "gelu":
        return 0.5 * u * (1.0 + torch.erf(u * _ROOT_HALF))
    return u * torch.sigmoid(_argument(u, activation)[1])


def _argument(u: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor | float]:
    """Of an activation that is u sigmoid(w): u where w is not saturated, w and its derivative."""
    linear, cubic = sigmoid_form(activation)
    if not cubic:
        return u, u * linear, linear
    v = u.clamp(-_SATURATED, _SATURATED)
    return v, v * (linear + cubic * v * v), linear + 3.0 * cubic * v * v


def _slope(u: Tensor, activation: str) -> Tensor:
    """The activation's derivative. 1 - sigmoid(w) is sigmoid(-w), which does not cancel."""
    if activation == "relu":
        return torch.where(u <= 0, 0.0, 1.0).to(u.dtype)
    if activation == "gelu":
        return 0.5 * (1.0 + torch.erf(u * _ROOT_HALF)) + u * torch.exp(-0.5 * u * u) * _DENSITY
    v, w, dw = _argument(u, activation)
    return torch.sigmoid(w) * (1.0 + v * (dw * torch.sigmoid(-w)))  # in this order no finite u gives 0 times infinity


def bias_act_dropout_fwd(inputs: ActivationInputs, options: ActivationOptions) -> Tensor:
    (x, bias, seed), (activation, dropout_p) = inputs, options
    y = _activate(_biased(x, bias, _keep(x, seed, dropout_p)), activation)
    if dropout_p:
        y = y * dropout.keep_scale(dropout_p)
    return y.to(x.dtype).clone(memory_format=torch.contiguous_format)  # an op's output is no alias


def bias_act_dropout_bwd(
    dy: Tensor, inputs: ActivationInputs, options: ActivationOptions, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    r"""Gradients of (x, bias), empty where `output_mask` is False: :math:`du = \mathrm{dropout}'(dy)\,act'(x + b)`."""
    (x, bias, seed), (activation, dropout_p) = inputs, options
    keep = _keep(x, seed, dropout_p)
    u = _biased(x, bias, keep)
    du = dy.to(u.dtype)
    if keep is not None:
        du = torch.where(keep, du * dropout.keep_scale(dropout_p), 0.0)
    du = du * _slope(u, activation)
    dx, dbias = x.new_empty(0), x.new_empty(0)  # outputs of an op are no aliases of one another
    if output_mask[0]:
        dx = du.to(x.dtype).clone(memory_format=torch.contiguous_format)
    if bias is not None and output_mask[1]:
        rows = math.prod(du.shape[:-1])
        dbias = du.reshape(rows, du.shape[-1]).sum(0).to(bias.dtype)
    return dx, dbias
