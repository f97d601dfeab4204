"""What the optimizers refuse, each with an error that names the argument."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from bdu import ops


def check_finite(argument: str, value: float | Tensor) -> float:
    """``value`` as a float, or a ValueError."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{argument}: expected a finite number, got {value}")
    return number


def check_at_least_zero(argument: str, value: float | Tensor) -> float:
    """``value`` as a float, or a ValueError."""
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{argument}: expected a finite number >= 0, got {value}")
    return number


def check_flags(
    foreach: bool | None, fused: bool | None, differentiable: bool, capturable: bool
) -> None:
    """Refuse what the fused step cannot do."""
    if differentiable:
        raise RuntimeError("differentiable: the fused step has no backward; expected False")
    if capturable:
        raise RuntimeError("capturable: not supported; expected False")
    if foreach and fused:
        raise RuntimeError("foreach, fused: expected at most one of them to be True")


def check_mode(mode: str) -> str:
    """``mode``, or a ValueError."""
    if mode not in ("proximal", "gradient"):
        raise ValueError(f"mode: expected 'proximal' or 'gradient', got {mode!r}")
    return mode


def check_decay(decay: float | None) -> float | None:
    """``batch_fisher_decay``, or a ValueError."""
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"batch_fisher_decay: expected a number in [0, 1), got {decay}")
    return decay


def check_entry(argument: str, entry: Tensor, param: Tensor, name: str) -> None:
    """A Fisher, an anchor or a moment that fits its parameter, or a ValueError."""
    if entry.layout != torch.strided or not entry.is_floating_point():
        kind = entry.layout if entry.layout != torch.strided else entry.dtype
        raise ValueError(
            f"{argument} of {name}: expected a dense floating-point tensor, got {kind}"
        )
    if entry.shape != param.shape:
        raise ValueError(
            f"{argument} of {name}: expected {ops.describe(param)}, got {ops.describe(entry)}"
        )


def check_fisher(fishers: Iterable[tuple[str, Tensor]]) -> None:
    """Every entry finite and ≥ 0, or a ValueError that names the parameter.

    Args:
        fishers: what to call each parameter, and its F.
    """
    ranges: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for name, fisher in fishers:
        if fisher.numel() > 0:
            names, bounds = ranges.setdefault(fisher.device, ([], []))
            names.append(name)
            bounds.append(torch.stack(torch.aminmax(fisher.detach())).double())
    for names, bounds in ranges.values():
        # One wait a device, not one a tensor.
        for name, (low, high) in zip(names, torch.stack(bounds).tolist(), strict=True):
            if not (low >= 0 and high < math.inf):  # a NaN is neither
                raise ValueError(
                    f"fisher of {name}: expected finite entries >= 0, got a range of "
                    f"{low:g} to {high:g}"
                )
