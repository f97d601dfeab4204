"""Rates checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bdu.metrics import (
    attack_success_rate,
    clean_accuracy,
    defense_effectiveness_rate,
    evaluate,
    false_target_rate,
    per_class_accuracy,
    predict,
    robust_accuracy,
    target_labels,
)


class Reader(nn.Module):
    """Reads the class from the first pixel, and says 0 where the last pixel is white."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        said = (x[:, 0, 0, 0] * 255).round().long()
        said = torch.where(x[:, 0, -1, -1] == 1, 0, said)
        return nn.functional.one_hot(said, 4).float() * self.scale


def images_of(labels):
    x = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.tensor(labels, dtype=torch.uint8)
    return x, torch.tensor(labels)


def white_corner(x):
    x = x.clone()
    x[:, :, -1, -1] = 1
    return x


def test_target_labels_of_one_class_and_of_all():
    y = torch.tensor([0, 1, 2])
    assert target_labels(y, 1, 3).tolist() == [1, 1, 1]
    assert target_labels(y, np.int64(1), 3).tolist() == [1, 1, 1]
    assert target_labels(y, "all-to-all", 3).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("target", "classes", "message"),
    [
        (3, 3, r"target: expected an integer in \[0, 2\] or all-to-all, got 3"),
        (-1, 3, "target: expected"),
        (1.5, 3, "target: expected .*, got 1.5"),
        (True, 3, "target: expected .*, got True"),
        ([1], 3, r"target: expected .*, got \[1\]"),
        ("one-to-one", 3, "target: expected .*, got 'one-to-one'"),
        (0, 2, "y: expected labels below 2, got 2"),
        (0, 1, "num_classes: expected at least 2"),
    ],
)
def test_targets_out_of_range_are_named(target, classes, message):
    with pytest.raises(ValueError, match=message):
        target_labels(torch.tensor([0, 1, 2]), target, classes)


def test_success_rate_leaves_out_images_of_the_target_class():
    y = torch.tensor([0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 0, 1, 0])
    # of the three images that are not class 0, two are called 0 and one keeps its class
    assert attack_success_rate(predicted, y, 0, 3) == pytest.approx(2 / 3)
    assert robust_accuracy(predicted, y, 0, 3) == pytest.approx(1 / 3)
    assert false_target_rate(predicted, y, 0, 3) == pytest.approx(2 / 3)
    assert clean_accuracy(predicted, y) == pytest.approx(3 / 5)
    assert per_class_accuracy(predicted, y, 4) == [1.0, 0.5, 0.0, None]


def test_all_to_all_wants_the_next_class_for_every_image():
    y = torch.tensor([0, 1, 2, 2])
    predicted = torch.tensor([1, 1, 0, 1])
    assert attack_success_rate(predicted, y, "all-to-all", 3) == 0.5
    assert robust_accuracy(predicted, y, "all-to-all", 3) == 0.25
    assert false_target_rate(predicted, y, "all-to-all", 3) == 0.5


def test_set_of_target_images_alone_has_no_success_rate():
    with pytest.raises(ValueError, match="of another class than the target"):
        attack_success_rate(torch.tensor([1]), torch.tensor([1]), 1, 3)


@pytest.mark.parametrize(
    ("clean", "success", "expected"),
    [
        ((0.9, 0.9), (1.0, 0.0), 1.0),
        ((0.9, 0.9), (1.0, 1.0), 0.5),
        ((0.9, 0.8), (1.0, 0.1), 0.9),
        ((0.847, 0.812), (1.0, 0.031), 0.967),
        ((0.8, 0.9), (0.5, 0.6), 0.5),
        ((1.0, 0.0), (1.0, 1.0), 0.0),
    ],
)
def test_defense_effectiveness_rate_by_hand(clean, success, expected):
    rate = defense_effectiveness_rate(
        clean_accuracy_before=clean[0],
        clean_accuracy_after=clean[1],
        attack_success_rate_before=success[0],
        attack_success_rate_after=success[1],
    )
    assert rate == pytest.approx(expected)


@given(*[st.floats(0, 1)] * 4)
def test_defense_effectiveness_rate_stays_within_zero_and_one(a, b, c, d):
    rate = defense_effectiveness_rate(
        clean_accuracy_before=a,
        clean_accuracy_after=b,
        attack_success_rate_before=c,
        attack_success_rate_after=d,
    )
    assert 0 <= rate <= 1


def test_per_cent_given_as_a_rate_is_refused():
    with pytest.raises(ValueError, match=r"clean_accuracy_before: expected a rate .* got 84\.7"):
        defense_effectiveness_rate(
            clean_accuracy_before=84.7,
            clean_accuracy_after=0.8,
            attack_success_rate_before=1.0,
            attack_success_rate_after=0.0,
        )


def test_evaluate_gives_every_rate():
    x, y = images_of([0, 1, 2, 3])
    rates = evaluate(Reader(), x, y, num_classes=4, trigger=white_corner, target=0, batch_size=3)
    assert rates == {
        "clean_accuracy": 1.0,
        "per_class_accuracy": [1.0] * 4,
        "attack_success_rate": 1.0,
        "robust_accuracy": 0.0,
        "false_target_rate": 0.0,
    }
    untouched = evaluate(Reader(), x, y, num_classes=4, trigger=torch.clone, target=0)
    assert untouched["attack_success_rate"] == 0.0
    assert untouched["robust_accuracy"] == 1.0


def test_evaluate_all_to_all_uses_the_next_class():
    x, y = images_of([0, 1, 2, 3, 3])
    rates = evaluate(Reader(), x, y, num_classes=4, trigger=white_corner, target="all-to-all")
    # only class 3 is followed by class 0, which the trigger brings
    assert rates["attack_success_rate"] == pytest.approx(2 / 5)
    assert rates["robust_accuracy"] == pytest.approx(1 / 5)


def test_evaluate_without_trigger_leaves_its_rates_empty():
    x, y = images_of([0, 1])
    rates = evaluate(Reader(), x, y, num_classes=4)
    assert rates["clean_accuracy"] == 1.0
    assert [rates[k] for k in ("attack_success_rate", "robust_accuracy", "false_target_rate")] == [
        None
    ] * 3


def test_trigger_without_target_is_refused():
    x, y = images_of([0, 1])
    with pytest.raises(ValueError, match="target: expected a value"):
        evaluate(Reader(), x, y, num_classes=4, trigger=white_corner)


@pytest.mark.parametrize("classes", [3, 10])
def test_model_of_other_classes_is_refused(classes):
    x, y = images_of([0, 1, 2])
    with pytest.raises(ValueError, match=rf"model: expected {classes} outputs .*, got 4"):
        evaluate(Reader(), x, y, num_classes=classes, trigger=white_corner, target=classes - 1)


def test_predict_keeps_modes_statistics_and_gradients():
    model = Reader()
    model.norm.eval()
    x, _ = images_of([0, 1, 2])
    logits = predict(model, x, batch_size=2)
    assert logits.shape == (3, 4)
    assert not logits.requires_grad
    assert model.training
    assert not model.norm.training
    assert int(model.norm.num_batches_tracked) == 0


def test_uint8_and_float_images_give_the_same_logits():
    x, _ = images_of([3, 1])
    assert torch.equal(predict(Reader(), x), predict(Reader(), x.float() / 255))


def test_outputs_that_are_not_finite_are_counted():
    model = Reader()
    with torch.no_grad():
        model.scale.fill_(float("nan"))
    x, _ = images_of([0, 1])
    with pytest.raises(FloatingPointError, match="2 of 2 are not"):
        predict(model, x)


def test_empty_set_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        predict(Reader(), torch.zeros(0, 1, 4, 4))
