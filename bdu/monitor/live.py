"""What watches a run as it goes: attention on the trigger, and loggers.

A callback is handed each line of the history and the model of that moment, and may return more
values for the line; those after it, and ``metrics.jsonl``, see them.
"""

from __future__ import annotations

import importlib
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bdu.checkpoint import atomic_write
from bdu.monitor.attention import attention_entropy, tar
from bdu.monitor.gradcam import grad_cam, target_layer
from bdu.monitor.panels import Pixels, as_pixels, outlined, overlay, scaled, sheet

SHOWN = 6
# Of a panel: pixels of a picture's height, at least, and pictures beside each other.
_SIDE, _BESIDE = 128, 3


class AttentionMonitor:
    """Heat maps of the attacker's target on a fixed probe, at every look.

    Adds to the line ``attention_strength``, the mean of all heat maps H (dead ones are 0): how much
    speaks for the attacker's class anywhere. What follows is relative to that, and means little
    where little is left. As means over the probe without dead maps (None where all are dead):
    ``tar_share``, ``tar_share_by_area`` and ``tar_ratio`` (see
    :class:`bdu.monitor.attention.TAR`; only with a mask that leaves something out),
    and ``attention_entropy``.

    Args:
        images: triggered images, (N, C, H, W), uint8 or float; a few dozen are enough.
        targets: the class the attacker wants: one for all, or (N,); fixed for the whole run.
        mask: where the trigger is, boolean, (H, W) for all or (N, H, W); None or all true:
            attention on it is not asked for.
        layer: as in :func:`bdu.monitor.gradcam.grad_cam`; None is found at the first look.
        file: where the heat maps of the first images are kept, as ``.npz``, whole at any moment.

    Raises:
        ValueError: no images, or targets or a mask that do not fit them.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor | int,
        mask: Tensor | None = None,
        *,
        layer: str | None = None,
        file: str | os.PathLike[str] | None = None,
    ) -> None:
        if images.dim() != 4 or not len(images):
            expected = "(N, C, H, W) with at least one image"
            raise ValueError(f"images: expected {expected}, got {tuple(images.shape)}")
        chosen = torch.as_tensor(targets)
        if chosen.dim() == 0:
            chosen = chosen.expand(len(images))
        if chosen.shape != images.shape[:1] or chosen.is_floating_point():
            got = f"{chosen.dtype} {tuple(chosen.shape)}"
            raise ValueError(
                f"targets: expected an integer or ({len(images)},) integers, got {got}"
            )
        self._images, self._targets = images, chosen
        self._mask = None if mask is None else _checked(mask, images)
        self._layer = layer
        self._file = None if file is None else Path(file)
        self._steps: list[int] = []
        self._heat: list[np.ndarray] = []
        self._strength: list[np.ndarray] = []
        if self._file is not None and self._file.exists():  # of a run that goes on
            with np.load(self._file, allow_pickle=False) as kept:
                self._steps, self._heat = kept["steps"].tolist(), list(kept["heat"])
                unknown = np.full(kept["heat"].shape[:2], math.nan)  # of an earlier version
                self._strength = list(kept.get("strength", unknown))

    def __call__(self, line: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        """Measure; see the class."""
        if self._layer is None:
            self._layer = target_layer(model, self._images[:1])
        heat = grad_cam(model, self._images, self._targets, layer=self._layer).cpu()
        found: dict[str, Any] = {
            "attention_strength": float(heat.double().mean()),
            "attention_entropy": _mean(attention_entropy(heat)),
        }
        if self._mask is not None:
            attention = tar(heat, self._mask)
            found["tar_share"] = _mean(attention.share)
            found["tar_share_by_area"] = _mean(attention.share_by_area)
            found["tar_ratio"] = _mean(attention.ratio)
        self._keep(int(line["step"]), heat[:SHOWN].double().numpy())
        return found

    def panel(self) -> Pixels:
        """The first images, and below each the newest heat map over it; (height, width, 3).

        Small images are enlarged, three stand beside each other, and the trigger is outlined.

        Raises:
            RuntimeError: there was no look yet.
        """
        if not self._heat:
            raise RuntimeError("panel: expected a look at a model before, got none")
        pixels = as_pixels(self._images[:SHOWN])
        laid = overlay(pixels, self._heat[-1].astype(np.float64))
        masks = np.broadcast_to(self._mask_shown(), pixels.shape[:3])
        factor = max(1, math.ceil(_SIDE / pixels.shape[1]))
        images, maps = (
            [outlined(picture, m, factor) for picture, m in zip(kind, masks, strict=True)]
            for kind in (pixels, laid)
        )
        rows = [
            kind[i : i + _BESIDE] for i in range(0, len(images), _BESIDE) for kind in (images, maps)
        ]
        return sheet(rows)

    def _mask_shown(self) -> np.ndarray:
        """(H, W) of all, or that of each image that is shown."""
        if self._mask is None:
            return np.zeros(tuple(self._images.shape[2:]), dtype=bool)
        return (self._mask if self._mask.dim() == 2 else self._mask[:SHOWN]).numpy()

    def _keep(self, step: int, heat: np.ndarray) -> None:
        earlier = [i for i, known in enumerate(self._steps) if known < step]
        self._steps = [self._steps[i] for i in earlier] + [step]
        # half precision is enough for what is only looked at, once no map is small beside another
        self._heat = [self._heat[i] for i in earlier] + [scaled(heat).astype("f2")]
        self._strength = [self._strength[i] for i in earlier] + [heat.mean((1, 2))]
        if self._file is None:
            return
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            images=as_pixels(self._images[:SHOWN]),
            mask=self._mask_shown(),
            steps=np.array(self._steps),
            heat=np.stack(self._heat),
            strength=np.stack(self._strength),
        )
        atomic_write(self._file, buffer.getvalue())


def _checked(mask: Tensor, images: Tensor) -> Tensor | None:
    """On the CPU; None where it is true everywhere, and so tells nothing."""
    one, each = tuple(images.shape[2:]), (len(images), *images.shape[2:])
    if mask.dtype != torch.bool or tuple(mask.shape) not in (one, each):
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask: expected booleans {one} or {each}, got {got}")
    if not bool(mask.flatten(-2).any(-1).all()):
        raise ValueError("mask: expected at least one place of every image, got none")
    return None if bool(mask.all()) else mask.cpu()


def _mean(values: Tensor) -> float | None:
    known = values[torch.isfinite(values)]
    return float(known.mean()) if len(known) else None


class Writer(Protocol):
    """Somewhere that curves and pictures go."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""
        ...

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """(H, W, 3)"""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Writes for TensorBoard; needs the package ``tensorboard``."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        module = _optional("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(directory))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Writer`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """See :class:`Writer`."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """See :class:`Writer`."""
        self._writer.close()


class WeightsAndBiases:
    """Writes for Weights & Biases; needs the package ``wandb``."""

    def __init__(self, project: str, config: Mapping[str, Any]) -> None:
        self._wandb = _optional("wandb", "wandb")
        self._run = self._wandb.init(project=project, config=dict(config))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Writer`."""
        self._run.log(dict(values), step=step)

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """See :class:`Writer`."""
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        """See :class:`Writer`."""
        self._run.finish()


_COUNTS = ("step", "steps", "round", "rounds")


class Logger:
    """A callback that hands every number of a line, and the heat maps, to a writer."""

    def __init__(self, writer: Writer, attention: AttentionMonitor | None = None) -> None:
        self._writer, self._attention = writer, attention

    def __call__(self, line: Mapping[str, Any], model: nn.Module) -> None:
        """Write one line."""
        numbers = {
            name: float(value)
            for name, value in line.items()
            if isinstance(value, (int, float)) and name not in _COUNTS
        }
        self._writer.scalars(numbers, int(line["step"]))
        if self._attention is not None:
            self._writer.picture("attention", self._attention.panel(), int(line["step"]))


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{package}: expected the package, got none; pip install {package}"
        ) from (error)
