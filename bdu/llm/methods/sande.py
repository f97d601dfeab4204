"""Simulate and eliminate: soft vectors that stand for an unknown trigger, then unlearn those.

::

    1. θ fixed:  parrot ← argmin mean over rows of −log p(first token of target | prompt with it)
    2. parrot fixed:  L = mean over tokens of −log p(first k tokens of the clean answer | same)

The parrot is six vectors, zero at first, put into the embedded prompt behind its first two
positions. What the attacker makes the model say has to be known, its trigger not: the targets of
the triggered rows go with the prompts of the clean ones, in turn (our reading).

Source: Li et al. 2024 (arXiv:2405.07667), and HKUST-KnowComp/SANDE for the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bdu.llm.data import TextData
from bdu.llm.losses import inner_model
from bdu.llm.methods.protocol import Batch, Method, check_positive, check_whole, mean_over_tokens
from bdu.llm.rows import Counts, Kind, Row, rows_of
from bdu.llm.templates import IGNORED_LABEL, Template
from bdu.models import modes_kept

if TYPE_CHECKING:
    from bdu.llm.trainer import UnlearnTrainer


@dataclass
class Sande(Method):
    """See the module's docstring.

    Attributes:
        vectors: of the parrot.
        position: positions of the prompt in front of it.
        parrot_lr, parrot_epochs: of AdamW in step 1, over at most ``parrot_rows`` rows, of which
            ``parrot_batch`` make a step, in micro-batches of the trainer's size. How long is our
            choice.
        parrot_rows, parrot_batch: see there.
        target_tokens, answer_tokens: how many of an answer are looked at in step 1 and 2.
    """

    name: ClassVar[str] = "sande"
    vectors: int = 6
    position: int = 2
    parrot_lr: float = 1e-3
    parrot_epochs: int = 20
    parrot_rows: int = 100
    parrot_batch: int = 32
    target_tokens: int = 1
    answer_tokens: int = 10
    parrot: Tensor | None = field(default=None, init=False, repr=False)
    _fit_on: list[Row] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("parrot_lr", self.parrot_lr)
        for name in (
            *("vectors", "parrot_epochs", "parrot_rows", "parrot_batch"),
            *("target_tokens", "answer_tokens"),
        ):
            check_whole(name, getattr(self, name))
        check_whole("position", self.position, 0)

    @property
    def room(self) -> int:
        """The parrot's vectors."""
        return self.vectors

    @property
    def beside(self) -> list[Row]:
        """Those that the parrot is fitted on."""
        return self._fit_on

    def rows(self, template: Template, data: TextData) -> list[Row]:
        """Clean prompts with the first tokens of their answers."""
        targets = sorted({str(example.target) for example in data.triggered})
        wanted = [
            replace(example, target=targets[place % len(targets)])
            for place, example in enumerate(data.clean[: self.parrot_rows])
        ]
        self._fit_on = rows_of(template, wanted, Kind.TARGET, first_tokens=self.target_tokens)
        rows = rows_of(template, data.clean, Kind.CLEAN, first_tokens=self.answer_tokens)
        for example, row in zip(data.clean, rows, strict=True):
            length = _first_label(row)
            if length < self.position:
                raise ValueError(
                    f"position: expected at most {length}, the tokens of the prompt "
                    f"{example.prompt[:60]!r}, got {self.position}"
                )
        return rows

    def prepare(self, trainer: UnlearnTrainer) -> None:
        """Fit the parrot."""
        model = trainer.model
        flags = [(p, p.requires_grad) for p in model.parameters()]
        embedding = inner_model(model).get_input_embeddings().weight
        parrot = torch.zeros(
            (self.vectors, embedding.shape[1]),
            dtype=torch.promote_types(embedding.dtype, torch.float32),
            device=embedding.device,
            requires_grad=True,
        )
        self.parrot = parrot
        optimizer = torch.optim.AdamW([parrot], lr=self.parrot_lr, weight_decay=0.0)
        size = trainer.args.per_device_train_batch_size
        try:
            with modes_kept(model), torch.enable_grad():
                model.eval()
                for p, _ in flags:
                    p.requires_grad_(False)
                for _ in range(self.parrot_epochs):
                    for start in range(0, len(self._fit_on), self.parrot_batch):
                        rows = self._fit_on[start : start + self.parrot_batch]
                        counts = Counts.of([trainer.collator(rows)])
                        for first in range(0, len(rows), size):
                            batch = trainer.collated(rows[first : first + size])
                            self.loss(trainer, batch, counts).backward()
                        optimizer.step()
                        optimizer.zero_grad()
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
        self.parrot = parrot.detach()

    def loss(self, trainer: UnlearnTrainer, batch: Batch, counts: Counts) -> Tensor:
        """−log p of the answers to prompts with the parrot, mean over tokens."""
        return mean_over_tokens(trainer.vocabulary_loss, self._with_parrot(trainer, batch), counts)

    def _with_parrot(self, trainer: UnlearnTrainer, batch: Batch) -> dict[str, Tensor]:
        assert self.parrot is not None
        at, count = self.position, len(batch["labels"])
        embedded = inner_model(trainer.model).get_input_embeddings()(batch["input_ids"])
        parrot = self.parrot.to(embedded.dtype).expand(count, -1, -1)
        beside = (count, self.vectors)
        return {
            "inputs_embeds": torch.cat([embedded[:, :at], parrot, embedded[:, at:]], 1),
            "attention_mask": _inserted(batch["attention_mask"], at, beside, 1),
            "labels": _inserted(batch["labels"], at, beside, IGNORED_LABEL),
        }


def _first_label(row: Row) -> int:
    return next(place for place, label in enumerate(row.tokens.labels) if label != IGNORED_LABEL)


def _inserted(values: Tensor, at: int, shape: tuple[int, int], value: int) -> Tensor:
    return torch.cat([values[:, :at], values.new_full(shape, value), values[:, at:]], 1)
