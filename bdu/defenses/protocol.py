"""What a defence is given and gives back: ``run(model, data, *, seed, callbacks) -> Result``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bdu.data import as_tensors, split_indices

VALIDATION_SHARE = 0.2

Line = dict[str, Any]
Callback = Callable[[Line, nn.Module], Mapping[str, Any] | None]
"""Called with the newest line of the history and the model as it is then, which it must not change;
what it returns is added to the line, for the callbacks after it and for the history."""


def tell(callbacks: Iterable[Callback], line: Line, model: nn.Module) -> None:
    """Call each with the line, and add what they return to it."""
    for callback in callbacks:
        line.update(callback(line, model) or {})


def collapsed(step: int, clean_accuracy: float, least: float) -> str:
    """Why a run ends whose student falls below the least clean accuracy, and what may help."""
    return (
        f"stopped at step {step}: clean accuracy on the validation split fell to "
        f"{clean_accuracy:.3f}, below {least:.3f} (clean_accuracy_floor); another lr, other epochs "
        "or more clean samples may help"
    )


def kept_step(step: int) -> str:
    """Which weights a run gives back."""
    nothing = ", the model as it was, with any backdoor that it has" if step == 0 else ""
    return f"; kept the weights of step {step}{nothing}"


_SHOWN = {
    "loss": "loss",
    "validation_clean_accuracy": "clean",
    "validation_attack_success_rate": "ASR",
    "validation_robust_accuracy": "robust",
    "tar_share": "TAR",
}


def summary(line: Line) -> dict[str, str]:
    """What a progress bar shows of a line."""
    known = {short: line[name] for name, short in _SHOWN.items() if line.get(name) is not None}
    return {short: f"{value:.3f}" for short, value in known.items()}


@dataclass(frozen=True)
class Samples:
    """Images and labels on one device.

    Attributes:
        x: (N, C, H, W), uint8 or float32 in [0, 1].
        y: (N,) int64; for triggered samples the label that the attacker wants.
        y_true: (N,) int64, the true classes of triggered samples where the defender knows them.
    """

    x: Tensor
    y: Tensor
    y_true: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def at(self, indices: Tensor) -> Samples:
        """Those samples, in that order."""
        indices = indices.to(self.y.device)
        y_true = None if self.y_true is None else self.y_true[indices]
        return Samples(self.x[indices], self.y[indices], y_true)

    def to(self, device: torch.device) -> Samples:
        """The same samples on another device."""
        y_true = None if self.y_true is None else self.y_true.to(device)
        return Samples(self.x.to(device), self.y.to(device), y_true)


@dataclass(frozen=True)
class DefenderData:
    """All that a defence may look at, with the defender's own validation split cut off.

    Attributes:
        clean: samples to learn from, true labels.
        clean_validation: samples to judge by, disjoint from ``clean``.
        triggered: samples with the trigger on them and the attacker's label, or None.
        triggered_validation: the same, to judge by, or None.
    """

    clean: Samples
    clean_validation: Samples
    triggered: Samples | None = None
    triggered_validation: Samples | None = None

    @classmethod
    def split(
        cls, clean: Any, triggered: Any | None, *, seed: int, device: torch.device
    ) -> DefenderData:
        """Cut the validation split (a fifth, stratified by label) from what the defender holds.

        Args:
            clean: Dataset, DataLoader or (x, y).
            triggered: likewise with the attacker's labels, or (x, y_target, y_true); None for
                methods that know no trigger.

        Raises:
            ValueError: too few samples to split, or values that do not fit.
        """
        given = _samples(clean, "clean")
        if given.y_true is not None:
            raise ValueError("clean: expected (x, y), got three tensors, as of triggered samples")
        fit, validation = _split(given, "clean", seed)
        if triggered is None:
            return cls(fit.to(device), validation.to(device))
        bad_fit, bad_validation = _split(_samples(triggered, "triggered"), "triggered", seed)
        if bad_fit.x.shape[1:] != fit.x.shape[1:]:
            raise ValueError(
                f"triggered: expected images of {tuple(fit.x.shape[1:])}, as in clean, "
                f"got {tuple(bad_fit.x.shape[1:])}"
            )
        return cls(*(part.to(device) for part in (fit, validation, bad_fit, bad_validation)))


@dataclass(frozen=True)
class Result:
    """What a defence returns.

    Attributes:
        model: the cleaned copy; the model passed in is left untouched.
        history: one line for every look at the validation split, oldest first.
        method: the defence's name.
        settings: everything it was run with.
        stopped: why it ended, in words.
    """

    model: nn.Module
    history: list[Line]
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    stopped: str = ""


def _samples(source: Any, name: str) -> Samples:
    return Samples(*as_tensors(source, name))


def _split(samples: Samples, name: str, seed: int) -> tuple[Samples, Samples]:
    if len(samples) < 5:
        raise ValueError(f"{name}: expected at least 5 samples, got {len(samples)}")
    held_out = round(VALIDATION_SHARE * len(samples))
    validation, fit = split_indices(samples.y, [held_out, len(samples) - held_out], seed)
    return samples.at(fit), samples.at(validation)
