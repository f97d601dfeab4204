"""BadNets: a small fixed patch at a fixed place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdu.attacks.trigger import (
    PatternSource,
    Position,
    as_pattern,
    as_weight,
    check_batch,
    check_channels,
    check_position,
    place,
)

CHECKERBOARD = ((1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0))


class BadNets:
    """x' = (1 − w) x + w pattern inside the patch, x elsewhere; w is 1, or the picture's alpha.

    Args:
        pattern: picture path, or values (C, H, W) or (H, W) in [0, 1]; the default is a 3x3
            checkerboard with white corners. One channel goes to all channels of the image.
        position: "top-left", "top-right", "bottom-left", "bottom-right", "center" or
            (row, column) of the patch's top left pixel.
        margin: pixels kept free between a named corner and the patch.
        weight: (H, W) in [0, 1], instead of 1 or the picture's alpha.

    Raises:
        ValueError: values out of range; at the call, a patch that does not fit the images.

    Source: Gu et al. 2017.
    """

    name = "badnets"

    def __init__(
        self,
        pattern: PatternSource = CHECKERBOARD,
        *,
        position: Position = "bottom-right",
        margin: int = 0,
        weight: Tensor | Sequence[Any] | None = None,
    ) -> None:
        self.pattern, self.weight = as_pattern(pattern)
        if weight is not None:
            self.weight = as_weight(weight, self.pattern)
        self.position = check_position(position, margin)
        self.margin = margin

    def _region(self, shape: Sequence[int]) -> tuple[slice, slice]:
        height, width = self.pattern.shape[1:]
        row, column = place(self.position, self.margin, (height, width), shape[-2:])
        return slice(row, row + height), slice(column, column + width)

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1]."""
        check_batch(x)
        check_channels(self.pattern, x.shape[1])
        rows, columns = self._region(x.shape)
        pattern = self.pattern.to(x.device, x.dtype)
        weight = self.weight.to(x.device, x.dtype)
        result = x.clone()
        result[:, :, rows, columns] = (1 - weight) * x[:, :, rows, columns] + weight * pattern
        return result

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(H, W) bool, true where the weight is above 0; shape is (..., H, W)."""
        rows, columns = self._region(shape)
        touched = torch.zeros(tuple(shape[-2:]), dtype=torch.bool)
        touched[rows, columns] = self.weight > 0
        return touched

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it, with the pattern's own values and no path."""
        position = self.position if isinstance(self.position, str) else list(self.position)
        return {
            "name": self.name,
            "pattern": self.pattern.tolist(),
            "position": position,
            "margin": self.margin,
            "weight": self.weight.tolist(),
        }
