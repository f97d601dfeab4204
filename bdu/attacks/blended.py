"""Blended: a picture or noise mixed faintly into the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bdu.attacks.trigger import (
    PatternSource,
    as_pattern,
    as_weight,
    check_batch,
    check_channels,
    check_number,
)


class Blended:
    """x' = (1 − α) x + α pattern, over the whole image.

    Args:
        pattern: picture path, or values (C, H, W) or (H, W) in [0, 1], resized to the image
            (bilinear, antialiased); the default is uniform noise of the image's own shape. A
            picture's transparency multiplies α.
        alpha: share of the pattern, in (0, 1].
        seed: of the noise; the same for every image of a shape, on every device.
        weight: (H, W) in [0, 1] that multiplies α, instead of 1 or the picture's transparency.

    Raises:
        ValueError: values out of range, or weight without a pattern; at the call, channels that
            do not fit.

    Source: Chen et al. 2017.
    """

    name = "blended"

    def __init__(
        self,
        pattern: PatternSource | None = None,
        *,
        alpha: float = 0.1,
        seed: int = 0,
        weight: Tensor | Sequence[Any] | None = None,
    ) -> None:
        self.alpha = check_number(alpha, "alpha", above=0, most=1)
        self.seed = check_number(seed, "seed", whole=True)
        self.pattern: Tensor | None = None
        self.weight: Tensor | None = None
        if pattern is not None:
            self.pattern, self.weight = as_pattern(pattern)
            if weight is not None:
                self.weight = as_weight(weight, self.pattern)
        elif weight is not None:
            raise ValueError("weight: expected a pattern that it belongs to, got none")

    def _pattern_for(self, shape: Sequence[int]) -> Tensor:
        channels, height, width = shape[-3:]
        if self.pattern is None:
            generator = torch.Generator().manual_seed(self.seed)
            return torch.rand(channels, height, width, generator=generator)
        check_channels(self.pattern, channels)
        return _resized(self.pattern, height, width)

    def _weight_for(self, shape: Sequence[int]) -> Tensor:
        height, width = shape[-2:]
        if self.weight is None:
            return torch.ones(height, width)
        return _resized(self.weight[None], height, width)[0]

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1]."""
        check_batch(x)
        pattern = self._pattern_for(x.shape).to(x.device, x.dtype)
        share = (self.alpha * self._weight_for(x.shape)).to(x.device, x.dtype)
        return (1 - share) * x + share * pattern

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(H, W) bool, true where the pattern is mixed in; shape is (..., H, W)."""
        return self._weight_for(shape) > 0

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it, with the pattern's own values and no path."""
        return {
            "name": self.name,
            "pattern": None if self.pattern is None else self.pattern.tolist(),
            "alpha": self.alpha,
            "seed": self.seed,
            "weight": None if self.weight is None else self.weight.tolist(),
        }


def _resized(values: Tensor, height: int, width: int) -> Tensor:
    if tuple(values.shape[1:]) == (height, width):
        return values
    resized = functional.interpolate(
        values[None], size=(height, width), mode="bilinear", antialias=True
    )
    return resized[0].clamp(0, 1)
