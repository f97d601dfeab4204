"""TSBD: zero the weights that clean unlearning moves most, then fine-tune against active neurons.

    1. θ' ← ascend CE(f(x), y) until accuracy is 0.1 or less;  change of neuron k: Σ |θ'_k − θ_k|
    2. of the share n of neurons that changed most, set the share m of the weights that changed most
       to zero, over all convolutions and linear layers but the last
    3. descend CE with (1 − α) ∇L(θ) + α ∇L(θ + r ∇L/‖∇L‖)

Lin et al., NeurIPS 2024 (arXiv:2405.20291): "Unveiling and Mitigating Backdoor Vulnerabilities
based on Unlearning Weight Changes and Backdoor Activeness". Only summaries were available: the
numbers (n 0.15, m 0.7, r 0.05, α 0.7) and what counts as a neuron (one output channel) are our
reading. Threat model: white box, 5 % clean data, no trigger.

Cost: step 1 at most `unlearn_epochs` forwards and backwards over the clean samples, step 3 two of
each for each of `epochs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bdu.data import as_unit_float
from bdu.defenses.ascent import ascend
from bdu.defenses.course import Course, Distilled, check_numbers, cosine, read_options
from bdu.defenses.head import head_of, row_changes
from bdu.defenses.protocol import DefenderData, Result
from bdu.models import device_of
from bdu.ops import grad_norm

NAME = "tsbd"


@dataclass(frozen=True)
class Settings(Distilled):
    """The knobs of TSBD.

    Attributes:
        unlearn_epochs, unlearn_lr: at most so many passes of step 1, at this learning rate.
        unlearned_accuracy: step 1 ends with an epoch whose accuracy is at most this.
        neuron_share: n, of all neurons together.
        weight_share: m, of the weights of those neurons together.
        epochs, lr: of step 3; the learning rate falls as a cosine.
        radius: r ≥ 0.
        alpha: α, the share of the gradient that is taken there.
        momentum, weight_decay: of SGD.
        batch_size: samples a step.
    """

    unlearn_epochs: int = 20
    unlearn_lr: float = 1e-2
    unlearned_accuracy: float = 0.1
    neuron_share: float = 0.15
    weight_share: float = 0.7
    epochs: int = 20
    lr: float = 1e-2
    radius: float = 0.05
    alpha: float = 0.7
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("unlearn_epochs", "epochs", "batch_size"))
        check_numbers(self, positive=("unlearn_lr", "lr"))
        shares = ("unlearned_accuracy", "neuron_share", "weight_share", "alpha")
        check_numbers(self, shares=shares, at_least_zero=("radius", "weight_decay"))
        check_numbers(self, below_one=("momentum",))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`."""
    running, s = read_options(Settings, options)
    layers = prunable_layers(model, data)
    course = Course(NAME, model, data, s, running)
    ascend(
        course,
        epochs=s.unlearn_epochs,
        lr=lambda _: s.unlearn_lr,
        accuracy=s.unlearned_accuracy,
        momentum=s.momentum,
        weight_decay=0.0,
        batch_size=s.batch_size,
    )
    zeroed = course.once("zeroed", lambda: _most_changed(course, layers, s))

    def begin() -> None:
        course.student.load_state_dict(course.before.state_dict())
        with torch.no_grad():
            for name, places in zeroed.items():
                course.student.get_parameter(name)[tuple(places.T)] = 0.0

    parameters: list[Tensor] = [p for _, p in course.named_parameters()]
    optimizer = course.sgd(s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    last = s.epochs - 1  # what was set to zero has to be learnt anew first
    for epoch in course.stage("tune", s.epochs, optimizer, begin=begin, guarded_from=last):
        cosine(optimizer, s.lr, epoch, s.epochs)
        course.student.train()
        for batch in course.batches(data.clean, s.batch_size):
            images, y = course.images(batch), batch.y
            suspect = course.suspect_logits(images, s.distillation)

            def gradient(
                images: Tensor = images, y: Tensor = y, suspect: Tensor | None = suspect
            ) -> tuple[Tensor, Any]:
                logits = course.student(images)
                loss = course.clean_loss(logits, images, y, s.distillation, suspect)
                return loss, torch.autograd.grad(loss, parameters, materialize_grads=True)

            loss, here = gradient()
            scale = float(s.radius / (grad_norm(here) + 1e-12))
            before = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                torch._foreach_add_(parameters, here, alpha=scale)
            _, there = gradient()
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)
            for parameter, near, far in zip(parameters, here, there, strict=True):
                parameter.grad = torch.lerp(near, far, s.alpha)
            course.apply(optimizer, loss)
    return course.result()


def prunable_layers(model: nn.Module, data: DefenderData) -> list[str]:
    """Names of the weights that may be set to zero; ValueError where there are none."""
    head = head_of(model, as_unit_float(data.clean.x[:1]).to(device_of(model)))
    names = []
    for layer, module in model.named_modules():
        prunable = isinstance(module, nn.Linear | _ConvNd | nn.MultiheadAttention)
        for name, p in module.named_parameters(prefix=layer, recurse=False) if prunable else ():
            if p.dim() > 1 and p.requires_grad and name != f"{head}.weight":
                names.append(name)
    if not names:
        raise ValueError(
            "model: expected convolutions or linear layers to train before the last one, got none"
        )
    return names


def _most_changed(course: Course, layers: list[str], s: Settings) -> dict[str, Tensor]:
    """Name of a weight → places in it that are set to zero, (places, axes)."""
    student = course.student
    changes = {
        name: (student.get_parameter(name) - course.before.get_parameter(name))
        .detach()
        .abs()
        .flatten(1)
        for name in layers
    }
    neurons = torch.cat([row_changes(torch.zeros_like(c), c) for c in changes.values()])
    least = _least_of(neurons, s.neuron_share)
    # What did not change at all is never among the most changed.
    chosen = {name: (c.sum(1) >= least) & (c.sum(1) > 0) for name, c in changes.items()}
    weights = torch.cat([c[chosen[name]].flatten() for name, c in changes.items()])
    if len(weights) == 0:  # the ascent was stopped before its first step
        return {}
    least_weight = _least_of(weights, s.weight_share)
    places = {}
    for name, change in changes.items():
        hit = (change >= least_weight) & (change > 0) & chosen[name].unsqueeze(1)
        if bool(hit.any()):
            places[name] = hit.view(course.before.get_parameter(name).shape).nonzero()
    return places


def _least_of(values: Tensor, share: float) -> float:
    """The smallest of the share that is largest; infinite where that is none."""
    count = round(share * len(values))
    return float(values.sort().values[-count]) if count else math.inf
