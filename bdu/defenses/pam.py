"""PAM: tune where the path back to the backdoored weights is steep.

    Δ = θ_bd − θ;   g = ∇ CE at θ + ρ Δ/‖Δ‖₂;   θ ← θ − lr g             one backward a step
    data: clean images, of every batch a fifth and one more under an inverted trigger, true labels;
    the trigger is inverted anew at the start of every round

Min et al. 2024 (arXiv:2410.09838), and the authors' settings: ρ 0.5, SGD 0.01 with momentum 0.1,
batch 128, 3 rounds of 30 epochs. The paper inverts with BTI-DBF; the inversion here is ours
(inversion.py), of the suspect model in the first round and of the student after. Threat model:
white box, 2-5 % clean data, no trigger.

Cost of a step: one forward and one backward; of a round, an inversion.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdu.data import as_unit_float
from bdu.defenses.course import Course, Distilled, check_numbers, read_options
from bdu.defenses.inversion import Inversion, Inverted, invert_trigger
from bdu.defenses.protocol import DefenderData, Result
from bdu.ops import grad_norm

NAME = "pam"


@dataclass(frozen=True)
class Settings(Distilled):
    """The knobs of PAM.

    Attributes:
        rounds, epochs: each round inverts a trigger and makes so many passes over the samples.
        inversion_steps: of the inversion.
        rho: ρ ≥ 0.
        triggered_share: of each batch; one more than that many are put under the trigger.
        lr, momentum, weight_decay: of SGD.
        batch_size: samples a step.
    """

    rounds: int = 3
    epochs: int = 30
    inversion_steps: int = 300
    rho: float = 0.5
    triggered_share: float = 0.2
    lr: float = 1e-2
    momentum: float = 0.1
    weight_decay: float = 0.0
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("rounds", "epochs", "inversion_steps", "batch_size"))
        check_numbers(self, positive=("lr",), shares=("triggered_share",))
        check_numbers(self, at_least_zero=("rho", "weight_decay"), below_one=("momentum",))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`."""
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    optimizer = course.sgd(s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    parameters: list[Tensor] = [p for _, p in course.named_parameters()]
    names = [name for name, _ in course.named_parameters()]
    suspect: list[Tensor] = [course.before.get_parameter(name) for name in names]
    for epoch in course.stage("tune", s.rounds * s.epochs, optimizer):
        number = epoch // s.epochs
        trigger = _inverted(course, number, s)
        course.student.train()
        for batch in course.batches(data.clean, s.batch_size):
            images = as_unit_float(batch.x)
            count = min(len(images), int(s.triggered_share * len(images)) + 1)
            with torch.no_grad():
                moved = torch.cat([trigger.operator(images[:count]), images[count:]])
            images, moved = course.alike(images, moved)
            triggered = torch.arange(len(images), device=images.device) < count
            optimizer.zero_grad()
            with _towards(parameters, suspect, s.rho):
                logits = course.student(moved)
                loss = course.clean_loss(logits, images, batch.y, s.distillation, moved=triggered)
                loss.backward()
            course.apply(optimizer, loss)
    return course.result()


def _inverted(course: Course, number: int, s: Settings) -> Inverted:
    settings = Inversion(steps=s.inversion_steps)
    if number == 0:
        return course.trigger(settings)

    def make() -> dict[str, Any]:
        return invert_trigger(
            course.student.eval(),
            course.data.clean,
            seed=course.seed + 1000 * number,
            settings=settings,
            wrap=course.bar("inversion"),
        ).state()

    return Inverted.from_state(course.once(f"trigger {number}", make))


@contextmanager
def _towards(parameters: list[Tensor], suspect: list[Tensor], rho: float) -> Iterator[None]:
    """Within it the weights stand at θ + ρ (θ_bd − θ) / ‖θ_bd − θ‖₂."""
    with torch.no_grad():
        offset = torch._foreach_sub(suspect, parameters)
        scale = rho / (float(grad_norm(offset)) + 1e-12)
        before = [p.detach().clone() for p in parameters]
        torch._foreach_add_(parameters, offset, alpha=scale)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
