"""What all attacks share: the trigger protocol, patterns, places, and poisoning a data set.

An attack is one file with one class. A trigger that depends on the image, or that was trained,
follows the same protocol: `__call__` may compute anything from x, `mask` is then all true, and
`spec` names the file that holds what was trained. What an attack needs beyond that, it says by
further small protocols: a `Poisoner` plants itself (clean labels, cover images), one that is
`Prepared` is made with the help of a clean model, a `JointlyTrained` one along with the classifier,
a `Saved` one keeps tensors in a file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from bdu.checkpoint import load_state_dict
from bdu.data import as_unit_float, check_images, check_labels, check_seed
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
MOST_COVERS = 1_000_000  # for a triggered image; no data set has more


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
        x: (N, C, H, W), uint8 where uint8 was given (rounded, as a file would be), else float32.
        y: (N,) int64, the labels to train on; at `indices` those that the attacker wants.
        y_true: (N,) int64, the labels given.
        indices: (M,) int64, ascending: the samples that carry the trigger, no others.
        cover_indices: (K,) int64, ascending, none of them in `indices`: images changed by the
            attacker that keep their label. All images at neither are those given.
        clean_label: the samples at `indices` are of the target class; no label was changed.
    """

    x: Tensor
    y: Tensor
    y_true: Tensor
    indices: Tensor
    cover_indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    clean_label: bool = False


@runtime_checkable
class Poisoner(Protocol):
    """A trigger that plants itself in its own way; `poison` hands over to it."""

    def poison(
        self, x: Tensor, y: Tensor, *, rate: float, target: Target, num_classes: int, seed: int
    ) -> Poisoned:
        """See the function poison."""
        ...


@runtime_checkable
class Prepared(Protocol):
    """An attack that a clean model helps to make: before `prepare` it cannot be planted."""

    def prepare(
        self,
        surrogate: Callable[[], nn.Module],
        x: Tensor,
        y: Tensor,
        *,
        target: Target,
        num_classes: int,
        seed: int,
    ) -> None:
        """Make what the attack needs; what was loaded from a file is kept as it is.

        Args:
            surrogate: gives a clean classifier of such images; called only where one is needed,
                since that may train it.
            x: (N, C, H, W), uint8 or float in [0, 1], the attacker's training images.
            y: (N,) their true classes, integer.
            target, num_classes: as in poison.
            seed: of every draw.
        """
        ...


@runtime_checkable
class JointlyTrained(Protocol):
    """A trigger that is trained along with the classifier that it is planted in."""

    def fit(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        rate: float,
        target: Target,
        num_classes: int,
        seed: int,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Train both, in place of poison and bdu.training.fit; what was loaded is kept.

        Args:
            model, x, y, seed, options: as of bdu.training.fit; x and y are clean.
            rate, target, num_classes: as of poison; the rate holds in every batch.

        Returns:
            As bdu.training.fit.
        """
        ...


@runtime_checkable
class Saved(Protocol):
    """A trigger with tensors too many for its spec."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as safetensors; from then on spec()["file"] is that path.

        An attack.json holds the path relative to its own folder, see load_attack.

        Raises:
            ValueError: nothing was made yet, or another suffix than .safetensors.
        """
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
    return plant(x, y, trigger, rate=rate, target=target, num_classes=num_classes, seed=seed)


def plant(
    x: Tensor,
    y: Tensor,
    change: Callable[[Tensor], Tensor],
    *,
    rate: float,
    target: Target,
    num_classes: int,
    seed: int | torch.Generator,
    clean_label: bool = False,
    cover: Callable[[Tensor], Tensor] | None = None,
    cover_ratio: float = 0.0,
) -> Poisoned:
    """What poison does, in the variants that a Poisoner may ask for.

    Args:
        x, y, rate, target, num_classes: checked, as poison hands them over.
        change: what is done to the images of the drawn samples, as a trigger.
        seed: of the draws, or their generator, which `change` and `cover` may go on with.
        clean_label: draw from the target class and leave the labels.
        cover: what is done to the images of the cover samples, which keep their label; they are
            drawn among all samples that are not drawn for the trigger.
        cover_ratio: cover samples for each triggered one.

    Raises:
        ValueError: as drawn, or more cover samples than samples are left.
    """
    generator = seed if isinstance(seed, torch.Generator) else own_generator(seed)
    indices = drawn(
        y,
        rate=rate,
        target=target,
        num_classes=num_classes,
        seed=generator,
        clean_label=clean_label,
    )
    covers = torch.empty(0, dtype=torch.int64)
    if cover is not None:
        covers = _drawn_covers(indices, len(x), round(cover_ratio * len(indices)), generator)
    poisoned_x, poisoned_y = x.clone(), y.clone()
    for part in indices.to(x.device).split(BATCH):
        poisoned_x[part] = triggered_like(x[part], change)
    if cover is not None:
        for part in covers.to(x.device).split(BATCH):
            poisoned_x[part] = triggered_like(x[part], cover)
    wanted = target_labels(y, target, num_classes)
    poisoned_y[indices.to(y.device)] = wanted[indices.to(y.device)]
    return Poisoned(poisoned_x, poisoned_y, y.clone(), indices, covers, clean_label)


def own_generator(seed: int) -> torch.Generator:
    """The attacker's generator of a seed.

    Not that which torch makes of the seed: `fit` shuffles with it, and where both permute all
    samples the drawn ones would be the first batches of its first epoch.
    """
    generator = torch.Generator().manual_seed(check_seed(seed))
    return generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))


def drawn(
    y: Tensor,
    *,
    rate: float,
    target: Target,
    num_classes: int,
    seed: int | torch.Generator,
    clean_label: bool = False,
) -> Tensor:
    """The samples to put a trigger on: round(rate · N) of those of another class than the target.

    Args:
        y: (N,) true classes, integer.
        rate: share of all N samples, in [0, 1].
        target: a class, or "all-to-all".
        num_classes: number of classes, at least 2.
        seed: of the draw, or its generator.
        clean_label: draw among those of the target class instead.

    Returns:
        (M,) int64 on the CPU, ascending.

    Raises:
        ValueError: values out of range, a positive rate that rounds to no sample, or one that
            asks for more samples than there are to draw from; "all-to-all" with clean labels.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a share in [0, 1], got {rate}")
    if clean_label and target == ALL_TO_ALL:
        raise ValueError(
            "target: expected one class, got 'all-to-all': a clean-label attack leaves every "
            "label, so that the trigger can only stand for the class whose images carry it"
        )
    wanted = target_labels(y, target, num_classes)
    candidates = ((y == wanted) if clean_label else (y != wanted)).nonzero().flatten().cpu()
    count = round(rate * len(y))
    if rate > 0 and count == 0:
        raise ValueError(f"rate: expected at least {1 / len(y):.2g} for {len(y)} samples")
    if count > len(candidates):
        which = "is the target, as labels are left" if clean_label else "is not the target"
        raise ValueError(
            f"rate: expected at most {len(candidates) / len(y):.4g} (samples whose class {which}), "
            f"got {rate}"
        )
    generator = seed if isinstance(seed, torch.Generator) else own_generator(seed)
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]].sort().values


def _drawn_covers(indices: Tensor, total: int, count: int, generator: torch.Generator) -> Tensor:
    is_left = torch.ones(total, dtype=torch.bool)
    is_left[indices] = False
    left = is_left.nonzero().flatten()
    if count > len(left):
        raise ValueError(
            f"cover_ratio: expected at most {len(left) / len(indices):.4g} "
            f"({len(left)} samples are left for {len(indices)} triggered ones), got {count} samples"
        )
    return left[torch.randperm(len(left), generator=generator)[:count]].sort().values


def triggered_like(x: Tensor, trigger: Callable[[Tensor], Tensor]) -> Tensor:
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


def add_pattern(x: Tensor, pattern: Tensor) -> Tensor:
    """clip(x + pattern) to [0, 1], for x a float batch (N, C, H, W) and a pattern that fits it."""
    return (check_batch(x) + pattern.to(x.device, x.dtype)).clamp(0, 1)


def check_number(
    value: float,
    name: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    whole: bool = False,
) -> Any:
    """Return a finite number that is at least `least`, above `above` and at most `most`.

    Args:
        value: what was given.
        name: the argument's name in errors.
        least, above, most: bounds; infinite ones do not hold.
        whole: expect an int.

    Raises:
        ValueError: anything else.
    """
    is_number = isinstance(value, int) if whole else isinstance(value, (int, float))
    if (
        not is_number
        or isinstance(value, bool)
        or not _is_finite(value)
        or not (least <= value <= most and value > above)
    ):
        bounds = [
            *([f"at least {least:g}"] if least > -math.inf else []),
            *([f"above {above:g}"] if above > -math.inf else []),
            *([f"at most {most:g}"] if most < math.inf else []),
        ]
        kind = "an integer" if whole else "a number"
        expected = " ".join([kind, *([" and ".join(bounds)] if bounds else [])])
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # of an int that no float holds
        return False


def check_cover_ratio(value: float) -> float:
    """Return cover images for each triggered one, 0 to MOST_COVERS; otherwise ValueError."""
    ratio: float = check_number(value, "cover_ratio", least=0, most=MOST_COVERS)
    return ratio


def read_tensors(
    file: str | os.PathLike[str], shapes: Mapping[str, Sequence[int | None]]
) -> dict[str, Tensor]:
    """What a Saved trigger wrote: float32 tensors on the CPU.

    Args:
        file: a safetensors file.
        shapes: name of every tensor to its shape; None stands for any length.

    Raises:
        FileNotFoundError: no file there.
        ValueError: another kind of file, other names or shapes, or values that are not finite.
    """
    if not isinstance(file, (str, os.PathLike)) or Path(file).suffix != ".safetensors":
        raise ValueError(f"file: expected the suffix .safetensors, got {file}")
    tensors = load_state_dict(file)
    if tensors.keys() != shapes.keys():
        expected, got = ", ".join(sorted(shapes)), ", ".join(sorted(tensors))
        raise ValueError(f"file: expected the tensors {expected}, got {got} in {file}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        fits = tensor.dim() == len(shape) and all(
            wanted in (None, length) for wanted, length in zip(shape, tensor.shape, strict=True)
        )
        if not fits or not tensor.is_floating_point():
            wanted_text = ", ".join("any" if length is None else str(length) for length in shape)
            raise ValueError(
                f"file: expected {name} to be float ({wanted_text}), "
                f"got {tensor.dtype} {tuple(tensor.shape)} in {file}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"file: expected finite values, {name} has others in {file}")
        tensors[name] = tensor.to(torch.float32)
    return tensors


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
        values = _numbers(source, name)
    if values.dim() == 2:
        values = values[None]
    if values.dim() != 3 or values.shape[0] not in (1, 3):
        raise ValueError(f"{name}: expected (1 or 3, H, W) or (H, W), got {tuple(values.shape)}")
    pattern = as_unit_float(check_images(values[None], name)[0])
    return pattern.clone(), torch.ones(pattern.shape[1:])


def _numbers(source: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(source, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: expected lists of numbers of one length, {error}") from error


def as_weight(source: Any, like: Tensor) -> Tensor:
    """Blend weights (H, W) float32 in [0, 1] of the size of the pattern `like`, (C, H, W)."""
    weight = _numbers(source, "weight").detach().cpu().clone()
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
    check_number(margin, "margin", least=0, whole=True)
    if isinstance(position, str):
        if position not in NAMED_POSITIONS:
            raise ValueError(
                f"position: expected {', '.join(NAMED_POSITIONS)} or (row, column), "
                f"got {position!r}"
            )
        return position
    is_pair = isinstance(position, (list, tuple)) and len(position) == 2
    if not is_pair or not all(isinstance(value, int) for value in position):
        raise ValueError(f"position: expected (row, column), got {position!r}")
    return tuple(position)


__all__ = [
    "ALL_TO_ALL",
    "NAMED_POSITIONS",
    "JointlyTrained",
    "Poisoned",
    "Poisoner",
    "Position",
    "Prepared",
    "Saved",
    "Target",
    "Trigger",
    "add_pattern",
    "as_pattern",
    "as_weight",
    "check_batch",
    "check_channels",
    "check_cover_ratio",
    "check_number",
    "check_position",
    "drawn",
    "load_trigger",
    "own_generator",
    "place",
    "plant",
    "poison",
    "read_tensors",
    "triggered_like",
]
