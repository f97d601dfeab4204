"""FTrojan: two frequencies of the colour channels made stronger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdu.attacks.trigger import add_pattern, check_batch, check_number

# Red, green and blue of one unit of U and of V (ITU-R BT.601).
RGB_OF_U = (0.0, -0.394642, 2.032062)
RGB_OF_V = (1.139883, -0.580622, 0.0)


class FTrojan:
    """x' = clip(RGB(IDCT(DCT(YUV(x)) + m at (u, v) of U and V))), window by window.

    The DCT is the orthonormal DCT-II of a window. As every step but the last is linear, this is
    an addition of the waves m φ_u(i) φ_v(j), φ_u(i) = √(2/w) cos(π u (2i + 1) / 2w), coloured as
    U + V, and is computed so; √(1/w) for u = 0. Whole windows are tiled from the top left; what
    is left of the image at the right and at the bottom stays as it is. A grey image has no U and
    V: its only channel gets the waves (our reading).

    Args:
        magnitude: m in units of images in [0, 1], not 0.
        window: w, height and width of a window in pixels, at least 2.
        frequencies: pairs (u, v), each in [0, w).

    Raises:
        ValueError: values out of range; at the call, images smaller than a window or with another
            number of channels than 1 or 3.

    Source: Wang et al. 2022, section 4. There YUV is rounded to 8 bits in between; ours is not.
    """

    name = "ftrojan"

    def __init__(
        self,
        *,
        magnitude: float = 30 / 255,
        window: int = 32,
        frequencies: Sequence[Sequence[int]] = ((15, 15), (31, 31)),
    ) -> None:
        self.magnitude = check_number(magnitude, "magnitude")
        if magnitude == 0:
            raise ValueError("magnitude: expected a number other than 0, got 0")
        self.window = check_number(window, "window", least=2, whole=True)
        is_list = isinstance(frequencies, (list, tuple)) and len(frequencies) > 0
        if not is_list or not all(
            isinstance(pair, (list, tuple))
            and len(pair) == 2
            and all(isinstance(value, int) and 0 <= value < window for value in pair)
            for pair in frequencies
        ):
            raise ValueError(
                f"frequencies: expected pairs of integers from 0 to {window - 1} (window - 1), "
                f"got {frequencies!r}"
            )
        self.frequencies = tuple((int(u), int(v)) for u, v in frequencies)

    def _waves(self, shape: Sequence[int]) -> Tensor:
        height, width = shape[-2:]
        if min(height, width) < self.window:
            raise ValueError(
                f"window: expected at most {min(height, width)} for images of {height}x{width}, "
                f"got {self.window}; frequencies have to be below it"
            )
        basis = dct_basis(self.window)
        tile = sum(self.magnitude * torch.outer(basis[u], basis[v]) for u, v in self.frequencies)
        assert isinstance(tile, Tensor)
        tile[tile.abs() < 1e-12 * tile.abs().max()] = 0.0
        across, down = width // self.window, height // self.window
        waves = torch.zeros(height, width, dtype=torch.float64)
        waves[: down * self.window, : across * self.window] = tile.repeat(down, across)
        return waves

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1], C = 1 or 3."""
        channels = check_batch(x).shape[1]
        if channels not in (1, 3):
            raise ValueError(f"x: expected 1 or 3 channels, got {channels}")
        waves = self._waves(x.shape)
        if channels == 1:
            return add_pattern(x, waves)
        colour = torch.tensor([RGB_OF_U, RGB_OF_V], dtype=torch.float64).sum(0)
        return add_pattern(x, colour[:, None, None] * waves)

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(H, W) bool, true where the waves are not 0; shape is (..., H, W)."""
        return self._waves(shape) != 0

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it."""
        return {
            "name": self.name,
            "magnitude": self.magnitude,
            "window": self.window,
            "frequencies": [list(pair) for pair in self.frequencies],
        }


def dct_basis(size: int) -> Tensor:
    """(size, size) float64: row u is φ_u(i) of the orthonormal DCT-II."""
    places = torch.arange(size, dtype=torch.float64)
    angles = math.pi / (2 * size) * torch.outer(places, 2 * places + 1)
    basis = math.sqrt(2 / size) * torch.cos(angles)
    basis[0] = math.sqrt(1 / size)
    return basis
