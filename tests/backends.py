"""What the tests of the fused steps share: where they run, the tensors, and the allowed error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bdu import dispatch, ops, reference

# Without the last, the scale of a Fisher in 8 bits, which has tests of its own.
COLUMNS = {"ewc_sgd_step": ops.SGD_COLUMNS[:-1], "ewc_adamw_step": ops.ADAMW_COLUMNS[:-1]}

Problem = dict[str, list[Tensor | None]]


class Target(NamedTuple):
    """Where a test runs: a backend on a kind of device."""

    backend: str
    device: str

    @property
    def is_interpreted(self) -> bool:
        return self.device == "cpu" and self.backend in ("triton", "cuda")


def can_run(line: dispatch.Serves) -> bool:
    if line.device == "cuda":
        return torch.cuda.is_available()
    return line.backend not in ("triton", "cuda") or dispatch.is_interpreted(line.backend)


def served(operation: str) -> list[Any]:
    """(target, dtype) for every line that the table has for this operation and that can run."""
    return [
        pytest.param(
            Target(line.backend, line.device),
            dtype,
            id=f"{line.backend}-{line.device}-{str(dtype).removeprefix('torch.')}",
        )
        for line in dispatch.TABLE[operation]
        if can_run(line)
        for dtype in sorted(line.dtypes, key=str)
    ]


TARGETS = [
    pytest.param(Target(line.backend, line.device), id=f"{line.backend}-{line.device}")
    for line in dispatch.TABLE["ewc_sgd_step"]
    if can_run(line)
]
ON_CPU = [target.values[0].backend for target in TARGETS if target.values[0].device == "cpu"]


def shapes_for(target: Target) -> list[tuple[int, ...]]:
    """Below, at and above a tile (512), and several chunks: 16384 elements (cpp), 2048 (triton)."""
    large = 5_001 if target.is_interpreted else 40_001
    return [(), (0,), (1,), (63,), (1024,), (1025,), (3, 5, 7), (large,)]


def make(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    operation: str = "ewc_sgd_step",
    seed: int = 0,
    device: str = "cpu",
    **other_dtypes: torch.dtype,
) -> Problem:
    """A table's tensors, of order 1; F and the second moment are at least 1/4."""
    generator = torch.Generator().manual_seed(seed)
    problem: Problem = {}
    for name in ("param", "grad", *COLUMNS[operation]):
        column = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        if name in ("fisher", "exp_avg_sq"):
            column = [0.25 + t.abs() for t in column]
        problem[name] = [t.to(device, other_dtypes.get(name, dtype)) for t in column]
    return problem


def copy_of(problem: Problem, dtype: torch.dtype | None = None) -> Problem:
    return {
        name: [None if t is None else t.clone().to(dtype or t.dtype) for t in column]
        for name, column in problem.items()
    }


def on(target: Target, problem: Problem) -> Problem:
    return {
        name: [None if t is None else t.to(target.device) for t in column]
        for name, column in problem.items()
    }


def step(target: Target, operation: str, problem: Problem, **hyper: Any) -> Tensor:
    """Step the tensors of ``problem`` in place through ``bdu.ops``; returns the penalty."""
    hyper = {k: v.to(target.device) if isinstance(v, Tensor) else v for k, v in hyper.items()}
    columns = {name: problem[name] for name in COLUMNS[operation]}
    table = ops.ParameterTable(problem["param"], columns)
    with dispatch.use_backend(target.backend):
        return getattr(ops, operation)(table, problem["grad"], **hyper)


def check(target: Target, operation: str, problem: Problem, **hyper: Any) -> None:
    """One step by a backend against the reference on float64 copies: every tensor, the penalty."""
    exact = copy_of(problem, torch.float64)
    lists = [exact[name] for name in ("param", "grad", *COLUMNS[operation])]
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in hyper.items()}
    exact_penalty = getattr(reference, operation)(*lists, **wide)
    terms = terms_of(operation, copy_of(problem, torch.float64), exact, **wide)
    actual = copy_of(problem)
    penalty = step(target, operation, actual, **hyper)
    for name, column in exact.items():
        for row, expected in enumerate(column):
            if expected is not None:
                assert_rounded(actual[name][row], expected, terms[name][row], f"{name}[{row}]")
    assert penalty.shape == ()
    # All summands are positive: 3 roundings each and at most 32 additions in float32, 18 eps.
    assert penalty.item() == pytest.approx(
        exact_penalty.item(),
        rel=18 * torch.finfo(penalty.dtype).eps,
        abs=torch.finfo(penalty.dtype).tiny,
    )


def assert_rounded(actual: Tensor, exact: Tensor, terms: Tensor, name: str) -> None:
    """``actual`` is ``exact`` but for the roundings that the contract allows.

    One rounding at the store: eps/2 of the result, or of the smallest normal number below that. And
    before it about a dozen operations in float32 (float64 for float64), each off by at most eps/2
    of what it adds up: 8 eps of the sum of all ``terms``, taken without their signs, covers them.
    """
    store = torch.finfo(actual.dtype)
    arithmetic = torch.finfo(reference.compute_dtype(actual))
    bound = store.eps / 2 * (exact.abs() + store.smallest_normal) + 8 * arithmetic.eps * terms
    error = (actual.double() - exact).abs()
    assert (error <= bound).all(), f"{name}: {(error / bound).max().item():.3g} times the bound"


def terms_of(
    operation: str,
    before: Problem,
    after: Problem,
    *,
    lr: float,
    steps: Tensor | None = None,
    momentum: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    ewc_lambda: float = 0.0,
    mode: str = "proximal",
    clip: float | Tensor = 1.0,
    grad_scale: float | Tensor = 1.0,
    **_: Any,
) -> Problem:
    """For each tensor, the sum of what a step adds up into it, without the signs."""
    terms: Problem = {name: [] for name in before}
    for row, param in enumerate(before["param"]):
        own = {
            name: torch.zeros_like(param) if column[row] is None else column[row].abs()
            for name, column in before.items()
        }
        raw = own["grad"] / grad_scale
        g = raw * clip
        if mode == "gradient":
            g = g + ewc_lambda * own["fisher"] * (own["param"] + own["anchor"])
        own["fisher"] = own["fisher"] + raw**2
        if operation == "ewc_sgd_step":
            g = g + weight_decay * own["param"]
            own["momentum_buffer"] = momentum * own["momentum_buffer"] + g
            update = g + own["momentum_buffer"]
        else:
            assert steps is not None
            t = steps[row].item()
            second = after["exp_avg_sq"][row]
            own["exp_avg"] = own["exp_avg"] + g
            own["exp_avg_sq"] = own["exp_avg_sq"] + g**2
            # The root is off by half the relative error of what stands under it.
            update = own["exp_avg"] / (second / (1 - betas[1] ** t)).sqrt()
            update = update * (1 + own["exp_avg_sq"] / second) / (1 - betas[0] ** t)
            update = update + weight_decay * own["param"]
        own["param"] = own["param"] + own["anchor"] + lr * update
        for name, value in own.items():
            terms[name].append(value)
    return terms
