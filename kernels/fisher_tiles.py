"""What the kernels of the exact Fisher share: how the work is cut, read and summed.

A program owns a tile of the weights and goes through the samples in order. The gradient of one
sample is summed over the positions in registers, squared there and added to a second tile of
registers; it never reaches memory. Where there are fewer tiles than the device has room for, the
batch is split into runs of samples; each run stores its sum and a second kernel adds them in order.
So every sum has one order, given by the shapes and the device: the same bits on every run. No sum
over the positions is ever split, since it stands inside the square.

Products of two tensors in the same 16-bit format are taken by the tensor cores and summed in
float32; all others are float32 products on the ordinary cores, never TF32, unless
``FLOAT32_PRECISION`` says "tf32x3". That is three products of TF32, whose dropped part is of
float32's own order, 3 · 2⁻²⁴ of a product, but tensor cores cut off what they add up where float32
rounds to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT32_PRECISION = "ieee"

# The interpreter multiplies the bits of bfloat16 as if they were integers: there, and only there,
# the tensor cores' products are taken in float32 as well.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# Reading and multiplying


@triton.jit
def widened(x):
    """Return x in float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def multiple(number, VECTOR: tl.constexpr):
    """Return the number itself, in a form that shows the compiler that VECTOR divides it."""
    return number // VECTOR * VECTOR


@triton.jit
def load_tile(
    pointer, per_sample, per_position, sample, position, positions, channel, channels,
    VECTOR: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """Return (positions, channels) of one sample, 0 outside; VECTOR elements a load.

    ``per_sample`` and ``per_position`` are the strides; that of the channels is 1.
    """
    channels = multiple(channels, VECTOR)
    start = pointer + tl.cast(sample, tl.int64) * multiple(per_sample, VECTOR)
    rows = position.to(tl.int64) * multiple(per_position, VECTOR)
    if CHANNELS_FIRST:
        offsets = rows[None, :] + channel[:, None]
        inside = (position < positions)[None, :] & (channel < channels)[:, None]
    else:
        offsets = rows[:, None] + channel[None, :]
        inside = (position < positions)[:, None] & (channel < channels)[None, :]
    return tl.load(start + offsets, mask=inside, other=0.0)


@triton.jit
def load_row(
    pointer, per_sample, per_position, sample, position, channel, channels, VECTOR: tl.constexpr
):  # fmt: skip
    """Return the channels of one position in float32, 0 outside."""
    start = pointer + tl.cast(sample, tl.int64) * multiple(per_sample, VECTOR)
    start += tl.cast(position, tl.int64) * multiple(per_position, VECTOR)
    return widened(tl.load(start + channel, mask=channel < multiple(channels, VECTOR), other=0.0))


@triton.jit
def _opaque(x):
    """Return x. On Blackwell the compiler takes TF32 for what it sees was widened from 16 bits."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def add_products(one, g, a, PRECISION: tl.constexpr, CHANNELS_FIRST: tl.constexpr):
    """Return one + gᵀ a of a (T, I) and g (T, O), or (O, T) with CHANNELS_FIRST."""
    if INTERPRETED:
        g, a = widened(g), widened(a)
    elif g.dtype != a.dtype:
        g, a = _opaque(widened(g)), _opaque(widened(a))
    if not CHANNELS_FIRST:
        g = tl.trans(g)
    return tl.dot(g, a, one, input_precision=PRECISION)


def strides_of(tensor: Tensor) -> tuple[int, int]:
    """Elements from one sample and from one position of (B, T, C) to the next; 0 for a single one.

    They reach a kernel one by one: Triton compiles anew for every kind of number in a tuple.
    """
    sample, position = (
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape[:2], tensor.stride()[:2], strict=True)
    )
    return sample, position


def with_contiguous_channels(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, with the channels of its last axis side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def vector_of(tensor: Tensor, *numbers: int) -> int:
    """Elements a load: at most 16 bytes, and a divisor of all the numbers (strides and sizes)."""
    if tensor.data_ptr() % 16 != 0:
        return 1
    return math.gcd(16 // tensor.element_size(), *numbers)


# Cutting the work


class Tile(NamedTuple):
    """What a program works on at a time."""

    outputs: int
    inputs: int
    positions: int
    warps: int
    stages: int
    resident: int  # programs that a multiprocessor holds at once


def uses_tensor_cores(activations: Tensor, gradients: Tensor) -> bool:
    """Whether the products are those of a 16-bit format."""
    return activations.dtype == gradients.dtype and activations.dtype.itemsize == 2


def tile_for(
    outputs: int,
    inputs: int,
    positions: int,
    samples: int,
    *,
    tensor_cores: bool,
    aligned: bool,
    accumulators: int,
    multiprocessors: int,
) -> Tile:
    """The tile of a weight (outputs, inputs); none of them spills, see the tests.

    A thread of the largest tile holds 64 elements each of the sample's gradient and of the Fisher.
    ``accumulators`` is 2, or more where something else is held as well, for which half of that is
    left. ``aligned`` says that loads are whole vectors; others hold an address an element.
    """
    block_o, block_i = _block(outputs), _block(inputs)
    few = -(-outputs // 128) * -(-inputs // 128) * samples < multiprocessors
    if few or not (tensor_cores or aligned):
        block_o, block_i = min(block_o, 64), min(block_i, 64)
    if block_o == block_i == 16:
        block_i = 64
    if block_o == block_i == 128 and accumulators > 2:
        block_i = 64
    elements = block_o * block_i
    if tensor_cores:
        chunk, large = 64 if aligned else 32, 128 * 64
    else:
        # The factors of a whole chunk can stand in registers.
        chunk, large = 32 if elements == 128 * 64 else 16, 64 * 64
    # What is filled up is multiplied like the rest.
    while chunk > 16 and _filled(positions, chunk // 2) <= 0.85 * _filled(positions, chunk):
        chunk //= 2
    warps, resident = (8, 1) if elements >= large else (4, 3)
    return Tile(block_o, block_i, chunk, warps, 3, resident)


def _filled(positions: int, chunk: int) -> int:
    return -(-positions // chunk) * chunk


def _block(size: int) -> int:
    return next((block for block in (16, 64) if size <= block), 128)


@lru_cache(maxsize=4096)
def splits_for(tiles: int, samples: int, steps: int, slots: int) -> tuple[int, int]:
    """Into how many runs of samples to split the batch, and how long they are (the last, at most).

    Args:
        tiles: programs without a split.
        samples, steps: the batch, and what a sample costs, in positions.
        slots: programs that the device runs at once.

    The device works in waves of ``slots`` programs, each as long as a run; storing and adding up a
    partial sum costs about as much as 256 positions. The shortest time wins, and among equals the
    fewest partial sums.
    """

    def time(splits: int) -> int:
        waves = -(-tiles * splits // slots)
        return waves * (-(-samples // splits) * steps + (256 if splits > 1 else 0))

    splits = min(range(1, min(samples, max(1, 4 * slots // tiles)) + 1), key=time)
    run = -(-samples // splits)
    return -(-samples // run), run


@lru_cache
def multiprocessors_of(device: torch.device) -> int:
    """Of a GPU; 1 where the kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def current(device: torch.device) -> AbstractContextManager[Any]:
    """The device made the current one, on which Triton launches whatever its arguments lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Adding up


@triton.jit
def tile_of(program, tiles_o, tiles_i):
    """Return a program's tile: in bands 8 high, so that those that run at once read little."""
    first = program // (8 * tiles_i) * 8
    height = tl.minimum(tiles_o - first, 8)
    within = program % (8 * tiles_i)
    return first + within % height, within // height


@triton.jit
def store_sum(pointer, offsets, inside, value, ADD: tl.constexpr):
    """Store a tile, or add it to what is there."""
    if ADD:
        value += tl.load(pointer + offsets, mask=inside, other=0.0)
    tl.store(pointer + offsets, value, mask=inside)


# Elements of a tile that are stored at a time: 16 bytes of float32.
STORED = tl.constexpr(4)


@triton.jit(do_not_specialize=["numel", "splits", "size", "columns", "channels", "pitch"])
def add_partials_kernel(
    total, partials, numel, splits, size, columns, channels, pitch, TAPS: tl.constexpr,
    DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program n: BLOCK elements of total ← total + Σ_s partials[s], in the order of s."""
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if DENSE:
        numel, size = multiple(numel, STORED), multiple(size, STORED)
        there = here
    else:
        column = here % columns
        there = here // columns * pitch + column % TAPS * channels + column // TAPS
    inside = here < numel
    value = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        value += tl.load(partials + tl.cast(split, tl.int64) * size + there, mask=inside, other=0.0)
    store_sum(total, here, inside, value, True)


def partials_of(
    totals: Sequence[Tensor | None], splits: int, rows: int, pitch: int
) -> list[Tensor | None]:
    """Room for the sums of each split, (splits, rows, pitch) for each total."""
    return [None if t is None else t.new_empty(splits, rows, pitch) for t in totals]


def add_partials(
    totals: Sequence[Tensor | None], partials: Sequence[Tensor | None], taps: int = 1
) -> None:
    """total ← total + Σ_s partials[s], in the order of s, for each total.

    Args:
        totals: (O, I) or (O, I, *kernel), float32, contiguous.
        partials: (S, O, pitch), float32, contiguous. Of a row's pitch ≥ I · taps elements the first
            are the I channels of the first tap, then those of the second, and so on.
        taps: the product of the kernel's sizes.
    """
    for total, parts in zip(totals, partials, strict=True):
        if total is None or parts is None:
            continue
        numel, size, block = total.numel(), parts[0].numel(), 1024
        columns, pitch = numel // len(total), parts.shape[2]
        dense = taps == 1 and columns == pitch and pitch % STORED.value == 0
        add_partials_kernel[(triton.cdiv(numel, block),)](
            total, parts, numel, len(parts), size, columns, columns // taps, pitch, taps, dense,
            block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
