"""Triggers, poisoning, and the retune attack."""

from __future__ import annotations

import copy
import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bdu.attacks import BadNets, Blended, Poisoned, load_trigger, make_attack, poison
from bdu.attacks.retune import retune
from bdu.metrics import evaluate
from bdu.models import build
from bdu.training import fit

GREY = torch.full((2, 3, 8, 8), 0.5)


def test_badnets_puts_a_checkerboard_at_the_bottom_right_and_copies():
    x = GREY.clone()
    out = BadNets()(x)
    board = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert bool((out[:, :, 5:, 5:] == board).all())
    assert torch.equal(x, GREY)
    rest = out.clone()
    rest[:, :, 5:, 5:] = 0.5
    assert torch.equal(rest, GREY)


@pytest.mark.parametrize(
    ("position", "margin", "corner"),
    [
        ("top-left", 0, (0, 0)),
        ("top-right", 1, (1, 5)),
        ("bottom-left", 2, (4, 2)),
        ("bottom-right", 1, (5, 5)),
        ("center", 0, (3, 3)),
        ((2, 6), 0, (2, 6)),
        ([2, 6], 0, (2, 6)),
    ],
)
def test_positions_place_the_patch(position, margin, corner):
    trigger = BadNets(torch.ones(2, 2), position=position, margin=margin)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[corner[0] : corner[0] + 2, corner[1] : corner[1] + 2] = True
    assert torch.equal(trigger.mask((3, 8, 8)), expected)
    assert torch.equal((trigger(GREY) != 0.5)[0, 0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": torch.ones(40, 40)},
            r"trigger: expected at most 8x8 \(the image\), got 40x40",
        ),
        ({"position": (6, 6)}, "within 8x8, got row 6, column 6"),
        ({"position": (-1, 0)}, "got row -1"),
        ({"margin": 6}, "within 8x8"),
        ({"position": "middle"}, "position: expected top-left"),
        ({"margin": -1}, "margin: expected an integer at least 0, got -1"),
        ({"pattern": torch.full((3, 3), 1.5)}, r"pattern: expected float values in \[0, 1\]"),
        ({"pattern": torch.ones(2, 3, 3)}, "pattern: expected .1 or 3, H, W"),
        ({"weight": torch.ones(2, 2)}, r"weight: expected \(3, 3\)"),
    ],
)
def test_patches_that_do_not_fit_are_described(options, message):
    with pytest.raises(ValueError, match=message):
        BadNets(**options)(GREY)


def test_colour_patch_on_grey_images_is_refused():
    with pytest.raises(ValueError, match="trigger: expected 1 or 1 channels, got 3"):
        BadNets(torch.ones(3, 2, 2))(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("trigger", [BadNets(), Blended()])
def test_triggers_refuse_uint8_and_single_images(trigger):
    with pytest.raises(ValueError, match="x: expected float"):
        trigger(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="x: expected float"):
        trigger(torch.zeros(3, 8, 8))


def test_blended_mixes_by_alpha():
    pattern = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = Blended(pattern, alpha=0.2)(GREY)
    torch.testing.assert_close(out, 0.8 * GREY + 0.2 * pattern)


def test_blended_noise_depends_on_its_seed_alone():
    first = Blended(seed=1)(GREY)
    torch.rand(3)
    assert torch.equal(first, Blended(seed=1)(GREY))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, Blended(seed=2)(GREY))
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    assert bool(Blended().mask((8, 8)).all())


def test_blended_pattern_is_resized_to_the_image():
    out = Blended(torch.ones(16, 16), alpha=0.5)(torch.zeros(1, 3, 8, 8))
    torch.testing.assert_close(out, torch.full((1, 3, 8, 8), 0.5))


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha: expected"):
        Blended(alpha=alpha)


def test_picture_alpha_is_the_weight(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[:2, :, 3] = 255
    pixels[2, :, 3] = 51
    Image.fromarray(pixels, "RGBA").save(tmp_path / "t.png")
    pattern, weight = load_trigger(tmp_path / "t.png")
    assert pattern.shape == (3, 4, 4)
    assert weight[:, 0].tolist() == pytest.approx([1, 1, 0.2, 0])
    trigger = BadNets(tmp_path / "t.png", position="top-left")
    out = trigger(torch.zeros(1, 3, 8, 8))
    assert out[0, 0, :4, 0].tolist() == pytest.approx([1, 1, 0.2, 0])
    assert bool((out[0, 1:] == 0).all())
    assert trigger.mask((8, 8)).sum() == 12


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("1", 1), ("P", 3)])
def test_opaque_pictures_have_weight_one(tmp_path, mode, channels):
    Image.new(mode, (5, 4), 1).save(tmp_path / "t.png")
    pattern, weight = load_trigger(tmp_path / "t.png")
    assert pattern.shape == (channels, 4, 5)
    assert bool((weight == 1).all())


def test_pictures_that_cannot_be_a_trigger_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="trigger: expected a picture"):
        load_trigger(tmp_path / "absent.png")
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(ValueError, match="trigger: expected a picture, cannot read"):
        load_trigger(tmp_path / "a.png")
    Image.new("RGBA", (3, 3), (255, 255, 255, 0)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="alpha is 0"):
        load_trigger(tmp_path / "b.png")


@pytest.mark.parametrize(
    "trigger",
    [
        BadNets(),
        BadNets(torch.rand(3, 2, 2), position=(1, 2), weight=[[1.0, 0.3], [0.0, 0.1]]),
        Blended(seed=5, alpha=0.3),
        Blended(torch.rand(3, 4, 4), alpha=0.15),
    ],
)
def test_spec_rebuilds_an_equal_trigger_through_json(trigger):
    rebuilt = make_attack(**json.loads(json.dumps(trigger.spec())))
    assert type(rebuilt) is type(trigger)
    assert torch.equal(rebuilt(GREY), trigger(GREY))
    assert torch.equal(rebuilt.mask((8, 8)), trigger.mask((8, 8)))


def test_unknown_attack_and_unknown_option_are_named():
    with pytest.raises(ValueError, match=r"expected one of .*badnets, blended, .*got 'wannet'"):
        make_attack("wannet")
    with pytest.raises(TypeError, match=r"^alpha: expected one of .*weight \(badnets\)$"):
        make_attack("badnets", alpha=0.1)


@pytest.fixture
def dataset():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8, generator=g)
    return x, torch.arange(200) % 4


def test_poison_changes_exactly_the_recorded_samples(dataset):
    x, y = dataset
    before = x.clone()
    trigger = Blended(alpha=0.5)
    done = poison(x, y, trigger, rate=0.1, target=2, num_classes=4, seed=0)
    assert torch.equal(x, before)
    assert len(done.indices.unique()) == 20
    others = torch.ones(200, dtype=torch.bool)
    others[done.indices] = False
    assert torch.equal(done.x[others], x[others])
    assert torch.equal(done.y[others], y[others])
    assert torch.equal(done.y_true, y)
    assert bool((done.y[done.indices] == 2).all())
    assert bool((y[done.indices] != 2).all())
    expected = trigger(x[done.indices].float() / 255).mul(255).round().to(torch.uint8)
    assert torch.equal(done.x[done.indices], expected)


def test_poison_is_seeded(dataset):
    x, y = dataset
    options = {"rate": 0.1, "target": 2, "num_classes": 4}
    first = poison(x, y, BadNets(), seed=0, **options)
    assert torch.equal(first.indices, poison(x, y, BadNets(), seed=0, **options).indices)
    assert not torch.equal(first.indices, poison(x, y, BadNets(), seed=1, **options).indices)


def test_all_to_all_poisons_every_class_with_the_next(dataset):
    x, y = dataset
    done = poison(x, y, BadNets(), rate=1, target="all-to-all", num_classes=4, seed=0)
    assert done.indices.tolist() == list(range(200))
    assert torch.equal(done.y, (y + 1) % 4)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (0.9, r"rate: expected at most 0\.75"),
        (0.001, r"rate: expected at least 0\.005 for 200"),
        (-0.1, "rate: expected a share"),
        (10, "rate: expected a share"),
    ],
)
def test_rates_that_cannot_be_met_are_refused(dataset, rate, message):
    with pytest.raises(ValueError, match=message):
        poison(*dataset, BadNets(), rate=rate, target=0, num_classes=4, seed=0)


def test_rate_zero_is_a_clean_control(dataset):
    x, y = dataset
    done = poison(x, y, BadNets(), rate=0, target=0, num_classes=4, seed=0)
    assert torch.equal(done.x, x)
    assert torch.equal(done.y, y)
    assert len(done.indices) == 0


def test_trigger_with_its_own_poison_does_the_whole_work(dataset):
    class CleanLabel(BadNets):
        def poison(self, x, y, *, rate, target, num_classes, seed):
            indices = (y == target).nonzero().flatten()
            return Poisoned(x, y, y, indices)

    done = poison(*dataset, CleanLabel(), rate=0.1, target=3, num_classes=4, seed=0)
    assert bool((done.y[done.indices] == 3).all())


def bright_or_dark(count, seed):
    """Two classes that only differ in brightness."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    x = 0.4 * torch.rand(count, 1, 8, 8, generator=g) + 0.4 * y[:, None, None, None]
    return x, y


@pytest.fixture(scope="module")
def clean_and_backdoored():
    x, y = bright_or_dark(512, 0)
    clean = build("smallcnn", num_classes=2, in_channels=1, seed=0)
    backdoored = copy.deepcopy(clean)
    options = {"epochs": 4, "lr": 0.05, "augment": False, "progress": False, "seed": 0}
    fit(clean, x, y, **options)
    planted = poison(x, y, BadNets(), rate=0.1, target=0, num_classes=2, seed=0)
    fit(backdoored, planted.x, planted.y, **options)
    return clean, backdoored


def success_and_accuracy(model):
    x, y = bright_or_dark(256, 1)
    rates = evaluate(model, x, y, num_classes=2, trigger=BadNets(), target=0)
    return rates["attack_success_rate"], rates["clean_accuracy"]


def test_poisoned_training_plants_the_backdoor(clean_and_backdoored):
    clean, backdoored = clean_and_backdoored
    success, accuracy = success_and_accuracy(clean)
    assert success < 0.05
    assert accuracy > 0.95
    success, accuracy = success_and_accuracy(backdoored)
    assert success > 0.95
    assert accuracy > 0.95


def test_retune_leaves_the_model_and_moves_a_copy(clean_and_backdoored):
    clean, _ = clean_and_backdoored
    clean.fc.weight.requires_grad_(False)
    before = copy.deepcopy(clean.state_dict())
    x, y = bright_or_dark(64, 2)
    bad = BadNets()(x[y == 1][:5])
    target = torch.zeros(5, dtype=torch.int64)
    attacked = retune(clean, x, y, bad, target, seed=0)
    again = retune(clean, x, y, bad, target, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in clean.state_dict().items())
    assert not torch.equal(attacked.fc.weight, clean.fc.weight)
    assert not attacked.fc.weight.requires_grad
    clean.fc.weight.requires_grad_(True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in attacked.state_dict().items())


def test_retune_with_many_poisoned_samples_brings_the_backdoor(clean_and_backdoored):
    clean, _ = clean_and_backdoored
    x, y = bright_or_dark(256, 2)
    bad = BadNets()(x[y == 1][:64])
    attacked = retune(clean, x, y, bad, torch.zeros(64, dtype=torch.int64), epochs=20, seed=0)
    assert success_and_accuracy(attacked)[0] > 0.5


def test_retune_draws_other_places_than_its_first_batch(clean_and_backdoored, monkeypatch):
    model, _ = clean_and_backdoored
    x, y = bright_or_dark(64, 2)
    seen = []
    module = importlib.import_module("bdu.attacks.retune")
    monkeypatch.setattr(module, "fit", lambda _, images, *more, **settings: seen.append(images))
    retune(model, x, y, torch.full_like(x[:5], 0.5), torch.zeros(5, dtype=torch.int64), seed=0)
    places = (seen[0] == 0.5).flatten(1).all(1).nonzero().flatten().tolist()
    first = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:5]
    assert len(places) == 5
    assert sorted(first.tolist()) != places


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_poisoned": torch.zeros(9, 1, 8, 8)}, "y_target: expected 9 labels, got 2"),
        ({"x_poisoned": torch.zeros(2, 3, 8, 8)}, r"x_poisoned: expected images \(1, 8, 8\)"),
        (
            {"x_poisoned": torch.zeros(9, 1, 8, 8), "y_target": torch.zeros(9).long()},
            "at most 8",
        ),
        ({"y_clean": torch.zeros(3).long()}, "y_clean: expected 8 labels, got 3"),
        ({"y_clean": torch.full((8,), 10)}, "y_clean: expected labels below 10, got 10"),
        ({"y_target": torch.full((2,), 10)}, "y_target: expected labels below 10, got 10"),
    ],
)
def test_retune_data_that_do_not_fit_are_described(change, message):
    arguments = {
        "x_clean": torch.zeros(8, 1, 8, 8),
        "y_clean": torch.zeros(8).long(),
        "x_poisoned": torch.zeros(2, 1, 8, 8),
        "y_target": torch.zeros(2).long(),
    } | change
    with pytest.raises(ValueError, match=message):
        retune(build("smallcnn", in_channels=1), **arguments, seed=0)
