"""Steps with a Fisher in 8 bits and with stochastic rounding, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import COLUMNS, TARGETS, Problem, Target, copy_of, make, on
from torch import Tensor

from bdu import dispatch, native, ops, reference
from bdu.quantization import dequantize, quantize
from bdu.rounding import Rounding, random_bits, to_bfloat16

SHAPES = [(5, 7), (4096,), (64, 67), (0,), (1,), (2, 3, 33), (5_001,)]
MAPS = ("square_root", "logarithmic")
OPERATIONS = ("ewc_sgd_step", "ewc_adamw_step")


def settings(operation: str, count: int) -> dict[str, Any]:
    shared: dict[str, Any] = {"lr": 0.1, "ewc_lambda": 0.7, "weight_decay": 0.01}
    if operation == "ewc_sgd_step":
        return {**shared, "momentum": 0.9}
    return {**shared, "steps": torch.full((count,), 3.0)}


def run(
    target: Target, operation: str, problem: Problem, scales: list[Tensor | None], **more: Any
) -> Tensor:
    """One step through ``bdu.ops`` with a Fisher in 8 bits where a row has a scale."""
    columns = {name: problem[name] for name in COLUMNS[operation]}
    columns["fisher_scale"] = scales
    table = ops.ParameterTable(problem["param"], columns)
    hyper = settings(operation, len(scales)) | more
    extra = (hyper.pop("steps").to(target.device),) if "steps" in hyper else ()

    with dispatch.use_backend(target.backend):
        return getattr(ops, operation)(table, problem["grad"], *extra, **hyper)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fisher_in_8_bits_pulls_as_what_it_stands_for(target, operation, kind, dtype):
    problem = make(SHAPES, dtype, operation)
    quantized = [quantize(f, kind) for f in problem["fisher"]]
    # One row stays as it is, as small tensors do.
    exact = copy_of(problem, torch.float64)
    exact["fisher"] = [dequantize(*q).double() for q in quantized]
    exact["fisher"][0] = problem["fisher"][0].double()
    hyper = settings(operation, len(SHAPES))
    extra = (hyper.pop("steps"),) if "steps" in hyper else ()
    lists = [exact[name] for name in ("param", "grad", *COLUMNS[operation])]
    expected = getattr(reference, operation)(*lists, *extra, **hyper)

    actual = copy_of(problem)
    actual["fisher"] = [actual["fisher"][0], *(q.codes for q in quantized[1:])]
    scales = [None, *(q.scale.to(target.device) for q in quantized[1:])]
    actual = on(target, actual)
    penalty = run(target, operation, actual, scales)
    # exp2 is 2 ulp at most where it is not a table, and its argument 8 octaves long.
    eps = torch.finfo(dtype).eps
    rtol = max(eps, 64 * torch.finfo(torch.float32).eps)
    assert penalty.item() == pytest.approx(expected.item(), rel=64 * torch.finfo().eps)
    for name in ("param", *COLUMNS[operation][:-2]):
        for row, tensor in enumerate(exact[name]):
            moved = actual[name][row].cpu().double()
            torch.testing.assert_close(moved, tensor, rtol=rtol, atol=rtol, msg=f"{name}[{row}]")


@pytest.mark.parametrize("target", TARGETS)
def test_a_fisher_in_8_bits_follows_the_memory_of_its_parameter(target):
    problem = make([(6, 5, 8, 8)], torch.float32)
    last = {
        name: [t.to(memory_format=torch.channels_last) for t in column]
        for name, column in problem.items()
    }
    quantized = quantize(last["fisher"][0], "square_root")
    plain = copy_of(problem)
    plain["fisher"] = [dequantize(*quantized).contiguous()]
    last["fisher"] = [quantized.codes]
    run(target, "ewc_sgd_step", on(target, last), [quantized.scale.to(target.device)])
    plain = on(target, plain)
    run(target, "ewc_sgd_step", plain, [None])
    if target.device == "cpu":
        torch.testing.assert_close(last["param"][0], plain["param"][0])


@pytest.mark.parametrize("target", TARGETS)
def test_what_does_not_fit_a_fisher_in_8_bits_is_named(target):
    problem = on(target, make([(4096,)], torch.float32))
    codes, scale = quantize(problem["fisher"][0], "square_root")
    before = problem["param"][0].clone()
    with pytest.raises(ValueError, match=r"fisher_scale of params\[0\]: expected None without"):
        run(target, "ewc_sgd_step", problem, [scale])
    problem["fisher"] = [codes]
    with pytest.raises(ValueError, match=r"fisher_scale of params\[0\]: expected one, got None"):
        run(target, "ewc_sgd_step", problem, [None])
    for wrong in (scale[1:], scale.float()):
        with pytest.raises(ValueError, match=r"fisher_scale of params\[0\]: expected \(128,\)"):
            run(target, "ewc_sgd_step", problem, [wrong])
    with pytest.raises(ValueError, match=r"fisher of params\[0\]: expected a floating dtype with"):
        run(target, "ewc_sgd_step", problem, [scale], batch_fisher_decay=0.9)
    assert torch.equal(problem["param"][0], before)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", ["proximal", "gradient"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_lambda_beyond_float32_leaves_alone_what_has_no_fisher(target, mode, operation):
    problem = on(target, make([(50,)], torch.float32, operation))
    problem["fisher"][0][1:] = 0.0
    run(target, operation, problem, [None], ewc_lambda=1e300, mode=mode)
    assert torch.isfinite(problem["param"][0][1:]).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "steps", [torch.ones(3), torch.ones(()), torch.ones(2, dtype=torch.int64), torch.ones(4)[::2]]
)
def test_counts_that_do_not_fit_are_named_and_nothing_is_written(target, steps):
    problem = on(target, make([(5,), (6,)], torch.float32, "ewc_adamw_step"))
    before = problem["param"][0].clone()
    with pytest.raises(ValueError, match=r"steps: expected \(2,\) contiguous torch.float32 on"):
        run(target, "ewc_adamw_step", problem, [None, None], steps=steps)
    assert torch.equal(problem["param"][0], before)


# Stochastic rounding


def test_the_random_bits_are_uniform_and_differ_by_seed_step_and_element():
    elements = torch.arange(200_000)
    draws = [random_bits(Rounding(*key), elements) for key in ((0, 0), (0, 1), (1, 0), (2**40, 0))]
    for bits in draws:
        assert bits.min() >= 0
        assert bits.max() <= 0xFFFF
        # Mean and the share of every bit, six standard errors wide.
        assert abs(float(bits.double().mean()) - 32767.5) < 6 * 18918 / 200_000**0.5
        for bit in range(16):
            share = float((bits >> bit & 1).double().mean())
            assert abs(share - 0.5) < 6 * 0.5 / 200_000**0.5
        neighbours = torch.corrcoef(torch.stack([bits[:-1], bits[1:]]).double())[0, 1]
        assert abs(float(neighbours)) < 6 / 200_000**0.5
    for i, one in enumerate(draws):
        for other in draws[i + 1 :]:
            assert float((one == other).double().mean()) < 1e-3


def test_elements_beyond_32_bits_draw_bits_of_their_own():
    low, high = (random_bits(Rounding(3, 5), torch.arange(1000) + s) for s in (0, 2**33))
    assert float((low == high).double().mean()) < 0.01


def test_rounding_is_to_a_neighbour_and_right_on_average():
    value = torch.full((100_000,), 1 + 3 / 1024)  # 3/8 of the way from 1 to 1 + 1/128
    rounded = to_bfloat16(value, random_bits(Rounding(0, 0), torch.arange(100_000)))
    assert set(rounded.unique().tolist()) == {1.0, 1 + 1 / 128}
    up = float((rounded > 1).double().mean())
    assert abs(up - 3 / 8) < 6 * 0.5 / 100_000**0.5


@pytest.mark.parametrize("bits", [0, 0xFFFF])
def test_what_needs_no_rounding_stays_and_nan_stays_nan(bits):
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-133, float("inf"), -float("inf")])
    random = torch.full((7,), bits)
    assert torch.equal(to_bfloat16(exact, random), exact.to(torch.bfloat16))
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert to_bfloat16(nan, random[:2]).isnan().all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("key", [(0, 0), (7, 12), (-(2**62) - 5, 2**31 + 3), (2**64 - 1, 1)])
def test_all_backends_round_the_same_way(target, operation, key):
    """The same draw: only where the fp32 value before rounding differs may the result."""
    problem = make(SHAPES, torch.bfloat16, operation)
    hyper = settings(operation, len(SHAPES)) | {"rounding": Rounding(*key)}
    extra = (hyper.pop("steps"),) if "steps" in hyper else ()
    expected = copy_of(problem)
    lists = [expected[name] for name in ("param", "grad", *COLUMNS[operation])]
    getattr(reference, operation)(*lists, *extra, **hyper)
    actual = on(target, copy_of(problem))
    run(target, operation, actual, [None] * len(SHAPES), rounding=hyper["rounding"])
    pairs = list(zip(actual["param"], expected["param"], strict=True))
    same = torch.cat([(a.cpu() == b).flatten() for a, b in pairs]).double().mean()
    # An fp32 value that is off by an ulp tips 1 draw in 65,536.
    assert float(same) > 0.998
    for a, b in pairs:
        torch.testing.assert_close(a.cpu().float(), b.float(), rtol=2**-7, atol=1e-6)
    nearest = on(target, copy_of(problem))
    run(target, operation, nearest, [None] * len(SHAPES))
    differs = torch.cat(
        [(a != b).flatten() for a, b in zip(actual["param"], nearest["param"], strict=True)]
    )
    assert 0.2 < float(differs.double().mean()) < 0.8


@pytest.mark.parametrize("target", TARGETS)
def test_an_element_draws_the_same_bits_wherever_its_row_stands(target):
    def stepped(rows: list[int]) -> list[Tensor]:
        problem = on(target, make(SHAPES, torch.bfloat16))
        numel = [p.numel() for p in problem["param"]]
        firsts = [sum(numel[:row]) for row in rows]
        columns = {name: [problem[name][r] for r in rows] for name in COLUMNS["ewc_sgd_step"]}
        params = [problem["param"][r] for r in rows]
        table = ops.ParameterTable(params, columns, first_elements=firsts)

        with dispatch.use_backend(target.backend):
            grads = [problem["grad"][r] for r in rows]
            ops.ewc_sgd_step(table, grads, lr=0.1, rounding=Rounding(1, 2))
        return params

    every = list(range(len(SHAPES)))
    together = stepped(every)
    alone = stepped([4]) + stepped([6, 2])
    for param, row in zip(alone, (4, 6, 2), strict=True):
        assert torch.equal(param, together[row])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("first", [2**32 - 700, 2**33 - 701, 5 * 2**40 - 1])
def test_elements_around_a_multiple_of_32_bits_draw_the_bits_of_the_reference(target, first):
    problem = make([(1500,)], torch.bfloat16)
    problem["grad"][0].zero_()
    problem["param"][0].fill_(1.0)
    problem["anchor"][0].zero_()
    columns = {name: [None] for name in COLUMNS["ewc_sgd_step"]}
    param = problem["param"][0].to(target.device)
    table = ops.ParameterTable([param], columns, first_elements=[first])
    with dispatch.use_backend(target.backend):
        grad = torch.full_like(param, 2.0**-9)
        ops.ewc_sgd_step(table, [grad], lr=1.0, rounding=Rounding(4, 9))
    bits = random_bits(Rounding(4, 9), torch.arange(first, first + 1500))
    expected = to_bfloat16(torch.full((1500,), 1 - 2.0**-9), bits)
    assert torch.equal(param.cpu(), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_other_dtypes_than_bfloat16_are_rounded_to_nearest(target):
    for dtype in (torch.float32, torch.float16):
        rounded, nearest = (on(target, make(SHAPES, dtype)) for _ in range(2))
        run(target, "ewc_sgd_step", rounded, [None] * len(SHAPES), rounding=Rounding(0, 0))
        run(target, "ewc_sgd_step", nearest, [None] * len(SHAPES))
        for a, b in zip(rounded["param"], nearest["param"], strict=True):
            torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=0)


def test_small_updates_add_up_with_stochastic_rounding_and_vanish_without():
    ends = []
    for rounding in (None, 0):
        param = torch.ones(4096, dtype=torch.bfloat16)
        table = ops.ParameterTable([param], {name: [None] for name in ops.SGD_COLUMNS})
        for number in range(100):
            how = None if rounding is None else Rounding(rounding, number)
            ops.ewc_sgd_step(table, [torch.ones_like(param)], lr=1e-4, rounding=how)
        ends.append(float(param.double().mean()))
    assert ends[0] == 1.0
    # 4096 walks of 100 steps of 2^-8 with probability 1e-4 · 2^8 each.
    assert ends[1] == pytest.approx(0.99, abs=6 * (100 * 0.0256) ** 0.5 / 256 / 4096**0.5)


def test_the_signed_seed_reaches_the_compiled_part():
    assert native.native_rounding(Rounding(2**64 - 1, 3)).is_stochastic
    assert not native.native_rounding(None).is_stochastic
