"""What a launch configuration of a norm kernel is kept by, in the providers whose kernels have several."""

from __future__ import annotations

from typing import NamedTuple

WITH_FORMS = ("cuda", "triton")  # the providers whose norm kernels have forms
DIRECTIONS = ("forward", "backward")


class Place(NamedTuple):
    """The rows that a form is for.

    Their number is left out, so that a row's result does not depend on the batch around it.
    """

    direction: str  # of DIRECTIONS
    columns: int
    itemsize: int  # of the widest rows; 8 where float64 is computed in
    load: int = 0  # how many registers the call takes besides, by the provider's own classes
