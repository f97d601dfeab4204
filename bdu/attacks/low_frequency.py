"""Low frequency: a smooth addition to every image, found on a clean model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdu.attacks.ftrojan import dct_basis
from bdu.attacks.trigger import (
    Target,
    add_pattern,
    check_batch,
    check_number,
    own_generator,
    read_tensors,
)
from bdu.checkpoint import save_state_dict
from bdu.data import as_unit_float, check_images
from bdu.metrics import target_labels
from bdu.models import device_of, logits_of, modes_kept

TINY = 1e-20


class LowFrequency:
    """x' = clip(x + ε r / max|r|), r_c = Φᵀ A_c Φ with Φ the lowest K waves of the DCT.

    The coefficients A, (C, K, K), start as Gaussian noise of variance 1 and descend
    mean CE(f(x'), target) of a clean model f, A ← A − lr √(C K²) g / ‖g‖ with g the gradient at a
    batch; the change thus has no frequency above the K-th and goes where the network already
    yields. A clean model is fooled by it to some degree as well: below that no defence can come.

    Args:
        epsilon: ε, largest change of a value, in (0, 1].
        frequencies: K, waves kept along each axis, at least 2.
        steps: of the descent; 0 leaves the noise, smooth but made without any model.
        lr: length of a step, as a share of the noise, positive.
        batch_size: images in a step.
        file: what `save` wrote.

    Raises:
        ValueError: values out of range; at the call, a trigger that was not made yet or one for
            another number of channels.
        FileNotFoundError: no such file.

    Source: following Zeng et al. 2021 ("Rethinking the backdoor attacks' triggers: a frequency
    perspective"), who look for a universal perturbation that passes a low-pass filter. Writing it
    by its coefficients, the bound ε and the steps are our reading.
    """

    name = "low-frequency"

    def __init__(
        self,
        *,
        epsilon: float = 16 / 255,
        frequencies: int = 6,
        steps: int = 100,
        lr: float = 0.1,
        batch_size: int = 128,
        file: str | os.PathLike[str] | None = None,
    ) -> None:
        self.epsilon = check_number(epsilon, "epsilon", above=0, most=1)
        self.frequencies = check_number(frequencies, "frequencies", least=2, whole=True)
        self.steps = check_number(steps, "steps", least=0, whole=True)
        self.lr = check_number(lr, "lr", above=0)
        self.batch_size = check_number(batch_size, "batch_size", least=1, whole=True)
        self.file = None if file is None else str(file)
        self.coefficients: Tensor | None = None
        if file is not None:
            shape = (None, self.frequencies, self.frequencies)
            self.coefficients = read_tensors(file, {"coefficients": shape})["coefficients"]
            # their sum is above every value of the waves, which are divided by the largest
            total = float(self.coefficients.abs().sum())
            if not TINY < total < math.inf:
                raise ValueError(
                    f"file: expected coefficients neither all 0 nor too large, got {total:g} as "
                    f"the sum of their sizes in {file}"
                )

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
        """Find the coefficients; see Prepared."""
        if self.coefficients is not None:
            return
        x = check_images(x)
        self._check_size(x.shape)
        generator = own_generator(seed)
        size = (x.shape[1], self.frequencies, self.frequencies)
        start = torch.randn(size, generator=generator)
        if self.steps:
            wanted = target_labels(y, target, num_classes)
            start = self._optimised(start, surrogate(), x, wanted, generator)
        self.coefficients = start

    def _optimised(
        self, start: Tensor, model: nn.Module, x: Tensor, wanted: Tensor, generator: torch.Generator
    ) -> Tensor:
        device = device_of(model)
        coefficients = start.to(device).requires_grad_()
        length = self.lr * math.sqrt(coefficients.numel())
        with modes_kept(model):
            model.eval()
            for _ in range(self.steps):
                drawn = torch.randint(len(x), (self.batch_size,), generator=generator)
                images = as_unit_float(x[drawn.to(x.device)].to(device))
                labels = wanted[drawn.to(wanted.device)].to(device)
                triggered = add_pattern(images, self._pattern(coefficients, x.shape))
                loss = functional.cross_entropy(logits_of(model(triggered)).float(), labels)
                (gradient,) = torch.autograd.grad(loss, [coefficients])
                with torch.no_grad():
                    # not Adam, which would move what does not matter as far as what does
                    coefficients -= length * gradient / gradient.norm().clamp(min=TINY)
        return coefficients.detach().cpu()

    def _check_size(self, shape: Sequence[int]) -> None:
        height, width = shape[-2:]
        if min(height, width) < self.frequencies:
            raise ValueError(
                f"frequencies: expected at most {min(height, width)} for images of "
                f"{height}x{width}, got {self.frequencies}"
            )

    def _pattern(self, coefficients: Tensor, shape: Sequence[int]) -> Tensor:
        self._check_size(shape)
        height, width = shape[-2:]
        down, across = (
            dct_basis(size)[: self.frequencies].to(coefficients.device, torch.float32)
            for size in (height, width)
        )
        waves = down.T @ coefficients @ across
        return self.epsilon * waves / waves.detach().abs().max()

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1]."""
        check_batch(x)
        if self.coefficients is None:
            raise ValueError("trigger: expected one that was prepared or read from a file")
        if x.shape[1] != len(self.coefficients):
            raise ValueError(f"x: expected {len(self.coefficients)} channels, got {x.shape[1]}")
        return add_pattern(x, self._pattern(self.coefficients, x.shape))

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(H, W) bool, all true; shape is (..., H, W)."""
        self._check_size(shape)
        return torch.ones(tuple(shape[-2:]), dtype=torch.bool)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the coefficients; see Saved."""
        if self.coefficients is None:
            raise ValueError("trigger: expected one that was prepared, to save it")
        save_state_dict(path, {"coefficients": self.coefficients})
        self.file = str(path)

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it, where it was saved."""
        return {
            "name": self.name,
            "epsilon": self.epsilon,
            "frequencies": self.frequencies,
            "steps": self.steps,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "file": self.file,
        }
