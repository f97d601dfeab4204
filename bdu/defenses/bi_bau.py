"""BI-BAU: adversarial unlearning with a blindly inverted trigger, inside EM.

    repeat for every round
        E, M1:  φ, π ← inversion on the suspect model and the student together (inversion.py)
        E:      x̃_i = φ(x_i) + δ_i,  K projected steps of δ_i up log p_bd(t_i | x̃_i),
                t_i = argmax_t π(t | y_i) p_bd(t | φ(x_i)),  ‖δ_i‖∞ ≤ ε
        keep i  where f_bd(x̃_i) = t_i and t_i ≠ y_i, and a reference r has r(x̃_i) = y_i
        M2:     descend CE(f(x), y) + CE(f(x̃), y)

Ours is the reference, off unless `reference_epochs` says otherwise: a copy of the suspect model,
fine-tuned by FST (fst.py) as hard as leaves it 0.7 of its clean accuracy, which gives the backdoor
up. Then φ and π are those of classwise.py, operators for every class that turn the suspect model
and leave the copy right, drawn by how well they do so; x̃ is kept where the suspect model is wrong
about it and the copy right. What spoils an image for both only costs accuracy: without the last, a
model that never was backdoored lost 3.3 points, with it 1.3.

Following arXiv:2606.14078 (CCS 2026), of which only the abstract was available: backdoor learning
and unlearning as a sequence of tasks, unlearning complete only if what is trained on activates the
backdoor's features and carries a label that conflicts, such examples found by blind inversion, and
bi-level adversarial training inside an EM that maximises a posterior. How these are put together
here, and every number, is our reading. Threat model: white box, 5 % clean data, neither trigger nor
target known.

Cost of a round: `inversion_steps` and 20 for each class forwards and input backwards of two models
over 64 images, of the suspect model alone in the first; then `epochs` times over every batch,
`inner_steps` + 1 forwards and `inner_steps` input backwards of the suspect model, and a forward and
backward of the student over the clean images and over those x̃ that are kept; distillation is
another forward of the suspect model. The reference costs `reference_epochs` forwards and backwards
over the clean samples, up to three times, a forward of its own over every batch, and inversion
against it what classwise.py says; random patterns are another forward and backward of the student
over every batch.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdu.data import as_unit_float
from bdu.defenses.classwise import Found, Search, invert_every_class
from bdu.defenses.course import (
    USUAL_SPREAD,
    Course,
    Distilled,
    check_numbers,
    cosine,
    read_options,
    share_called,
)
from bdu.defenses.deficit import LEAST_DEFICIT, deficits
from bdu.defenses.feature_shift import LEAST_KEPT, alphas, shift_features
from bdu.defenses.inversion import Inversion, Inverted, invert_trigger, log_targets
from bdu.defenses.protocol import DefenderData, Result
from bdu.defenses.random_patterns import with_random_patterns

NAME = "bi-bau"

AGAINST_A_REFERENCE = {
    "rounds": 1,
    "lr": 3e-2,
    "inner_steps": 0,
    "distillation": 0.9,
    "train_batch_norm": True,
    "logit_spread": USUAL_SPREAD,
}
"""Settings of ours for a run with a reference, beside its epochs."""


@dataclass(frozen=True)
class Settings(Distilled):
    """The knobs of BI-BAU.

    Attributes:
        rounds: of inversion and unlearning.
        epochs: passes over the clean samples in a round.
        inversion_steps: of a round's inversion; against a reference, for each kind of operator.
        reference_epochs: of FST, that make the reference; 0: none, as we read the paper.
        inner_steps, inner_lr, radius: K signed steps on δ_i, their size, and ε, for pixels in
            [0, 1].
        adversarial_weight: of CE(f(x̃), y), ≥ 0.
        share: of every batch, in (0, 1], that x̃ are made of.
        pattern_size: ≥ 0, mean |pattern| at most of the random patterns that all images are trained
            under as well, where a reference and a class that was learnt by its trigger are there.
        lr, momentum, weight_decay: of SGD; lr falls as a cosine over the whole run.
        batch_size: samples a step.
        train_batch_norm: whether batch norm takes statistics meanwhile: of the clean images of a
            batch and the moved ones together.
    """

    rounds: int = 5
    epochs: int = 4
    inversion_steps: int = 200
    reference_epochs: int = 0
    inner_steps: int = 3
    inner_lr: float = 2 / 255
    radius: float = 4 / 255
    adversarial_weight: float = 1.0
    share: float = 1.0
    pattern_size: float = 0.2
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    train_batch_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("rounds", "epochs", "inversion_steps", "batch_size"))
        check_numbers(self, positive=("lr", "share"), shares=("share",))
        check_numbers(self, at_least_zero=("inner_steps", "inner_lr", "radius", "pattern_size"))
        check_numbers(
            self, at_least_zero=("adversarial_weight", "weight_decay"), below_one=("momentum",)
        )
        if self.reference_epochs:
            check_numbers(self, counts=("reference_epochs",))


def run(
    model: nn.Module, data: DefenderData, *, reference: nn.Module | None = None, **options: Any
) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`.

    Args:
        model, data: as for every method.
        reference: to be taken as it is; None: made as the settings say.
    """
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    if reference is None and s.reference_epochs:
        reference = _reference(course, s)
    optimizer = course.sgd(s.lr, momentum=s.momentum, weight_decay=s.weight_decay)

    def begin() -> None:
        course.student.load_state_dict(course.before.state_dict())

    for epoch in course.stage("unlearn", s.rounds * s.epochs, optimizer, begin=begin):
        number = epoch // s.epochs
        found = _inverted(course, number, s, reference)
        learnt = None
        if isinstance(found, Found):
            missing = deficits(course, found.targets) >= LEAST_DEFICIT
            found, learnt = found.drawing(missing), found.targets[missing]
        cosine(optimizer, s.lr, epoch, s.rounds * s.epochs)
        course.student.train(s.train_batch_norm)
        for batch in course.batches(data.clean, s.batch_size):
            images = as_unit_float(batch.x)
            count = math.ceil(s.share * len(images))
            moved, kept = _examples(
                course, found, images[:count], batch.y[:count], s, reference, learnt
            )
            images, moved = course.alike(images, torch.cat([moved, images[count:]]))
            moved = moved[kept]
            if learnt is not None and len(learnt) and s.pattern_size:
                patterned = with_random_patterns(images[:count], s.pattern_size, course.generator)
                moved = torch.cat([moved, patterned])
                kept = torch.cat([kept, torch.arange(count, device=kept.device)])
            suspect = course.suspect_logits(images, s.distillation)
            logits = course.student(torch.cat([images, moved]))
            loss = course.clean_loss(
                logits[: len(images)], images, batch.y, s.distillation, suspect
            )
            if len(moved):
                wrong = course.clean_loss(
                    logits[len(images) :],
                    images[kept],
                    batch.y[kept],
                    s.distillation,
                    None if suspect is None else suspect[kept],
                    moved=torch.ones_like(kept, dtype=torch.bool),
                )
                loss = loss + s.adversarial_weight * len(moved) / count * wrong
            course.step(optimizer, loss)
    return course.result()


def _reference(course: Course, s: Settings) -> nn.Module | None:
    def make() -> dict[str, Any]:
        return {name: value.clone() for name, value in course.student.state_dict().items()}

    validation = course.data.clean_validation
    before = share_called(course.before, validation)
    reference = copy.deepcopy(course.before)
    for alpha in alphas():
        stage = f"reference {alpha:g}"
        shift_features(
            course,
            stage,
            s.reference_epochs,
            alpha=alpha,
            anneal=True,
            fresh_bias=False,
            batch_size=s.batch_size,
            distillation=0.0,
            guarded=False,
        )
        reference.load_state_dict(course.once(stage, make))
        after = share_called(reference, validation)
        if after >= LEAST_KEPT * before:
            return reference
    warnings.warn(
        f"bi-bau: inverting without a reference, whose clean accuracy is {after:.3f} after "
        f"{s.reference_epochs} epochs, before {before:.3f}; more reference_epochs may help",
        stacklevel=3,
    )
    return None


def _inverted(
    course: Course, number: int, s: Settings, reference: nn.Module | None
) -> Inverted | Found:
    clean, seed = course.data.clean, course.seed + 1000 * number
    if reference is not None:
        against, search = reference, Search(steps=s.inversion_steps)
        state = course.once(
            f"operators {number}",
            lambda: invert_every_class(
                course.before,
                against,
                clean,
                seed=seed,
                settings=search,
                wrap=course.bar("inversion"),
            ).state(),
        )
        return Found.from_state(state, clean.x.shape[1:])
    modes = course.student.training
    moved = [course.student.eval()] if number else []  # at first it is the suspect model
    try:
        state = course.once(
            f"trigger {number}",
            lambda: invert_trigger(
                [course.before, *moved],
                clean,
                seed=seed,
                settings=Inversion(s.inversion_steps),
                wrap=course.bar("inversion"),
            ).state(),
        )
    finally:
        course.student.train(modes)
    return Inverted.from_state(state)


def _examples(
    course: Course,
    found: Inverted | Found,
    images: Tensor,
    y: Tensor,
    s: Settings,
    reference: nn.Module | None,
    learnt: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x̃, and the numbers of those that activate the backdoor.

    Where f_bd calls x̃ one of the classes `learnt` by a trigger, the reference need not know better.
    """
    with torch.no_grad():
        base = (
            found.move(images, y, course.generator)
            if isinstance(found, Found)
            else found.operator(images)
        )
    moved = base.detach().requires_grad_(s.inner_steps > 0)
    logits = course.before(moved)
    chances = logits.detach()
    if isinstance(found, Inverted):
        chances = chances.log_softmax(1) + log_targets(found.targets)[y]
    wanted = chances.argmax(1)
    for _ in range(s.inner_steps):
        loss = functional.cross_entropy(logits, wanted, reduction="sum")
        (slope,) = torch.autograd.grad(loss, moved)
        delta = (moved.detach() - base - s.inner_lr * slope.sign()).clamp(-s.radius, s.radius)
        moved = (base + delta).clamp(0, 1).requires_grad_()
        logits = course.before(moved)
    moved = moved.detach()
    active = (logits.argmax(1) == wanted) & (wanted != y)
    if reference is not None and learnt is not None:
        with torch.no_grad():
            known = reference(moved).argmax(1) == y
        active &= known | torch.isin(wanted, learnt)
    return moved, torch.nonzero(active).flatten()
