"""TrojanNN: a patch made to drive one unit of a clean model as far as it goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bdu.attacks.trigger import (
    Position,
    Target,
    check_batch,
    check_number,
    check_position,
    own_generator,
    place,
    read_tensors,
)
from bdu.checkpoint import save_state_dict
from bdu.data import as_unit_float, check_images
from bdu.models import device_of, modes_kept


class TrojanNN:
    """x' = patch inside its square, x elsewhere; patch = argmin_p mean (v − a_j(x with p))².

    a is what the clean model's last linear layer takes in, j = argmax Σ_c |W_cj| its unit of the
    largest weights, p = σ(z) pixels in [0, 1] found by Adam over z. The unit already matters to
    the classes, and the patch is the strongest cause of it that fits into the square.

    Args:
        size: height and width of the patch in pixels, at least 1.
        position, margin: as of BadNets.
        value: v, out of reach on purpose.
        steps: of Adam, at least 1.
        lr: of Adam; z starts as Gaussian noise of variance 1.
        batch_size: images that the patch is put on in a step.
        file: what `save` wrote.

    Raises:
        ValueError: values out of range; at the call, a patch that was not made yet, that does not
            fit the images, or is for another number of channels.
        FileNotFoundError: no such file.

    Source: Liu et al. 2018, section 4. There the patch lies on a blank image, the layer is any
    inner one, chosen by its weights to the layer before; training images under the patch and the
    layer before the head are our reading. The reverse-engineered training data of the paper are
    left out, as the attacker here has data.
    """

    name = "trojannn"

    def __init__(
        self,
        *,
        size: int = 6,
        position: Position = "bottom-right",
        margin: int = 0,
        value: float = 100.0,
        steps: int = 200,
        lr: float = 0.1,
        batch_size: int = 32,
        file: str | os.PathLike[str] | None = None,
    ) -> None:
        self.size = check_number(size, "size", least=1, whole=True)
        self.position = check_position(position, margin)
        self.margin = margin
        self.value = check_number(value, "value")
        self.steps = check_number(steps, "steps", least=1, whole=True)
        self.lr = check_number(lr, "lr", above=0)
        self.batch_size = check_number(batch_size, "batch_size", least=1, whole=True)
        self.file = None if file is None else str(file)
        self.patch: Tensor | None = None
        if file is not None:
            patch = read_tensors(file, {"patch": (None, self.size, self.size)})["patch"]
            if not bool(((patch >= 0) & (patch <= 1)).all()):
                raise ValueError(f"file: expected a patch in [0, 1], got other values in {file}")
            self.patch = patch

    def _square(self, shape: Sequence[int]) -> tuple[slice, slice]:
        size = (self.size, self.size)
        row, column = place(self.position, self.margin, size, shape[-2:])
        return slice(row, row + self.size), slice(column, column + self.size)

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
        """Find the patch; see Prepared. The target does not matter to it."""
        if self.patch is not None:
            return
        x = check_images(x)
        rows, columns = self._square(x.shape)
        generator = own_generator(seed)
        start = torch.randn(x.shape[1], self.size, self.size, generator=generator)
        model = surrogate()
        head = last_linear(model)
        unit = int(head.weight.detach().abs().sum(0).argmax())
        device = device_of(model)
        raw = start.to(device).requires_grad_()
        optimizer = torch.optim.Adam([raw], lr=self.lr)
        with modes_kept(model):
            model.eval()
            for _ in range(self.steps):
                drawn = torch.randint(len(x), (self.batch_size,), generator=generator)
                images = as_unit_float(x[drawn.to(x.device)].to(device)).clone()
                images[:, :, rows, columns] = torch.sigmoid(raw)
                activation = inputs_of(head, model, images)[:, unit]
                loss = (self.value - activation).square().mean()
                (raw.grad,) = torch.autograd.grad(loss, [raw])
                optimizer.step()
        self.patch = torch.sigmoid(raw).detach().cpu()

    def __call__(self, x: Tensor) -> Tensor:
        """A triggered copy of x, (N, C, H, W) float in [0, 1]."""
        check_batch(x)
        if self.patch is None:
            raise ValueError("trigger: expected one that was prepared or read from a file")
        if x.shape[1] != len(self.patch):
            raise ValueError(f"x: expected {len(self.patch)} channels, got {x.shape[1]}")
        rows, columns = self._square(x.shape)
        result = x.clone()
        result[:, :, rows, columns] = self.patch.to(x.device, x.dtype)
        return result

    def mask(self, shape: Sequence[int]) -> Tensor:
        """(H, W) bool, true inside the square; shape is (..., H, W)."""
        rows, columns = self._square(shape)
        touched = torch.zeros(tuple(shape[-2:]), dtype=torch.bool)
        touched[rows, columns] = True
        return touched

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch; see Saved."""
        if self.patch is None:
            raise ValueError("trigger: expected one that was prepared, to save it")
        save_state_dict(path, {"patch": self.patch})
        self.file = str(path)

    def spec(self) -> dict[str, Any]:
        """Options that rebuild it, where it was saved."""
        position = self.position if isinstance(self.position, str) else list(self.position)
        return {
            "name": self.name,
            "size": self.size,
            "position": position,
            "margin": self.margin,
            "value": self.value,
            "steps": self.steps,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "file": self.file,
        }


def last_linear(model: nn.Module) -> nn.Linear:
    """The last linear layer of a classifier.

    Raises:
        ValueError: it has none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            f"surrogate: expected a classifier with a linear layer, got {type(model).__name__}"
        )
    return layers[-1]


def inputs_of(layer: nn.Linear, model: nn.Module, x: Tensor) -> Tensor:
    """(N, features) that reach `layer` when `model` computes x."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model(x)
    finally:
        handle.remove()
    if not seen or seen[-1].dim() != 2:
        raise ValueError("surrogate: expected its last linear layer to take (N, features)")
    return seen[-1]
