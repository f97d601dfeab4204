"""Models that return more than a tensor of logits, as Hugging Face's do: they work everywhere."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bdu import fisher_diagonal, metrics
from bdu.attacks import make_attack
from bdu.models import logits_of
from bdu.monitor import AttentionMonitor, grad_cam
from bdu.trainer import METHODS, unlearn
from bdu.training import fit

TINY = {
    "auto": {"steps": 4, "inversion_steps": 2, "threshold": 0.0},
    "balanced": {"unlearn_steps": 4, "recovery_steps": 2, "evaluate_every": 2},
    "fine-tuning": {"epochs": 2},
    "ulrl": {"unlearn_epochs": 1, "relearn_epochs": 1, "unlearned_accuracy": 0.0},
    "fst": {"epochs": 2},
    "tsbd": {"unlearn_epochs": 1, "epochs": 1, "unlearned_accuracy": 0.0},
    "i-bau": {"rounds": 1},
    "sau": {"epochs": 1, "inner_steps": 2},
    "pam": {"rounds": 1, "epochs": 1, "inversion_steps": 2},
    "tbar": {"epochs": 1, "inversion_steps": 2},
    "bi-bau": {"rounds": 1, "epochs": 1, "inversion_steps": 2},
}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class Attribute(Plain):
    def forward(self, x):
        return SimpleNamespace(loss=None, logits=super().forward(x))


class Key(Plain):
    def forward(self, x):
        return {"loss": None, "logits": super().forward(x)}


class Tuple(Plain):
    def forward(self, x):
        return (super().forward(x),)


def pair(kind):
    """The same network, plain and with another output."""
    torch.manual_seed(3)
    plain, other = Plain(), kind()
    other.load_state_dict(plain.state_dict())
    return plain.eval(), other.eval()


def data():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randint(0, 80, (60, 1, 8, 8), dtype=torch.uint8, generator=g)
    x = x + (80 * y)[:, None, None, None].to(torch.uint8)
    bad = x[y != 0].clone()
    bad[:, :, :3, :3] = 255
    return (x, y), (bad, torch.zeros(len(bad), dtype=torch.long), y[y != 0])


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def cleaned(model, method, callbacks=()):
    clean, triggered = data()
    given = {"triggered": triggered} if method == "balanced" else {}
    options = {"method": method, "progress": False, "callbacks": callbacks, **TINY[method]}
    return unlearn(model, clean=clean, clean_accuracy_floor=0.0, **given, **options)


@pytest.mark.filterwarnings("ignore:ulrl")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_cleans_them_as_it_does_the_plain_model(method):
    plain, other = pair(Attribute)
    before, outputs = copy.deepcopy(other), []

    def look(line, model):
        with torch.no_grad():
            outputs.append(type(model.eval()(torch.zeros(2, 1, 8, 8))))
        assert type(model) is Attribute

    expected, found = cleaned(plain, method), cleaned(other, method, [look])
    assert same(found.model, expected.model)
    assert found.history == expected.history
    assert type(found.model) is Attribute
    assert not any(module._forward_hooks for module in found.model.modules())
    assert isinstance(found.model(torch.rand(2, 1, 8, 8)), SimpleNamespace)
    # callbacks see what the caller knows
    assert set(outputs) == {SimpleNamespace}
    # and the model passed in is as it was
    assert same(other, before)
    assert not other._forward_hooks
    assert all(p.grad is None and p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("kind", [Attribute, Key])
def test_rates_training_attention_and_fisher_are_those_of_the_plain_model(kind):
    plain, other = pair(kind)
    (x, y), _ = data()
    images = x.float() / 255
    trigger = make_attack("badnets")
    found, expected = (
        metrics.evaluate(model, x, y, num_classes=3, trigger=trigger, target=0)
        for model in (other, plain)
    )
    assert found == expected
    for layer in (None, "features.0"):
        assert torch.equal(grad_cam(other, x, 1, layer=layer), grad_cam(plain, x, 1, layer=layer))
    found, expected = (fisher_diagonal(model, (images, y)) for model in (other, plain))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for model in (plain, other):
        fit(model, x, y, epochs=1, lr=0.1, batch_size=16, seed=0, progress=False)
    assert same(plain, other)


def test_another_output_is_refused_by_name():
    (x, y), _ = data()
    message = "model: expected a tensor of logits or an output with .logits, got tuple"
    model = pair(Tuple)[1]
    for call in (
        lambda: metrics.evaluate(model, x, y, num_classes=3),
        lambda: grad_cam(model, x, 1),
        lambda: cleaned(model, "balanced"),
        lambda: cleaned(model, "fine-tuning"),
        lambda: fit(model, x, y, epochs=1, lr=0.1, seed=0, progress=False),
        lambda: fisher_diagonal(model, (x.float(), y)),
        lambda: logits_of({"scores": torch.rand(2, 3)}) and None,
    ):
        with pytest.raises(ValueError, match=message.replace("tuple", "(tuple|dict)")):
            call()


def test_a_vision_transformer_of_hugging_face_is_cleaned(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 16, "image_size": 8, "patch_size": 2, "num_channels": 1},
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config)
    triggered = data()[1]
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:3, :3] = True
    watch = AttentionMonitor(triggered[0], 0, mask)
    for method in ("balanced", "fst"):
        result = cleaned(model, method, [watch])
        assert type(result.model) is transformers.ViTForImageClassification
        assert result.model.state_dict().keys() == model.state_dict().keys()
        assert not same(result.model, model)
        assert all("tar_share" in line for line in result.history)
        result.model.save_pretrained(tmp_path / method)
        again = transformers.ViTForImageClassification.from_pretrained(tmp_path / method)
        assert same(again, result.model)
