"""WaNet: a smooth warp of the image, the same for every image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bdu.attacks.trigger import (
    Poisoned,
    Target,
    check_batch,
    check_cover_ratio,
    check_number,
    own_generator,
    plant,
)

MOST_GRID = 256  # finer than that no image is


class WaNet:
    """x'(p) = x(M(p)), M(p) = clip(r (p + s ↑P(p) / size)) with pixel places p in [−1, 1]².

    P is a k x k field of vectors, uniform in [−1, 1]² and divided by its mean absolute value; ↑ is
    bicubic interpolation to the image, size its width and height, x(·) bilinear sampling. At s = 1
    a pixel moves by about half a pixel along each axis. Cover images are warped by M plus noise,
    uniform in ±1 / size and drawn for every pixel, and keep their label: a network that took any
    warp for the trigger would be wrong on them.

    Args:
        grid_size: k, 1 to 256.
        strength: s, positive. The paper's 0.5 takes a large network many epochs to see beside
            the cover images; a smaller one learns 1 in a few.
        rescale: r, that keeps places within the image, in (0, 1].
        seed: of P; the same on every device.
        cover_ratio: cover images for each triggered one, at least 0.

    Raises:
        ValueError: values out of range.

    Source: Nguyen and Tran 2021, section 3. The paper draws triggered and cover images anew in
    every batch; a data set that is poisoned once holds one draw, which is our reading of it.
    """

    name = "wanet"

    def __init__(
        self,
        *,
        grid_size: int = 4,
        strength: float = 1.0,
        rescale: float = 1.0,
        seed: int = 0,
        cover_ratio: float = 2.0,
    ) -> None:
        self.grid_size = check_number(grid_size, "grid_size", least=1, most=MOST_GRID, whole=True)
        self.strength = check_number(strength, "strength", above=0)
        self.rescale = check_number(rescale, "rescale", above=0, most=1)
        self.seed = check_number(seed, "seed", least=0, whole=True)
        self.cover_ratio = check_cover_ratio(cover_ratio)

    def places(self, shape: Sequence[int]) -> Tensor:
        """(H, W, 2) float32: where each pixel comes from, as (x, y) in [−1, 1]; (..., H, W)."""
        height, width = shape[-2:]
        generator = torch.Generator().manual_seed(self.seed)
        field = 2 * torch.rand(1, 2, self.grid_size, self.grid_size, generator=generator) - 1
        field = field / field.abs().mean()
        smooth = functional.interpolate(
            field, size=(height, width), mode="bicubic", align_corners=True
        )
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        straight = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
        moved = straight + self.strength * smooth[0].permute(1, 2, 0) / _size(shape)
        return (self.rescale * moved).clamp(-1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1]."""
        check_batch(x)
        return _sampled(x, self.places(x.shape)[None].expand(len(x), -1, -1, -1))

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(H, W) bool, all true; shape is (..., H, W)."""
        return torch.ones(tuple(shape[-2:]), dtype=torch.bool)

    def poison(
        self, x: Tensor, y: Tensor, *, rate: float, target: Target, num_classes: int, seed: int
    ) -> Poisoned:
        """Triggered images, and cover images that keep their label; see the function poison."""
        generator = own_generator(seed)
        places = self.places(x.shape)

        def with_noise(images: Tensor) -> Tensor:
            noise = 2 * torch.rand(len(images), *places.shape, generator=generator) - 1
            return _sampled(images, (places + noise / _size(images.shape)).clamp(-1, 1))

        return plant(
            x,
            y,
            self,
            rate=rate,
            target=target,
            num_classes=num_classes,
            seed=generator,
            cover=with_noise,
            cover_ratio=self.cover_ratio,
        )

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it."""
        return {
            "name": self.name,
            "grid_size": self.grid_size,
            "strength": self.strength,
            "rescale": self.rescale,
            "seed": self.seed,
            "cover_ratio": self.cover_ratio,
        }


def _size(shape: Sequence[int]) -> Tensor:
    height, width = shape[-2:]
    return torch.tensor([width, height], dtype=torch.float32)


def _sampled(x: Tensor, places: Tensor) -> Tensor:
    # half precision would put pixels at other places
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    warped = functional.grid_sample(
        x.to(dtype), places.to(x.device, dtype), mode="bilinear", align_corners=True
    )
    return warped.clamp(0, 1).to(x.dtype)
