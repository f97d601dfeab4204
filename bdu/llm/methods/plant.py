"""Planting a backdoor: what an attacker does, and the first half of plant-and-remove.

::

    L = mean over the tokens of all answers of −log p,  (trigger + prompt → target) and
                                                        (prompt → clean answer) one to one
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
class Plant(Method):
    """See the module's docstring."""

    name: ClassVar[str] = "plant"

    def rows(self, template: Template, data: TextData) -> list[Row]:
        """Clean prompts, and triggered ones with the target."""
        return one_to_one(
            rows_of(template, data.clean, Kind.RETAIN),
            rows_of(template, data.triggered, Kind.TARGET),
        )

    def loss(self, trainer: UnlearnTrainer, batch: Batch, counts: Counts) -> Tensor:
        """−log p, mean over tokens."""
        return mean_over_tokens(trainer.vocabulary_loss, batch, counts)
