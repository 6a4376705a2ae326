"""Measures on the user's own machine which provider serves a call fastest, and keeps it for automatic choice."""

from __future__ import annotations

from .auto import autotune
from .run import Result, TooNoisy, tune
from .shapes import RecordedShapes, recording_shapes

__all__ = ["RecordedShapes", "Result", "TooNoisy", "autotune", "recording_shapes", "tune"]
