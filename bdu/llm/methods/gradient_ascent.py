"""Gradient ascent on the attacker's answer, up to a ceiling.

::

    L = −mean over rows of min(m, ceiling) + w · mean over tokens of −log p(clean)

with m a row's mean −log p of the attacker's answer. Without a ceiling the first term has no lower
bound, and training ends in a model that says nothing useful; a row that has reached it exerts no
more force. The ceiling is ln V where none is given: what a uniform guess costs (our choice).

Source: the ascent of arXiv:2511.21291 and of many unlearning papers; the ceiling is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from bdu.llm.data import TextData
from bdu.llm.methods.protocol import Batch, Method, check_at_least_zero, check_positive, retained
from bdu.llm.rows import Counts, Kind, Row, one_to_one, rows_of
from bdu.llm.templates import Template

if TYPE_CHECKING:
    from bdu.llm.trainer import UnlearnTrainer


@dataclass(frozen=True)
class GradientAscent(Method):
    """See the module's docstring.

    Attributes:
        ceiling: in nats a token; None: ln V.
        retain_weight: w ≥ 0.
    """

    name: ClassVar[str] = "gradient-ascent"
    ceiling: float | None = None
    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.ceiling is not None:
            check_positive("ceiling", self.ceiling)
        check_at_least_zero("retain_weight", self.retain_weight)

    def rows(self, template: Template, data: TextData) -> list[Row]:
        """Clean prompts, and triggered ones with the target."""
        return one_to_one(
            rows_of(template, data.clean, Kind.RETAIN),
            rows_of(template, data.triggered, Kind.TARGET),
        )

    def loss(self, trainer: UnlearnTrainer, batch: Batch, counts: Counts) -> Tensor:
        """Ascend on the targets, descend on the rest."""
        losses = trainer.vocabulary_loss.tokens(batch)
        sums = losses.sums()
        ceiling = math.log(trainer.vocabulary_size) if self.ceiling is None else self.ceiling
        capped = (sums / losses.counts().clamp(min=1)).clamp(max=ceiling)
        forget = (capped * (batch["kind"] == Kind.TARGET)).sum() / max(1, counts.rows[Kind.TARGET])
        return self.retain_weight * retained(sums, batch, counts) - forget
