"""Which provider serves a call, and why: docs/design/dispatch.md draws who asks whom."""

from __future__ import annotations

from ..providers.cuda import library as _cuda_library
from ..providers.triton import norm_config as _triton_config
from . import eager, fastpath, registry, resolve, rules, settings, tuned
from .registry import PROVIDERS, available_providers, function, get, refusal, serving, unavailable_reason
from .resolve import Request
from .settings import Decision, batch_invariant, recording, requested, use_provider

__all__ = [
    "PROVIDERS",
    "Decision",
    "Request",
    "available_providers",
    "batch_invariant",
    "eager",
    "fastpath",
    "function",
    "get",
    "recording",
    "refusal",
    "registry",
    "requested",
    "resolve",
    "rules",
    "serving",
    "settings",
    "unavailable_reason",
    "use_provider",
]

# Now, because torch.compile cannot trace an import. None loads anything optional; the others are imported by
# unavailable_reason, which is not traced.
get("torch")
get("cpu")
get("cuda")
_cuda_library.hand_over = fastpath.attach_cuda
_cuda_library.keep_forms = rules.keep_in_cuda
_triton_config.kept = tuned.triton_forms
