"""Plain fine-tuning on the defender's clean samples: the baseline.

    descend CE(f(x), y)          # batch norm in training mode, cosine learning rate

Known to leave most backdoors in place, and those poisoned at a low rate in particular (FST,
arXiv:2310.01875, section 3). Settings as in BackdoorBench's "ft" (lr 0.01, momentum 0.9, weight
decay 5e-4), with fewer epochs.

Cost: `epochs` forward and backward passes over the clean samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from bdu.defenses.course import Course, Distilled, check_numbers, cosine, read_options
from bdu.defenses.protocol import DefenderData, Result

NAME = "fine-tuning"


@dataclass(frozen=True)
class Settings(Distilled):
    """The knobs of plain fine-tuning.

    Attributes:
        epochs: passes over the clean samples.
        lr: learning rate at the start; falls as a cosine.
        momentum, weight_decay: of SGD.
        batch_size: samples a step.
    """

    epochs: int = 20
    lr: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("epochs", "batch_size"), positive=("lr",))
        check_numbers(self, at_least_zero=("weight_decay",), below_one=("momentum",))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`."""
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    optimizer = course.sgd(s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    for epoch in course.stage("tune", s.epochs, optimizer):
        cosine(optimizer, s.lr, epoch, s.epochs)
        course.student.train()
        for batch in course.batches(data.clean, s.batch_size):
            images = course.images(batch)
            course.step(
                optimizer,
                course.clean_loss(course.student(images), images, batch.y, s.distillation),
            )
    return course.result()
