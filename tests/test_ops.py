"""Every backend of the fused steps against ``bdu.reference`` in float64, and their contracts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import (
    COLUMNS,
    ON_CPU,
    TARGETS,
    Problem,
    Target,
    check,
    copy_of,
    make,
    on,
    served,
    shapes_for,
    step,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdu import dispatch, native, ops, reference

# numpy, which the interpreter computes with, says so where the kernels shall overflow.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# The contract itself, against what is known without it


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_mode_gradient_is_autograd_of_the_penalty_under_the_optimizer_of_torch(
    optimizer: str, maximize: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    theta, anchor, loss_grad = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    fisher = torch.rand(50, generator=generator, dtype=torch.float64)
    sign = -1.0 if maximize else 1.0
    autograd_param = theta.clone().requires_grad_()
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    own = {"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {}
    peer = kind([autograd_param], lr=0.1, weight_decay=0.02, **own)
    param, first, second = theta.clone(), torch.zeros_like(theta), torch.zeros_like(theta)
    for t in range(1, 4):
        peer.zero_grad()
        penalty = 0.5 * 3.0 * (fisher * (autograd_param - anchor) ** 2).sum()
        (sign * (loss_grad * autograd_param).sum() + penalty).backward()
        peer.step()
        common = {"lr": 0.1, "weight_decay": 0.02, "ewc_lambda": 3.0, "maximize": maximize}
        if optimizer == "sgd":
            value = reference.ewc_sgd_step(
                [param], [loss_grad], [first], [fisher], [anchor], mode="gradient", **common, **own
            )
        else:
            value = reference.ewc_adamw_step(
                [param],
                [loss_grad],
                [first],
                [second],
                [fisher],
                [anchor],
                torch.tensor([float(t)]),
                mode="gradient",
                **common,
            )
        torch.testing.assert_close(value, penalty.detach())
        torch.testing.assert_close(param, autograd_param.detach())


def test_mode_proximal_minimises_the_quadratic_around_the_plain_step() -> None:
    generator = torch.Generator().manual_seed(0)
    theta, anchor, grad = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    fisher = torch.rand(50, generator=generator, dtype=torch.float64)
    plain, pulled = theta.clone(), theta.clone()
    reference.ewc_sgd_step([plain], [grad], [None], [None], [None], lr=0.1)
    reference.ewc_sgd_step([pulled], [grad], [None], [fisher], [anchor], lr=0.1, ewc_lambda=7.0)
    # 1/(2 lr) (θ − θ')² + λ/2 F (θ − θ*)² has a zero gradient at its minimum.
    gradient = (pulled - plain) / 0.1 + 7.0 * fisher * (pulled - anchor)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


# Every backend, operation and dtype against the contract

SGD_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "ewc_lambda": 1.5},
    "dampened": {"momentum": 0.9, "dampening": 0.3, "ewc_lambda": 1.5},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02, "ewc_lambda": 1.5},
    "gradient": {"momentum": 0.9, "mode": "gradient", "ewc_lambda": 1.5, "weight_decay": 0.02},
    "maximize": {"maximize": True, "momentum": 0.9, "ewc_lambda": 1.5},
    "maximize-gradient": {"maximize": True, "mode": "gradient", "ewc_lambda": 1.5},
    "scaled": {"clip": 0.25, "grad_scale": 8.0, "mode": "gradient", "ewc_lambda": 1.5},
    "scaled-by-tensors": {
        "clip": torch.tensor(0.25),
        "grad_scale": torch.tensor(8.0),
        "ewc_lambda": 1.5,
        "batch_fisher_decay": 0.7,
    },
    "batch-fisher": {
        "momentum": 0.9,
        "ewc_lambda": 1.5,
        "batch_fisher_decay": 0.7,
        "clip": 0.5,
        "grad_scale": 2.0,
    },
    "batch-fisher-ascending": {"maximize": True, "batch_fisher_decay": 0.7, "ewc_lambda": 1.5},
    "batch-fisher-without-pull": {"batch_fisher_decay": 0.7},
}

ADAMW_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "proximal": {"ewc_lambda": 1.5, "weight_decay": 0.02},
    "gradient": {"mode": "gradient", "ewc_lambda": 1.5, "betas": (0.8, 0.95), "eps": 1e-3},
    "without-memory": {"betas": (0.0, 0.5), "ewc_lambda": 1.5},
    "maximize": {"maximize": True, "ewc_lambda": 1.5, "mode": "gradient"},
    "scaled-by-tensors": {
        "clip": torch.tensor(0.25),
        "grad_scale": torch.tensor(8.0),
        "ewc_lambda": 1.5,
        "batch_fisher_decay": 0.7,
    },
    "batch-fisher": {"batch_fisher_decay": 0.7, "clip": 0.5, "grad_scale": 2.0},
}


@pytest.mark.parametrize("setting", SGD_SETTINGS)
@pytest.mark.parametrize(("target", "dtype"), served("ewc_sgd_step"))
def test_sgd_step_equals_the_reference(target: Target, dtype: torch.dtype, setting: str) -> None:
    problem = make(shapes_for(target), dtype, device=target.device)
    check(target, "ewc_sgd_step", problem, lr=0.1, **SGD_SETTINGS[setting])


@pytest.mark.parametrize("setting", ADAMW_SETTINGS)
@pytest.mark.parametrize(("target", "dtype"), served("ewc_adamw_step"))
def test_adamw_step_equals_the_reference(target: Target, dtype: torch.dtype, setting: str) -> None:
    problem = make(shapes_for(target), dtype, "ewc_adamw_step", device=target.device)
    steps = torch.tensor([1.0, 1.0, 2.0, 3.0, 10.0, 1000.0, 1e6, 1.0])
    check(target, "ewc_adamw_step", problem, steps=steps, lr=0.1, **ADAMW_SETTINGS[setting])


@pytest.mark.parametrize(("target", "dtype"), served("grad_norm"))
def test_grad_norm_equals_the_reference(target: Target, dtype: torch.dtype) -> None:
    grads = make(shapes_for(target), dtype, device=target.device)["grad"]
    with dispatch.use_backend(target.backend):
        norm = ops.grad_norm(grads)
    assert norm.shape == ()
    # Squares and sums are in float64; one rounding to the result.
    exact = reference.grad_norm([g.double() for g in grads])
    assert norm.item() == pytest.approx(exact.item(), rel=torch.finfo(norm.dtype).eps)


@pytest.mark.parametrize("target", TARGETS)
def test_grad_norm_neither_overflows_nor_flushes_the_squares(target: Target) -> None:
    for magnitude in (1e25, 1e-30):
        grads = [torch.full((1025,), magnitude), torch.zeros(0)]
        grads = [g.to(target.device) for g in grads]
        with dispatch.use_backend(target.backend):
            norm = ops.grad_norm(grads)
        assert norm.item() == pytest.approx(magnitude * 1025**0.5, rel=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_grad_norm_of_views_and_of_nothing(target: Target) -> None:
    base = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(target.device)
    views = [base.t(), base[:, ::3], base[0].expand(7, 30), base[1:1]]
    with dispatch.use_backend(target.backend):
        norm = ops.grad_norm(views)
        assert ops.grad_norm([]).item() == 0
        assert ops.grad_norm([base[:0]]).item() == 0
        nan = ops.grad_norm([base, base.new_full((1,), float("nan"))])
    assert norm.item() == pytest.approx(reference.grad_norm(views).item(), rel=1e-6)
    assert nan.isnan()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", COLUMNS)
def test_dtypes_may_differ_within_a_row_and_between_rows(target: Target, operation: str) -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shapes = [(1025,), (63,), (2, 3)]
    kinds: list[dict[str, torch.dtype]] = [
        {"dtype": bf16, "fisher": fp32, "anchor": fp32},
        {"dtype": fp16, "momentum_buffer": fp32, "exp_avg_sq": fp32, "anchor": bf16},
        {"dtype": fp32, "grad": bf16, "fisher": bf16},
        {"dtype": fp32},
    ]
    tables = [
        make(shapes, operation=operation, seed=i, device=target.device, **kind)
        for i, kind in enumerate(kinds)
    ]
    problem = {name: [t for table in tables for t in table[name]] for name in tables[0]}
    hyper: dict[str, Any] = {"lr": 0.1, "ewc_lambda": 1.5, "batch_fisher_decay": 0.7}
    if operation == "ewc_adamw_step":
        hyper["steps"] = torch.arange(1.0, 13.0)
    else:
        hyper["momentum"] = 0.9
    check(target, operation, problem, **hyper)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", COLUMNS)
def test_a_row_without_fisher_is_stepped_without_pull(target: Target, operation: str) -> None:
    problem = make([(1025,), (7,), (600,)], torch.float32, operation, device=target.device)
    problem["fisher"][0] = problem["anchor"][0] = problem["fisher"][2] = None
    hyper: dict[str, Any] = {"lr": 0.1, "ewc_lambda": 1.5, "batch_fisher_decay": 0.7}
    if operation == "ewc_adamw_step":
        hyper["steps"] = torch.ones(3)
    check(target, operation, problem, **hyper)


@pytest.mark.parametrize("target", TARGETS)
def test_a_fisher_without_anchor_is_averaged_and_pulls_nothing(target: Target) -> None:
    problem = make([(1025,), (7,)], torch.float32, device=target.device)
    problem["anchor"][0] = None
    check(target, "ewc_sgd_step", problem, lr=0.1, batch_fisher_decay=0.7)
    with pytest.raises(ValueError, match=r"anchor of params\[0\]: expected one to go with"):
        step(target, "ewc_sgd_step", problem, lr=0.1, ewc_lambda=1.5)


@pytest.mark.parametrize("target", TARGETS)
def test_the_penalty_is_zero_where_nothing_pulls(target: Target) -> None:
    problem = make([(7,), (5,)], torch.float32, device=target.device)
    assert step(target, "ewc_sgd_step", problem, lr=0.1).item() == 0
    problem["fisher"] = [None, None]
    assert step(target, "ewc_sgd_step", problem, lr=0.1, ewc_lambda=2.0).item() == 0
    nothing = {name: [] for name in problem}
    assert step(target, "ewc_sgd_step", nothing, lr=0.1, ewc_lambda=2.0).item() == 0


@st.composite
def steps_of(draw: st.DrawFn, operation: str) -> tuple[Problem, dict[str, Any]]:
    """A random table and random settings for one step."""
    shape = st.lists(st.integers(0, 14), max_size=3).map(tuple)
    shapes = draw(st.lists(shape, min_size=1, max_size=4))
    dtype = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    dtypes = {name: draw(dtype) for name in ("param", "grad", *COLUMNS[operation])}
    problem = make(shapes, torch.float32, operation, draw(st.integers(0, 99)), **dtypes)
    unit = st.floats(0, 0.95)
    hyper: dict[str, Any] = {
        "lr": draw(st.floats(0, 0.5)),
        "weight_decay": draw(unit),
        "ewc_lambda": draw(st.floats(0, 5)),
        "maximize": draw(st.booleans()),
        "mode": draw(st.sampled_from(["proximal", "gradient"])),
        "clip": draw(st.floats(0.1, 1)),
        "grad_scale": draw(st.sampled_from([1.0, 4.0])),
        "batch_fisher_decay": draw(st.none() | unit),
    }
    if operation == "ewc_sgd_step":
        hyper["momentum"] = draw(unit)
        hyper["dampening"] = draw(unit)
        hyper["nesterov"] = draw(st.booleans())
    else:
        hyper["steps"] = torch.tensor([float(draw(st.integers(1, 1000))) for _ in shapes])
    return problem, hyper


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", COLUMNS)
def test_random_tables_and_settings_equal_the_reference(target: Target, operation: str) -> None:
    @settings(max_examples=6 if target.is_interpreted else 40, deadline=None, derandomize=True)
    @given(case=steps_of(operation))
    def run(case: tuple[Problem, dict[str, Any]]) -> None:
        problem, hyper = case
        check(target, operation, on(target, problem), **hyper)

    run()


# Layouts


def layouts(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameter and gradient in layouts that differ from contiguous, or from each other."""
    random = torch.Generator().manual_seed(1)
    conv = torch.randn(4, 3, 5, 5, generator=random).to(device)
    matrix = torch.randn(33, 70, generator=random).to(device)
    grad = torch.randn(33, 70, generator=random).to(device)
    channels_last = torch.channels_last
    return {
        "channels-last": (conv.contiguous(memory_format=channels_last), conv * 2),
        "channels-last-grad": (conv, (conv * 2).contiguous(memory_format=channels_last)),
        "transposed": (matrix.t(), grad.t()),
        "permuted": (conv.permute(2, 0, 3, 1), (conv * 2).permute(2, 0, 3, 1).contiguous()),
        "sliced": (matrix[:, ::2], grad[:, 1::2]),
        "offset": (matrix.flatten()[1:1001], grad.flatten()[3:1003]),
        "expanded-grad": (matrix, grad[:1].expand(33, 70)),
        "one-row": (matrix[:1].t(), grad[1:2].t()),
    }


@pytest.mark.parametrize("layout", layouts("cpu"))
@pytest.mark.parametrize("operation", COLUMNS)
@pytest.mark.parametrize("target", TARGETS)
def test_layouts_do_not_change_the_result(target: Target, operation: str, layout: str) -> None:
    param, grad = layouts(target.device)[layout]
    contiguous = make([tuple(param.shape)], torch.float32, operation, device=target.device)
    contiguous["param"], contiguous["grad"] = [param.clone().contiguous()], [grad.contiguous()]
    problem: Problem = {"param": [param], "grad": [grad]}
    for name in COLUMNS[operation]:
        problem[name] = [ops.lay_out_like(contiguous[name][0].clone(), param)]
    hyper: dict[str, Any] = {"lr": 0.1, "ewc_lambda": 1.5}
    if operation == "ewc_adamw_step":
        hyper["steps"] = torch.ones(1)
    else:
        hyper["momentum"] = 0.9
    step(target, operation, problem, **hyper)
    step(target, operation, contiguous, **hyper)
    for name, column in problem.items():
        # Another place in memory is another lane of a vector, with or without fused products.
        torch.testing.assert_close(column[0], contiguous[name][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_the_gaps_of_a_sliced_parameter_are_not_written(target: Target) -> None:
    whole = torch.arange(60.0, device=target.device).reshape(6, 10)
    before = whole.clone()
    param = whole[:, ::2]
    problem: Problem = {
        "param": [param],
        "grad": [whole.new_ones(6, 5)],
        "momentum_buffer": [None],
        "fisher": [whole.new_ones(6, 5)],
        "anchor": [whole.new_zeros(6, 5)],
    }
    step(target, "ewc_sgd_step", problem, lr=0.5, ewc_lambda=1.0)
    assert torch.equal(whole[:, 1::2], before[:, 1::2])
    torch.testing.assert_close(whole[:, ::2], (before[:, ::2] - 0.5) / 1.5)


# The meaning of the settings


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", ["proximal", "gradient"])
def test_maximize_ascends_the_loss_and_never_the_penalty(target: Target, mode: str) -> None:
    def stepped(grad: float, fisher: float) -> float:
        theta = torch.tensor([1.0], device=target.device)
        problem: Problem = {
            "param": [theta],
            "grad": [theta.new_tensor([grad])],
            "momentum_buffer": [None],
            "fisher": [theta.new_tensor([fisher])],
            "anchor": [theta.new_tensor([0.0])],
        }
        hyper: dict[str, Any] = {"lr": 0.5, "ewc_lambda": 0.5, "mode": mode}
        step(target, "ewc_sgd_step", problem, maximize=True, **hyper)
        return theta.item()

    assert stepped(grad=1.0, fisher=0.0) == 1.5
    assert stepped(grad=0.0, fisher=1.0) == pytest.approx({"proximal": 0.8, "gradient": 0.75}[mode])


@pytest.mark.parametrize(("target", "dtype"), served("ewc_sgd_step"))
def test_an_enormous_lambda_lands_on_the_anchor(target: Target, dtype: torch.dtype) -> None:
    problem = make([(1025,)], dtype, device=target.device)
    anchor = problem["anchor"][0]
    problem["fisher"][0][::2] = 0
    plain = copy_of(problem)
    step(target, "ewc_sgd_step", problem, lr=0.1, ewc_lambda=1e12)
    plain["fisher"] = [None]
    step(target, "ewc_sgd_step", plain, lr=0.1, ewc_lambda=1e12)
    param = problem["param"][0]
    # θ' − (1 − 4e-11) (θ' − θ*), in the arithmetic's precision, then rounded to the dtype.
    torch.testing.assert_close(param[1::2], anchor[1::2], rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(param[::2], plain["param"][0][::2]), "F = 0 is not pulled"


@pytest.mark.parametrize("operation", COLUMNS)
@pytest.mark.parametrize("target", TARGETS)
def test_an_overflowing_pull_lands_on_the_anchor(target: Target, operation: str) -> None:
    problem = make([(1025,)], torch.float32, operation, device=target.device)
    problem["fisher"] = [torch.full((1025,), 1e30, device=target.device)]
    extra = {"steps": torch.ones(1)} if operation == "ewc_adamw_step" else {}
    step(target, operation, problem, lr=0.1, ewc_lambda=1e12, **extra)
    torch.testing.assert_close(problem["param"][0], problem["anchor"][0], rtol=1e-6, atol=1e-6)


# Numbers that are none, too large or too small


@pytest.mark.parametrize(("target", "dtype"), served("ewc_sgd_step"))
def test_nan_and_infinity_reach_the_parameter_and_the_momentum(
    target: Target, dtype: torch.dtype
) -> None:
    problem = make([(600,)], dtype, device=target.device)
    grad, fisher = problem["grad"][0], problem["fisher"][0]
    grad[0], grad[1], grad[599] = float("nan"), float("inf"), float("-inf")
    hyper: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    unpulled = copy_of(problem)
    step(target, "ewc_sgd_step", unpulled, **hyper)
    for name, sign in (("param", -1), ("momentum_buffer", 1)):
        result = unpulled[name][0]
        assert result[0].isnan()
        assert result[1].item() == sign * float("inf")
        assert result[599].item() == sign * float("-inf")
        assert result[2:599].isfinite().all()
    fisher[5] = float("nan")
    penalty = step(target, "ewc_sgd_step", problem, ewc_lambda=1.5, **hyper)
    assert problem["param"][0][5].isnan(), "a Fisher that is no number is not an anchor"
    assert penalty.isnan()


@pytest.mark.parametrize("target", TARGETS)
def test_a_nan_with_a_low_payload_stays_one_in_half_precision(target: Target) -> None:
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    grad = bits.view(torch.float32).repeat(5)
    assert grad.isnan().all()
    for dtype in (torch.bfloat16, torch.float16):
        param = torch.zeros(20, dtype=dtype, device=target.device)
        none: list[Tensor | None] = [None]
        problem: Problem = {"param": [param], "grad": [grad.to(target.device)]}
        problem["momentum_buffer"] = none
        step(target, "ewc_sgd_step", {**problem, "fisher": none, "anchor": none}, lr=1.0)
        assert param.isnan().all()


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def around_every_half(dtype: torch.dtype) -> Tensor:
    """float32: all finite values of a half type, what lies half-way between two, and next to it."""
    values = every_half(dtype).float()
    values = values[values.isfinite()].sort().values
    values = torch.cat([values, (values[1:].double() + values[:-1].double()).div(2).float()])
    infinity = torch.full_like(values, float("inf"))
    random = torch.randint(-(2**31), 2**31, (50_000,), generator=torch.Generator().manual_seed(0))
    return torch.cat(
        [
            values,
            torch.nextafter(values, infinity),
            torch.nextafter(values, -infinity),
            random.to(torch.int32).view(torch.float32),
            torch.tensor([65504.0, 65519.99, 65520.0, 3.3953e38, 3.4028235e38, -65520.0]),
        ]
    )


def moved(target: Target, grad: Tensor, dtype: torch.dtype, run: int) -> Tensor:
    """``grad`` as a parameter of another dtype: stepped from −0 with lr −1, in rows of ``run``."""
    grads = [g.to(target.device) for g in grad.split(run)]
    params = [torch.full_like(g, -0.0, dtype=dtype) for g in grads]
    none: list[Tensor | None] = [None] * len(params)
    problem: Problem = {"param": params, "grad": grads, "momentum_buffer": none}
    step(target, "ewc_sgd_step", {**problem, "fisher": none, "anchor": none}, lr=-1.0)
    return torch.cat(params).cpu()


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    integer = torch.int32 if expected.dtype == torch.float32 else torch.int16
    same = (actual.view(integer) == expected.view(integer)) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{(~same).sum().item()} differ, first {expected[~same][:4].tolist()}"


# In runs of seven: what the eight-wide vector instructions of the CPU leave over goes another way.
IN_RUNS = [pytest.param(*target.values, 1_000_000, id=target.id) for target in TARGETS] + [
    pytest.param(Target("cpp", "cpu"), 7, id="cpp-cpu-remainders")
]


@pytest.mark.parametrize(("target", "run"), IN_RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_half_precision_numbers_are_read_as_torch_reads_them(
    target: Target, run: int, dtype: torch.dtype
) -> None:
    values = every_half(dtype)
    assert_same_bits(moved(target, values, torch.float32, run), values.float())


@pytest.mark.parametrize(("target", "run"), IN_RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_half_precision_as_torch_rounds_them(
    target: Target, run: int, dtype: torch.dtype
) -> None:
    values = around_every_half(dtype)
    if target.is_interpreted or run == 7:  # slow
        some = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
        values = values[some[:20_000]]
    assert_same_bits(moved(target, values, dtype, run), values.to(dtype))


# Determinism


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("operation", COLUMNS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_rerun_and_another_thread_count_give_the_same_bits(
    target: Target, operation: str
) -> None:
    shapes = [shapes_for(target)[-1], (63,), (4_000 if target.is_interpreted else 20_000,)]
    problem = make(shapes, torch.float32, operation, device=target.device)
    hyper: dict[str, Any] = {"lr": 0.1, "ewc_lambda": 1.5}
    if operation == "ewc_adamw_step":
        hyper["steps"] = torch.ones(3)
    results = []
    for count in (1, 1, 2):
        torch.set_num_threads(count)
        stepped = copy_of(problem)
        penalty = step(target, operation, stepped, **hyper)
        with dispatch.use_backend(target.backend):
            norm = ops.grad_norm(problem["grad"])
        results.append([penalty, norm, *(t for column in stepped.values() for t in column)])
    if target.backend == "reference":
        results = results[:2]  # torch's own sums depend on the number of threads
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# What autograd is told


@pytest.mark.parametrize("target", TARGETS)
def test_autograd_refuses_a_backward_pass_through_a_changed_parameter(target: Target) -> None:
    problem = make([(5,)], torch.float32, device=target.device)
    param = torch.nn.Parameter(problem["param"][0])
    problem["param"] = [param]
    loss = (param * param).sum()
    step(target, "ewc_sgd_step", problem, lr=0.1, momentum=0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("operation", COLUMNS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_version_of_everything_written_counts_up(target: Target, operation: str) -> None:
    problem = make([(5,), (3,)], torch.float32, operation, device=target.device)
    written = [name for name in problem if name not in ("grad", "anchor")]
    versions = {name: [t._version for t in problem[name]] for name in written}
    hyper: dict[str, Any] = {"lr": 0.1, "ewc_lambda": 1.0, "batch_fisher_decay": 0.5}
    if operation == "ewc_adamw_step":
        hyper["steps"] = torch.ones(2)
    else:
        hyper["momentum"] = 0.9
    step(target, operation, problem, **hyper)
    for name in written:
        assert all(t._version > v for t, v in zip(problem[name], versions[name], strict=True)), name


# Choosing a backend


def test_an_unknown_backend_is_named() -> None:
    with (
        pytest.raises(
            ValueError, match="expected one of reference, cpp, cuda, triton, got 'metal'"
        ),
        dispatch.use_backend("metal"),
    ):
        pass


@pytest.mark.parametrize(
    ("backend", "reason"), [("triton", "no CUDA device"), ("cpp", r"compiled part \(bdu._native\)")]
)
def test_a_forced_backend_that_is_absent_is_named(
    backend: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "_is_installed", lambda module: module == "triton")
    message = f"{backend!r} was forced, but .*{reason}"
    with pytest.raises(RuntimeError, match=message), dispatch.use_backend(backend):
        pass
    monkeypatch.setenv("BDU_BACKEND", backend)
    with pytest.raises(RuntimeError, match=message):
        ops.grad_norm([torch.ones(3)])


@pytest.mark.parametrize("backend", [b for b in ON_CPU if b != "reference"])
def test_a_forced_backend_refuses_dtypes_it_does_not_serve(backend: str) -> None:
    problem = make([(5,)], torch.float64)
    before = copy_of(problem)
    with pytest.raises(RuntimeError, match=f"'{backend}' was forced, but does not serve .*float64"):
        step(Target(backend, "cpu"), "ewc_sgd_step", problem, lr=0.1)
    assert torch.equal(problem["param"][0], before["param"][0])


def test_compiled_triton_is_not_given_tensors_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    message = "'triton' was forced, but does not serve grad_norm on cpu with torch.float32"
    with dispatch.use_backend("triton"), pytest.raises(RuntimeError, match=message):
        ops.grad_norm([torch.ones(3)])


def test_a_capture_that_would_have_to_wait_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    dispatch.refuse_capture("triton", [])
    with pytest.raises(RuntimeError, match="lr, ewc_lambda: expected numbers of the host"):
        dispatch.refuse_capture("triton", ["lr", "ewc_lambda"])


def test_parameters_that_share_memory_are_named_and_nothing_is_written() -> None:
    problem = make([(4,), (4,)], torch.float32)
    problem["param"][1] = problem["param"][0]
    before = copy_of(problem)
    with pytest.raises(ValueError, match=r"params\[0\], params\[1\]: .* got two that overlap"):
        step(Target("cpp", "cpu"), "ewc_sgd_step", problem, lr=0.1)
    assert torch.equal(problem["param"][0], before["param"][0])


def test_float64_goes_to_the_reference_and_half_precision_to_compiled_code() -> None:
    assert dispatch.choose("ewc_sgd_step", "cpu", {torch.float64, torch.float32}) == "reference"
    assert dispatch.choose("ewc_sgd_step", "cpu", {torch.bfloat16, torch.float32}) == "cpp"


# Refusals write nothing


def bad_rows() -> dict[str, tuple[Problem, str]]:
    def changed(name: str, tensor: Tensor) -> Problem:
        problem = make([(4,), (3, 5)], torch.float32)
        problem[name][1] = tensor
        return problem

    ones = torch.ones(3, 5)
    return {
        "grad-shape": (
            changed("grad", torch.ones(15)),
            r"grad of params\[1\]: expected \(3, 5\) on cpu, got \(15,\) on cpu",
        ),
        "grad-device": (
            changed("grad", torch.ones(3, 5, device="meta")),
            r"grad of params\[1\]: expected \(3, 5\) on cpu, got \(3, 5\) on meta",
        ),
        "grad-sparse": (changed("grad", ones.to_sparse()), r"grad of params\[1\]: .*sparse_coo"),
        "grad-dtype": (changed("grad", ones.to(torch.cfloat)), r"grad of params\[1\]: .*complex64"),
        "param-dtype": (changed("param", ones.long()), r"params\[1\]: .*int64"),
        "param-device": (changed("param", ones.to("meta")), r"params\[1\]: .*on cpu.*on meta"),
        "fisher-shape": (changed("fisher", torch.ones(5, 3)), r"fisher of params\[1\]: .*\(5, 3\)"),
        "fisher-dtype": (changed("fisher", ones.int()), r"fisher of params\[1\]: .*int32"),
        "anchor-device": (changed("anchor", ones.to("meta")), r"anchor of params\[1\]: .*meta"),
        "anchor-layout": (
            changed("anchor", torch.ones(5, 3).t()),
            r"anchor of params\[1\]: expected strides \(5, 1\), got \(1, 3\)",
        ),
    }


@pytest.mark.parametrize("case", bad_rows())
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(
    backend: str, case: str
) -> None:
    problem, message = bad_rows()[case]
    first = {name: column[0].clone() for name, column in problem.items()}
    with pytest.raises(ValueError, match=message):
        step(Target(backend, "cpu"), "ewc_sgd_step", problem, lr=0.1, momentum=0.9, ewc_lambda=1.0)
    assert all(torch.equal(problem[name][0], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_missing_gradient_is_named_and_nothing_is_written(backend: str) -> None:
    problem = make([(4,), (3, 5)], torch.float32)
    before = copy_of(problem)
    problem["grad"].pop()
    with pytest.raises(ValueError, match="grads: expected 2 tensors, got 1"):
        step(Target(backend, "cpu"), "ewc_sgd_step", problem, lr=0.1)
    assert torch.equal(problem["param"][0], before["param"][0])


@pytest.mark.parametrize("backend", ON_CPU)
def test_momentum_without_buffers_is_refused_and_nothing_is_written(backend: str) -> None:
    problem = make([(4,), (3, 5)], torch.float32)
    problem["momentum_buffer"][1] = None
    before = copy_of(problem)
    with pytest.raises(ValueError, match=r"momentum_buffer of params\[1\]: .*momentum=0\.9"):
        step(Target(backend, "cpu"), "ewc_sgd_step", problem, lr=0.1, momentum=0.9)
    assert torch.equal(problem["param"][0], before["param"][0])


def test_gradients_on_several_devices_are_named() -> None:
    with pytest.raises(ValueError, match=r"grads\[1\]: expected a dense floating tensor on cpu"):
        ops.grad_norm([torch.ones(3), torch.ones(3, device="meta")])


@pytest.mark.parametrize("count_written", [2, 3])
def test_the_streaming_floor_reads_and_writes_every_word(count_written):
    words = 40_001  # crosses chunks, and ends in a part of one
    tensors = [
        torch.randint(
            2**31, (words,), dtype=torch.int32, generator=torch.Generator().manual_seed(i)
        )
        for i in range(3 + count_written)
    ]
    before = [t.clone() for t in tensors]
    native.memory_stream(tensors[:3], tensors[3:])
    word = before[0] ^ before[1] ^ before[2]
    assert all(torch.equal(t, old) for t, old in zip(tensors[:3], before[:3], strict=True))
    assert all(torch.equal(t, old ^ word) for t, old in zip(tensors[3:], before[3:], strict=True))
