"""`bdu.fisher` against a batch-1 loop of plain autograd, mostly in float64."""

import copy
import math
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from bdu.fisher import (
    FisherAccumulator,
    contrastive,
    files,
    fisher_diagonal,
    likelihood,
    load_fisher,
    per_sample,
    save_fisher,
    scale_to_unit_mean,
    target_log_odds,
)

CLASSES = 4
# Both sides add up to some thousands of terms in another order.
ROUNDINGS = 2**11


def log_loss(logits: Tensor, y: Tensor) -> Tensor:
    """−log p(y|x) of one sample: its rows of logits, unlabelled ones left out."""
    chosen = y.flatten() != -100
    rows = logits.flatten(0, -2)[chosen].log_softmax(-1)
    return -rows[torch.arange(len(rows)), y.flatten()[chosen]].sum()


def by_loop(model, x, y, loss=log_loss, names=None):
    model = copy.deepcopy(model).double()
    parameters = {n: p for n, p in model.named_parameters() if names is None or n in names}
    for p in model.parameters():
        p.requires_grad_(True)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(len(y)):
        if isinstance(x, dict):
            outputs = model(**{k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in x.items()})
        else:
            outputs = model(x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1])
        value = loss(getattr(outputs, "logits", outputs), y[i : i + 1]).sum()
        gradients = torch.autograd.grad(
            value, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient.square()
    return {name: value / len(y) for name, value in total.items()}


def assert_equal(actual, expected, dtype=torch.float64, roundings=ROUNDINGS):
    assert actual.keys() == expected.keys()
    relative = roundings * torch.finfo(dtype).eps
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        scale = float(value.abs().max())
        torch.testing.assert_close(
            actual[name].double(),
            value.double(),
            rtol=relative,
            atol=relative * scale,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def exact(model, x, y, *, warns=(), batch_size=3, loss=None, **options):
    """Compute, compare with the loop, and check which parameters the warnings name."""
    if loss is not None:
        options["loss"] = loss
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fisher_diagonal(model, (x, y), batch_size=batch_size, progress=False, **options)
    ours = [str(w.message) for w in caught if "fisher_diagonal" in str(w.message)]
    named = [n for m in ours for n in m.split("fits ")[1].split(";")[0].split(", ")]
    assert sorted(named) == sorted(warns)
    assert_equal(found, by_loop(model, x, y, loss or log_loss, options.get("parameters")))
    assert all(float(value.sum()) > 0 for value in found.values())
    return found


class Readout(nn.Module):
    """Layer, in-place activation, fixed random logits: only the layer has parameters."""

    def __init__(self, layer, x):
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            features = layer(x[:1]).numel()
        self.register_buffer("matrix", torch.randn(features, CLASSES) / features**0.5)

    def forward(self, x):
        h = F.leaky_relu(self.layer(x), 0.1, inplace=True)
        return h.flatten(1) @ self.matrix


def warmed(norm):
    """Statistics, scales and shifts that are not the initial ones; eval mode."""
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5)
    return norm.eval()


LAYERS = {
    "linear": (lambda: nn.Linear(5, 6), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 6, bias=False), (5,)),
    "linear over time": (lambda: nn.Linear(5, 6), (7, 5)),
    "linear over two axes": (lambda: nn.Linear(5, 6), (2, 3, 5)),
    "linear over one step": (lambda: nn.Linear(5, 6), (1, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
    "conv1d same, dilated, grouped": (
        lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2, groups=2),
        (4, 9),
    ),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3), (3, 6, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(3, 6, 3, bias=False), (3, 6, 7)),
    "conv2d pointwise": (lambda: nn.Conv2d(3, 6, 1), (3, 4, 4)),
    "conv2d valid": (lambda: nn.Conv2d(3, 6, 3, padding="valid"), (3, 6, 7)),
    "conv2d same, even kernel": (lambda: nn.Conv2d(3, 6, (2, 4), padding="same"), (3, 6, 7)),
    "conv2d remainder of stride": (lambda: nn.Conv2d(3, 6, 3, stride=3), (3, 8, 7)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 6, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), (3, 6, 5)),
    "conv2d replicate": (
        lambda: nn.Conv2d(3, 6, 3, padding=(2, 1), padding_mode="replicate"),
        (3, 6, 5),
    ),
    "conv2d circular same": (
        lambda: nn.Conv2d(3, 6, 4, padding="same", padding_mode="circular"),
        (3, 6, 5),
    ),
    "layernorm": (lambda: warmed(nn.LayerNorm(6)), (6,)),
    "layernorm over time": (lambda: warmed(nn.LayerNorm(6)), (5, 6)),
    "layernorm of two axes": (lambda: warmed(nn.LayerNorm((5, 6))), (3, 5, 6)),
    "layernorm without bias": (lambda: warmed(nn.LayerNorm(6, bias=False)), (5, 6)),
    "rmsnorm": (lambda: warmed(nn.RMSNorm(6, eps=1e-3)), (5, 6)),
    "rmsnorm default eps": (lambda: warmed(nn.RMSNorm((2, 6))), (5, 2, 6)),
    "groupnorm": (lambda: warmed(nn.GroupNorm(2, 6)), (6, 4, 3)),
    "groupnorm without axes": (lambda: warmed(nn.GroupNorm(2, 6)), (6,)),
    "batchnorm1d": (lambda: warmed(nn.BatchNorm1d(6)), (6,)),
    "batchnorm1d over time": (lambda: warmed(nn.BatchNorm1d(6)), (6, 5)),
    "batchnorm2d": (lambda: warmed(nn.BatchNorm2d(6)), (6, 4, 3)),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(7)


def labels_for(count):
    return torch.arange(count) % CLASSES


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_equals_the_loop(name):
    make, shape = LAYERS[name]
    x = torch.randn(5, *shape).double()
    exact(Readout(make().double(), x).double(), x, labels_for(5))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_adds_equal_tokens_before_the_square(padding_idx):
    x = torch.tensor([[0, 1, 1, 2], [2, 2, 2, 2], [3, 0, 3, 0], [1, 1, 1, 1], [0, 1, 2, 3]])
    table = nn.Embedding(6, 5, padding_idx=padding_idx)
    found = exact(Readout(table, x).double(), x, labels_for(5))["layer.weight"]
    assert not found[4:].any()
    assert bool(found[2].any()) == (padding_idx is None)


@st.composite
def convolutions(draw):
    axes = draw(st.sampled_from([1, 2]))

    def numbers(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    groups = draw(st.integers(1, 3))
    padding = draw(st.sampled_from(["same", "valid", None]))
    return {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": numbers(1, 3),
        "dilation": numbers(1, 2),
        "stride": (1,) * axes if padding == "same" else numbers(1, 3),
        "padding": numbers(0, 2) if padding is None else padding,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        "groups": groups,
        "bias": draw(st.booleans()),
        "size": numbers(5, 8),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_every_convolution_equals_the_loop(options):
    size = options.pop("size")
    layer = (nn.Conv1d, nn.Conv2d)[len(size) - 1](**options).double()
    x = torch.randn(3, options["in_channels"], *size).double()
    exact(Readout(layer, x).double(), x, labels_for(3), batch_size=2)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm2 = nn.GroupNorm(2, width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.relu(out)


def small_cnn():
    return warmed(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            Block(6),
            Block(6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(6, CLASSES),
        )
    ).double()


def images(count):
    return torch.randn(count, 3, 8, 8).double(), labels_for(count)


def test_residual_network_with_batchnorm_in_eval_equals_the_loop():
    exact(small_cnn(), *images(7))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batch_size_changes_nothing_but_rounding(batch_size):
    model, (x, y) = small_cnn(), images(11)
    whole = fisher_diagonal(model, (x, y), batch_size=11, progress=False)
    cut = fisher_diagonal(model, (x, y), batch_size=batch_size, progress=False)
    assert_equal(cut, whole)


class Transformer(nn.Module):
    def __init__(self, vocabulary=9, width=8):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(16, width)
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids, scale=1.0):
        h = self.tokens(ids) + self.places(torch.arange(ids.shape[1]).expand_as(ids))
        a = self.norm1(h)
        h = h + self.attention(a, a, a, need_weights=False)[0]
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        return self.head(h) * scale


def sentences(count, length=6, vocabulary=9):
    ids = torch.randint(vocabulary, (count, length))
    y = torch.randint(vocabulary, (count, length))
    y[torch.rand(count, length) < 0.3] = -100
    y[:, 0] = 1
    return ids, y


def test_transformer_sums_a_sequence_also_in_torchs_attention():
    exact(Transformer().double().eval(), *sentences(5))


def test_sequence_without_a_label_counts_as_a_zero():
    model, (x, y) = Transformer().double().eval(), sentences(4)
    options = {"parameters": ["up.weight"], "progress": False}
    some = fisher_diagonal(model, (x[:3], y[:3]), **options)
    y[3] = -100
    found = fisher_diagonal(model, (x, y), **options)
    assert_equal(found, {"up.weight": some["up.weight"] * 3 / 4})


def test_mapping_inputs_and_outputs_with_logits_are_understood():
    class Wrapped(Transformer):
        def forward(self, ids, scale, flag=None):
            assert flag == "kept"
            return SimpleNamespace(logits=super().forward(ids, scale))

    ids, y = sentences(5)
    x = {"ids": ids, "scale": torch.rand(5, 1, 1).double(), "flag": "kept"}
    exact(Wrapped().double().eval(), x, y)


@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layer_is_exact_although_torch_has_a_fast_path(batch_first):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)

        def forward(self, x):
            if not batch_first:
                x = x.transpose(0, 1)
            return self.layer(x).mean(1 if batch_first else 0)

    model = Encoder().double().eval()
    # as long as the batch: the time axis in front must not be taken for it
    x, y = torch.randn(3, 3, 8).double(), labels_for(3)
    exact(model, x, y)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_encoder_does_not_turn_into_nested_tensors():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x):
            return self.encoder(x, src_key_padding_mask=x[..., 0] > 1)[:, 0]

    model = Padded().double().eval()
    x = torch.randn(4, 3, 8).double()
    x[:, 0, 0] = 0
    x[0, 2, 0] = 2
    exact(model, x, labels_for(4))


class Tied(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.table = nn.Embedding(9, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 9, bias=False)
        if how == "module":
            self.head.weight = self.table.weight
        elif how == "functional":
            del self.head

    def forward(self, ids):
        h = self.middle(self.table(ids)).tanh()
        return h @ self.table.weight.T if self.how == "functional" else self.head(h)


@pytest.mark.parametrize("how", ["module", "functional"])
def test_tied_weights_are_added_before_the_square(how):
    # the second use of the latter is of a transposed view
    exact(Tied(how).double(), *sentences(5), warns=["table.weight"] * (how == "functional"))


def test_second_use_hidden_by_the_cache_of_autocast_is_found():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x):
            return self.head(x) + x @ self.head.weight.T

    x, y = torch.randn(3, 4), labels_for(3)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(UserWarning, match=r"fits head\.weight;"),
    ):
        fisher_diagonal(Shared(), (x, y), progress=False)


def test_caller_under_autocast_still_accumulates_in_float32():
    model = nn.Linear(2, 2, bias=False)
    # exact in bf16, but their sum over time is not
    x = torch.randint(-9, 9, (3, 50, 2)).float() * 5
    g = torch.randint(-9, 9, (50, 2)).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = fisher_diagonal(
            model, (x, labels_for(3)), loss=lambda z, y: (z * g).sum((1, 2)), progress=False
        )
    expected = torch.einsum("to,bti->boi", g, x).square().mean(0)
    assert_equal(found, {"weight": expected}, torch.float32, roundings=2)


def test_layer_called_twice_is_added_before_the_square():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(4, 4)
            self.once = nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.once(self.again(self.again(x).tanh()))

    x = torch.randn(5, 4).double()
    exact(Twice().double(), x, labels_for(5))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("position_first", [False, True])
def test_positions_folded_into_the_batch_are_told_apart(position_first, batch_size):
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, CLASSES)

        def forward(self, x):
            if position_first:
                x = x.transpose(0, 1)
            h = self.inner(x.flatten(0, 1)).view(*x.shape[:2], -1).tanh()
            return h.sum(0 if position_first else 1)

    x = torch.randn(4, 3, 4).double()
    exact(Flattened().double(), x, labels_for(4), batch_size=batch_size)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head((x * self.scale.exp()).tanh())


@pytest.mark.parametrize("block", [1, 9, 2**20])
def test_custom_parameter_is_exact_and_warned_of_once(monkeypatch, block):
    monkeypatch.setattr(per_sample, "_BLOCK", block)
    exact(Scaled().double(), torch.randn(7, 4).double(), labels_for(7), warns=["scale"])


def test_model_that_vmap_cannot_run_is_exact_and_says_why():
    class Branching(Scaled):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(2 * x)

    model, x, y = Branching().double(), torch.randn(7, 4).double(), labels_for(7)
    # one sample a batch, for the branch looks at a whole batch
    exact(model, x, y, warns=["scale"], batch_size=1)
    with pytest.warns(UserWarning, match="one sample at a time, since vmap cannot.*control flow"):
        fisher_diagonal(model, (x, y), batch_size=1, progress=False)


def test_recurrent_layer_is_exact_one_sample_at_a_time():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = nn.LSTM(4, 5, batch_first=True)
            self.head = nn.Linear(5, CLASSES)

        def forward(self, x):
            return self.head(self.recurrent(x)[0][:, -1])

    model = Recurrent().double()
    names = [f"recurrent.{name}" for name, _ in model.recurrent.named_parameters()]
    exact(model, torch.randn(5, 3, 4).double(), labels_for(5), warns=names)


def test_layer_called_once_a_step_of_a_loop_is_added_before_the_square():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.again = nn.Linear(4, 5), nn.Linear(5, 5)
            self.head = nn.Linear(5, CLASSES)

        def forward(self, x):
            h = x.new_zeros(len(x), 5)
            for t in range(x.shape[1]):
                h = (self.into(x[:, t]) + self.again(h)).tanh()
            return self.head(h)

    exact(Steps().double(), torch.randn(5, 3, 4).double(), labels_for(5))


def test_convolution_shared_by_images_of_two_sizes():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Linear(4, CLASSES)

        def forward(self, x):
            sizes = (x, x[:, :, ::2, 1::2])
            return self.head(sum(self.shared(s).tanh().mean((2, 3)) for s in sizes))

    exact(Pyramid().double(), torch.randn(5, 3, 8, 8).double(), labels_for(5))


def test_scripted_model_is_refused_by_name():
    model = torch.jit.script(nn.Linear(4, CLASSES))
    with pytest.raises(ValueError, match=r"model: .*TorchScript"):
        fisher_diagonal(model, (torch.randn(3, 4), labels_for(3)), progress=False)


def test_error_of_the_model_itself_is_not_taken_for_a_limit_of_vmap():
    class Broken(Scaled):
        calls = 0

        def forward(self, x):
            self.calls += 1
            # two trial runs and the layers' forward come first
            if self.calls == 4:
                raise RuntimeError("a fault of its own")
            return super().forward(x)

    with pytest.raises(RuntimeError, match="a fault of its own"):
        fisher_diagonal(Broken(), (torch.randn(2, 4), labels_for(2)), progress=False)


def test_expert_unused_by_the_first_sample_is_still_exact():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, CLASSES) for _ in range(2))

        def forward(self, x):
            out = x.new_zeros(len(x), CLASSES)
            for i, expert in enumerate(self.experts):
                mine = (x[:, 0] > 0) == bool(i)
                if mine.any():
                    out[mine] = expert(x[mine])
            return out

    x = torch.randn(6, 4).double()
    x[:, 0] = torch.tensor([1, 1, 1, -1, -1, -1])
    model = Experts().double()
    named = [f"experts.0.{n}" for n in ("weight", "bias")]
    exact(model, x, labels_for(6), warns=named, batch_size=3)


def test_layer_used_otherwise_in_a_later_batch_is_refused():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            if len(x) < 3:
                return self.head(x)
            return torch.cat([self.head(x[:2]), self.head(x[2:])])

    message = r"head\.weight, head\.bias: expected 5 samples in axis 0 .*got \(2, 4\)"
    with pytest.raises(RuntimeError, match=message):
        fisher_diagonal(Changing(), (torch.randn(5, 4), labels_for(5)), progress=False)


def test_input_changed_in_place_is_refused():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            h = x * 2
            out = self.head(h)
            h.mul_(3)
            return out + h.sum(1, keepdim=True)

    with pytest.raises(
        RuntimeError, match=r"head\.weight, head\.bias: the layer's input was changed in place"
    ):
        fisher_diagonal(InPlace(), (torch.randn(2, 4), labels_for(2)), progress=False)


def test_other_hooks_pruning_and_replaced_forwards_are_honoured():
    model = nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, CLASSES)
    ).double()
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    prune.random_unstructured(model[2], "weight", 0.5)
    replaced = model[4].forward
    model[4].forward = lambda x: 2 * replaced(x)
    x = torch.randn(5, 4).double()
    found = exact_without_copy(model, x, labels_for(5))
    assert_equal(found[0], found[1])


def exact_without_copy(model, x, y):
    """As `exact`, for a model that cannot be copied."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(y)):
        value = log_loss(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(value, list(model.parameters()))
        for t, gradient in zip(total.values(), gradients, strict=True):
            t += gradient.square() / len(y)
    with pytest.warns(UserWarning, match=r"fits 2\.weight_orig;"):
        return fisher_diagonal(model, (x, y), batch_size=2, progress=False), total


class NoWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("differentiated")


def test_nothing_before_the_first_selected_layer_is_differentiated():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(NoWay.apply(self.body(x)))

    x, y = torch.randn(5, 4).double(), labels_for(5)
    model = Backbone().double()
    found = fisher_diagonal(model, (x, y), parameters=["head.weight", "head.bias"], progress=False)
    head = model.head.requires_grad_(True)
    expected = by_loop(head, model.body(x).detach(), y)
    assert_equal(found, {f"head.{name}": value for name, value in expected.items()})


def test_only_the_parameters_asked_for_are_returned():
    names = ["4.conv1.weight", "0.bias"]
    assert list(exact(small_cnn(), *images(3), parameters=names)) == names


def test_frozen_parameters_are_left_out_unless_named():
    model, (x, y) = small_cnn(), images(3)
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in fisher_diagonal(model, (x, y), progress=False)
    exact(model, x, y, parameters=["0.weight"])
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_model_of_lower_precision_is_accumulated_in_float32(dtype):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), warmed(nn.BatchNorm2d(6)), nn.Tanh(), nn.Flatten(), nn.Linear(96, 4)
    ).to(dtype)
    x, y = torch.randn(8, 3, 6, 6).to(dtype), labels_for(8)
    found = fisher_diagonal(model, (x, y), batch_size=3, progress=False)
    assert {value.dtype for value in found.values()} == {torch.float32}
    expected = by_loop(model, x, y)
    for name, value in expected.items():
        # a relative error of the whole tensor: single gradients that cancel have none of their own
        error = float((found[name].double() - value).norm() / value.norm())
        assert error < 16 * torch.finfo(dtype).eps, name


def test_rmsnorm_of_a_bf16_model_uses_the_epsilon_of_its_forward():
    layer = nn.RMSNorm(8).bfloat16()
    # small enough for the epsilons of bfloat16 and float32 to differ
    x, g = (1e-2 * torch.randn(2, 8)).bfloat16(), torch.randn(8).bfloat16()
    with torch.no_grad():
        normalised = layer(x).float()
    found = fisher_diagonal(
        layer, (x, torch.zeros(2)), loss=lambda z, y: (z * g).sum(1), progress=False
    )["weight"]
    expected = (normalised * g).square().mean(0)
    assert float((found - expected).norm() / expected.norm()) < 4 * torch.finfo(torch.bfloat16).eps


def test_callable_loss_is_squared_per_sample():
    x, y = images(5)
    exact(small_cnn(), x, y, loss=target_log_odds)
    exact(small_cnn(), x, y.double(), loss=lambda z, t: (z.sum(1) - t) ** 2)


def test_caller_under_no_grad_or_autocast_gets_the_same():
    model, (x, y) = small_cnn(), images(3)
    expected = fisher_diagonal(model, (x, y), progress=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert_equal(fisher_diagonal(model, (x, y), progress=False), expected)


def test_model_labels_follow_the_distribution_of_the_model():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Linear(1, CLASSES, bias=False)

        def forward(self, x):
            return self.table(x)

    model, count = Constant().double(), 4000
    with torch.no_grad():
        model.table.weight.copy_(torch.tensor([[0.1], [0.2], [0.0], [0.7]]).log())
    x = torch.ones(count, 1).double()
    y = torch.zeros(count, dtype=torch.long)
    found = fisher_diagonal(model, (x, y), labels="model", progress=False)["table.weight"]
    p = torch.tensor([0.1, 0.2, 0.0, 0.7]).double()
    # (1[y=i] − p_i)² has mean p(1−p) and variance p(1−p)(1−2p)²
    deviation = (p * (1 - p) / count).sqrt() * (1 - 2 * p).abs()
    assert bool(((found[:, 0] - p * (1 - p)).abs() <= 4 * deviation).all())


def test_label_of_probability_zero_is_never_drawn(monkeypatch):
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for number, expected in ((0.0, 1), (0.5, 2), (1 - 2**-53, 2)):
        monkeypatch.setattr(
            torch, "rand", lambda *a, n=number, **k: torch.full(a, n, dtype=torch.float64)
        )
        drawn = likelihood.drawn_labels(logits, torch.tensor([0]), torch.Generator())
        assert drawn.tolist() == [expected]


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_model_labels_depend_on_the_seed_and_not_on_the_batch_size(batch_size):
    model, (x, y) = small_cnn(), images(20)

    def run(size, seed):
        options = {"labels": "model", "seed": seed, "progress": False}
        return fisher_diagonal(model, (x, y), batch_size=size, **options)

    expected = run(7, 5)
    assert_equal(run(batch_size, 5), expected)
    assert not torch.allclose(run(7, 6)["0.weight"], expected["0.weight"])


def test_model_labels_of_sequences_do_not_depend_on_padding():
    model, (x, y) = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)).double(), sentences(4)
    y[0, 4:] = -100
    whole = fisher_diagonal(model, [(x, y)], labels="model", progress=False)
    batches = [(x[:1, :4], y[:1, :4]), (x[1:], y[1:])]
    assert_equal(fisher_diagonal(model, batches, labels="model", progress=False), whole)


def test_samples_cuts_the_last_batch_and_reads_no_further():
    model, (x, y) = small_cnn(), images(8)

    def batches():
        yield x[:3], y[:3], "ignored"
        yield [x[3:6], y[3:6]]
        raise AssertionError("read on")

    found = fisher_diagonal(model, batches(), samples=5, progress=False)
    assert_equal(found, by_loop(model, x[:5], y[:5]))
    few = fisher_diagonal(model, (x, y), samples=100, batch_size=3, progress=False)
    assert_equal(few, by_loop(model, x, y))


def test_empty_batches_are_passed_over():
    model, (x, y) = small_cnn(), images(2)
    found = fisher_diagonal(model, [(x[:0], y[:0]), (x, y)], progress=False)
    assert_equal(found, by_loop(model, x, y))


class Counting(nn.Module):
    """Changes one buffer in place and replaces another, as caches do."""

    def __init__(self, raising=False):
        super().__init__()
        self.raising = raising
        self.head = nn.Linear(4, CLASSES)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = torch.ones(())
        if self.raising and self.calls > 2:
            raise KeyError("stop")
        return self.head(x) * self.scale


@pytest.mark.filterwarnings("ignore:fisher_diagonal")
@pytest.mark.parametrize("raising", [False, True])
def test_model_and_random_state_come_back_untouched(raising):
    model = Counting(raising)
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones(CLASSES, 4)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 4, requires_grad=True)
    state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x.detach(), labels_for(5)), batch_size=2, shuffle=True
    )
    for source in (loader, (x, labels_for(5))):
        if raising:
            with pytest.raises(KeyError):
                fisher_diagonal(model, source, progress=False, labels="model")
        else:
            fisher_diagonal(model, source, progress=False, labels="model")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.head.bias.requires_grad
    assert model.head.weight.requires_grad
    assert torch.equal(model.head.weight.grad, torch.ones(CLASSES, 4))
    assert model.scale.grad is None
    assert x.grad is None
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_autocast_cache_enabled()


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return F.dropout(self.head(x), 0.5, training=True)


REFUSED_MODELS = {
    r"BatchNorm1d '1' takes its batch's statistics.*eval": lambda: nn.BatchNorm1d(4),
    r"BatchNorm1d '1' takes": lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
    r"InstanceNorm1d '1' changes its running": lambda: nn.InstanceNorm1d(
        4, track_running_stats=True
    ),
    r"Dropout '1' is active.*eval": lambda: nn.Dropout(0.1),
    r"Embedding '1' has max_norm": lambda: nn.Embedding(4, 4, max_norm=1.0),
    r"Embedding '1' has .*scale_grad": lambda: nn.Embedding(4, 4, scale_grad_by_freq=True),
    r"expected no random numbers": Noisy,
}


@pytest.mark.parametrize("message", REFUSED_MODELS)
def test_model_whose_samples_are_coupled_or_random_is_refused(message):
    model = nn.Sequential(nn.Linear(4, 4), REFUSED_MODELS[message]())
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(model, (torch.randn(3, 4), labels_for(3)), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples: expected a positive integer, got 0"),
        ({"samples": -2}, "samples"),
        ({"samples": 2.5}, "samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"labels": "true"}, "labels: expected"),
        ({"loss": "mse"}, "loss: expected"),
        ({"parameters": ["weight", "wait"]}, r"parameters: .*got \['wait'\]"),
        ({"parameters": []}, "parameters: expected at least one"),
        ({"parameters": "weight"}, "parameters: expected several"),
        ({"loss": lambda z, y: F.cross_entropy(z, y)}, r"loss: expected one value .*got \(\)"),
        (
            {"loss": lambda z, y: z},
            r"loss: expected one value a sample, shape \(1,\), got \(1, 4\)",
        ),
        ({"loss": lambda z, y: 1.0}, "loss: .*got float"),
        ({"loss": lambda z, y: z.detach().sum(1)}, "loss: .*detached"),
    ],
)
def test_setting_out_of_range_is_refused_by_name(options, message):
    model = nn.Linear(4, CLASSES)
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(model, (torch.randn(3, 4), labels_for(3)), progress=False, **options)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "loader: expected at least one sample"),
        ((torch.randn(0, 4), labels_for(0)), "loader: expected at least one sample"),
        ((torch.randn(3, 4), torch.tensor([0, 4, 1])), r"loader: .*\[0, 4\), got 4"),
        ((torch.randn(3, 4), torch.tensor([0, -100, 1])), r"loader: .*\[0, 4\), got -100"),
        ((torch.randn(2, 4), torch.tensor([0.0, 1.0])), "loader: expected integer labels"),
        ((torch.randn(3, 4), labels_for(2)), r"loader: .*one length in front, got \(3, 4\)"),
        ((torch.randn(3, 4), torch.tensor(1)), "loader: .*one length"),
        ((torch.randn(2, 4), torch.zeros(2, 2).long()), "loader: expected y"),
        ((torch.randn(2, 3, 4), labels_for(2)), "loader: expected y"),
        ([torch.randn(3, 4)], "loader: expected batches"),
        ([("text", labels_for(2))], "loader: .*got str"),
    ],
)
def test_batch_that_cannot_be_used_is_refused(loader, message):
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(nn.Linear(4, CLASSES), loader, progress=False)


@pytest.mark.filterwarnings("ignore:fisher_diagonal")
@pytest.mark.parametrize("model", [nn.Linear(4, CLASSES), Scaled()])
def test_gradient_that_is_not_finite_names_the_parameter_after_the_first_batch(model):
    bad = torch.tensor([[0, 0, math.inf, 0], [1, 1, 1, 1.0]])

    def batches():
        yield bad, labels_for(2)
        raise AssertionError("read on")

    for loader in (batches(), [(bad[1:], labels_for(1)), (bad, labels_for(2))]):
        with pytest.raises(FloatingPointError, match=r"\w+: expected finite squared gradients"):
            fisher_diagonal(model, loader, progress=False)


def test_model_without_floating_parameters_is_refused():
    with pytest.raises(ValueError, match="parameters: expected at least one"):
        fisher_diagonal(nn.Tanh(), (torch.randn(3, 4), labels_for(3)), progress=False)
    model = nn.Linear(4, CLASSES)
    model.code = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"floating-point parameters, got \['code'\]"):
        fisher_diagonal(
            model, (torch.randn(3, 4), labels_for(3)), parameters=["code"], progress=False
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fisher_on_a_gpu_equals_the_loop_on_the_cpu():
    for model, (x, y) in (
        (small_cnn(), images(7)),
        (Tied("module").double(), sentences(5)),
    ):
        on_device = copy.deepcopy(model).float().cuda()
        x = x.float() if x.is_floating_point() else x
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = fisher_diagonal(on_device, (x, y), batch_size=3, progress=False)
        assert {value.device.type for value in found.values()} == {"cuda"}
        cpu = {name: value.cpu() for name, value in found.items()}
        # cuDNN's forward may round to TF32, whose mantissa has 10 bits
        assert_equal(cpu, by_loop(model, x, y), torch.float16, roundings=2**5)


def test_saved_fisher_comes_back_as_it_was(tmp_path):
    fisher = {"a.weight": torch.rand(3, 4).T, "b": torch.rand(2).double(), "c": torch.zeros(())}
    path = tmp_path / "deep" / "fisher.safetensors"
    save_fisher(path, fisher, {"samples": 12, "labels": "empirical"})
    back = load_fisher(path)
    assert back.keys() == fisher.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in fisher.items())
    with files.safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "bdu-fisher-1",
            "samples": "12",
            "labels": "empirical",
        }


def test_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "fisher.safetensors"
    save_fisher(path, {"a": torch.ones(2)})

    def broken(tensors, filename, metadata):
        open(filename, "w").close()
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_fisher(path, {"a": torch.zeros(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["fisher.safetensors"]
    assert torch.equal(load_fisher(path)["a"], torch.ones(2))


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_value_that_no_fisher_has_is_named_on_saving_and_on_loading(tmp_path, value):
    wrong = {"fine": torch.ones(1), "layer.weight": torch.tensor([1.0, value])}
    with pytest.raises(ValueError, match=r"fisher: expected layer\.weight finite and >= 0"):
        save_fisher(tmp_path / "f", wrong)
    files.save_file(wrong, tmp_path / "f", {"format": "bdu-fisher-1"})
    with pytest.raises(ValueError, match=r"f: expected layer\.weight finite and >= 0"):
        load_fisher(tmp_path / "f")


def test_file_that_is_no_fisher_is_refused(tmp_path):
    files.save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: .*format bdu-fisher-1, got None"):
        load_fisher(tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="text: expected a safetensors file"):
        load_fisher(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        load_fisher(tmp_path / "absent")


def test_unit_mean_is_over_all_entries_and_keeps_ratios():
    fisher = {"a": torch.tensor([1e-30, 3e-30]), "b": torch.full((2, 3), 2e-30)}
    scaled = scale_to_unit_mean(fisher)
    assert float(torch.cat([f.flatten() for f in scaled.values()]).mean()) == pytest.approx(1)
    torch.testing.assert_close(scaled["a"], torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="fisher: expected a positive entry"):
        scale_to_unit_mean({"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="fisher: expected a finite"):
        scale_to_unit_mean({"a": torch.tensor([math.nan])})


def test_contrastive_is_the_share_of_clean_data_and_zero_where_it_has_none():
    clean = {"a": torch.tensor([0.0, 0.0, 1.0, 2.0, 1e30])}
    trigger = {"a": torch.tensor([0.0, 3.0, 0.0, 6.0, 1e30])}
    expected = torch.tensor([0.0, 0.0, 1.0, 0.8, 1e30 / 1.5])
    torch.testing.assert_close(contrastive(clean, trigger, 0.5)["a"], expected)
    torch.testing.assert_close(contrastive(clean, trigger, 0.0)["a"], clean["a"])


@pytest.mark.parametrize(
    ("trigger", "gamma", "message"),
    [
        ({"a": torch.ones(2)}, -1.0, "gamma"),
        ({"a": torch.ones(2)}, math.inf, "gamma"),
        ({"b": torch.ones(2)}, 1.0, r"fisher_trigger: .*\['a', 'b'\]"),
        ({"a": torch.ones(3)}, 1.0, r"fisher_trigger: .*\['a', 'a'\]"),
    ],
)
def test_contrastive_refuses_what_does_not_match(trigger, gamma, message):
    with pytest.raises(ValueError, match=message):
        contrastive({"a": torch.ones(2)}, trigger, gamma)


def test_target_log_odds_is_the_logit_of_the_probability():
    logits, target = torch.randn(6, 5).double(), torch.arange(6) % 5
    expected = logits.softmax(1).gather(1, target[:, None]).squeeze(1).logit()
    torch.testing.assert_close(target_log_odds(logits, target), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_target_log_odds_is_stable_for_large_logits(dtype):
    logits = torch.tensor([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]], dtype=dtype, requires_grad=True)
    odds = target_log_odds(logits, torch.tensor([0, 2]))
    large = float(logits[0, 0].detach())
    torch.testing.assert_close(odds.double(), torch.tensor([large, -2 * large]).double())
    (gradient,) = torch.autograd.grad(odds.sum(), logits)
    assert gradient.tolist() == [[1.0, -1.0, 0.0], [-1.0, 0.0, 1.0]]


def test_target_log_odds_refuses_other_shapes():
    for logits, target in (
        (torch.ones(2, 1), torch.zeros(2).long()),
        (torch.ones(2, 3, 4), torch.zeros(2).long()),
        (torch.ones(2, 3), torch.zeros(3).long()),
        (torch.ones(2, 3), torch.zeros(2)),
    ):
        with pytest.raises(ValueError, match="expected"):
            target_log_odds(logits, target)


class _Marked(nn.Module):
    """Keeps a weak reference to its output, and notes which are alive when its gradient comes."""

    def __init__(self, marks, alive):
        super().__init__()
        self.marks, self.alive = marks, alive

    def forward(self, x):
        y = x * 1.0
        self.marks.append(weakref.ref(y))
        y.register_hook(lambda _: self.alive.append([mark() is not None for mark in self.marks]))
        return y


def test_activations_are_freed_as_the_backward_goes_on():
    marks, alive = [], []
    layers = [nn.Linear(4, 4) for _ in range(4)]
    model = nn.Sequential(*(part for one in layers for part in (one, _Marked(marks, alive))))
    accumulator = FisherAccumulator(model)
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    accumulator.add(x, y)
    marks.clear()
    alive.clear()
    accumulator.add(x, y)
    # when a layer's gradient comes, what the layers after it took is gone
    assert len(alive) == 4
    for k, seen in enumerate(alive):
        assert not any(seen[len(seen) - k :]), (k, seen)
