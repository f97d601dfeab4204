"""I-BAU: adversarial unlearning as a minimax problem, with the implicit hypergradient.

    θ* = argmin_θ max_δ  mean L(f_θ(x + δ), y)                     δ one perturbation for all images

    inner:  δ ← 0;  one pass of descent on  L_in = −CE(f(x + δ), c) + 0.001 ‖δ‖²,  c what f calls x
    outer:  every batch:  L_out = CE(f(x + m δ), y),  m = 1 for one image in a hundred
            v ← 0;  K times  v ← (∂Φ/∂δ)ᵀ v + ∂L_out/∂δ,    Φ = δ − 0.1 ∇_δ L_in, c = y
            ∇θ = ∂L_out/∂θ + (∂Φ/∂θ)ᵀ v                            Adam

Zeng et al. 2022 (arXiv:2110.03735), algorithm 1, and the authors' code: no bound on ‖δ‖ but the
regulariser, Φ on the first batch alone, evaluation mode, five rounds. Threat model: white box, a
few per cent of clean data, no trigger.

Cost of a round over n batches: 2 n forwards and n input backwards inside; outside, for each batch,
2 forwards, 1 backward, 1 backward with a graph and K backwards through that graph (the first
product has v = 0 and the authors' code computes it, too: K + 1 there). The graph is made once a
batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bdu.data import as_unit_float
from bdu.defenses.course import Course, Distilled, check_numbers, read_options
from bdu.defenses.protocol import DefenderData, Result, Samples

NAME = "i-bau"
_PENALTY = 0.001
_MAP_RATE = 0.1


@dataclass(frozen=True)
class Settings(Distilled):
    """The knobs of I-BAU.

    Attributes:
        rounds: of inner and outer.
        lr: of Adam.
        inner_lr: of the descent on δ.
        fixed_point_steps: K.
        perturbed_share: of each batch's images that δ is added to; at least one is.
        batch_size: samples a step.
    """

    rounds: int = 5
    lr: float = 1e-3
    inner_lr: float = 10.0
    fixed_point_steps: int = 5
    perturbed_share: float = 0.01
    batch_size: int = 100
    augment: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("rounds", "fixed_point_steps", "batch_size"))
        check_numbers(self, positive=("lr", "inner_lr"), shares=("perturbed_share",))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`."""
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    optimizer = course.adam(s.lr)
    for _ in course.stage("unlearn", s.rounds, optimizer):
        course.student.eval()
        parts = list(course.batches(data.clean, s.batch_size))
        delta = _perturbation(course.student, parts, s)
        for batch in parts:
            with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivative
                loss = _hypergradient(course, delta, parts[0], batch, s)
            course.apply(optimizer, loss)
    return course.result()


def _perturbation(model: nn.Module, parts: list[Samples], s: Settings) -> Tensor:
    delta = torch.zeros_like(as_unit_float(parts[0].x[:1])).requires_grad_()
    for batch in parts:
        images = as_unit_float(batch.x)
        (slope,) = torch.autograd.grad(_inner(model, images, _called(model, images), delta), delta)
        with torch.no_grad():
            delta -= s.inner_lr * slope
    return delta


def _called(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


def _inner(model: nn.Module, images: Tensor, classes: Tensor, delta: Tensor) -> Tensor:
    loss = -functional.cross_entropy(model(images + delta), classes)
    return loss + _PENALTY * delta.square().sum()


def _hypergradient(
    course: Course, delta: Tensor, first: Samples, batch: Samples, s: Settings
) -> Tensor:
    """Put ∇θ into the parameters' gradients; returns L_out."""
    model, parameters = course.student, [p for _, p in course.named_parameters()]
    images = course.images(batch)
    count = max(1, int(len(batch) * s.perturbed_share))
    chosen = torch.randperm(len(batch), generator=course.generator)[:count].to(images.device)
    delta = delta.detach().requires_grad_()
    mask = torch.zeros(len(batch), 1, 1, 1, device=images.device)
    mask[chosen] = 1.0
    logits = model(images + mask * delta)
    moved = mask.flatten() > 0
    outer = course.clean_loss(logits, images, batch.y, s.distillation, moved=moved)
    slope, *gradients = torch.autograd.grad(outer, [delta, *parameters], allow_unused=True)

    first_images = as_unit_float(first.x)
    inner = _inner(model, first_images, first.y, delta)
    (inner_slope,) = torch.autograd.grad(inner, delta, create_graph=True)
    mapped = delta - _MAP_RATE * inner_slope
    vector = slope  # after the first step, from v = 0
    for _ in range(s.fixed_point_steps - 1):
        (product,) = torch.autograd.grad(mapped, delta, vector, retain_graph=True)
        vector = product + slope
    through = torch.autograd.grad(mapped, parameters, vector, allow_unused=True)
    for parameter, direct, implicit in zip(parameters, gradients, through, strict=True):
        terms = [term for term in (direct, implicit) if term is not None]
        parameter.grad = sum(terms[1:], terms[0]).detach() if terms else None
    return outer
