"""FST: fine-tune features away from the backdoor by moving the last layer away from what it was.

    W ← fresh
    descend CE(f(x), y) + α Σ W · W of the suspect model,   ‖W‖ = what it was, after every step

Min et al. 2023 (arXiv:2310.01875), equation 2, and the authors' code (learning rate 0.01, momentum
0.9, α 0.1, 10 epochs, for 2 % clean data on CIFAR-10). Threat model: white box, few clean samples,
no trigger.

Cost: `epochs` forward and backward passes over the clean samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bdu.data import as_unit_float
from bdu.defenses.course import Course, Distilled, check_numbers, cosine, read_options
from bdu.defenses.head import head_of
from bdu.defenses.protocol import DefenderData, Result

NAME = "fst"


@dataclass(frozen=True)
class Settings(Distilled):
    """The knobs of FST.

    Attributes:
        epochs: passes over the clean samples.
        lr, momentum, weight_decay: of SGD.
        alpha: α ≥ 0.
        anneal: let the learning rate fall as a cosine; off is as published.
        batch_size: samples a step.
    """

    epochs: int = 10
    lr: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 0.0
    alpha: float = 0.1
    anneal: bool = False
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("epochs", "batch_size"), positive=("lr",))
        check_numbers(self, at_least_zero=("momentum", "weight_decay", "alpha"))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`."""
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    head = head_of(course.before, as_unit_float(data.clean.x[:1]))
    before = course.before.get_parameter(f"{head}.weight")
    weight = course.student.get_parameter(f"{head}.weight")

    def begin() -> None:
        # as torch initialises a layer, but from the run's own generator
        bound = before[0].numel() ** -0.5
        fresh = torch.rand(before.shape, generator=course.generator) * 2 * bound - bound
        with torch.no_grad():
            weight.copy_(fresh)

    free = {f"{head}.weight": torch.arange(len(before), device=before.device)}
    optimizer = course.sgd(s.lr, free=free, momentum=s.momentum, weight_decay=s.weight_decay)
    last = s.epochs - 1  # a fresh layer has to learn first
    for epoch in course.stage("tune", s.epochs, optimizer, begin=begin, guarded_from=last):
        if s.anneal:
            cosine(optimizer, s.lr, epoch, s.epochs)
        course.student.train()
        for batch in course.batches(data.clean, s.batch_size):
            images = course.images(batch)
            loss = course.clean_loss(course.student(images), images, batch.y, s.distillation)
            course.step(optimizer, loss + s.alpha * (weight * before).sum())
            with torch.no_grad():
                weight.mul_(before.norm() / weight.norm())
    return course.result()
