"""Launch configurations in the user's file: by "triton/forward/4096/2/0", a provider and a place, the form's numbers.

A place is a direction, columns, bytes of an element, and the provider's class of other loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..providers.forms import DIRECTIONS, WITH_FORMS, Place
from ..providers.triton import norm_config
from ..providers.triton.config import form_of

Numbers = tuple[int, ...]
Forms = dict[str, dict[Place, Numbers]]  # by provider
CUDA_NUMBERS = {"forward": 4, "backward": 3}  # of a form; the library's own lists have four in both


def name_of(provider: str, place: Place) -> str:
    return f"{provider}/{'/'.join(map(str, place))}"


def read(content: Mapping[str, Any]) -> Forms:
    """The forms of a file.

    Raises:
        ValueError: there is no such kernel, or a form cannot be launched.
    """
    found: Forms = {provider: {} for provider in WITH_FORMS}
    for name, numbers in content.items():
        provider, direction, *sizes = name.split("/")
        if provider not in found or direction not in DIRECTIONS or len(sizes) != 3:
            raise ValueError(f"forms: no kernel is called {name!r}")
        place = Place(direction, *map(int, sizes))
        if provider == "triton":
            norm_config.check(place, form_of(numbers))
        elif len(numbers) != CUDA_NUMBERS[direction] or not all(type(n) is int and 0 <= n < 1 << 16 for n in numbers):
            raise ValueError(f"forms: {name}: {numbers}")  # the library looks at the rest when it takes them
        found[provider][place] = tuple(numbers)
    return found


def packed(index: int, forms: Mapping[Place, Numbers]) -> list[int]:
    """The forms of a GPU as ``fusednorm_cuda::keep`` takes them."""
    found: list[int] = []
    for place, numbers in forms.items():
        found += [index, DIRECTIONS.index(place.direction), place.columns, place.itemsize]
        found += [*numbers, *[0] * (4 - len(numbers))]
    return found
