"""Layer classes for the Hugging Face library `kernels`, which lends their ``forward`` to the modules of a model.

The library's rules: a class has no constructor and no members of its own but `forward`, `can_torch_compile` and
`has_backward`. Its ``forward`` takes the arguments of the one it replaces. `self` is the model's module, and
``type(self).forward`` the module's own code. Each class runs that code for a call that it cannot fuse.

Transformers takes the classes by a path and not by a name on the Hub. Transformers 5.24 has no entry for a CPU, so
the device is a GPU::

    config = KernelConfig({"RMSNorm": fusednorm.integrations.kernels.path("RMSNorm")}, use_local_kernel=True)
    model.set_use_kernels(True, config)  # from_pretrained(kernel_config=...) refuses local paths in 5.24

`kernels` itself takes a CPU too. A class that transformers has not decorated is named first::

    kernels.replace_kernel_forward_from_hub(BertOutput, "BertOutput")
    layer = kernels.LocalLayerRepository(fusednorm.integrations.kernels.FOLDER, layer_name="BertOutput")
    with kernels.use_kernel_mapping({"BertOutput": {"cpu": layer}}):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import norm
from ..autograd.linear import linear
from ..modules._fusible import any_global_hooks, has_hooks

__all__ = ["FOLDER", "BertOutput", "BertSelfOutput", "LayerNorm", "RMSNorm", "path"]

FOLDER = Path(__file__).resolve().parent / "hf_kernels"
"""What `kernels` loads: it has the metadata that the library reads, and imports this file as its `layers`."""

_LAYERS = ("BertOutput", "BertSelfOutput", "LayerNorm", "RMSNorm")


def path(name: str) -> str:
    """The text by which transformers' ``KernelConfig`` finds a layer class of this file.

    Args:
        name: "RMSNorm", "LayerNorm", "BertSelfOutput" or "BertOutput".

    Returns:
        ``<folder>:<name>``, for ``KernelConfig({...}, use_local_kernel=True)``.

    Raises:
        ValueError: there is no class of this name, or the folder's path has a colon, at which transformers cuts it.

    Example:
        >>> from fusednorm.integrations import kernels
        >>> kernels.path("RMSNorm").endswith("hf_kernels:RMSNorm")
        True
    """
    if name not in _LAYERS:
        raise ValueError(f"name: {name!r} is none of {', '.join(_LAYERS)}")
    if ":" in str(FOLDER):
        raise ValueError(f"transformers cuts a path at its first colon: {FOLDER}")
    return f"{FOLDER}:{name}"


class RMSNorm(nn.Module):
    r"""The RMSNorm of Llama, Mistral, Qwen and others, by :func:`fusednorm.rms_norm`.

    .. math:: y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \odot w

    The module has `weight` and `variance_epsilon`. Input of another dtype than the weight's runs the module's own
    code, because the models differ in the dtype they give. Autocast changes nothing, as in the models.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Example:
        >>> from types import MethodType
        >>> from fusednorm.integrations import kernels
        >>> class Module(torch.nn.Module):  # as LlamaRMSNorm
        ...     weight, variance_epsilon = torch.ones(8), 1e-6
        >>> module = Module()
        >>> module.forward = MethodType(kernels.RMSNorm.forward, module)  # what kernelize does
        >>> module(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    can_torch_compile = True
    has_backward = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if hidden_states.dtype != weight.dtype or hidden_states.shape[-1:] != weight.shape:
            return type(self).forward(self, hidden_states)
        if not torch.is_autocast_enabled(hidden_states.device.type):
            return norm.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return norm.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


class LayerNorm(nn.Module):
    """:class:`torch.nn.LayerNorm` by :func:`fusednorm.layer_norm`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> from types import MethodType
        >>> from fusednorm.integrations import kernels
        >>> module = torch.nn.LayerNorm(8)
        >>> module.forward = MethodType(kernels.LayerNorm.forward, module)
        >>> module(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    can_torch_compile = True
    has_backward = True

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and input.is_nested:
            return type(self).forward(self, input)
        return norm.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class BertSelfOutput(nn.Module):
    r"""What follows BERT's attention: dense layer, dropout, residual sum and LayerNorm.

    .. math:: y = \mathrm{layer\_norm}(\mathrm{input} + \mathrm{dropout}(x W^T + b))

    After the product, one :func:`fusednorm.add_layer_norm` does the rest. The module has `dense`, `dropout` and
    `LayerNorm`, as BERT's and those of the models derived from it. It runs its own code under autocast, for arguments
    that differ in dtype or broadcast, and where a part is of another class, is parametrized or has hooks.

    Example:
        >>> from types import MethodType
        >>> from fusednorm.integrations import kernels
        >>> class Module(torch.nn.Module):  # as BertSelfOutput
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.dense, self.LayerNorm = torch.nn.Linear(16, 8), torch.nn.LayerNorm(8)
        ...         self.dropout = torch.nn.Dropout(0.1)
        >>> module = Module()
        >>> module.forward = MethodType(kernels.BertSelfOutput.forward, module)
        >>> module(torch.randn(2, 16), torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if not _fusible(self, hidden_states, input_tensor):
            return type(self).forward(self, hidden_states, input_tensor)
        return _dense_add_norm(self, hidden_states, input_tensor)


class BertOutput(nn.Module):
    r"""What ends BERT's feed-forward block: dense layer, dropout, residual sum and LayerNorm.

    .. math:: y = \mathrm{layer\_norm}(\mathrm{input} + \mathrm{dropout}(x W^T + b))

    Parts and cases are those of :class:`BertSelfOutput`.

    Example:
        >>> from fusednorm.integrations import kernels
        >>> kernels.BertOutput.can_torch_compile, kernels.BertOutput.has_backward
        (True, True)
    """

    can_torch_compile = True
    has_backward = True

    forward = BertSelfOutput.forward


def _dense_add_norm(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    dense, layer_norm, dropout = module.dense, module.LayerNorm, module.dropout
    return norm.add_layer_norm(
        linear(hidden_states, dense.weight),
        input_tensor,
        layer_norm.normalized_shape,
        layer_norm.weight,
        layer_norm.bias,
        layer_norm.eps,
        x_bias=dense.bias,
        dropout_p=float(dropout.p) if dropout.training else 0.0,
    )[0]


def _fusible(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> bool:
    dense, layer_norm, dropout = module.dense, module.LayerNorm, module.dropout
    if type(dense) is not nn.Linear or type(dropout) is not nn.Dropout or not isinstance(layer_norm, nn.LayerNorm):
        return False
    if type(layer_norm).forward is not nn.LayerNorm.forward and not type(layer_norm).__module__.startswith("fusednorm"):
        return False
    if _hooked(dense) or _hooked(dropout) or _hooked(layer_norm):
        return False
    if (*hidden_states.shape[:-1], dense.out_features) != tuple(input_tensor.shape):
        return False
    if layer_norm.normalized_shape != (dense.out_features,):
        return False
    dtype = hidden_states.dtype
    tensors = (input_tensor, dense.weight, dense.bias, layer_norm.weight, layer_norm.bias)
    if any(tensor is not None and tensor.dtype != dtype for tensor in tensors):
        return False
    return not torch.is_autocast_enabled(hidden_states.device.type)


def _hooked(part: nn.Module) -> bool:
    """Whether a call of it does more than its ``forward``, which is passed by here."""
    return has_hooks(part) or any_global_hooks() or _forward_is_replaced(part)


def _forward_is_replaced(part: nn.Module) -> bool:
    """By something other than the class of this file that `kernelize` puts there."""
    replaced = part.__dict__.get("forward")
    return replaced is not None and getattr(replaced, "__func__", None) not in (LayerNorm.forward, type(part).forward)
