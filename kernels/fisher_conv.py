"""The exact Fisher of a convolution in Triton: total += Σ_b (∂ Σ_p g_bp · y_bp / ∂W)².

W is a matrix with a row for each output channel o and a column k for each input channel c of the
group at each tap (y, x) of the kernel. A sample's gradient is Σ_p g_bop a_bc(p · stride − padding +
(y, x) · dilation) over the output positions p: a matrix product, whose second factor is gathered
from the image tile by tile. There is no unfolded copy. Where a group has few output channels, as in
a depthwise convolution, the products are taken one by one, on vectors over the channels. See
:mod:`bdu.kernels.fisher_tiles` for how the work is cut.
"""

from __future__ import annotations

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
    load_tile,
    multiple,
    multiprocessors_of,
    partials_of,
    splits_for,
    store_sum,
    strides_of,
    tile_for,
    uses_tensor_cores,
    vector_of,
    widened,
    with_contiguous_channels,
)

# Channels of a group, on both sides, below which a matrix product of 16 × 16 is mostly empty, and
# its factors are read element by element.
_FEWEST_CHANNELS = 8

_SIZES = ["samples", "run", "positions", "outputs", "inputs", "columns", "pitch", "groups"]
_SIZES += ["a_sample", "a_row", "a_column", "g_sample", "g_position", "height", "width"]
_SIZES += ["out_width", "kernel_width", "stride_y", "stride_x", "padding_y", "padding_x"]
_SIZES += ["dilation_y", "dilation_x"]


@triton.jit
def _is_inside(y, x, height, width):
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _offset(y, x, a_row, a_column, VECTOR: tl.constexpr):
    return y.to(tl.int64) * multiple(a_row, VECTOR) + x.to(tl.int64) * multiple(a_column, VECTOR)


@triton.jit(do_not_specialize=_SIZES)
def fisher_conv_kernel(
    total, weight_gradient, a, g, samples, run, positions, outputs, inputs, columns, pitch,
    a_sample, a_row, a_column, g_sample, g_position, height, width, out_width, kernel_width,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    A_VECTOR: tl.constexpr, G_VECTOR: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile, group, split): one tile of a group's weights and ``run`` samples."""
    G_FIRST: tl.constexpr = g.dtype == a.dtype and g.dtype.element_ty != tl.float32
    tiles_o = tl.cdiv(outputs, BLOCK_O)
    group, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    o = tl.program_id(0) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.program_id(0) // tiles_o * BLOCK_K + tl.arange(0, BLOCK_K)
    inputs = multiple(inputs, A_VECTOR)
    tap_y = k // inputs // kernel_width * dilation_y - padding_y
    tap_x = k // inputs % kernel_width * dilation_x - padding_x
    k_offset = _offset(tap_y, tap_x, a_row, a_column, A_VECTOR) + k % inputs
    a += group * inputs
    g += group * multiple(outputs, G_VECTOR)
    sample = split * run
    last = tl.minimum(sample + run, samples)
    chunks = tl.cdiv(positions, BLOCK_P)
    fisher = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    gradient = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    one = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    chunk = 0
    # One loop over samples and positions: the next sample is being loaded before this one ends.
    for _ in range((last - sample) * chunks):
        p = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
        g_tile = load_tile(
            g, g_sample, g_position, sample, p, positions, o, outputs, G_VECTOR, G_FIRST
        )
        y, x = p // out_width * stride_y, p % out_width * stride_x
        inside = _is_inside(y[:, None] + tap_y[None, :], x[:, None] + tap_x[None, :], height, width)
        inside &= (p < positions)[:, None] & (k < multiple(columns, A_VECTOR))[None, :]
        start = a + tl.cast(sample, tl.int64) * multiple(a_sample, A_VECTOR)
        offset = _offset(y, x, a_row, a_column, A_VECTOR)[:, None] + k_offset[None, :]
        a_tile = tl.load(start + offset, mask=inside, other=0.0)
        one = add_products(one, g_tile, a_tile, PRECISION, G_FIRST)
        ends = chunk == chunks - 1
        if ends:
            if weight_gradient is not None:
                gradient += one
            fisher = tl.fma(one, one, fisher)
            one = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
        # Not under the condition, which waits for the products: the loads of later turns do not.
        chunk = tl.where(ends, 0, chunk + 1)
        sample = tl.where(ends, sample + 1, sample)
    row = (split * tl.num_programs(1) + group) * outputs + o
    offsets = row[:, None] * multiple(pitch, STORED) + k[None, :]
    inside = (o < outputs)[:, None] & (k < multiple(pitch, STORED))[None, :]
    store_sum(total, offsets, inside, fisher, False)
    if weight_gradient is not None:
        store_sum(weight_gradient, offsets, inside, gradient, False)


@triton.jit(do_not_specialize=_SIZES)
def fisher_conv_few_outputs_kernel(
    total, weight_gradient, a, g, samples, run, positions, outputs, inputs, columns, pitch,
    a_sample, a_row, a_column, g_sample, g_position, height, width, out_width, kernel_width,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, groups,
    A_VECTOR: tl.constexpr, G_VECTOR: tl.constexpr, DEPTHWISE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (tile, split): output channels of any groups, some columns, ``run`` samples."""
    channels = multiple(groups * outputs, G_VECTOR)
    tiles_o = tl.cdiv(channels, BLOCK_O)
    split = tl.program_id(1)
    o = tl.program_id(0) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.program_id(0) // tiles_o * BLOCK_K + tl.arange(0, BLOCK_K)
    tap_y = k // inputs // kernel_width * dilation_y - padding_y
    tap_x = k // inputs % kernel_width * dilation_x - padding_x
    k_offset = _offset(tap_y, tap_x, a_row, a_column, A_VECTOR)[:, None, None]
    if DEPTHWISE:
        channel = o[None, None, :]
    else:
        channel = (o // outputs * inputs)[None, None, :] + (k % inputs)[:, None, None]
    fisher = tl.zeros((BLOCK_K, BLOCK_O), tl.float32)
    gradient = tl.zeros((BLOCK_K, BLOCK_O), tl.float32)
    first = split * run
    for sample in range(first, tl.minimum(first + run, samples)):
        products = tl.zeros((BLOCK_K, BLOCK_P, BLOCK_O), tl.float32)
        start = a + tl.cast(sample, tl.int64) * multiple(a_sample, A_VECTOR)
        for chunk in range(tl.cdiv(positions, BLOCK_P)):
            p = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
            g_tile = load_tile(
                g, g_sample, g_position, sample, p, positions, o, channels, G_VECTOR, False
            )
            y, x = p // out_width * stride_y, p % out_width * stride_x
            inside = _is_inside(
                y[None, :] + tap_y[:, None], x[None, :] + tap_x[:, None], height, width
            )
            inside &= (p < positions)[None, :] & (k < columns)[:, None]
            inside = inside[:, :, None] & (o < channels)[None, None, :]
            offset = _offset(y, x, a_row, a_column, A_VECTOR)[None, :, None] + k_offset + channel
            a_tile = tl.load(start + offset, mask=inside, other=0.0)
            products = tl.fma(widened(g_tile)[None, :, :], widened(a_tile), products)
        one = tl.sum(products, axis=1)
        if weight_gradient is not None:
            gradient += one
        fisher = tl.fma(one, one, fisher)
    offsets = (split.to(tl.int64) * channels + o)[None, :] * pitch + k[:, None]
    inside = (o < channels)[None, :] & (k < pitch)[:, None]
    store_sum(total, offsets, inside, fisher, False)
    if weight_gradient is not None:
        store_sum(weight_gradient, offsets, inside, gradient, False)


def fisher_conv(
    total: Tensor,
    activations: Tensor,
    gradients: Tensor,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    bias_total: Tensor | None = None,
    weight_gradient: Tensor | None = None,
    bias_gradient: Tensor | None = None,
) -> None:
    """``bdu.reference.fisher_conv`` on the device, without waiting for it.

    A program sums a tile of BLOCK_O × BLOCK_K weights over the output positions of a sample,
    squares, and goes on to the next. It reads g once a tile and from a what the tile needs, for
    2 B P O K operations with P output positions and K columns a group. The sums take (splits, O, K)
    float32 on the way.

    Args:
        total: (O, I / groups, *kernel) float32, contiguous, added to.
        activations, gradients: a (B, I, L) or (B, I, H, W) and g (B, O, ...), each float32,
            bfloat16 or float16. Any strides; copied first unless the channels are contiguous (the
            memory format channels_last). Read 16 bytes at a time where that divides the address,
            the other strides and the channels of a group.
        stride, padding, dilation: a number an axis.
        bias_total: (O,) float32, contiguous, added to; takes launches of its own.
        weight_gradient, bias_gradient: like total and bias_total, contiguous, added to.
    """
    if bias_total is not None:
        own = gradients.flatten(2).transpose(1, 2)
        fisher_affine(None, bias_total, None, own, bias_gradient=bias_gradient)
    if activations.dim() == 3:
        activations, gradients = activations.unsqueeze(2), gradients.unsqueeze(2)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    if gradients.numel() == 0 or total.numel() == 0:
        return
    a = with_contiguous_channels(activations.permute(0, 2, 3, 1))
    samples, height, width, _ = a.shape
    g = with_contiguous_channels(gradients.permute(0, 2, 3, 1)).flatten(1, 2)
    positions, channels = g.shape[1:]
    outputs, inputs = channels // groups, total.shape[1]
    columns = total[0].numel()
    taps = columns // inputs
    a_strides = [0 if n == 1 else s for n, s in zip(a.shape[:3], a.stride()[:3], strict=True)]
    g_strides = strides_of(g)
    few = max(outputs, inputs) < _FEWEST_CHANNELS
    depthwise = outputs == inputs == 1
    a_size, g_size = (inputs, outputs) if not few else (channels if depthwise else 1, channels)
    a_vector, g_vector = vector_of(a, a_size, *a_strides), vector_of(g, g_size, *g_strides)
    out_width, kernel_width = gradients.shape[3], total.shape[-1]
    image = (*a_strides, *g_strides, height, width, out_width, kernel_width)
    image += (*stride, *padding, *dilation)
    tensor_cores = uses_tensor_cores(a, g)
    multiprocessors = multiprocessors_of(total.device)
    totals = (total, weight_gradient)
    # Rows are stored as multiples of 16 bytes; what they are filled up with is not added.
    pitch = triton.cdiv(columns, STORED.value) * STORED.value
    with current(total.device):
        if few:
            block_k = min(16, triton.next_power_of_2(columns))
            block_o = min(64, triton.next_power_of_2(channels))
            block_p = min(64, 2048 // (block_k * block_o))
            tiles = triton.cdiv(channels, block_o) * triton.cdiv(columns, block_k)
            splits, run = splits_for(tiles, samples, positions, 4 * multiprocessors)
            sums = partials_of(totals, splits, channels, pitch)
            fisher_conv_few_outputs_kernel[(tiles, splits)](
                *sums, a, g, samples, run, positions, outputs, inputs, columns, pitch,
                *image, groups, a_vector, g_vector, depthwise, block_o, block_k, block_p,
                num_warps=4, enable_fp_fusion=False, maxnreg=255,
            )  # fmt: skip
        else:
            tile = tile_for(
                outputs,
                columns,
                positions,
                samples * groups,
                tensor_cores=tensor_cores,
                aligned=a_vector * a.element_size() == g_vector * g.element_size() == 16,
                accumulators=2 + (weight_gradient is not None),
                multiprocessors=multiprocessors,
            )
            tiles = triton.cdiv(outputs, tile.outputs) * triton.cdiv(columns, tile.inputs)
            slots = multiprocessors * tile.resident
            splits, run = splits_for(tiles * groups, samples, positions, slots)
            sums = partials_of(totals, splits, channels, pitch)
            fisher_conv_kernel[(tiles, groups, splits)](
                *sums, a, g, samples, run, positions, outputs, inputs, columns, pitch,
                *image, a_vector, g_vector, tile.outputs, tile.inputs, tile.positions,
                fisher_tiles.FLOAT32_PRECISION, num_warps=tile.warps, num_stages=tile.stages,
                enable_fp_fusion=False, maxnreg=255,
            )  # fmt: skip
        add_partials(totals, sums, taps)
