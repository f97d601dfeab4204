"""The operators of torch, and a training step with an optimizer, under ``torch.compile``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import TARGETS, copy_of, make, on
from torch import Tensor, nn

import bdu.library
from bdu import dispatch
from bdu.optim import EWCSGD, EWCAdamW

SHAPES = [(5, 7), (64,), (3,)]
# One real gradient computation around it, so that there is something to order.
HYPER: dict[str, Any] = {"lr": 0.1, "ewc_lambda": 0.5, "weight_decay": 0.01}


def sgd(problem: dict[str, list[Any]]) -> tuple[Tensor, Tensor]:
    names = ("param", "grad", "momentum_buffer", "fisher", "anchor")
    lists = [problem[name] for name in names]
    doubled = [g * 2 for g in lists[1]]
    norm = torch.ops.bdu.grad_norm(doubled)
    penalty = torch.ops.bdu.ewc_sgd_step(lists[0], doubled, *lists[2:], momentum=0.9, **HYPER)
    return penalty + norm, lists[0][0].sum()


def adamw(problem: dict[str, list[Any]]) -> tuple[Tensor, Tensor]:
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "fisher", "anchor")
    lists = [problem[name] for name in names]
    steps = torch.full((len(SHAPES),), 2.0, device=lists[0][0].device)
    penalty = torch.ops.bdu.ewc_adamw_step(*lists, steps, **HYPER)
    return penalty, lists[0][0].sum()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("function", [sgd, adamw])
def test_a_compiled_function_contains_the_step_as_a_whole(target, function):
    operation = f"ewc_{function.__name__}_step"
    eager = on(target, make(SHAPES, torch.float32, operation))
    compiled = copy_of(eager)
    torch._dynamo.reset()
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    with dispatch.use_backend(target.backend):
        for _ in range(2):
            expected, actual = function(eager), traced(compiled)
            for mine, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(mine, theirs)
    for name, column in eager.items():
        for mine, theirs in zip(compiled[name], column, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_the_operators_say_the_truth_about_what_they_write():
    problem = make(SHAPES, torch.float32)
    lists = [problem[n] for n in ("param", "grad", "momentum_buffer", "fisher", "anchor")]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        bdu.library.ewc_sgd_step, (*lists, 0.1), {"momentum": 0.9}, test_utils=checks
    )
    problem = make(SHAPES, torch.float32, "ewc_adamw_step")
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "fisher", "anchor")
    lists = [problem[n] for n in names]
    torch.library.opcheck(
        bdu.library.ewc_adamw_step, (*lists, torch.ones(3), 0.1), test_utils=checks
    )
    torch.library.opcheck(bdu.library.grad_norm, (problem["grad"],), test_utils=checks)


def test_what_does_not_fit_is_named():
    one = [torch.ones(3)]
    with pytest.raises(ValueError, match="fishers: expected 1 tensors or none, got 2"):
        torch.ops.bdu.ewc_sgd_step(one, one, [], one * 2, one, 0.1)


@pytest.mark.parametrize("cls", [EWCSGD, EWCAdamW])
def test_a_compiled_training_step_with_an_optimizer_equals_the_eager_one(cls):
    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
        return model, cls(model.named_parameters(), lr=0.1, ewc_lambda=1.0, fisher=fisher)

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    (one, its), (other, others) = made(), made()
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(5, 8)
        torch.testing.assert_close(compiled(one, its, x), step(other, others, x))
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(its.penalty, others.penalty)
