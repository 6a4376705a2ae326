from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

if not dist.is_available():
    collect_ignore_glob = ["test_*.py"]  # this torch is built without torch.distributed
else:
    from ranks import Ranks

    @pytest.fixture(scope="session")
    def two() -> Iterator[Ranks]:
        """Two processes of one gloo group: ``two(function, *args)`` runs a function of a test module in each."""
        ranks = Ranks(2)
        yield ranks
        ranks.close()

    @pytest.fixture(scope="session")
    def four() -> Iterator[Ranks]:
        ranks = Ranks(4)
        yield ranks
        ranks.close()
