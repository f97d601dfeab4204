"""The fused steps in Triton: one launch for all tensors whose dtypes agree column by column.

The formulas are those of ``bdu.reference``, element by element in the arithmetic of
``csrc/update_rule.h``: float32 whatever the tensors are stored in, each result rounded once, at its
store, and products fused into sums only where ``tl.fma`` says so (``enable_fp_fusion=False``).

A launch walks over a table on the device: int64, shape (columns, rows), one row a tensor::

    first chunk | numel | position in the caller's lists | number of the first element |
    addresses of param, grad, moments, F, θ*, F's scale

A tensor has ⌈numel / BLOCK⌉ chunks and each program takes one; it finds its tensor by binary search
in the first column. The table is sent only when an address, a dtype or a size has changed. Every
chunk writes one partial sum, and the partial sums are added in a fixed order: the same bits on
every run. Rows whose addresses are all 16-byte aligned are read and written 128 bits at a time.

float32, bfloat16 and float16 in any mix; F also in the 8 bits of ``bdu.quantization``, and bfloat16
parameters rounded stochastically as ``bdu.rounding`` says. The tensors of a row are dense and laid
out alike (``bdu.ops`` sees to it): a row is walked as flat memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import accumulate, repeat
from operator import attrgetter, is_
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Rounding = tuple[int, Any]  # seed and step, as bdu.rounding.Rounding

BLOCK = 2048  # elements a program: 8 a thread, so that one load of a half-precision column is 16 B
NUM_WARPS = 8

# The columns of a table that are no addresses.
_FIRST_CHUNK = tl.constexpr(0)
_NUMEL = tl.constexpr(1)
_POSITION = tl.constexpr(2)
_FIRST_ELEMENT = tl.constexpr(3)
_ADDRESSES = tl.constexpr(4)

_SCALE_BLOCK = tl.constexpr(32)

_NONE = tl.constexpr(0)
_GRADIENT = tl.constexpr(1)
_PROXIMAL = tl.constexpr(2)
_PULL = {"gradient": _GRADIENT.value, "proximal": _PROXIMAL.value}

# The interpreter truncates to bfloat16 and garbles its subnormals, where the hardware rounds to
# nearest: there, and only there, bfloat16 is handled as bits.
_BFLOAT16_AS_BITS = tl.constexpr(bool(triton.knobs.runtime.interpret))

_TRITON_DTYPE = {
    None: None,  # no column
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
}


class PullScalars(NamedTuple):
    """What every element of one launch shares, combined in double on the host."""

    grad_factor: float  # sign · clip / scale, as far as the host knows clip and scale
    inverse_scale: float  # 1 / scale, likewise
    clip: Tensor | None  # on the device, not to be waited for
    grad_scale: Tensor | None
    found_inf: Tensor | None  # not 0: nothing is written
    rounding_key: int | None  # of seed and step; None rounds to nearest
    ewc_lambda: float
    lr_lambda: float
    fisher_decay: float
    weight_decay: float
    lr: float


class SgdScalars(NamedTuple):
    """What ``ewc_sgd_step`` adds to :class:`PullScalars`."""

    momentum: float
    one_minus_dampening: float


class AdamwScalars(NamedTuple):
    """What ``ewc_adamw_step`` adds to :class:`PullScalars`."""

    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    log_beta1: float
    log_beta2: float
    eps: float


# Where a program finds its elements


@triton.jit
def _row_of(chunk, table, rows):
    """The last row whose first chunk is not behind this one."""
    low = tl.full((), 0, tl.int32)
    high = rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        here = tl.load(table + middle) <= chunk
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle - 1)
    return low


@triton.jit
def _pointers(
    table, rows, row, offset, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """To the elements of one column from ``offset`` on; None where the column is not there."""
    if DTYPE is None:
        pointers = None
    else:
        address = tl.load(table + (_ADDRESSES + COLUMN) * rows + row)
        if _BFLOAT16_AS_BITS and tl.bfloat16 == DTYPE:
            start = address.to(tl.pointer_type(tl.int16))
        else:
            start = address.to(tl.pointer_type(DTYPE))
        if ALIGNED:
            start = tl.multiple_of(start, 16)
        pointers = start + offset + tl.arange(0, BLOCK)
    return pointers


@triton.jit
def _load(pointers, mask):
    value = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)
    if value.dtype == tl.int16:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def _store(pointers, value, mask):
    value = value.to(tl.float32)  # the interpreter takes subnormal scalars for doubles
    if pointers.dtype.element_ty == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        value = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, nearest_even)
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _scale_pointers(
    table, rows, row, offset, COLUMN: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """To the scales from ``offset`` on; None where F is not in 8 bits."""
    if DTYPE is None:
        pointers = None
    else:
        address = tl.load(table + (_ADDRESSES + COLUMN) * rows + row)
        if _BFLOAT16_AS_BITS:
            start = address.to(tl.pointer_type(tl.int16))
        else:
            start = address.to(tl.pointer_type(DTYPE))
        pointers = start + offset // _SCALE_BLOCK + tl.arange(0, BLOCK // _SCALE_BLOCK)
    return pointers


@triton.jit
def _load_fisher(pointers, scales, left, mask, BLOCK: tl.constexpr):
    if scales is None:
        fisher = _load(pointers, mask)
    else:
        code = _load(pointers, mask)
        if mask is None:
            scale = _load(scales, None)
        else:
            block = tl.arange(0, BLOCK // _SCALE_BLOCK) * _SCALE_BLOCK
            scale = _load(scales, block < left)
        scale = tl.broadcast_to(scale[:, None], (BLOCK // _SCALE_BLOCK, _SCALE_BLOCK))
        scale = tl.reshape(scale, (BLOCK,))
        if pointers.dtype.element_ty == tl.uint8:
            fisher = code * code * (scale * (1.0 / 65025.0))
        else:
            code += 128.0
            fisher = tl.where(code == 0.0, 0.0, scale * tl.exp2((code - 255.0) * (24.0 / 254.0)))
    return fisher


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _random_bits(key, first, BLOCK: tl.constexpr):
    """16 bits for each element from ``first`` on, as ``bdu.rounding.random_bits``."""
    key = (key >> 1).to(tl.uint32)
    # In words of 32 bits, which take half the registers: a block sees two high words at most.
    start, high = first.to(tl.uint32), (first >> 32).to(tl.uint32)
    low = start + tl.arange(0, BLOCK).to(tl.uint32)
    carried = low < start
    pair = (low >> 1) | (tl.where(carried, high + 1, high) << 31)
    x = tl.where(carried, _mixed(key + ((high + 1) >> 1)), _mixed(key + (high >> 1)))
    x = _mixed(x ^ pair)
    return tl.where((low & 1) == 1, x >> 16, x & 0xFFFF)


@triton.jit
def _store_param(pointers, value, mask, s, first, BLOCK: tl.constexpr):
    if s.rounding_key is None:
        _store(pointers, value, mask)
    elif pointers.dtype.element_ty == tl.bfloat16 or pointers.dtype.element_ty == tl.int16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        up = bits + _random_bits(s.rounding_key, first, BLOCK)
        quiet = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, bits)
        bits = tl.where((bits & 0x7F800000) == 0x7F800000, quiet, up) >> 16
        words = pointers.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(words, bits.to(tl.int16), mask=mask)
    else:
        _store(pointers, value, mask)


# The update rule, as in csrc/update_rule.h


@triton.jit
def _pulled_gradient(grad, drift, fisher, s, PULL: tl.constexpr):
    g = grad * s.grad_factor
    if s.clip is not None:
        g = g * tl.load(s.clip).to(tl.float32)
    if s.grad_scale is not None:
        g = g * _inverse_scale(s)
    if PULL == _GRADIENT:
        g = tl.fma(s.ewc_lambda * fisher, drift, g)
    return g


@triton.jit
def _inverse_scale(s):
    if s.grad_scale is None:
        inverse = s.inverse_scale
    else:
        inverse = tl.div_rn(1.0, tl.load(s.grad_scale).to(tl.float32))
    return inverse


@triton.jit
def _proximal_pull(param, fisher, anchor, s):
    # θ* + (θ' − θ*) / (1 + lr λ F), so that F = 0 leaves θ' as it is and an overflow lands on θ*.
    c = s.lr_lambda * fisher
    c = tl.where(c > 1e30, 1e30, c)
    return tl.fma(-tl.div_rn(c, 1.0 + c), param - anchor, param)


@triton.jit
def _running_fisher(fisher, grad, s):
    g = grad * _inverse_scale(s)
    return tl.fma(g * g, 1.0 - s.fisher_decay, s.fisher_decay * fisher)


@triton.jit
def _ewc_sgd_chunk(
    params, grads, momentum_buffers, fishers, anchors, scales, left, mask, written, first, s, sgd,
    PULL: tl.constexpr, NESTEROV: tl.constexpr, UPDATE_FISHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps one chunk and returns its Σ F d²."""
    param = _load(params, mask)
    grad = _load(grads, mask)
    drift, fisher, penalty = 0.0, 0.0, 0.0
    if momentum_buffers is not None:
        momentum_buffer = _load(momentum_buffers, mask)
    if fishers is not None:
        fisher = _load_fisher(fishers, scales, left, mask, BLOCK)
    if PULL != _NONE:
        anchor = _load(anchors, mask)
        drift = param - anchor
        penalty = tl.sum(fisher * drift * drift, axis=0)
    g = _pulled_gradient(grad, drift, fisher, s, PULL)
    g = tl.fma(param, s.weight_decay, g)
    if momentum_buffers is not None:
        momentum_buffer = tl.fma(momentum_buffer, sgd.momentum, sgd.one_minus_dampening * g)
        _store(momentum_buffers, momentum_buffer, written)
        g = tl.fma(momentum_buffer, sgd.momentum, g) if NESTEROV else momentum_buffer
    param = tl.fma(g, -s.lr, param)
    if PULL == _PROXIMAL:
        param = _proximal_pull(param, fisher, anchor, s)
    _store_param(params, param, written, s, first, BLOCK)
    if UPDATE_FISHER:
        _store(fishers, _running_fisher(fisher, grad, s), written)
    return penalty


@triton.jit
def _ewc_adamw_chunk(
    params, grads, exp_avgs, exp_avg_sqs, fishers, anchors, scales, left, mask, written, first,
    step, s, adamw, PULL: tl.constexpr, UPDATE_FISHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps one chunk and returns its Σ F d²."""
    param = _load(params, mask)
    grad = _load(grads, mask)
    exp_avg = _load(exp_avgs, mask)
    exp_avg_sq = _load(exp_avg_sqs, mask)
    drift, fisher, penalty = 0.0, 0.0, 0.0
    if fishers is not None:
        fisher = _load_fisher(fishers, scales, left, mask, BLOCK)
    if PULL != _NONE:
        anchor = _load(anchors, mask)
        drift = param - anchor
        penalty = tl.sum(fisher * drift * drift, axis=0)
    # In double: 1 − β₂ᵗ has three digits less than β₂ᵗ at the first step.
    correction1 = 1.0 - tl.exp(step.to(tl.float64) * adamw.log_beta1)
    correction2 = 1.0 - tl.exp(step.to(tl.float64) * adamw.log_beta2)
    step_size = (s.lr / correction1).to(tl.float32)
    inverse_sqrt = (1.0 / tl.sqrt(correction2)).to(tl.float32)
    g = _pulled_gradient(grad, drift, fisher, s, PULL)
    exp_avg = tl.fma(g - exp_avg, adamw.one_minus_beta1, exp_avg)
    exp_avg_sq = tl.fma(adamw.one_minus_beta2 * g, g, adamw.beta2 * exp_avg_sq)
    _store(exp_avgs, exp_avg, written)
    _store(exp_avg_sqs, exp_avg_sq, written)
    denominator = tl.fma(tl.sqrt_rn(exp_avg_sq), inverse_sqrt, adamw.eps)
    param = tl.fma(param, -s.lr * s.weight_decay, param)
    param = tl.fma(tl.div_rn(exp_avg, denominator), -step_size, param)
    if PULL == _PROXIMAL:
        param = _proximal_pull(param, fisher, anchor, s)
    _store_param(params, param, written, s, first, BLOCK)
    if UPDATE_FISHER:
        _store(fishers, _running_fisher(fisher, grad, s), written)
    return penalty


@triton.jit
def _elements_written(left, s):
    """None where GradScaler found a gradient that is not finite."""
    kept = left
    if s.found_inf is not None:
        kept = tl.where(tl.load(s.found_inf) != 0, 0, left)
    return kept


# The kernels: grid (chunks,). A mask hides from the compiler that whole vectors are valid, so only
# a tensor's last chunk has one.


@triton.jit(do_not_specialize=["rows", "first_partial"])
def ewc_sgd_kernel(
    table, rows, partials, first_partial, s, sgd,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM_BUFFER: tl.constexpr, FISHER: tl.constexpr,
    ANCHOR: tl.constexpr, FISHER_SCALE: tl.constexpr, ALIGNED: tl.constexpr, PULL: tl.constexpr,
    NESTEROV: tl.constexpr, UPDATE_FISHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of :func:`ewc_sgd_step`; a column that is not there has the dtype None."""
    chunk = tl.program_id(0).to(tl.int64)
    row = _row_of(chunk, table, rows)
    offset = (chunk - tl.load(table + _FIRST_CHUNK * rows + row)) * BLOCK
    left = tl.load(table + _NUMEL * rows + row) - offset
    p = _pointers(table, rows, row, offset, 0, PARAM, ALIGNED, BLOCK)
    g = _pointers(table, rows, row, offset, 1, GRAD, ALIGNED, BLOCK)
    b = _pointers(table, rows, row, offset, 2, MOMENTUM_BUFFER, ALIGNED, BLOCK)
    f = _pointers(table, rows, row, offset, 3, FISHER, ALIGNED, BLOCK)
    a = _pointers(table, rows, row, offset, 4, ANCHOR, ALIGNED, BLOCK)
    z = _scale_pointers(table, rows, row, offset, 5, FISHER_SCALE, BLOCK)
    first = tl.load(table + _FIRST_ELEMENT * rows + row) + offset
    kept = _elements_written(left, s)
    if kept >= BLOCK:
        penalty = _ewc_sgd_chunk(
            p, g, b, f, a, z, left, None, None, first, s, sgd, PULL, NESTEROV, UPDATE_FISHER, BLOCK
        )
    else:
        here = tl.arange(0, BLOCK)
        penalty = _ewc_sgd_chunk(
            p, g, b, f, a, z, left, here < left, here < kept, first, s, sgd, PULL, NESTEROV,
            UPDATE_FISHER, BLOCK,
        )  # fmt: skip
    tl.store(partials + first_partial + chunk, penalty)


@triton.jit(do_not_specialize=["rows", "first_partial"])
def ewc_adamw_kernel(
    table, rows, partials, first_partial, steps, s, adamw,
    PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr,
    FISHER: tl.constexpr, ANCHOR: tl.constexpr, FISHER_SCALE: tl.constexpr, ALIGNED: tl.constexpr,
    PULL: tl.constexpr, UPDATE_FISHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of :func:`ewc_adamw_step`; a column that is not there has the dtype None."""
    chunk = tl.program_id(0).to(tl.int64)
    row = _row_of(chunk, table, rows)
    offset = (chunk - tl.load(table + _FIRST_CHUNK * rows + row)) * BLOCK
    left = tl.load(table + _NUMEL * rows + row) - offset
    step = tl.load(steps + tl.load(table + _POSITION * rows + row))
    p = _pointers(table, rows, row, offset, 0, PARAM, ALIGNED, BLOCK)
    g = _pointers(table, rows, row, offset, 1, GRAD, ALIGNED, BLOCK)
    m = _pointers(table, rows, row, offset, 2, EXP_AVG, ALIGNED, BLOCK)
    v = _pointers(table, rows, row, offset, 3, EXP_AVG_SQ, ALIGNED, BLOCK)
    f = _pointers(table, rows, row, offset, 4, FISHER, ALIGNED, BLOCK)
    a = _pointers(table, rows, row, offset, 5, ANCHOR, ALIGNED, BLOCK)
    z = _scale_pointers(table, rows, row, offset, 6, FISHER_SCALE, BLOCK)
    first = tl.load(table + _FIRST_ELEMENT * rows + row) + offset
    kept = _elements_written(left, s)
    if kept >= BLOCK:
        penalty = _ewc_adamw_chunk(
            p, g, m, v, f, a, z, left, None, None, first, step, s, adamw, PULL, UPDATE_FISHER, BLOCK
        )
    else:
        here = tl.arange(0, BLOCK)
        penalty = _ewc_adamw_chunk(
            p, g, m, v, f, a, z, left, here < left, here < kept, first, step, s, adamw, PULL,
            UPDATE_FISHER, BLOCK,
        )  # fmt: skip
    tl.store(partials + first_partial + chunk, penalty)


@triton.jit(do_not_specialize=["rows", "first_partial"])
def square_sum_kernel(
    table, rows, partials, first_partial, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ g² of one chunk, in double: a float overflows from |g| = 1.8e19 on."""
    chunk = tl.program_id(0).to(tl.int64)
    row = _row_of(chunk, table, rows)
    offset = (chunk - tl.load(table + _FIRST_CHUNK * rows + row)) * BLOCK
    left = tl.load(table + _NUMEL * rows + row) - offset
    pointers = _pointers(table, rows, row, offset, 0, GRAD, ALIGNED, BLOCK)
    if left >= BLOCK:
        grad = _load(pointers, None).to(tl.float64)
    else:
        grad = _load(pointers, tl.arange(0, BLOCK) < left).to(tl.float64)
    tl.store(partials + first_partial + chunk, tl.sum(grad * grad, axis=0))


# The launchers


def ewc_sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    fishers: Sequence[Tensor | None],
    anchors: Sequence[Tensor | None],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    ewc_lambda: float = 0.0,
    mode: Literal["proximal", "gradient"] = "proximal",
    clip: float | Tensor = 1.0,
    grad_scale: float | Tensor = 1.0,
    batch_fisher_decay: float | None = None,
    fisher_scales: Sequence[Tensor | None] | None = None,
    found_inf: Tensor | None = None,
    rounding: Rounding | None = None,
    first_elements: Sequence[int] | None = None,
) -> Tensor:
    """``bdu.reference.ewc_sgd_step`` on the device, without waiting for it.

    It moves, a parameter: θ and b read and written, ∇, F and θ* read. That is 28 B with float32
    everywhere, 14 B with bfloat16 everywhere, 18 B with bfloat16 and F and θ* in float32.

    Args:
        params, grads, momentum_buffers, fishers, anchors: θ, ∇, b, F, θ*; all of one device, and
            those of a row dense, of one shape and laid out alike.
        clip, grad_scale: numbers, or tensors of one element on that device.
        fisher_scales: of an F in 8 bits.
        found_inf: one element on that device; where it is not 0, nothing is written.
        rounding, first_elements: see ``bdu.reference``.

    Returns:
        ½ λ Σ F d² at θ before the step, 0-dim float32 on that device.
    """
    if momentum != 0 and any(b is None for b in momentum_buffers):
        raise ValueError(f"momentum_buffers: expected tensors with momentum={momentum}")
    if momentum == 0:
        momentum_buffers = [None] * len(params)
    update_fisher = batch_fisher_decay is not None and not maximize
    fishers, anchors = _pulled(fishers, anchors, ewc_lambda, update_fisher)
    scales = _scales(fishers, fisher_scales)
    scalars = _pull_scalars(
        lr, weight_decay, maximize, clip, grad_scale, ewc_lambda, batch_fisher_decay, found_inf,
        rounding,
    )  # fmt: skip
    sgd = SgdScalars(float(momentum), 1.0 - dampening)
    partials = _run(
        ewc_sgd_kernel,
        (params, grads, momentum_buffers, fishers, anchors, scales),
        (scalars, sgd),
        lambda dtypes: {
            "PULL": _PULL[mode] if dtypes[4] is not None else _NONE.value,
            "NESTEROV": bool(nesterov),
            "UPDATE_FISHER": update_fisher and dtypes[3] is not None,
        },
        first_elements=first_elements,
    )
    return _penalty(partials, anchors, ewc_lambda)


def ewc_adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    fishers: Sequence[Tensor | None],
    anchors: Sequence[Tensor | None],
    steps: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    ewc_lambda: float = 0.0,
    mode: Literal["proximal", "gradient"] = "proximal",
    clip: float | Tensor = 1.0,
    grad_scale: float | Tensor = 1.0,
    batch_fisher_decay: float | None = None,
    fisher_scales: Sequence[Tensor | None] | None = None,
    found_inf: Tensor | None = None,
    rounding: Rounding | None = None,
    first_elements: Sequence[int] | None = None,
) -> Tensor:
    """``bdu.reference.ewc_adamw_step`` on the device, without waiting for it.

    It moves, a parameter: θ, m and v read and written, ∇, F and θ* read. That is 36 B with float32
    everywhere, 18 B with bfloat16 everywhere.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, fishers, anchors: θ, ∇, m, v, F, θ*; all of one
            device, and those of a row dense, of one shape and laid out alike.
        steps: t of each tensor, shape (len(params),), float32 on that device, counted up already.
        clip, grad_scale: numbers, or tensors of one element on that device.
        fisher_scales: of an F in 8 bits.
        found_inf: one element on that device; where it is not 0, nothing is written.
        rounding, first_elements: see ``bdu.reference``.

    Returns:
        ½ λ Σ F d² at θ before the step, 0-dim float32 on that device.
    """
    if steps.dtype != torch.float32 or steps.shape != (len(params),) or not steps.is_contiguous():
        raise ValueError(
            f"steps: expected ({len(params)},) contiguous float32, got {tuple(steps.shape)} "
            f"{steps.dtype}"
        )
    update_fisher = batch_fisher_decay is not None and not maximize
    fishers, anchors = _pulled(fishers, anchors, ewc_lambda, update_fisher)
    scales = _scales(fishers, fisher_scales)
    scalars = _pull_scalars(
        lr, weight_decay, maximize, clip, grad_scale, ewc_lambda, batch_fisher_decay, found_inf,
        rounding,
    )  # fmt: skip
    beta1, beta2 = betas
    adamw = AdamwScalars(
        1.0 - beta1, float(beta2), 1.0 - beta2, _log(beta1), _log(beta2), float(eps)
    )
    partials = _run(
        ewc_adamw_kernel,
        (params, grads, exp_avgs, exp_avg_sqs, fishers, anchors, scales),
        (steps, scalars, adamw),
        lambda dtypes: {
            "PULL": _PULL[mode] if dtypes[5] is not None else _NONE.value,
            "UPDATE_FISHER": update_fisher and dtypes[4] is not None,
        },
        first_elements=first_elements,
    )
    return _penalty(partials, anchors, ewc_lambda)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """``bdu.reference.grad_norm`` of dense tensors on one device, without waiting for it.

    It reads each gradient once: 4 B an element in float32, 2 B in bfloat16.

    Returns:
        0-dim float32 on that device.
    """
    if not grads:
        return torch.zeros(())
    partials = _run(square_sum_kernel, (grads,), (), lambda dtypes: {}, torch.float64)
    return partials.sum().sqrt().float()


class _Group(NamedTuple):
    """What one launch is told: the rows whose dtypes and alignment agree."""

    table: Tensor
    dtypes: tuple[tl.dtype | None, ...]
    aligned: bool
    chunks: int


# Addresses and dtypes, 0 and None where the column has no tensor.
_Column = tuple[tuple[int, ...], tuple[torch.dtype | None, ...]]


def _column(tensors: Sequence[Tensor | None]) -> _Column:
    if any(map(is_, tensors, repeat(None))):
        return (
            tuple(0 if t is None else t.data_ptr() for t in tensors),
            tuple(None if t is None else t.dtype for t in tensors),
        )
    return tuple(map(Tensor.data_ptr, tensors)), tuple(map(attrgetter("dtype"), tensors))


@lru_cache(maxsize=64)
def _groups(
    columns: tuple[_Column, ...],
    numels: tuple[int, ...],
    first_elements: tuple[int, ...],
    device: torch.device,
    stream: int,
) -> tuple[_Group, ...]:
    """The launches that a step needs; made anew only when something in them has changed.

    ``stream`` is the one that uploads the tables, which orders the upload before the launches.
    """
    members: dict[tuple[Any, bool], list[int]] = {}
    for position, numel in enumerate(numels):
        dtypes = tuple(_TRITON_DTYPE[dtype[position]] for _, dtype in columns)
        aligned = all(address[position] % 16 == 0 for address, _ in columns)
        if numel > 0:
            members.setdefault((dtypes, aligned), []).append(position)
    groups = []
    for (dtypes, aligned), positions in members.items():
        chunks = list(accumulate((triton.cdiv(numels[i], BLOCK) for i in positions), initial=0))
        addresses = [[address[i] for i in positions] for address, _ in columns]
        first = [first_elements[i] for i in positions]
        rows = [chunks[:-1], [numels[i] for i in positions], positions, first, *addresses]
        # From pinned memory the upload does not wait for what the device is doing.
        table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        table = table.to(device, non_blocking=True)
        groups.append(_Group(table, dtypes, aligned, chunks[-1]))
    return tuple(groups)


def _run(
    kernel: Any,
    columns: tuple[Sequence[Tensor | None], ...],
    arguments: tuple[Any, ...],
    switches: Any,
    partial_dtype: torch.dtype = torch.float32,
    first_elements: Sequence[int] | None = None,
) -> Tensor:
    """Launch ``kernel`` over all rows; returns the partial sum of every chunk, in their order."""
    device = columns[0][0].device if columns[0] else torch.device("cpu")
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    numels = tuple(map(Tensor.numel, columns[0]))
    groups = _groups(
        tuple(map(_column, columns)),
        numels,
        tuple(accumulate(numels, initial=0))[:-1]
        if first_elements is None
        else tuple(first_elements),
        device,
        stream,
    )
    chunks = sum(group.chunks for group in groups)
    partials = torch.empty(chunks, dtype=partial_dtype, device=device)
    first_partial = 0
    with _current(device):
        for group in groups:
            kernel[(group.chunks,)](
                group.table,
                group.table.shape[1],
                partials,
                first_partial,
                *arguments,
                *group.dtypes,
                ALIGNED=group.aligned,
                BLOCK=BLOCK,
                **switches(group.dtypes),
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
            first_partial += group.chunks
    return partials


def _current(device: torch.device) -> AbstractContextManager[Any]:
    # Triton launches on the current device, whatever its arguments lie on.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _pulled(
    fishers: Sequence[Tensor | None],
    anchors: Sequence[Tensor | None],
    ewc_lambda: float,
    update_fisher: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """F and θ* without what this step neither reads nor writes."""
    on = [
        fisher is not None and anchor is not None and ewc_lambda != 0
        for fisher, anchor in zip(fishers, anchors, strict=True)
    ]
    return (
        [f if pulled or update_fisher else None for f, pulled in zip(fishers, on, strict=True)],
        [a if pulled else None for a, pulled in zip(anchors, on, strict=True)],
    )


def _scales(
    fishers: Sequence[Tensor | None], scales: Sequence[Tensor | None] | None
) -> list[Tensor | None]:
    """The scales of those F that are read."""
    if scales is None:
        return [None] * len(fishers)
    return [None if f is None else z for f, z in zip(fishers, scales, strict=True)]


def _penalty(partials: Tensor, anchors: Sequence[Tensor | None], ewc_lambda: float) -> Tensor:
    if all(anchor is None for anchor in anchors):
        return torch.zeros((), device=partials.device)
    return (partials.sum(dtype=torch.float64) * (0.5 * ewc_lambda)).float()


def _pull_scalars(
    lr: float,
    weight_decay: float,
    maximize: bool,
    clip: float | Tensor,
    grad_scale: float | Tensor,
    ewc_lambda: float,
    batch_fisher_decay: float | None,
    found_inf: Tensor | None,
    rounding: Rounding | None,
) -> PullScalars:
    known_clip = 1.0 if isinstance(clip, Tensor) else clip
    known_scale = 1.0 if isinstance(grad_scale, Tensor) else grad_scale
    sign = -1.0 if maximize else 1.0
    return PullScalars(
        grad_factor=sign * known_clip / known_scale,
        inverse_scale=1.0 / known_scale,
        clip=clip if isinstance(clip, Tensor) else None,
        grad_scale=grad_scale if isinstance(grad_scale, Tensor) else None,
        found_inf=found_inf,
        rounding_key=None if rounding is None else _key(rounding),
        # An infinity would turn a Fisher of 0 into a NaN.
        ewc_lambda=min(float(ewc_lambda), 3.4e38),
        lr_lambda=min(float(lr * ewc_lambda), 3.4e38),
        fisher_decay=float(batch_fisher_decay or 0.0),
        weight_decay=float(weight_decay),
        lr=float(lr),
    )


def _key(rounding: Rounding) -> int:
    """What ``bdu.rounding`` makes of seed and step before it looks at an element, times two."""
    seed, step = rounding
    # Always odd and of 64 bits: Triton compiles anew for a number of 32, for 1 and for one that 16
    # divides.
    high = _mixed_number(((seed >> 32) + 0x9E3779B9) & 0xFFFFFFFF)
    key = _mixed_number(_mixed_number((high ^ seed) & 0xFFFFFFFF) ^ (int(step) & 0xFFFFFFFF))
    return (1 << 40) | (key << 1) | 1


def _mixed_number(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
