"""What every attack holds to: the trigger protocol, its record of what it changed, its refusals."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn

from bdu.attacks import (
    ATTACKS,
    JointlyTrained,
    Prepared,
    Saved,
    load_attack,
    load_target,
    make_attack,
    poison,
)
from bdu.attacks.trigger import check_number, drawn, plant, read_tensors
from bdu.checkpoint import save_state_dict
from bdu.models import build

# Options that make an attack quick and let it fit images of 8x8.
OPTIONS = {
    "ftrojan": {"window": 4, "frequencies": [[1, 2], [3, 3]], "magnitude": 0.3},
    "sig": {"frequency": 1.7},
    "low-frequency": {"steps": 2, "frequencies": 3},
    "trojannn": {"size": 3, "steps": 2},
    "label-consistent": {"steps": 2},
    "input-aware": {"width": 4, "mask_steps": 2},
}
NAMES = sorted(ATTACKS)
CLEAN_LABEL = ("label-consistent", "sig")
COVERED = ("adaptive-blend", "bpp", "wanet")


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def grey_levels(count, channels, size=8):
    return (noise(count, channels, size, size) * 255).round().to(torch.uint8)


def surrogate(channels):
    return lambda: build("smallcnn", num_classes=4, in_channels=channels, seed=0)


def made(name, channels=3, *, seed=0, **options):
    """An attack that can be put on images."""
    trigger = make_attack(name, **OPTIONS.get(name, {}), **options)
    x, y = grey_levels(16, channels), torch.arange(16) % 4
    plan = {"target": 1, "num_classes": 4, "seed": seed}
    if isinstance(trigger, Prepared):
        trigger.prepare(surrogate(channels), x, y, **plan)
    if isinstance(trigger, JointlyTrained):
        model = surrogate(channels)()
        training = {"epochs": 1, "lr": 0.01, "batch_size": 8, "augment": False}
        trigger.fit(model, x, y, rate=0.25, progress=False, **plan, **training)
    return trigger


@pytest.fixture(scope="module", params=[(name, channels) for name in NAMES for channels in (3, 1)])
def ready(request):
    name, channels = request.param
    return made(name, channels), channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_trigger_gives_a_copy_in_the_same_type_within_bounds(ready, dtype, size):
    trigger, channels = ready
    # with borders at 0 and 1, where what is added has to be cut off
    x = (1.4 * noise(5, channels, *size) - 0.2).clamp(0, 1).to(dtype)
    before = x.clone()
    out = trigger(x)
    assert (out.shape, out.dtype, out.device) == (x.shape, dtype, x.device)
    assert torch.equal(x, before)
    assert not torch.equal(out, x)
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert torch.equal(out, trigger(x))
    changed = (out != x).any(0).any(0)
    mask = trigger.mask(x.shape)
    assert (mask.dtype, mask.shape) == (torch.bool, x.shape[2:])
    assert not bool((changed & ~mask).any())


def test_trigger_takes_an_empty_batch_and_one_image(ready):
    trigger, channels = ready
    assert trigger(torch.zeros(0, channels, 8, 8)).shape == (0, channels, 8, 8)
    x = noise(6, channels, 8, 8)
    torch.testing.assert_close(trigger(x[3:4]), trigger(x)[3:4])


def test_trigger_refuses_what_is_no_float_batch(ready):
    trigger, channels = ready
    for wrong in (grey_levels(1, channels), noise(channels, 8, 8)):
        with pytest.raises(ValueError, match="x: expected float"):
            trigger(wrong)


def test_attack_json_rebuilds_an_equal_trigger(ready, tmp_path):
    trigger, channels = ready
    if isinstance(trigger, Saved):
        trigger.save(tmp_path / "t.safetensors")
    spec = trigger.spec()
    assert spec["name"] == trigger.name
    if "file" in spec:
        assert spec["file"] == str(tmp_path / "t.safetensors")
        spec["file"] = "t.safetensors"
    (tmp_path / "attack.json").write_text(json.dumps({"trigger": spec}))
    rebuilt = load_attack(tmp_path / "attack.json")
    assert type(rebuilt) is type(trigger)
    x = noise(3, channels, 8, 8)
    assert torch.equal(rebuilt(x), trigger(x))
    assert torch.equal(rebuilt.mask(x.shape), trigger.mask(x.shape))
    assert {**rebuilt.spec(), "file": 0} == {**trigger.spec(), "file": 0}


def test_a_number_of_channels_that_does_not_fit_is_refused(ready):
    trigger, channels = ready
    is_bound = isinstance(trigger, (Saved, JointlyTrained)) or trigger.name == "ftrojan"
    if is_bound:
        wrong = 5 if trigger.name == "ftrojan" else 4 - channels
        with pytest.raises(ValueError, match=r"x: expected .* channels, got"):
            trigger(noise(2, wrong, 8, 8))
    else:
        assert trigger(noise(2, 4 - channels, 8, 8)).shape == (2, 4 - channels, 8, 8)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "input-aware"])
@pytest.mark.parametrize("as_float", [False, True])
def test_record_is_exactly_what_changed(name, as_float):
    trigger = made(name)
    x, y = grey_levels(120, 3), torch.arange(120) % 4
    x = x.float() / 255 if as_float else x
    before = x.clone()
    done = poison(x, y, trigger, rate=0.1, target=1, num_classes=4, seed=5)
    assert torch.equal(x, before)
    assert done.x.dtype == x.dtype
    changed = (done.x != x).flatten(1).any(1).nonzero().flatten()
    recorded = torch.cat([done.indices, done.cover_indices]).sort().values
    assert torch.equal(changed, recorded)
    assert len(done.indices) == 12
    assert len(done.cover_indices) == (12 * trigger.cover_ratio if name in COVERED else 0)
    assert torch.equal(done.y_true, y)
    assert done.clean_label == (name in CLEAN_LABEL) == getattr(trigger, "clean_label", False)
    relabelled = (done.y != y).nonzero().flatten()
    if done.clean_label:
        assert len(relabelled) == 0
        assert set(y[done.indices].tolist()) == {1}
    else:
        assert torch.equal(relabelled, done.indices)
        assert set(done.y[relabelled].tolist()) == {1}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "input-aware"])
def test_planting_is_seeded(name):
    x, y = grey_levels(80, 3), torch.arange(80) % 4
    plan = {"rate": 0.1, "target": 1, "num_classes": 4}
    first, again = (poison(x, y, made(name), seed=3, **plan) for _ in range(2))
    other = poison(x, y, made(name), seed=4, **plan)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.cover_indices, again.cover_indices)
    assert not torch.equal(first.indices, other.indices)


def test_drawn_samples_are_not_the_first_batches_of_training():
    y = torch.arange(200) % 4
    indices = drawn(y, rate=0.2, target="all-to-all", num_classes=4, seed=0)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert len(set(indices.tolist()) & set(order[:40].tolist())) < 20


@pytest.mark.parametrize("name", [n for n in NAMES if n not in (*CLEAN_LABEL, "input-aware")])
def test_all_to_all_gives_the_next_class(name):
    x, y = grey_levels(40, 3), torch.arange(40) % 4
    done = poison(x, y, made(name), rate=0.2, target="all-to-all", num_classes=4, seed=0)
    assert len(done.indices) == 8
    assert torch.equal(done.y[done.indices], (y[done.indices] + 1) % 4)


@pytest.mark.parametrize("name", CLEAN_LABEL)
def test_clean_labels_refuse_what_they_cannot_do(name):
    x, y = grey_levels(40, 3), torch.arange(40) % 4
    plan = {"num_classes": 4, "seed": 0}
    with pytest.raises(ValueError, match=r"rate: expected at most 0\.25 \(samples whose class is "):
        poison(x, y, made(name), rate=0.3, target=1, **plan)
    with pytest.raises(ValueError, match=r"all-to-all.: a clean-label attack leaves every label"):
        poison(x, y, made(name), rate=0.1, target="all-to-all", **plan)
    assert len(poison(x, y, made(name), rate=0.25, target=1, **plan).indices) == 10


@pytest.mark.parametrize("name", COVERED)
def test_more_covers_than_samples_are_refused(name):
    x, y = grey_levels(40, 3), torch.arange(40) % 4
    trigger = make_attack(name, cover_ratio=4)
    with pytest.raises(ValueError, match=r"cover_ratio: expected at most 3 \(30 samples are left"):
        poison(x, y, trigger, rate=0.25, target=1, num_classes=4, seed=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "input-aware"])
def test_rate_zero_changes_nothing(name):
    x, y = grey_levels(40, 3), torch.arange(40) % 4
    done = poison(x, y, made(name), rate=0, target=1, num_classes=4, seed=0)
    assert torch.equal(done.x, x)
    assert torch.equal(done.y, y)
    assert len(done.indices) == len(done.cover_indices) == 0


def test_covers_follow_the_triggered_samples_of_a_generator():
    x, y = grey_levels(40, 1), torch.arange(40) % 4

    def bright(images):
        return torch.ones_like(images)

    plan = {"rate": 0.1, "target": 1, "num_classes": 4, "seed": 0}
    done = plant(x, y, bright, cover=torch.zeros_like, cover_ratio=2, **plan)
    alone = plant(x, y, bright, **plan)
    assert torch.equal(done.indices, alone.indices)
    assert bool((done.x[done.indices] == 255).all())
    assert bool((done.x[done.cover_indices] == 0).all())
    assert len(done.cover_indices) == 8


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(make_attack(n), Saved)])
def test_trigger_that_was_not_made_says_so(name, tmp_path):
    trigger = make_attack(name)
    assert trigger.spec()["file"] is None
    with pytest.raises(ValueError, match=r"trigger: expected one that was .* or read from a file"):
        trigger(noise(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"trigger: expected one that was .*, to save it"):
        trigger.save(tmp_path / "t.safetensors")


def test_label_consistent_without_a_surrogate_says_so():
    x, y = grey_levels(40, 3), torch.arange(40) % 4
    plan = {"rate": 0.1, "target": 1, "num_classes": 4, "seed": 0}
    with pytest.raises(ValueError, match="trigger: expected one that was prepared, to plant it"):
        poison(x, y, make_attack("label-consistent"), **plan)
    assert len(poison(x, y, make_attack("label-consistent", steps=0), **plan).indices) == 4


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("low-frequency", {"other": torch.zeros(3, 3, 3)}, "expected the tensors coefficients"),
        (
            "low-frequency",
            {"coefficients": torch.zeros(3, 3, 4)},
            r"coefficients to be float \(any, 3, 3\), got torch.float32 \(3, 3, 4\)",
        ),
        ("low-frequency", {"coefficients": torch.zeros(3, 3, 3).int()}, "to be float"),
        ("low-frequency", {"coefficients": torch.full((3, 3, 3), torch.nan)}, "finite values"),
        ("low-frequency", {"coefficients": torch.zeros(3, 3, 3)}, "neither all 0 nor too large"),
        ("low-frequency", {"coefficients": torch.full((3, 3, 3), 3e38)}, "got inf as the sum"),
        ("trojannn", {"patch": torch.zeros(3, 6, 6)}, r"patch to be float \(any, 3, 3\)"),
        ("trojannn", {"patch": torch.full((3, 3, 3), 1.5)}, r"expected a patch in \[0, 1\]"),
        ("input-aware", {"patch": torch.zeros(3)}, "expected the tensors mask.down.0"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, name, tensors, message):
    file = tmp_path / "t.safetensors"
    save_state_dict(file, tensors)
    options = {**OPTIONS[name], "file": str(file)}
    if name == "input-aware":
        with pytest.raises(ValueError, match="channels: expected a number"):
            make_attack(name, **options)
        options["channels"] = 3
    with pytest.raises(ValueError, match=f"file: .*{message}"):
        make_attack(name, **options)


def test_file_that_is_not_there_or_no_safetensors_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_attack("trojannn", file=tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"file: expected the suffix .safetensors"):
        read_tensors(tmp_path / "t.pt", {})
    with pytest.raises(ValueError, match=r"file: expected the suffix .safetensors, got 5"):
        read_tensors(5, {})


DEEP = '{"trigger": ' + 100_000 * "[" + 100_000 * "]" + "}"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"trigger": 3}', DEEP], ids=range(5))
def test_file_that_is_no_attack_json_is_refused(tmp_path, text):
    (tmp_path / "attack.json").write_text(text)
    with pytest.raises(ValueError, match=r"path: expected an attack.json"):
        load_attack(tmp_path / "attack.json")
    with pytest.raises(ValueError, match=r"path: expected an attack.json"):
        load_target(tmp_path / "attack.json")


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        ({"pattern": [[1]]}, "name: expected one of .*badnets.*, got None"),
        ({"name": ["badnets"]}, r"name: expected one of .*, got \['badnets'\]"),
        ({"name": "badnets", "pattern": [[1, 0], [1]]}, "pattern: expected lists of numbers"),
        ({"name": "badnets", "pattern": [[10**400]]}, "pattern: expected lists of numbers"),
        ({"name": "badnets", "pattern": None}, "pattern: expected lists of numbers"),
        ({"name": "badnets", "weight": [[1, 0], [1]]}, "weight: expected lists of numbers"),
        ({"name": "badnets", "margin": 0.5}, "margin: expected an integer at least 0, got 0.5"),
        ({"name": "badnets", "position": 5}, r"position: expected \(row, column\), got 5"),
        ({"name": "bpp", "levels": 10**400}, "levels: expected an integer at least 2"),
        ({"name": "blended", "alpha": "x"}, "alpha: expected a number above 0"),
        ({"name": "blended", "seed": 0.5}, "seed: expected an integer, got 0.5"),
        ({"name": "trojannn", "file": 5}, "file: expected the name of a file beside .*, got 5"),
        (
            {"name": "trojannn", "file": "/elsewhere/t.safetensors"},
            "file: expected the name of a file",
        ),
        ({"name": "trojannn", "file": "../t.safetensors"}, "file: expected the name of a file"),
        ({"name": "blended", "pattern": "../t.png"}, "pattern: expected the name of a file"),
        ({"name": "blended", "pattern": ".."}, "pattern: expected the name of a file"),
    ],
)
def test_what_is_wrong_in_an_attack_json_is_named(tmp_path, trigger, message):
    (tmp_path / "attack.json").write_text(json.dumps({"trigger": trigger}))
    with pytest.raises(ValueError, match=f"^{message}"):
        load_attack(tmp_path / "attack.json")


def test_picture_named_in_an_attack_json_lies_beside_it(tmp_path):
    Image.new("L", (2, 2), 255).save(tmp_path / "t.png")
    trigger = {"name": "badnets", "pattern": "t.png"}
    (tmp_path / "attack.json").write_text(json.dumps({"trigger": trigger}))
    assert load_attack(tmp_path / "attack.json").pattern.tolist() == [[[1.0, 1.0], [1.0, 1.0]]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sig", {"delta": 0}, r"delta: expected a number above 0 and at most 1, got 0"),
        ("sig", {"frequency": -1}, "frequency: expected a number above 0 and at most 1000"),
        ("wanet", {"grid_size": 2.5}, "grid_size: expected an integer at least 1 .*, got 2.5"),
        ("wanet", {"strength": "much"}, "strength: expected a number above 0, got 'much'"),
        ("wanet", {"cover_ratio": -1}, "cover_ratio: expected a number at least 0"),
        ("bpp", {"levels": 1}, "levels: expected an integer at least 2 .*, got 1"),
        ("bpp", {"levels": 257}, "levels: expected an integer at least 2 and at most 256"),
        ("sig", {"frequency": 1e308}, "frequency: expected a number above 0 and at most 1000"),
        ("wanet", {"grid_size": 200_000}, "grid_size: expected .* at most 256, got 200000"),
        ("input-aware", {"width": 40_000}, "width: expected .* at most 128, got 40000"),
        ("adaptive-blend", {"pieces": 100_000}, "pieces: expected .* at most 64, got 100000"),
        *(
            (name, {"cover_ratio": 1e308}, r"cover_ratio: expected .* at most 1e\+06, got 1e\+308")
            for name in ("adaptive-blend", "bpp", "input-aware", "wanet")
        ),
        ("bpp", {"dither": 1}, "dither: expected true or false, got 1"),
        ("ftrojan", {"magnitude": 0}, "magnitude: expected a number other than 0"),
        ("ftrojan", {"frequencies": []}, "frequencies: expected pairs of integers from 0 to 31"),
        ("ftrojan", {"frequencies": [[0, 32]]}, "frequencies: expected pairs"),
        ("adaptive-blend", {"pieces": 1}, "pieces: expected an integer at least 2"),
        ("adaptive-blend", {"train_alpha": 0}, "train_alpha: expected a number above 0"),
        ("adaptive-blend", {"alpha": 2}, "alpha: expected a number above 0 and at most 1, got 2"),
        ("low-frequency", {"epsilon": 2}, "epsilon: expected a number above 0 and at most 1"),
        ("low-frequency", {"frequencies": True}, "frequencies: expected an integer at least 2"),
        ("trojannn", {"position": "middle"}, "position: expected top-left"),
        ("trojannn", {"size": 0}, "size: expected an integer at least 1"),
        ("label-consistent", {"amplitude": 0}, "amplitude: expected a number above 0"),
        ("label-consistent", {"steps": -1}, "steps: expected an integer at least 0"),
        ("input-aware", {"width": 6}, "width: expected a multiple of 4, got 6"),
        ("input-aware", {"density": 0}, "density: expected a number above 0"),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_attack(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "size", "message"),
    [
        ("ftrojan", {}, 28, "window: expected at most 28 for images of 28x28, got 32"),
        ("low-frequency", {}, 4, "frequencies: expected at most 4 for images of 4x4, got 6"),
        ("trojannn", {"size": 9}, 8, r"trigger: expected at most 8x8 \(the image\), got 9x9"),
        ("label-consistent", {}, 2, r"trigger: expected at most 2x2 \(the image\), got 3x3"),
    ],
)
def test_images_that_are_too_small_are_refused(name, options, size, message):
    trigger = make_attack(name, **options)
    x, y = grey_levels(8, 3, size), torch.arange(8) % 4
    plan = {"target": 1, "num_classes": 4, "seed": 0}

    def use():
        if isinstance(trigger, Saved):
            trigger.prepare(nothing, x, y, **plan)
        return trigger(x.float() / 255)

    with pytest.raises(ValueError, match=message):
        use()
    with pytest.raises(ValueError, match=message):
        trigger.mask(x.shape)


def nothing() -> nn.Module:
    raise AssertionError("a model was asked for in vain")


def test_what_was_loaded_needs_no_surrogate(tmp_path):
    trigger = made("trojannn")
    trigger.save(tmp_path / "t.safetensors")
    loaded = make_attack(**trigger.spec())
    x, y = grey_levels(8, 3), torch.arange(8) % 4
    loaded.prepare(nothing, x, y, target=1, num_classes=4, seed=9)
    assert torch.equal(loaded.patch, trigger.patch)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, None, "1", [1]])
def test_values_that_are_no_numbers_are_named(value):
    with pytest.raises(ValueError, match=r"rate: expected a number, got"):
        check_number(value, "rate")
