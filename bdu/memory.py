"""What a training run will hold in memory, said before any of it is allocated.

Counted is what stays from step to step: parameters, buffers, gradients, the Fisher F, the anchor
θ*, and the moments of the optimizer. Activations, and what kernels work in, come on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bdu import quantization
from bdu.optim import EWCSGD, EWCAdamW
from bdu.optim.base import EWCOptimizer, FisherDtype, Group
from bdu.optim.checks import check_fisher_dtype
from bdu.optim.release import BATCH, SMALL
from bdu.reference import compute_dtype

_IN_8_BITS: tuple[Any, ...] = get_args(get_args(FisherDtype)[1])
_MOMENTS: Mapping[type[EWCOptimizer], tuple[str, ...]] = {
    EWCSGD: ("momentum_buffer",),
    EWCAdamW: ("exp_avg", "exp_avg_sq"),
}
_PARTS = ("parameters", "buffers", "gradients", "fisher", "anchor", "moments", "copies")
_GB = 10**9


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of every part; ``str()`` of it is a table.

    Attributes:
        parameters, buffers: of the model, tied ones once.
        gradients: of all trained parameters, or with gradient release the most that live at once.
        fisher: F, with the scales of a Fisher in 8 bits.
        anchor: θ*.
        moments: of the optimizer, with AdamW's step counts.
        copies: of parameters and buffers, beside those of the model.
        elements: in all parameters.
        anchored: elements of the parameters that have F and θ*.
    """

    parameters: int
    buffers: int
    gradients: int
    fisher: int
    anchor: int
    moments: int
    copies: int
    elements: int
    anchored: int

    @property
    def total_bytes(self) -> int:
        """Of all parts."""
        return sum(getattr(self, part) for part in _PARTS)

    @property
    def ewc_bytes_per_parameter(self) -> float:
        """Of F and θ* together, for each element that has them; 0 where none has."""
        return (self.fisher + self.anchor) / self.anchored if self.anchored else 0.0

    def __str__(self) -> str:
        rows = [(part, getattr(self, part)) for part in _PARTS]
        lines = [f"{'':<10}{'GB':>12}{'bytes':>20}{'a parameter':>13}"]
        for part, count in [row for row in rows if row[1]] + [("total", self.total_bytes)]:
            share = f"{count / self.elements:.3f}" if self.elements else ""
            lines.append(f"{part:<10}{count / _GB:>12.3f}{count:>20,}{share:>13}")
        lines.append(
            f"{self.elements:,} parameters; the EWC state (fisher and anchor) takes "
            f"{self.ewc_bytes_per_parameter:.3f} bytes for each that has one; 1 GB = 10^9 bytes; "
            "activations come on top"
        )
        return "\n".join(lines)


def memory_plan(
    model: nn.Module,
    optimizer: str | EWCOptimizer = "sgd",
    *,
    momentum: float | None = None,
    fisher_dtype: FisherDtype | None = None,
    anchor_dtype: torch.dtype | None = None,
    release_gradients: bool = False,
    copies: int = 0,
) -> MemoryPlan:
    """What training ``model`` with an EWC optimizer will take, without allocating any of it.

    ::

        with torch.device("meta"):
            model = Net()
        print(bdu.memory_plan(model, "adamw", fisher_dtype="8bit", anchor_dtype=torch.bfloat16))

    Per trained parameter of n elements in a dtype of b bytes: b·n for the gradient and for each
    moment (none for SGD without momentum, one with, two for AdamW and 4 bytes for its step count);
    F takes 4·n bytes in float32, 2·n in bfloat16 or float16, and n + 2·⌈n / 32⌉ in 8 bits, where
    tensors under 4,096 elements stay in float32. Parameters that require no gradient take part in
    nothing of this.

    Args:
        model: on any device, "meta" included; in the dtype it is to be trained in.
        optimizer: "sgd", "adamw", or an :class:`bdu.optim.EWCSGD` or :class:`bdu.optim.EWCAdamW`:
            then with its own groups and settings, and with the state that it has already.
        momentum: of "sgd", as :class:`bdu.optim.EWCSGD` takes it; None: 0. Only with "sgd".
        fisher_dtype: what F is to be kept in: a floating dtype, "8bit" or "8bit_logarithmic". None:
            what the optimizer says or has attached, or else float32 (float64 for float64
            parameters).
        anchor_dtype: likewise for θ*; at last the parameter's.
        release_gradients: with :func:`bdu.optim.release_gradients`: the largest gradient and the
            small ones that wait. An operation that makes several large gradients at once holds all
            of them.
        copies: copies of parameters and buffers that are held beside the model.

    Raises:
        ValueError: another optimizer or dtype, ``momentum`` with another optimizer than "sgd",
            ``copies`` below 0, a parameter whose shape is not known yet (lazy modules), no
            parameter that is trained, or an optimizer without one of the model.
    """
    check_fisher_dtype(fisher_dtype, anchor_dtype, _IN_8_BITS)
    if copies < 0:
        raise ValueError(f"copies: expected a number >= 0, got {copies}")
    params: dict[str, Tensor] = dict(model.named_parameters())
    for name, param in params.items():
        if is_lazy(param):
            raise ValueError(f"{name}: expected a parameter of known shape, got a lazy one")
    planned = _optimizer(params, optimizer, momentum)
    wanted = _Dtypes(fisher_dtype, anchor_dtype)
    fisher = anchor = moments = anchored = 0
    for param, group in _of_model(planned, params.values()):
        own_fisher, own_anchor = _ewc_bytes(planned, param, group, wanted)
        fisher, anchor = fisher + own_fisher, anchor + own_anchor
        moments += _moment_bytes(planned, param, group)
        anchored += param.numel() if own_fisher else 0
    size = sum(map(_nbytes, params.values()))
    buffers = sum(map(_nbytes, model.buffers()))
    return MemoryPlan(
        parameters=size,
        buffers=buffers,
        gradients=_gradient_bytes(params.values(), release_gradients),
        fisher=fisher,
        anchor=anchor,
        moments=moments,
        copies=copies * (size + buffers),
        elements=sum(map(Tensor.numel, params.values())),
        anchored=anchored,
    )


@dataclass(frozen=True)
class _Dtypes:
    fisher: FisherDtype | None
    anchor: torch.dtype | None


def _optimizer(
    params: Mapping[str, Tensor], optimizer: str | EWCOptimizer, momentum: float | None
) -> EWCOptimizer:
    """One of the kind asked for; making it allocates nothing."""
    if momentum is not None and optimizer != "sgd":
        raise ValueError(
            f'momentum: expected None with an optimizer other than "sgd", got {momentum}'
        )
    if isinstance(optimizer, EWCOptimizer):
        return optimizer
    trained = [(name, p) for name, p in params.items() if p.requires_grad]
    if not trained:
        raise ValueError("model: expected a parameter that requires a gradient, got none")
    if optimizer == "sgd":
        return EWCSGD(trained, momentum=momentum or 0.0, ewc_lambda=1.0)
    if optimizer == "adamw":
        return EWCAdamW(trained, ewc_lambda=1.0)
    raise ValueError(
        f'optimizer: expected "sgd", "adamw", an EWCSGD or an EWCAdamW, got {optimizer!r}'
    )


def _of_model(optimizer: EWCOptimizer, params: Iterable[Tensor]) -> Iterator[tuple[Tensor, Group]]:
    own = set(params)
    found = [(p, g) for g in optimizer.param_groups for p in g["params"] if p in own]
    if not found:
        raise ValueError("optimizer: expected parameters of the model, got none")
    return iter(found)


def _ewc_bytes(
    optimizer: EWCOptimizer, param: Tensor, group: Group, wanted: _Dtypes
) -> tuple[int, int]:
    """Of F and of θ*: what is attached, or else what the first step will ask for."""
    state = optimizer.state.get(param, {})
    is_attached = state.get("fisher") is not None
    is_averaged = group["batch_fisher_decay"] is not None
    ewc_lambda = group["ewc_lambda"]
    is_pulled = isinstance(ewc_lambda, Tensor) or ewc_lambda > 0
    if not is_attached and not (param.requires_grad and (is_pulled or is_averaged)):
        return 0, 0
    fisher_dtype, anchor_dtype = wanted.fisher, wanted.anchor
    if not is_attached and not is_averaged:
        fisher_dtype = fisher_dtype or optimizer.fisher_dtype
        anchor_dtype = anchor_dtype or optimizer.anchor_dtype
    if is_attached and fisher_dtype is None:
        fisher = sum(_nbytes(state[key]) for key in ("fisher", "fisher_scale") if key in state)
    else:
        fisher = _fisher_bytes(param, fisher_dtype)
    if is_attached and anchor_dtype is None and state.get("anchor") is not None:
        return fisher, _nbytes(state["anchor"])
    return fisher, param.numel() * (anchor_dtype or param.dtype).itemsize


def _fisher_bytes(param: Tensor, dtype: FisherDtype | None) -> int:
    if dtype in _IN_8_BITS and param.numel() >= quantization.SMALLEST:
        scale = torch.bfloat16.itemsize * quantization.blocks_of(param)
        return param.numel() + scale
    if not isinstance(dtype, torch.dtype) or dtype == torch.float64:
        # As with float64, which is kept for float64 parameters alone.
        dtype = compute_dtype(param)
    return param.numel() * dtype.itemsize


def _moment_bytes(optimizer: EWCOptimizer, param: Tensor, group: Group) -> int:
    state = optimizer.state.get(param, {})
    names = next(own for kind, own in _MOMENTS.items() if isinstance(optimizer, kind))
    will_be = param.requires_grad and group.get("momentum") != 0
    total = 0
    for name in names:
        if isinstance(state.get(name), Tensor):
            total += _nbytes(state[name])
        elif will_be:
            total += _nbytes(param)
    if isinstance(optimizer, EWCAdamW) and (will_be or "step" in state):
        total += torch.float32.itemsize
    return total


def _gradient_bytes(params: Iterable[Tensor], release_gradients: bool) -> int:
    trained = [p for p in params if p.requires_grad]
    if not release_gradients:
        return sum(map(_nbytes, trained))
    small = [p for p in trained if p.numel() < SMALL]
    # One more arrives when almost as many wait as may.
    waiting = (BATCH - 1 + SMALL - 1) * max((p.itemsize for p in small), default=0)
    largest = max((_nbytes(p) for p in trained if p.numel() >= SMALL), default=0)
    return largest + min(sum(map(_nbytes, small)), waiting)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
