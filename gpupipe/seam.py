"""Where the painted mouth meets the template: how wide the seam fades, and which pixels stay the template's."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gpupipe.errors import InputError

Blend = Literal["feather", "none"]

FEATHER = 8.0
"""Default width of the feathered seam, in pixels of the frame."""


def feather_width(blend: Blend, feather: float) -> float:
    """Width of the seam in pixels: 0 for ``blend="none"``.

    Raises:
        InputError: an unknown ``blend``, or a width that is negative or not finite.
    """
    if blend not in ("feather", "none"):
        raise InputError(f"blend is {blend!r}; expected feather or none")
    if not 0 <= feather < float("inf"):
        raise InputError(f"feather is {feather}; expected a width in pixels, 0 or more")
    return feather if blend == "feather" else 0.0


def keep_mask(parsing: Tensor) -> Tensor:
    """Return which pixels stay the template's: parsing colour BGR (0, 0, 255) or (255, 255, 255).

    uint8 (…, H, W, 3) BGR → bool (…, H, W).
    """
    blue, green, red = parsing.unbind(-1)
    return (red == 255) & (blue == green) & ((blue == 0) | (blue == 255))
