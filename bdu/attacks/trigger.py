"""What all attacks share: the trigger protocol, patterns, places, and poisoning a data set.

An attack is one file with one class. A trigger that depends on the image, or that was trained,
follows the same protocol: `__call__` may compute anything from x, `mask` is then all true, and
`spec` names the file that holds what was trained. Where planting is more than putting the trigger
on chosen images and relabelling them (clean labels, cover images), the class is a `Poisoner` too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bdu.data import as_unit_float, check_images, check_labels
from bdu.metrics import ALL_TO_ALL, Target, target_labels

NamedPosition = Literal["top-left", "top-right", "bottom-left", "bottom-right", "center"]
Position = NamedPosition | Sequence[int]
NAMED_POSITIONS: tuple[NamedPosition, ...] = (
    "top-left",
    "top-right",
    "bottom-left",
    "bottom-right",
    "center",
)
PatternSource = str | os.PathLike[str] | Tensor | np.ndarray | Sequence[Any]
BATCH = 1024


class Trigger(Protocol):
    """Puts a trigger on images."""

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1], on its device, in its dtype."""
        ...

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(H, W) bool on the CPU, true where a pixel can change; shape is (..., H, W)."""
        ...

    def spec(self) -> dict[str, Any]:
        """JSON-able options; make_attack(**spec) gives an equal trigger."""
        ...


@dataclass
class Poisoned:
    """A training set with a backdoor in it.

    Attributes:
        x: (N, C, H, W), dtype of the images given (uint8 is rounded, as a file would be).
        y: (N,) int64, the labels to train on; at `indices` those that the attacker wants.
        y_true: (N,) int64, the labels given.
        indices: (M,) int64, ascending: the samples that carry the trigger, no others.
    """

    x: Tensor
    y: Tensor
    y_true: Tensor
    indices: Tensor


@runtime_checkable
class Poisoner(Protocol):
    """A trigger that plants itself in its own way; `poison` hands over to it."""

    def poison(
        self, x: Tensor, y: Tensor, *, rate: float, target: Target, num_classes: int, seed: int
    ) -> Poisoned:
        """See the function poison."""
        ...


def poison(
    x: Tensor,
    y: Tensor,
    trigger: Trigger,
    *,
    rate: float,
    target: Target,
    num_classes: int,
    seed: int,
) -> Poisoned:
    """Put the trigger on round(rate · N) samples and give them the attacker's label.

    The samples are drawn among those whose class is not the target: all-to-one never poisons
    the target class itself, all-to-all draws from every class.

    Args:
        x: (N, C, H, W), uint8 or float in [0, 1]; not changed.
        y: (N,) true classes, integer; not changed.
        trigger: see Trigger; one that is a Poisoner does the whole work itself.
        rate: share of all N samples, in [0, 1]; 0 gives a clean control.
        target: a class, or "all-to-all": (y + 1) mod num_classes.
        num_classes: number of classes, at least 2.
        seed: of the draw.

    Raises:
        ValueError: values out of range, a positive rate that rounds to no sample, or one that
            asks for more samples than are not of the target class.
    """
    x, y = check_images(x), check_labels(y, num_classes)
    if len(x) != len(y):
        raise ValueError(f"y: expected {len(x)} labels, as x, got {len(y)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a share in [0, 1], got {rate}")
    if isinstance(trigger, Poisoner):
        return trigger.poison(x, y, rate=rate, target=target, num_classes=num_classes, seed=seed)
    wanted = target_labels(y, target, num_classes)
    candidates = (y != wanted).nonzero().flatten().cpu()
    count = round(rate * len(x))
    if rate > 0 and count == 0:
        raise ValueError(f"rate: expected at least {1 / len(x):.2g} for {len(x)} samples")
    if count > len(candidates):
        raise ValueError(
            f"rate: expected at most {len(candidates) / len(x):.4g} (samples whose class is not "
            f"the target), got {rate}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(candidates), generator=generator)[:count]
    indices = candidates[drawn].sort().values
    poisoned_x, poisoned_y = x.clone(), y.clone()
    for part in indices.to(x.device).split(BATCH):
        poisoned_x[part] = triggered_like(x[part], trigger)
    poisoned_y[indices.to(y.device)] = wanted[indices.to(y.device)]
    return Poisoned(poisoned_x, poisoned_y, y.clone(), indices)


def triggered_like(x: Tensor, trigger: Trigger) -> Tensor:
    """trigger(x) in x's own dtype; for uint8 the triggered image is rounded to 256 levels."""
    if len(x) == 0:
        return x.clone()
    images = trigger(as_unit_float(x))
    if x.dtype == torch.uint8:
        return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)
    return images.to(x.dtype)


def check_batch(x: Tensor) -> Tensor:
    """Return x where it is a float batch (N, C, H, W); otherwise raise ValueError."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected float (N, C, H, W), got {x.dtype} {tuple(x.shape)}")
    return x


def load_trigger(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor]:
    """Read a trigger picture.

    Args:
        path: picture, grey or RGB, with or without alpha.

    Returns:
        pattern (C, H, W), C = 1 for grey and 3 for RGB, and weight (H, W), both float32 in
        [0, 1]; the weight is alpha, or 1 everywhere.

    Raises:
        FileNotFoundError: no file there.
        ValueError: not a picture, more than 8 bits a channel, or alpha 0 everywhere.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"trigger: expected a picture, got {path}, which is not there")
    try:
        with Image.open(path) as opened:
            opened.load()
            image = opened.copy()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"trigger: expected a picture, cannot read {path}: {error}") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"trigger: expected 8 bits a channel, got mode {image.mode} in {path}")
    grey = image.mode in ("1", "L", "LA")
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    pixels = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1)
    unit = as_unit_float(pixels)
    weight = unit[3] if has_alpha else torch.ones_like(unit[3])
    if not bool((weight > 0).any()):
        raise ValueError(f"trigger: expected a picture that can be seen, alpha is 0 in {path}")
    return unit[:1].clone() if grey else unit[:3].clone(), weight.clone()


def as_pattern(source: PatternSource, name: str = "pattern") -> tuple[Tensor, Tensor]:
    """Turn a picture's path, a tensor, an array or nested lists into (pattern, weight).

    Args:
        source: a path for load_trigger, or values (C, H, W) or (H, W): uint8, or float in [0, 1].
        name: the argument's name in errors.

    Returns:
        As load_trigger.

    Raises:
        ValueError: another shape, or values outside [0, 1].
    """
    if isinstance(source, (str, os.PathLike)):
        return load_trigger(source)
    if isinstance(source, Tensor):
        values = source.detach().cpu()
    elif isinstance(source, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(source))
    else:
        values = torch.tensor(source, dtype=torch.float32)
    if values.dim() == 2:
        values = values[None]
    if values.dim() != 3 or values.shape[0] not in (1, 3):
        raise ValueError(f"{name}: expected (1 or 3, H, W) or (H, W), got {tuple(values.shape)}")
    pattern = as_unit_float(check_images(values[None], name)[0])
    return pattern.clone(), torch.ones(pattern.shape[1:])


def as_weight(source: Any, like: Tensor) -> Tensor:
    """Blend weights (H, W) float32 in [0, 1] of the size of the pattern `like`, (C, H, W)."""
    weight = torch.as_tensor(source, dtype=torch.float32).detach().cpu().clone()
    if weight.shape != like.shape[1:]:
        expected = tuple(like.shape[1:])
        raise ValueError(f"weight: expected {expected} (the pattern), got {tuple(weight.shape)}")
    check_images(weight[None, None], "weight")
    return weight


def check_channels(pattern: Tensor, channels: int) -> None:
    """Raise ValueError where a pattern (C, H, W) of 3 channels meets images of another number."""
    if pattern.shape[0] not in (1, channels):
        raise ValueError(f"trigger: expected 1 or {channels} channels, got {pattern.shape[0]}")


def place(
    position: Position, margin: int, size: Sequence[int], image_size: Sequence[int]
) -> tuple[int, int]:
    """Row and column of a pattern's top left pixel.

    Args:
        position: one of NAMED_POSITIONS, or (row, column).
        margin: pixels kept free at the borders that a named corner touches.
        size: height and width of the pattern.
        image_size: height and width of the image.

    Raises:
        ValueError: the pattern would not lie wholly within the image.
    """
    height, width = image_size
    if size[0] > height or size[1] > width:
        raise ValueError(
            f"trigger: expected at most {height}x{width} (the image), got {size[0]}x{size[1]}"
        )
    if isinstance(position, str):
        vertical, _, horizontal = position.partition("-")
        rows = {"top": margin, "center": (height - size[0]) // 2}
        columns = {"left": margin, "": (width - size[1]) // 2}
        row = rows.get(vertical, height - size[0] - margin)
        column = columns.get(horizontal, width - size[1] - margin)
    else:
        row, column = position
    if not (0 <= row <= height - size[0] and 0 <= column <= width - size[1]):
        raise ValueError(
            f"position: expected a {size[0]}x{size[1]} trigger within {height}x{width}, "
            f"got row {row}, column {column}"
        )
    return row, column


def check_position(position: Position, margin: int) -> Position:
    """Return the position, a sequence as a tuple; raise ValueError where it names no place."""
    if margin < 0:
        raise ValueError(f"margin: expected 0 or more, got {margin}")
    if isinstance(position, str):
        if position not in NAMED_POSITIONS:
            raise ValueError(
                f"position: expected {', '.join(NAMED_POSITIONS)} or (row, column), "
                f"got {position!r}"
            )
        return position
    if len(position) != 2 or not all(isinstance(value, int) for value in position):
        raise ValueError(f"position: expected (row, column), got {position!r}")
    return tuple(position)


__all__ = [
    "ALL_TO_ALL",
    "NAMED_POSITIONS",
    "Poisoned",
    "Poisoner",
    "Position",
    "Target",
    "Trigger",
    "as_pattern",
    "as_weight",
    "check_batch",
    "check_channels",
    "check_position",
    "load_trigger",
    "place",
    "poison",
    "triggered_like",
]
