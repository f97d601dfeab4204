"""The fused steps as operators of torch, ``torch.ops.bdu.*``, which ``torch.compile`` can trace.

They do what :mod:`bdu.ops` does, on whatever backend serves the tensors. A compiled function may
contain them, also with ``fullgraph=True``; what they write is declared, so that the compiler orders
reads and writes around them. The optimizers do not go through here: their ``step`` is a break in
the graph, as it keeps tables from step to step, which an operator cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdu import ops

_WRITTEN_BY_SGD = ("params", "momentum_buffers")
_WRITTEN_BY_ADAMW = ("params", "exp_avgs", "exp_avg_sqs")


def _column(tensors: list[Tensor], params: list[Tensor], name: str) -> list[Tensor | None]:
    if not tensors:
        return [None] * len(params)
    if len(tensors) != len(params):
        raise ValueError(f"{name}: expected {len(params)} tensors or none, got {len(tensors)}")
    return list(tensors)


@torch.library.custom_op("bdu::ewc_sgd_step", mutates_args=_WRITTEN_BY_SGD)
def ewc_sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    fishers: list[Tensor],
    anchors: list[Tensor],
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    ewc_lambda: float = 0.0,
    proximal: bool = True,
) -> Tensor:
    """One EWC-anchored SGD step in place; see :func:`bdu.reference.ewc_sgd_step`.

    Args:
        params, grads, momentum_buffers, fishers, anchors: one entry a parameter, of its shape and
            device and laid out like it; the last three may be empty lists.
        proximal: mode "proximal", else "gradient".

    Returns:
        ½ λ Σ F d² at θ before the step, 0-dim, on the parameters' device.
    """
    columns = {
        "momentum_buffer": _column(momentum_buffers, params, "momentum_buffers"),
        "fisher": _column(fishers, params, "fishers"),
        "anchor": _column(anchors, params, "anchors"),
    }
    return ops.ewc_sgd_step(
        ops.ParameterTable(params, columns),
        grads,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay=weight_decay,
        maximize=maximize,
        ewc_lambda=ewc_lambda,
        mode="proximal" if proximal else "gradient",
    )


@torch.library.custom_op("bdu::ewc_adamw_step", mutates_args=_WRITTEN_BY_ADAMW)
def ewc_adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    fishers: list[Tensor],
    anchors: list[Tensor],
    steps: Tensor,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    ewc_lambda: float = 0.0,
    proximal: bool = True,
) -> Tensor:
    """One EWC-anchored AdamW step in place; see :func:`bdu.reference.ewc_adamw_step`.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, fishers, anchors: one entry a parameter, of its shape
            and device and laid out like it; the last two may be empty lists.
        proximal: mode "proximal", else "gradient".
        steps: t of each parameter, (len(params),) float32 on their device, already counted up.

    Returns:
        ½ λ Σ F d² at θ before the step, 0-dim, on the parameters' device.
    """
    columns = {
        "exp_avg": _column(exp_avgs, params, "exp_avgs"),
        "exp_avg_sq": _column(exp_avg_sqs, params, "exp_avg_sqs"),
        "fisher": _column(fishers, params, "fishers"),
        "anchor": _column(anchors, params, "anchors"),
    }
    return ops.ewc_adamw_step(
        ops.ParameterTable(params, columns),
        grads,
        steps,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        ewc_lambda=ewc_lambda,
        mode="proximal" if proximal else "gradient",
    )


@torch.library.custom_op("bdu::grad_norm", mutates_args=())
def grad_norm(grads: list[Tensor]) -> Tensor:
    """√ Σ g² over all tensors, 0-dim, on their device; see :func:`bdu.reference.grad_norm`."""
    return ops.grad_norm(grads)


def _scalar_like(tensors: list[Tensor]) -> Tensor:
    wide = any(t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if wide else torch.float32
    return torch.empty((), dtype=dtype, device=tensors[0].device if tensors else None)


@ewc_sgd_step.register_fake
@ewc_adamw_step.register_fake
def _(params: list[Tensor], *_: object, **__: object) -> Tensor:
    return _scalar_like(params)


@grad_norm.register_fake
def _(grads: list[Tensor]) -> Tensor:
    return _scalar_like(grads)
