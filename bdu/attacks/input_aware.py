"""Input-Aware: every image has a trigger of its own, from networks trained with the classifier."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdu.attacks.trigger import (
    ALL_TO_ALL,
    Target,
    check_batch,
    check_cover_ratio,
    check_number,
    drawn,
    own_generator,
    read_tensors,
)
from bdu.checkpoint import save_state_dict
from bdu.data import as_unit_float, check_images, check_labels
from bdu.models import device_of
from bdu.training import fit

BETAS = (0.5, 0.9)
SHARPNESS = 10.0
GROUPS = 4
MOST_CHANNELS = 128  # of images and first level; the networks are built before a file is read
TINY = 1e-7
MASK_BATCH = 128


class InputAware:
    """x' = (1 − m(x)) x + m(x) p(x), with p and m two networks; p in [0, 1], m nearly 0 or 1.

    First m is trained alone, by λ D(m) + λ_m mean max(0, m(x) − density) over pairs of images
    x and z, D(g) = ‖x − z‖ / ‖g(x) − g(z)‖. Then in every batch a share ρ_b of triggered images
    gets the target, a share ρ_c of cover images keeps its label beside another image's trigger,
    (1 − m(z)) x + m(z) p(z), and p and the classifier descend CE + λ D(p) together. Each image
    thus has a trigger that works on it alone. With the outputs o of its network,
    m = ½ + ½ tanh(10 tanh o), and p = σ(o).

    Args:
        width: channels of the networks' first level, a multiple of 4, 128 at most.
        diversity: λ, at least 0.
        density: share of the image that m may cover for free, in (0, 1].
        mask_weight: λ_m, at least 0.
        cover_ratio: ρ_c / ρ_b, at least 0; ρ_b is the rate.
        mask_steps: batches that m is trained on before the classifier, at least 1.
        lr: of Adam, with β = (0.5, 0.9), for p and m; for p it follows the classifier's schedule.
        channels: of the images; found by `fit`, and needed with file.
        file: what `save` wrote.

    Raises:
        ValueError: values out of range; at the call, a trigger that was not trained or one for
            another number of channels.
        FileNotFoundError: no such file.

    Source: Nguyen and Tran 2020, sections 3 and 4; λ = 1, λ_m = 100, density 0.032 and
    ρ_b = ρ_c = 0.1 are the paper's. Smaller networks with group norm, which do not depend on the
    batch, and mask_steps in place of 25 epochs are our reading.
    """

    name = "input-aware"

    def __init__(
        self,
        *,
        width: int = 16,
        diversity: float = 1.0,
        density: float = 0.032,
        mask_weight: float = 100.0,
        cover_ratio: float = 1.0,
        mask_steps: int = 300,
        lr: float = 0.01,
        channels: int | None = None,
        file: str | os.PathLike[str] | None = None,
    ) -> None:
        self.width = check_number(width, "width", least=1, most=MOST_CHANNELS, whole=True)
        if width % GROUPS:
            raise ValueError(f"width: expected a multiple of {GROUPS}, got {width}")
        self.diversity = check_number(diversity, "diversity", least=0)
        self.density = check_number(density, "density", above=0, most=1)
        self.mask_weight = check_number(mask_weight, "mask_weight", least=0)
        self.cover_ratio = check_cover_ratio(cover_ratio)
        self.mask_steps = check_number(mask_steps, "mask_steps", least=1, whole=True)
        self.lr = check_number(lr, "lr", above=0)
        self.channels = channels
        self.file = None if file is None else str(file)
        self.nets: nn.ModuleDict | None = None
        if file is not None:
            if channels is None:
                raise ValueError("channels: expected a number, as file needs it, got None")
            check_number(channels, "channels", least=1, most=MOST_CHANNELS, whole=True)
            self.nets = self._built(channels, 0)
            shapes = {name: tuple(v.shape) for name, v in self.nets.state_dict().items()}
            self.nets.load_state_dict(read_tensors(file, shapes))
            self.nets.requires_grad_(False)

    def _built(self, channels: int, seed: int) -> nn.ModuleDict:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pattern = TriggerNet(channels, channels, self.width)
            mask = TriggerNet(channels, 1, self.width)
        return nn.ModuleDict({"pattern": pattern, "mask": mask})

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p(x), (N, C, H, W), and m(x), (N, 1, H, W), both in [0, 1]."""
        nets = self._checked(x)
        return pattern_of(nets, x), mask_of(nets, x)

    def _checked(self, x: Tensor) -> nn.ModuleDict:
        if self.nets is None:
            raise ValueError("trigger: expected one that was trained or read from a file")
        if x.shape[1] != self.channels:
            raise ValueError(f"x: expected {self.channels} channels, got {x.shape[1]}")
        return self.nets.to(x.device)

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1]."""
        self._checked(check_batch(x))
        if len(x) == 0:
            return x.clone()
        with torch.no_grad():
            images = x.to(torch.float32)
            return put_on(images, *self.parts(images)).clamp(0, 1).to(x.dtype)

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(H, W) bool, all true; shape is (..., H, W)."""
        return torch.ones(tuple(shape[-2:]), dtype=torch.bool)

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
        """Train m, then p and the classifier; see JointlyTrained.

        A resume goes on after m, which the state file holds.
        """
        x, y = check_images(x), check_labels(y, num_classes)
        drawn(y, rate=rate, target=target, num_classes=num_classes, seed=seed)
        is_loaded = self.file is not None
        if not is_loaded:
            generator = own_generator(seed)
            self.channels = x.shape[1]
            self.nets = self._built(x.shape[1], generator.initial_seed()).to(device_of(model))
            state_file = options.get("state_file")
            if not (options.get("resume") and state_file and Path(state_file).exists()):
                self._train_mask(x, generator)
        nets = self._checked(x[:0].to(device_of(model)))
        nets["mask"].requires_grad_(False)
        nets["pattern"].requires_grad_(not is_loaded)
        planter = _Planter(self, nets, rate, target, num_classes)
        history = fit(model, x, y, seed=seed, companion=planter, **options)
        nets.requires_grad_(False)
        return history

    def _train_mask(self, x: Tensor, generator: torch.Generator) -> None:
        assert self.nets is not None
        device = device_of(self.nets)
        batch = min(MASK_BATCH, len(x))
        optimizer = torch.optim.Adam(self.nets["mask"].parameters(), lr=self.lr, betas=BETAS)
        for _ in range(self.mask_steps):
            chosen = torch.randint(len(x), (batch,), generator=generator)
            images = as_unit_float(x[chosen.to(x.device)].to(device))
            masks = mask_of(self.nets, images)
            too_much = (masks - self.density).clamp(min=0).mean()
            loss = self.diversity * sameness(images, masks) + self.mask_weight * too_much
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write both networks; see Saved."""
        if self.nets is None:
            raise ValueError("trigger: expected one that was trained, to save it")
        save_state_dict(path, self.nets.state_dict())
        self.file = str(path)

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it, where it was saved."""
        return {
            "name": self.name,
            "width": self.width,
            "diversity": self.diversity,
            "density": self.density,
            "mask_weight": self.mask_weight,
            "cover_ratio": self.cover_ratio,
            "mask_steps": self.mask_steps,
            "lr": self.lr,
            "channels": self.channels,
            "file": self.file,
        }


class _Planter:
    """The companion that puts the triggers into every batch and trains p; see Companion."""

    def __init__(
        self, attack: InputAware, nets: nn.ModuleDict, rate: float, target: Target, num_classes: int
    ) -> None:
        self.attack, self.nets, self.rate = attack, nets, rate
        self.target, self.num_classes = target, num_classes
        trained = [p for p in nets["pattern"].parameters() if p.requires_grad]
        self.optimizer = (
            torch.optim.Adam(trained, lr=attack.lr, betas=BETAS) if trained and rate else None
        )

    def settings(self) -> dict[str, Any]:
        own = {k: v for k, v in self.attack.spec().items() if k != "file"}
        plan = {"rate": self.rate, "target": self.target, "num_classes": self.num_classes}
        return {**own, **plan}

    def batch(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        count = round(self.rate * len(images))
        if count == 0:
            return images, labels, 0.0
        if self.target == ALL_TO_ALL:
            wanted = (labels + 1) % self.num_classes
        else:
            wanted = torch.full_like(labels, self.target)
        # the batch is in random order already; images of the target itself come last
        order = (wanted == labels).to(torch.uint8).argsort(stable=True)
        chosen, left = order[:count], order[count:]
        covers = min(round(self.attack.cover_ratio * count), len(left))
        covered = left[torch.randperm(len(left), generator=generator)[:covers].to(left.device)]
        others = images.roll(1, 0)
        pairs = torch.cat([images[chosen], others[chosen]])
        patterns = pattern_of(self.nets, torch.cat([pairs, others[covered]]))
        with torch.no_grad():
            masks = mask_of(self.nets, torch.cat([images[chosen], others[covered]]))
        result, result_labels = images.clone(), labels.clone()
        result[chosen] = put_on(images[chosen], patterns[:count], masks[:count])
        result[covered] = put_on(images[covered], patterns[2 * count :], masks[count:])
        result_labels[chosen] = wanted[chosen]
        between = ratio(pairs[:count], pairs[count:], patterns[:count], patterns[count : 2 * count])
        return result, result_labels, self.attack.diversity * between

    def step(self, factor: float) -> None:
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.attack.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        return {"nets": dict(self.nets.state_dict()), "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nets.load_state_dict(state["nets"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])


class TriggerNet(nn.Module):
    """An encoder and a decoder of three levels, (N, out, H, W) from (N, C, H, W), any H and W.

    A level is two 3x3 convolutions with group norm and ReLU; between levels the maximum of 2x2
    pixels, and on the way back the nearest one.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(
            _level(before, after)
            for before, after in zip((in_channels, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(
            _level(before, after)
            for before, after in zip(widths[::-1], (*widths[1::-1], width), strict=True)
        )
        self.out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs before they are squeezed into [0, 1]."""
        sizes = []
        for level in self.down:
            x = level(x)
            sizes.append(x.shape[-2:])
            x = functional.max_pool2d(x, 2, ceil_mode=True)
        for level, size in zip(self.up, reversed(sizes), strict=True):
            x = level(functional.interpolate(x, size=size, mode="nearest"))
        return self.out(x)


def _level(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (before, after):
        layers += [
            nn.Conv2d(width, after, 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def pattern_of(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    """p(x) = σ(o), (N, C, H, W) in [0, 1]."""
    return torch.sigmoid(nets["pattern"](x))


def mask_of(nets: nn.ModuleDict, x: Tensor) -> Tensor:
    """m(x) = ½ + ½ tanh(10 tanh o), (N, 1, H, W) in [0, 1]."""
    return 0.5 + 0.5 * torch.tanh(SHARPNESS * torch.tanh(nets["mask"](x)))


def put_on(x: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """(1 − mask) x + mask pattern."""
    return (1 - mask) * x + mask * pattern


def ratio(x: Tensor, z: Tensor, of_x: Tensor, of_z: Tensor) -> Tensor:
    """Mean of ‖x − z‖ / ‖g(x) − g(z)‖ over pairs, with root mean squares as norms."""
    images = (x - z).square().mean((1, 2, 3)).sqrt()
    outputs = ((of_x - of_z).square().mean((1, 2, 3)) + TINY).sqrt()
    return (images / outputs).mean()


def sameness(x: Tensor, outputs: Tensor) -> Tensor:
    """D(g) over pairs of neighbours in a batch of images x and outputs g(x)."""
    return ratio(x, x.roll(1, 0), outputs, outputs.roll(1, 0))
