"""BI-BAU: adversarial unlearning with a blindly inverted trigger, inside EM.

    repeat for every round
        E, M1:  φ, π ← inversion on the suspect model and the student together (inversion.py)
        E:      x̃_i = φ(x_i) + δ_i,  K projected steps of δ_i up log p_bd(t_i | x̃_i),
                t_i = argmax_t π(t | y_i) p_bd(t | φ(x_i)),  ‖δ_i‖∞ ≤ ε
        keep i  where f_bd(x̃_i) = t_i and t_i ≠ y_i
        M2:     descend CE(f(x), y) + CE(f(x̃), y)

Following arXiv:2606.14078 (CCS 2026), of which only the abstract was available: backdoor learning
and unlearning as a sequence of tasks, unlearning complete only if what is trained on activates the
backdoor's features and carries a label that conflicts, such examples found by blind inversion, and
bi-level adversarial training inside an EM that maximises a posterior. How these are put together
here, and every number, is our reading. Threat model: white box, 5 % clean data, neither trigger nor
target known.

Cost of a round: `inversion_steps` forwards and input backwards of two models over 64 images; then
over every batch, `inner_steps` forwards and input backwards and two forwards of the suspect model,
two forwards and a backward of the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdu.defenses.course import Course, Distilled, check_numbers, cosine, read_options
from bdu.defenses.inversion import Inversion, Inverted, invert_trigger
from bdu.defenses.protocol import DefenderData, Result

NAME = "bi-bau"


@dataclass(frozen=True)
class Settings(Distilled):
    """The knobs of BI-BAU.

    Attributes:
        rounds: of inversion and unlearning.
        epochs: passes over the clean samples in a round.
        inversion_steps: of a round's inversion.
        inner_steps, inner_lr, radius: K signed steps on δ_i, their size, and ε, for pixels in
            [0, 1].
        adversarial_weight: of CE(f(x̃), y), ≥ 0.
        lr, momentum, weight_decay: of SGD; lr falls as a cosine over the whole run.
        batch_size: samples a step.
        train_batch_norm: whether batch norm takes the statistics of clean batches meanwhile.
    """

    rounds: int = 5
    epochs: int = 4
    inversion_steps: int = 200
    inner_steps: int = 3
    inner_lr: float = 2 / 255
    radius: float = 4 / 255
    adversarial_weight: float = 1.0
    lr: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    train_batch_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("rounds", "epochs", "inversion_steps", "batch_size"))
        check_numbers(self, positive=("lr",))
        at_least_zero = ("inner_steps", "inner_lr", "radius", "adversarial_weight")
        check_numbers(self, at_least_zero=(*at_least_zero, "momentum", "weight_decay"))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`."""
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    optimizer = course.sgd(s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    found: Inverted | None = None
    for epoch in course.stage("unlearn", s.rounds * s.epochs, optimizer):
        number = epoch // s.epochs
        state = course.once(f"trigger {number}", partial(_inverted, course, number, s))
        found = Inverted.from_state(state)
        cosine(optimizer, s.lr, epoch, s.rounds * s.epochs)
        course.student.train(s.train_batch_norm)
        for batch in course.batches(data.clean, s.batch_size):
            images = course.images(batch)
            moved = _examples(course, found, images, batch.y, s)
            logits = course.student(torch.cat([images, moved[0]]))
            loss = course.clean_loss(logits[: len(images)], images, batch.y, s.distillation)
            if len(moved[0]):
                wrong = functional.cross_entropy(logits[len(images) :], moved[1], reduction="sum")
                loss = loss + s.adversarial_weight * wrong / len(images)
            course.step(optimizer, loss)
    return course.result()


def _inverted(course: Course, number: int, s: Settings) -> dict[str, Any]:
    modes = course.student.training
    try:
        return invert_trigger(
            [course.before, course.student.eval()],
            course.data.clean,
            seed=course.seed + 1000 * number,
            settings=Inversion(steps=s.inversion_steps),
        ).state()
    finally:
        course.student.train(modes)


def _examples(
    course: Course, found: Inverted, images: Tensor, y: Tensor, s: Settings
) -> tuple[Tensor, Tensor]:
    """x̃ that activate the backdoor, and their true labels."""
    with torch.no_grad():
        base = found.operator(images)
        odds = course.before(base).log_softmax(1) + found.targets[y].clamp(min=1e-12).log()
        wanted = odds.argmax(1)
    delta = torch.zeros_like(base)
    for _ in range(s.inner_steps):
        delta.requires_grad_()
        loss = functional.cross_entropy(course.before(base + delta), wanted, reduction="sum")
        (slope,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() - s.inner_lr * slope.sign()).clamp(-s.radius, s.radius)
        delta = (base + delta).clamp(0, 1) - base
    moved = base + delta
    with torch.no_grad():
        called = course.before(moved).argmax(1)
    kept = (called == wanted) & (wanted != y)
    return moved[kept], y[kept]
