"""What the optimizers compute: torch.optim's steps at λ = 0, and the pull of both modes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bdu import dispatch
from bdu.optim import EWCSGD, EWCAdamW

BACKENDS = [b for b in dispatch.BACKENDS if dispatch.absence(b) is None]

SHAPES = [(5, 7), (33,), (), (2, 0), (1, 3, 3)]

SGD_SETTINGS = [
    {"momentum": momentum, "nesterov": nesterov, "dampening": dampening} | common
    for momentum, nesterov, dampening in [
        (0.0, False, 0.0),
        (0.9, False, 0.0),
        (0.9, False, 0.5),
        (0.9, True, 0.0),
    ]
    for common in (
        {"weight_decay": decay, "maximize": maximize}
        for decay, maximize in itertools.product([0.0, 0.1], [False, True])
    )
]
ADAMW_SETTINGS = [
    {"weight_decay": decay, "maximize": maximize, "betas": betas}
    for decay, maximize, betas in itertools.product(
        [0.0, 0.1], [False, True], [(0.9, 0.999), (0.0, 0.5)]
    )
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with dispatch.use_backend(request.param):
        yield request.param


def make_params(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def like(params: Sequence[Tensor], dtype: torch.dtype) -> list[Parameter]:
    return [Parameter(p.detach().to(dtype, copy=True)) for p in params]


def run(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, seed: int = 1
) -> None:
    """Steps with gradients that do not depend on the parameters, the same for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            # Rounded to bfloat16, so that every dtype gets the very same gradient.
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
        optimizer.step()


def distance(params: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    squares = [
        (p.detach().double() - e.detach().double()).square().sum()
        for p, e in zip(params, exact, strict=True)
    ]
    return float(torch.stack(squares).sum().sqrt())


def largest(params: Sequence[Tensor]) -> float:
    return max(float(p.detach().abs().max()) for p in params if p.numel() > 0)


# λ = 0: torch.optim


def check_parity(
    ours: Callable[..., torch.optim.Optimizer],
    theirs: Callable[..., torch.optim.Optimizer],
    settings: dict[str, Any],
    steps: int,
    lr: float,
) -> None:
    params = make_params()
    torch_params = like(params, torch.float32)
    run(ours(params, lr=lr, **settings), params, steps)
    run(theirs(torch_params, lr=lr, foreach=False, **settings), torch_params, steps)
    # Both round a handful of operations of a parameter's size a step (momentum adds up ten
    # gradients, so its buffer may be larger), and the rounding of a hundred steps adds up.
    tolerance = 4 * steps * torch.finfo(torch.float32).eps * max(1.0, largest(torch_params))
    for own, expected in zip(params, torch_params, strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=tolerance)


def steps_for(backend: str) -> int:
    # The interpreter takes tens of milliseconds a step.
    return 5 if backend == "triton" else 100


@pytest.mark.parametrize("settings", SGD_SETTINGS, ids=str)
def test_without_a_pull_sgd_is_that_of_torch(backend: str, settings: dict[str, Any]) -> None:
    check_parity(EWCSGD, torch.optim.SGD, settings, steps_for(backend), lr=0.01)


@pytest.mark.parametrize("settings", ADAMW_SETTINGS, ids=str)
def test_without_a_pull_adamw_is_that_of_torch(backend: str, settings: dict[str, Any]) -> None:
    check_parity(EWCAdamW, torch.optim.AdamW, settings, steps_for(backend), lr=0.01)


def test_a_hundred_steps_agree_on_triton_too() -> None:
    if "triton" not in BACKENDS:
        pytest.skip(f"triton: {dispatch.absence('triton')}")
    with dispatch.use_backend("triton"):
        check_parity(EWCSGD, torch.optim.SGD, {"momentum": 0.9}, 100, lr=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (EWCSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
        (EWCSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (EWCSGD, torch.optim.SGD, {}),
        (EWCAdamW, torch.optim.AdamW, {"weight_decay": 0.01, "eps": 1e-4}),
    ],
)
def test_half_precision_is_at_least_as_exact_as_torch(
    backend: str, ours: Any, theirs: Any, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    steps = 5 if backend == "triton" else 30
    params = make_params(dtype, [(64, 16)])
    torch_params, exact = like(params, dtype), like(params, torch.float64)
    run(ours(params, lr=0.03, **settings), params, steps)
    run(theirs(torch_params, lr=0.03, foreach=False, **settings), torch_params, steps)
    with dispatch.use_backend("reference"):
        run(theirs(exact, lr=0.03, foreach=False, **settings), exact, steps)
    assert 0 < distance(params, exact) <= 1.1 * distance(torch_params, exact)


@pytest.mark.parametrize("optimizer", [EWCSGD, EWCAdamW])
def test_float64_is_computed_in_float64(optimizer: Any) -> None:
    theirs = torch.optim.SGD if optimizer is EWCSGD else torch.optim.AdamW
    params = make_params(torch.float64)
    torch_params = like(params, torch.float64)
    run(optimizer(params, lr=0.01), params, 20)
    run(theirs(torch_params, lr=0.01, foreach=False), torch_params, 20)
    tolerance = 4 * 20 * torch.finfo(torch.float64).eps * max(1.0, largest(torch_params))
    assert distance(params, torch_params) <= tolerance * sum(p.numel() for p in params) ** 0.5


# λ > 0


def make_fisher(params: Sequence[Tensor], seed: int = 2) -> dict[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {p: torch.rand(p.shape, generator=generator).to(p.dtype) for p in params}


def penalty_of(
    params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor], ewc_lambda: float
) -> Tensor:
    terms = [(f * (p - a).square()).sum() for p, f, a in zip(params, fisher, anchor, strict=True)]
    return 0.5 * ewc_lambda * torch.stack(terms).sum()


def loss_of(params: Sequence[Tensor]) -> Tensor:
    return torch.stack([(p * p.cos()).sum() for p in params]).sum()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (EWCSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (EWCSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (EWCAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_gradient_mode_is_the_autograd_penalty(
    ours: Any, theirs: Any, settings: dict[str, Any], maximize: bool
) -> None:
    params = make_params(torch.float64)
    anchor = [p.detach() + 0.1 for p in params]
    fisher = make_fisher(params)
    torch_params = like(params, torch.float64)
    optimizer = ours(
        params,
        lr=0.01,
        ewc_lambda=3.0,
        fisher=fisher,
        anchor=dict(zip(params, anchor, strict=True)),
        mode="gradient",
        maximize=maximize,
        **settings,
    )
    reference = theirs(torch_params, lr=0.01, foreach=False, **settings)
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(params).backward()
        before = [p.detach().clone() for p in params]
        optimizer.step()
        expected = penalty_of(before, list(fisher.values()), anchor, 3.0)
        torch.testing.assert_close(optimizer.penalty, expected)

        reference.zero_grad()
        penalty = penalty_of(torch_params, list(fisher.values()), anchor, 3.0)
        # The loss is ascended, the penalty never is.
        ((-loss_of(torch_params) if maximize else loss_of(torch_params)) + penalty).backward()
        reference.step()
    eps = torch.finfo(torch.float64).eps
    for own, expected in zip(params, torch_params, strict=True):
        # The trajectory depends on itself: rounding of one step grows in those that follow.
        torch.testing.assert_close(own, expected, rtol=1e4 * eps, atol=1e4 * eps)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (EWCSGD, torch.optim.SGD, {"momentum": 0.9}),
        (EWCAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_proximal_mode_is_the_closed_form_after_the_step_of_torch(
    backend: str, ours: Any, theirs: Any, settings: dict[str, Any], maximize: bool
) -> None:
    params = make_params()
    exact = like(params, torch.float64)
    anchor = [p.detach().clone() for p in exact]
    fisher = make_fisher(params)
    optimizer = ours(params, lr=0.01, ewc_lambda=50.0, fisher=fisher, maximize=maximize, **settings)
    reference = theirs(exact, lr=0.01, foreach=False, maximize=maximize, **settings)
    steps = 5 if backend == "triton" else 20
    for seed in range(steps):
        run(optimizer, params, 1, seed)
        run(reference, exact, 1, seed)
        with torch.no_grad():
            for p, a, f in zip(exact, anchor, fisher.values(), strict=True):
                p.copy_(a + (p - a) / (1 + 0.01 * 50.0 * f.double()))
    # As without a pull; the pull shrinks what it is given, so it adds no more than its rounding.
    tolerance = 8 * steps * torch.finfo(torch.float32).eps * max(1.0, largest(exact))
    for own, expected in zip(params, exact, strict=True):
        torch.testing.assert_close(own.double(), expected, rtol=0, atol=tolerance)


def test_proximal_mode_is_stable_where_gradient_mode_is_not(backend: str) -> None:
    def drift(mode: str) -> float:
        params = make_params(shapes=[(16,)])
        start = params[0].detach().clone()
        fisher = {params[0]: torch.ones(16)}
        optimizer = EWCSGD(params, lr=0.1, ewc_lambda=300.0, fisher=fisher, mode=mode)
        run(optimizer, params, 12)
        return float((params[0].detach() - start).abs().max())

    # A gradient of size 4 moves θ by at most 0.4 a step, of which 1/31 stays.
    assert drift("proximal") < 0.4
    # lr·λ·F = 30: the distance is multiplied by −29 at every step.
    assert drift("gradient") > 1e6


def test_fixed_points_agree_where_lambda_is_divided_by_one_minus_momentum() -> None:
    momentum, target = 0.8, 2.0

    def fixed_point(mode: str, ewc_lambda: float) -> Tensor:
        params = [Parameter(torch.zeros(5, dtype=torch.float64))]
        fisher = {params[0]: torch.linspace(0, 4, 5, dtype=torch.float64)}
        optimizer = EWCSGD(
            params, lr=0.02, momentum=momentum, ewc_lambda=ewc_lambda, fisher=fisher, mode=mode
        )
        for _ in range(2000):
            optimizer.zero_grad()
            (0.5 * (params[0] - target).square()).sum().backward()
            optimizer.step()
        return params[0].detach()

    # ∇ + λ F θ = 0 with ∇ = θ − 2.
    expected = target / (1 + 3.0 * torch.linspace(0, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(fixed_point("gradient", 3.0), expected)
    torch.testing.assert_close(fixed_point("proximal", 3.0 / (1 - momentum)), expected)


def test_the_pull_is_neither_clipped_nor_scaled_nor_ascended(backend: str) -> None:
    params = [Parameter(torch.ones(4))]
    anchor = {params[0]: torch.zeros(4)}
    optimizer = EWCSGD(
        params,
        lr=0.1,
        ewc_lambda=2.0,
        fisher={params[0]: torch.ones(4)},
        anchor=anchor,
        mode="gradient",
        maximize=True,
        max_grad_norm=1.0,
    )
    params[0].grad = torch.full((4,), 50.0)
    optimizer.step()
    # Clipped to norm 1 the gradient is ½ each, ascended; the pull is λ F d = 2.
    torch.testing.assert_close(params[0].detach(), torch.full((4,), 1 + 0.1 * 0.5 - 0.1 * 2.0))
    torch.testing.assert_close(optimizer.penalty, torch.tensor(0.5 * 2.0 * 4))


def test_clipping_is_over_all_groups_together(backend: str) -> None:
    params = make_params()
    torch_params = like(params, torch.float32)
    optimizer = EWCSGD(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], lr=0.1, max_grad_norm=0.7
    )
    reference = torch.optim.SGD(
        [{"params": torch_params[:2]}, {"params": torch_params[2:], "lr": 0.5}], lr=0.1
    )
    for p, q in zip(params, torch_params, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    torch.nn.utils.clip_grad_norm_(torch_params, 0.7)
    optimizer.step()
    reference.step()
    for own, expected in zip(params, torch_params, strict=True):
        torch.testing.assert_close(own, expected)


def test_the_running_batch_fisher_is_the_mean_of_squared_gradients(backend: str) -> None:
    params = make_params(shapes=[(6,)])
    optimizer = EWCSGD(params, lr=0.1, batch_fisher_decay=0.75)
    params[0].grad = torch.arange(6.0)
    optimizer.step()
    optimizer.step()
    fisher = optimizer.state[params[0]]["fisher"]
    torch.testing.assert_close(fisher, (1 - 0.75**2) * torch.arange(6.0).square())
    optimizer.param_groups[0]["maximize"] = True
    optimizer.step()
    torch.testing.assert_close(fisher, (1 - 0.75**2) * torch.arange(6.0).square())
