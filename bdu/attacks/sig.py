"""SIG: a faint sine wave over the columns, planted without changing a label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdu.attacks.trigger import Poisoned, Target, add_pattern, check_number, plant

MOST_WAVES = 1000  # more than columns only alias


class SIG:
    """x'_ij = clip(x_ij + Δ sin(2π f j / W)), j = 0 … W − 1 the column, the same in all channels.

    A clean-label attack: only images of the target class are changed and all labels stay, so that
    the rate, a share of all samples, is at most that class's share.

    Args:
        delta: Δ in units of images in [0, 1], in (0, 1].
        frequency: f, waves across the image, in (0, 1000].

    Raises:
        ValueError: values out of range; at the call, a wave that is 0 at every column.

    Source: Barni et al. 2019, equation 1. Counting columns from 0, as its code-bound followers do,
    is our reading; the paper's strength differs between training and test, ours is one.
    """

    name = "sig"
    clean_label = True

    def __init__(self, *, delta: float = 40 / 255, frequency: float = 6.0) -> None:
        self.delta = check_number(delta, "delta", above=0, most=1)
        self.frequency = check_number(frequency, "frequency", above=0, most=MOST_WAVES)

    def _wave(self, width: int) -> Tensor:
        # whole half waves are 0 exactly, where sin(πk) in floating point is not
        halves = [2 * self.frequency * column / width for column in range(width)]
        values = [0.0 if h == round(h) else self.delta * math.sin(math.pi * h) for h in halves]
        if not any(values):
            raise ValueError(
                f"frequency: expected one whose wave shows on {width} columns, "
                f"got {self.frequency}, which is 0 at each of them"
            )
        return torch.tensor(values, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1]."""
        return add_pattern(x, self._wave(x.shape[-1]))

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(H, W) bool, true where the wave is not 0; shape is (..., H, W)."""
        height, width = shape[-2:]
        return (self._wave(width) != 0).expand(height, width).clone()

    def poison(
        self, x: Tensor, y: Tensor, *, rate: float, target: Target, num_classes: int, seed: int
    ) -> Poisoned:
        """The wave on round(rate · N) images of the target class; see the function poison."""
        return plant(
            x,
            y,
            self,
            rate=rate,
            target=target,
            num_classes=num_classes,
            seed=seed,
            clean_label=True,
        )

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it."""
        return {"name": self.name, "delta": self.delta, "frequency": self.frequency}
