"""The Fisher of single layers on every backend that is here, against sums in float64."""

import pytest
import torch
import torch.nn.functional as F
from backends import Target, served
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdu import dispatch, fisher_ops, reference

LINEAR = served("fisher_linear")
NATIVE = [case for case in LINEAR if case.values[0].backend == "cpp"]
MOST = 3  # a random number of the tests is at most this large


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(3)


def random(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, dtype=torch.float64).clamp(-MOST, MOST).to(device, dtype)


def run(target: Target, operation: str, *args, **options):
    with dispatch.use_backend(target.backend):
        getattr(fisher_ops, operation)(*args, **options)


def zeros(shape, dtype, target):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.zeros(shape, dtype=wide, device=target.device)


def assert_summed(found: Tensor, one: Tensor, sizes: Tensor, terms: int, squared: bool = True):
    """`found` is Σ_b one_b² (or Σ_b one_b) but for the roundings of sums in its own dtype.

    one: (B, ...), exact, each the sum of so many terms, whose absolute values add up to sizes. That
    sum is off by at most e = terms · eps · sizes, its square by 2 |one| e + e², and adding up B of
    them by B · eps of the result.
    """
    eps = torch.finfo(found.dtype).eps
    error = (terms + 2) * eps * sizes
    if squared:
        exact = one.square().sum(0)
        bound = (2 * one.abs() * error + error**2).sum(0) + (len(one) + 2) * eps * exact
    else:
        exact = one.sum(0)
        bound = error.sum(0) + (len(one) + 2) * eps * one.abs().sum(0)
    difference = (found.double().cpu() - exact.cpu()).abs()
    worst = (difference / bound.cpu().clamp_min(1e-300)).max().item() if difference.numel() else 0
    assert (difference <= bound.cpu()).all(), f"{worst:.3g} times the bound"


def linear_case(batch, steps, inputs, outputs, dtype, target):
    a = random(batch, steps, inputs, dtype=dtype, device=target.device)
    g = random(batch, steps, outputs, dtype=dtype, device=target.device)
    one = torch.einsum("bto,bti->boi", g.double(), a.double())
    sizes = torch.einsum("bto,bti->boi", g.double().abs(), a.double().abs())
    return a, g, one, sizes


SHAPES = [
    (3, 5, 7, 9),
    (1, 1, 1, 1),
    (5, 1, 8, 6),
    (2, 33, 17, 15),
    (4, 2, 40, 29),
    (0, 3, 4, 5),
    (3, 0, 4, 5),
    (2, 3, 0, 5),
    (2, 3, 4, 0),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("target", "dtype"), LINEAR)
def test_linear_sums_positions_inside_and_samples_outside_the_square(target, dtype, shape):
    a, g, one, sizes = linear_case(*shape, dtype, target)
    total = zeros(one.shape[1:], dtype, target)
    plain = torch.zeros_like(total)
    run(target, "fisher_linear", total, a, g, weight_gradient=plain)
    assert_summed(total, one, sizes, shape[1])
    assert_summed(plain, one, sizes, shape[1], squared=False)


@pytest.mark.parametrize(("target", "dtype"), NATIVE)
@pytest.mark.parametrize("shape", [(3, 1500, 20, 31), (70, 16, 70, 45), (9, 130, 100, 43)])
def test_linear_in_several_blocks_and_tiles(target, dtype, shape):
    a, g, one, sizes = linear_case(*shape, dtype, target)
    total = zeros(one.shape[1:], dtype, target)
    run(target, "fisher_linear", total, a, g)
    assert_summed(total, one, sizes, shape[1])
    again = torch.zeros_like(total)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        run(target, "fisher_linear", again, a, g)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(total, again)  # whatever the number of threads


@pytest.mark.parametrize("kind", ["positions first", "channels in the middle", "mixed", "sliced"])
@pytest.mark.parametrize(("target", "dtype"), LINEAR)
def test_linear_reads_any_strides_and_mixed_dtypes(target, dtype, kind):
    a, g, one, sizes = linear_case(4, 6, 9, 11, dtype, target)
    if kind == "positions first":
        a, g = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (a, g))
    elif kind == "channels in the middle":
        a, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (a, g))
    elif kind == "sliced":
        a = torch.stack([a, -a], 3)[..., 0]
    elif dtype != torch.float64:
        a = a.float()
    total = zeros(one.shape[1:], dtype, target)
    run(target, "fisher_linear", total, a, g)
    assert_summed(total, one, sizes, 6)


@pytest.mark.parametrize(("target", "dtype"), LINEAR)
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (2, 1, 20, 33)])
def test_linear_keeps_the_rows_that_another_use_adds_to(target, dtype, shape):
    a, g, one, sizes = linear_case(*shape, dtype, target)
    batch, _, inputs, outputs = shape
    index = torch.full((batch, outputs), -1, dtype=torch.int32)
    index[0, 0], index[batch - 1, outputs - 1], index[batch - 1, 3] = 2, 0, 1
    kept = zeros((4, inputs), dtype, target)
    kept[3] = 7
    total = zeros((outputs, inputs), dtype, target)
    plain = torch.zeros_like(total)
    options = {"kept": kept, "kept_index": index.to(target.device), "weight_gradient": plain}
    run(target, "fisher_linear", total, a, g, **options)
    assert_summed(plain, one, sizes, shape[1], squared=False)
    for number, (b, o) in {2: (0, 0), 0: (batch - 1, outputs - 1), 1: (batch - 1, 3)}.items():
        assert_summed(kept[number], one[b, o][None], sizes[b, o][None], shape[1], squared=False)
        one[b, o] = 0
        sizes[b, o] = 0
    assert kept[3].eq(7).all()
    assert_summed(total, one, sizes, shape[1])


def test_totals_are_added_to_and_known_to_autograd_as_changed():
    a, g, one, _ = linear_case(3, 4, 5, 6, torch.float32, Target("cpp", "cpu"))
    total = torch.full((6, 5), 1000.0)
    version = total._version
    fisher_ops.fisher_linear(total, a, g)
    assert total._version > version
    torch.testing.assert_close(total - 1000, one.square().sum(0).float(), atol=1e-3, rtol=1e-3)


@st.composite
def convolutions(draw):
    axes = draw(st.sampled_from([1, 2]))

    def numbers(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    groups = draw(st.sampled_from([1, 1, 2, 3, 17]))
    return {
        "inputs": groups * draw(st.integers(1, 3)),
        "outputs": groups * draw(st.integers(1, 3)),
        "kernel": numbers(1, 3),
        "size": numbers(5, 8),
        "batch": draw(st.integers(0, 3)),
        "channels_last": draw(st.booleans()),
        "settings": {
            "stride": numbers(1, 3),
            "padding": numbers(0, 2),
            "dilation": numbers(1, 2),
            "groups": groups,
        },
    }


def check_convolution(target, dtype, case):
    axes, options = len(case["size"]), case["settings"]
    a = random(case["batch"], case["inputs"], *case["size"], dtype=dtype, device=target.device)
    weight = random(
        case["outputs"], case["inputs"] // options["groups"], *case["kernel"], dtype=torch.float64
    ).requires_grad_()
    conv = (F.conv1d, F.conv2d)[axes - 1]
    wide = a.double().cpu()
    out = conv(wide, weight, None, **options)
    g = random(*out.shape, dtype=dtype, device=target.device)
    if case["channels_last"] and axes == 2:
        a, g = (t.contiguous(memory_format=torch.channels_last) for t in (a, g))

    def gradients(inputs, outputs):
        rows = [
            torch.autograd.grad(conv(inputs[b : b + 1], weight, None, **options), weight, out)[0]
            for b, out in enumerate(outputs.double().cpu().split(1))
        ]
        return torch.stack(rows) if rows else weight.detach()[None][:0]

    one, sizes = gradients(wide, g), gradients(wide.abs(), g.abs())
    total = zeros(weight.shape, dtype, target)
    plain = torch.zeros_like(total)
    run(target, "fisher_conv", total, a, g, **options, weight_gradient=plain)
    terms = out[0, 0].numel() if len(out) else 1
    assert_summed(total, one, sizes, terms)
    assert_summed(plain, one, sizes, terms, squared=False)


@pytest.mark.parametrize(("target", "dtype"), served("fisher_conv"))
def test_every_convolution(target, dtype):
    examples = 6 if target.is_interpreted else 60

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(convolutions())
    def property_(case):
        check_convolution(target, dtype, case)

    property_()


@pytest.mark.parametrize(("target", "dtype"), NATIVE)
@pytest.mark.parametrize(
    ("inputs", "outputs", "groups"), [(64, 40, 1), (33, 15, 3), (40, 80, 40), (17, 17, 17)]
)
def test_convolution_in_several_blocks_and_tiles(target, dtype, inputs, outputs, groups):
    settings_ = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": groups}
    case = {"inputs": inputs, "outputs": outputs, "kernel": (3, 3), "size": (16, 15), "batch": 9}
    check_convolution(target, dtype, {**case, "channels_last": False, "settings": settings_})


def test_total_of_a_convolution_may_have_its_channels_last():
    a, g = random(3, 6, 5, 5), random(3, 8, 5, 5)
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    plain = torch.zeros(8, 6, 3, 3)
    last = torch.zeros(8, 6, 3, 3).to(memory_format=torch.channels_last)
    for total in (plain, last):
        fisher_ops.fisher_conv(total, a, g, **options)
    assert torch.equal(plain, last)


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize(("target", "dtype"), served("fisher_embedding"))
@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (1, 1, 1, 1), (3, 40, 9, 300), (0, 3, 4, 2)])
def test_embedding_adds_equal_tokens_of_a_sample_before_the_square(
    target, dtype, shape, padding_idx
):
    batch, steps, rows, width = shape
    index = torch.randint(rows, (batch, steps)).to(target.device)
    g = random(batch, steps, width, dtype=dtype, device=target.device)
    hot = F.one_hot(index, rows).double()
    if padding_idx is not None:
        hot[..., padding_idx] = 0
    one = torch.einsum("btv,btd->bvd", hot, g.double())
    sizes = torch.einsum("btv,btd->bvd", hot, g.double().abs())
    total = zeros((rows, width), dtype, target)
    plain = torch.zeros_like(total)
    options = {"padding_idx": padding_idx, "weight_gradient": plain}
    run(target, "fisher_embedding", total, index, g, **options)
    assert_summed(total, one, sizes, steps)
    assert_summed(plain, one, sizes, steps, squared=False)


STATISTICS = {
    "none": None,
    "a channel": lambda b, t, c: (1, 1, c),
    "a position": lambda b, t, c: (b, t, 1),
    "a sample's channel": lambda b, t, c: (b, 1, c),
}


@pytest.mark.parametrize("positions_together", [False, True])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize(("target", "dtype"), served("fisher_affine"))
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 3), (4, 600, 70), (0, 2, 3), (2, 0, 3)])
def test_affine_gives_scale_and_shift_in_one_pass(
    target, dtype, shape, statistics, positions_together
):
    batch, steps, channels = shape
    if target.is_interpreted and steps > 100:
        shape = (batch, steps, channels) = (2, 70, 40)

    def tensor():
        if positions_together:
            made = random(batch, channels, steps, dtype=dtype, device=target.device)
            return made.transpose(1, 2)
        return random(batch, steps, channels, dtype=dtype, device=target.device)

    a, g = tensor(), tensor()
    options, normalised, size = {}, a.double(), a.double().abs()
    if STATISTICS[statistics] is not None:
        form = STATISTICS[statistics](*shape)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mean, inverse = (random(*form, dtype=wide, device=target.device) for _ in range(2))
        options = {"mean": mean, "inverse_deviation": inverse}
        normalised = (a.double() - mean.double()) * inverse.double()
        size = (a.double().abs() + mean.double().abs()) * inverse.double().abs()
    total, shift = zeros((channels,), dtype, target), zeros((channels,), dtype, target)
    plain, plain_shift = torch.zeros_like(total), torch.zeros_like(total)
    run(
        target,
        "fisher_affine",
        total,
        shift,
        a,
        g,
        **options,
        weight_gradient=plain,
        bias_gradient=plain_shift,
    )
    one, sizes = (g.double() * normalised).sum(1), (g.double().abs() * size).sum(1)
    # beside the sum, a subtraction and two products
    assert_summed(total, one, sizes, steps + 3)
    assert_summed(plain, one, sizes, steps + 3, squared=False)
    one, sizes = g.double().sum(1), g.double().abs().sum(1)
    assert_summed(shift, one, sizes, steps)
    assert_summed(plain_shift, one, sizes, steps, squared=False)


def test_shift_alone_needs_no_activations():
    g = random(3, 4, 5)
    shift = torch.zeros(5)
    fisher_ops.fisher_affine(None, shift, None, g)
    assert_summed(shift, g.double().sum(1), g.double().abs().sum(1), 4)


CONV = {"stride": (1,), "padding": (0,), "dilation": (1,), "groups": 1}
A, G, TOTAL = torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.zeros(5, 4)
WRONG = {
    r"activations: expected \(B, T, I\), got \(3, 4\)": ("fisher_linear", (TOTAL, A[0], G), {}),
    r"gradients: expected \(2, 3, 5\) on cpu, got \(2, 2, 5\)": (
        "fisher_linear",
        (TOTAL, A, G[:, :2]),
        {},
    ),
    r"total: expected \(5, 4\) on cpu, got \(4, 5\)": ("fisher_linear", (TOTAL.T, A, G), {}),
    r"total: expected float32 or float64, got torch\.bfloat16": (
        "fisher_linear",
        (TOTAL.bfloat16(), A, G),
        {},
    ),
    r"total: expected dense memory": ("fisher_linear", (torch.zeros(4, 5).T, A, G), {}),
    r"weight_gradient: expected torch\.float32 like total": (
        "fisher_linear",
        (TOTAL, A, G),
        {"weight_gradient": TOTAL.double()},
    ),
    r"kept, kept_index: expected both": ("fisher_linear", (TOTAL, A, G), {"kept": TOTAL}),
    r"total: expected \(O, I, L\) or": ("fisher_conv", (TOTAL, A, G), CONV),
    r"stride: expected 1 numbers >= 1, got \(0,\)": (
        "fisher_conv",
        (torch.zeros(5, 3, 2), A, G),
        {**CONV, "stride": (0,)},
    ),
    r"groups: expected a divisor of 3 and 5, got 2": (
        "fisher_conv",
        (torch.zeros(5, 3, 2), A, G),
        {**CONV, "groups": 2},
    ),
    r"gradients: expected \(2, 5, 3\) on cpu, got \(2, 3, 5\)": (
        "fisher_conv",
        (torch.zeros(5, 3, 2), A, G),
        CONV,
    ),
    r"indices: expected integers": ("fisher_embedding", (torch.zeros(6, 5), G[..., 0], G), {}),
    r"indices: expected \(2, 3\) on cpu, got \(2, 2\)": (
        "fisher_embedding",
        (torch.zeros(6, 5), torch.ones(2, 2).long(), G),
        {},
    ),
    r"mean: expected \(2, 3, 5\) or 1 in its places, got \(2, 2, 1\)": (
        "fisher_affine",
        (torch.zeros(5), None, G, G),
        {"mean": torch.ones(2, 2, 1)},
    ),
    r"activations: expected a tensor beside total": (
        "fisher_affine",
        (torch.zeros(5), None, None, G),
        {},
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(message):
    operation, args, options = WRONG[message]
    before = args[0].clone()
    with pytest.raises(ValueError, match=message):
        getattr(fisher_ops, operation)(*args, **options)
    assert torch.equal(args[0], before)


def test_index_outside_of_the_table_is_refused():
    total = torch.zeros(6, 5)
    for wrong in (6, -1):
        index = torch.tensor([[0, 1, wrong], [0, 0, 0]])
        with pytest.raises(
            ValueError, match=rf"indices: expected integers in \[0, 6\), got {wrong}"
        ):
            fisher_ops.fisher_embedding(total, index, G)
    assert not total.any()


def test_reference_is_the_batch_one_loop_of_autograd():
    layer = torch.nn.Linear(4, 5).double()
    x = random(3, 6, 4, dtype=torch.float64)
    total, shift = torch.zeros(5, 4).double(), torch.zeros(5).double()
    weights = random(3, 6, 5, dtype=torch.float64)
    for b in range(3):
        grads = torch.autograd.grad((layer(x[b]) * weights[b]).sum(), layer.parameters())
        total += grads[0].square()
        shift += grads[1].square()
    found, found_shift = torch.zeros_like(total), torch.zeros_like(shift)
    reference.fisher_linear(found, x, weights)
    reference.fisher_affine(None, found_shift, None, weights)
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(found_shift, shift)
