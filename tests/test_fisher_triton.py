"""The Fisher of layers in Triton: its sums, and what the compiler makes of it for three GPUs.

The sums are held against ``bdu.reference`` in float64: in the interpreter, or on a GPU if there is
one. ``BDU_SWEEP=1`` compiles every configuration for every architecture, which takes a while.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdu import reference
from bdu.kernels import fisher_affine, fisher_conv, fisher_linear, fisher_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
OUTPUTS = ("total", "bias_total", "weight_gradient", "bias_gradient", "kept")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)


def random(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, device=DEVICE)


def check(operation: str, **arguments: Any) -> dict[str, Tensor]:
    """One call against the reference; returns what it has written.

    With u half of float32's eps, a sum of T products is off by (T + 1) u of the sum of their
    absolute values A, its square by twice as much of A², and what is added up over B samples and
    the total before by another (B + 2) u of it: in all eps (T + B / 2 + 2) of Σ_b A_b². The
    reference itself gives Σ_b A_b², from the absolute values; x̂ has two roundings more.
    """
    given_outputs = {n: t for n, t in arguments.items() if n in OUTPUTS and t is not None}
    inputs = {n: t for n, t in arguments.items() if n not in given_outputs}
    exact = {n: t.double().cpu() for n, t in given_outputs.items()}
    wide = {
        n: (t.double() if t.is_floating_point() else t).cpu() if isinstance(t, Tensor) else t
        for n, t in inputs.items()
    }
    sizes = {n: torch.zeros_like(t) for n, t in exact.items()}
    absolute = {
        n: t.abs() if isinstance(t, Tensor) and t.is_floating_point() else t
        for n, t in wide.items()
    }
    if absolute.get("mean") is not None:
        absolute["mean"] = -absolute["mean"]
    getattr(reference, operation)(**exact, **wide)
    getattr(reference, operation)(**sizes, **absolute)
    found = {n: t.clone() for n, t in given_outputs.items()}
    launch(operation, **found, **inputs)
    samples, *others = inputs["gradients"].shape
    positions = math.prod(others[1:]) if operation == "fisher_conv" else others[0]
    share = torch.finfo(FP32).eps * (positions + samples + 8)
    for name, expected in exact.items():
        bound = share * (sizes[name] + given_outputs[name].double().cpu().abs())
        error = (found[name].double().cpu() - expected).abs()
        worst = (error / bound.clamp_min(1e-300)).max().item() if error.numel() else 0
        assert (error <= bound).all(), f"{name}: {worst:.3g} times the bound"
    return found


def launch(operation: str, **arguments: Any) -> None:
    getattr(import_module(f"bdu.kernels.{operation}"), operation)(**arguments)


def linear(
    samples: int,
    positions: int,
    outputs: int,
    inputs: int,
    a: torch.dtype = FP32,
    g: torch.dtype = FP32,
    kept: int = 0,
    with_gradient: bool = True,
) -> dict[str, Any]:
    """Arguments of fisher_linear; ``kept`` rows of the samples' gradients are set apart."""
    arguments: dict[str, Any] = {
        "total": random(outputs, inputs).abs(),
        "activations": random(samples, positions, inputs, dtype=a),
        "gradients": random(samples, positions, outputs, dtype=g),
    }
    if with_gradient:
        arguments["weight_gradient"] = random(outputs, inputs)
    if kept:
        index = torch.full((samples * outputs,), -1, dtype=torch.int32)
        places = torch.randperm(samples * outputs)[: kept - 1]
        index[places] = torch.arange(len(places), dtype=torch.int32)
        arguments["kept"] = random(kept, inputs)
        arguments["kept_index"] = index.view(samples, outputs).to(DEVICE)
    return arguments


# A linear layer


@pytest.mark.parametrize(("a", "g"), list(product(DTYPES, DTYPES)))
@pytest.mark.parametrize("positions", [3, 21])
def test_linear_takes_dtypes_in_any_mix(a, g, positions):
    check("fisher_linear", **linear(3, positions, 20, 28, a, g))


# Below, at and above tiles (16, 64, 128), chunks (16, 32, 64) and a band of eight tiles.
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 7, 5),
    (3, 2, 65, 66),
    (4, 15, 17, 130),
    (2, 16, 130, 16),
    (2, 33, 129, 132),
    (3, 65, 15, 64),
    (1, 4, 1160, 5),
    (5, 20, 64, 257),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_linear_of_any_shape(shape, dtype):
    check("fisher_linear", **linear(*shape, dtype, dtype, with_gradient=False))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (3, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_is_added_to_or_from_an_empty_tensor(shape):
    before = linear(*shape, kept=1)
    found = check("fisher_linear", **before)
    assert all(torch.equal(t, before[name]) for name, t in found.items())


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("inputs", [20, 21])
@pytest.mark.parametrize("positions", [1, 5, 40])
def test_linear_sets_rows_apart_that_have_another_use(dtype, inputs, positions):
    before = linear(3, positions, 33, inputs, dtype, dtype, kept=9)
    found = check("fisher_linear", **before)
    assert torch.equal(found["kept"][-1], before["kept"][-1]), "a number that nobody has"
    lone = check("fisher_linear", **linear(3, positions, 33, inputs, dtype, dtype, kept=1))
    assert "kept" in lone


def test_linear_and_convolution_give_the_bias_too():
    own = {"bias_total": random(9).abs(), "bias_gradient": random(9)}
    check("fisher_linear", **linear(3, 5, 9, 6), **own)
    check("fisher_conv", **convolution(3, 6, 9, (5, 4), (3, 3)), **own)


STRIDES = {
    "positions first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda t: torch.stack([t, t + 1], 3)[..., 0],
    "part of the channels": lambda t: torch.cat([t, t], 2)[..., : t.shape[2]],
    "not aligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "one sample for all": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("positions", [2, 18])
def test_linear_reads_any_strides(kind, positions):
    arguments = linear(4, positions, 24, 40, BF16)
    for name in ("activations", "gradients"):
        arguments[name] = STRIDES[kind](arguments[name])
    check("fisher_linear", **arguments)


@pytest.mark.parametrize("positions", [2, 17])
def test_linear_reaches_beyond_32_bits(positions):
    arguments = linear(3, positions, 8, 16, BF16)
    storage = torch.empty(2**31 + 2**12, dtype=BF16, device=DEVICE)  # only a little is touched
    far = storage.as_strided((3, positions, 16), (2**30, 16, 1))
    far.copy_(arguments["activations"])
    check("fisher_linear", **{**arguments, "activations": far})


# A convolution


def convolution(
    samples: int,
    inputs: int,
    outputs: int,
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...] | None = None,
    padding: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] | None = None,
    groups: int = 1,
    a: torch.dtype = FP32,
    g: torch.dtype = FP32,
    channels_last: bool = False,
    with_gradient: bool = True,
) -> dict[str, Any]:
    axes = len(size)
    stride, dilation = stride or (1,) * axes, dilation or (1,) * axes
    padding = padding or (0,) * axes
    sizes = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    weight = (outputs, inputs // groups, *kernel)
    arguments: dict[str, Any] = {
        "total": random(*weight).abs(),
        "activations": random(samples, inputs, *size, dtype=a),
        "gradients": random(samples, outputs, *out, dtype=g),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    if with_gradient:
        arguments["weight_gradient"] = random(*weight)
    if channels_last:
        for name in ("activations", "gradients"):
            arguments[name] = arguments[name].movedim(1, -1).contiguous().movedim(-1, 1)
    return arguments


CONVOLUTIONS = {
    "3x3": convolution(2, 8, 16, (6, 5), (3, 3), padding=(1, 1)),
    "of images": convolution(2, 3, 16, (9, 8), (3, 3), stride=(2, 2), padding=(1, 1)),
    "every setting": convolution(3, 8, 20, (9, 10), (3, 2), (2, 1), (1, 3), (1, 2), 1),
    "several tiles": convolution(1, 16, 130, (4, 5), (3, 3), padding=(1, 1)),
    "grouped": convolution(2, 16, 24, (7, 6), (3, 3), (1, 2), (2, 0), (2, 1), groups=2),
    "depthwise": convolution(2, 20, 20, (7, 6), (3, 3), (1, 2), (1, 1), groups=20),
    "depthwise, large": convolution(2, 7, 7, (9, 9), (5, 5), padding=(2, 2), groups=7),
    "depthwise, multiplied": convolution(2, 10, 30, (7, 6), (2, 3), padding=(0, 1), groups=10),
    "small groups": convolution(2, 8, 12, (7, 6), (3, 3), groups=4),
    "one axis": convolution(3, 12, 9, (17,), (4,), (3,), (2,), (2,)),
    "one axis, depthwise": convolution(3, 6, 6, (17,), (4,), (2,), (3,), (1,), groups=6),
    "pointwise": convolution(2, 12, 10, (4, 4), (1, 1), stride=(2, 2)),
    "few outputs": convolution(2, 12, 3, (4, 4), (3, 3), padding=(1, 1)),
    "one position": convolution(2, 12, 10, (3, 3), (3, 3)),
    "mixed": convolution(2, 8, 16, (6, 5), (3, 3), padding=(1, 1), a=BF16, g=FP16),
    "16 bits": convolution(2, 8, 16, (6, 5), (3, 3), (2, 1), (1, 1), a=BF16, g=BF16),
    "16 bits, depthwise": convolution(2, 8, 8, (6, 5), (3, 3), groups=8, a=FP16, g=FP16),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution_of_any_setting(name, channels_last):
    arguments = dict(CONVOLUTIONS[name])
    if channels_last:
        for key in ("activations", "gradients"):
            arguments[key] = arguments[key].movedim(1, -1).contiguous().movedim(-1, 1)
    check("fisher_conv", **arguments)


@st.composite
def convolutions(draw: Any) -> dict[str, Any]:
    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    axes = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    inputs, outputs = (groups * draw(st.sampled_from([1, 2, 4, 9])) for _ in range(2))
    size, kernel, stride, padding = each(3, 7), each(1, 3), each(1, 3), each(0, 2)
    dilation = each(1, 2)
    sizes = zip(size, kernel, padding, dilation, strict=True)
    assume(all(n + 2 * p > d * (k - 1) for n, k, p, d in sizes))
    return {
        **dict(samples=draw(st.integers(0, 3)), inputs=inputs, outputs=outputs, size=size),
        **dict(kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups),
        **dict(a=draw(st.sampled_from(DTYPES)), g=draw(st.sampled_from(DTYPES))),
        **dict(channels_last=draw(st.booleans()), with_gradient=draw(st.booleans())),
    }


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(convolutions())
def test_convolution_is_the_reference_for_all_settings(case):
    check("fisher_conv", **convolution(**case))


# An embedding


def embedding(
    samples: int,
    positions: int,
    rows: int,
    width: int,
    g: torch.dtype = FP32,
    index: torch.dtype = torch.int64,
    padding_idx: int | None = None,
) -> dict[str, Any]:
    indices = torch.randint(0, rows, (samples, positions)).to(DEVICE, index)
    arguments: dict[str, Any] = {
        "total": random(rows, width).abs(),
        "weight_gradient": random(rows, width),
        "indices": indices,
        "gradients": random(samples, positions, width, dtype=g),
        "padding_idx": padding_idx,
    }
    return arguments


@pytest.mark.parametrize("g", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "shape",
    [(3, 7, 5, 12), (4, 1, 9, 8), (1, 11, 3, 5), (2, 6, 40, 260), (5, 9, 2, 3), (2, 13, 1, 4)],
)
def test_embedding_sums_the_tokens_of_a_sample_inside_the_square(shape, g, index):
    check("fisher_embedding", **embedding(*shape, g, index))


@pytest.mark.parametrize("padding_idx", [0, 2, 4])
def test_the_padding_of_an_embedding_takes_no_gradient(padding_idx):
    before = embedding(3, 8, 5, 6, padding_idx=padding_idx)
    found = check("fisher_embedding", **before)
    assert torch.equal(found["total"][padding_idx], before["total"][padding_idx])


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (3, 0, 4, 5), (2, 3, 4, 0)])
def test_an_embedding_without_tokens_or_columns_stays(shape):
    before = embedding(*shape)
    found = check("fisher_embedding", **before)
    assert all(torch.equal(t, before[name]) for name, t in found.items())


@pytest.mark.parametrize("kind", STRIDES)
def test_embedding_reads_any_strides(kind):
    arguments = embedding(4, 6, 5, 24, BF16)
    arguments["gradients"] = STRIDES[kind](arguments["gradients"])
    arguments["indices"] = arguments["indices"].T.contiguous().T
    check("fisher_embedding", **arguments)


def test_embedding_without_the_plain_gradient():
    arguments = embedding(3, 7, 5, 12)
    del arguments["weight_gradient"]
    check("fisher_embedding", **arguments)


# Normalisations and biases

STATISTICS = {
    "none": None,
    "batch": lambda b, t, c: (1, 1, c),
    "layer": lambda b, t, c: (b, t, 1),
    "group": lambda b, t, c: (b, 1, c),
    "each": lambda b, t, c: (b, t, c),
    "position": lambda b, t, c: (1, t, 1),
    "one": lambda b, t, c: (1, 1, 1),
}


def affine(
    samples: int,
    positions: int,
    channels: int,
    kind: str,
    a: torch.dtype = FP32,
    g: torch.dtype = FP32,
    scale: bool = True,
    shift: bool = True,
) -> dict[str, Any]:
    shape = (samples, positions, channels)
    arguments: dict[str, Any] = {
        "total": random(channels).abs() if scale else None,
        "bias_total": random(channels).abs() if shift else None,
        "activations": random(*shape, dtype=a) if scale else None,
        "gradients": random(*shape, dtype=g),
        "weight_gradient": random(channels) if scale else None,
        "bias_gradient": random(channels) if shift else None,
    }
    if (statistic := STATISTICS[kind]) is not None:
        arguments["mean"] = random(*statistic(*shape))
        arguments["inverse_deviation"] = random(*statistic(*shape)).abs()
    return {name: t for name, t in arguments.items() if t is not None or name not in OUTPUTS[2:]}


def checked_affine(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The reference takes the totals as positions; here they may be None."""
    missing = {n: None for n in ("total", "bias_total") if arguments.get(n) is None}
    return check("fisher_affine", **{**arguments, **missing})


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize(("a", "g"), [(FP32, FP32), (BF16, FP16), (FP32, BF16)])
def test_affine_of_every_normalisation_and_layout(kind, channels_first, a, g):
    arguments = affine(3, 40, 20, kind, a, g)
    if channels_first:
        for name in ("activations", "gradients"):
            arguments[name] = STRIDES["channels first"](arguments[name])
    checked_affine(arguments)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 1, 33), (3, 300, 3), (2, 17, 150), (140, 3, 2), (2, 5, 2100)]
)
@pytest.mark.parametrize("channels_first", [False, True])
def test_affine_of_any_shape(shape, channels_first):
    arguments = affine(*shape, "layer")
    if channels_first:
        arguments["activations"] = STRIDES["channels first"](arguments["activations"])
        arguments["gradients"] = STRIDES["channels first"](arguments["gradients"])
    checked_affine(arguments)


@pytest.mark.parametrize("kind", STRIDES)
def test_affine_reads_any_strides(kind):
    arguments = affine(4, 6, 24, "group", BF16, FP32)
    arguments["gradients"] = STRIDES[kind](arguments["gradients"])
    checked_affine(arguments)
    arguments["activations"] = STRIDES[kind](arguments["activations"])
    checked_affine(arguments)


@pytest.mark.parametrize(("scale", "shift"), [(True, False), (False, True)])
def test_affine_of_a_scale_or_a_shift_alone(scale, shift):
    checked_affine(affine(3, 5, 9, "none" if shift else "layer", scale=scale, shift=shift))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (2, 3, 0)])
def test_affine_of_nothing_adds_nothing(shape):
    before = affine(*shape, "none")
    found = checked_affine(before)
    assert all(torch.equal(t, before[name]) for name, t in found.items())


def test_a_channel_that_never_leaves_its_mean_has_no_fisher_of_its_scale():
    arguments = affine(3, 7, 9, "batch")
    arguments["activations"][..., 4] = arguments["mean"][0, 0, 4]
    arguments["total"].zero_()
    found = checked_affine(arguments)
    assert found["total"][4] == 0
    assert (found["total"][:4] > 0).all()


# The order of the sums


def batch_split_into(runs: int) -> Any:
    def split(tiles: int, samples: int, steps: int, slots: int) -> tuple[int, int]:
        run = -(-samples // runs)
        return -(-samples // run), run

    return split


SPLIT = {
    "linear": ("fisher_linear", lambda: linear(5, 20, 20, 24, kept=4)),
    "linear, odd": ("fisher_linear", lambda: linear(5, 20, 20, 23, BF16, BF16, kept=4)),
    "linear, few positions": ("fisher_linear", lambda: linear(5, 2, 20, 23)),
    "convolution": ("fisher_conv", lambda: convolution(5, 9, 10, (4, 5), (3, 2))),
    "grouped": ("fisher_conv", lambda: convolution(5, 18, 20, (4, 5), (3, 2), groups=2)),
    "depthwise": ("fisher_conv", lambda: convolution(5, 9, 9, (4, 5), (3, 2), groups=9)),
}


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("name", SPLIT)
def test_a_batch_can_be_split(name, runs, monkeypatch):
    operation, arguments = SPLIT[name]
    module = import_module(f"bdu.kernels.{operation}")
    monkeypatch.setattr(module, "splits_for", batch_split_into(runs))
    first = check(operation, **(given := arguments()))
    again = check(operation, **given)
    assert all(torch.equal(t, again[name]) for name, t in first.items())


@pytest.mark.parametrize("channels_first", [False, True])
def test_positions_of_an_affine_can_be_split(channels_first, monkeypatch):
    def split(programs: int, positions: int, block: int, processors: int) -> tuple[int, int]:
        return -(-positions // block), block

    monkeypatch.setattr(fisher_affine, "splits_for", split)
    arguments = affine(3, 700, 5, "layer", BF16)
    if channels_first:
        for name in ("activations", "gradients"):
            arguments[name] = STRIDES["channels first"](arguments[name])
    first, again = checked_affine(arguments), checked_affine(arguments)
    assert all(torch.equal(t, again[name]) for name, t in first.items())


def test_a_rerun_gives_the_same_bits():
    for operation, arguments in (
        ("fisher_linear", linear(4, 40, 30, 40, kept=5)),
        ("fisher_conv", convolution(4, 8, 16, (6, 5), (3, 3))),
        ("fisher_embedding", embedding(4, 12, 5, 24)),
        ("fisher_affine", affine(4, 50, 24, "layer")),
    ):
        first, again = check(operation, **arguments), check(operation, **arguments)
        assert all(torch.equal(t, again[name]) for name, t in first.items())


@pytest.mark.parametrize("tiles", [1, 9, 36, 131, 132, 200, 1024, 10**6])
@pytest.mark.parametrize("samples", [1, 2, 7, 32, 500])
def test_the_splits_cover_the_batch_and_depend_on_numbers_alone(tiles, samples):
    splits, run = fisher_tiles.splits_for(tiles, samples, 512, 132)
    assert (splits - 1) * run < samples <= splits * run
    if tiles >= 4 * 132:
        assert splits == 1, "the device is full already"
    if tiles * samples <= 132 and samples > 1:
        assert splits == samples, "room for every sample"
    waves = math.ceil(tiles * splits / 132)
    assert waves * run <= math.ceil(tiles / 132) * samples, "no slower than without"


def test_the_splits_of_the_positions_cover_them():
    for programs, positions in product((1, 12, 768, 10**5), (1, 100, 784, 50_000)):
        splits, run = fisher_affine.splits_for(programs, positions, 16, 132)
        assert (splits - 1) * run < positions <= splits * run
        assert run % 16 == 0


def test_no_tile_is_larger_than_the_registers_hold():
    for outputs, inputs, cores, aligned, accumulators in product(
        (1, 16, 17, 64, 65, 1000), (1, 16, 64, 4000), (True, False), (True, False), (2, 3, 4)
    ):
        tile = fisher_tiles.tile_for(
            *(outputs, inputs, 200, 32),
            tensor_cores=cores,
            aligned=aligned,
            accumulators=accumulators,
            multiprocessors=1,
        )
        elements = tile.outputs * tile.inputs // (32 * tile.warps)
        assert elements * accumulators <= 128, "half of a thread's registers"


def test_a_device_with_few_samples_gets_more_tiles():
    settings = {"tensor_cores": True, "aligned": True, "accumulators": 2, "multiprocessors": 132}
    assert fisher_tiles.tile_for(512, 512, 512, 2, **settings)[:2] == (64, 64)
    assert fisher_tiles.tile_for(512, 512, 512, 32, **settings)[:2] == (128, 128)


def test_no_launch_waits_for_the_device(monkeypatch):
    calls = (
        ("fisher_linear", linear(2, 3, 4, 5, kept=2)),
        ("fisher_linear", linear(2, 20, 4, 5)),
        ("fisher_conv", convolution(2, 4, 4, (3, 3), (2, 2))),
        ("fisher_embedding", embedding(2, 3, 4, 5, padding_idx=1)),
        ("fisher_affine", affine(2, 3, 4, "batch")),
    )

    def refuse(*_: Any) -> None:
        raise AssertionError("waited for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        for operation, arguments in calls:
            launch(operation, **arguments)


# What the compiler makes of them


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def compiled_linear(
    shape: tuple[int, ...], a: str = "bfloat16", g: str = "bfloat16", extras: str = ""
) -> None:
    samples, positions, outputs, inputs = shape
    options: dict[str, Any] = {}
    if "gradient" in extras:
        options["weight_gradient"] = empty(outputs, inputs)
    if "kept" in extras:
        options["kept"] = empty(8, inputs)
        options["kept_index"] = empty(samples, outputs, dtype=torch.int32)
    launch(
        "fisher_linear",
        total=empty(outputs, inputs),
        activations=empty(samples, positions, inputs, dtype=getattr(torch, a)),
        gradients=empty(samples, positions, outputs, dtype=getattr(torch, g)),
        **options,
    )


def compiled_conv(
    shape: tuple[int, ...], a: str = "bfloat16", g: str = "bfloat16", extras: str = ""
) -> None:
    samples, inputs, outputs, size, kernel, stride, groups = shape
    out = (size + 2 * (kernel // 2) - kernel) // stride + 1
    total = empty(outputs, inputs // groups, kernel, kernel)
    image = empty(samples, size, size, inputs, dtype=getattr(torch, a)).permute(0, 3, 1, 2)
    gradients = empty(samples, out, out, outputs, dtype=getattr(torch, g)).permute(0, 3, 1, 2)
    launch(
        "fisher_conv",
        total=total,
        activations=image,
        gradients=gradients,
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        dilation=(1, 1),
        groups=groups,
        weight_gradient=empty(*total.shape) if "gradient" in extras else None,
    )


def compiled_embedding(shape: tuple[int, ...], g: str = "bfloat16", extras: str = "") -> None:
    samples, positions, rows, width = shape
    launch(
        "fisher_embedding",
        total=empty(rows, width),
        indices=torch.zeros(samples, positions, dtype=torch.int64),
        gradients=empty(samples, positions, width, dtype=getattr(torch, g)),
        weight_gradient=empty(rows, width) if "gradient" in extras else None,
    )


def compiled_affine(
    shape: tuple[int, ...], a: str = "bfloat16", g: str = "bfloat16", extras: str = "layer"
) -> None:
    samples, positions, channels = shape

    def tensor(dtype: str) -> Tensor:
        if "first" in extras:
            return empty(samples, channels, positions, dtype=getattr(torch, dtype)).transpose(1, 2)
        return empty(*shape, dtype=getattr(torch, dtype))

    kind = next(name for name in STATISTICS if name in extras)
    statistic = STATISTICS[kind]
    vector = empty(channels)
    launch(
        "fisher_affine",
        total=vector,
        bias_total=vector,
        activations=tensor(a),
        gradients=tensor(g),
        mean=None if statistic is None else empty(*statistic(*shape)),
        inverse_deviation=None if statistic is None else empty(*statistic(*shape)),
        weight_gradient=vector,
        bias_gradient=vector,
    )


Case = tuple[str, int, dict[str, Any]]  # function, architecture, its arguments
LLM, CNN = (32, 512, 4096, 4096), (32, 256, 256, 14, 3, 1, 1)
BOTH_FP32 = {"a": "float32", "g": "float32"}
CASES: dict[str, Case] = {
    **{f"linear-bf16-sm{n}": ("linear", n, {"shape": LLM}) for n in (80, 90, 100)},
    **{f"linear-fp32-sm{n}": ("linear", n, {"shape": LLM, **BOTH_FP32}) for n in (80, 90, 100)},
    **{f"linear-mixed-sm{n}": ("linear", n, {"shape": LLM, "a": "float32"}) for n in (90, 100)},
    "linear-fp16-gradient-sm80": (
        *("linear", 80),
        {"shape": LLM, "a": "float16", "g": "float16", "extras": "gradient"},
    ),
    "linear-bf16-kept": ("linear", 90, {"shape": LLM, "extras": "gradient kept"}),
    "linear-fp32-gradient": ("linear", 90, {"shape": LLM, "extras": "gradient", **BOTH_FP32}),
    "linear-bf16-odd": ("linear", 90, {"shape": (32, 512, 4001, 4001)}),
    "linear-fp32-few-sm80": ("linear", 80, {"shape": (32, 3, 4096, 4096), **BOTH_FP32}),
    "linear-bf16-one": ("linear", 90, {"shape": (32, 1, 4096, 4096), "extras": "gradient"}),
    "linear-tf32x3": ("linear", 90, {"shape": LLM, "precision": "tf32x3", **BOTH_FP32}),
    "conv-bf16-sm80": ("conv", 80, {"shape": CNN, "extras": "gradient"}),
    "conv-bf16": ("conv", 90, {"shape": CNN}),
    "conv-bf16-sm100": ("conv", 100, {"shape": CNN}),
    "conv-fp32": ("conv", 90, {"shape": CNN, **BOTH_FP32}),
    "conv-mixed-images-sm100": ("conv", 100, {"shape": (32, 3, 64, 64, 7, 2, 1), "a": "float32"}),
    "conv-bf16-depthwise": ("conv", 90, {"shape": (32, 512, 512, 14, 3, 1, 512)}),
    "conv-bf16-split": ("conv", 90, {"shape": (32, 64, 64, 56, 3, 1, 1)}),
    "embedding-bf16": ("embedding", 90, {"shape": (4, 16, 50, 768), "extras": "gradient"}),
    "embedding-fp32-sm80": ("embedding", 80, {"shape": (4, 16, 50, 768), "g": "float32"}),
    "affine-bf16": ("affine", 90, {"shape": (8, 512, 768)}),
    "affine-fp32-first-sm80": (
        *("affine", 80),
        {"shape": (8, 784, 64), "extras": "batch first", **BOTH_FP32},
    ),
}
ON_TENSOR_CORES = [
    *("linear-bf16-sm80", "linear-bf16-sm90", "linear-bf16-sm100", "linear-fp16-gradient-sm80"),
    *("linear-bf16-kept", "linear-bf16-odd"),
    *("conv-bf16-sm80", "conv-bf16", "conv-bf16-sm100", "conv-bf16-split"),
]
IN_FLOAT32 = [name for name in CASES if name not in ON_TENSOR_CORES and "tf32x3" not in name]
VECTORIZED = [
    name
    for name in CASES
    if name.startswith(("linear", "conv"))
    and not any(word in name for word in ("odd", "few", "one", "images", "depthwise", "tf32x3"))
]


def sweep(architecture: int) -> Iterator[tuple[str, Case]]:
    """All kinds of tiles, of tensors that are aligned and others, and all that can go with them."""
    dtypes = [("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "bfloat16")]
    linears = [
        *(LLM, (32, 512, 4001, 4001), (32, 512, 4096, 4001), (32, 512, 4001, 4096)),
        *((32, 512, 64, 4096), (32, 512, 4096, 64), (32, 512, 16, 4096), (32, 512, 4096, 16)),
        *((32, 512, 15, 4095), (2, 512, 512, 512), (2, 512, 511, 513), (32, 16, 4096, 4096)),
        *((32, 24, 4001, 4001), (32, 24, 64, 64), (32, 3, 4096, 4096), (32, 3, 4001, 4001)),
        *((32, 3, 64, 64), (32, 3, 16, 4096), (32, 1, 10, 512), (32, 1, 512, 27)),
        (32, 512, 16, 16),
    ]
    convs = [
        *(CNN, (32, 64, 64, 56, 3, 1, 1), (32, 3, 64, 64, 7, 2, 1), (32, 65, 130, 15, 3, 1, 1)),
        *((32, 65, 128, 15, 3, 1, 1), (32, 64, 129, 15, 3, 1, 1), (2, 64, 64, 4, 3, 1, 1)),
        *((32, 64, 64, 16, 3, 1, 4), (32, 16, 16, 16, 1, 1, 1), (32, 4, 128, 16, 3, 1, 1)),
        *((32, 512, 10, 16, 1, 1, 1), (32, 1024, 1024, 14, 3, 1, 1), (32, 3, 3, 16, 3, 1, 1)),
        *((32, 512, 512, 14, 3, 1, 512), (32, 512, 512, 14, 5, 1, 512), (8, 8, 8, 14, 1, 1, 8)),
        *((32, 33, 33, 14, 3, 1, 33), (32, 64, 128, 14, 3, 1, 64), (32, 128, 128, 14, 3, 1, 32)),
    ]
    for a, g in dtypes:
        for shape, extras in product(linears, ("", "gradient", "kept", "gradient kept")):
            yield (
                f"linear {shape} {a} {g} {extras}",
                (
                    *("linear", architecture),
                    {"shape": shape, "a": a, "g": g, "extras": extras},
                ),
            )
        for shape, extras in product(convs, ("", "gradient")):
            yield (
                f"conv {shape} {a} {g} {extras}",
                (
                    *("conv", architecture),
                    {"shape": shape, "a": a, "g": g, "extras": extras},
                ),
            )
        shapes = [(8, 512, 768), (8, 512, 767), (8, 49, 64), (64, 1, 512), (8, 1024, 3)]
        for shape, kind, first in product(
            shapes, ("none", "batch", "layer", "each"), ("", "first")
        ):
            extras = f"{kind} {first}"
            yield (
                f"affine {shape} {a} {g} {extras}",
                (
                    *("affine", architecture),
                    {"shape": shape, "a": a, "g": g, "extras": extras},
                ),
            )
        for width, extras in product((768, 767), ("", "gradient")):
            yield (
                f"embedding {width} {g} {extras}",
                (
                    *("embedding", architecture),
                    {"shape": (4, 16, 50, width), "g": g, "extras": extras},
                ),
            )


class Compiler:
    """Launches that end where the kernel would run, for a GPU that need not be there."""

    def __init__(self) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.jit import JITFunction

        self.architecture = 90
        self.precision = fisher_tiles.FLOAT32_PRECISION
        self.kernels: list[Any] = []
        self.fresh: list[str] = []
        run = JITFunction.run

        class Driver:
            get_current_target = staticmethod(lambda: GPUTarget("cuda", self.architecture, 32))
            get_current_device = staticmethod(lambda: self.architecture)
            get_current_stream = staticmethod(lambda device: 0)

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **others: Any) -> Any:
            kernel = run(function, *args, grid=grid, warmup=True, **others)
            self.kernels.append((function.__name__, kernel))
            return kernel

        triton.runtime.driver.set_active(Driver())
        JITFunction.run = compile_only
        triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: self.fresh.append(
            fn.name.rpartition(".")[2]
        )
        self.cuobjdump = triton.knobs.nvidia.cuobjdump.path
        for module in (fisher_linear, fisher_conv, fisher_affine):
            module.multiprocessors_of = lambda device: 132

    def __call__(self, case: Case) -> list[dict[str, Any]]:
        function, self.architecture, arguments = case
        arguments = dict(arguments)
        fisher_tiles.FLOAT32_PRECISION = arguments.pop("precision", self.precision)
        self.kernels.clear()
        globals()[f"compiled_{function}"](**arguments)
        return [{"kernel": name, **self.usage(kernel)} for name, kernel in self.kernels]

    def usage(self, kernel: Any) -> dict[str, Any]:
        cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "case.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [self.cuobjdump, "--dump-resource-usage", cubin]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        numbers = re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
        shared = {"SHARED": kernel.metadata.shared, "WARPS": kernel.metadata.num_warps}
        return {"ptx": kernel.asm["ptx"], **{k: int(v) for k, v in numbers}, **shared}

    def variants(self) -> dict[str, list[str]]:
        """What is compiled for a first call, and for others of other sizes."""
        found = {}
        for name, first, *others in (
            ("linear", LLM, (1, 512, 4096, 4096), (31, 1024, 4096, 4096), (7, 64, 8192, 4096)),
            ("conv", CNN, (8, 256, 256, 14, 3, 1, 1), (31, 128, 256, 28, 3, 2, 1)),
            ("embedding", (4, 16, 50, 768), (1, 16, 64, 1024), (3, 1, 9, 256)),
            ("affine", (32, 512, 768), (31, 500, 1024), (17, 512, 256)),
        ):
            for label, shapes in ((f"{name} first", [first]), (f"{name} others", others)):
                self.fresh.clear()
                for shape in shapes:
                    self((name, 90, {"shape": shape}))
                found[label] = list(self.fresh)
        return found


def in_another_process(tmp_path: Path, *arguments: str) -> Any:
    """What this file prints when it is run without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, __file__, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_another_process(tmp_path_factory.mktemp("triton"), "cases")


def count(ptx: str, pattern: str) -> int:
    return len(re.findall(pattern, ptx))


COPY = r"cp\.async\.c[ag]\.shared\.global"
COPY_128 = COPY + r" \[[^]]*\], \[[^]]*\], (?:0x10|16)\b"
LOAD, STORE = r"ld\.global", r"st\.global"
WIDE = r"\S*\.(?:v4\.[bu]32|v2\.[bu]64|b128)"
PRODUCT = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


@pytest.mark.parametrize("name", CASES)
def test_no_register_is_spilled(name, compiled):
    for kernel in compiled[name]:
        assert (kernel["STACK"], kernel["LOCAL"]) == (0, 0), kernel["kernel"]
        assert kernel["REG"] * 32 * kernel["WARPS"] <= 2**16, "a program fits on a multiprocessor"
        assert kernel["SHARED"] <= 160 * 2**10, "the shared memory of sm_80"


@pytest.mark.parametrize("name", ON_TENSOR_CORES)
def test_products_of_16_bits_are_those_of_the_tensor_cores(name, compiled):
    ptx = compiled[name][0]["ptx"]
    assert count(ptx, PRODUCT[CASES[name][1]]) >= 2
    assert count(ptx, r"tf32") == 0


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_products_of_float32_are_exact_but_for_one_rounding(name, compiled):
    for kernel in compiled[name]:
        assert all(count(kernel["ptx"], pattern) == 0 for pattern in PRODUCT.values())
        assert count(kernel["ptx"], "tf32") == 0
    if name.startswith(("linear", "conv")):
        assert count(compiled[name][0]["ptx"], r"fma\.rn\.f32") > 16


def test_tf32x3_is_three_products(compiled):
    products = count(compiled["linear-tf32x3"][0]["ptx"], r"wgmma\.mma_async\S*\.tf32\.tf32")
    once = count(compiled["linear-bf16-sm90"][0]["ptx"], PRODUCT[90])
    assert products > once
    assert products % 3 == 0


@pytest.mark.parametrize("name", VECTORIZED)
def test_aligned_tensors_are_moved_128_bits_at_a_time(name, compiled):
    ptx = compiled[name][0]["ptx"]
    assert count(ptx, COPY) == count(ptx, COPY_128) > 0
    assert count(ptx, STORE) == count(ptx, STORE + WIDE) > 0
    if "kept" not in name:
        assert count(ptx, LOAD) == count(ptx, LOAD + WIDE)


@pytest.mark.parametrize("name", VECTORIZED)
def test_tiles_are_loaded_while_others_are_multiplied(name, compiled):
    waits = re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", compiled[name][0]["ptx"])
    assert max(map(int, waits)) >= 2, "a turn waits for what it has just asked for"


@pytest.mark.parametrize(
    ("name", "loads"),
    [
        ("embedding-bf16", 4 * 1 + 2 * 2),  # 4 tokens, and 8 float32 of two totals
        ("embedding-fp32-sm80", 4 * 2 + 2),
        ("affine-bf16", 2 * 2),  # 16 elements a thread of a and of g
        ("affine-fp32-first-sm80", 2 * 4),
        ("conv-bf16-depthwise", 2),
    ],
)
def test_the_other_kernels_read_128_bits_at_a_time(name, loads, compiled):
    assert count(compiled[name][0]["ptx"], LOAD + WIDE) >= loads


@pytest.mark.parametrize("operation", ["linear", "conv", "embedding", "affine"])
def test_another_size_compiles_nothing_anew(operation, compiled):
    assert compiled["variants"][f"{operation} first"]
    assert compiled["variants"][f"{operation} others"] == []


@pytest.mark.slow
@pytest.mark.skipif("BDU_SWEEP" not in os.environ, reason="BDU_SWEEP is not set")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_no_register_is_spilled_whatever_is_launched(architecture, tmp_path):
    found = in_another_process(tmp_path, "sweep", str(architecture))
    assert len(found) > 400
    spilled = {n: k for n, kernels in found.items() for k in kernels if k["STACK"] or k["LOCAL"]}
    assert spilled == {}


def main(what: str, architecture: int = 0) -> None:
    compiler = Compiler()
    if what == "sweep":
        found: dict[str, Any] = {name: compiler(case) for name, case in sweep(architecture)}
        for kernel in (k for kernels in found.values() for k in kernels):
            del kernel["ptx"]
    else:
        variants = compiler.variants()
        found = {name: compiler(case) for name, case in CASES.items()} | {"variants": variants}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
