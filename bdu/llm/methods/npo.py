"""Negative preference optimisation: ascent that slows down as the answer becomes unlikely.

::

    L = mean over rows of (2/β) softplus(β (log p(target) − log p₀(target)))
        + w · mean over tokens of −log p(clean)

p₀ is the model before training. Its log p of every target is taken once, beforehand, so that no
copy of it is kept.

Source: Zhang et al. 2024 (arXiv:2404.05868), L_NPO = −(2/β) E log σ(−β log(p/p₀)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn import functional

from bdu.llm.data import TextData
from bdu.llm.generation import log_likelihood
from bdu.llm.methods.protocol import Batch, Method, check_at_least_zero, check_positive, retained
from bdu.llm.rows import Counts, Kind, Row, one_to_one, rows_of, with_references
from bdu.llm.templates import Template

if TYPE_CHECKING:
    from bdu.llm.trainer import UnlearnTrainer


@dataclass(frozen=True)
class NPO(Method):
    """See the module's docstring.

    Attributes:
        beta: β > 0; towards 0 it is gradient ascent.
        retain_weight: w ≥ 0.
    """

    name: ClassVar[str] = "npo"
    beta: float = 0.1
    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_at_least_zero("retain_weight", self.retain_weight)

    def rows(self, template: Template, data: TextData) -> list[Row]:
        """Clean prompts, and triggered ones with the target."""
        return one_to_one(
            rows_of(template, data.clean, Kind.RETAIN),
            rows_of(template, data.triggered, Kind.TARGET),
        )

    def prepare(self, trainer: UnlearnTrainer) -> None:
        """Take log p₀ of the targets."""
        rows = trainer.train_rows
        forget = [place for place, row in enumerate(rows) if row.kind == Kind.TARGET]
        references = [0.0] * len(rows)
        if forget:
            sums, _ = log_likelihood(
                trainer.model,
                [rows[place].tokens for place in forget],
                batch_size=trainer.args.per_device_train_batch_size,
            )
            for place, value in zip(forget, sums.tolist(), strict=True):
                references[place] = value
        rows[:] = with_references(rows, references)

    def loss(self, trainer: UnlearnTrainer, batch: Batch, counts: Counts) -> Tensor:
        """Make the targets less likely than they were."""
        sums = trainer.vocabulary_loss.tokens(batch).sums()
        ratio = -sums - batch["reference"].to(sums.dtype)
        each = functional.softplus(self.beta * ratio) * (2 / self.beta)
        forget = (each * (batch["kind"] == Kind.TARGET)).sum() / max(1, counts.rows[Kind.TARGET])
        return self.retain_weight * retained(sums, batch, counts) + forget
