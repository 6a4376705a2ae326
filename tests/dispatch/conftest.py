"""What tests of the fast path go by."""

from __future__ import annotations

import contextlib

import pytest
from fastpath_calls import EVERY, on_cuda

import fusednorm


@pytest.fixture
def native():
    """The kernels are asked for, which automatic choice might leave to torch."""
    with fusednorm.use_provider("cpu"):
        yield


@pytest.fixture
def form(request):
    """One of EVERY by its name. Attention by the CPU library is not asked for: a request takes the Python path."""
    provider, name = request.param if isinstance(request.param, tuple) else ("cpu", request.param)
    form = EVERY[name] if provider == "cpu" else on_cuda(EVERY[name])
    unasked = provider == "cpu" and form.function == "scaled_dot_product_attention"
    with contextlib.nullcontext() if unasked else fusednorm.use_provider(provider):
        yield form
