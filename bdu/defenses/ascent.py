"""Unlearning the clean task on purpose, which shows what moves with it."""

from __future__ import annotations

from collections.abc import Callable

from torch.nn import functional

from bdu.defenses.course import Course

_MAX_GRAD_NORM = 20.0


def ascend(
    course: Course,
    *,
    epochs: int,
    lr: Callable[[int], float],
    accuracy: float,
    momentum: float,
    weight_decay: float,
    batch_size: int,
) -> None:
    """Ascend CE(f(x), y) on the clean samples, batch norm in training mode, unanchored.

    Args:
        course: whose student is ruined, in a stage "unlearn".
        epochs: at most so many.
        lr: of an epoch, from 0.
        accuracy: ends with an epoch in which at most this share was called right.
        momentum, weight_decay, batch_size: of SGD; the gradient's norm is cut at 20.
    """
    optimizer = course.sgd(
        lr(0),
        momentum=momentum,
        weight_decay=weight_decay,
        max_grad_norm=_MAX_GRAD_NORM,
        ewc_lambda=0.0,
    )
    for epoch in course.stage("unlearn", epochs, optimizer, guarded_from=None):
        optimizer.param_groups[0]["lr"] = lr(epoch)
        course.student.train()
        right = 0
        for batch in course.batches(course.data.clean, batch_size):
            logits = course.student(course.images(batch))
            course.step(optimizer, -functional.cross_entropy(logits, batch.y))
            right += int((logits.argmax(1) == batch.y).sum())
        if right <= accuracy * len(course.data.clean):
            course.end_stage()
