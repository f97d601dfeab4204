"""Defences that know no trigger: one course for all, and each one's formula on small cases."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from bdu import metrics
from bdu.attacks import make_attack, poison
from bdu.attacks.reactivation import reactivate
from bdu.attacks.trigger import triggered_like
from bdu.cli.demo import digits
from bdu.data import as_unit_float, split_indices
from bdu.defenses import (
    bi_bau,
    classwise,
    course,
    finetuning,
    fst,
    i_bau,
    inversion,
    pam,
    sau,
    tbar,
    tsbd,
    ulrl,
)
from bdu.defenses.classwise import Found
from bdu.defenses.course import (
    Course,
    Distilled,
    Running,
    Shared,
    check_numbers,
    logit_spread,
    read_options,
)
from bdu.defenses.head import deviations, head_of, row_changes
from bdu.defenses.inversion import Inversion, Inverted, TriggerOperator, invert_trigger
from bdu.defenses.protocol import DefenderData, Samples
from bdu.models import build
from bdu.trainer import METHODS, SETTINGS, unlearn
from bdu.training import fit

TARGET = 0
METHOD_MODULES = (finetuning, ulrl, fst, tsbd, i_bau, sau, pam, tbar, bi_bau)
TINY = {
    "fine-tuning": {"epochs": 3},
    "ulrl": {"unlearn_epochs": 2, "relearn_epochs": 2, "unlearned_accuracy": 0.0},
    "fst": {"epochs": 3, "clean_accuracy_floor": 0.0},
    "tsbd": {"unlearn_epochs": 2, "epochs": 2, "unlearned_accuracy": 0.0},
    "i-bau": {"rounds": 2},
    "sau": {"epochs": 2, "inner_steps": 2},
    "pam": {"rounds": 2, "epochs": 1, "inversion_steps": 8},
    "tbar": {"epochs": 2, "inversion_steps": 8},
    "bi-bau": {"rounds": 2, "epochs": 1, "inversion_steps": 8},
}
NAMES = sorted(TINY)


class Interrupted(Exception):
    pass


class Planted:
    """A backdoored model and what its defender and its evaluator hold."""

    def __init__(self) -> None:
        data = digits()
        x, y = torch.from_numpy(data["x"])[:, None], torch.from_numpy(data["y"])
        attacker, clean, evaluator = split_indices(y, [1000, 250, 500], 0)
        self.trigger = make_attack("badnets")
        bad = poison(
            x[attacker], y[attacker], self.trigger, rate=0.1, target=TARGET, num_classes=10, seed=0
        )
        self.model = build("smallcnn", num_classes=10, in_channels=1, seed=0)
        fit(
            *(self.model, bad.x, bad.y),
            epochs=8,
            lr=0.1,
            batch_size=64,
            augment=False,
            seed=0,
            progress=False,
        )
        self.clean = x[clean], y[clean]
        self.evaluator = x[evaluator], y[evaluator]

    def rates(self, model):
        return metrics.evaluate(
            model, *self.evaluator, num_classes=10, trigger=self.trigger, target=TARGET
        )

    def unlearn(self, method, **options):
        given = {"clean": self.clean, "seed": 0, "progress": False, **TINY[method], **options}
        return unlearn(given.pop("model", self.model), method=method, **given)

    def data(self):
        return DefenderData.split(self.clean, None, seed=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def planted():
    return Planted()


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_every_method_is_at_the_front_door():
    assert set(METHODS) == {"balanced", "auto", *(module.NAME for module in METHOD_MODULES)}
    assert set(SETTINGS) == set(METHODS)
    assert set(TINY) == set(METHODS) - {"balanced", "auto"}


# The course, seen through every method.


@pytest.mark.filterwarnings("ignore:ulrl")
@pytest.mark.parametrize("method", NAMES)
def test_channels_last_weights_are_cleaned_alike(planted, method):
    model = copy.deepcopy(planted.model).to(memory_format=torch.channels_last)
    assert any(not p.is_contiguous() for p in model.parameters())
    rates = [
        planted.rates(planted.unlearn(method, model=m).model)["clean_accuracy"]
        for m in (planted.model, model)
    ]
    assert abs(rates[0] - rates[1]) < 0.1  # sums are of another order


@pytest.mark.filterwarnings("ignore:ulrl")
@pytest.mark.parametrize("method", NAMES)
def test_the_model_passed_in_is_left_untouched_and_the_copy_moves(planted, method):
    before, flags = weights(planted.model), [m.training for m in planted.model.modules()]
    state = torch.get_rng_state()
    result = planted.unlearn(method)
    assert differing(before, weights(planted.model)) == []
    assert [m.training for m in planted.model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.grad is not None for p in result.model.parameters())
    assert not result.model.training
    if method != "tbar":  # which may find that no step is worth its price
        assert differing(before, weights(result.model))
    assert result.method == method
    assert result.history[0]["phase"] == "before"
    assert all(math.isfinite(line["validation_clean_accuracy"]) for line in result.history)
    steps = [line["step"] for line in result.history]
    assert steps == sorted(steps)


@pytest.mark.filterwarnings("ignore:ulrl")
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("method", NAMES)
def test_a_resumed_run_gives_bit_for_bit_the_weights_of_a_whole_one(
    planted, tmp_path, method, anchored
):
    options = {"anchored": anchored, "gamma": 0.0, "fisher_samples": 50}
    whole = planted.unlearn(method, **options)
    stop_at = 2 if len(whole.history) > 3 else 1
    file = tmp_path / "state.pt"
    looks = []

    def stop(line, _):
        looks.append(line)
        if len(looks) == stop_at + 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        planted.unlearn(method, callbacks=[stop], state_file=file, **options)
    resumed = planted.unlearn(method, state_file=file, resume=True, **options)
    assert differing(weights(whole.model), weights(resumed.model)) == []
    assert resumed.history == whole.history
    assert resumed.stopped == whole.stopped


@pytest.mark.filterwarnings("ignore:ulrl")
@pytest.mark.parametrize("method", ["fine-tuning", "tsbd", "sau"])
def test_a_strong_anchor_holds_the_weights(planted, method):
    def moved(**options):
        model = planted.unlearn(method, **options).model
        pairs = zip(planted.model.parameters(), model.parameters(), strict=True)
        return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))

    free = moved()
    held = moved(anchored=True, gamma=0.0, ewc_lambda=1e6)
    assert held < 0.7 * free


@pytest.mark.parametrize("method", ["fst", "ulrl"])
def test_no_anchor_holds_the_rows_that_are_made_afresh(planted, method):
    options = {"anchored": True, "gamma": 0.0, "ewc_lambda": 1e9, "fisher_samples": 50}
    if method == "ulrl":
        options |= {"least": 1, "threshold": 100.0}
    cleaned = planted.unlearn(method, clean_accuracy_floor=0.0, **options).model
    held = planted.model.features[0].weight
    torch.testing.assert_close(cleaned.features[0].weight, held, rtol=0, atol=1e-4)
    for before, after in zip(planted.model.fc.parameters(), cleaned.fc.parameters(), strict=True):
        assert float((after - before).detach().abs().max()) > 0.01


@pytest.mark.parametrize("method", ["pam", "tbar"])
def test_an_anchored_run_inverts_the_suspect_model_once(planted, monkeypatch, method):
    inverted = []

    def look(models, *arguments, **more):
        inverted.append(models)
        return invert_trigger(models, *arguments, **more)

    for module in (course, pam):
        monkeypatch.setattr(module, "invert_trigger", look)
    options = {**TINY[method], "inversion_steps": Inversion().steps, "rounds": 1}
    if method == "tbar":
        del options["rounds"]
    planted.unlearn(method, anchored=True, fisher_samples=50, **options)
    assert len(inverted) == 1


def test_tsbd_asks_the_suspect_model_once_a_batch(planted, monkeypatch):
    asked = []
    suspect_logits = Course.suspect_logits

    def count(*arguments):
        asked.append(1)
        return suspect_logits(*arguments)

    monkeypatch.setattr(Course, "suspect_logits", count)
    planted.unlearn("tsbd", distillation=0.5, epochs=2, batch_size=100)
    assert len(asked) == 2 * 2  # epochs, batches of 200 samples


def test_other_settings_or_another_model_are_not_resumed(planted, tmp_path):
    file = tmp_path / "state.pt"
    planted.unlearn("fine-tuning", state_file=file)
    with pytest.raises(ValueError, match=r"^lr: expected 0\.01, as in the run to be resumed, got"):
        planted.unlearn("fine-tuning", state_file=file, resume=True, lr=0.02)
    with pytest.raises(ValueError, match=r"^method: expected 'fine-tuning'"):
        planted.unlearn("sau", state_file=file, resume=True)
    other = copy.deepcopy(planted.model)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(ValueError, match=r"^model and data: expected"):
        planted.unlearn("fine-tuning", model=other, state_file=file, resume=True)
    with pytest.raises(ValueError, match="state_file: expected a path to resume from, got None"):
        planted.unlearn("fine-tuning", resume=True)


def test_a_collapse_ends_the_run_with_the_best_weights_seen(planted):
    result = planted.unlearn("fine-tuning", lr=100.0, epochs=4)
    assert "stopped at step" in result.stopped
    assert "kept the weights of step" in result.stopped
    rates = planted.rates(result.model)
    assert rates["clean_accuracy"] > 0.9


def larger_logits(model, factor):
    """A copy whose logits are so many times as large."""
    copied = copy.deepcopy(model)
    head = copied.get_submodule(head_of(model, torch.zeros(1, 1, 8, 8)))
    with torch.no_grad():
        head.weight.mul_(factor)
        head.bias.mul_(factor)
    return copied


@pytest.mark.parametrize("method", ["fine-tuning", "fst", "ulrl", "bi-bau", "auto"])
def test_large_logits_are_brought_to_the_spread_asked_for_and_back(planted, method):
    own = {"bi-bau": {"reference_epochs": 40, "rounds": 1}, "auto": {"inversion_steps": 8}}
    given = {**TINY.get(method, {}), **own.get(method, {})}
    given["logit_spread"] = 1.5 * logit_spread(planted.model, planted.data().clean)
    usual, large = (
        unlearn(model, method=method, clean=planted.clean, seed=0, progress=False, **given).model
        for model in (planted.model, larger_logits(planted.model, 16.0))
    )
    # factors of two change no digit, so neither does any step in between
    assert not differing(larger_logits(usual, 16.0).state_dict(), large.state_dict())


def test_logits_are_scaled_by_a_power_of_two_to_at_most_the_spread(planted):
    data = planted.data()
    spread = logit_spread(planted.model, data.clean)
    suspect = copy.deepcopy(planted.model).eval()
    for share, factor in ((1.01, 1.0), (0.99, 0.5), (0.3, 0.25)):
        settings = Shared(logit_spread=share * spread)
        course = Course("x", planted.model, data, settings, Running(0, progress=False))
        images = as_unit_float(data.clean.x)
        for model in (course.before, course.student):
            torch.testing.assert_close(model(images), factor * suspect(images))
        result = course.result().model
        assert not differing(result.state_dict(), planted.model.state_dict())


def test_a_gradient_that_is_not_finite_ends_the_run(planted):
    images = planted.clean[0]
    model = copy.deepcopy(planted.model)
    course = Course(
        "test",
        model,
        planted.data(),
        Shared(),
        Running(seed=0, progress=False),
    )
    optimizer = course.sgd(0.1)
    for _ in course.stage("one", 3, optimizer):
        loss = course.student(images[:8].float() / 16).sum() * math.inf
        course.step(optimizer, loss)
    result = course.result()
    assert result.stopped.startswith("stopped at step 1: ")
    assert differing(weights(model), weights(result.model)) == []


def test_batches_hold_every_sample_once_and_never_one_alone(planted):
    course = Course("test", planted.model, planted.data(), Shared(), Running(0, progress=False))
    clean = course.data.clean.at(torch.arange(33))
    sizes = [len(batch) for batch in course.batches(clean, 16)]
    assert sizes == [16, 17]
    seen = torch.cat([batch.y for batch in course.batches(clean, 16)])
    assert torch.equal(seen.sort().values, clean.y.sort().values)


def test_what_goes_onto_images_moves_with_them(planted):
    course = Course("tests", planted.model, planted.data(), Shared(mirror=True), Running(seed=0))
    x = torch.rand(50, 1, 8, 8)
    images, triggered = course.alike(x, torch.cat([x, 1 - x], 1))
    assert triggered.shape == (50, 2, 8, 8)
    assert torch.equal(torch.cat([images, 1 - images], 1), triggered)
    assert not torch.equal(images, x)
    (left,) = Course(
        "tests", planted.model, planted.data(), Shared(augment=False), Running(seed=0)
    ).alike(x)
    assert left is x


def test_the_clean_loss_is_cross_entropy_and_divergence_from_the_suspect(planted):
    course = Course("x", planted.model, planted.data(), Distilled(), Running(0, progress=False))
    images, y = as_unit_float(planted.clean[0][:6]), planted.clean[1][:6]
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = (planted.model.eval()(images).double() / 2).softmax(1)
    q = (logits.double() / 2).softmax(1)
    entropy = -logits.double().log_softmax(1)[torch.arange(6), y].mean()
    divergence = 4 * (p * (p / q).log()).sum(1).mean()
    for share in (0.0, 0.25, 1.0):
        wanted = (1 - share) * entropy + share * divergence
        found = course.clean_loss(logits, images, y, share)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["fine-tuning", "ulrl", "fst", "tsbd", "bi-bau", "i-bau", "pam"])
@pytest.mark.filterwarnings("ignore:ulrl")
def test_distillation_holds_the_student_to_what_the_suspect_says(planted, method):
    more = {"bi-bau": {"adversarial_weight": 0.0}, "pam": {"epochs": 30, "rho": 0.0}}.get(
        method, {}
    )
    plain, held = (
        planted.unlearn(method, distillation=share, augment=False, **more) for share in (0.0, 1.0)
    )
    images = as_unit_float(planted.data().clean.x)
    with torch.no_grad():
        suspect = planted.model.eval()(images).softmax(1)
        away = [(r.model(images).softmax(1) - suspect).abs().mean() for r in (plain, held)]
    assert away[1] < away[0]


def test_what_was_made_once_is_not_made_again(planted):
    course = Course("test", planted.model, planted.data(), Shared(), Running(0, progress=False))
    made = [course.once("name", lambda: torch.rand(3)) for _ in range(2)]
    assert made[0] is made[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs: expected a whole number >= 1, got 0"),
        ({"epochs": 1.5}, "epochs: expected a whole number >= 1, got 1.5"),
        ({"lr": 0.0}, "lr: expected a number > 0, got 0.0"),
        ({"lr": math.nan}, "lr: expected a number > 0, got nan"),
        ({"momentum": -1.0}, r"momentum: expected a number in \[0, 1\), got -1.0"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay: expected a number >= 0, got -1.0"),
        ({"clean_accuracy_floor": 2.0}, "clean_accuracy_floor: expected a share in"),
        ({"logit_spread": 0.0}, "logit_spread: expected a number > 0, got 0.0"),
        ({"speed": 3}, "speed: expected one of "),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        read_options(finetuning.Settings, {"seed": 0, **given})


def test_ulrl_refuses_other_neurons(planted):
    with pytest.raises(ValueError, match=r"^neurons: expected last or all, got 'some'"):
        planted.unlearn("ulrl", neurons="some")


def test_check_numbers_takes_no_flag_for_a_count():
    with pytest.raises(ValueError, match=r"^epochs: "):
        check_numbers(finetuning.Settings(epochs=True), counts=("epochs",))


# The last layer.


class Odd(nn.Module):
    """Its last layer is a 1x1 convolution, and it has a linear layer of the same width before."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.Linear(10, 10)
        self.classify = nn.Conv2d(10, 10, 1)
        self.unused = nn.Linear(3, 10)

    def forward(self, x):
        hidden = self.squeeze(x.flatten(1)[:, :10])
        return self.classify(hidden[:, :, None, None]).flatten(1)


def test_the_head_is_the_layer_that_is_called_last():
    assert head_of(Odd(), torch.rand(2, 1, 4, 4)) == "classify"
    model = build("resnet18-w2", num_classes=10, in_channels=3, seed=0)
    assert head_of(model, torch.rand(2, 3, 16, 16)) == "fc"


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"^model: expected a final layer of 48 outputs, got none"):
        head_of(nn.Flatten(), torch.rand(2, 3, 4, 4))


def test_deviations_by_hand():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])
    expected = (scores - 3.0) / (1.4826 * 1.0)
    assert torch.allclose(deviations(scores), expected)
    # of two the median is between them: neither stands out, however near they are
    assert torch.allclose(
        deviations(torch.tensor([1.0, 1.0001])).abs(), torch.tensor(0.6745), atol=1e-3
    )
    assert deviations(torch.tensor([1.0, 2.0, 9.0], dtype=torch.bfloat16))[2] > 3.5
    # half of them equal: the spread is 0, and only what differs stands out
    scores = torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert deviations(scores)[:3].tolist() == [0, 0, 0]
    assert deviations(scores)[3] > 3.5


def test_row_changes_by_hand():
    before, after = torch.zeros(2, 2, 1), torch.tensor([[[1.0], [-2.0]], [[0.0], [0.5]]])
    assert row_changes(before, after).tolist() == [3.0, 0.5]


# Each method's formula.


def test_ulrl_starts_over_from_the_suspect_model_with_fresh_rows(planted, monkeypatch):
    seen = {}

    def stop(course, name, rows):
        seen[name] = rows
        ulrl_reinitialise(course, name, rows)
        weight = course.student.get_parameter(name)
        original = course.before.get_parameter(name)
        others = [r for r in range(len(weight)) if r not in rows.tolist()]
        assert torch.equal(weight[others], original[others])
        assert float(weight[rows].abs().max()) <= math.sqrt(2 / weight[0].numel())
        assert not torch.equal(weight[rows], original[rows])

    ulrl_reinitialise = ulrl._reinitialise
    monkeypatch.setattr(ulrl, "_reinitialise", stop)
    planted.unlearn("ulrl", threshold=0.5, most=2)
    (rows,) = seen.values()
    assert 1 <= len(rows) <= 2


def test_ulrl_scores_all_layers_when_asked(planted, monkeypatch):
    names = []
    monkeypatch.setattr(ulrl, "_reinitialise", lambda course, name, rows: names.append(name))
    planted.unlearn("ulrl", neurons="all", threshold=0.5)
    assert len(names) > 1


def test_ulrl_takes_the_rows_that_stand_out_most_where_it_is_told_to(planted):
    head = head_of(planted.model, torch.rand(1, 1, 8, 8)) + ".weight"
    before = dict(planted.model.named_parameters())[head]
    course = Course("ulrl", planted.model, planted.data(), ulrl.Settings(), Running(0))
    with torch.no_grad():
        moved = torch.arange(10.0)
        moved[[3, 7]] = torch.tensor([11.0, 12.0])
        course.student.get_parameter(head).copy_(before + moved[:, None])
    for least, rows in ((0, None), (1, [7]), (2, [3, 7])):
        found = ulrl._suspicious(course, ulrl.Settings(least=least, threshold=100.0))
        assert (found[head].tolist() if rows else found) == (rows or {})


@pytest.mark.parametrize("neurons", ["last", "all"])
def test_ulrl_keeps_the_length_of_the_rows_it_makes_anew(planted, monkeypatch, neurons):
    options = {"neurons": neurons, "least": 1, "threshold": 2.0, "relearn_epochs": 2}
    chosen = {}

    def note(course, name, rows):
        chosen[name] = rows
        reinitialise(course, name, rows)

    reinitialise = ulrl._reinitialise
    monkeypatch.setattr(ulrl, "_reinitialise", note)
    kept, free = (
        dict(planted.unlearn("ulrl", keep_length=keep, **options).model.named_parameters())
        for keep in (True, False)
    )
    for name, rows in chosen.items():
        before = planted.model.get_parameter(name).flatten(1)
        usual = float(before.norm(dim=1).median())
        lengths = kept[name][rows].flatten(1).norm(dim=1).tolist()
        assert lengths == pytest.approx([usual] * len(rows), rel=1e-5)
        assert free[name][rows].flatten(1).norm(dim=1).tolist() != pytest.approx(lengths, rel=1e-2)
        towards = functional.cosine_similarity(
            kept[name][rows].flatten(1), planted.model.get_parameter(name)[rows].flatten(1)
        )
        assert neurons == "all" or float(towards.max()) < 0.2


def test_ulrl_says_so_where_nothing_stands_out(planted):
    with pytest.warns(UserWarning, match="no neuron stands out"):
        planted.unlearn("ulrl", threshold=1e9)


def test_fst_keeps_the_norm_of_the_head(planted):
    result = planted.unlearn("fst")
    head = head_of(planted.model, torch.rand(1, 1, 8, 8)) + ".weight"
    before, after = (dict(m.named_parameters())[head] for m in (planted.model, result.model))
    assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-5)
    cosine = functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
    assert float(cosine) < 0.9


def test_tsbd_zeroes_the_weights_that_changed_most():
    course = Course(
        "test",
        build("smallcnn", num_classes=10, in_channels=1, seed=0),
        Planted.data(_small()),
        tsbd.Settings(),
        Running(0, progress=False),
    )
    settings = tsbd.Settings(neuron_share=0.05, weight_share=0.5)
    name = next(n for n, p in course.named_parameters() if p.dim() == 4)
    with torch.no_grad():
        weight = course.student.get_parameter(name)
        weight[1] += torch.arange(1.0, weight[1].numel() + 1).view_as(weight[1])
    layers = tsbd.prunable_layers(course.before.requires_grad_(), course.data)
    places = tsbd._most_changed(course, layers, settings)
    own = places[name]
    assert (own[:, 0] == 1).all()  # of the second neuron only
    most = torch.tensor(weight.shape) - 1
    most[0] = 1
    assert (own == most).all(1).any()  # and what changed most there
    assert len(own) >= weight[0].numel() // 2


def test_tsbd_has_all_its_epochs_to_learn_what_it_zeroed(planted):
    shares = {"neuron_share": 1.0, "weight_share": 1.0}
    result = planted.unlearn("tsbd", lr=1e-9, epochs=3, **shares)
    tuned = [line for line in result.history if line["phase"] == "tune"]
    assert len(tuned) == 3
    assert "clean accuracy on the validation split fell to" in result.stopped
    assert "; kept the weights of step 0, the model as it was" in result.stopped


class _small:
    """Random images for a defender."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(60, 1, 8, 8, generator=generator)
        self.clean = x, torch.arange(60) % 10


def test_the_hypergradient_of_i_bau_is_that_of_unrolled_fixed_point_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Softplus(), nn.Linear(8, 3)).double()
    x, y = torch.rand(10, 3, 2, 2, dtype=torch.float64), torch.arange(10) % 3

    class Student:
        student = model
        generator = torch.Generator().manual_seed(0)

        @staticmethod
        def named_parameters():
            return list(model.named_parameters())

        @staticmethod
        def images(samples):
            return samples.x

        @staticmethod
        def clean_loss(logits, images, y, distillation, *, moved):
            assert distillation == 0
            assert moved.sum() == 3
            return functional.cross_entropy(logits, y)

    samples = Samples(x, y)
    settings = i_bau.Settings(fixed_point_steps=4, perturbed_share=0.3)
    delta = 0.1 * torch.rand(1, 3, 2, 2, dtype=torch.float64)
    images = i_bau.as_unit_float
    i_bau.as_unit_float = lambda t: t  # keeps float64
    try:
        i_bau._hypergradient(Student, delta, samples, samples, settings)
        found = [p.grad.clone() for p in model.parameters()]
        chosen = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:3]
        mask = torch.zeros(10, 1, 1, 1, dtype=torch.float64)
        mask[chosen] = 1
        parameters = list(model.parameters())
        delta = delta.requires_grad_()
        outer = functional.cross_entropy(model(x + mask * delta), y)
        slope, *direct = torch.autograd.grad(outer, [delta, *parameters])
        assert (model(x).argmax(1) != y).any()  # the labels, not what the model says
        inner = i_bau._inner(model, x, y, delta)
        (inner_slope,) = torch.autograd.grad(inner, delta, create_graph=True)
        mapped = (delta - 0.1 * inner_slope).flatten()
        rows = [torch.autograd.grad(m, delta, retain_graph=True)[0].flatten() for m in mapped]
        jacobian = torch.stack(rows)
        vector = torch.zeros_like(slope.flatten())
        for _ in range(settings.fixed_point_steps):
            vector = jacobian.T @ vector + slope.flatten()
        implicit = torch.autograd.grad(mapped, parameters, vector)
    finally:
        i_bau.as_unit_float = images
    for own, one, other in zip(found, direct, implicit, strict=True):
        assert torch.allclose(own, one + other, rtol=1e-9, atol=1e-12)


def test_jensen_shannon_by_hand():
    torch.manual_seed(0)
    one, other = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    p, q = one.softmax(1), other.softmax(1)
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2
    assert torch.allclose(sau._jensen_shannon(one, other), expected)
    assert torch.allclose(sau._jensen_shannon(one, one), torch.zeros(4).double(), atol=1e-12)


def test_the_shared_loss_of_sau_falls_with_the_wrong_class():
    high, low = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    wrong = torch.tensor([0])
    assert sau._unshared(high, wrong) > sau._unshared(low, wrong)
    p = float(high.softmax(1)[0, 0])
    first = math.log(1e-6 + min(1 - p, 0.999))
    second = math.log(1 + 1e-6 - max(p, 0.001))
    assert float(sau._unshared(high, wrong)) == pytest.approx(-(first + second) / 2, rel=1e-5)


def test_shared_examples_stay_within_their_radius(planted):
    settings = sau.Settings(radius=0.1, inner_lr=0.1, inner_steps=3)
    course = Course("sau", planted.model, planted.data(), settings, Running(0, progress=False))
    images = course.data.clean.x[:16].float() / 16
    called = (planted.model(images).argmax(1),) * 2
    moved = sau._shared_examples(course, images, course.data.clean.y[:16], called, settings)
    assert float((moved - images).abs().max()) <= 0.1 + 1e-6


def test_images_that_a_model_misses_are_not_fooled_by_that(planted):
    settings = sau.Settings(inner_steps=1, beta_shared=0.0)
    course = Course("sau", planted.model, planted.data(), settings, Running(0, progress=False))
    images = course.data.clean.x[:16].float() / 255
    called = course.student(images + settings.radius).argmax(1)  # as if δ changed none yet
    moved = sau._shared_examples(course, images, (called + 1) % 10, (called, called), settings)
    assert ((moved - images) < settings.radius / 2).flatten(1).any(1).all()


def test_pam_looks_from_rho_away_and_comes_back():
    parameters = [torch.zeros(3), torch.zeros(2)]
    suspect = [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([4.0, 0.0])]
    with pam._towards(parameters, suspect, 0.5):
        assert parameters[0].tolist() == pytest.approx([0.3, 0, 0])
        assert parameters[1].tolist() == pytest.approx([0.4, 0])
    assert all(not p.any() for p in parameters)
    with pam._towards(suspect, suspect, 0.5):  # at the first step there is no direction
        assert suspect[0].tolist() == [3.0, 0.0, 0.0]


def test_tbar_goes_the_other_way_on_the_line(planted):
    result = planted.unlearn("tbar", largest_alpha=0.5, accuracy_margin=1.0)
    (alpha,) = [line["alpha"] for line in result.history if "alpha" in line]
    assert alpha == 0.5
    learned = planted.unlearn("tbar", largest_alpha=1e-9, accuracy_margin=1.0)
    assert alpha > learned.history[-1]["alpha"]


# The inversion.


def test_the_operator_starts_near_the_identity_and_stays_within_the_images():
    operator = TriggerOperator((3, 9, 7), seed=1)
    x = torch.rand(2, 3, 9, 7)
    assert float((operator(x) - x).abs().mean()) < 0.1
    with torch.no_grad():
        operator.addend.fill_(5.0)
    moved = operator(x)
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1


def test_an_inversion_survives_being_saved(planted):
    clean = planted.data().clean
    found = invert_trigger(planted.model, clean, seed=0, settings=Inversion(steps=5, width=4))
    again = Inverted.from_state(found.state())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(found.operator(x), again.operator(x))
    assert torch.equal(found.targets, again.targets)
    same = invert_trigger(planted.model, clean, seed=0, settings=Inversion(steps=5, width=4))
    assert torch.equal(found.operator.addend, same.operator.addend)


def test_an_inversion_leaves_the_gradients_of_its_models_alone(planted):
    model = copy.deepcopy(planted.model).requires_grad_()
    invert_trigger(model, planted.data().clean, seed=0, settings=Inversion(steps=2, width=4))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("gap", [10.0, 60.0])
def test_no_confidence_makes_the_class_itself_a_target(gap):
    prior = inversion._Prior(torch.full((4,), 0.25))
    y = torch.arange(4)
    weights = prior.weights(torch.log_softmax(gap * torch.eye(4), 1), y)
    assert float(weights.diagonal().max()) == 0
    torch.testing.assert_close(weights.sum(1), torch.ones(4))


def test_the_prior_gathers_on_what_is_seen_and_never_on_the_class_itself():
    prior = inversion._Prior(torch.full((4,), 0.25))
    y = torch.arange(4)
    logs = torch.full((4, 4), 0.01)
    logs[:, 2] = 0.97
    for _ in range(200):
        prior.update(prior.weights(logs.log(), y), y)
    targets = prior.targets()
    assert torch.allclose(targets.sum(1), torch.ones(4), atol=1e-5)
    assert targets.diagonal().tolist() == [0] * 4
    assert targets[[0, 1, 3], 2].min() > 0.8


class OnePixel(nn.Module):
    """Ten classes by which of ten pixels is bright, but a little of the first means class 3."""

    def forward(self, x):
        plain = 20 * x[:, 0, 2].flatten(1)[:, :10]
        return plain + 100 * functional.one_hot(torch.tensor(3), 10) * x[:, 0, 0, :1]


def test_the_inversion_finds_the_planted_target_and_place():
    y = torch.arange(200) % 10
    x = torch.zeros(200, 1, 12, 12)
    x[torch.arange(200), 0, 2, y] = 0.8
    model = OnePixel().eval()
    clean = Samples(x, y)
    found = invert_trigger(model, clean, seed=0, settings=Inversion(width=4))
    images, called = found.samples(model, clean)
    assert images.shape[1:] == (1, 12, 12)
    assert float((called == 3).float().mean()) > 0.9
    assert float(found.targets[y.unique() != 3, 3].min()) > 0.8
    moved = (found.operator(x) - x).abs().mean((0, 1))
    assert moved.argmax() == 0


def test_bi_bau_inverts_every_class_against_a_copy_that_fst_made(planted, monkeypatch):
    seen = []
    joint, every_class = bi_bau.invert_trigger, bi_bau.invert_every_class

    def look_joint(models, clean, **more):
        seen.append((list(models), None))
        return joint(models, clean, **more)

    def look_classwise(model, reference, clean, **more):
        seen.append(([model], reference))
        return every_class(model, reference, clean, **more)

    monkeypatch.setattr(bi_bau, "invert_trigger", look_joint)
    monkeypatch.setattr(bi_bau, "invert_every_class", look_classwise)
    planted.unlearn("bi-bau")
    assert [(len(models), reference) for models, reference in seen] == [(1, None), (2, None)]
    planted.unlearn("bi-bau", reference_epochs=40, rounds=1)
    models, reference = seen[2]
    assert differing(models[0].state_dict(), reference.state_dict())
    own = build("smallcnn", num_classes=10, in_channels=1, seed=1).eval()
    given = {**TINY["bi-bau"], "rounds": 1, "reference": own}
    bi_bau.run(planted.model, planted.data(), seed=0, progress=False, **given)
    assert seen[3][1] is own
    with pytest.warns(UserWarning, match="bi-bau: inverting without a reference"):
        planted.unlearn("bi-bau", reference_epochs=1, rounds=1)
    assert seen[4][1] is None


def test_bi_bau_trains_on_what_fools_the_suspect_model_and_not_its_copy():
    class Brighter(nn.Module):
        def forward(self, x, rows):
            return x + 0.5, rows.float()

    def called(above, inside, outside):
        def forward(x):
            labels = torch.where(x[:, 0, 0, 0] > above, inside, outside)
            return functional.one_hot(labels, 4).float()

        return forward

    images = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1, 1)
    y = torch.tensor([0, 0, 0, 3])
    targets = torch.tensor([3, classwise.NEXT])
    found = Found({"one": Brighter()}, targets, torch.tensor([[1.0, 1.0]]), torch.ones(1, 2))
    course = SimpleNamespace(before=called(0.65, 3, 0), generator=torch.Generator())
    settings = bi_bau.Settings(inner_steps=0)
    none, learnt, copy_ = torch.tensor([], dtype=torch.int64), torch.tensor([3]), called(0.75, 2, 0)
    for reference, exempt, wanted in (
        (None, None, [1, 2]),
        (copy_, none, [1]),
        (copy_, learnt, [1, 2]),
        (copy_, torch.tensor([1]), [1]),
    ):
        moved, kept = bi_bau._examples(course, found, images, y, settings, reference, exempt)
        torch.testing.assert_close(moved, images + 0.5)
        assert kept.tolist() == wanted


@pytest.mark.parametrize(
    ("deficit", "options", "expected"),
    [(3.0, {}, 0.2), (3.0, {"pattern_size": 0.0}, None), (2.9, {}, None)],
)
def test_bi_bau_adds_random_patterns_where_a_class_was_learnt_by_its_trigger(
    planted, monkeypatch, deficit, options, expected
):
    seen = []

    def look(images, size, generator):
        seen.append((len(images), size))
        return 1 - images

    monkeypatch.setattr(bi_bau, "deficits", lambda _, targets: deficit * (targets == 3).float())
    monkeypatch.setattr(bi_bau, "with_random_patterns", look)
    own = build("smallcnn", num_classes=10, in_channels=1, seed=1).eval()
    given = {**TINY["bi-bau"], "rounds": 1, "batch_size": 64, "share": 0.5, "augment": False}
    given |= {"reference": own, "seed": 0, "progress": False, **options}
    looked = bi_bau.run(planted.model, planted.data(), **given)
    batches = [] if expected is None else [32, 32, 32, 4]
    assert seen == [(count, expected) for count in batches]
    monkeypatch.setattr(bi_bau, "with_random_patterns", lambda images, *_: images)
    other = bi_bau.run(planted.model, planted.data(), **given)
    changed = differing(looked.model.state_dict(), other.model.state_dict())
    assert bool(changed) == (expected is not None)


# What is done to a removal.


def test_reactivation_stays_within_its_radius_and_leaves_the_models_alone(planted):
    models = [copy.deepcopy(planted.model).eval() for _ in range(3)]
    before = [weights(m) for m in models]
    x, y = (part[:60] for part in planted.clean)
    options = {"epochs": 2, "radius": 0.05, "seed": 0}
    moved = reactivate(*models, x, y, triggered_like(x, planted.trigger), y, **options)
    images = as_unit_float(x)
    offset = moved(images) - images
    assert 0 < float(offset.abs().max()) <= 0.05 + 1e-6
    assert all(differing(one, weights(m)) == [] for one, m in zip(before, models, strict=True))
    assert not any(p.grad is not None for m in models for p in m.parameters())
    for model in models:
        model.train()
    again = reactivate(*models, x, y, triggered_like(x, planted.trigger), y, **options)
    assert torch.equal(moved(images), again(images))
    assert all(model.training for model in models)


def test_reactivation_names_what_does_not_fit(planted):
    x, y = (part[:10] for part in planted.clean)
    with pytest.raises(ValueError, match=r"^y_true: expected 10 labels, got 9"):
        reactivate(*[planted.model] * 3, x, y, x, y[:9], seed=0)
    with pytest.raises(ValueError, match=r"^y_clean: expected labels below 10, got 1\d"):
        reactivate(*[planted.model] * 3, x, y + 10, x, y, seed=0)
    with pytest.raises(ValueError, match=r"^radius: expected a positive number, got nan"):
        reactivate(*[planted.model] * 3, x, y, x, y, radius=float("nan"), seed=0)
    with pytest.raises(ValueError, match=r"^x_triggered: expected images \(1, 8, 8\)"):
        reactivate(*[planted.model] * 3, x, y, x[:, :, :4], y, seed=0)
    for name, value in (("lr", math.nan), ("weight", math.nan), ("epochs", -3), ("batch_size", 0)):
        with pytest.raises(ValueError, match=rf"^{name}: expected a .*, got {value}"):
            reactivate(*[planted.model] * 3, x, y, x, y, seed=0, **{name: value})


def test_reactivation_takes_models_that_return_more_than_logits(planted):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(planted.model).eval()

        def forward(self, x):
            return {"logits": self.inner(x)}

    x, y = (part[:40] for part in planted.clean)
    options = {"epochs": 1, "seed": 0}
    bare = reactivate(*[planted.model.eval()] * 3, x, y, x, y, **options)
    wrapped = reactivate(*[Wrapped() for _ in range(3)], x, y, x, y, **options)
    assert torch.equal(bare(as_unit_float(x)), wrapped(as_unit_float(x)))


def test_the_path_begins_at_the_model_and_ends_at_the_other(planted):
    other = build("smallcnn", num_classes=10, in_channels=1, seed=5).eval()
    x, y = planted.evaluator
    options = {"trigger": planted.trigger, "target": TARGET, "num_classes": 10}
    rates = metrics.path_success_rates(planted.model, other, x, y, points=3, **options)
    ends = [
        metrics.evaluate(m, x, y, **options)["attack_success_rate"] for m in (planted.model, other)
    ]
    assert [rates[0], rates[-1]] == ends
    half = copy.deepcopy(planted.model)
    with torch.no_grad():
        pairs = zip(half.state_dict().values(), other.state_dict().values(), strict=True)
        for one, two in pairs:
            if one.is_floating_point():
                one.copy_((one.double() / 2 + two.double() / 2).float())
    middle = metrics.evaluate(half, x, y, **options)["attack_success_rate"]
    assert rates[1] == pytest.approx(middle, abs=2 / len(y))
    with pytest.raises(ValueError, match=r"^points: expected at least 2, got 1"):
        metrics.path_success_rates(planted.model, other, x, y, points=1, **options)
    with pytest.raises(ValueError, match=r"^towards: expected the tensors of model"):
        metrics.path_success_rates(planted.model, Odd(), x, y, **options)
