"""``accelerate`` and ``restore``: a whole model, one instance at a time."""

from __future__ import annotations

from .model import accelerate, restore
from .report import Entry, Report, Saving

__all__ = ["Entry", "Report", "Saving", "accelerate", "restore"]
