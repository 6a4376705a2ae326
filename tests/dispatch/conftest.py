"""What tests of the fast path go by."""

from __future__ import annotations

import contextlib

import pytest
from fastpath_calls import EVERY

import fusednorm


@pytest.fixture
def native():
    """The kernels are asked for, which automatic choice might leave to torch."""
    with fusednorm.use_provider("cpu"):
        yield


@pytest.fixture
def form(request):
    """One of EVERY by its name. Attention is not asked for: a request for it takes the Python path."""
    form = EVERY[request.param]
    attention = form.function == "scaled_dot_product_attention"
    with contextlib.nullcontext() if attention else fusednorm.use_provider("cpu"):
        yield form
