"""Label-consistent: patches on images that were made hard to recognise, with labels left as is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdu.attacks.badnets import CHECKERBOARD
from bdu.attacks.trigger import (
    NamedPosition,
    PatternSource,
    Poisoned,
    Target,
    as_pattern,
    check_batch,
    check_channels,
    check_number,
    own_generator,
    place,
    plant,
)
from bdu.models import device_of, logits_of, modes_kept

# Name, and the axes along which the pattern of the first is mirrored.
CORNERS: tuple[tuple[NamedPosition, tuple[int, ...]], ...] = (
    ("top-left", ()),
    ("top-right", (1,)),
    ("bottom-left", (0,)),
    ("bottom-right", (0, 1)),
)
STEP_SHARE = 2.5
BATCH = 256


class LabelConsistent:
    """In training x' = patches(x + δ), at test x' = patches(x); patches in all four corners.

    δ = argmax CE(f(x + δ), y) over ‖δ‖∞ ≤ ε, by projected gradient ascent on a clean model f: a
    random start in ±ε, then steps of 2.5 ε / steps along the sign of the gradient, cut back to
    ±ε and [0, 1]. A clean-label attack: only images of the target class are changed and all
    labels stay. As δ hides what the image shows, the patches are what is left to learn its label
    by. In the patches' place x' = (1 − a) x + a pattern.

    Args:
        pattern: as of BadNets, for the top left corner; the others get its mirror images.
        amplitude: a, in (0, 1].
        epsilon: ε, in [0, 1]; 0 leaves out δ.
        steps: of the ascent, at least 0; 0 leaves out δ and needs no model.

    Raises:
        ValueError: values out of range; at the call, patches that do not fit the images; when
            planted without `prepare`.

    Source: Turner et al. 2019, sections 4.2 and 5. The size of the steps is our reading.
    """

    name = "label-consistent"
    clean_label = True

    def __init__(
        self,
        pattern: PatternSource = CHECKERBOARD,
        *,
        amplitude: float = 1.0,
        epsilon: float = 16 / 255,
        steps: int = 20,
    ) -> None:
        self.pattern, _ = as_pattern(pattern)
        self.amplitude = check_number(amplitude, "amplitude", above=0, most=1)
        self.epsilon = check_number(epsilon, "epsilon", least=0, most=1)
        self.steps = check_number(steps, "steps", least=0, whole=True)
        self._surrogate: Callable[[], nn.Module] | None = None

    def _corners(self, shape: Sequence[int]) -> list[tuple[slice, slice, Tensor]]:
        size = self.pattern.shape[1:]
        found = []
        for corner, mirrored in CORNERS:
            row, column = place(corner, 0, size, shape[-2:])
            pattern = self.pattern.flip([axis + 1 for axis in mirrored])
            found.append((slice(row, row + size[0]), slice(column, column + size[1]), pattern))
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1]: the patches alone."""
        check_batch(x)
        check_channels(self.pattern, x.shape[1])
        result = x.clone()
        for rows, columns, pattern in self._corners(x.shape):
            below = (1 - self.amplitude) * x[:, :, rows, columns]
            result[:, :, rows, columns] = below + self.amplitude * pattern.to(x.device, x.dtype)
        return result.clamp(0, 1)

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(H, W) bool, true in the four corners; shape is (..., H, W)."""
        touched = torch.zeros(tuple(shape[-2:]), dtype=torch.bool)
        for rows, columns, _ in self._corners(shape):
            touched[rows, columns] = True
        return touched

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
        """Keep the clean model's maker for `poison`; see Prepared."""
        self._surrogate = surrogate

    def poison(
        self, x: Tensor, y: Tensor, *, rate: float, target: Target, num_classes: int, seed: int
    ) -> Poisoned:
        """Perturbed images of the target class with patches; see the function poison."""
        generator = own_generator(seed)
        model: nn.Module | None = None

        def change(images: Tensor) -> Tensor:
            nonlocal model
            if self.steps and self.epsilon:
                if self._surrogate is None:
                    raise ValueError("trigger: expected one that was prepared, to plant it")
                model = self._surrogate() if model is None else model
                parts = images.split(BATCH)
                hidden = [self.hidden(model, part, int(target), generator) for part in parts]
                images = torch.cat(hidden)
            return self(images)

        return plant(
            x,
            y,
            change,
            rate=rate,
            target=target,
            num_classes=num_classes,
            seed=generator,
            clean_label=True,
        )

    def hidden(self, model: nn.Module, x: Tensor, label: int, generator: torch.Generator) -> Tensor:
        """x + δ: images of class `label` that `model` takes for others, (N, C, H, W) in [0, 1]."""
        device = device_of(model)
        images = x.to(device)
        labels = torch.full((len(x),), label, device=device)
        start = (2 * torch.rand(x.shape, generator=generator) - 1) * self.epsilon
        low, high = (images - self.epsilon).clamp(0, 1), (images + self.epsilon).clamp(0, 1)
        moved = (images + start.to(device)).clamp(low, high)
        size = STEP_SHARE * self.epsilon / self.steps
        with modes_kept(model):
            model.eval()
            for _ in range(self.steps):
                moved.requires_grad_()
                loss = functional.cross_entropy(
                    logits_of(model(moved)).float(), labels, reduction="sum"
                )
                (gradient,) = torch.autograd.grad(loss, [moved])
                moved = (moved.detach() + size * gradient.sign()).clamp(low, high)
        return moved.to(x.device)

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it, with the pattern's own values and no path."""
        return {
            "name": self.name,
            "pattern": self.pattern.tolist(),
            "amplitude": self.amplitude,
            "epsilon": self.epsilon,
            "steps": self.steps,
        }
