"""A parallel style for the modules that take a branch and a residual, beside those of ``torch.distributed.tensor``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel

_MODULATION = ("gate", "scale", "shift")


class ResidualSequenceParallel(SequenceParallel):
    """Torch's ``SequenceParallel`` for ``AddLayerNorm`` and ``AddRMSNorm``: both inputs and both outputs are sharded.

    Torch's own style prepares one input. Parameters are replicated: those of the first process are sent to the others.
    ``gate``, ``scale`` and ``shift`` that are plain tensors are taken to be the same in every process.

    Args:
        sequence_dim: the dimension along which x and the residual are sharded.
        use_local_output: give plain tensors, of this process's part.

    Example:
        >>> from fusednorm.integrations.parallel import ResidualSequenceParallel
        >>> ResidualSequenceParallel(sequence_dim=1)
        ResidualSequenceParallel(sequence_dim=1, use_local_output=False)
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = distribute_module(module, device_mesh, self._replicate)

        def shard(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            named = {
                name: self._placed(value, device_mesh, replicated=name in _MODULATION) for name, value in kwargs.items()
            }
            return tuple([self._placed(arg, device_mesh) for arg in args]), named

        module.register_forward_pre_hook(shard, with_kwargs=True)
        if self.use_local_output:
            module.register_forward_hook(lambda _, args, outputs: tuple([output.to_local() for output in outputs]))
        return module

    def _replicate(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for own, parameter in module.named_parameters(recurse=False):
            placed = distribute_tensor(parameter, device_mesh, [Replicate()], src_data_rank=self.src_data_rank)
            module.register_parameter(own, nn.Parameter(placed, requires_grad=parameter.requires_grad))

    def _placed(self, value: Any, mesh: DeviceMesh, replicated: bool = False) -> Any:
        if isinstance(value, DTensor):
            return value if replicated else value.redistribute(placements=self.sequence_sharding)
        if not isinstance(value, Tensor) or value.numel() == 1:  # None, or a seed
            return value
        return DTensor.from_local(value, mesh, [Replicate()] if replicated else self.sequence_sharding, run_check=False)
