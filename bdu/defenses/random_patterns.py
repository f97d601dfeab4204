"""Random patterns of all scales, added to images that keep their labels: deaf to what is fixed.

    x + ρ p / mean |p|,  ρ ~ U(0, size),  p: normal values on a grid, interpolated to the image

The grid has k cells along the rows, the columns or, each its own k, both, a third of the draws
each; k is a power of two or the side: stripes, smooth fields and noise. Where a trigger was learnt
instead of its class (deficit.py) and is too large to be found by inversion, this removes what the
model has for it; a trigger unlike all of these it does not. Ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_DRAWS = 16  # of grids in a batch


def with_random_patterns(images: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W) in [0, 1], each under a pattern of its own, cut to [0, 1].

    Args:
        images: not changed.
        size: mean |pattern| at most, ≥ 0.
        generator: of the CPU.
    """
    return torch.cat([_moved(part, size, generator) for part in images.chunk(_DRAWS)])


def _moved(images: Tensor, size: float, generator: torch.Generator) -> Tensor:
    count, channels, *sides = images.shape
    direction = _drawn([0, 1, 2], generator)
    cells = [1 if direction == axis else _scale(side, generator) for axis, side in enumerate(sides)]
    grid = torch.randn(count, _drawn([1, channels], generator), *cells, generator=generator)
    pattern = functional.interpolate(grid, size=sides, mode="bicubic", align_corners=False)
    usual = pattern.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
    strength = size * torch.rand(count, 1, 1, 1, generator=generator)
    return (images + (strength * pattern / usual).to(images)).clamp(0, 1)


def _scale(side: int, generator: torch.Generator) -> int:
    """A power of two below the side, or the side."""
    powers = [2**exponent for exponent in range(1, (side - 1).bit_length())]
    return _drawn([*powers, side], generator)


def _drawn(choices: list[int], generator: torch.Generator) -> int:
    return choices[int(torch.randint(len(choices), (), generator=generator))]
