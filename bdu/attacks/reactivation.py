"""The query-based reactivation attack: is the backdoor still there, behind another trigger?

    φ(x) = ε tanh(MLP(x)),   x̂ = x' + φ(x'),   x' clean and triggered images
    descend  w KL(p_relearned(x') ‖ p_purified(x̂)) + CE(f_clean(x̂), y)       over φ alone

A perturbation of the triggered images that makes the purified model answer as a model with the
backdoor does, while a model that never had one still sees what is there: so it wakes what was left
and is no ordinary adversarial example. The attacker queries the purified model; the evaluator
reports its ASR on the test images under trigger and φ.

Min et al. 2024 (arXiv:2410.09838), section 4 and the authors' code: widths 1024, ε 16/255, w 0.2,
500 clean and 500 triggered images, 50 epochs of SGD 0.1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdu.data import as_unit_float, check_images, check_labels
from bdu.metrics import predict
from bdu.models import device_of, logits_of, modes_kept


class Perturbation(nn.Module):
    """x + ε tanh(MLP(x)), cut to [0, 1]; shape: (C, H, W) of the images."""

    def __init__(self, shape: Iterable[int], radius: float, width: int = 1024) -> None:
        super().__init__()
        size = torch.Size(shape).numel()
        self.radius = radius
        self.net = nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(size, width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Perturbed images."""
        return (x + self.radius * torch.tanh(self.net(x)).view_as(x)).clamp(0, 1)


def reactivate(
    purified: nn.Module,
    relearned: nn.Module,
    never_backdoored: nn.Module,
    x_clean: Tensor,
    y_clean: Tensor,
    x_triggered: Tensor,
    y_true: Tensor,
    *,
    epochs: int = 50,
    lr: float = 0.1,
    radius: float = 16 / 255,
    weight: float = 0.2,
    batch_size: int = 128,
    seed: int,
) -> Callable[[Tensor], Tensor]:
    """Train the perturbation; returns x → x + φ(x), to be put on after the trigger.

    Args:
        purified: the defence's result.
        relearned: a model in which the backdoor answers: the suspect model, or the purified one
            after the retune attack.
        never_backdoored: a model of the same classes that is innocent.
        x_clean, y_clean: (N, C, H, W), uint8 or float in [0, 1], and true classes (N,).
        x_triggered, y_true: the same, under the trigger, and true classes.
        epochs, lr, batch_size: of SGD.
        radius: ε, for pixels in [0, 1].
        weight: w.
        seed: of the start and of the order.

    The models are used in evaluation mode and left untouched.

    Raises:
        ValueError: shapes or values that do not fit.
    """
    for name, count in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {count!r}")
    for name, number in (("radius", radius), ("lr", lr)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {number}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight: expected a number >= 0, got {weight}")
    classes = predict(purified, check_images(x_clean, "x_clean")[:1]).shape[1]
    parts = []
    for name, x, y in (("clean", x_clean, y_clean), ("triggered", x_triggered, y_true)):
        of = "y_true" if name == "triggered" else "y_clean"
        images, labels = as_unit_float(check_images(x, f"x_{name}")), check_labels(y, classes, of)
        if len(images) != len(labels):
            raise ValueError(f"{of}: expected {len(images)} labels, got {len(labels)}")
        parts.append((images, labels))
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        expected, got = (tuple(images.shape[1:]) for images, _ in parts)
        raise ValueError(f"x_triggered: expected images {expected} (as x_clean), got {got}")
    device = device_of(purified)
    x = torch.cat([images for images, _ in parts]).to(device)
    y = torch.cat([labels for _, labels in parts]).to(device)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        perturbation = Perturbation(x.shape[1:], radius).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(perturbation.parameters(), lr=lr)
    with contextlib.ExitStack() as stack:
        for model in (purified, relearned, never_backdoored):
            stack.enter_context(modes_kept(model))
            model.eval()
        with torch.no_grad():
            wanted = torch.cat([_log_of(relearned, part) for part in x.split(batch_size)])
        for _ in range(epochs):
            for part in torch.randperm(len(x), generator=generator).split(batch_size):
                moved = perturbation(x[part])
                answers = functional.kl_div(
                    _log_of(purified, moved),
                    wanted[part],
                    log_target=True,
                    reduction="batchmean",
                )
                seen = logits_of(never_backdoored(moved))
                loss = weight * answers + functional.cross_entropy(seen, y[part])
                own = list(perturbation.parameters())
                for parameter, slope in zip(own, torch.autograd.grad(loss, own), strict=True):
                    parameter.grad = slope
                optimizer.step()
    return perturbation.requires_grad_(False)


def _log_of(model: nn.Module, images: Tensor) -> Tensor:
    return logits_of(model(images)).log_softmax(1)
