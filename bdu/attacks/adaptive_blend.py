"""Adaptive-Blend: a blend that is trained in pieces, beside cover images with pieces of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdu.attacks.blended import Blended
from bdu.attacks.trigger import (
    PatternSource,
    Poisoned,
    Target,
    check_cover_ratio,
    check_number,
    own_generator,
    plant,
)

MOST_PIECES = 64  # n² numbers are drawn for every image


class AdaptiveBlend(Blended):
    """At test x' = (1 − α) x + α pattern; in training α_train M, M half the pieces, in α's place.

    The image is cut into n x n pieces; M is 1 on a share of them, drawn for every image. Cover
    images get such pieces too and keep their label, so that only much of the pattern, and not a
    piece of it, stands for the target; triggered and clean images then lie close in the network.

    Args:
        pattern: as of Blended.
        alpha: α, the share at test, in (0, 1].
        train_alpha: α_train, in (0, 1].
        pieces: n, 2 to 64.
        kept: share of the pieces that a training image gets, in (0, 1].
        cover_ratio: cover images for each triggered one, at least 0.
        seed: of the default pattern, as of Blended.
        weight: as of Blended.

    Raises:
        ValueError: values out of range; at the call, channels that do not fit.

    Source: Qi et al. 2023 ("Revisiting the assumption of latent separability"), Adaptive-Blend.
    """

    name = "adaptive-blend"

    def __init__(
        self,
        pattern: PatternSource | None = None,
        *,
        alpha: float = 0.2,
        train_alpha: float = 0.15,
        pieces: int = 4,
        kept: float = 0.5,
        cover_ratio: float = 1.0,
        seed: int = 0,
        weight: Tensor | Sequence[Any] | None = None,
    ) -> None:
        super().__init__(pattern, alpha=alpha, seed=seed, weight=weight)
        self.train_alpha = check_number(train_alpha, "train_alpha", above=0, most=1)
        self.pieces = check_number(pieces, "pieces", least=2, most=MOST_PIECES, whole=True)
        self.kept = check_number(kept, "kept", above=0, most=1)
        self.cover_ratio = check_cover_ratio(cover_ratio)

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1], with the whole pattern."""
        return super().__call__(x).clamp(0, 1)

    def in_pieces(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """What training images are: round(kept · n²) pieces of the pattern, drawn for each."""
        total = self.pieces**2
        drawn = torch.rand(len(x), total, generator=generator).argsort(1)
        chosen = drawn < max(1, round(self.kept * total))
        height, width = x.shape[-2:]
        rows = torch.arange(height) * self.pieces // height
        columns = torch.arange(width) * self.pieces // width
        shown = chosen[:, self.pieces * rows[:, None] + columns[None, :]].to(x.device)
        share = (self.train_alpha * self._weight_for(x.shape)).to(x.device, x.dtype)
        share = (share * shown)[:, None]
        return (1 - share) * x + share * self._pattern_for(x.shape).to(x.device, x.dtype)

    def poison(
        self, x: Tensor, y: Tensor, *, rate: float, target: Target, num_classes: int, seed: int
    ) -> Poisoned:
        """Pieces on triggered images and on cover images, which keep their label; see poison."""
        generator = own_generator(seed)

        def change(images: Tensor) -> Tensor:
            return self.in_pieces(images, generator)

        return plant(
            x,
            y,
            change,
            rate=rate,
            target=target,
            num_classes=num_classes,
            seed=generator,
            cover=change,
            cover_ratio=self.cover_ratio,
        )

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it, with the pattern's own values and no path."""
        return {
            **super().spec(),
            "train_alpha": self.train_alpha,
            "pieces": self.pieces,
            "kept": self.kept,
            "cover_ratio": self.cover_ratio,
        }
