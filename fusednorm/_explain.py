"""``explain``: which provider serves a call, how, and why not another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import providers


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Say which provider serves ``function(*args, **kwargs)``, how, and why each provider before it was passed over.

    The call is made once, with its results thrown away and torch's random state restored (a module's own buffers
    change as in any call); `function` may be one of
    this package's functions, a module, a whole model, or any callable that reaches them.

    Returns:
        A line for each decision made during the call, with the refusals indented below it.

    Raises:
        TypeError: `function` cannot be called.
        Whatever the call raises.
    """
    if not callable(function):
        raise TypeError(f"function: expected a function or a module, as fusednorm.layer_norm, got {function!r}")
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), providers.recording() as routes:
        function(*args, **kwargs)
    if not routes:
        name = getattr(function, "__name__", type(function).__name__)
        return f"{name}: no function of fusednorm was called"
    return "\n".join(str(route) for route in routes)
