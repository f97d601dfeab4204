"""ULRL: unlearn the clean task to see which output neurons stand out, then relearn without them.

    1. unlearn:  θ' ← ascend CE(f(x), y)            until a fifth is still called right
    2. score:    s_c = Σ_j |W'_cj − W_cj|,  z_c = (s_c − median) / (1.4826 MAD)
                 S = {c: z_c > 3.5},  at most two
    3. relearn:  rows S of W ← U(−a, a), a = √(2 / fan-in), biases 0
                 θ ← descend CE(f(x), y) + α Σ_{c∈S} cos(W_c, W_c of the suspect model)

Min, Pham & Sun 2024 (arXiv:2405.14781) and the authors' code of the first version, whose numbers
are the defaults (those for CIFAR-10). Threat model: white box, 1 % clean data, no trigger.

Where this differs: the authors' code runs every batch of step 3 twice in training mode, which
updates batch norm twice; this does not. ``neurons="all"`` is ours: rows of every layer are scored,
each within its layer. So is ``keep_length``: with few images a row that starts short and is pushed
away stays short, and its class is hardly called any more; kept as long as the others, it loses no
class and can be pushed harder. An attack from all classes to all leaves no row that stands out;
then step 3 is plain fine-tuning, and a warning says so.

Cost: at most `unlearn_epochs` + `relearn_epochs` forward and backward passes over the clean
samples.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdu.data import as_unit_float
from bdu.defenses.ascent import ascend
from bdu.defenses.course import (
    USUAL_SPREAD,
    Course,
    Distilled,
    check_numbers,
    cosine,
    read_options,
)
from bdu.defenses.head import deviations, head_of, row_changes
from bdu.defenses.protocol import DefenderData, Result

NAME = "ulrl"
Neurons = Literal["last", "all"]

WITH_LENGTH_KEPT = {
    "keep_length": True,
    "alpha": 1.0,
    "distillation": 0.9,
    "least": 1,
    "logit_spread": USUAL_SPREAD,
}
"""Settings of ours, beside the epochs."""


@dataclass(frozen=True)
class Settings(Distilled):
    """The knobs of ULRL.

    Attributes:
        unlearn_epochs: at most so many passes in step 1.
        unlearn_lr: learning rate of step 1, a tenth of it after 10 epochs.
        unlearned_accuracy: step 1 ends with an epoch whose accuracy is at most this.
        neurons: "last": the rows of the last layer; "all": of every layer (ours).
        threshold: z from which a neuron is suspicious.
        most: suspicious neurons of a layer at most, those of the lowest index, as published.
        least: suspicious neurons of the last layer at least: where fewer reach the threshold,
            those with the highest z (ours; 0 is as published).
        relearn_epochs, lr: of step 3; the learning rate falls as a cosine.
        alpha: α ≥ 0, how hard suspicious rows are pushed away from what they were.
        keep_length: whether suspicious rows have the median length of their layer's rows, from
            their start and after every step (ours).
        momentum: of SGD, in both.
        batch_size: samples a step.
    """

    unlearn_epochs: int = 20
    unlearn_lr: float = 1e-2
    unlearned_accuracy: float = 0.2
    neurons: Neurons = "last"
    threshold: float = 3.5
    most: int = 2
    least: int = 0
    relearn_epochs: int = 20
    lr: float = 5e-3
    alpha: float = 0.7
    keep_length: bool = False
    momentum: float = 0.9
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neurons not in get_args(Neurons):
            raise ValueError(f"neurons: expected last or all, got {self.neurons!r}")
        check_numbers(self, counts=("unlearn_epochs", "relearn_epochs", "most", "batch_size"))
        check_numbers(self, positive=("unlearn_lr", "lr"), shares=("unlearned_accuracy",))
        check_numbers(self, at_least_zero=("alpha", "threshold", "least"), below_one=("momentum",))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`."""
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    original = dict(course.before.named_parameters())
    ascend(
        course,
        epochs=s.unlearn_epochs,
        lr=lambda epoch: s.unlearn_lr * (0.1 if epoch >= 10 else 1.0),
        accuracy=s.unlearned_accuracy,
        momentum=s.momentum,
        weight_decay=5e-4,
        batch_size=s.batch_size,
    )
    suspicious = course.once("suspicious", lambda: _suspicious(course, s))
    if not suspicious:
        warnings.warn(
            "ulrl: no neuron stands out, so what follows is plain fine-tuning", stacklevel=2
        )

    def begin() -> None:
        course.student.load_state_dict(course.before.state_dict())
        for name, rows in suspicious.items():
            _reinitialise(course, name, rows)
            if s.keep_length:
                _lengthen(course, name, rows)

    free = suspicious | {_bias_of(name): rows for name, rows in suspicious.items()}
    optimizer = course.sgd(s.lr, free=free, momentum=s.momentum)
    for epoch in course.stage("relearn", s.relearn_epochs, optimizer, begin=begin):
        cosine(optimizer, s.lr, epoch, s.relearn_epochs)
        course.student.train()
        for batch in course.batches(data.clean, s.batch_size):
            images = course.images(batch)
            loss = course.clean_loss(course.student(images), images, batch.y, s.distillation)
            for name, rows in suspicious.items():
                own, old = course.student.get_parameter(name)[rows], original[name][rows]
                away = functional.cosine_similarity(own.flatten(1), old.flatten(1))
                loss = loss + s.alpha * away.sum()
            course.step(optimizer, loss)
            for name, rows in suspicious.items() if s.keep_length else ():
                _lengthen(course, name, rows)
    return course.result()


def _suspicious(course: Course, s: Settings) -> dict[str, Tensor]:
    """Name of a weight → rows that stand out."""
    head = head_of(course.before, as_unit_float(course.data.clean.x[:1]))
    last = f"{head}.weight"
    names = [last]
    if s.neurons == "all":
        names = [name for name, p in course.named_parameters() if p.dim() > 1]
    found = {}
    for name in names:
        scores = row_changes(course.before.get_parameter(name), course.student.get_parameter(name))
        z = deviations(scores)
        (rows,) = torch.nonzero(z > s.threshold, as_tuple=True)
        rows = rows[: s.most]
        if name == last and len(rows) < s.least:
            rows = z.topk(min(s.least, len(z))).indices.sort().values
        if len(rows):
            found[name] = rows
    return found


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _reinitialise(course: Course, name: str, rows: Tensor) -> None:
    weight = course.student.get_parameter(name)
    bias = dict(course.named_parameters()).get(_bias_of(name))  # none where it is frozen
    bound = (2 / weight[0].numel()) ** 0.5
    fresh = torch.rand(weight[rows].shape, generator=course.generator) * 2 * bound - bound
    with torch.no_grad():
        weight[rows] = fresh.to(weight)
        if bias is not None:
            bias[rows] = 0.0


def _lengthen(course: Course, name: str, rows: Tensor) -> None:
    """Or shorten, to the median length of the layer's rows in the suspect model."""
    usual = course.before.get_parameter(name).flatten(1).norm(dim=1).median()
    weight = course.student.get_parameter(name)
    with torch.no_grad():
        own = weight[rows]
        length = own.flatten(1).norm(dim=1).clamp(min=torch.finfo(own.dtype).tiny)
        weight[rows] = own * (usual / length).view(-1, *[1] * (own.dim() - 1))
