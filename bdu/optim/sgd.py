"""SGD with an EWC pull."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bdu import ops
from bdu.optim.base import (
    SHARED_DEFAULTS,
    EWCOptimizer,
    Factors,
    FisherDtype,
    Group,
    Named,
    State,
    Work,
)
from bdu.optim.checks import check_at_least_zero, check_finite, check_flags
from bdu.reference import Mode


class EWCSGD(EWCOptimizer):
    r"""SGD with momentum whose step also pulls θ towards θ*, weighted by the Fisher diagonal.

    ::

        g   = s · clip · ∇ / scale                      s = −1 with maximize, else +1
        g  ← g + λ F (θ − θ*)                           mode "gradient"
        b  ← momentum b + (1 − dampening)(g + wd θ)
        θ' = θ − lr b
        θ ← θ* + (θ' − θ*) / (1 + lr λ F)               mode "proximal" (default)

    Mode "gradient" is Kirkpatrick et al. 2017 (doi:10.1073/pnas.1611835114), stable only for
    lr·λ·F < 2(1 + momentum); mode "proximal" is stable for every λ. λ does not mean the same in
    both: without dampening, λ_proximal = λ_gradient / (1 − momentum) have equal fixed points.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups, as ``torch.optim.SGD`` takes.
        lr: learning rate ≥ 0; a 1-element tensor is read at every step.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``;
            ``maximize`` ascends the loss and still descends the penalty.
        ewc_lambda: λ ≥ 0, may be changed in ``param_groups`` between steps. The pull grows with F:
            scale F to mean 1 (:func:`bdu.fisher.scale_to_unit_mean`) if λ is to travel.
        fisher: F by name or by parameter, see :meth:`set_anchor`; may also be attached later.
        anchor: θ*, likewise. None: the parameters as they are now.
        mode: "proximal" or "gradient".
        max_grad_norm: clip the gradients of all groups together to this Euclidean norm, as
            ``torch.nn.utils.clip_grad_norm_``; the pull is not clipped.
        error_if_nonfinite: refuse a step whose gradients hold a NaN or an infinity, at the price of
            reading them once more (and of waiting for the device).
        batch_fisher_decay: ρ in [0, 1). F ← ρ F + (1 − ρ) ∇² at every descending step. This squares
            the batch's mean gradient, so it is **not** the Fisher, but about 1/batch of it.
        fisher_dtype: what F is kept in: a floating dtype, "8bit" (1.06 bytes an entry, square-root
            map) or "8bit_logarithmic", see :mod:`bdu.quantization`; tensors under 4,096 elements
            and None keep F's own.
        anchor_dtype: what θ* is kept in; None: the parameter's.
        stochastic_rounding: a seed: parameters in bfloat16 are rounded stochastically
            (:mod:`bdu.rounding`), so that small updates add up. None: to nearest.
        foreach, fused: taken and ignored, the step is always fused; not both.
        capturable: for a step in a CUDA graph: lr and ewc_lambda may be 0-dim tensors on the
            device, and are read there at every replay.
        differentiable: only False.

    Raises:
        ValueError: an argument out of range, or a Fisher that does not fit (:meth:`set_anchor`).
    """

    _operation = "ewc_sgd_step"
    _columns = ops.SGD_COLUMNS
    _counts_steps = False
    _group_defaults: ClassVar[Mapping[str, Any]] = {
        "momentum": 0.0,
        "dampening": 0.0,
        "nesterov": False,
        **SHARED_DEFAULTS,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        ewc_lambda: float = 0.0,
        fisher: Named | None = None,
        anchor: Named | None = None,
        mode: Mode = "proximal",
        maximize: bool = False,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
        batch_fisher_decay: float | None = None,
        fisher_dtype: FisherDtype | None = None,
        anchor_dtype: torch.dtype | None = None,
        stochastic_rounding: int | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        check_flags(foreach, fused, differentiable)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "ewc_lambda": ewc_lambda,
            "mode": mode,
            "batch_fisher_decay": batch_fisher_decay,
            "stochastic_rounding": stochastic_rounding,
            "rounding_steps": 0,
            "capturable": capturable,
        }
        super().__init__(
            params,
            defaults,
            fisher=fisher,
            anchor=anchor,
            fisher_dtype=fisher_dtype,
            anchor_dtype=anchor_dtype,
            max_grad_norm=max_grad_norm,
            error_if_nonfinite=error_if_nonfinite,
        )

    def _settings(self, group: Group) -> dict[str, Any]:
        momentum = check_at_least_zero("momentum", group["momentum"])
        dampening = check_finite("dampening", group["dampening"])
        nesterov = bool(group["nesterov"])
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                "nesterov: expected momentum > 0 and dampening 0, "
                f"got momentum {momentum} and dampening {dampening}"
            )
        own = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        return super()._settings(group) | own

    def _needs(self, group: Group) -> object:
        return super()._needs(group), group["momentum"] != 0

    def _start(self, state: State, param: Tensor, group: Group) -> None:
        if group["momentum"] != 0 and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(param, requires_grad=False)

    def _is_first(self, state: State, group: Group) -> bool:
        # Without dampening, a buffer of zeros already gives torch's first step.
        return (
            group["momentum"] != 0
            and group["dampening"] != 0
            and state.get("momentum_buffer") is None
        )

    def _launch(self, work: Work, factors: Factors) -> Tensor:
        launch, grads, settings = work
        if launch.is_first:
            # torch starts the buffer at the first gradient itself, undampened.
            settings = settings | {"dampening": 0.0}
        return ops.ewc_sgd_step(launch.table, grads, **factors._asdict(), **settings)
