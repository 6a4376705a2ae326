"""Which kernels the tests run on a machine without a GPU: Triton's in its interpreter, CUDA's in their emulation."""

from __future__ import annotations

import importlib.util
import os

import emulated
import torch

if not torch.cuda.is_available():
    # before triton is imported: its kernels then take CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # before the cuda provider is imported: so does its emulation
    if emulated.compiler() is not None and "FUSEDNORM_EMULATE" not in os.environ:
        os.environ["FUSEDNORM_EMULATE"] = str(emulated.build_provider(sanitized=False))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

EMULATED = "FUSEDNORM_EMULATE" in os.environ
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and all(map(importlib.util.find_spec, ("triton", "numpy")))
if INTERPRETED:
    import interpreter

    interpreter.round_bfloat16_to_nearest()
    interpreter.sum_pairs_with_numpy()
    interpreter.leave_out_the_unread_overflow_check()
    interpreter.look_up_numpys_dtypes_once()
    interpreter.patch_the_language_once()
