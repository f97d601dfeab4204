"""Uses of a parameter that a plan of layers could miss: found, or refused, never left out."""

from __future__ import annotations

import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdu.fisher import FisherAccumulator, fisher_diagonal

CLASSES = 3


def looped(model, x, y):
    """The definition, sample by sample, in the model's own dtype."""
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(y)):
        loss = F.cross_entropy(model(x[i : i + 1].clone()), y[i : i + 1])
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for total, g in zip(totals.values(), found, strict=True):
            if g is not None:
                total += g.detach() ** 2 / len(y)
    return totals


def assert_equals_the_loop(model, x, y, **options):
    found = fisher_diagonal(model, (x, y), progress=False, **options)
    for name, expected in looped(model, x, y).items():
        scale = float(expected.abs().max())
        assert torch.allclose(found[name], expected, rtol=1e-9, atol=1e-12 * (scale + 1)), name


class Module(nn.Module):
    """A forward given as a function of the module and x."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self._forward(self, x)


def double(shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parameter(*shape):
    return nn.Parameter(double(shape, 7))


def linear(*sizes, **options):
    torch.manual_seed(1)
    return nn.Linear(*sizes, **options).double()


def images(n=6):
    return double((n, 4)), torch.arange(n) % CLASSES


@pytest.mark.filterwarnings("ignore:fisher_diagonal")
@pytest.mark.parametrize(
    "model",
    [
        Module(
            lambda m, x: (x @ m.w).detach() * 0.1 + torch.einsum("bi,io->bo", x, m.w),
            w=parameter(4, 3),
        ),
        Module(lambda m, x: m.head(_masked(m, x)), one=linear(4, 4), head=linear(4, 3)),
        Module(
            lambda m, x: m.head(_added_to_a_view(m, x)),
            l=linear(4, 4),
            p=parameter(3),
            head=linear(4, 3),
        ),
        Module(
            lambda m, x: m.head(x.view(-1, 1, 2, 2).add(m.p).flatten(1)),
            p=parameter(1, 1, 2, 2),
            head=linear(4, 3),
        ),
        Module(
            lambda m, x: m.head(x.view(-1, 1, 2, 2).mul(m.p).flatten(1)),
            p=parameter(1, 1, 2, 2),
            head=linear(4, 3),
        ),
        Module(
            lambda m, x: m.head(torch.add(x, 2.0) + torch.mm(x, mat2=m.w)),
            w=parameter(4, 4),
            head=linear(4, 3),
        ),
        Module(
            lambda m, x: m.head(m.p.expand(size=(len(x), 4)) * x), p=parameter(4), head=linear(4, 3)
        ),
        Module(
            lambda m, x: m.head(x + m.p.repeat(repeats=(len(x), 1))),
            p=parameter(4),
            head=linear(4, 3),
        ),
        Module(lambda m, x: F.linear(x, m.w, m.b), w=parameter(3, 4), b=parameter(1)),
        Module(
            lambda m, x: m.head(_preprocessed(x) * m.p.exp()), p=parameter(4), head=linear(4, 3)
        ),
        Module(
            lambda m, x: _base_and_view(m, x), l=linear(4, 4), p=parameter(3), head=linear(4, 3)
        ),
    ],
    ids=[
        "no effect",
        "no grad",
        "view",
        "image +",
        "image *",
        "keywords",
        "expand",
        "repeat",
        "bias",
        "in place",
        "base and view",
    ],
)
def test_a_use_that_no_rule_fits_is_not_left_out(model):
    x, y = images()
    before = x.clone()
    assert_equals_the_loop(model, x, y, batch_size=4)
    assert torch.equal(x, before)


def _silently(h, mixed):
    """h, with the slope of what is mixed."""
    return h + (mixed - mixed.detach())


def _base_and_view(m, x):
    h = F.gelu(m.l(x))
    v = h[:, 1:]
    v += m.p
    return m.head(h + v.sum(1, keepdim=True))


def _masked(m, x):
    with torch.no_grad():
        gate = m.one(x).sigmoid()
    return gate * torch.einsum("bi,oi->bo", x, m.one.weight) + m.one.bias


def _added_to_a_view(m, x):
    h = F.gelu(m.l(x))
    h[:, 1:].add_(m.p)
    return h


def _preprocessed(x):
    return x.sub_(0.5).div_(0.25)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.l(x - 0.5 * x.mean(0)),
        lambda m, x: m.l(x / x.abs().max()),
        lambda m, x: m.head(m.first(x) - 0.5 * m.first(x).mean(0).detach()),
        lambda m, x: m.head(m.first(x).cumsum(0)),
        lambda m, x: m.head(m.first(x).flip(0).cumsum(0).flip(0)),
        lambda m, x: m.head(_silently(m.first(x), m.first(x).cumsum(0))),
        lambda m, x: m.head(_silently(m.first(x), m.first(x).flip(0).cumsum(0).flip(0))),
    ],
    ids=["input", "scale", "detached", "before", "after", "slope of before", "slope of after"],
)
def test_samples_that_reach_each_other_are_refused(forward):
    x, y = images()
    model = Module(forward, l=linear(4, 3), first=linear(4, 4), head=linear(4, 3))
    with pytest.raises(ValueError, match=r"^model: expected samples that do not depend on"):
        fisher_diagonal(model, (x, y), progress=False)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.einsum("bi,oi->bo", x, m.l.weight) if len(x) > 2 else m.l(x),
        lambda m, x: x @ m.l.weight.T + m.l.bias if len(x) > 2 else m.l(x),
        lambda m, x: F.linear(x, m.l.weight * 1.0, m.l.bias) if len(x) > 2 else m.l(x),
    ],
    ids=["einsum", "transposed", "scaled"],
)
def test_a_use_that_begins_in_a_later_batch_is_refused(forward):
    x, y = images()
    model = Module(forward, l=linear(4, 3))
    with pytest.raises(RuntimeError, match=r"^l\.weight: expected the uses of the first batch"):
        fisher_diagonal(model, (x, y), progress=False)


def test_a_backward_of_the_model_itself_adds_nothing():
    def forward(m, x):
        with torch.enable_grad():
            h = m.first(x)
            deeper = m.l(h)
            (slope,) = torch.autograd.grad(deeper.square().sum(), h, retain_graph=True)
        return m.head(deeper * slope.detach().sigmoid())

    x, y = images()
    model = Module(forward, first=linear(4, 4), l=linear(4, 4), head=linear(4, 3))
    assert_equals_the_loop(model, x, y)


def test_a_loss_with_parameters_of_its_own_is_refused():
    x, y = images()
    model = linear(4, 3)

    def penalised(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none") + model.weight.square().sum()

    with pytest.raises(ValueError, match=r"^loss: expected a function of logits and y alone"):
        fisher_diagonal(model, (x, y), loss=penalised, progress=False)


@pytest.mark.filterwarnings("ignore:fisher_diagonal")
def test_a_shared_table_pads_where_its_layer_pads():
    torch.manual_seed(0)
    first, second = nn.Embedding(5, 4, padding_idx=0).double(), nn.Embedding(5, 4).double()
    with torch.no_grad():
        second.weight.copy_(torch.randn(5, 4))
    first.weight = second.weight
    model = Module(
        lambda m, x: m.head((m.a(x) + m.b(x)).sum(1)), a=first, b=second, head=linear(4, 3)
    )
    x = torch.tensor([[0, 1, 2], [0, 0, 3], [4, 1, 1]])
    assert_equals_the_loop(model, x, torch.arange(3))


@pytest.mark.filterwarnings("ignore:fisher_diagonal")
@pytest.mark.parametrize("extra", [False, True])
def test_positions_without_samples_in_any_batch(extra):
    torch.manual_seed(0)

    def forward(m, x):
        places = m.pos(torch.arange(x.shape[1]))
        return m.head((m.tok(x) + (places.unsqueeze(0) if extra else places)).mean(1))

    parts = {"tok": nn.Embedding(6, 4).double(), "pos": nn.Embedding(5, 4).double()}
    model = Module(forward, **parts, head=linear(4, 3))
    long, short = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1], [3], [5]])
    accumulator = FisherAccumulator(model)
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x in (long, short):
        y = torch.arange(len(x))
        accumulator.add(x, y)
        for name, value in looped(model, x, y).items():
            totals[name] += value * len(x) / 5
    for name, value in accumulator.diagonal().items():
        assert torch.allclose(value, totals[name], rtol=1e-9, atol=1e-14), name


# What becomes of an accumulator.


def test_a_model_that_goes_into_training_is_refused_in_every_batch():
    x, y = images()
    model = nn.Sequential(linear(4, 4), nn.BatchNorm1d(4).double(), linear(4, 3)).eval()
    accumulator = FisherAccumulator(model)
    accumulator.add(x, y)
    model.train()
    with pytest.raises(ValueError, match=r"BatchNorm1d '1' .*call model\.eval\(\) first"):
        accumulator.add(x, y)


def test_a_parameter_that_was_replaced_is_refused():
    x, y = images()
    model = nn.Sequential(linear(4, 4), linear(4, 3))
    accumulator = FisherAccumulator(model)
    accumulator.add(x, y)
    model[1] = linear(4, 3)
    with pytest.raises(RuntimeError, match=r"^1\.weight: expected the same parameter"):
        accumulator.add(x, y)


@pytest.mark.filterwarnings("ignore:fisher_diagonal")
def test_values_that_were_exchanged_are_seen_by_every_path():
    x, y = images()
    model = Module(lambda m, x: m.l(x * m.p.exp()), p=parameter(4), l=linear(4, 3))
    accumulator = FisherAccumulator(model)
    accumulator.add(x, y)
    expected = looped(model, x, y)
    model.p.data = double((4,), 3)
    accumulator.add(x, y)
    for name, value in looped(model, x, y).items():
        expected[name] = (expected[name] + value) / 2
    for name, value in accumulator.diagonal().items():
        assert torch.allclose(value, expected[name], rtol=1e-9), name


class Failing(nn.Module):
    """Fails in the backward of a batch, once told to."""

    def __init__(self):
        super().__init__()
        self.error = None

    def forward(self, x):
        y = x * 1.0
        if y.requires_grad:
            y.register_hook(self._gradient)
        return y

    def _gradient(self, _):
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def test_a_batch_that_failed_half_way_is_not_used(tmp_path):
    x, y = images()
    failing = Failing()
    model = nn.Sequential(linear(4, 4), failing, linear(4, 3))
    accumulator = FisherAccumulator(model)
    accumulator.add(x, y)
    accumulator.save(tmp_path / "sums")
    failing.error = MemoryError("no more")
    with pytest.raises(MemoryError):
        accumulator.add(x, y)
    assert (accumulator.samples, accumulator.rows) == (6, 6)
    for use in (lambda: accumulator.add(x, y), accumulator.diagonal):
        with pytest.raises(RuntimeError, match=r"^accumulator: expected whole batches"):
            use()
    accumulator.load(tmp_path / "sums")
    for name, value in accumulator.diagonal().items():
        assert torch.allclose(value, looped(model, x, y)[name])


def test_labels_that_are_refused_leave_the_accumulator_as_it_was():
    x, y = images()
    model = linear(4, 3)
    accumulator = FisherAccumulator(model)
    accumulator.add(x, y)
    with pytest.raises(ValueError, match="expected labels"):
        accumulator.add(x, y + 5)
    assert (accumulator.samples, accumulator.rows) == (6, 6)
    assert torch.allclose(accumulator.diagonal()["weight"], looped(model, x, y)["weight"])


def test_a_signal_within_a_batch_does_not_spoil_the_file(tmp_path, monkeypatch):
    from bdu.fisher import diagonal

    monkeypatch.setattr(diagonal, "_SAVE_EVERY", 0.0)
    x, y = images(8)
    failing = Failing()
    model = nn.Sequential(linear(4, 4), failing, linear(4, 3))
    file = tmp_path / "sums"
    options = {"batch_size": 2, "progress": False, "resume": file}
    whole = fisher_diagonal(model, (x, y), batch_size=2, progress=False)
    looks = []

    def loader():
        for start in range(0, 8, 2):
            if start == 6 and not looks:
                looks.append(start)
                failing.error = KeyboardInterrupt()
            yield x[start : start + 2], y[start : start + 2]

    with pytest.raises(KeyboardInterrupt):
        fisher_diagonal(model, loader(), **options)
    resumed = fisher_diagonal(model, loader(), **options)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert signal.getsignal(signal.SIGINT) is not None


def test_a_file_of_more_samples_than_wanted_is_refused(tmp_path):
    x, y = images()
    model = linear(4, 3)
    accumulator = FisherAccumulator(model)
    accumulator.add(x, y)
    accumulator.save(tmp_path / "sums")
    with pytest.raises(ValueError, match=r"^resume: expected at most 4 rows in .*, got 6"):
        fisher_diagonal(model, (x, y), samples=4, resume=tmp_path / "sums", progress=False)


def test_another_body_is_another_computation(tmp_path):
    x, y = images()
    model = nn.Sequential(linear(4, 4), nn.BatchNorm1d(4).double(), linear(4, 3)).eval()
    options = {"parameters": ["2.weight"]}
    accumulator = FisherAccumulator(model, **options)
    accumulator.add(x, y)
    accumulator.save(tmp_path / "sums")
    model[1].running_mean += 1.0
    with pytest.raises(
        ValueError, match="expected the sums of this computation, got another model"
    ):
        FisherAccumulator(model, **options).load(tmp_path / "sums")


def test_drawn_labels_of_tokens_do_not_depend_on_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5)).double()
    x, y = torch.randint(6, (6, 3)), torch.zeros(6, 3, dtype=torch.long)
    found = [
        fisher_diagonal(
            model, (x, y), labels="model", sample="token", batch_size=size, progress=False
        )
        for size in (1, 2, 6)
    ]
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.allclose(value, other[name], rtol=1e-9), name


def test_another_default_dtype_leaves_no_trace():
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    model = nn.Linear(4, 3)
    torch.set_default_dtype(torch.float64)
    try:
        fisher_diagonal(model, (x, y), progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    fisher_diagonal(model, (x, y), progress=False)
