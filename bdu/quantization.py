"""A Fisher diagonal in 8 bits: one byte an entry and one bfloat16 scale for every 32 of them.

Blocks of 32 follow the order of the memory. With s the block's scale, its largest entry rounded up
to bfloat16, an entry is stored as a code q = 0 … 255:

    "square_root"     F = s (q / 255)²                          uint8, q itself
    "logarithmic"     F = s 2^(−24 (255 − q) / 254), 0 if q = 0  int8, q − 128

The square root is what a Fisher is the square of, a mean of gradients, so its steps are even in the
gradient: the finest of the two near the block's largest entries. The logarithm keeps the same
relative error, at most 3.3 %, over 24 octaves, which pays where the entries of a block differ by
many orders of magnitude. The square-root map and its block of 32 are FlashOptim's (for moments).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Map = Literal["square_root", "logarithmic"]

BLOCK = 32
SMALLEST = 4096
"""Elements from which on a tensor is stored in 8 bits; smaller ones are not worth the error."""

_OCTAVES = 24
_LOG_STEP = _OCTAVES / 254
_SLICE = 2**22  # elements at a time, so that the float32 copies of a large tensor stay small
CODES = {"square_root": torch.uint8, "logarithmic": torch.int8}


class Quantized(NamedTuple):
    """A tensor in 8 bits.

    Attributes:
        codes: uint8 or int8, of the tensor's shape and strides.
        scale: bfloat16, (⌈elements / 32⌉,), in the order of the memory.
    """

    codes: Tensor
    scale: Tensor


def quantize(fisher: Tensor, kind: Map) -> Quantized:
    """``fisher`` in 8 bits.

    Args:
        fisher: finite, ≥ 0, any floating dtype, dense (no gaps, no overlaps), any memory format.
        kind: the map.

    Raises:
        ValueError: another map, or a tensor with gaps.
    """
    if kind not in get_args(Map):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Map))}, got {kind!r}")
    flat = _flat(fisher)
    codes = torch.empty_like(fisher, dtype=CODES[kind])
    flat_codes = _flat(codes)
    scale = torch.empty(blocks_of(fisher), dtype=torch.bfloat16, device=fisher.device)
    for start in range(0, len(flat), _SLICE):
        part = flat[start : start + _SLICE].float()
        blocks = torch.nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
        scales = _bfloat16_above(blocks.amax(1))
        scale[start // BLOCK : start // BLOCK + len(scales)] = scales
        share = blocks / scales.float()[:, None]  # NaN where all is 0
        if kind == "square_root":
            code = (share.sqrt() * 255).round()
        else:
            code = (255 + share.log2() / _LOG_STEP).round()
        code = code.nan_to_num(0.0, neginf=0.0).clamp_(0, 255)
        if kind == "logarithmic":
            code -= 128
        flat_codes[start : start + _SLICE] = code.flatten()[: len(part)].to(codes.dtype)
    return Quantized(codes, scale)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The tensor that they stand for: float32, of the shape and strides of ``codes``.

    What every backend computes: float32, s / 255² rounded once, then one product.
    """
    flat = _flat(codes)
    fisher = torch.empty_like(codes, dtype=torch.float32)
    scales = scale.float().repeat_interleave(BLOCK)[: len(flat)]
    if codes.dtype == torch.uint8:
        code = flat.float()
        value = code * code * (scales * torch.tensor(1 / 255**2))
    else:
        code = flat.float() + 128
        value = torch.where(code == 0, 0.0, scales * ((code - 255) * _LOG_STEP).exp2())
    _flat(fisher).copy_(value)
    return fisher


def map_of(codes: Tensor) -> Map:
    """The map that the codes are of."""
    return "square_root" if codes.dtype == torch.uint8 else "logarithmic"


def blocks_of(tensor: Tensor) -> int:
    """Scales that a tensor of this many elements has."""
    return -(-tensor.numel() // BLOCK)


def _flat(tensor: Tensor) -> Tensor:
    """The elements in the order of the memory."""
    if tensor.numel() == 0:
        return tensor.reshape(0)
    dense = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride == dense:
            dense *= size
    if dense != tensor.numel():
        raise ValueError(
            f"fisher: expected elements without gaps, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}"
        )
    return tensor.as_strided((tensor.numel(),), (1,))


def _bfloat16_above(value: Tensor) -> Tensor:
    """The least bfloat16 that is not below; its largest where there is none."""
    bits = value.contiguous().view(torch.int32)
    above = ((bits + 0xFFFF) >> 16).clamp(max=0x7F7F)
    return above.to(torch.int16).view(torch.bfloat16)
