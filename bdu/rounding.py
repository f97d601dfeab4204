"""Stochastic rounding to bfloat16: up with the probability of what truncation would lose.

The expectation of the rounded value is the value itself, so updates smaller than half a step of
bfloat16 add up over the steps instead of vanishing. The random bits are a hash of (seed, step,
element) and of nothing else, so that every backend, thread count and grid draws the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


class Rounding(NamedTuple):
    """How one step rounds its parameters that are stored in bfloat16.

    Attributes:
        seed: any 64-bit integer.
        step: counts the optimizer's steps; an int, or a 0-dim int64 tensor on the device.
    """

    seed: int
    step: int | Tensor


def random_bits(rounding: Rounding, elements: Tensor) -> Tensor:
    """16 uniform bits for each element: lowbias32 (Ellis) chained over seed, step and the element's
    number, 32 bits at a time; an even element and its successor share a draw of 32 bits.

    Args:
        rounding: seed and step.
        elements: int64, ≥ 0, any shape.

    Returns:
        int64 in [0, 65535], of that shape.
    """
    seed, step = rounding.seed & 0xFFFFFFFFFFFFFFFF, int(rounding.step)
    high = torch.tensor((seed >> 32) + 0x9E3779B9 & _WORD)
    x = _mixed(_mixed(_mixed(high) ^ (seed & _WORD)) ^ (step & _WORD))
    pair = elements >> 1
    x = _mixed((x.to(elements.device) + (pair >> 32)) & _WORD)
    x = _mixed(x ^ (pair & _WORD))
    return torch.where(elements % 2 == 1, x >> 16, x & 0xFFFF)


def to_bfloat16(value: Tensor, bits: Tensor) -> Tensor:
    """``value`` (float32) rounded with the random bits of :func:`random_bits`; infinities and NaN
    stay what they are."""
    pattern = value.contiguous().view(torch.int32).to(torch.int64) & _WORD
    rounded = (((pattern + bits) & _WORD) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.isfinite(value), rounded, value.to(torch.bfloat16))


def _mixed(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)
