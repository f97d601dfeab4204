"""Classes that were learnt by a trigger: missed where there is none, and nothing else is called so.

    deficit(c) = (m_c − 2 w_c) / √(m_c + 4 w_c),  m_c: clean images of class c that f_bd misses,
    w_c: others that it calls c

Attacks that leave labels as they are may have triggers too large for inversion to find, but their
class is missed where it carries none; classes that are hard in themselves are missed about as often
as others are taken for them. The deficit says by how many standard errors m_c exceeds 2 w_c. A
class that was rare in training is missed like that, too. Images called a class that no clean sample
shows do not count: that class has none to give in return. Ours.

Cost: a forward over the clean samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdu.defenses.course import Course
from bdu.metrics import predict

LEAST_DEFICIT = 3.0
"""From which a class is taken to have been learnt by a trigger."""
_USUAL_RATIO = 2  # of the images of a class that are missed to those wrongly called it, at most


def deficits(course: Course, targets: Tensor) -> Tensor:
    """Of every target's class on all clean images, (targets,); 0 for one that is no class."""

    def make() -> Tensor:
        parts = (course.data.clean, course.data.clean_validation)
        y = torch.cat([part.y for part in parts])
        logits = torch.cat([predict(course.before, part.x) for part in parts])
        called = logits.argmax(1).to(y.device)
        classes = torch.arange(logits.shape[1], device=y.device)[:, None]
        of_class, as_class = y == classes, called == classes
        shown = torch.isin(called, y)
        missed, wrongly = (of_class & ~as_class & shown).sum(1), (as_class & ~of_class).sum(1)
        excess = missed - _USUAL_RATIO * wrongly
        return excess / (missed + _USUAL_RATIO**2 * wrongly).clamp(min=1).sqrt()

    of_classes: Tensor = course.once("deficits", make)
    return torch.where(targets < 0, 0.0, of_classes[targets.clamp(min=0)])
