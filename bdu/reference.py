"""Every formula of bdu in plain torch: the contract that all backends are tested against.

Symbols, for each tensor of a group: θ ``param``, ∇ ``grad``, θ* ``anchor``, F ``fisher`` (diagonal,
≥ 0), λ ``ewc_lambda``, and d = θ − θ*. One step is::

    g   = s · clip · ∇ / grad_scale          s = −1 with maximize, else +1
    penalty = ½ λ Σ F d²                     at θ before the step
    g  ← g + λ F d                           mode "gradient" only
    u   = the optimizer's direction          sgd: momentum(g + wd θ); adamw: m̂/(√v̂ + ε) + wd θ
    θ'  = θ − lr u
    θ'  ← θ* + (θ' − θ*) / (1 + lr λ F)      mode "proximal" only
    F  ← ρ F + (1 − ρ) (∇ / grad_scale)²     only with batch_fisher_decay ρ, never while ascending

The pull towards θ* is part of the descent whatever the sign of the loss: it is never ascended,
clipped or unscaled. Mode "gradient" is Kirkpatrick et al. 2017 (doi:10.1073/pnas.1611835114,
eq. 3) and is stable only for lr·λ·F < 2(1 + momentum); mode "proximal" is the exact minimiser of
the quadratic around θ' and stable for every λ ≥ 0.

Arithmetic is float64 where the parameter is float64 and float32 otherwise; the results are rounded
once, to the dtype that each tensor is stored in; parameters in bfloat16 to nearest, or, with a
``rounding``, as :mod:`bdu.rounding` says, where ``first_elements`` are the numbers of the tensors'
first elements (None: counted over ``params``), in the order of their memory. All functions write in
place and take lists with one entry a tensor; ``None`` in ``fishers`` and ``anchors`` means no pull
and no penalty for that tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bdu.rounding import Rounding, random_bits, to_bfloat16

Mode = Literal["proximal", "gradient"]

# An overflowing lr·λ·F must land on the anchor, not on inf / inf.
_LARGEST_PULL = 1e30
# Of λ and lr·λ, which meet F in float32: an infinity would turn an F of 0 into a NaN.
_LARGEST = 3.4e38


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for a float64 tensor, float32 for every other."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """√ Σ_t Σ_i g_ti², the Euclidean norm over all tensors together.

    Args:
        grads: any shapes and floating dtypes, all on one device.

    Returns:
        0-dim tensor on that device, float64 if any gradient is, else float32. 0 for no tensors.
    """
    squares = [grad.double().square().sum() for grad in grads]
    if not squares:
        return torch.zeros(())
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return torch.stack(squares).sum().sqrt().to(dtype)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), as ``torch.nn.utils.clip_grad_norm_`` does it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


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
    mode: Mode = "proximal",
    clip: float = 1.0,
    grad_scale: float = 1.0,
    batch_fisher_decay: float | None = None,
    rounding: Rounding | None = None,
    first_elements: Sequence[int] | None = None,
) -> Tensor:
    """One EWC-anchored SGD step in place; see the module's formulas.

    u = b with b ← momentum·b + (1 − dampening)(g + wd θ), or (g + wd θ) + momentum·b with nesterov,
    or g + wd θ itself where momentum is 0. A momentum buffer starts at zero; torch's first step
    (b = g, undampened) is a call with dampening 0.

    Returns:
        ½ λ Σ F d² at θ before the step, 0-dim, float64 if any parameter is, else float32.
    """
    if momentum != 0 and any(buffer is None for buffer in momentum_buffers):
        raise ValueError(f"momentum_buffers: expected tensors with momentum={momentum}")
    penalties = []
    firsts = _first_elements(params) if first_elements is None else first_elements
    for param, grad, buffer, fisher, anchor, first in zip(
        params, grads, momentum_buffers, fishers, anchors, firsts, strict=True
    ):
        dtype = compute_dtype(param)
        theta = param.to(dtype)
        pull = _Pull.of(theta, fisher, anchor, ewc_lambda)
        penalties.append(pull.penalty(theta))
        g = _signed(grad, dtype, maximize, clip, grad_scale)
        if mode == "gradient":
            g = g + pull.gradient(theta)
        g = g + weight_decay * theta
        if momentum != 0:
            assert buffer is not None
            b = momentum * buffer.to(dtype) + (1 - dampening) * g
            buffer.copy_(b)
            g = g + momentum * b if nesterov else b
        updated = theta - lr * g
        if mode == "proximal":
            updated = pull.proximal(updated, lr)
        _store(param, updated, rounding, first)
        _update_batch_fisher(fisher, grad, grad_scale, batch_fisher_decay, maximize)
    return _total(penalties, params)


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
    mode: Mode = "proximal",
    clip: float = 1.0,
    grad_scale: float = 1.0,
    batch_fisher_decay: float | None = None,
    rounding: Rounding | None = None,
    first_elements: Sequence[int] | None = None,
) -> Tensor:
    """One EWC-anchored AdamW step in place; see the module's formulas.

    m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,  u = (m/(1 − β₁ᵗ)) / (√(v/(1 − β₂ᵗ)) + ε) + wd θ
    (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2: the decay is outside the moments).

    Args:
        steps: t for each tensor, shape (len(params),), already counted up for this step (≥ 1).

    Returns:
        ½ λ Σ F d² at θ before the step, 0-dim, float64 if any parameter is, else float32.
    """
    beta1, beta2 = betas
    penalties = []
    firsts = _first_elements(params) if first_elements is None else first_elements
    for param, grad, exp_avg, exp_avg_sq, fisher, anchor, step, first in zip(
        params, grads, exp_avgs, exp_avg_sqs, fishers, anchors, steps.tolist(), firsts, strict=True
    ):
        dtype = compute_dtype(param)
        theta = param.to(dtype)
        pull = _Pull.of(theta, fisher, anchor, ewc_lambda)
        penalties.append(pull.penalty(theta))
        g = _signed(grad, dtype, maximize, clip, grad_scale)
        if mode == "gradient":
            g = g + pull.gradient(theta)
        m = exp_avg.to(dtype)
        m = m + (1 - beta1) * (g - m)
        v = beta2 * exp_avg_sq.to(dtype) + (1 - beta2) * g * g
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
        denominator = v.sqrt() / (1 - beta2**step) ** 0.5 + eps
        updated = theta - lr * weight_decay * theta - lr / (1 - beta1**step) * m / denominator
        if mode == "proximal":
            updated = pull.proximal(updated, lr)
        _store(param, updated, rounding, first)
        _update_batch_fisher(fisher, grad, grad_scale, batch_fisher_decay, maximize)
    return _total(penalties, params)


class _Pull:
    """The quadratic ½ λ Σ F (θ − θ*)² of one tensor, in three forms; λ = 0 where there is none."""

    def __init__(self, fisher: Tensor, anchor: Tensor, ewc_lambda: float) -> None:
        self.fisher, self.anchor, self.ewc_lambda = fisher, anchor, ewc_lambda

    @classmethod
    def of(
        cls, theta: Tensor, fisher: Tensor | None, anchor: Tensor | None, ewc_lambda: float
    ) -> _Pull:
        if fisher is None or anchor is None or ewc_lambda == 0:
            zero = theta.new_zeros(())
            return cls(zero, zero, 0.0)
        return cls(fisher.to(theta.dtype), anchor.to(theta.dtype), ewc_lambda)

    def penalty(self, theta: Tensor) -> Tensor:
        if self.ewc_lambda == 0:
            return theta.new_zeros((), dtype=torch.float64)
        contribution = self.fisher * (theta - self.anchor).square()
        return 0.5 * self.ewc_lambda * contribution.double().sum()

    def gradient(self, theta: Tensor) -> Tensor:
        if self.ewc_lambda == 0:
            return torch.zeros_like(theta)
        return min(self.ewc_lambda, _LARGEST) * self.fisher * (theta - self.anchor)

    def proximal(self, updated: Tensor, lr: float) -> Tensor:
        if self.ewc_lambda == 0:
            return updated
        # θ* + (θ' − θ*)/(1 + c) = θ' − c/(1 + c) (θ' − θ*), which leaves θ' exact where F = 0.
        c = (min(lr * self.ewc_lambda, _LARGEST) * self.fisher).clamp(max=_LARGEST_PULL)
        return updated - c / (1 + c) * (updated - self.anchor)


def _signed(
    grad: Tensor, dtype: torch.dtype, maximize: bool, clip: float, grad_scale: float
) -> Tensor:
    sign = -1.0 if maximize else 1.0
    return grad.to(dtype) * (sign * clip / grad_scale)


def _first_elements(params: Sequence[Tensor]) -> list[int]:
    return list(accumulate((p.numel() for p in params), initial=0))[:-1]


def _store(param: Tensor, updated: Tensor, rounding: Rounding | None, first: int) -> None:
    if rounding is not None and param.dtype == torch.bfloat16:
        elements = torch.empty_like(param, dtype=torch.int64)
        order = sorted(range(param.dim()), key=elements.stride, reverse=True)
        in_memory = elements.permute(order)
        in_memory.copy_(torch.arange(first, first + param.numel()).view(in_memory.shape))
        updated = to_bfloat16(updated, random_bits(rounding, elements))
    param.copy_(updated)


def _update_batch_fisher(
    fisher: Tensor | None, grad: Tensor, grad_scale: float, decay: float | None, maximize: bool
) -> None:
    if fisher is None or decay is None or maximize:
        return
    dtype = compute_dtype(fisher)
    g = grad.to(dtype) / grad_scale
    fisher.copy_(decay * fisher.to(dtype) + (1 - decay) * g * g)


def _total(penalties: list[Tensor], params: Sequence[Tensor]) -> Tensor:
    if not penalties:
        return torch.zeros(())
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    return torch.stack(penalties).sum().to(dtype)


# The exact Fisher, one function a kind of layer: each adds Σ_b (∂ Σ_t g_bt · y_bt / ∂W)² of a layer
# y = f(a; W) to `total`, elementwise. Samples b are squared one by one and then summed; positions t
# of one sample are summed before. `weight_gradient` takes the sum without the square, which is the
# parameter's plain gradient.


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
    """Of y = a Wᵀ + β: total_oi += Σ_b (Σ_t g_bto a_bti)², bias_total_o += Σ_b (Σ_t g_bto)².

    With T = 1 this is (g∘g)ᵀ(a∘a); with T > 1 that would leave out the products of different
    positions.

    Args:
        total: (O, I), float32 or float64, added to.
        activations: a (B, T, I), the layer's input, any floating dtype.
        gradients: g (B, T, O), of the layer's output.
        bias_total: (O,), like total; None: there is no bias, or it is not wanted.
        weight_gradient, bias_gradient: like total and bias_total; the plain gradients are added.
        kept, kept_index: for a W that has another use, such as an embedding that shares its table
            with this layer: both uses have to be added before the square. Where kept_index (B, O),
            integers, is not −1, that row of the sample's gradient is added to kept (N, I) at this
            number and not squared; no number comes twice.
    """
    for b in range(len(gradients)):
        one = gradients[b].T.to(total.dtype) @ activations[b].to(total.dtype)
        if weight_gradient is not None:
            weight_gradient.add_(one)
        if kept is not None and kept_index is not None:
            (present,) = torch.nonzero(kept_index[b] >= 0, as_tuple=True)
            kept[kept_index[b, present].long()] += one[present].to(kept.dtype)
            one[present] = 0
        total.addcmul_(one, one)
    if bias_total is not None:
        fisher_affine(None, bias_total, None, gradients, bias_gradient=bias_gradient)


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
    """Of y = conv(a, W) + β, 1d or 2d, as :func:`torch.nn.functional.conv2d` computes it.

    Args:
        total: (O, I / groups, *kernel), float32 or float64, added to.
        activations: a (B, I, L) or (B, I, H, W), the layer's input, any floating dtype.
        gradients: g (B, O, L') or (B, O, H', W'), of the layer's output.
        stride, padding, dilation: a number an axis; the padding is zeros on both sides.
        bias_total: (O,), like total; None: there is no bias, or it is not wanted.
        weight_gradient, bias_gradient: like total and bias_total; the plain gradients are added.
    """
    axes = total.dim() - 2
    conv = (F.conv1d, F.conv2d)[axes - 1]
    out, per_group = total.shape[:2]
    group_out = out // groups
    for a, g in zip(activations, gradients, strict=True):
        # the input's channels as a batch, the output's gradient as a dilated kernel
        image = a.to(total.dtype).unflatten(0, (groups, per_group)).transpose(0, 1)
        kernel = g.to(total.dtype).unsqueeze(1)
        one = conv(image, kernel, None, dilation, padding, stride, groups)
        for axis, size in enumerate(total.shape[2:]):
            # positions that the stride left over
            one = one.narrow(2 + axis, 0, size)
        one = one.unflatten(1, (groups, group_out)).flatten(1, 2).transpose(0, 1)
        _add_square(total, weight_gradient, one)
    if bias_total is not None:
        positions = gradients.flatten(2).transpose(1, 2)
        fisher_affine(None, bias_total, None, positions, bias_gradient=bias_gradient)


def fisher_embedding(
    total: Tensor,
    indices: Tensor,
    gradients: Tensor,
    *,
    padding_idx: int | None = None,
    weight_gradient: Tensor | None = None,
) -> None:
    """Of y = W[index]: total_v += Σ_b (Σ_{t: index_bt = v} g_bt)².

    Args:
        total: (V, D), float32 or float64, added to.
        indices: (B, T), integers in [0, V).
        gradients: g (B, T, D), any floating dtype.
        padding_idx: the row that takes no gradient.
        weight_gradient: like total; the plain gradient is added to it.
    """
    for index, gradient in zip(indices, gradients, strict=True):
        present, position = torch.unique(index, return_inverse=True)
        one = total.new_zeros(len(present), total.shape[1])
        one.index_add_(0, position, gradient.to(total.dtype))
        if padding_idx is not None:
            one[present == padding_idx] = 0
        total.index_add_(0, present, one.square())
        if weight_gradient is not None:
            weight_gradient.index_add_(0, present, one)


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
    """Of y = x̂ ∘ γ + β with x̂ = (a − mean) · inverse_deviation, from one pass over a and g.

    total_c += Σ_b (Σ_t g_btc x̂_btc)² and bias_total_c += Σ_b (Σ_t g_btc)². x̂ comes from the
    layer's input and not from its output, so γ may be 0.

    Args:
        total, bias_total: (C,), float32 or float64, added to; None where it is not wanted.
        activations: a (B, T, C), any floating dtype; None where total is.
        gradients: g (B, T, C), of the layer's output. The bias of any layer has this form.
        mean, inverse_deviation: of a's dtype or wider, each size 1 or a's own: (1, 1, C) of a
            BatchNorm, (B, T, 1) of a LayerNorm, (B, 1, C) of a GroupNorm; None is 0 and 1.
        weight_gradient, bias_gradient: like total and bias_total; plain gradients are added.
    """
    wide = next(t.dtype for t in (total, bias_total) if t is not None)
    gradients = gradients.to(wide)
    if bias_total is not None:
        for one in gradients.sum(1):
            _add_square(bias_total, bias_gradient, one)
    if total is None or activations is None:
        return
    normalised = activations.to(wide)
    if mean is not None:
        normalised = normalised - mean.to(wide)
    if inverse_deviation is not None:
        normalised = normalised * inverse_deviation.to(wide)
    for one in (gradients * normalised).sum(1):
        _add_square(total, weight_gradient, one)


def _add_square(total: Tensor, weight_gradient: Tensor | None, one: Tensor) -> None:
    total.addcmul_(one, one)
    if weight_gradient is not None:
        weight_gradient.add_(one)
