"""What the optimizers refuse, each with an error that names the argument."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bdu import ops, quantization


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


def check_flags(foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Refuse what the fused step cannot do."""
    if differentiable:
        raise RuntimeError("differentiable: the fused step has no backward; expected False")
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


def check_seed(seed: int | None) -> int | None:
    """``stochastic_rounding``, or a ValueError."""
    if seed is not None and (
        isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64
    ):
        raise ValueError(
            f"stochastic_rounding: expected a whole number of 64 bits or None, got {seed!r}"
        )
    return seed


def check_fisher_dtype(fisher_dtype: Any, anchor_dtype: Any, maps: Iterable[Any]) -> None:
    """Refuse what F and θ* cannot be kept in."""
    floating = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    named = ", ".join(map(repr, maps))
    if fisher_dtype is not None and fisher_dtype not in (*floating, *maps):
        raise ValueError(
            f"fisher_dtype: expected a floating dtype, {named} or None, got {fisher_dtype!r}"
        )
    if anchor_dtype is not None and anchor_dtype not in floating:
        raise ValueError(f"anchor_dtype: expected a floating dtype or None, got {anchor_dtype!r}")


def check_capture(groups: Iterable[dict[str, Any]]) -> None:
    """Refuse a capture that would freeze numbers which are meant to change."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    for group in groups:
        if not group["capturable"]:
            raise RuntimeError(
                "capturable: expected True for a step in a CUDA graph, got False: lr, ewc_lambda "
                "and the step count would be frozen"
            )


def check_scale(scale: Any, param: Tensor, name: str) -> None:
    """The scales of a loaded Fisher in 8 bits, or a ValueError."""
    blocks = quantization.blocks_of(param)
    if (
        not isinstance(scale, Tensor)
        or scale.dtype != torch.bfloat16
        or scale.shape != (blocks,)
        or not bool((scale.isfinite() & (scale >= 0)).all())
    ):
        got = type(scale).__name__ if not isinstance(scale, Tensor) else ops.describe(scale)
        raise ValueError(
            f"fisher_scale of {name}: expected ({blocks},) torch.bfloat16, finite and >= 0, "
            f"got {got}"
        )


def check_entry(
    argument: str, entry: Tensor, param: Tensor, name: str, *, or_codes: bool = False
) -> None:
    """A Fisher, an anchor or a moment that fits its parameter, or a ValueError.

    Args:
        or_codes: whether a Fisher may be the codes of one in 8 bits.
    """
    is_codes = or_codes and argument == "fisher" and ops.is_8_bits(entry)
    if entry.layout != torch.strided or not (entry.is_floating_point() or is_codes):
        kind = entry.layout if entry.layout != torch.strided else entry.dtype
        raise ValueError(
            f"{argument} of {name}: expected a dense floating-point tensor, got {kind}"
            + (" (bdu.quantization.dequantize)" if ops.is_8_bits(entry) else "")
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
    _check_range("fisher", fishers, least=0.0)


def check_anchor(anchors: Iterable[tuple[str, Tensor]]) -> None:
    """Every entry finite, or a ValueError that names the parameter.

    Args:
        anchors: what to call each parameter, and its θ*.
    """
    _check_range("anchor", anchors, least=-math.inf)


def _check_range(argument: str, entries: Iterable[tuple[str, Tensor]], least: float) -> None:
    ranges: dict[torch.device, tuple[list[str], list[Tensor]]] = {}
    for name, entry in entries:
        if entry.numel() > 0:
            names, bounds = ranges.setdefault(entry.device, ([], []))
            names.append(name)
            bounds.append(torch.stack(torch.aminmax(entry.detach())).double())
    for names, bounds in ranges.values():
        # One wait a device, not one a tensor.
        for name, (low, high) in zip(names, torch.stack(bounds).tolist(), strict=True):
            if not (low >= least and -math.inf < low and high < math.inf):  # a NaN is neither
                wanted = "finite entries >= 0" if least == 0 else "finite entries"
                raise ValueError(
                    f"{argument} of {name}: expected {wanted}, got a range of {low:g} to {high:g}"
                )
