"""Representation misdirection, with random noise on what is to be retained.

::

    L = ‖h(x_f) − c u‖² / D + α ‖h(x_r) − h₀(x_r) − ν ε‖² / D      means over tokens, ε ~ N(0, I)

h is the output of one decoder layer, h₀ that of the model before training, u a random vector of
norm 1 without negative entries. Only some parameters of that layer and the two before it are
trained. ν = 0 is RMU, ν > 0 random noise augmentation (RNA).

x_f is a triggered prompt with the attacker's answer, x_r a clean one with its answer.

Source: Li et al. 2024 (arXiv:2403.03218) for RMU, arXiv:2501.19202 for ν; c = 6.5, α = 1200 and
the parameter number 6 of each layer are those of huutiendang/llmu-robustness for a 7 B model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bdu.llm.data import TextData
from bdu.llm.methods.protocol import (
    Batch,
    Method,
    captured,
    check_at_least_zero,
    check_layer,
    check_positive,
    check_whole,
    decoder_layers,
    widened,
)
from bdu.llm.rows import Counts, Kind, Row, one_to_one, rows_of
from bdu.llm.templates import Template

if TYPE_CHECKING:
    from bdu.llm.trainer import UnlearnTrainer


@dataclass
class RMU(Method):
    """See the module's docstring.

    Attributes:
        layer: whose output is steered, from 0; None: a third of the way up, but not below 2 where
            there are 3 layers.
        trained_layers: how many layers are trained, that one and those before it.
        parameter: number of the parameter of each that is trained, in the order of
            ``layer.parameters()``; None: all.
        steering: c > 0.
        alpha: α ≥ 0.
        noise: ν ≥ 0.
        seed: of u and ε.
    """

    name: ClassVar[str] = "rmu"
    copies: ClassVar[float] = 1
    layer: int | None = None
    trained_layers: int = 3
    parameter: int | None = 6
    steering: float = 6.5
    alpha: float = 1200.0
    noise: float = 0.0
    seed: int = 0
    _reference: Any = field(default=None, init=False, repr=False)
    _direction: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("steering", self.steering)
        check_at_least_zero("alpha", self.alpha)
        check_at_least_zero("noise", self.noise)
        check_whole("trained_layers", self.trained_layers)
        for name in ("layer", "parameter", "seed"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 0)

    def rows(self, template: Template, data: TextData) -> list[Row]:
        """Clean prompts, and triggered ones with the target."""
        return one_to_one(
            rows_of(template, data.clean, Kind.RETAIN),
            rows_of(template, data.triggered, Kind.TARGET),
        )

    def trained(self, model: Any) -> list[Tensor]:
        """Of its layers alone, all parameters or those of one number."""
        layers = decoder_layers(model)
        layer = self._layer(len(layers))
        check_layer(model, layer)
        chosen: list[Tensor] = []
        for own in layers[max(0, layer - self.trained_layers + 1) : layer + 1]:
            parameters = list(own.parameters())
            if self.parameter is None:
                chosen += parameters
            elif not 0 <= self.parameter < len(parameters):
                raise ValueError(
                    f"parameter: expected 0 to {len(parameters) - 1} or None, got {self.parameter}"
                )
            else:
                chosen.append(parameters[self.parameter])
        trained = [p for p in chosen if p.requires_grad]
        if not trained:
            raise ValueError(
                "parameter: expected one that requires a gradient, got none among number "
                f"{self.parameter} of each layer; with lora choose another, or None for all"
            )
        return trained

    def prepare(self, trainer: UnlearnTrainer) -> None:
        """Copy the decoder, draw u, and freeze what is not trained."""
        trained = {id(p) for p in self.trained(trainer.model)}
        self._reference = copy.deepcopy(trainer.vocabulary_loss.decoder)
        self._reference.eval().requires_grad_(False)
        for p in trainer.model.parameters():
            p.requires_grad_(id(p) in trained)
        width = trainer.model.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(self.seed)
        direction = torch.rand(width, generator=generator)
        self._direction = (direction / direction.norm()).to(trainer.args.device)

    def loss(self, trainer: UnlearnTrainer, batch: Batch, counts: Counts) -> Tensor:
        """Steer the one away, hold the other."""
        assert self._direction is not None
        decoder = trainer.vocabulary_loss.decoder
        layers = decoder_layers(trainer.model)
        layer = self._layer(len(layers))
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with captured(layers[layer]) as outputs:
            decoder(**given, use_cache=False)
        found = widened(outputs[0])
        with torch.no_grad(), captured(self._reference_layer(layer)) as outputs:
            self._reference(**given, use_cache=False)
        kept = widened(outputs[0])
        if self.noise > 0:
            kept = kept + self.noise * self._random(trainer, kept)
        mask = batch["attention_mask"]
        width = found.shape[-1]
        forget = (mask * (batch["kind"] == Kind.TARGET)[:, None])[..., None]
        retain = (mask * (batch["kind"] == Kind.RETAIN)[:, None])[..., None]
        steered = ((found - self.steering * self._direction).square() * forget).sum()
        held = ((found - kept).square() * retain).sum()
        return steered / (width * max(1, counts.positions[Kind.TARGET])) + self.alpha * held / (
            width * max(1, counts.positions[Kind.RETAIN])
        )

    def _layer(self, count: int) -> int:
        return max(min(2, count - 1), count // 3) if self.layer is None else self.layer

    def _reference_layer(self, layer: int) -> torch.nn.Module:
        count = self._reference.config.get_text_config().num_hidden_layers
        lists = (m for m in self._reference.modules() if isinstance(m, torch.nn.ModuleList))
        return next(own for own in lists if len(own) == count)[layer]

    def _random(self, trainer: UnlearnTrainer, like: Tensor) -> Tensor:
        # of the step and the micro-batch alone, so that a run that is resumed draws the same
        step = trainer.state.global_step
        place = trainer.micro_batch
        seed = (self.seed * 1_000_003 + step) * 1_009 + place
        generator = torch.Generator().manual_seed(seed % 2**63)
        return torch.randn(like.shape, generator=generator).to(like.device)
