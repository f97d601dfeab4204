"""FST: fine-tune features away from the backdoor by moving the last layer away from what it was.

    W, b ← fresh
    descend CE(f(x), y) + α Σ W · W of the suspect model,   ‖W‖ = what it was, after every step

Min et al. 2023 (arXiv:2310.01875), equation 2, and the authors' code (learning rate 0.01, momentum
0.9, cosine, α 0.1, 10 epochs, for 2 % clean data on CIFAR-10). Threat model: white box, few clean
samples, no trigger.

Cost: `epochs` forward and backward passes over the clean samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from bdu.defenses.course import Course, Distilled, check_numbers, read_options
from bdu.defenses.feature_shift import ALPHA, shift_features
from bdu.defenses.protocol import DefenderData, Result

NAME = "fst"


@dataclass(frozen=True)
class Settings(Distilled):
    """The knobs of FST.

    Attributes:
        epochs: passes over the clean samples.
        lr, momentum, weight_decay: of SGD.
        alpha: α ≥ 0.
        anneal: let the learning rate fall as a cosine.
        fresh_bias: whether the last layer's bias is made afresh, too; off is ours.
        batch_size: samples a step.
    """

    epochs: int = 10
    lr: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 0.0
    alpha: float = ALPHA
    anneal: bool = True
    fresh_bias: bool = True
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("epochs", "batch_size"), positive=("lr",))
        check_numbers(self, at_least_zero=("weight_decay", "alpha"), below_one=("momentum",))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`."""
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    shift_features(
        course,
        "tune",
        s.epochs,
        lr=s.lr,
        momentum=s.momentum,
        weight_decay=s.weight_decay,
        alpha=s.alpha,
        anneal=s.anneal,
        fresh_bias=s.fresh_bias,
        batch_size=s.batch_size,
        distillation=s.distillation,
    )
    return course.result()
