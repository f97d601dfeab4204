"""The stage of FST (fst.py), which other methods take for a first, shallow cleaning."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bdu.data import as_unit_float
from bdu.defenses.course import Course, cosine
from bdu.defenses.head import head_of

ALPHA = 0.1
"""As published."""
LEAST_KEPT = 0.7
"""Of clean accuracy, by a reference."""


def alphas() -> Iterator[float]:
    """How hard to push for a reference: less where clean accuracy does not stand more."""
    return (share * ALPHA for share in (1.0, 0.3, 0.1))


def shift_features(
    course: Course,
    stage: str,
    epochs: int,
    *,
    lr: float = 1e-2,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    alpha: float = ALPHA,
    anneal: bool,
    fresh_bias: bool,
    batch_size: int,
    distillation: float,
    guarded: bool = True,
) -> None:
    """Make the student the suspect model with a fresh last layer, and descend the loss of FST.

    Args:
        course: whose student, clean samples and draws.
        stage: its name in the course.
        epochs, lr, momentum, weight_decay, alpha, anneal, fresh_bias, batch_size, distillation: as
            the settings of FST.
        guarded: whether the run ends where clean accuracy is still collapsed after the last epoch.
    """
    clean = course.data.clean
    head = head_of(course.before, as_unit_float(clean.x[:1]))
    before = course.before.get_parameter(f"{head}.weight")
    weight = course.student.get_parameter(f"{head}.weight")
    bias = dict(course.named_parameters()).get(f"{head}.bias") if fresh_bias else None

    def begin() -> None:
        # as torch initialises a layer, but from the run's own generator
        bound = before[0].numel() ** -0.5
        course.student.load_state_dict(course.before.state_dict())
        fresh = torch.rand(before.shape, generator=course.generator) * 2 * bound - bound
        with torch.no_grad():
            weight[rows] = fresh.to(weight)[rows]
            if bias is not None:
                fresh = torch.rand(bias.shape, generator=course.generator) * 2 * bound - bound
                bias[rows] = fresh.to(bias)[rows]

    # A fresh row of a class that no clean sample shows would stay noise.
    rows = course.shown
    free = {f"{head}.weight": rows} | ({f"{head}.bias": rows} if fresh_bias else {})
    optimizer = course.sgd(lr, free=free, momentum=momentum, weight_decay=weight_decay)
    last = epochs - 1 if guarded else None  # a fresh layer has to learn first
    for epoch in course.stage(stage, epochs, optimizer, begin=begin, guarded_from=last):
        if anneal:
            cosine(optimizer, lr, epoch, epochs)
        course.student.train()
        for batch in course.batches(clean, batch_size):
            images = course.images(batch)
            loss = course.clean_loss(course.student(images), images, batch.y, distillation)
            course.step(optimizer, loss + alpha * (weight * before)[rows].sum())
            with torch.no_grad():
                weight[rows] *= before[rows].norm() / weight[rows].norm()
