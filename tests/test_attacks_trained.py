"""Attacks that train something: by the commands, through a file, and along with the classifier."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from bdu.attacks import ATTACKS, InputAware, LabelConsistent, TrojanNN, load_attack
from bdu.attacks.input_aware import TriggerNet, mask_of, pattern_of, ratio
from bdu.attacks.trigger import own_generator
from bdu.attacks.trojannn import inputs_of, last_linear
from bdu.checkpoint import load_state_dict
from bdu.cli import main
from bdu.data import as_unit_float, load_images, save_npz
from bdu.models import build
from bdu.runs import RunDirectory
from bdu.training import fit

CLASSES = 3
QUICK = {
    "low-frequency": ("steps=3", "frequencies=3"),
    "trojannn": ("steps=3", "size=3"),
    "label-consistent": ("steps=2",),
    "input-aware": ("mask_steps=3", "width=4"),
    "ftrojan": ("window=8", "frequencies=[[3, 3], [7, 7]]", "magnitude=0.5"),
    "wanet": ("strength=2", "cover_ratio=1"),
}
SURROGATE = ("low-frequency", "trojannn", "label-consistent")
SAVED = ("low-frequency", "trojannn", "input-aware")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    generator = np.random.default_rng(0)
    y = np.arange(300) % CLASSES
    x = generator.integers(0, 90, (300, 8, 8, 1), dtype=np.uint8)
    file = tmp_path_factory.mktemp("data") / "images.npz"
    save_npz(file, x=x + (80 * y).astype(np.uint8)[:, None, None, None], y=y)
    return file


def command(data, out, name, *more):
    settings = [part for value in QUICK.get(name, ()) for part in ("--set", value)]
    return [
        *("poison", "--data", str(data), "--model", "smallcnn", "--attack", name, "--target", "1"),
        *("--rate", "0.1", "--epochs", "2", "--batch-size", "32", "--quiet", "--device", "cpu"),
        *("--defender-clean", "0.1", "--defender-triggered", "0.1", "--out", str(out)),
        *settings,
        *(str(m) for m in more),
    ]


@pytest.fixture(scope="module", params=sorted(set(ATTACKS) - {"badnets", "blended"}))
def planted(request, data, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    assert main(command(data, out, request.param)) == 0
    return request.param, out


def test_poison_runs_every_attack_and_keeps_what_it_made(planted):
    name, out = planted
    assert (out / "trigger.safetensors").exists() == (name in SAVED)
    assert (out / "surrogate.safetensors").exists() == (name in SURROGATE)
    assert not list(out.glob("*.pt"))
    record = json.loads((out / "attack.json").read_text())
    assert record["trigger"]["name"] == name
    for setting in QUICK.get(name, ()):
        key, _, value = setting.partition("=")
        assert record["trigger"][key] == json.loads(value)
    if name in SAVED:
        assert record["trigger"]["file"] == "trigger.safetensors"


def test_attack_json_records_what_was_changed(planted):
    name, out = planted
    record = json.loads((out / "attack.json").read_text())
    assert record["clean_label"] == (name in ("sig", "label-consistent"))
    if name == "input-aware":  # every batch has its own
        assert record["poisoned_indices"] is record["cover_indices"] is None
        return
    count = len(record["poisoned_indices"])
    assert count == round(0.1 * 300 * 0.8 * 0.78)
    assert len(record["cover_indices"]) == count * record["trigger"].get("cover_ratio", 0)
    assert not set(record["poisoned_indices"]) & set(record["cover_indices"])


def test_evaluate_finds_the_trigger_from_anywhere(planted, tmp_path, monkeypatch):
    _, out = planted
    monkeypatch.chdir(tmp_path)
    arguments = [
        *("evaluate", "--model", "smallcnn", "--checkpoint", str(out / "model.safetensors")),
        *("--data", str(out / "evaluator.npz"), "--attack", str(out / "attack.json")),
        *("--device", "cpu", "--out", "rates.json"),
    ]
    assert main(arguments) == 0
    rates = json.loads((tmp_path / "rates.json").read_text())
    after = json.loads((out / "metrics.json").read_text())["after"]
    assert {key: rates[key] for key in after} == after


def test_defenders_triggered_images_carry_the_trigger(planted):
    _, out = planted
    trigger = load_attack(out / "attack.json")
    shown = load_images(out / "defender_triggered.npz")
    assert set(shown.y.tolist()) == {1}
    with np.load(out / "defender_triggered.npz") as arrays:
        assert 1 not in arrays["y_true"]
    whole = load_images(out / "evaluator.npz").x
    assert not torch.equal(trigger(as_unit_float(whole)), as_unit_float(whole))


@pytest.mark.parametrize("name", ["trojannn", "label-consistent", "input-aware", "wanet"])
def test_interrupted_run_resumes_to_the_same_weights(data, tmp_path, name):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main(command(data, whole, name)) == 0
    write = RunDirectory.write_lines

    def stop(self, written):
        write(self, written)
        if len(written) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "write_lines", stop)
        assert main(command(data, out, name)) == 130
    assert main(command(data, out, name, "--resume")) == 0
    for file in ("model.safetensors", *(["trigger.safetensors"] if name in SAVED else [])):
        one, other = load_state_dict(whole / file), load_state_dict(out / file)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (whole / "attack.json").read_text() == (out / "attack.json").read_text()


@pytest.mark.parametrize("name", ["trojannn", "label-consistent"])
def test_surrogate_may_be_given(data, tmp_path, name):
    first, out = tmp_path / "first", tmp_path / "run"
    assert main(command(data, first, name)) == 0
    given = ("--surrogate", first / "surrogate.safetensors")
    assert main(command(data, out, name, *given)) == 0
    assert not (out / "surrogate.safetensors").exists()
    one, other = (load_state_dict(run / "model.safetensors") for run in (first, out))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_trigger_of_another_run_is_used_as_it_is(data, planted, tmp_path, monkeypatch):
    name, first = planted

    def refuse(*_, **__):
        raise AssertionError("a surrogate was trained")

    if name != "label-consistent":  # which plants with the help of one
        monkeypatch.setattr("bdu.cli.poison._surrogate", refuse)
    out = tmp_path / "again"
    assert main(command(data, out, str(first / "attack.json"))) == 0
    made, used = (load_attack(run / "attack.json") for run in (first, out))
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(made(x), used(x))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("wanet", ("--set", "speed=2"), r"speed: expected one of .*strength \(wanet\)"),
        ("wanet", ("--set", "strength=far"), "strength: expected a number above 0, got 'far'"),
        ("wanet", ("--set", "strength"), "--set: expected NAME=VALUE"),
        ("adaptive-blend", ("--alpha", "0.2", "--set", "alpha=0.3"), "--set: expected alpha once"),
        ("trojannn", ("--rate", "0.9"), "rate: expected at most 0.66"),
        ("label-consistent", ("--target", "all-to-all"), "target: expected one class"),
        ("input-aware", ("--rate", "2"), r"rate: expected a share in \[0, 1\]"),
        ("trojannn", ("--set", "size=9"), "trigger: expected at most 8x8"),
        ("low-frequency", ("--set", "frequencies=9"), "frequencies: expected at most 8 for images"),
        ("wanet", ("--set", "cover_ratio=1e308"), "cover_ratio: expected a number at least 0"),
        ("trojannn", ("--surrogate", "nowhere.pt"), "--surrogate: path: expected a checkpoint"),
    ],
)
def test_what_cannot_be_planted_is_refused_before_any_training(
    data, tmp_path, capsys, monkeypatch, name, more, message
):
    monkeypatch.setattr("bdu.cli.poison.fit", None)
    out = tmp_path / "run"
    assert main(command(data, out, name, *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("bdu poison: ")
    assert re.search(message, error), error
    assert not out.exists()


def test_files_that_do_not_fit_are_refused_before_any_training(
    data, planted, tmp_path, capsys, monkeypatch
):
    name, first = planted
    if name not in SAVED:
        return
    monkeypatch.setattr("bdu.cli.poison.fit", None)
    out = tmp_path / "run"
    colour = tmp_path / "colour.npz"
    save_npz(colour, x=np.zeros((300, 8, 8, 3), np.uint8), y=np.arange(300) % CLASSES)
    assert main(command(colour, out, str(first / "attack.json"))) == 1
    assert "x: expected 1 channels, got 3" in capsys.readouterr().err
    if name in SURROGATE:
        weights = first / "trigger.safetensors"
        assert main(command(data, out, name, "--surrogate", weights)) == 1
        assert re.search("--surrogate: .*expected the weights of", capsys.readouterr().err)
    assert not out.exists()


def test_settings_beside_an_attack_json_are_refused(data, planted, tmp_path, capsys):
    _, first = planted
    file = str(first / "attack.json")
    assert main(command(data, tmp_path / "run", file, "--set", "delta=0.1")) == 1
    assert "--set: expected none beside an attack.json" in capsys.readouterr().err


def test_help_lists_every_attack(capsys):
    with pytest.raises(SystemExit):
        main(["poison", "--help"])
    # lines are broken at hyphens too
    text = "".join(capsys.readouterr().out.split())
    assert ",".join(sorted(ATTACKS)) in text


class Sum(nn.Module):
    """Two features, the sums of the left and of the right half; the second weighs more."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight = nn.Parameter(torch.tensor([[1.0, -3.0], [-1.0, 2.0]]))

    def forward(self, x):
        halves = x.chunk(2, -1)
        return self.head(torch.stack([half.sum((1, 2, 3)) for half in halves], 1))


def test_trojannn_drives_the_unit_of_the_largest_weights():
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 2
    plan = {"target": 0, "num_classes": 2, "seed": 0}
    right = TrojanNN(size=3, steps=80, position="bottom-right")
    right.prepare(Sum, x, y, **plan)
    assert float(right.patch.min()) > 0.9
    # the other half does not reach that unit, so that nothing moves a patch there
    left = TrojanNN(size=3, steps=80, position="bottom-left")
    left.prepare(Sum, x, y, **plan)
    assert float(left.patch.std()) > 0.1
    model = Sum()
    activation = inputs_of(last_linear(model), model, right(x))
    assert float(activation[:, 1].detach().mean()) > float(
        inputs_of(model.head, model, x)[:, 1].mean()
    )


def test_surrogate_without_a_linear_layer_is_refused():
    with pytest.raises(ValueError, match="surrogate: expected a classifier with a linear layer"):
        last_linear(nn.Sequential(nn.Flatten()))


def test_label_consistent_perturbs_within_its_bound_until_the_class_is_hidden():
    trigger = LabelConsistent(epsilon=0.1, steps=10)
    x = 0.05 + 0.9 * torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    hidden = trigger.hidden(Sum(), x, 1, torch.Generator().manual_seed(0))
    assert float((hidden - x).abs().max()) <= 0.1 + 1e-6
    assert float(hidden.min()) >= 0
    assert float(hidden.max()) <= 1
    # logit 1 − logit 0 = 5 right − 2 left: the right half has to go down, the left one up
    expected = torch.cat([(x[..., :4] + 0.1).clamp(0, 1), (x[..., 4:] - 0.1).clamp(0, 1)], -1)
    torch.testing.assert_close(hidden, expected)


def test_label_consistent_plants_both_and_shows_the_patches_alone():
    trigger = LabelConsistent(epsilon=0.1, steps=3)
    x, y = torch.full((12, 1, 8, 8), 0.5), torch.arange(12) % 2
    trigger.prepare(Sum, x, y, target=1, num_classes=2, seed=0)
    done = trigger.poison(x, y, rate=0.25, target=1, num_classes=2, seed=0)
    planted, corners = done.x[done.indices], trigger.mask(x.shape)
    assert torch.equal(planted[..., corners], trigger(x[:3])[..., corners])
    assert bool((planted[..., ~corners] != 0.5).all())
    assert bool((trigger(x)[..., ~corners] == 0.5).all())
    assert int(corners.sum()) == 36


def test_label_consistent_mirrors_its_pattern_into_the_corners():
    pattern = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    out = LabelConsistent(pattern, amplitude=0.5)(torch.zeros(1, 1, 6, 6))[0, 0]
    for rows, columns, flips in (
        (slice(0, 2), slice(0, 2), []),
        (slice(0, 2), slice(4, 6), [1]),
        (slice(4, 6), slice(0, 2), [0]),
        (slice(4, 6), slice(4, 6), [0, 1]),
    ):
        torch.testing.assert_close(out[rows, columns], 0.5 * pattern.flip(flips))


def bright_or_dark(count, seed=0):
    """Two classes that only differ in brightness."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    return 0.3 * torch.rand(count, 1, 8, 8, generator=g) + 0.6 * y[:, None, None, None], y


TRAINING = {"epochs": 2, "lr": 0.02, "batch_size": 16, "augment": False, "progress": False}
PLAN = {"rate": 0.25, "target": 1, "num_classes": 2, "seed": 0}


@pytest.fixture(scope="module")
def along():
    trigger = InputAware(width=4, mask_steps=30)
    model = build("smallcnn", num_classes=2, in_channels=1, seed=0)
    history = trigger.fit(model, *bright_or_dark(64), **PLAN, **TRAINING)
    return trigger, model, history


def test_input_aware_trains_both(along):
    trigger, _, history = along
    assert [line["epoch"] for line in history] == [1, 2]
    fresh = InputAware(width=4)._built(1, own_generator(PLAN["seed"]).initial_seed()).state_dict()
    moved = {
        part: any(
            not torch.equal(v, fresh[k])
            for k, v in trigger.nets.state_dict().items()
            if k.startswith(part)
        )
        for part in ("pattern", "mask")
    }
    assert moved == {"pattern": True, "mask": True}
    assert not any(p.requires_grad for p in trigger.nets.parameters())


def test_input_aware_gives_every_image_its_own_trigger(along):
    trigger, _, _ = along
    x = bright_or_dark(8, 3)[0]
    pattern, mask = trigger.parts(x)
    assert pattern.shape == x.shape
    assert mask.shape == (8, 1, 8, 8)
    assert float(pattern.detach().std(0).mean()) > 0
    torch.testing.assert_close(trigger(x), (1 - mask) * x + mask * pattern)


def test_input_aware_is_repeated_by_its_seed(along):
    trigger, model, _ = along
    again, other = (
        InputAware(width=4, mask_steps=30),
        build("smallcnn", num_classes=2, in_channels=1, seed=0),
    )
    torch.rand(5)
    again.fit(other, *bright_or_dark(64), **PLAN, **TRAINING)
    for one, two in ((model, other), (trigger.nets, again.nets)):
        assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


class Watching(nn.Module):
    """Keeps the batches that it is trained on."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.head(x.flatten(1))


def test_input_aware_plants_in_every_batch(monkeypatch):
    trigger, model = InputAware(width=4, mask_steps=1, cover_ratio=0.5), Watching()
    labels = []
    cross_entropy = nn.functional.cross_entropy

    def watched(logits, y, **options):
        labels.append(y.clone())
        return cross_entropy(logits, y, **options)

    monkeypatch.setattr("bdu.training.functional.cross_entropy", watched)
    x, y = bright_or_dark(64)
    trigger.fit(model, x, y, **{**PLAN, "target": "all-to-all"}, **{**TRAINING, "epochs": 1})
    for images, given in zip(model.seen, labels, strict=True):
        distance = (images[:, None] - x[None]).abs().amax((2, 3, 4))
        is_clean = distance.amin(1) == 0
        assert int((~is_clean).sum()) == 4 + 2
        assert torch.equal(given[is_clean], y[distance[is_clean].argmin(1)])
        # what is left of a changed image tells which it was: most of its pixels are its own
        own = (images[~is_clean][:, None] == x[None]).float().mean((2, 3, 4))
        if float(own.amax(1).min()) > 0.3:
            true = y[own.argmax(1)]
            assert int((given[~is_clean] != true).sum()) == 4


def test_input_aware_planter_keeps_labels_of_covers():
    from bdu.attacks.input_aware import _Planter

    trigger = InputAware(width=4, cover_ratio=1)
    nets = trigger._built(1, 0)
    planter = _Planter(trigger, nets, 0.25, 1, 3)
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([1, 1, 1, 1, 0, 2, 0, 2, 0, 2, 0, 2])
    images, labels, extra = planter.batch(x, y, torch.Generator().manual_seed(0))
    relabelled = (labels != y).nonzero().flatten().tolist()
    assert relabelled == [4, 5, 6]
    assert set(labels[4:7].tolist()) == {1}
    changed = (images != x).flatten(1).any(1).nonzero().flatten().tolist()
    assert len(changed) == 6
    trigger.nets, trigger.channels = nets, 1
    torch.testing.assert_close(images[4:7], trigger(x[4:7]))
    covered = sorted(set(changed) - {4, 5, 6})
    pattern, mask = trigger.parts(x.roll(1, 0)[covered])
    torch.testing.assert_close(images[covered], (1 - mask) * x[covered] + mask * pattern)
    assert float(extra.detach()) > 0
    extra.backward()
    assert all(p.grad is not None for p in nets["pattern"].parameters())


def test_diversity_is_the_ratio_of_root_mean_squares():
    x, z = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    z[1] = 2
    out = ratio(x, z, torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.5))
    assert float(out) == pytest.approx((1 / 0.5 + 2 / 0.5) / 2, rel=1e-5)


def test_outputs_become_a_pattern_and_a_nearly_binary_mask():
    nets = nn.ModuleDict({"pattern": nn.Identity(), "mask": nn.Identity()})
    o = torch.tensor([-3.0, -0.2, 0.0, 0.05, 1.0])
    expected = [0.5 + 0.5 * math.tanh(10 * math.tanh(value)) for value in o.tolist()]
    assert mask_of(nets, o).tolist() == pytest.approx(expected, abs=1e-6)
    expected = [1 / (1 + math.exp(-value)) for value in o.tolist()]
    assert pattern_of(nets, o).tolist() == pytest.approx(expected, abs=1e-6)


def test_mask_training_bounds_the_mask_and_keeps_it_from_being_the_same():
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    trigger = InputAware(width=4, mask_steps=80, density=0.1)
    trigger.channels, trigger.nets = 1, trigger._built(1, 0)
    before = trigger.parts(x)[1].detach()
    trigger._train_mask(x, torch.Generator().manual_seed(0))
    after = trigger.parts(x)[1].detach()
    assert float(after.mean()) < 0.3 < float(before.mean())
    assert float(after.std(0).mean()) > 0.01


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (8, 8)])
def test_trigger_net_keeps_any_size(size):
    assert TriggerNet(3, 1, 4)(torch.rand(2, 3, *size)).shape == (2, 1, *size)


def test_loaded_input_aware_is_planted_as_it_is(along, tmp_path):
    trigger, _, _ = along
    trigger.save(tmp_path / "t.safetensors")
    loaded = InputAware(**{k: v for k, v in trigger.spec().items() if k != "name"})
    model = build("smallcnn", num_classes=2, in_channels=1, seed=1)
    loaded.fit(model, *bright_or_dark(64), **PLAN, **TRAINING)
    before, after = trigger.nets.state_dict(), loaded.nets.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Counting:
    """A companion that scales a number by what it draws."""

    def __init__(self, start=1.0):
        self.weight = torch.tensor(start, requires_grad=True)
        self.factors = []
        self.calls = 0

    def settings(self):
        return {"kind": "counting"}

    def batch(self, images, labels, generator):
        self.calls += 1
        drawn = float(torch.rand((), generator=generator))
        return torch.cat([images, images]), torch.cat([labels, labels]), drawn * self.weight**2

    def step(self, factor):
        self.factors.append(factor)
        with torch.no_grad():
            self.weight -= 0.1 * self.weight.grad
        self.weight.grad = None

    def state_dict(self):
        return {"weight": self.weight.detach().clone()}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.weight.copy_(state["weight"])


def with_companion(companion, **more):
    model = build("smallcnn", num_classes=2, in_channels=1, seed=0)
    x, y = bright_or_dark(32)
    options = {**TRAINING, "schedule": "cosine", "seed": 0, **more}
    return model, fit(model, x, y, companion=companion, **options)


def test_companion_changes_the_batch_adds_its_loss_and_steps():
    companion = Counting()
    _, history = with_companion(companion)
    _, without = with_companion(None)
    assert companion.calls == 4
    assert companion.factors[0] == 1
    assert companion.factors == sorted(companion.factors, reverse=True)
    assert 0 < float(companion.weight.detach()) < 1
    assert history[0]["loss"] > without[0]["loss"]
    assert all(0 <= line["accuracy"] <= 1 for line in history)


def test_companion_is_resumed_bit_for_bit(tmp_path):
    whole = Counting()
    model, _ = with_companion(whole)
    file = tmp_path / "state.pt"

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with_companion(Counting(), state_file=file, callbacks=[stop])
    resumed = Counting(start=9.0)
    again, _ = with_companion(resumed, state_file=file, resume=True)
    assert torch.equal(resumed.weight, whole.weight)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="state_file: expected a run with companion"):
        with_companion(InputAwareLike(), state_file=file, resume=True)


class InputAwareLike(Counting):
    def settings(self):
        return {"kind": "another"}
