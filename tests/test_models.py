"""Built-in models, import paths, and normalisation."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from bdu.attacks import BadNets
from bdu.checkpoint import load_into
from bdu.data import load_images
from bdu.metrics import evaluate
from bdu.models import Normalize, build, modes_kept

NAD_TRIGGER = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)


@pytest.mark.parametrize("name", ["resnet18-w8", "wrn16-1", "smallcnn"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_built_in_classifies_images(name, channels):
    model = build(name, num_classes=7, in_channels=channels)
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 7)


def test_small_cnn_takes_eight_by_eight_and_is_small():
    model = build("smallcnn", in_channels=1)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert 20_000 <= sum(p.numel() for p in model.parameters()) <= 60_000


def test_resnet18_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in build("resnet18").parameters()) == 11_173_962


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"resnet18, resnet18-w<N>, smallcnn, wrn16-1.*'vgg'"):
        build("vgg")


def test_same_seed_gives_the_same_weights_and_leaves_the_global_state():
    before = torch.random.get_rng_state()
    first, second = build("smallcnn", seed=3), build("smallcnn", seed=3)
    other = build("smallcnn", seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_normalisation_adds_no_key_and_is_applied():
    plain = build("smallcnn", seed=0).eval()
    normalised = build("smallcnn", seed=0, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).eval()
    assert list(plain.state_dict()) == list(normalised.state_dict())
    x = torch.rand(2, 3, 16, 16)
    by_hand = torch.stack(
        [(x[:, 0] - 0.5) / 0.2, (x[:, 1] - 0.4) / 0.3, (x[:, 2] - 0.3) / 0.4], dim=1
    )
    torch.testing.assert_close(normalised(x), plain(by_hand))
    assert not torch.allclose(normalised(x), plain(x))


def test_normalisation_survives_copying_and_pickling():
    model = build("smallcnn", mean=(0.5,) * 3, std=(0.2,) * 3).eval()
    x = torch.rand(1, 3, 16, 16)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


def test_normalisation_first_used_in_inference_mode_still_differentiates():
    model = build("smallcnn", mean=(0.5,) * 3, std=(0.2,) * 3).eval()
    with torch.inference_mode():
        model(torch.rand(1, 3, 8, 8))
    x = torch.rand(1, 3, 8, 8, requires_grad=True)
    model(x).sum().backward()
    assert bool((x.grad != 0).any())


def test_normalisation_follows_the_dtype_of_the_input():
    hook = Normalize((0.5,), (0.25,))
    (x,) = hook(nn.Identity(), (torch.ones(1, 1, 2, 2, dtype=torch.bfloat16),))
    assert x.dtype == torch.bfloat16
    assert bool((x == 2).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,) * 3}, "std: expected 3 values"),
        ({"mean": (0.5,), "std": (0.2,)}, r"mean: expected 3 values \(in_channels\), got 1"),
        ({"mean": (0.5,) * 3, "std": (0.2, 0.2, 0.0)}, "std: expected positive"),
        ({"mean": (0.5, 0.5, math.nan), "std": (0.2,) * 3}, "mean: expected finite values"),
        ({"mean": (0.5,) * 3, "std": (0.2, 0.2, math.inf)}, "std: expected positive, finite"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build("smallcnn", **options)


@pytest.fixture
def outside_module(monkeypatch):
    module = types.ModuleType("outside_module")
    module.with_classes = lambda num_classes: nn.Linear(2, num_classes)
    module.without = lambda: nn.Linear(2, 5)
    module.through_keywords = lambda **options: nn.Linear(2, options["num_classes"])
    module.wrong = lambda: "a string"
    module.number = 3
    monkeypatch.setitem(sys.modules, "outside_module", module)


@pytest.mark.parametrize(
    ("factory", "width"), [("with_classes", 4), ("without", 5), ("through_keywords", 4)]
)
def test_factory_gets_num_classes_where_it_takes_it(outside_module, factory, width):
    model = build(f"outside_module:{factory}", num_classes=4)
    assert model.out_features == width


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("outside_module:wrong", TypeError, "return a torch.nn.Module, got str"),
        ("outside_module:number", TypeError, "to be callable, got int"),
        ("outside_module:absent", ImportError, "to have 'absent', it has not"),
        ("no_such_module_here:make", ImportError, "expected 'no_such_module_here'"),
    ],
)
def test_factory_that_is_no_factory_is_named(outside_module, name, error, message):
    with pytest.raises(error, match=message):
        build(name)


def test_training_flags_come_back_module_by_module():
    model = build("smallcnn")
    model.features[1].eval()
    with modes_kept(model):
        model.eval()
    assert model.training
    assert not model.features[1].training


@pytest.mark.parametrize(
    ("file", "clean", "success"),
    [
        ("nad_wrn16-1_backdoored_student.pth.tar", 0.847, 1.0),
        ("nad_wrn16-1_erased.tar", 0.812, 0.031),
    ],
)
def test_published_checkpoint_loads_and_gives_its_published_rates(bdu_data, file, clean, success):
    model = build("wrn16-1")
    load_into(model, bdu_data / "models" / file)
    images = load_images(bdu_data / "vision" / "cifar10_lossless_subset.npz", split="test")
    rates = evaluate(
        model, images.x, images.y, num_classes=10, trigger=BadNets(NAD_TRIGGER), target=5
    )
    assert rates["clean_accuracy"] == pytest.approx(clean, abs=0.002)
    assert rates["attack_success_rate"] == pytest.approx(success, abs=0.002)
