"""BPP: the image in few levels a channel, with the rounding error spread by dithering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdu.attacks.trigger import (
    Poisoned,
    Target,
    check_batch,
    check_cover_ratio,
    check_number,
    own_generator,
    plant,
)
from bdu.data import as_unit_float

MOST_LEVELS = 256  # of a file
# Floyd and Steinberg's shares of an error, by the pixel that takes it: right, below left, below,
# below right.
RIGHT, BELOW_LEFT, BELOW, BELOW_RIGHT = 7 / 16, 3 / 16, 5 / 16, 1 / 16


class BPP:
    """x' = round((n − 1) v) / (n − 1), n levels a channel, v = x plus the errors of neighbours.

    With dithering a pixel's error v − x' goes on to the neighbours that come later in reading
    order, in Floyd and Steinberg's shares; without it v = x. Cover images get what the trigger
    adds to another image, x + (T(z) − z), and keep their label: not any change of that size
    leads to the target, only that which fits the image.

    Args:
        levels: n, the "squeeze number", 2 to 256.
        dither: spread the error.
        cover_ratio: cover images for each triggered one, at least 0.

    Raises:
        ValueError: values out of range.

    Source: Wang, Zhai and Ma 2022 (BppAttack); Floyd and Steinberg 1976. Triggered and cover
    images drawn once and not in every batch, and as many of these as of those, are our reading;
    its contrastive adversarial training is left out.
    """

    name = "bpp"

    def __init__(self, *, levels: int = 8, dither: bool = True, cover_ratio: float = 1.0) -> None:
        self.levels = check_number(levels, "levels", least=2, most=MOST_LEVELS, whole=True)
        if not isinstance(dither, bool):
            raise ValueError(f"dither: expected true or false, got {dither!r}")
        self.dither = dither
        self.cover_ratio = check_cover_ratio(cover_ratio)

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1]."""
        check_batch(x)
        # half precision does not hold the errors
        scaled = x.to(x.dtype if x.dtype == torch.float64 else torch.float32) * (self.levels - 1)
        if self.dither:
            result = dithered(scaled, self.levels - 1)
        else:
            result = scaled.round().clamp(0, self.levels - 1)
        return (result / (self.levels - 1)).to(x.dtype)

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(H, W) bool, all true; shape is (..., H, W)."""
        return torch.ones(tuple(shape[-2:]), dtype=torch.bool)

    def poison(
        self, x: Tensor, y: Tensor, *, rate: float, target: Target, num_classes: int, seed: int
    ) -> Poisoned:
        """Triggered images, and cover images that keep their label; see the function poison."""
        generator = own_generator(seed)

        def with_others_residual(images: Tensor) -> Tensor:
            others = torch.randint(len(x), (len(images),), generator=generator)
            other = as_unit_float(x[others.to(x.device)])
            return (images + self(other) - other).clamp(0, 1)

        return plant(
            x,
            y,
            self,
            rate=rate,
            target=target,
            num_classes=num_classes,
            seed=generator,
            cover=with_others_residual,
            cover_ratio=self.cover_ratio,
        )

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it."""
        return {
            "name": self.name,
            "levels": self.levels,
            "dither": self.dither,
            "cover_ratio": self.cover_ratio,
        }


def dithered(x: Tensor, most: int) -> Tensor:
    """Round (N, C, H, W) to whole numbers in [0, most], spreading the error.

    A pixel (i, j) needs those at (i, j − 1) and (i − 1, j − 1 … j + 1), so all pixels of equal
    2i + j can be done at once: 2H + W − 2 steps for the whole batch.
    """
    height, width = x.shape[-2:]
    result = torch.empty_like(x)
    # a row above and a column on each side, where there is no error
    error = x.new_zeros(*x.shape[:2], height + 1, width + 2)
    for step in range(2 * height + width - 2):
        rows = torch.arange(max(0, (step - width + 2) // 2), min(height, step // 2 + 1))
        rows = rows.to(x.device)
        columns = step - 2 * rows
        value = (
            x[:, :, rows, columns]
            + RIGHT * error[:, :, rows + 1, columns]
            + BELOW_RIGHT * error[:, :, rows, columns]
            + BELOW * error[:, :, rows, columns + 1]
            + BELOW_LEFT * error[:, :, rows, columns + 2]
        )
        rounded = value.round().clamp(0, most)
        result[:, :, rows, columns] = rounded
        error[:, :, rows + 1, columns + 1] = value - rounded
    return result
