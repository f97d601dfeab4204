"""What a backdoor does and what removing it costs; every rate lies in [0, 1].

The rates are functions of predicted and true classes, (N,) int64 each, so that one pass over the
images serves them all; `evaluate` makes those passes.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bdu.data import as_unit_float, check_labels
from bdu.models import device_of, logits_of, modes_kept

Target = int | Literal["all-to-all"]
ALL_TO_ALL: Literal["all-to-all"] = "all-to-all"


def target_labels(y: Tensor, target: Target, num_classes: int) -> Tensor:
    """The label that the attacker wants for each image.

    Args:
        y: (N,) true labels, integer, in [0, num_classes).
        target: one class for all images, or "all-to-all": (y + 1) mod num_classes.
        num_classes: number of classes, at least 2.

    Returns:
        (N,) int64, on y's device.

    Raises:
        ValueError: a label, the target or num_classes out of range.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    y = check_labels(y, num_classes)
    if isinstance(target, str) and target == ALL_TO_ALL:
        return (y + 1) % num_classes
    # a tensor of integers would take 1.5 and True, too, and cut them to 1
    is_integer = isinstance(target, numbers.Integral) and not isinstance(target, bool)
    if not is_integer or not 0 <= int(target) < num_classes:
        raise ValueError(
            f"target: expected an integer in [0, {num_classes - 1}] or {ALL_TO_ALL}, got {target!r}"
        )
    return torch.full_like(y, int(target))


def predict(
    model: nn.Module,
    x: Tensor,
    *,
    batch_size: int = 256,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Logits of `model` for `x`, in evaluation mode and without gradients.

    Args:
        model: returns (N, classes), or what `bdu.models.logits_of` finds that in. Its device is
            used, and its training flags are put back, module by module.
        x: (N, C, H, W), uint8, or float in [0, 1]; on any device.
        batch_size: images at a time, at least 1.
        transform: applied to each float batch on the model's device, for example a trigger.

    Returns:
        (N, classes) float32 on the CPU.

    Raises:
        ValueError: no images, or outputs of another shape.
        FloatingPointError: an output is NaN or infinite; its class would be meaningless.
    """
    if len(x) == 0:
        raise ValueError(f"x: expected at least one image, got {tuple(x.shape)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    device = device_of(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    outputs: list[Tensor] = []
    with torch.no_grad(), modes_kept(model):
        model.eval()
        for batch in x.split(batch_size):
            images = as_unit_float(batch.to(device))
            if transform is not None:
                images = transform(images)
            logits = logits_of(model(images.to(dtype)))
            if logits.dim() != 2 or len(logits) != len(batch):
                raise ValueError(
                    f"model: expected outputs ({len(batch)}, classes), got {tuple(logits.shape)}"
                )
            outputs.append(logits.float())
    result = torch.cat(outputs).cpu()
    if not bool(torch.isfinite(result).all()):
        bad = int((~torch.isfinite(result)).any(1).sum())
        raise FloatingPointError(f"model: expected finite outputs, {bad} of {len(x)} are not")
    return result


def _predicted(
    model: nn.Module,
    x: Tensor,
    num_classes: int,
    batch_size: int,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(N,) predicted classes; a model of other classes would never be seen to call the target."""
    logits = predict(model, x, batch_size=batch_size, transform=transform)
    if logits.shape[1] != num_classes:
        raise ValueError(
            f"model: expected {num_classes} outputs (num_classes), got {logits.shape[1]}"
        )
    return logits.argmax(1)


def _share(hits: Tensor, of: Tensor, name: str, expected: str) -> float:
    count = int(of.sum())
    if count == 0:
        raise ValueError(f"{name}: expected at least one image {expected}, got none")
    return int((hits & of).sum()) / count


def _pair(predicted: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if predicted.shape != y.shape or predicted.dim() != 1:
        raise ValueError(
            f"predicted: expected classes of shape {tuple(y.shape)}, got {tuple(predicted.shape)}"
        )
    return predicted.cpu(), y.cpu()


def clean_accuracy(predicted: Tensor, y: Tensor) -> float:
    """Share of untriggered images predicted as their class.

    Args:
        predicted: (N,) predicted classes, integer.
        y: (N,) true classes, integer.
    """
    predicted, y = _pair(predicted, y)
    return _share(predicted == y, torch.ones_like(y, dtype=torch.bool), "y", "")


def per_class_accuracy(predicted: Tensor, y: Tensor, num_classes: int) -> list[float | None]:
    """clean_accuracy of each class in label order; None for a class without images."""
    predicted, y = _pair(predicted, y)
    return [
        clean_accuracy(predicted[y == label], y[y == label]) if bool((y == label).any()) else None
        for label in range(num_classes)
    ]


def attack_success_rate(predicted: Tensor, y: Tensor, target: Target, num_classes: int) -> float:
    """Share of triggered images predicted as the target, among those of another class.

    Args:
        predicted: (N,) classes predicted for the triggered images, integer.
        y: (N,) true classes, integer.
        target: a class, or "all-to-all" ((y + 1) mod num_classes).
        num_classes: number of classes.

    Raises:
        ValueError: all images are of the target class, or values out of range.
    """
    wanted = target_labels(y, target, num_classes).cpu()
    predicted, y = _pair(predicted, y)
    return _share(predicted == wanted, y != wanted, "y", "of another class than the target")


def robust_accuracy(predicted: Tensor, y: Tensor, target: Target, num_classes: int) -> float:
    """Share of the images that attack_success_rate counts which keep their own class."""
    wanted = target_labels(y, target, num_classes).cpu()
    predicted, y = _pair(predicted, y)
    return _share(predicted == y, y != wanted, "y", "of another class than the target")


def false_target_rate(predicted: Tensor, y: Tensor, target: Target, num_classes: int) -> float:
    """attack_success_rate's floor: the same share, with `predicted` for untriggered images."""
    return attack_success_rate(predicted, y, target, num_classes)


def defense_effectiveness_rate(
    *,
    clean_accuracy_before: float,
    clean_accuracy_after: float,
    attack_success_rate_before: float,
    attack_success_rate_after: float,
) -> float:
    """DER = [max(0, ASR_bd − ASR_def) − max(0, ACC_bd − ACC_def) + 1] / 2, in [0, 1].

    1 is a backdoor removed at no cost, ½ no change, 0 all accuracy lost with the backdoor whole.
    Losing accuracy is subtracted; BackdoorBench's `defense_effectiveness_rate` adds it, its
    `_simplied` variant agrees with this one.

    Raises:
        ValueError: a rate outside [0, 1].

    Source: FT-SAM, equation 7.
    """
    rates = {
        "clean_accuracy_before": clean_accuracy_before,
        "clean_accuracy_after": clean_accuracy_after,
        "attack_success_rate_before": attack_success_rate_before,
        "attack_success_rate_after": attack_success_rate_after,
    }
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(f"{name}: expected a rate in [0, 1], got {rate}")
    removed = max(0.0, attack_success_rate_before - attack_success_rate_after)
    lost = max(0.0, clean_accuracy_before - clean_accuracy_after)
    return (removed - lost + 1) / 2


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    trigger: Callable[[Tensor], Tensor] | None = None,
    target: Target | None = None,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Every rate of `model` on one labelled set.

    Args:
        model: takes float images in [0, 1], (N, C, H, W).
        x: (N, C, H, W), uint8 or float in [0, 1], untriggered.
        y: (N,) true classes, integer, in [0, num_classes).
        num_classes: number of classes.
        trigger: puts the trigger on a float batch; only images whose class is not the target
            pass through it. Given exactly when target is.
        target: a class or "all-to-all".
        batch_size: images at a time.

    Returns:
        clean_accuracy, per_class_accuracy (list), and attack_success_rate, robust_accuracy and
        false_target_rate, which are None without a trigger.

    Raises:
        ValueError: as the functions above, only one of trigger and target, or a model with
            another number of outputs than num_classes.
    """
    if (trigger is None) != (target is None):
        missing = "trigger" if trigger is None else "target"
        raise ValueError(f"{missing}: expected a value, as trigger and target go together")
    y = check_labels(y, num_classes).cpu()
    if len(y) != len(x):
        raise ValueError(f"y: expected {len(x)} labels, as x, got {len(y)}")
    clean = _predicted(model, x, num_classes, batch_size)
    rates: dict[str, Any] = {
        "clean_accuracy": clean_accuracy(clean, y),
        "per_class_accuracy": per_class_accuracy(clean, y, num_classes),
        "attack_success_rate": None,
        "robust_accuracy": None,
        "false_target_rate": None,
    }
    if trigger is None or target is None:
        return rates
    rates["false_target_rate"] = false_target_rate(clean, y, target, num_classes)
    others = (y != target_labels(y, target, num_classes)).nonzero().flatten()
    images = x[others.to(x.device)]
    triggered = _predicted(model, images, num_classes, batch_size, trigger)
    rates["attack_success_rate"] = attack_success_rate(triggered, y[others], target, num_classes)
    rates["robust_accuracy"] = robust_accuracy(triggered, y[others], target, num_classes)
    return rates


def path_success_rates(
    model: nn.Module,
    towards: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    trigger: Callable[[Tensor], Tensor],
    target: Target,
    num_classes: int,
    points: int = 5,
    batch_size: int = 256,
) -> list[float]:
    """ASR on the straight line from a model to another, both ends included.

    θ(t) = (1 − t) θ + t θ_towards for t = 0, 1 / (points − 1), ..., 1, floating-point buffers
    likewise. A removal that went far stays low along most of it; one that only hid the backdoor has
    no barrier (PAM, arXiv:2410.09838, section 3: linear mode connectivity).

    Args:
        model: the purified model; untouched.
        towards: the suspect model, of the same parameters and buffers.
        x, y, trigger, target, num_classes, batch_size: as for `evaluate`.
        points: at least 2.

    Raises:
        ValueError: as `evaluate`, or models that differ in shape.
    """
    if points < 2:
        raise ValueError(f"points: expected at least 2, got {points}")
    ends = [one.state_dict() for one in (model, towards)]
    shapes = [{name: tuple(value.shape) for name, value in end.items()} for end in ends]
    if shapes[0] != shapes[1]:
        names = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        raise ValueError(f"towards: expected the tensors of model, got others: {names}")
    between = copy.deepcopy(model)
    wanted = target_labels(y, target, num_classes)
    others = (y != wanted).nonzero().flatten()
    rates = []
    for k in range(points):
        t = k / (points - 1)
        mixed = {
            name: torch.lerp(value, ends[1][name].to(value), t)
            if value.is_floating_point()
            else value
            for name, value in ends[0].items()
        }
        between.load_state_dict(mixed)
        images = x[others.to(x.device)]
        called = _predicted(between, images, num_classes, batch_size, trigger)
        rates.append(attack_success_rate(called, y[others].cpu(), target, num_classes))
    return rates
