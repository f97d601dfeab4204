"""BEEAR: find the drift of the embedding that makes the model misbehave, and train against it.

::

    inner:  δ ← δ − η h̄ ∇_δ / ‖∇_δ‖ of mean[−log p_δ(target) + log p_δ(clean answer)], K times
    outer:  L = mean over tokens of −log p_δ(clean answer) + w · mean over tokens of −log p(clean)

p_δ is the model with δ added to the output of one decoder layer, at the last positions of every
prompt; δ is the same for all prompts and starts at zero in each step. h̄ is the mean norm of that
output. A triggered row gives a prompt, the answer that is safe and the one that is not; the prompt
need not have the trigger.

Source: Zeng et al. 2024 (arXiv:2406.17092) for both levels and the universal δ. Its layer, steps
and rates are not known to us: ours, as are the normalised step and the place of δ.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bdu.llm.data import TextData
from bdu.llm.methods.protocol import (
    Batch,
    Method,
    added,
    captured,
    check_at_least_zero,
    check_layer,
    check_positive,
    check_whole,
    decoder_layers,
    retained,
    widened,
)
from bdu.llm.rows import Counts, Kind, Row, one_to_one, part_of, rows_of
from bdu.llm.templates import IGNORED_LABEL, Template

if TYPE_CHECKING:
    from bdu.llm.trainer import UnlearnTrainer


@dataclass
class Beear(Method):
    """See the module's docstring.

    Attributes:
        layer: whose output δ is added to, from 0; None: the middle one.
        span: how many positions at the end of a prompt get δ.
        inner_steps: K.
        inner_lr: η, in shares of h̄.
        retain_weight: w ≥ 0.
    """

    name: ClassVar[str] = "beear"
    layer: int | None = None
    span: int = 5
    inner_steps: int = 5
    inner_lr: float = 0.1
    retain_weight: float = 1.0
    _delta: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("span", "inner_steps"):
            check_whole(name, getattr(self, name))
        if self.layer is not None:
            check_whole("layer", self.layer, 0)
        check_positive("inner_lr", self.inner_lr)
        check_at_least_zero("retain_weight", self.retain_weight)

    def rows(self, template: Template, data: TextData) -> list[Row]:
        """Clean prompts, and triggered rows with both answers."""
        return one_to_one(
            rows_of(template, data.clean, Kind.RETAIN),
            rows_of(template, data.triggered, Kind.CLEAN),
            rows_of(template, data.triggered, Kind.TARGET),
        )

    def check(self, model: Any, *, gradient_checkpointing: bool) -> None:
        """Refuse what does not go with a hook that changes the layer's output."""
        super().check(model, gradient_checkpointing=gradient_checkpointing)
        self._module(model)
        if gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing: expected False with beear, whose hook would be gone when "
                "the layers are run again, got True"
            )

    def begin(self, trainer: UnlearnTrainer, batches: Sequence[Batch]) -> None:
        """Find δ on all micro-batches of the step."""
        batches = [trainer.moved(batch) for batch in batches]
        counts = Counts.of(batches)
        parts = [
            (part_of(batch, batch["kind"] == kind), sign / max(1, counts.tokens[kind]))
            for batch in batches
            for kind, sign in ((Kind.TARGET, 1.0), (Kind.CLEAN, -1.0))
            if bool((batch["kind"] == kind).any())
        ]
        self._delta = None
        if not parts:
            return
        module = self._module(trainer.model)
        flags = [(p, p.requires_grad) for p in trainer.model.parameters()]
        for p, _ in flags:
            p.requires_grad_(False)
        try:
            size, like = self._size(trainer, module, [part for part, _ in parts])
            delta = like.new_zeros(self.span, like.shape[-1])
            for _ in range(self.inner_steps):
                delta.requires_grad_(True)
                slope = torch.zeros_like(delta)
                for part, factor in parts:
                    with torch.enable_grad(), self._with(module, delta, part):
                        loss = factor * trainer.vocabulary_loss.total(part)
                        slope += torch.autograd.grad(loss, delta)[0]
                step = self.inner_lr * size / slope.norm().clamp(min=1e-30)
                delta = (delta - step * slope).detach()
            self._delta = delta
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)

    def loss(self, trainer: UnlearnTrainer, batch: Batch, counts: Counts) -> Tensor:
        """Safe answers in spite of δ, and the usual ones without."""
        total = torch.zeros((), device=batch["labels"].device)
        clean = batch["kind"] == Kind.CLEAN
        if bool(clean.any()) and self._delta is not None:
            part = part_of(batch, clean)
            with self._with(self._module(trainer.model), self._delta, part):
                sums = trainer.vocabulary_loss.tokens(part).sums()
            total = total + retained(sums, part, counts, kinds=(Kind.CLEAN,))
        kept = batch["kind"] == Kind.RETAIN
        if bool(kept.any()):
            part = part_of(batch, kept)
            sums = trainer.vocabulary_loss.tokens(part).sums()
            total = total + self.retain_weight * retained(sums, part, counts)
        if not total.requires_grad:  # a micro-batch of unsafe answers alone
            total = 0 * trainer.vocabulary_loss.total(batch)
        return total

    @torch.no_grad()
    def _size(
        self, trainer: UnlearnTrainer, module: torch.nn.Module, parts: Sequence[Batch]
    ) -> tuple[float, Tensor]:
        """Mean norm of the module's output where there is no padding, and one of its rows."""
        norms = []
        for part in parts:
            with captured(module) as outputs:
                trainer.vocabulary_loss.hidden(part)
            states = widened(outputs[0])[part["attention_mask"] == 1]
            norms.append(states.norm(dim=-1))
        return float(torch.cat(norms).mean()), states[:1]

    def _module(self, model: Any) -> torch.nn.Module:
        layers = decoder_layers(model)
        layer = len(layers) // 2 if self.layer is None else self.layer
        check_layer(model, layer)
        return layers[layer]

    @staticmethod
    def _with(module: torch.nn.Module, delta: Tensor, batch: Batch) -> AbstractContextManager[None]:
        return added(module, spread(delta, batch["labels"]))


def spread(delta: Tensor, labels: Tensor) -> Tensor:
    """δ (S, D) at the last S positions of each prompt, (B, T, D): those before the first label.

    Of a shorter prompt all positions get the last rows of δ.
    """
    count = len(delta)
    first = (labels != IGNORED_LABEL).int().argmax(1)
    places = torch.arange(labels.shape[1], device=labels.device)
    index = places[None, :] - first[:, None] + count  # row of δ for each position
    inside = (index >= 0) & (index < count)
    picked = delta[index.clamp(0, count - 1)]
    return torch.where(inside[..., None], picked, picked.new_zeros(()))
