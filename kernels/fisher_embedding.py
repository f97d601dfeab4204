"""The exact Fisher of an embedding in Triton: total_v += Σ_b (Σ_{t: index_bt = v} g_bt)².

The tokens are sorted by index, those of equal index by sample and position. A program that stands
on the first token of an index goes through all of that index, sums the tokens of a sample, squares,
and adds the sum over the samples to the index's row; all other programs have nothing to do. So no
number has to come back from the device, and nothing is as large as the table.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bdu.kernels.fisher_tiles import (
    current,
    load_row,
    multiple,
    store_sum,
    strides_of,
    vector_of,
    with_contiguous_channels,
)

# Columns a program: 8 a thread of its one warp, 16 bytes of a 16-bit format.
BLOCK = 256


@triton.jit(
    do_not_specialize=["tokens", "positions", "width", "padding_idx", "g_sample", "g_position"]
)
def fisher_embedding_kernel(
    total, weight_gradient, index, token, g, tokens, positions, width, padding_idx, g_sample,
    g_position,
    G_VECTOR: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Program (n, tile): BLOCK columns of the index whose first token is the n-th, if it is one."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(index + n).to(tl.int64)
    before = tl.load(index + n - 1, mask=n > 0, other=-1).to(tl.int64)
    if (row != before) & (row != padding_idx):
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        fisher = tl.zeros((BLOCK,), tl.float32)
        gradient = tl.zeros((BLOCK,), tl.float32)
        one = tl.zeros((BLOCK,), tl.float32)
        sample = tl.full((), -1, tl.int64)
        more = row >= 0
        while more:
            # Several tokens without a branch between them, so that they are loaded together.
            for step in tl.static_range(AT_ONCE):
                here = n + step
                same = tl.load(index + here, mask=here < tokens, other=-1).to(tl.int64) == row
                place = tl.load(token + here, mask=here < tokens, other=0).to(tl.int64)
                its_sample, its_position = place // positions, place % positions
                its_width = tl.where(same, width, 0)
                g_row = load_row(
                    g, g_sample, g_position, its_sample, its_position, d, its_width, G_VECTOR
                )
                next_sample = same & (its_sample != sample)
                if weight_gradient is not None:
                    gradient += g_row
                fisher = tl.where(next_sample, tl.fma(one, one, fisher), fisher)
                one = tl.where(next_sample, 0.0, one) + g_row
                sample = tl.where(next_sample, its_sample, sample)
            n += AT_ONCE
            more = tl.load(index + n, mask=n < tokens, other=-1).to(tl.int64) == row
        fisher = tl.fma(one, one, fisher)
        offsets = row * multiple(width, VECTOR) + d
        inside = d < multiple(width, VECTOR)
        store_sum(total, offsets, inside, fisher, True)
        if weight_gradient is not None:
            store_sum(weight_gradient, offsets, inside, gradient, True)


def fisher_embedding(
    total: Tensor,
    indices: Tensor,
    gradients: Tensor,
    *,
    padding_idx: int | None = None,
    weight_gradient: Tensor | None = None,
) -> None:
    """``bdu.reference.fisher_embedding`` on the device, without waiting for it.

    One program for each token and 256 columns; those of an index's first token do its work. Beside
    the sort of B T numbers, g is read once, and the rows of the tokens present are read and
    written. A frequent index costs its number of tokens, one after the other.

    Args:
        total: (V, D) float32, contiguous, added to.
        indices: (B, T), int32 or int64, in [0, V).
        gradients: g (B, T, D): float32, bfloat16 or float16. Any strides; copied first unless the
            last axis is contiguous. Read 16 bytes at a time where that divides the address, the
            other strides and D.
        padding_idx: the row that takes no gradient, ≥ 0.
        weight_gradient: (V, D) float32, contiguous, added to.
    """
    if gradients.numel() == 0:
        return
    tokens, (positions, width) = indices.numel(), gradients.shape[1:]
    index, token = indices.reshape(-1).sort(stable=True)
    g = with_contiguous_channels(gradients)
    g_strides = strides_of(g)
    totals = [t for t in (total, weight_gradient) if t is not None]
    with current(total.device):
        fisher_embedding_kernel[(tokens, triton.cdiv(width, BLOCK))](
            total, weight_gradient, index, token, g, tokens, positions, width,
            -1 if padding_idx is None else padding_idx, *g_strides, vector_of(g, width, *g_strides),
            min(vector_of(t, width) for t in totals), BLOCK, 4, num_warps=1,
            enable_fp_fusion=False, maxnreg=255,
        )  # fmt: skip
