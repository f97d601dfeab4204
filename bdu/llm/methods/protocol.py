"""What :class:`bdu.llm.trainer.UnlearnTrainer` asks of a method, and what several methods share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from bdu.llm.data import TextData
from bdu.llm.losses import VocabularyLoss, inner_model
from bdu.llm.rows import Counts, Kind, Row
from bdu.llm.templates import Template

if TYPE_CHECKING:
    from bdu.llm.trainer import UnlearnTrainer

Batch = Mapping[str, Any]


class Method:
    """A method; what it is given it never changes.

    Attributes:
        name: on the command line and in runs.
        copies: how many further copies of the weights it keeps, for the memory plan.
        needs_triggered: whether it needs triggered rows.
    """

    name: ClassVar[str]
    copies: ClassVar[float] = 0
    needs_triggered: ClassVar[bool] = True

    @property
    def room(self) -> int:
        """Positions that it puts into every row, beside the row's own tokens."""
        return 0

    @property
    def beside(self) -> list[Row]:
        """Rows that it reads beside the training set, once that was made."""
        return []

    def check(self, model: Any, *, gradient_checkpointing: bool) -> None:
        """Refuse a model, which may be without weights, or a way to train it.

        Raises:
            ValueError: a setting that does not go with them.
        """
        self.trained(model)

    def trained(self, model: Any) -> list[Tensor]:
        """The parameters that it trains, of those that require a gradient."""
        return [p for p in model.parameters() if p.requires_grad]

    def rows(self, template: Template, data: TextData) -> list[Row]:
        """The training set."""
        raise NotImplementedError

    def prepare(self, trainer: UnlearnTrainer) -> None:
        """Before training, with the weights as they were given, also where a run is resumed."""

    def begin(self, trainer: UnlearnTrainer, batches: Sequence[Batch]) -> None:
        """Before each optimizer step, with all its micro-batches."""

    def loss(self, trainer: UnlearnTrainer, batch: Batch, counts: Counts) -> Tensor:
        """The part of a micro-batch in the step's loss: the parts add up to it."""
        raise NotImplementedError


def mean_over_tokens(losses: VocabularyLoss, batch: Batch, counts: Counts) -> Tensor:
    """Σ ℓ of a batch over the number of labelled tokens of the whole step, whatever their kind."""
    return losses.total(batch) / max(1, sum(counts.tokens.values()))


def retained(
    sums: Tensor, batch: Batch, counts: Counts, *, kinds: Sequence[Kind] = (Kind.RETAIN,)
) -> Tensor:
    """Σ ℓ of the rows of these kinds over the number of their tokens in the whole step."""
    total = max(1, sum(counts.tokens[kind] for kind in kinds))
    chosen = sum((batch["kind"] == kind) for kind in kinds)
    return (sums * chosen).sum() / total


def check_at_least_zero(name: str, value: float) -> None:
    """Raise ValueError unless value is a finite number ≥ 0."""
    if not _is_number(value) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a number >= 0, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless value is a finite number > 0."""
    if not _is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")


def check_whole(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless value is a whole number of at least this."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers.

    Raises:
        ValueError: a model in which they cannot be told.
    """
    inner = inner_model(model)
    count = inner.config.get_text_config().num_hidden_layers
    found = [
        module
        for module in inner.base_model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise ValueError(f"model: expected a list of {count} layers in {type(inner).__name__}")
    return found[0]


def check_layer(model: Any, layer: int) -> None:
    """Raise ValueError unless the model has this layer."""
    count = len(decoder_layers(model))
    if not 0 <= layer < count:
        raise ValueError(f"layer: expected 0 to {count - 1}, got {layer}")


def widened(tensor: Tensor) -> Tensor:
    """In float64 where it is, else in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the module's outputs, hidden states (B, T, D), while inside."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handle = module.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def added(module: nn.Module, delta: Tensor) -> Iterator[None]:
    """Add ``delta``, which broadcasts to (B, T, D), to the module's output while inside."""

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output + delta.to(output.dtype)
        return (output[0] + delta.to(output[0].dtype), *output[1:])

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
