"""The exact Fisher of single layers: checked, and sent to the backend that serves the tensors.

Each function adds, to a total of a parameter's shape, the sum over samples of the squared gradient
of each sample, from a layer's input (``activations``) and the loss's gradient with respect to its
output (``gradients``). No sample's gradient is ever stored: the largest intermediate is a tile of
one, in registers. Formulas, shapes and dtypes are those of the functions of the same names in
:mod:`bdu.reference`; backends "cpp" on the CPU and "triton" on CUDA give the same bits on every run
(matrix products of T = 1 are torch's).

Backend "cpp" takes a and g of any strides; its floor is the multiply-adds of the plain weight
gradient, 2 B T I O floating-point operations for a linear layer.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from bdu import dispatch, native_fisher, reference


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
    """Add Σ_b (Σ_t g_bt a_btᵀ)² to total (O, I) and Σ_b (Σ_t g_bt)² to bias_total (O,).

    See :func:`bdu.reference.fisher_linear`.

    Raises:
        ValueError: a shape or device that does not fit, named; nothing is written then.
    """
    _check_axes("activations", activations, "(B, T, I)", 3)
    batch, steps, inputs = activations.shape
    outputs = gradients.shape[-1]
    _check("gradients", gradients, (batch, steps, outputs), activations)
    _check_total("total", total, (outputs, inputs), activations)
    _check_total("weight_gradient", weight_gradient, (outputs, inputs), activations, total)
    for name, tensor in (("bias_total", bias_total), ("bias_gradient", bias_gradient)):
        _check_vector(name, tensor, outputs, total)
    if (kept is None) != (kept_index is None):
        raise ValueError("kept, kept_index: expected both or none, got one")
    if kept is not None and kept_index is not None:
        _check_total("kept", kept, (len(kept), inputs), activations)
        _check("kept_index", kept_index, (batch, outputs), activations)
    _run(
        "fisher_linear",
        (total, activations, gradients),
        {
            "bias_total": bias_total,
            "weight_gradient": weight_gradient,
            "bias_gradient": bias_gradient,
            "kept": kept,
            "kept_index": kept_index,
        },
    )


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
    """Add Σ_b (∂ Σ_s g_bs · y_bs / ∂W)² of y = conv(a, W) + β to total (O, I / groups, *kernel).

    And Σ_b (Σ_s g_bs)² to bias_total (O,). See :func:`bdu.reference.fisher_conv`. The columns of
    the convolution are read from the image in place: there is no unfolded copy.

    Raises:
        ValueError: a shape, setting or device that does not fit, named; nothing is written then.
    """
    axes = total.dim() - 2
    if axes not in (1, 2):
        raise ValueError(f"total: expected (O, I, L) or (O, I, H, W), got {tuple(total.shape)}")
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    for name, numbers in settings.items():
        least = 0 if name == "padding" else 1
        if len(numbers) != axes or min(numbers) < least:
            raise ValueError(f"{name}: expected {axes} numbers >= {least}, got {tuple(numbers)}")
    _check_axes("activations", activations, "(B, I, ...)", 2 + axes)
    batch, inputs = activations.shape[:2]
    if groups < 1 or inputs % groups or total.shape[0] % groups:
        raise ValueError(
            f"groups: expected a divisor of {inputs} and {total.shape[0]}, got {groups}"
        )
    sizes = zip(activations.shape[2:], total.shape[2:], stride, padding, dilation, strict=True)
    out = tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)
    _check("gradients", gradients, (batch, total.shape[0], *out), activations)
    kernel = (total.shape[0], inputs // groups, *total.shape[2:])
    _check_total("total", total, kernel, activations)
    _check_total("weight_gradient", weight_gradient, kernel, activations, total)
    for name, tensor in (("bias_total", bias_total), ("bias_gradient", bias_gradient)):
        _check_vector(name, tensor, len(total), total)
    _run(
        "fisher_conv",
        (total, activations, gradients),
        {
            **{name: tuple(numbers) for name, numbers in settings.items()},
            "groups": groups,
            "bias_total": bias_total,
            "weight_gradient": weight_gradient,
            "bias_gradient": bias_gradient,
        },
    )


def fisher_embedding(
    total: Tensor,
    indices: Tensor,
    gradients: Tensor,
    *,
    padding_idx: int | None = None,
    weight_gradient: Tensor | None = None,
) -> None:
    """Add Σ_b (Σ_{t: index_bt = v} g_bt)² to each row v of total (V, D).

    See :func:`bdu.reference.fisher_embedding`. The work is that of the tokens present: they are
    sorted by index and sample, and no (B, V, D) tensor is made.

    Raises:
        ValueError: a shape or device that does not fit, named; nothing is written then.
    """
    _check_axes("gradients", gradients, "(B, T, D)", 3)
    _check("indices", indices, tuple(gradients.shape[:2]), gradients)
    if indices.is_floating_point():
        raise ValueError(f"indices: expected integers, got {indices.dtype}")
    if indices.numel() and indices.device.type == "cpu":  # a look at the device would wait for it
        for index in (int(indices.min()), int(indices.max())):
            if not 0 <= index < len(total):
                raise ValueError(f"indices: expected integers in [0, {len(total)}), got {index}")
    shape = (len(total), gradients.shape[2])
    _check_total("total", total, shape, gradients)
    _check_total("weight_gradient", weight_gradient, shape, gradients, total)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(total)
    _run(
        "fisher_embedding",
        (total, indices, gradients),
        {"padding_idx": padding_idx, "weight_gradient": weight_gradient},
    )


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
    """Add Σ_b (Σ_t g_bt ∘ x̂_bt)² to total (C,) and Σ_b (Σ_t g_bt)² to bias_total (C,), x̂ = (a −
    mean) · inverse_deviation; see :func:`bdu.reference.fisher_affine`.

    Raises:
        ValueError: a shape or device that does not fit, named; nothing is written then.
    """
    _check_axes("gradients", gradients, "(B, T, C)", 3)
    if total is None and bias_total is None:
        return
    if total is not None and activations is None:
        raise ValueError("activations: expected a tensor beside total, got None")
    if activations is not None:
        _check("activations", activations, tuple(gradients.shape), gradients)
    for name, statistic in (("mean", mean), ("inverse_deviation", inverse_deviation)):
        if statistic is None:
            continue
        pairs = zip(statistic.shape, gradients.shape, strict=False)
        if statistic.dim() != 3 or any(own not in (1, full) for own, full in pairs):
            got = tuple(statistic.shape)
            raise ValueError(
                f"{name}: expected {tuple(gradients.shape)} or 1 in its places, got {got}"
            )
        _check(name, statistic, tuple(statistic.shape), gradients)
    channels = gradients.shape[2:]
    main = total if total is not None else bias_total
    for name, tensor in (
        ("total", total),
        ("bias_total", bias_total),
        ("weight_gradient", weight_gradient),
        ("bias_gradient", bias_gradient),
    ):
        _check_total(name, tensor, tuple(channels), gradients, main)
    _run(
        "fisher_affine",
        (total, bias_total, activations, gradients),
        {
            "mean": mean,
            "inverse_deviation": inverse_deviation,
            "weight_gradient": weight_gradient,
            "bias_gradient": bias_gradient,
        },
    )


def _run(
    operation: str,
    args: tuple[Tensor | None, ...],
    options: dict[str, Any],
) -> None:
    tensors = [t for t in args if t is not None and t.is_floating_point()]
    device = tensors[0].device.type
    backend = dispatch.choose(operation, device, {t.dtype for t in tensors})
    with torch.no_grad():
        if backend == "reference":
            getattr(reference, operation)(*args, **options)
        elif backend == "cpp":
            getattr(native_fisher, operation)(*args, **options)
        else:
            _run_triton(operation, args, options)
    names = ("bias_total", "weight_gradient", "bias_gradient", "kept")
    written = [args[0], *(options.get(name) for name in names)]
    if operation == "fisher_affine":
        written.append(args[1])
    # Written behind torch's back: autograd must not take the old values for the new.
    torch.autograd.graph.increment_version([t for t in written if t is not None])


def _run_triton(operation: str, args: tuple[Tensor | None, ...], options: dict[str, Any]) -> None:
    kernel = getattr(importlib.import_module(f"bdu.kernels.{operation}"), operation)
    own = {"total": args[0], "weight_gradient": options.get("weight_gradient")}
    dense = {name: None if t is None else t.contiguous() for name, t in own.items()}
    if operation in ("fisher_linear", "fisher_conv"):
        options = dict(options)
        bias = {name: options.pop(name) for name in ("bias_total", "bias_gradient")}
        if bias["bias_total"] is not None:
            _run_bias(operation, args[2], **bias)
    kernel(dense["total"], *args[1:], **{**options, "weight_gradient": dense["weight_gradient"]})
    for name, tensor in own.items():
        written = dense[name]
        if tensor is not None and written is not None and written is not tensor:
            tensor.copy_(written)


def _run_bias(
    operation: str, gradients: Tensor | None, bias_total: Tensor, bias_gradient: Tensor | None
) -> None:
    """The bias of a layer whose kernel gives the weight alone."""
    assert gradients is not None
    if operation == "fisher_conv":
        gradients = gradients.flatten(2).transpose(1, 2)
    affine = importlib.import_module("bdu.kernels.fisher_affine").fisher_affine
    affine(None, bias_total, None, gradients, bias_gradient=bias_gradient)


def _check_axes(name: str, tensor: Tensor, expected: str, axes: int) -> None:
    if tensor.dim() != axes:
        raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], beside: Tensor) -> None:
    if tuple(tensor.shape) != shape or tensor.device != beside.device:
        raise ValueError(
            f"{name}: expected {shape} on {beside.device}, "
            f"got {tuple(tensor.shape)} on {tensor.device}"
        )


def _check_vector(name: str, tensor: Tensor | None, size: int, total: Tensor) -> None:
    _check_total(name, tensor, (size,), total)
    if tensor is not None and tensor.dtype != total.dtype:
        raise ValueError(f"{name}: expected {total.dtype} like total, got {tensor.dtype}")


def _check_total(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    beside: Tensor,
    total: Tensor | None = None,
) -> None:
    if tensor is None:
        return
    _check(name, tensor, shape, beside)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: expected float32 or float64, got {tensor.dtype}")
    if total is not None and tensor.dtype != total.dtype:
        raise ValueError(f"{name}: expected {total.dtype} like total, got {tensor.dtype}")
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    if total is not None and tensor.stride() != total.stride():
        expected = f"strides {total.stride()} like total"
        raise ValueError(f"{name}: expected {expected}, got {tensor.stride()}")
    if not dense:
        raise ValueError(f"{name}: expected dense memory, got strides {tensor.stride()}")
