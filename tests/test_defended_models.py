"""Which models the defences take, and what they keep of classes that no clean sample shows."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bdu.defenses import course as course_module
from bdu.defenses import tsbd
from bdu.defenses.course import Course, Running, Shared, fingerprint, logit_spread
from bdu.defenses.head import head_of
from bdu.defenses.protocol import DefenderData
from bdu.models import Normalize
from bdu.trainer import unlearn

CLASSES = 4
QUICK = {
    "fine-tuning": {"epochs": 3},
    "fst": {"epochs": 3, "clean_accuracy_floor": 0.0},
    "ulrl": {"unlearn_epochs": 2, "relearn_epochs": 2, "unlearned_accuracy": 0.0, "least": 1},
    "tsbd": {"unlearn_epochs": 2, "epochs": 2, "unlearned_accuracy": 0.0},
    "i-bau": {"rounds": 1},
    "pam": {"rounds": 1, "epochs": 2, "inversion_steps": 8},
    "bi-bau": {"rounds": 1, "epochs": 1, "inversion_steps": 8, "reference_epochs": 1},
    "tbar": {},
    "balanced": {},
    "auto": {"steps": 10, "inversion_steps": 8},
}


def images(count=120):
    """(N, 1, 8, 8) of four classes: which quarter is bright."""
    generator = torch.Generator().manual_seed(0)
    x, y = 0.5 * torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % CLASSES
    for quarter in range(CLASSES):
        row, column = 4 * (quarter // 2), 4 * (quarter % 2)
        x[y == quarter, :, row : row + 4, column : column + 4] += 0.5
    return x, y


def network(*end):
    torch.manual_seed(0)
    end = end or (nn.Linear(16, CLASSES),)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), *end)


def taught(model):
    x, y = images()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def clean(method, model, **more):
    options = {"progress": False, "clean": images(), **QUICK[method], **more}
    return unlearn(model, method=method, **options)


class Tied(nn.Module):
    """Whose last layer is its hidden one again."""

    def __init__(self):
        super().__init__()
        self.first, self.hidden, self.last = (nn.Linear(n, CLASSES) for n in (64, CLASSES, CLASSES))
        self.last.weight = self.hidden.weight

    def forward(self, x):
        return self.last(self.hidden(self.first(x.flatten(1)).relu()).relu())


class Gated(nn.Module):
    """Whose last linear layer only gates the logits."""

    def __init__(self):
        super().__init__()
        self.features, self.gate = nn.Linear(64, 8), nn.Linear(8, CLASSES)
        self.classes = nn.Parameter(torch.randn(CLASSES, 8))

    def forward(self, x):
        hidden = self.features(x.flatten(1))
        return torch.sigmoid(self.gate(hidden)) * (hidden @ self.classes.T)


class Attentive(nn.Module):
    """Fused attention over the rows of an image."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x):
        rows = x[:, 0] + self.place
        return self.last(self.attention(rows, rows, rows, need_weights=False)[0].mean(1))


def computed():
    return network(nn.utils.parametrizations.weight_norm(nn.Linear(16, CLASSES)))


@pytest.mark.parametrize(
    "end",
    [
        (nn.Linear(16, CLASSES),),
        (nn.Linear(16, CLASSES, bias=False),),
        (nn.Linear(16, CLASSES), nn.LogSoftmax(1)),
        (nn.Unflatten(1, (16, 1, 1)), nn.Conv2d(16, CLASSES, 1), nn.ReLU(), nn.Flatten()),
    ],
)
def test_the_last_layer_is_found(end):
    model = network(*end)
    name = head_of(model, images()[0])
    assert len(model.get_submodule(name).weight) == CLASSES


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Tied, r"a weight of its own, got last sharing it \(hidden.weight, last.weight\)"),
        (Gated, "logits in proportion to the final layer, got others from gate"),
        (lambda: network(nn.Linear(16, CLASSES), nn.Softmax(1)), "logits in proportion"),
        (computed, "a weight of its own, got 3 with a computed one"),
        (lambda: network(nn.Linear(16, 3), nn.ConstantPad1d((0, 1), 0.0)), "4 outputs, got none"),
    ],
)
@pytest.mark.parametrize("method", ["auto", "fst", "ulrl", "bi-bau"])
def test_a_last_layer_that_cannot_be_made_afresh_is_refused(make, message, method, tmp_path):
    with pytest.raises(ValueError, match="^model: expected .*" + message):
        clean(method, make(), state_file=tmp_path / "state.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["auto", "fst", "ulrl", "bi-bau"])
def test_a_frozen_last_layer_is_refused_where_its_rows_are_made_afresh(method):
    model = network()
    model[3].requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model: expected a final layer to train.*got 3.weight"):
        clean(method, model)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("method", sorted(QUICK))
def test_models_that_no_method_can_train_are_refused(method):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"calls": 1}

        def set_extra_state(self, state):
            pass

    for model, message in (
        (network().requires_grad_(False), "parameters to train, got all of them frozen"),
        (
            network(Extra(16, CLASSES)),
            "tensors alone in its state dict, got 3._extra_state, a dict",
        ),
        (torch.jit.trace(network(), images()[0]), "a plain nn.Module, got a ScriptModule"),
    ):
        with pytest.raises(ValueError, match="^model: expected " + message):
            clean(method, model)


def test_scaled_logits_are_those_of_the_model_given():
    model, (x, _) = taught(network()), images()
    data = DefenderData.split(images(), None, seed=0, device=torch.device("cpu"))
    spread = logit_spread(model, data.clean) / 10
    course = Course("test", model, data, Shared(logit_spread=spread), Running(0, progress=False))
    with torch.no_grad():
        factor = course.before(x) / model(x)
    assert float(factor.std()) < 1e-6
    assert spread / 2 < logit_spread(course.before, data.clean) <= spread


def test_a_model_with_fused_attention_is_cleaned_by_i_bau_and_keeps_its_places_under_tsbd():
    model = taught(Attentive())
    with torch.no_grad():
        model.place += 1.0
    assert clean("i-bau", model).stopped == "ran all its steps"
    cleaned = clean("tsbd", model, neuron_share=1.0, weight_share=1.0).model
    assert int((cleaned.place == 0).sum()) == 0


def test_tsbd_needs_a_layer_before_the_last():
    with pytest.raises(
        ValueError, match=r"^model: expected convolutions or linear layers to train"
    ):
        clean("tsbd", nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)))


def test_tsbd_ends_where_its_first_step_is_not_finite():
    class Normed(nn.Module):
        def forward(self, x):
            return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-6)  # no slope at 0

    model = network(Normed(), nn.Linear(16, CLASSES))
    model[2] = nn.Identity()
    model[1].bias.data.zero_()
    x, y = images()
    course = unlearn(model, method="tsbd", clean=(x * 0, y), progress=False)
    assert course.stopped != "ran all its steps"


@pytest.mark.parametrize("method", ["fine-tuning", "fst", "i-bau", "pam"])
def test_classes_that_no_clean_sample_shows_are_kept(method):
    model, (x, y) = taught(network()), images()
    some = y > 1
    own = {"i-bau": {"rounds": 60, "lr": 0.01}, "pam": {"rounds": 1, "epochs": 20}}
    more = own.get(method, {"epochs": 20})
    with pytest.warns(UserWarning, match="has no sample of 2 of the model's 4 classes"):
        cleaned = clean(method, model, clean=(x[some], y[some]), **more).model
    right = cleaned(x).argmax(1) == y
    assert float(right[some].float().mean()) > 0.9
    assert float(right[~some].float().mean()) > 0.9


def test_the_clean_loss_of_the_balanced_method_does_not_push_down_what_no_clean_sample_shows():
    model, (x, y) = taught(network()), images()
    some = y > 1
    alone = {"distillation": 0.0, "triggered_weight": 0.0, "ewc_lambda": 0.0}
    with pytest.warns(UserWarning, match="no sample of 2"):
        cleaned = clean(
            *("balanced", model),
            clean=(x[some], y[some]),
            triggered=(x[y > 2], torch.full_like(y[y > 2], 2)),
            **alone,
        ).model
    moved = (cleaned[-1].weight - model[-1].weight).detach().abs().sum(1)
    assert moved[:2].tolist() == [0, 0]
    assert (moved[2:] > 0).all()


def test_fst_leaves_rows_of_classes_that_no_clean_sample_shows_as_long_as_they_were():
    model, (x, y) = taught(network()), images()
    some = y > 1
    with pytest.warns(UserWarning, match="no sample of 2"):
        cleaned = clean("fst", model, clean=(x[some], y[some]), lr=1e-6).model
    before, after = model[-1].weight[:2], cleaned[-1].weight[:2]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fresh_bias", [True, False])
def test_fst_makes_the_bias_afresh_unless_told_otherwise(fresh_bias):
    model = taught(network())
    with torch.no_grad():
        model[-1].bias.add_(7.0)  # the same for every class: no logit tells another story
    cleaned = clean("fst", model, fresh_bias=fresh_bias).model
    assert (float(cleaned[-1].bias.detach().mean()) < 1) == fresh_bias


@pytest.mark.parametrize("method", ["tsbd", "balanced"])
def test_a_parameter_that_the_output_does_not_use_does_no_harm(method):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = network(), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    model = Idle()
    before = model.idle.weight.detach().clone()
    more = {}
    if method == "balanced":
        x, y = images(40)
        more = {"triggered": (x[y > 0], 0 * y[y > 0]), "unlearn_steps": 3, "recovery_steps": 2}
        more |= {"fisher_samples": 10}
    cleaned = clean(method, model, **more).model
    torch.testing.assert_close(cleaned.idle.weight.detach(), before, rtol=1e-3, atol=0)  # decayed


def test_moved_images_may_be_called_classes_that_no_clean_sample_shows():
    x, y = images()
    data = DefenderData.split((x[y > 0], y[y > 0]), None, seed=0, device=torch.device("cpu"))
    course = Course("test", network(), data, Shared(), Running(0, progress=False))
    logits, own = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([2])
    for moved, among in ((None, logits[:, 1:]), (torch.tensor([True]), logits)):
        loss = course.clean_loss(logits, x[:1], own, 0.0, moved=moved)
        torch.testing.assert_close(loss, among.logsumexp(1)[0] - logits[0, 2])


def test_what_a_run_kept_goes_back_to_its_device():
    kept = {"operator": {"weight": torch.ones(2)}, "targets": [torch.ones(3), 0.5], "name": "x"}
    moved = course_module._onto(kept, torch.device("meta"))
    assert moved["operator"]["weight"].is_meta
    assert moved["targets"][0].is_meta
    assert (moved["targets"][1], moved["name"]) == (0.5, "x")


def test_a_run_is_another_where_layers_labels_or_what_is_trained_differ():
    data = DefenderData.split(images(), images(), seed=0, device=torch.device("cpu"))
    model = network()
    own = fingerprint(model, data)
    assert own == fingerprint(copy.deepcopy(model), data)
    other = copy.deepcopy(model)
    other[2] = nn.GELU()
    assert own != fingerprint(other, data)
    frozen = copy.deepcopy(model)
    frozen[1].bias.requires_grad_(False)
    assert own != fingerprint(frozen, data)
    x, y = images()
    named = [
        DefenderData.split(images(), (x, y, z), seed=0, device=y.device) for z in (y, (y + 1) % 4)
    ]
    assert fingerprint(model, named[0]) != fingerprint(model, named[1])


def test_a_run_is_another_where_what_has_no_weights_differs():
    data = DefenderData.split(images(), None, seed=0, device=torch.device("cpu"))
    end = nn.Linear(16, CLASSES)
    models = [network(end, nn.Dropout(p)) for p in (0.1, 0.9)]
    for mean in (0.4, 0.5):
        models.append(network(end, nn.Dropout(0.1)))
        models[-1].register_forward_pre_hook(Normalize([mean], [0.2]))
    assert len({fingerprint(model, data) for model in models}) == 4


@pytest.mark.filterwarnings("ignore:clean. has no sample")
def test_auto_does_not_judge_classes_that_no_clean_sample_shows():
    model, (x, y) = taught(network()), images()
    some = y != 1
    result = clean("auto", model, clean=(x[some], y[some]), inversion_steps=30)
    assert result.stopped.endswith(
        "; no clean sample shows class 1, whose triggers were not looked for"
    )


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bi-bau", {"inner_steps": 1.5}, "inner_steps: expected a whole number, got 1.5"),
        ("ulrl", {"least": 1.5}, "least: expected a whole number, got 1.5"),
        ("fst", {"seed": None}, "seed: expected a whole number .*, got None"),
        ("fst", {"seed": 1.5}, "seed: expected a whole number .*, got 1.5"),
        ("fst", {"seed": 2**64}, "seed: expected a whole number .*, got 18446744073709551616"),
        ("fst", {"seed": -1}, "seed: expected a whole number .*, got -1"),
        ("fst", {"device": "cuda:99"}, "device: expected c.* got cuda:99"),
        ("fst", {"device": "mps"}, r"device: expected cpu or cuda, got mps \(untested\)"),
    ],
)
def test_numbers_and_devices_that_cannot_be_are_refused(method, options, message):
    with pytest.raises(ValueError, match="^" + message):
        clean(method, network(), **options)


def test_numbers_of_numpy_are_taken(tmp_path):
    state = tmp_path / "state.pt"
    options = {"epochs": np.int64(2), "lr": np.float32(0.25), "seed": np.int64(3)}
    one = clean("fine-tuning", network(), state_file=state, **options)
    other = clean("fine-tuning", network(), epochs=2, lr=0.25, seed=3)
    assert one.settings == other.settings
    assert torch.equal(one.model[1].weight, other.model[1].weight)
    clean("fine-tuning", network(), state_file=state, resume=True, **options)


def test_tbar_takes_less_where_the_most_overflows():
    result = clean("tbar", taught(network()), largest_alpha=1e30, epochs=1, inversion_steps=4)
    assert result.stopped == "ran all its steps"


def test_auto_leaves_the_callers_random_numbers_alone():
    before = torch.get_rng_state()
    clean("auto", taught(network()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:ulrl. no neuron")
@pytest.mark.parametrize("method", ["fst", "ulrl", "tsbd", "auto"])
def test_a_spectral_norm_in_training_mode_is_left_as_it_is(method):
    model = taught(network(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES)))
    nn.utils.parametrizations.spectral_norm(model[1])
    before = copy.deepcopy(model.train().state_dict())
    clean(method, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Restless(nn.Module):
    """Counts its calls, and draws in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return functional.dropout(x, 0.1)


@pytest.mark.parametrize("method", ["fine-tuning", "fst"])
def test_a_model_that_counts_and_draws_is_left_as_it_is(method):
    model = nn.Sequential(network(nn.Linear(16, CLASSES)), nn.Identity())
    model[0].insert(2, Restless())
    state = torch.random.get_rng_state()
    # fst may find that the logits, drawn anew, are no multiple of its layer
    with contextlib.suppress(ValueError):
        clean(method, model)
    assert float(model[0][2].calls) == 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weights_that_are_not_there_yet_are_refused():
    with pytest.raises(ValueError, match=r"^model: expected weights, got 3.weight uninitialised"):
        clean("fine-tuning", network(nn.LazyLinear(CLASSES)))


@pytest.mark.filterwarnings("ignore:ulrl. no neuron")
@pytest.mark.parametrize("method", ["fst", "ulrl"])
def test_a_frozen_bias_of_the_last_layer_stays(method):
    model = taught(network())
    model[3].bias.requires_grad_(False)
    more = {"logit_spread": None, **({"fresh_bias": True} if method == "fst" else {})}
    cleaned = clean(method, model, **more).model
    assert torch.equal(cleaned[3].bias, model[3].bias)
    assert not torch.equal(cleaned[3].weight, model[3].weight)


@pytest.mark.parametrize("method", sorted(QUICK))
def test_a_single_output_is_refused(method, tmp_path):
    x, y = images()
    with pytest.raises(ValueError, match=r"^model: expected logits of at least 2 classes, got 1"):
        clean(
            *(method, network(nn.Linear(16, 1))),
            clean=(x, 0 * y),
            triggered=(x, 0 * y),
            state_file=tmp_path / "state.pt",
        )


@pytest.mark.parametrize("method", sorted(QUICK))
def test_a_state_file_that_is_there_is_not_written_over(method, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"^state_file: expected a new file, or resume"):
        clean(method, network(), triggered=images(), state_file=file)
    assert file.read_text() == "mine"
    with pytest.raises(ValueError, match=r"^state_file: expected a file, got .*, a folder"):
        clean(method, network(), triggered=images(), state_file=tmp_path)


@pytest.mark.filterwarnings("ignore:clean. has no sample")
def test_auto_takes_images_of_one_class_alone():
    model, (x, y) = taught(network()), images()
    some = y == 0
    result = clean("auto", model, clean=(x[some], y[some]), threshold=0.0)
    assert "chose" in result.stopped


@pytest.mark.parametrize("share", ["neuron_share", "weight_share"])
def test_tsbd_sets_nothing_to_zero_where_it_is_to_take_no_share(share, monkeypatch):
    found = []
    most_changed = tsbd._most_changed

    def kept(*arguments):
        found.append(most_changed(*arguments))
        return found[-1]

    monkeypatch.setattr(tsbd, "_most_changed", kept)
    clean("tsbd", taught(network()), **{share: 0.0})
    clean("tsbd", taught(network()))
    assert found[0] == {}
    assert found[1] != {}


def test_balanced_tells_callbacks_that_can_be_read_once_and_leaves_no_gradients():
    model, (x, y) = taught(network()), images()
    seen = []
    result = clean(
        *("balanced", model),
        triggered=(x, (y + 1) % CLASSES),
        callbacks=iter([lambda line, _: seen.append(line["step"])]),
        unlearn_steps=4,
        recovery_steps=2,
        evaluate_every=2,
    )
    assert seen == [0, 2, 4, 6]
    assert all(parameter.grad is None for parameter in result.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"triggered": (*images(), images()[1])}, "triggered: expected y_true to be what"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"lr": 0.0}, "lr: expected a number > 0, got 0.0"),
        ({"clean": (*images(), images()[1])}, r"clean: expected \(x, y\), got three tensors"),
    ],
)
def test_what_balanced_would_refuse_later_is_refused_first(options, message):
    called = []
    with pytest.raises(ValueError, match="^" + message):
        clean(
            *("balanced", network()),
            **{"triggered": images(), **options},
            callbacks=[lambda line, _: called.append(line)],
        )
    assert called == []


@pytest.mark.parametrize("method", ["fine-tuning", "tsbd"])
def test_a_layer_that_cannot_be_scaled_is_refused_where_it_would_have_to_be(method):
    more = {"logit_spread": 1e-3}
    with pytest.raises(
        ValueError, match=r"^model: expected a final layer with a weight of its own"
    ):
        clean(method, Tied(), **more)
    assert clean("fine-tuning", Tied()).stopped == "ran all its steps"
