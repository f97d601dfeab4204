"""auto: clean with several cheap defences, judge them by what a defender can see, keep the best.

    A ← FST, distilled                                    the first candidate
    δ_t ← argmin CE(f_bd(x + δ), t), ‖δ‖∞ ≤ ε             for every class t, on images of the others
    s_t(f) = share of held-out images of other classes that f calls t under δ_t
    gap = max_t s_t(f_bd) − s_t(A)                        and likewise of one δ away from all labels
    gap < `threshold`: f_bd looks clean and is returned as it is
    else of the candidates that lower the residue = max s_t over the suspicious t by `threshold`,
    and whose clean accuracy is within `accuracy_margin` of the best such, that with the lowest
    residue, and of two alike the one whose residue half-way on the line back to f_bd is lower

One perturbation for all images also fools a model that was never backdoored, but what fools it
still fools it after a new last layer and a few epochs of clean images: natural weaknesses are in
the data and transfer, a backdoor is in the weights and does not. So the suspect model is compared
with its own cleaned copy, and no size or rate has to be known beforehand. Ours; that one
perturbation finds a backdoor is Neural Cleanse (Wang et al. 2019) and I-BAU (arXiv:2110.03735),
that the line back tells shallow cleaning from deep is PAM (arXiv:2410.09838). Threat model: white
box, a few hundred clean samples, neither trigger nor target known.

Cost: the candidates', and for each radius that is tried (classes + 1) · `probe_steps` forwards and
input backwards of the suspect model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bdu.data import as_unit_float
from bdu.defenses import bi_bau, fst, ulrl
from bdu.defenses.course import (
    COMPLETED,
    Course,
    Running,
    Shared,
    check_numbers,
    read_options,
    share_called,
    standard_error,
)
from bdu.defenses.protocol import DefenderData, Result, Samples
from bdu.metrics import predict

NAME = "auto"
CANDIDATES: dict[str, tuple[Callable[..., Result], str, dict[str, Any]]] = {
    "fst": (fst.run, "epochs", {"lr": 0.01, "anneal": True, "distillation": 0.9}),
    "bi-bau": (bi_bau.run, "epochs", bi_bau.AGAINST_A_REFERENCE),
    "ulrl": (ulrl.run, "relearn_epochs", {"lr": 5e-3, "distillation": 0.9, "least": 1}),
}
"""Name → its run, what its epochs are called, and other settings; the first is what the suspect
model is compared with, and the reference of the second."""
_BATCH = 128  # of the candidates
# Of a candidate's learning rate, the next where accuracy collapsed: large logits want a small one.
_LR_SHARES = (1.0, 0.1, 0.01)
_RADII = [2.0**k / 255 for k in range(2, 8)]
_TURNED = 0.5  # of the images, by a class's probe, in the median


@dataclass(frozen=True)
class Settings(Shared):
    """The knobs of auto.

    Attributes:
        steps: of a candidate's optimizer at least, whatever the number of samples.
        radius: ε, in pixels of [0, 1]; None: the smallest of 4, 8, ..., 128 / 255 at which the
            median of s_t(f_bd) over the classes is at least a half.
        probe_steps: signed steps on δ, each an eighth of ε.
        threshold: gap in [0, 1] below which a model looks clean.
        accuracy_margin: clean accuracy that may be given up for less residue, in [0, 1].
        batch_size: images a step of a probe.
    """

    steps: int = 400
    radius: float | None = None
    probe_steps: int = 30
    threshold: float = 0.4
    accuracy_margin: float = 0.01
    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("steps", "probe_steps", "batch_size"))
        check_numbers(self, shares=("threshold", "accuracy_margin"))
        if self.radius is not None:
            check_numbers(self, positive=("radius",))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`.

    The result's ``stopped`` says what was chosen, and why.
    """
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    names = list(CANDIDATES)
    probes = course.once("probes", lambda: _probes(course, s))
    tried: dict[str, dict[str, Tensor]] = course.once("tried", dict)
    suspect = _successes(course.before, data, probes)
    for number in course.stage("try", len(names), guarded_from=None):
        first = _with(course.before, tried[names[0]]) if number else None
        cleaned = _candidate(names[number], model, data, s, running, first)
        tried[names[number]] = dict(cleaned.state_dict())
        course.student.load_state_dict(cleaned.state_dict())
        gap = float((suspect - _successes(cleaned, data, probes)).max())
        course.note(gap=gap)
        if number == 0 and gap < s.threshold:
            course.end_stage()
    if names[0] not in tried:  # the suspect model's outputs are no numbers
        return course.result()
    reference = _successes(_with(course.before, tried[names[0]]), data, probes)
    suspicious = suspect - reference >= s.threshold
    if suspicious.any():
        chosen, reason = _chosen(course, s, tried, probes, suspicious)
        weights = tried[chosen]
    else:
        gap = float((suspect - reference).max())
        reason = f"looks clean and was left as it is: gap {gap:.2f}, below {s.threshold:g}"
        weights = dict(course.before.state_dict())
    for _ in course.stage("choose", 1, guarded_from=None):
        course.student.load_state_dict(weights)
    return replace(course.result(), stopped=reason)


def _candidate(
    name: str,
    model: nn.Module,
    data: DefenderData,
    s: Settings,
    running: Running,
    reference: nn.Module | None = None,
) -> nn.Module:
    method, epochs, own = CANDIDATES[name]
    if name == "bi-bau":
        own = {"reference": reference, **own}
    batches = math.ceil(len(data.clean) / _BATCH)
    own = {epochs: max(20, math.ceil(s.steps / batches)), "batch_size": _BATCH, **own}
    shared = {field.name: getattr(s, field.name) for field in fields(Shared)}
    for lr_share in _LR_SHARES:
        own["lr"] = lr_share * CANDIDATES[name][2]["lr"]
        result = method(model, data, seed=running.seed, progress=running.progress, **shared, **own)
        if result.stopped == COMPLETED:
            break
    return result.model


def _with(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    return other


def _probes(course: Course, s: Settings) -> Tensor:
    """δ of every class and, last, away from all labels: (classes + 1, C, H, W)."""
    clean = course.data.clean
    with torch.no_grad():
        classes = course.before(as_unit_float(clean.x[:1])).shape[1]
    deltas = torch.zeros(0)
    for radius in _RADII if s.radius is None else [s.radius]:
        every = [_probe(course, clean, t, radius, s) for t in (*range(classes), None)]
        deltas = torch.cat(every)
        if _successes(course.before, course.data, deltas)[:-1].median() >= _TURNED:
            break
    return deltas


def _probe(
    course: Course, clean: Samples, target: int | None, radius: float, s: Settings
) -> Tensor:
    if target is not None:
        (others,) = torch.nonzero(clean.y != target, as_tuple=True)
        clean = clean.at(others)
    delta = torch.zeros_like(as_unit_float(clean.x[:1]))
    for _ in range(s.probe_steps):
        drawn = torch.randint(len(clean), (s.batch_size,), generator=course.generator)
        batch = clean.at(drawn)
        delta.requires_grad_()
        logits = course.before((as_unit_float(batch.x) + delta).clamp(0, 1))
        wanted = batch.y if target is None else torch.full_like(batch.y, target)
        loss = functional.cross_entropy(logits, wanted)
        (slope,) = torch.autograd.grad(loss if target is not None else -loss, delta)
        step = radius / 8 * slope.sign()
        delta = (delta.detach() - step).clamp(-radius, radius)
    return delta.detach()


def _successes(model: nn.Module, data: DefenderData, probes: Tensor) -> Tensor:
    """s of every probe, (classes + 1,)."""
    samples, rates = data.clean_validation, []
    images, y = as_unit_float(samples.x), samples.y.cpu()
    for target, delta in enumerate(probes):
        called = predict(model, (images + delta).clamp(0, 1)).argmax(1).cpu()
        away = target == len(probes) - 1
        hits = called != y if away else (called == target)[y != target]
        rates.append(hits.float().mean())
    return torch.stack(rates).nan_to_num(0.0)  # NaN where no image is of another class


def _chosen(
    course: Course,
    s: Settings,
    tried: Mapping[str, Mapping[str, Tensor]],
    probes: Tensor,
    suspicious: Tensor,
) -> tuple[str, str]:
    """The best candidate, and why."""
    data, before = course.data, dict(course.before.state_dict())
    judged: dict[str, tuple[float, float, float]] = {}
    for name, weights in tried.items():
        ends = [_with(course.before, w) for w in (weights, _half_way(weights, before))]
        residue, half_way = (float(_successes(f, data, probes)[suspicious].max()) for f in ends)
        judged[name] = share_called(ends[0], data.clean_validation), residue, half_way
    count = len(data.clean_validation)
    worked = float(_successes(course.before, data, probes)[suspicious].max())
    # Accuracy decides among removals alone: where the suspect model was trained on the defender's
    # own images, leaving it as it is looks best.
    removed = {n: values for n, values in judged.items() if values[1] <= worked - s.threshold}
    best = max(accuracy for accuracy, _, _ in (removed or judged).values())
    least = best - s.accuracy_margin - standard_error(best, count)
    good = {n: values for n, values in (removed or judged).items() if values[0] >= least}
    # What the validation split cannot tell apart counts as alike.
    apart = 2 * standard_error(min(residue for _, residue, _ in good.values()), count)
    name = min(good, key=lambda n: (round(good[n][1] / apart), good[n][2]))
    accuracy, residue, half_way = judged[name]
    classes = [str(t) for t in suspicious.nonzero().flatten().tolist() if t < len(suspicious) - 1]
    reason = (
        f"chose {name} of {', '.join(judged)}: a perturbation that turned {worked:.2f} of held-out "
        f"images (to class {', '.join(classes) or 'any'}) turns {residue:.2f} after it and "
        f"{half_way:.2f} half-way back; clean accuracy {accuracy:.3f} on the validation split"
    )
    if not removed:
        reason += "; that is no removal, and no candidate found one"
    return name, reason


def _half_way(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.lerp(value, other[name].to(value), 0.5) if value.is_floating_point() else value
        for name, value in one.items()
    }
