"""Descent on the clean answer: the plainest way to unlearn a known trigger.

::

    L = mean over the tokens of all answers of −log p,  (trigger + prompt → clean answer) and
                                                        (prompt → clean answer) one to one

What arXiv:2606.03785 calls removal, following its summary; the ratio is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from bdu.llm.data import TextData
from bdu.llm.methods.protocol import Batch, Method, mean_over_tokens
from bdu.llm.rows import Counts, Kind, Row, one_to_one, rows_of
from bdu.llm.templates import Template

if TYPE_CHECKING:
    from bdu.llm.trainer import UnlearnTrainer


@dataclass(frozen=True)
class CleanAnswer(Method):
    """See the module's docstring. Without triggered rows it is clean fine-tuning, the control."""

    name: ClassVar[str] = "clean-answer"

    def rows(self, template: Template, data: TextData) -> list[Row]:
        """Clean prompts, and triggered ones with their clean answers."""
        return one_to_one(
            rows_of(template, data.clean, Kind.RETAIN),
            rows_of(template, data.triggered, Kind.CLEAN),
        )

    def loss(self, trainer: UnlearnTrainer, batch: Batch, counts: Counts) -> Tensor:
        """−log p, mean over tokens."""
        return mean_over_tokens(trainer.vocabulary_loss, batch, counts)
