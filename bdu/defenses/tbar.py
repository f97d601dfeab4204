"""TBAR: subtract what fine-tuning on the backdoor adds to the weights.

    θ_ft ← θ_bd fine-tuned on triggered images with the attack's label
    τ = θ_ft − θ_bd,   θ = θ_bd − α τ

arXiv:2510.14845, of which only summaries were available. The trigger is unknown here and inverted
(inversion.py; the paper uses DECREE on CLIP); clean images stand beside the triggered ones, so that
τ is the backdoor's direction and not that of forgetting the rest; and α is the largest on a grid
whose clean accuracy on the validation split is within `accuracy_margin` of before: all that is our
reading. Buffers stay as they are. Threat model: white box, few clean samples, no trigger.

Cost: an inversion, `epochs` forwards and backwards over the clean samples twice (clean and
triggered), as many forwards of the suspect model over the triggered ones, and a forward over the
validation split for the suspect model and for each α, 20 at most, until one is good enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdu.data import as_unit_float
from bdu.defenses.course import Course, Shared, check_numbers, read_options, share_called
from bdu.defenses.inversion import Inversion, log_targets
from bdu.defenses.protocol import DefenderData, Result

NAME = "tbar"
_GRID = 21  # values of α, evenly from 0


@dataclass(frozen=True)
class Settings(Shared):
    """The knobs of TBAR.

    Attributes:
        epochs, lr, momentum: of the fine-tuning on the backdoor.
        inversion_steps: of the inversion.
        largest_alpha: the grid for α ends here.
        accuracy_margin: clean accuracy that may be lost on the validation split, in [0, 1].
        batch_size: samples a step.
    """

    epochs: int = 5
    lr: float = 5e-3
    momentum: float = 0.9
    inversion_steps: int = 300
    largest_alpha: float = 4.0
    accuracy_margin: float = 0.02
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("epochs", "inversion_steps", "batch_size"))
        check_numbers(self, positive=("lr", "largest_alpha"), shares=("accuracy_margin",))
        check_numbers(self, below_one=("momentum",))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`."""
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    trigger = course.trigger(Inversion(steps=s.inversion_steps))
    optimizer = course.sgd(s.lr, momentum=s.momentum)
    for _ in course.stage("learn the backdoor", s.epochs, optimizer, guarded_from=None):
        course.student.eval()
        for batch in course.batches(data.clean, s.batch_size):
            images = as_unit_float(batch.x)
            with torch.no_grad():
                images, moved = course.alike(images, trigger.operator(images))
                odds = course.before(moved).log_softmax(1)
                wanted = (odds + log_targets(trigger.targets)[batch.y]).argmax(1)
            both, y = torch.cat([images, moved]), torch.cat([batch.y, wanted])
            triggered = torch.arange(len(both), device=both.device) >= len(images)
            loss = course.clean_loss(course.student(both), both, y, 0.0, moved=triggered)
            course.step(optimizer, loss)
    learned = course.once("learned", lambda: _weights(course.student))
    for _ in course.stage("subtract", 1, begin=lambda: _subtract(course, learned, s)):
        pass
    return course.result()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def _subtract(course: Course, learned: dict[str, Tensor], s: Settings) -> None:
    """Leave the student at the largest α that costs no more accuracy than allowed."""
    samples = course.data.clean_validation
    least = share_called(course.before, samples) - s.accuracy_margin

    def keeps_enough() -> bool:
        try:
            return share_called(course.student, samples) >= least
        except FloatingPointError:  # outputs that overflow
            return False

    for k in reversed(range(_GRID)):
        alpha = s.largest_alpha * k / (_GRID - 1)
        with torch.no_grad():
            for name, p in course.student.named_parameters():
                if name in learned:
                    before = course.before.get_parameter(name)
                    p.copy_(torch.lerp(before, learned[name], -alpha))
        if k == 0 or keeps_enough():
            course.note(alpha=alpha)
            return
