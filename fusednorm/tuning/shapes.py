"""``recording_shapes``: which calls a user's own step makes, to measure exactly those."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch

from .._options import ActivationInputs, AttentionInputs, AttentionOptions, NormInputs
from .._transforms import wants_gradients
from ..dispatch import rules, rules_attention, settings
from ..dispatch.resolve import Request
from .calls import OPERATION_NAMES, CallClass


class RecordedShapes:
    """Classes of calls with the number of times that each was called, by device."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, CallClass]] = Counter()

    def classes(self, device: torch.device) -> list[CallClass]:
        """Those on one device, the most frequent first."""
        return [of for (name, of), _ in self.counts.most_common() if torch.device(name) == device]

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        lines = [f"{count:6d} x {of.name} on {name}" for (name, of), count in self.counts.most_common()]
        return "\n".join([f"RecordedShapes of {len(self)} classes of calls", *lines])


@contextlib.contextmanager
def recording_shapes() -> Iterator[RecordedShapes]:
    """Note the classes of all calls of fusednorm that are made inside, for :func:`tune`.

    Calls under ``torch.compile`` are not noted, because a graph's choice does not depend on shapes.

    Example:
        >>> x = torch.randn(64, 256)
        >>> with fusednorm.recording_shapes() as shapes:
        ...     normed = fusednorm.layer_norm(x, 256)
        >>> print(shapes)
        RecordedShapes of 1 classes of calls
             1 x layer_norm/float32/forward/64x256 on cpu
    """
    found = RecordedShapes()

    def note(request: Request) -> None:
        of = class_of(request)
        if of is not None:
            found.counts[str(request.inputs[0].device), of] += 1

    with settings.noting(note):
        yield found


def class_of(request: Request) -> CallClass | None:
    """The class of a call, or None where its cost is not measured: mixed dtypes, masks that only ours knows."""
    inputs, options = request.inputs, request.options
    x = inputs[0]
    if not x.numel() or not (x.is_cpu or x.is_cuda) or type(x.numel()) is not int:
        return None
    dtype = str(x.dtype).removeprefix("torch.")
    if isinstance(inputs, AttentionInputs):
        assert isinstance(options, AttentionOptions)
        k, plain = inputs.k, inputs.key_mask is None and inputs.cu_seqlens_q is None and not options.dropout_p
        window = options.window_left >= 0 or options.window_right >= 0
        if not plain or window or options.softcap or x.shape[1] != k.shape[1] or x.ndim != 4:
            return None
        operation = rules_attention.kind_of(inputs.attn_mask is not None, options.causal)
        shape = (x.shape[0], x.shape[1], x.shape[2], k.shape[2], x.shape[3])
        return CallClass(operation, dtype, wants_gradients(inputs), shape)
    assert isinstance(inputs, (NormInputs, ActivationInputs))
    described = rules.described(inputs, options)
    if described is None or described.operation not in OPERATION_NAMES:
        return None
    rows = described.elements // described.columns
    return CallClass(described.operation, dtype, described.needs_grad, (rows, described.columns))
