"""The compiled Fisher of layers ("cpp" on the CPU), with the signatures of :mod:`bdu.reference`.

Callers (:mod:`bdu.fisher_ops`) have checked shapes, dtypes and devices. Totals are float32;
activations and gradients are float32, bfloat16 or float16 with any strides.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from bdu.native import dtype_code, library


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
    """See :func:`bdu.reference.fisher_linear`; total, weight_gradient, kept are dense."""
    if activations.shape[1] == 1 and kept is None:
        _fisher_of_one_step(
            (total, bias_total, weight_gradient, bias_gradient), activations[:, 0], gradients[:, 0]
        )
        return
    samples, steps, inputs = activations.shape
    index = None if kept_index is None else kept_index.to(torch.int32).contiguous()
    library().fisher_linear(
        _activity(activations),
        _activity(gradients),
        samples=samples,
        steps=steps,
        inputs=inputs,
        outputs=gradients.shape[2],
        totals=_totals(total, bias_total, weight_gradient, bias_gradient),
        kept=_address(kept),
        kept_index=_address(index),
        threads=torch.get_num_threads(),
    )


def _fisher_of_one_step(
    totals: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    activations: Tensor,
    gradients: Tensor,
) -> None:
    # A sample's gradient is one product: its square is the product of the squares.
    total, bias_total, weight_gradient, bias_gradient = totals
    activations, gradients = activations.float(), gradients.float()
    squares = _square(gradients, 0)
    total.addmm_(squares.T, _square(activations, 1))
    if bias_total is not None:
        bias_total.add_(squares.sum(0))
    if weight_gradient is not None:
        weight_gradient.addmm_(gradients.T, activations)
    if bias_gradient is not None:
        bias_gradient.add_(gradients.sum(0))


# Fresh memory for the squares of a small layer costs more than its arithmetic: the first write to
# each page. Larger ones are not kept.
_kept = threading.local()
_MOST_KEPT = 2**21  # floats


def _square(tensor: Tensor, place: int) -> Tensor:
    """tensor², in memory that the next square of this place overwrites."""
    if tensor.numel() > _MOST_KEPT:
        return tensor.square()
    buffers: dict[int, Tensor] = _kept.__dict__.setdefault("buffers", {})
    if place not in buffers or buffers[place].numel() < tensor.numel():
        with torch.inference_mode(False):  # or it could never be written again outside
            buffers[place] = torch.empty(tensor.numel(), dtype=torch.float32)
    return torch.mul(tensor, tensor, out=buffers[place][: tensor.numel()].view(tensor.shape))


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
    """See :func:`bdu.reference.fisher_conv`; total and weight_gradient have the same strides."""
    if total.dim() == 3:  # one axis is two, the first of height 1
        total, activations, gradients = (t.unsqueeze(2) for t in (total, activations, gradients))
        weight_gradient = None if weight_gradient is None else weight_gradient.unsqueeze(2)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    # Positions are walked as one axis.
    flat = gradients.flatten(2).transpose(1, 2)
    if _is_pointwise(total, stride, padding, groups):
        own = None if weight_gradient is None else weight_gradient.view(total.shape[:2])
        fisher_linear(
            total.view(total.shape[:2]),
            activations.flatten(2).transpose(1, 2),
            flat,
            bias_total=bias_total,
            weight_gradient=own,
            bias_gradient=bias_gradient,
        )
        return
    samples, inputs = activations.shape[:2]
    library().fisher_conv(
        activations=activations.data_ptr(),
        activations_dtype=dtype_code(activations),
        activations_stride=activations.stride(),
        gradients=_activity(flat),
        samples=samples,
        inputs=inputs,
        outputs=gradients.shape[1],
        groups=groups,
        size=activations.shape[2:],
        out_size=gradients.shape[2:],
        kernel_size=total.shape[2:],
        stride=stride,
        padding=padding,
        dilation=dilation,
        totals=_totals(total, bias_total, weight_gradient, bias_gradient),
        total_stride=total.stride(),
        threads=torch.get_num_threads(),
    )


def _is_pointwise(
    total: Tensor, stride: tuple[int, ...], padding: tuple[int, ...], groups: int
) -> bool:
    """Whether the convolution is a linear layer of every position."""
    sizes = (*total.shape[2:], *stride)
    return groups == 1 and all(n == 1 for n in sizes) and not any(padding)


def fisher_embedding(
    total: Tensor,
    indices: Tensor,
    gradients: Tensor,
    *,
    padding_idx: int | None = None,
    weight_gradient: Tensor | None = None,
) -> None:
    """See :func:`bdu.reference.fisher_embedding`; total and weight_gradient are dense."""
    samples, steps = indices.shape
    if not indices.numel():
        return
    # Sorted by index, and by sample where that is the same: then every sum is over neighbours.
    flat = indices.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    if padding_idx is not None:
        order = order[flat[order] != padding_idx]
    index, sample = flat[order], torch.div(order, steps, rounding_mode="floor")
    segment_begin = _starts(index * samples + sample)
    first = index[segment_begin[:-1]]
    row_begin = _starts(first)
    row_index = first[row_begin[:-1]]
    library().fisher_embedding(
        _activity(gradients),
        rows=len(row_index),
        width=gradients.shape[2],
        steps=steps,
        token=order.data_ptr(),
        segment_begin=segment_begin.data_ptr(),
        row_begin=row_begin.data_ptr(),
        row_index=row_index.data_ptr(),
        total=total.data_ptr(),
        weight_gradient=_address(weight_gradient),
        threads=torch.get_num_threads(),
    )


def _starts(ascending: Tensor) -> Tensor:
    """Where each run of equal values begins, and the end of the last."""
    changes = torch.nonzero(ascending[1:] != ascending[:-1]).flatten() + 1
    ends = ascending.new_tensor([len(ascending)])
    return torch.cat([ascending.new_zeros(min(1, len(ascending))), changes, ends])


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
    """See :func:`bdu.reference.fisher_affine`."""
    samples, steps, channels = gradients.shape
    if total is None:
        activations = mean = inverse_deviation = None
    statistics = [s if s is None else s.float() for s in (mean, inverse_deviation)]
    library().fisher_affine(
        _activity(activations),
        _activity(gradients),
        samples=samples,
        steps=steps,
        channels=channels,
        mean=_address(statistics[0]),
        mean_stride=_repeating(statistics[0]),
        inverse_deviation=_address(statistics[1]),
        inverse_deviation_stride=_repeating(statistics[1]),
        totals=_totals(total, bias_total, weight_gradient, bias_gradient),
        threads=torch.get_num_threads(),
    )


def _repeating(statistic: Tensor | None) -> tuple[int, ...]:
    if statistic is None:
        return (0, 0, 0)
    pairs = zip(statistic.shape, statistic.stride(), strict=True)
    return tuple(0 if size == 1 else stride for size, stride in pairs)


def _activity(tensor: Tensor | None) -> Any:
    """A tensor (samples, steps, channels) for the compiled part; None is no data."""
    if tensor is None:
        return library().Activity(0, 0, 0, 0, 0)
    return library().Activity(tensor.data_ptr(), dtype_code(tensor), *tensor.stride())


def _totals(*tensors: Tensor | None) -> Any:
    return library().FisherTotals(*map(_address, tensors))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
