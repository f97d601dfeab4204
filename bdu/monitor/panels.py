"""Heat maps as pictures: laid over the image, with the trigger's outline drawn around."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

Pixels = npt.NDArray[np.uint8]

# Dark blue over grey to yellow: as light as it is hot, and alike for all kinds of colour vision
# (cividis; Nuñez, Anderton and Renslow 2018, doi:10.1371/journal.pone.0199239).
_ANCHORS = np.array(
    [[0, 32, 77], [65, 77, 107], [124, 123, 120], [187, 175, 113], [255, 234, 70]], dtype=np.float64
)


def colours(heat: npt.NDArray[np.floating]) -> Pixels:
    """(..., 3) of heat in [0, 1]."""
    position = np.clip(heat, 0, 1) * (len(_ANCHORS) - 1)
    channels = [np.interp(position, np.arange(len(_ANCHORS)), _ANCHORS[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def as_pixels(images: Tensor) -> Pixels:
    """(N, H, W, 3) of images (N, C, H, W), uint8 or float in [0, 1]; one channel is grey."""
    values = images.detach().cpu()
    if values.is_floating_point():
        values = (values.clamp(0, 1) * 255).round()
    pixels = values.to(dtype=values.dtype).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    if pixels.shape[3] == 1:
        pixels = pixels.repeat(3, 3)
    return pixels[..., :3]


def overlay(pixels: Pixels, heat: npt.NDArray[np.floating], strength: float = 0.6) -> Pixels:
    """Heat maps over grey images.

    Args: pixels: (N, H, W, 3); heat: (N, H, W), ≥ 0, each scaled to its own largest value.
    """
    grey = pixels.mean(3, keepdims=True)
    mixed = (1 - strength) * grey + strength * colours(scaled(heat))
    return mixed.round().astype(np.uint8)


def scaled(heat: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Maps (N, H, W), ≥ 0, each divided by its own largest value; one of zeros stays."""
    largest = heat.max((1, 2), keepdims=True)
    return np.divide(heat, largest, out=np.zeros_like(heat), where=largest > 0)


def enlarged(pixels: Pixels, factor: int) -> Pixels:
    """Every pixel as a square of factor × factor."""
    return pixels.repeat(factor, 0).repeat(factor, 1)


def outlined(pixels: Pixels, mask: npt.NDArray[np.bool_], factor: int) -> Pixels:
    """One enlarged image with the border of a mask drawn dashed in black and white.

    Args: pixels: (H, W, 3); mask: (H, W).
    """
    large = enlarged(pixels, factor)
    if mask.all() or not mask.any():
        return large
    inside = enlarged(mask[..., None].astype(np.uint8), factor)[..., 0].astype(bool)
    padded = np.pad(inside, 1, mode="edge")
    around = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    rows, columns = np.nonzero(inside & ~around)
    dark = (rows + columns) // 3 % 2 == 0
    large = large.copy()
    large[rows, columns] = np.where(dark, 0, 255)[:, None]
    return large


def sheet(rows: Sequence[Sequence[Pixels]], gap: int = 4) -> Pixels:
    """Pictures of one size in rows on grey, a gap around each; rows may be short at their end."""
    height, width, _ = rows[0][0].shape
    columns = max(len(row) for row in rows)
    size = (gap + len(rows) * (height + gap), gap + columns * (width + gap), 3)
    whole = np.full(size, 128, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            whole[top : top + height, left : left + width] = picture
    return whole


def data_uri(pixels: Pixels) -> str:
    """A PNG for an ``<img src>``, so that a page needs no other file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
