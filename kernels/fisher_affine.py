"""The exact Fisher of the γ and β of a normalisation, or of any bias, in Triton.

Of y = x̂ ∘ γ + β it is Σ_b (Σ_t g_btc x̂_btc)² and Σ_b (Σ_t g_btc)². The first kernel reads a and g
once and stores the sums over t, of each sample and channel; where there are too few of those to
fill the device, of each of some runs of positions. The second adds the runs in order, squares, and
adds up the samples. What is stored is small, (splits, B, C): so here, unlike in
:mod:`bdu.kernels.fisher_tiles`, positions can be split before the square.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdu.kernels.fisher_tiles import (
    current,
    multiple,
    multiprocessors_of,
    store_sum,
    vector_of,
    widened,
)

# Elements of a and of g that a program of 4 warps reads at a time: 16 a thread.
_TILE = 2048

# The contiguous axis of a tensor (B, T, C).
_NEITHER = tl.constexpr(0)
_POSITION = tl.constexpr(1)
_CHANNEL = tl.constexpr(2)


class Layout(NamedTuple):
    """How a tensor is read: what is contiguous, and how many elements a load takes."""

    minor: int
    vector: int


@triton.jit
def _load(
    pointer, strides, sample, t, last, c, channels, MINOR: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """Return the tile (channels, positions) of a sample in float32, 0 outside."""
    start = pointer + tl.cast(sample, tl.int64) * multiple(strides[0], VECTOR)
    t, c = t[None, :].to(tl.int64), c[:, None].to(tl.int64)
    if MINOR == _CHANNEL:
        offsets = t * multiple(strides[1], VECTOR) + c
        inside = (t < last) & (c < multiple(channels, VECTOR))
    elif MINOR == _POSITION:
        offsets = c * multiple(strides[2], VECTOR) + t
        inside = (t < multiple(last, VECTOR)) & (c < channels)
    else:
        offsets = t * strides[1] + c * strides[2]
        inside = (t < last) & (c < channels)
    return widened(tl.load(start + offsets, mask=inside, other=0.0))


@triton.jit
def _statistic(
    pointer, strides, sample, t, last, c, channels, PER_POSITION: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Return a mean or inverse deviation, as large as it is."""
    offset = tl.cast(sample, tl.int64) * strides[0]
    inside = True
    if PER_POSITION:
        offset += t[None, :].to(tl.int64) * strides[1]
        inside &= t[None, :] < last
    if PER_CHANNEL:
        offset += c[:, None].to(tl.int64) * strides[2]
        inside &= c[:, None] < channels
    if PER_POSITION or PER_CHANNEL:
        value = tl.load(pointer + offset, mask=inside, other=0.0)
    else:
        value = tl.load(pointer + offset)
    return widened(value)


@triton.jit(
    do_not_specialize=[
        *("samples", "positions", "run", "channels"),
        *("a_b", "a_t", "a_c", "g_b", "g_t", "g_c", "m_b", "m_t", "m_c", "r_b", "r_t", "r_c"),
    ]
)
def fisher_affine_sums_kernel(
    sums, bias_sums, a, g, mean, deviation, samples, positions, run, channels,
    a_b, a_t, a_c, g_b, g_t, g_c, m_b, m_t, m_c, r_b, r_t, r_c,
    A_MINOR: tl.constexpr, A_VECTOR: tl.constexpr, G_MINOR: tl.constexpr, G_VECTOR: tl.constexpr,
    MEAN_T: tl.constexpr, MEAN_C: tl.constexpr, DEVIATION_T: tl.constexpr,
    DEVIATION_C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Program (sample and channels, split): Σ_t g x̂ and Σ_t g over ``run`` positions.

    The strides of a, g, the mean and the inverse deviation come one by one, since Triton compiles
    anew for every kind of number in a tuple.
    """
    a_strides, g_strides = (a_b, a_t, a_c), (g_b, g_t, g_c)
    mean_strides, deviation_strides = (m_b, m_t, m_c), (r_b, r_t, r_c)
    tiles_c = tl.cdiv(channels, BLOCK_C)
    sample, split = tl.program_id(0) // tiles_c, tl.program_id(1)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    first = split * multiple(run, max(A_VECTOR, G_VECTOR))
    last = tl.minimum(first + run, positions)
    t = first + tl.arange(0, BLOCK_T)
    products = tl.zeros((BLOCK_C, BLOCK_T), tl.float32)
    gradients = tl.zeros((BLOCK_C, BLOCK_T), tl.float32)
    m, r = 0.0, 1.0
    if mean is not None and not MEAN_T:
        m = _statistic(mean, mean_strides, sample, t, last, c, channels, False, MEAN_C)
    if deviation is not None and not DEVIATION_T:
        r = _statistic(
            deviation, deviation_strides, sample, t, last, c, channels, False, DEVIATION_C
        )
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        g_tile = _load(g, g_strides, sample, t, last, c, channels, G_MINOR, G_VECTOR)
        if bias_sums is not None:
            gradients += g_tile
        if sums is not None:
            normalised = _load(a, a_strides, sample, t, last, c, channels, A_MINOR, A_VECTOR)
            if mean is not None and MEAN_T:
                normalised -= _statistic(
                    mean, mean_strides, sample, t, last, c, channels, True, MEAN_C
                )
            elif mean is not None:
                normalised -= m
            if deviation is not None and DEVIATION_T:
                normalised *= _statistic(
                    deviation, deviation_strides, sample, t, last, c, channels, True, DEVIATION_C
                )
            elif deviation is not None:
                normalised *= r
            products = tl.fma(g_tile, normalised, products)
    offsets = (split.to(tl.int64) * samples + sample) * channels + c
    if sums is not None:
        tl.store(sums + offsets, tl.sum(products, axis=1), mask=c < channels)
    if bias_sums is not None:
        tl.store(bias_sums + offsets, tl.sum(gradients, axis=1), mask=c < channels)


@triton.jit(do_not_specialize=["splits", "samples", "channels"])
def fisher_affine_squares_kernel(
    total, gradient, sums, splits, samples, channels, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Program n: BLOCK_C channels of total += Σ_b (Σ_split sums)²."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    squares = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    plain = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for first in range(0, samples, BLOCK_B):
        b = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
        inside = (b < samples)[:, None] & (c < channels)[None, :]
        offsets = b[:, None] * channels + c[None, :]
        one = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for _ in range(splits):
            one += tl.load(sums + offsets, mask=inside, other=0.0)
            offsets += tl.cast(samples, tl.int64) * channels
        plain += one
        squares = tl.fma(one, one, squares)
    store_sum(total, c, c < channels, tl.sum(squares, axis=0), True)
    if gradient is not None:
        store_sum(gradient, c, c < channels, tl.sum(plain, axis=0), True)


def _strides_of(tensor: Tensor | None) -> tuple[int, int, int]:
    """Of a tensor (B, T, C), in elements; 0 along an axis of one element."""
    if tensor is None:
        return 0, 0, 0
    sample, position, channel = (
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return sample, position, channel


def _layout_of(tensor: Tensor, run: int) -> Layout:
    """How to read a tensor (B, T, C) in runs of that many positions."""
    sample, position, channel = _strides_of(tensor)
    _, positions, channels = tensor.shape
    if channel == 1:
        return Layout(_CHANNEL.value, vector_of(tensor, sample, position, channels))
    if position == 1:
        return Layout(_POSITION.value, vector_of(tensor, sample, channel, positions, run))
    return Layout(_NEITHER.value, 1)


def _blocks_for(gradients: Tensor) -> tuple[int, int]:
    """Channels and positions of a tile, long along the axis that is contiguous."""
    _, positions, channels = gradients.shape
    most_t, most_c = triton.next_power_of_2(positions), triton.next_power_of_2(channels)
    if gradients.stride(2) == 1 or gradients.stride(1) != 1:
        block_c = min(most_c, _TILE // min(16, most_t))
        return block_c, min(most_t, _TILE // block_c)
    block_t = min(most_t, 256)
    return min(most_c, _TILE // block_t), block_t


def splits_for(programs: int, positions: int, block: int, multiprocessors: int) -> tuple[int, int]:
    """Into how many runs to split the positions, and their length: a multiple of ``block``.

    Eight programs a multiprocessor hide each other's waiting; a run is at least four tiles long.
    """
    splits = min(-(-positions // (4 * block)), max(1, 8 * multiprocessors // programs))
    run = -(-positions // (splits * block)) * block
    return -(-positions // run), run


def fisher_affine(
    total: Tensor | None,
    bias_total: Tensor | None,
    activations: Tensor | None,
    gradients: Tensor,
    *,
    mean: Tensor | None = None,
    inverse_deviation: Tensor | None = None,
    weight_gradient: Tensor | None = None,
    bias_gradient: Tensor | None = None,
) -> None:
    """``bdu.reference.fisher_affine`` on the device, without waiting for it.

    a and g are read once. The sums take (splits, B, C) float32 on the way, for each of the totals.

    Args:
        total, bias_total: (C,) float32, contiguous, added to; None where it is not wanted.
        activations, gradients: a and g (B, T, C), each float32, bfloat16 or float16; any strides.
            Read 16 bytes at a time where the channels or the positions are contiguous, and that
            divides the address, the other strides and the contiguous axis. Others are read element
            by element, side by side if they lie so.
        mean, inverse_deviation: any float dtype and strides, each size 1 or a's own.
        weight_gradient, bias_gradient: like total and bias_total, added to.
    """
    samples, positions, channels = gradients.shape
    if total is None or activations is None:
        total = activations = mean = inverse_deviation = None
    if gradients.numel() == 0 or (total is None and bias_total is None):
        return
    block_c, block_t = _blocks_for(gradients)
    programs = samples * triton.cdiv(channels, block_c)
    splits, run = splits_for(programs, positions, block_t, multiprocessors_of(gradients.device))
    room = torch.empty(2, splits, samples, channels, device=gradients.device)
    sums = room[0] if total is not None else None
    bias_sums = room[1] if bias_total is not None else None
    a = gradients if activations is None else activations
    strides = [stride for t in (a, gradients, mean, inverse_deviation) for stride in _strides_of(t)]
    varies = [strides[place] != 0 for place in (7, 8, 10, 11)]
    with current(gradients.device):
        fisher_affine_sums_kernel[(programs, splits)](
            sums, bias_sums, activations, gradients, mean, inverse_deviation, samples, positions,
            run, channels, *strides, *_layout_of(a, run), *_layout_of(gradients, run), *varies,
            block_c, block_t, num_warps=4, enable_fp_fusion=False, maxnreg=255,
        )  # fmt: skip
        block_b = min(128, triton.next_power_of_2(samples))
        for own, gradient, parts in (
            (total, weight_gradient, sums),
            (bias_total, bias_gradient, bias_sums),
        ):
            if own is not None:
                block = min(1024 // block_b, triton.next_power_of_2(channels))
                fisher_affine_squares_kernel[(triton.cdiv(channels, block),)](
                    own, gradient, parts, splits, samples, channels, block_b, block,
                    num_warps=4, enable_fp_fusion=False, maxnreg=255,
                )  # fmt: skip
