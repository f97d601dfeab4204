"""AdamW with an EWC pull."""

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
from bdu.optim.checks import check_at_least_zero, check_flags
from bdu.reference import Mode


class EWCAdamW(EWCOptimizer):
    r"""AdamW whose step also pulls θ towards θ*, weighted by the Fisher diagonal.

    ::

        g   = s · clip · ∇ / scale                      s = −1 with maximize, else +1
        g  ← g + λ F (θ − θ*)                           mode "gradient"
        m  ← β₁ m + (1 − β₁) g,   v ← β₂ v + (1 − β₂) g²
        θ' = θ − lr ( (m/(1 − β₁ᵗ)) / (√(v/(1 − β₂ᵗ)) + ε) + wd θ )
        θ ← θ* + (θ' − θ*) / (1 + lr λ F)               mode "proximal" (default)

    Loshchilov & Hutter 2019 (arXiv:1711.05101) with the pull of Kirkpatrick et al. 2017
    (doi:10.1073/pnas.1611835114). In mode "proximal" the pull is outside the preconditioner, in
    mode "gradient" inside it: their λ cannot be compared.

    Args:
        params: parameters, ``(name, parameter)`` pairs or groups, as ``torch.optim.AdamW`` takes.
        lr: learning rate ≥ 0; a 1-element tensor is read at every step.
        betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``; ``maximize`` ascends the
            loss and still descends the penalty.
        amsgrad: only False.
        ewc_lambda, fisher, anchor, mode, max_grad_norm, error_if_nonfinite, batch_fisher_decay,
        fisher_dtype, anchor_dtype, stochastic_rounding, foreach, fused, differentiable, capturable:
            as in :class:`EWCSGD`.

    Raises:
        ValueError: an argument out of range, or a Fisher that does not fit (:meth:`set_anchor`).
    """

    _operation = "ewc_adamw_step"
    _columns = ops.ADAMW_COLUMNS
    _counts_steps = True
    _group_defaults: ClassVar[Mapping[str, Any]] = {**SHARED_DEFAULTS}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
        if amsgrad:
            raise ValueError("amsgrad: EWCAdamW has no amsgrad form; expected False, got True")
        check_flags(foreach, fused, differentiable)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
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
        betas = tuple(float(beta) for beta in group["betas"])
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}]: expected a number in [0, 1), got {beta}")
        eps = check_at_least_zero("eps", group["eps"])
        return super()._settings(group) | {"betas": betas, "eps": eps}

    def _start(self, state: State, param: Tensor, group: Group) -> None:
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), device=param.device)
            state["exp_avg"] = torch.zeros_like(param, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(param, requires_grad=False)

    def _check_loaded_state(self, state: State, name: str) -> None:
        moments = ("step", "exp_avg", "exp_avg_sq")
        missing = [key for key in moments if state.get(key) is None]
        if missing and len(missing) < len(moments):
            raise ValueError(
                f"state of {name}: expected step, exp_avg and exp_avg_sq or none of them, got it "
                f"without {' and '.join(missing)}"
            )

    def _check_loaded_group(self, group: Group) -> None:
        super()._check_loaded_group(group)
        if group.get("amsgrad"):
            raise ValueError("amsgrad: EWCAdamW has no amsgrad form; expected False, got True")
        if not group.get("decoupled_weight_decay", True) and group["weight_decay"] != 0:
            raise ValueError(
                "weight_decay: expected AdamW's, outside the moments, got Adam's "
                f"({group['weight_decay']}, inside them)"
            )

    def _launch(self, work: Work, factors: Factors) -> Tensor:
        launch, grads, settings = work
        assert launch.steps is not None
        # The device alone knows whether it writes.
        launch.steps += 1 if factors.found_inf is None else factors.found_inf == 0
        return ops.ewc_adamw_step(
            launch.table, grads, launch.steps, **factors._asdict(), **settings
        )
