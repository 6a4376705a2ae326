"""``LayerNorm`` and ``RMSNorm`` for torch's, and their residual forms."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks, norm
from ._arguments import check_eps, check_sizes


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` through :func:`fusednorm.layer_norm`: same constructor, state_dict and repr.

    Eager static quantisation (``torch.ao.quantization``) takes it for torch's.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> fusednorm.LayerNorm(8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes("normalized_shape", normalized_shape)
        check_eps("eps", eps)
        _checks.check_dtype("dtype", dtype)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the last dimensions, which are `normalized_shape`.

        Args:
            input: (*, normalized_shape); a nested tensor goes to torch's own module.

        Returns:
            input's shape and dtype.
        """
        if isinstance(input, Tensor) and input.is_nested:
            return super().forward(input)
        return norm.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` through :func:`fusednorm.rms_norm`: same constructor, state_dict and repr.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> fusednorm.RMSNorm(8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes("normalized_shape", normalized_shape)
        check_eps("eps", eps, optional=True)
        _checks.check_dtype("dtype", dtype)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimensions, which are `normalized_shape`.

        Args:
            x: (*, normalized_shape); a nested tensor goes to torch's own module.

        Returns:
            x's shape and dtype.
        """
        if isinstance(x, Tensor) and x.is_nested:
            return super().forward(x)
        return norm.rms_norm(x, self.normalized_shape, self.weight, self.eps)


def _let_quantisation_swap_it() -> None:
    """Torch looks a class up by itself, not by its bases. Its table is imported with torch."""
    mappings = sys.modules.get("torch.ao.quantization.quantization_mappings")
    if mappings is not None:
        table = mappings.DEFAULT_STATIC_QUANT_MODULE_MAPPINGS
        table[LayerNorm] = table[nn.LayerNorm]


_let_quantisation_swap_it()


# torch puts the key, which the text follows, between quotes: the last one is the text's
_WHERE_BEFORE = {
    "x_bias": (
        '", the bias of the linear layer before this module (x_bias=True), which an older checkpoint holds as that '
        "layer's own: rename its key to this one from \"<linear layer>.bias"
    ),
    "layer_scale": (
        '", the factor of the branch (layer_scale), which an older checkpoint holds, if at all, as that of another '
        'module: rename its key to this one, in timm from "<block>.ls1.gamma'
    ),
}


class _MissingKey(str):
    """A missing key, which in torch's error says where an older checkpoint has the value."""

    def __format__(self, spec: str) -> str:
        return format(str(self), spec) + _WHERE_BEFORE[self.rpartition(".")[2]]


class _Epilogue(nn.Module):
    """What the residual forms have beyond the norm: parameters of the branch, and how it is dropped and stored."""

    normalized_shape: tuple[int, ...]
    dropout_p: float
    drop_path_p: float
    residual_dtype: torch.dtype | None
    zero_centered_weight: bool
    memory_efficient: bool
    layer_scale: nn.Parameter | None
    x_bias: nn.Parameter | None

    def _add_epilogue(
        self,
        dropout_p: float,
        drop_path_p: float,
        layer_scale: float | None,
        x_bias: bool,
        residual_dtype: torch.dtype | None,
        zero_centered_weight: bool,
        memory_efficient: bool,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        _checks.check_epilogue(dropout_p, drop_path_p, residual_dtype)
        _checks.check_branch_parameters(layer_scale, x_bias)
        self.dropout_p, self.drop_path_p = dropout_p, drop_path_p
        self.residual_dtype = residual_dtype
        self.zero_centered_weight = zero_centered_weight
        self.memory_efficient = memory_efficient
        self._layer_scale_init = layer_scale
        for name, wanted in (("layer_scale", layer_scale is not None), ("x_bias", x_bias)):
            shape = self.normalized_shape
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, parameter)
        self._reset_epilogue()

    def _reset_epilogue(self) -> None:
        with torch.no_grad():
            if self.zero_centered_weight and self.weight is not None:
                nn.init.zeros_(self.weight)  # type: ignore[arg-type]
            if self.layer_scale is not None:
                nn.init.constant_(self.layer_scale, self._layer_scale_init)  # type: ignore[arg-type]
            if self.x_bias is not None:
                nn.init.zeros_(self.x_bias)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *errors: list[str],
    ) -> None:
        before = len(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *errors)
        for i in range(before, len(missing_keys)):
            if missing_keys[i].removeprefix(prefix) in _WHERE_BEFORE:
                missing_keys[i] = _MissingKey(missing_keys[i])

    def _keywords(self, seed: int | Tensor | None) -> dict[str, Any]:
        return {
            "x_bias": self.x_bias,
            "layer_scale": self.layer_scale,
            "dropout_p": self.dropout_p if self.training else 0.0,
            "drop_path_p": self.drop_path_p if self.training else 0.0,
            "seed": seed,
            "residual_dtype": self.residual_dtype,
            "zero_centered_weight": self.zero_centered_weight,
            "memory_efficient": self.memory_efficient,
        }

    def extra_repr(self) -> str:
        shown = [super().extra_repr()]
        defaults = {"dropout_p": 0.0, "drop_path_p": 0.0, "residual_dtype": None}
        defaults |= {"zero_centered_weight": False, "memory_efficient": False}
        shown += [f"{k}={getattr(self, k)}" for k, default in defaults.items() if getattr(self, k) != default]
        if self.layer_scale is not None:
            shown.append(f"layer_scale={self._layer_scale_init}")
        if self.x_bias is not None:
            shown.append("x_bias=True")
        return ", ".join(shown)


class AddLayerNorm(_Epilogue, nn.LayerNorm):
    """Residual step and LayerNorm as one module: ``normed, residual = module(x, residual)``.

    See :func:`fusednorm.add_layer_norm` for the formula and the arguments. The first seven constructor arguments are
    :class:`torch.nn.LayerNorm`'s, and so are the names of weight and bias in the state_dict.

    Args:
        layer_scale: initial value of a learned factor for each channel of the branch; None for no such parameter.
        x_bias: whether the module owns the bias of the linear layer that makes x (initially zero). In a checkpoint of a
            model without this module, rename ``"<linear layer>.bias"`` to ``"<this module>.x_bias"``.
        zero_centered_weight: the factor is 1 + weight; subtract 1 from the weight of an older checkpoint.

    Dropout and drop path are applied in training mode only.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> norm = fusednorm.AddLayerNorm(8)
        >>> normed, residual = norm(torch.randn(2, 5, 8), torch.randn(2, 5, 8))
        >>> normed.shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.0,
        drop_path_p: float = 0.0,
        layer_scale: float | None = None,
        x_bias: bool = False,
        residual_dtype: torch.dtype | None = None,
        zero_centered_weight: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        check_sizes("normalized_shape", normalized_shape)
        check_eps("eps", eps)
        _checks.check_dtype("dtype", dtype)
        nn.LayerNorm.__init__(self, normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._add_epilogue(
            dropout_p,
            drop_path_p,
            layer_scale,
            x_bias,
            residual_dtype,
            zero_centered_weight,
            memory_efficient,
            device,
            dtype,
        )

    def reset_parameters(self) -> None:
        nn.LayerNorm.reset_parameters(self)
        if hasattr(self, "memory_efficient"):  # not while nn.LayerNorm's constructor runs
            self._reset_epilogue()

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add, then normalize the last dimensions, which are `normalized_shape`.

        Args:
            x: (*, normalized_shape), the branch.
            residual: x's shape, the stream; None in the first layer.
            gate, scale, shift: (B, normalized_shape) or (B, 1, normalized_shape), a vector for each sample: the branch
                times the gate, the normed times 1 + scale, plus shift.
            seed: fixes the dropout masks of this call. One seed in several layers gives each the same mask: give each
                layer its own, or none, for masks drawn from torch's generator.

        Returns:
            (normed, residual_out), both of x's shape.
        """
        keywords = self._keywords(seed) | {"gate": gate, "scale": scale, "shift": shift}
        return norm.add_layer_norm(x, residual, self.normalized_shape, self.weight, self.bias, self.eps, **keywords)


class AddRMSNorm(_Epilogue, nn.RMSNorm):
    """Residual step and RMSNorm as one module: ``normed, residual = module(x, residual)``.

    See :func:`fusednorm.add_rms_norm`; keywords, modes and errors as in :class:`AddLayerNorm`.

    Example:
        >>> norm = fusednorm.AddRMSNorm(8)
        >>> normed, residual = norm(torch.randn(2, 5, 8), torch.randn(2, 5, 8))
        >>> normed.shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dropout_p: float = 0.0,
        drop_path_p: float = 0.0,
        layer_scale: float | None = None,
        x_bias: bool = False,
        residual_dtype: torch.dtype | None = None,
        zero_centered_weight: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        check_sizes("normalized_shape", normalized_shape)
        check_eps("eps", eps, optional=True)
        _checks.check_dtype("dtype", dtype)
        nn.RMSNorm.__init__(self, normalized_shape, eps, elementwise_affine, device, dtype)
        self._add_epilogue(
            dropout_p,
            drop_path_p,
            layer_scale,
            x_bias,
            residual_dtype,
            zero_centered_weight,
            memory_efficient,
            device,
            dtype,
        )

    def reset_parameters(self) -> None:
        nn.RMSNorm.reset_parameters(self)
        if hasattr(self, "memory_efficient"):
            self._reset_epilogue()

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add, then normalize the last dimensions, which are `normalized_shape`.

        Args:
            x: (*, normalized_shape), the branch.
            residual: x's shape, the stream; None in the first layer.
            gate, scale, shift: (B, normalized_shape) or (B, 1, normalized_shape), a vector for each sample: the branch
                times the gate, the normed times 1 + scale, plus shift.
            seed: fixes the dropout masks of this call. One seed in several layers gives each the same mask: give each
                layer its own, or none, for masks drawn from torch's generator.

        Returns:
            (normed, residual_out), both of x's shape.
        """
        keywords = self._keywords(seed) | {"gate": gate, "scale": scale, "shift": shift}
        return norm.add_rms_norm(x, residual, self.normalized_shape, self.weight, self.eps, **keywords)
