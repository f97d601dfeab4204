"""SAU: unlearn the adversarial examples that the suspect model and the student share.

    inner, every image:  x̃ = x + δ, ‖δ‖∞ ≤ ε, by signed descent from δ = ε on
        −β₁ ½ (CE(f_θ(x̃), y) + CE(f_bd(x̃), y))      each of the images that it calls as it calls x
        + β₂ JS(p_θ(x̃), p_bd(x̃))                    images not yet called the same new class by both
    outer:  descend  λ₁ CE(f_θ(x), y) + λ₂ CE(f_θ(x̃), y)
        − λ₃ ½ Σ [log(1 − p_θ(c|x̃)) twice, each clamped in its own way] / B
        over x̃ that f_bd calls c ≠ y, c ≠ f_bd(x)

Wei et al. 2023 (arXiv:2307.10562), equations 5-7; constants and clamps as in BackdoorBench's
settings (ε 0.2 on pixels in [0, 1], 5 steps of 0.2, β 0.01 and 1, λ 1, 0, 1, Adam 1e-4, 100 rounds
of 5 % clean data, batch norm in evaluation mode, images not cut to [0, 1]). Threat model: white
box, 5 % clean data, no trigger.

Cost of a step: 5 forwards and input backwards of two models inside; outside two forwards of each
model and a backward of the student. What does not depend on δ is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdu.defenses.course import Course, Distilled, check_numbers, read_options
from bdu.defenses.protocol import DefenderData, Result

NAME = "sau"


@dataclass(frozen=True)
class Settings(Distilled):
    """The knobs of SAU.

    Attributes:
        epochs: passes over the clean samples.
        lr: of Adam.
        radius: ε, in pixels of [0, 1].
        inner_steps, inner_lr: of the signed descent.
        beta_adversarial, beta_shared: β₁, β₂ ≥ 0.
        clean_weight, adversarial_weight, shared_weight: λ₁, λ₂, λ₃ ≥ 0.
        batch_size: samples a step.
    """

    epochs: int = 100
    lr: float = 1e-4
    radius: float = 0.2
    inner_steps: int = 5
    inner_lr: float = 0.2
    beta_adversarial: float = 0.01
    beta_shared: float = 1.0
    clean_weight: float = 1.0
    adversarial_weight: float = 0.0
    shared_weight: float = 1.0
    batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("epochs", "inner_steps", "batch_size"))
        check_numbers(self, positive=("lr", "radius", "inner_lr"))
        weights = ("clean_weight", "adversarial_weight", "shared_weight")
        check_numbers(self, at_least_zero=("beta_adversarial", "beta_shared", *weights))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`."""
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    optimizer = course.adam(s.lr)
    for _ in course.stage("unlearn", s.epochs, optimizer):
        course.student.eval()
        for batch in course.batches(data.clean, s.batch_size):
            images = course.images(batch)
            own = course.student(images)
            with torch.no_grad():
                suspect = course.before(images)
            called = (own.argmax(1), suspect.argmax(1))
            moved = _shared_examples(course, images, batch.y, called, s)
            with torch.no_grad():
                fooled = course.before(moved).argmax(1)
            clean = course.clean_loss(own, images, batch.y, s.distillation, suspect)
            loss = s.clean_weight * clean
            if s.adversarial_weight or s.shared_weight:
                logits = course.student(moved)
                loss = loss + s.adversarial_weight * functional.cross_entropy(logits, batch.y)
                wanted = (fooled != batch.y) & (fooled != called[1])
                loss = loss + s.shared_weight * _unshared(logits[wanted], fooled[wanted]) / len(
                    batch
                )
            course.step(optimizer, loss)
    return course.result()


def _shared_examples(
    course: Course, images: Tensor, y: Tensor, called: tuple[Tensor, Tensor], s: Settings
) -> Tensor:
    delta = torch.full_like(images, s.radius)
    for _ in range(s.inner_steps):
        delta.requires_grad_()
        moved = images + delta
        logits = (course.student(moved), course.before(moved))
        own, old = (each.argmax(1) for each in logits)
        losses = [functional.cross_entropy(each, y, reduction="none") for each in logits]
        fooled = (own != called[0], old != called[1])
        unfooled = losses[0][~fooled[0]].sum() + losses[1][~fooled[1]].sum()
        divergence = _jensen_shannon(*logits)[~(fooled[0] & fooled[1] & (own == old))].sum()
        loss = -s.beta_adversarial * 0.5 * unfooled + s.beta_shared * divergence
        (slope,) = torch.autograd.grad(loss / len(images), delta)
        delta = (delta.detach() - s.inner_lr * slope.sign()).clamp(-s.radius, s.radius)
    return images + delta


def _jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """(N,) from logits (N, C)."""
    p, q = one.softmax(1), other.softmax(1)
    middle = (0.5 * (p + q)).clamp(min=1e-12).log()
    parts = [functional.kl_div(middle, each, reduction="none").sum(1) for each in (p, q)]
    return 0.5 * (parts[0] + parts[1])


def _unshared(logits: Tensor, wrong: Tensor) -> Tensor:
    """The loss that ends at a probability of 0 for the wrong class, summed."""
    p = logits.softmax(1).gather(1, wrong.unsqueeze(1)).squeeze(1)
    first = (1e-6 + (1 - p).clamp(max=0.999)).log()
    second = (1 + 1e-6 - p.clamp(min=0.001)).log()
    return -0.5 * (first + second).sum()
