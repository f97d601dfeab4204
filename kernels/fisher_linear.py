"""The exact Fisher of a linear layer in Triton: total_oi += Σ_b (Σ_t g_bto a_bti)².

One launch, or two where the batch is split; see :mod:`bdu.kernels.fisher_tiles`. A sample's
gradient is a chain of matrix products of 16 to 64 positions, or, where those would mostly be filled
up with zeros, a sum position by position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdu.kernels import fisher_tiles
from bdu.kernels.fisher_affine import fisher_affine
from bdu.kernels.fisher_tiles import (
    STORED,
    add_partials,
    add_products,
    current,
    load_row,
    load_tile,
    multiple,
    multiprocessors_of,
    partials_of,
    splits_for,
    store_sum,
    strides_of,
    tile_for,
    tile_of,
    uses_tensor_cores,
    vector_of,
    with_contiguous_channels,
)

# Positions from which on matrix products are worth it. They take at least 16: that costs the tensor
# cores about as much as one position costs the others, on which it would cost 16.
_FEWEST_POSITIONS = {True: 4, False: 16}

_SIZES = ["samples", "run", "positions", "outputs", "inputs", "pitch"]
_SIZES += ["a_sample", "a_position", "g_sample", "g_position"]


@triton.jit
def _set_apart(one, kept, kept_index, sample, o, outputs, i, pitch):
    """Add to ``kept`` those rows of a sample's gradient that have a number; return the others."""
    index = kept_index + tl.cast(sample, tl.int64) * outputs + o
    number = tl.load(index, mask=o < outputs, other=-1).to(tl.int64)[:, None]
    columns = multiple(pitch, STORED)
    inside = (number >= 0) & (i < columns)[None, :]
    store_sum(kept, number * columns + i[None, :], inside, one, True)
    return tl.where(number >= 0, 0.0, one)


@triton.jit
def _store(total, fisher, split, o, outputs, i, pitch, ADD: tl.constexpr):
    columns = multiple(pitch, STORED)
    offsets = (split.to(tl.int64) * outputs + o)[:, None] * columns + i[None, :]
    inside = (o < outputs)[:, None] & (i < columns)[None, :]
    store_sum(total, offsets, inside, fisher, ADD)


@triton.jit(do_not_specialize=_SIZES)
def fisher_linear_kernel(
    total, weight_gradient, a, g, kept, kept_index,
    samples, run, positions, outputs, inputs, pitch, a_sample, a_position, g_sample, g_position,
    A_VECTOR: tl.constexpr, G_VECTOR: tl.constexpr, ADD: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile, split): one tile of the weights and ``run`` samples, by matrix products."""
    G_FIRST: tl.constexpr = g.dtype == a.dtype and g.dtype.element_ty != tl.float32
    tiles_o, tiles_i = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    tile_o, tile_i = tile_of(tl.program_id(0), tiles_o, tiles_i)
    split = tl.program_id(1)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    sample = split * run
    last = tl.minimum(sample + run, samples)
    chunks = tl.cdiv(positions, BLOCK_T)
    fisher = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    gradient = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    one = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    chunk = 0
    # One loop over samples and positions: the next sample is being loaded before this one ends.
    for _ in range((last - sample) * chunks):
        t = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
        g_tile = load_tile(
            g, g_sample, g_position, sample, t, positions, o, outputs, G_VECTOR, G_FIRST
        )
        a_tile = load_tile(
            a, a_sample, a_position, sample, t, positions, i, inputs, A_VECTOR, False
        )
        one = add_products(one, g_tile, a_tile, PRECISION, G_FIRST)
        ends = chunk == chunks - 1
        if ends:
            if weight_gradient is not None:
                gradient += one
            if kept is not None:
                one = _set_apart(one, kept, kept_index, sample, o, outputs, i, pitch)
            fisher = tl.fma(one, one, fisher)
            one = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        # Not under the condition, which waits for the products: the loads of later turns do not.
        chunk = tl.where(ends, 0, chunk + 1)
        sample = tl.where(ends, sample + 1, sample)
    _store(total, fisher, split, o, outputs, i, pitch, ADD)
    if weight_gradient is not None:
        _store(weight_gradient, gradient, split, o, outputs, i, pitch, ADD)


@triton.jit(do_not_specialize=_SIZES)
def fisher_linear_few_positions_kernel(
    total, weight_gradient, a, g,
    samples, run, positions, outputs, inputs, pitch, a_sample, a_position, g_sample, g_position,
    A_VECTOR: tl.constexpr, G_VECTOR: tl.constexpr, ADD: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Program (tile, split): one tile of the weights and ``run`` samples, position by position."""
    tiles_o, tiles_i = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    tile_o, tile_i = tile_of(tl.program_id(0), tiles_o, tiles_i)
    split = tl.program_id(1)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    first = split * run
    last = tl.minimum(first + run, samples)
    fisher = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    gradient = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for sample in range(first, last):
        one = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for t in range(positions):
            g_t = load_row(g, g_sample, g_position, sample, t, o, outputs, G_VECTOR)
            a_t = load_row(a, a_sample, a_position, sample, t, i, inputs, A_VECTOR)
            one = tl.fma(g_t[:, None], a_t[None, :], one)
        if weight_gradient is not None:
            gradient += one
        fisher = tl.fma(one, one, fisher)
    _store(total, fisher, split, o, outputs, i, pitch, ADD)
    if weight_gradient is not None:
        _store(weight_gradient, gradient, split, o, outputs, i, pitch, ADD)


def fisher_linear(
    total: Tensor,
    activations: Tensor,
    gradients: Tensor,
    *,
    bias_total: Tensor | None = None,
    weight_gradient: Tensor | None = None,
    bias_gradient: Tensor | None = None,
    kept: Tensor | None = None,
    kept_index: Tensor | None = None,
) -> None:
    """``bdu.reference.fisher_linear`` on the device, without waiting for it.

    A program sums a tile of BLOCK_O × BLOCK_I weights over the positions of a sample, squares, and
    goes on to the next. It reads a and g once a tile, hence ⌈O / BLOCK_O⌉ B T I + ⌈I / BLOCK_I⌉ B T
    O elements, mostly from the cache that all programs share, for 2 B T I O operations. With a
    split batch, or where 4 does not divide I, the sums take (splits, O, I) float32 on the way.

    Args:
        total: (O, I) float32, contiguous, added to.
        activations, gradients: a (B, T, I) and g (B, T, O), each float32, bfloat16 or float16. Any
            strides; copied first unless the last axis is contiguous. Read 16 bytes at a time where
            that divides the address, the other strides and the last axis.
        bias_total: (O,) float32, contiguous, added to; takes launches of its own.
        weight_gradient, bias_gradient: like total and bias_total, added to.
        kept, kept_index: (N, I) float32, contiguous, added to, and (B, O) integers.
    """
    if bias_total is not None:
        fisher_affine(None, bias_total, None, gradients, bias_gradient=bias_gradient)
    samples, positions, outputs = gradients.shape
    inputs = activations.shape[2]
    if gradients.numel() == 0 or inputs == 0:
        return
    a, g = with_contiguous_channels(activations), with_contiguous_channels(gradients)
    a_strides, g_strides = strides_of(a), strides_of(g)
    a_vector, g_vector = vector_of(a, inputs, *a_strides), vector_of(g, outputs, *g_strides)
    tensor_cores = uses_tensor_cores(a, g)
    multiprocessors = multiprocessors_of(total.device)
    tile = tile_for(
        outputs,
        inputs,
        positions,
        samples,
        tensor_cores=tensor_cores,
        aligned=a_vector * a.element_size() == g_vector * g.element_size() == 16,
        accumulators=2 + (weight_gradient is not None) + (kept is not None),
        multiprocessors=multiprocessors,
    )
    tiles = triton.cdiv(outputs, tile.outputs) * triton.cdiv(inputs, tile.inputs)
    splits, run = splits_for(tiles, samples, positions, multiprocessors * tile.resident)
    # Rows are stored as multiples of 16 bytes; what they are filled up with is not added.
    pitch = triton.cdiv(inputs, STORED.value) * STORED.value
    totals = (total, weight_gradient)
    written = [t for t in (*totals, kept) if t is not None]
    dense = pitch == inputs and all(t.data_ptr() % 16 == 0 for t in written)
    add = dense and splits == 1
    sums = totals if add else partials_of(totals, splits, outputs, pitch)
    sizes = (samples, run, positions, outputs, inputs, pitch, *a_strides, *g_strides)
    options = {"num_warps": tile.warps, "enable_fp_fusion": False, "maxnreg": 255}
    with current(total.device):
        if kept is None and positions < _FEWEST_POSITIONS[tensor_cores]:
            fisher_linear_few_positions_kernel[(tiles, splits)](
                *sums, a, g, *sizes, a_vector, g_vector, add, tile.outputs, tile.inputs, **options
            )
        else:
            rows = kept
            if kept is not None and kept_index is not None:
                kept_index = kept_index.contiguous()
                rows = kept if dense else torch.nn.functional.pad(kept, (0, pitch - inputs))
            fisher_linear_kernel[(tiles, splits)](
                *sums, a, g, rows, kept_index, *sizes, a_vector, g_vector, add,
                tile.outputs, tile.inputs, tile.positions, fisher_tiles.FLOAT32_PRECISION,
                num_stages=tile.stages, **options,
            )  # fmt: skip
            if kept is not None and rows is not None and rows is not kept:
                kept.copy_(rows[:, :inputs])
        if not add:
            add_partials(totals, sums)
