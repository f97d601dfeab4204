"""auto: clean with several cheap defences, judge them by what a defender can see, keep the best.

    r ← FST                                               the first candidate, and the reference
    φ_t ← what turns f_bd and not r                       for every class t, see classwise.py
    anomaly(t) = (e_t − median) / (1.4826 MAD) over all classes,  e_t = log(J(φ_t) / size(φ_t));
    where φ turns images to the class after their own, `threshold` · J(φ) / 0.5
    deficit(c): of clean images of class c that f_bd misses, see deficit.py
    all anomalies and deficits < `threshold`: f_bd looks clean and is returned as it is
    else of the candidates that at least halve the residue = max over the suspicious t of the share
    of images that φ_t turns, and whose clean accuracy is within `accuracy_margin` of the best such
    (and, where as much as half comes back to all of these, those to which it does not), that with
    the least of residue + what comes back − clean accuracy, or of those within a standard error of
    it the one of the highest clean accuracy; what comes back is the larger residue of that half-way
    on the line to f_bd and that after five of the defender's own images under φ_t were taught as t

Small changes also fool a model that was never backdoored, but what fools it spoils the image for a
copy with a new last layer, too: natural weaknesses are in the data and transfer, a backdoor is in
the weights and does not. And they are about as large for every class. So the suspect model is
compared with its own cleaned copy and a class with the other classes, and no size or rate has to
be known beforehand; with two or three classes there is little to compare. Attacks that leave labels
as they are may have triggers too large to stand out, but give their class a deficit; where none of
its φ_t stands out, all are suspicious then. The candidate that learns from inverted triggers
inverts its own, with other draws than those that judge it.

Ours; that a backdoor's class needs an unusually small change, and the index that says how unusual,
is Neural Cleanse (Wang et al. 2019), that the line back and a few poisoned samples tell shallow
cleaning from deep is PAM (arXiv:2410.09838). Threat model: white box, a few hundred clean samples,
neither trigger nor target known.

Cost: the candidates', an inversion of classwise.py, a forward of f_bd over all clean samples, one
of f_bd and of r over the validation split for each of the 3 T operators, one more of f_bd for each
that is suspicious; and for each candidate a retune attack, five forwards and backwards over the
clean samples, two forwards over the validation split for each operator that is suspicious, and one
for the strongest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from bdu.attacks.retune import retune
from bdu.data import as_unit_float
from bdu.defenses import bi_bau, fst, ulrl
from bdu.defenses.classwise import KINDS, NEXT, Found, Search, invert_every_class, judge
from bdu.defenses.course import (
    COMPLETED,
    USUAL_SPREAD,
    Course,
    Running,
    Shared,
    check_numbers,
    read_options,
    share_called,
    standard_error,
)
from bdu.defenses.deficit import LEAST_DEFICIT, deficits
from bdu.defenses.feature_shift import LEAST_KEPT, alphas
from bdu.defenses.protocol import DefenderData, Result
from bdu.metrics import ALL_TO_ALL, predict, target_labels

NAME = "auto"
CANDIDATES: dict[str, tuple[Callable[..., Result], str, dict[str, Any]]] = {
    "fst": (fst.run, "epochs", {"lr": 0.01, "fresh_bias": False}),
    "bi-bau": (bi_bau.run, "epochs", bi_bau.AGAINST_A_REFERENCE),
    "ulrl": (ulrl.run, "relearn_epochs", {"lr": 5e-3, **ulrl.WITH_LENGTH_KEPT}),
}
"""Name → its run, what its epochs are called, and other settings; the first is the reference."""
_BATCH = 128  # of the candidates
_POISONED = 5  # in the retune attack
_LEAST_FOOLED = 0.25  # of the images, by what is to be called a trigger
_LEAST_CYCLED = 0.5  # to the class after their own: there is no other such change to compare with
_BLIND = (
    "cannot tell whether there is a backdoor, and left the model as it is: fine-tuned with a fresh "
    f"last layer it keeps less than {LEAST_KEPT:g} of its clean accuracy, so there is nothing to "
    "compare it with; more clean samples may help"
)
Tried = Mapping[str, Mapping[str, Tensor]]  # name → weights
_LR_SHARES = (1.0, 0.1, 0.01)  # the next where accuracy collapsed


@dataclass(frozen=True)
class Settings(Shared):
    """The knobs of auto.

    Attributes:
        steps: of a candidate's optimizer at least, whatever the number of samples.
        inversion_steps: for each kind of operator.
        threshold: ≥ 0, of the largest anomaly or deficit, below which a model looks clean; 0: none
            does.
        accuracy_margin: clean accuracy that may be given up for less residue, in [0, 1].
    """

    steps: int = 400
    inversion_steps: int = 200
    threshold: float = LEAST_DEFICIT
    accuracy_margin: float = 0.01
    logit_spread: float | None = USUAL_SPREAD

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, counts=("steps", "inversion_steps"), at_least_zero=("threshold",))
        check_numbers(self, shares=("accuracy_margin",))


def run(model: nn.Module, data: DefenderData, **options: Any) -> Result:
    """Clean a copy; options are those of :class:`bdu.defenses.course.Running` and `Settings`.

    The result's ``stopped`` says what was chosen, and why.
    """
    running, s = read_options(Settings, options)
    course = Course(NAME, model, data, s, running)
    names = list(CANDIDATES)
    tried: dict[str, dict[str, Tensor]] = course.once("tried", dict)
    for number in course.stage("try", len(names), guarded_from=None):
        reference = _with(course.before, tried[names[0]]) if number else None
        suspect = _with(model, course.before.state_dict())
        cleaned = _candidate(names[number], suspect, data, s, running, reference)
        if cleaned is None:
            course.end_stage()
            continue
        tried[names[number]] = dict(cleaned.state_dict())
        course.student.load_state_dict(cleaned.state_dict())
        anomaly = float(_anomalies(course, s, tried).max())
        targets = _operators(course, s, tried).targets
        deficit = float(deficits(course, targets).max())
        course.note(anomaly=anomaly, deficit=deficit)
        if max(anomaly, deficit) < s.threshold:
            course.end_stage()
    if names[0] not in tried:
        result = course.result()
        if result.stopped == COMPLETED:  # else the suspect model's outputs are no numbers
            return replace(result, stopped=_BLIND)
        return result
    anomalies = _anomalies(course, s, tried)
    missing = deficits(course, _operators(course, s, tried).targets)
    suspicious = _suspicious(anomalies, missing, s.threshold)
    if suspicious.any():
        chosen, reason = _chosen(course, s, tried, suspicious)
        weights = tried[chosen]
    else:
        reason = (
            f"looks clean and was left as it is: anomaly {float(anomalies.max()):.2f} and deficit "
            f"{float(missing.max()):.2f}, both below {s.threshold:g}"
        )
        weights = dict(course.before.state_dict())
    targets = _operators(course, s, tried).targets
    absent = targets[~torch.isin(targets, course.shown) & (targets != NEXT)].tolist()
    if absent:
        named = ", ".join(map(str, absent))
        reason += f"; no clean sample shows class {named}, whose triggers were not looked for"
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
) -> nn.Module | None:
    method, epochs, own = CANDIDATES[name]
    if name == "bi-bau":
        own = {"reference": reference, "inversion_steps": s.inversion_steps, **own}
    batches = math.ceil(len(data.clean) / _BATCH)
    own = {epochs: max(20, math.ceil(s.steps / batches)), "batch_size": _BATCH, **own}
    shared = {field.name: getattr(s, field.name) for field in fields(Shared)}
    own = {**shared, **own, "logit_spread": None}  # this model's are scaled already
    changes: list[dict[str, float]]
    if reference is None:  # this is to be one
        changes = [{"alpha": alpha} for alpha in alphas()]
        least = LEAST_KEPT * share_called(model, data.clean_validation)
    else:
        changes, least = [{"lr": share * own["lr"]} for share in _LR_SHARES], 0.0
    for change in changes:
        result = method(
            model, data, seed=running.seed, progress=running.progress, **{**own, **change}
        )
        kept = share_called(result.model, data.clean_validation)
        if result.stopped == COMPLETED and kept >= least:
            return result.model
    return None if reference is None else result.model


def _with(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    return other


def _anomalies(course: Course, s: Settings, tried: Tried) -> Tensor:
    """Of every operator on held-out images, (kinds, targets)."""

    def make() -> Tensor:
        found, reference = _operators(course, s, tried), _with(course.before, _first(tried))
        fooled, sizes = judge(found, course.before, reference, course.data.clean_validation)
        ease = (fooled.clamp(min=0.01) / sizes.clamp(min=1e-6)).log()
        # What r has forgotten of a class that no clean sample shows, φ turns with ease.
        shown = torch.isin(found.targets, course.shown)
        classes = ease[:, shown]
        usual = classes.nanmedian(1, keepdim=True).values
        spread = 1.4826 * (classes - usual).abs().nanmedian(1, keepdim=True).values
        least = [kind.least_spread for kind in KINDS.values()]
        anomaly = (ease - usual) / spread.maximum(spread.new_tensor(least)[:, None])
        anomaly = torch.where(shown & (fooled >= _LEAST_FOOLED), anomaly, 0.0).nan_to_num(0.0)
        next_class = s.threshold / _LEAST_CYCLED * fooled
        return torch.where(found.targets == NEXT, next_class, anomaly)

    anomalies: Tensor = course.once("anomalies", make)
    return anomalies


def _suspicious(anomalies: Tensor, missing: Tensor, threshold: float) -> Tensor:
    """Which operators are to turn nothing any more, (kinds, targets) bool."""
    anomalous = anomalies >= threshold
    # Beside one that stands out the others of a class are weak spots, which no removal closes.
    return anomalous | ((missing >= threshold) & ~anomalous.any(0))


def _operators(course: Course, s: Settings, tried: Tried) -> Found:
    clean = course.data.clean
    state = course.once(
        "operators",
        lambda: invert_every_class(
            course.before,
            _with(course.before, _first(tried)),
            clean,
            seed=course.seed + 1,  # not that of a candidate
            # J is measured on held-out images instead
            settings=Search(steps=s.inversion_steps, strict=False, judged_on=0),
            wrap=course.bar("inversion"),
        ).state(),
    )
    return Found.from_state(state, clean.x.shape[1:])


def _first(tried: Tried) -> Mapping[str, Tensor]:
    return tried[next(iter(CANDIDATES))]


def _chosen(
    course: Course,
    s: Settings,
    tried: Tried,
    suspicious: Tensor,
) -> tuple[str, str]:
    """The best candidate, and why."""
    samples, before = course.data.clean_validation, dict(course.before.state_dict())
    found = _operators(course, s, tried)
    strengths = judge(found, course.before, None, samples, suspicious)[0]
    strongest = torch.zeros_like(suspicious)
    strongest.view(-1)[strengths.masked_fill(~suspicious, -1.0).argmax()] = True

    def residue_of(model: nn.Module, only: Tensor = suspicious) -> float:
        return float(judge(found, model, None, samples, only)[0].max())

    judged: dict[str, tuple[float, float, float]] = {}
    for name, weights in tried.items():
        cleaned, between = (_with(course.before, w) for w in (weights, _half_way(weights, before)))
        back = residue_of(between)
        again = _retuned(course, cleaned, found, strongest)
        if again is not None:
            back = max(back, residue_of(again, strongest))
        judged[name] = share_called(cleaned, samples), residue_of(cleaned), back
    count = len(samples)
    worked = float(strengths.max())
    # Accuracy decides among removals alone: where the suspect model was trained on the defender's
    # own images, leaving it as it is looks best.
    removed = {n: values for n, values in judged.items() if values[1] <= worked / 2}
    best = max(accuracy for accuracy, _, _ in (removed or judged).values())
    least = best - s.accuracy_margin - standard_error(best, count)
    good = {n: values for n, values in (removed or judged).items() if values[0] >= least}
    # Where all of these only hide the backdoor, one that does not is worth some accuracy.
    lasting = {n: values for n, values in removed.items() if values[2] < worked / 2}
    if not good.keys() & lasting.keys():
        good |= lasting
    # Not the residue alone: a removal that leaves less by chance may be gone with a few steps. And
    # a point of accuracy is worth a point of it, so that chance does not decide among good ones.
    # Of those within a standard error of the best, that which costs least: on few images a little
    # less residue is chance, and the accuracy that a rare class lost shows little.
    scores = {n: left + again - kept for n, (kept, left, again) in good.items()}
    first = min(scores, key=scores.__getitem__)
    error = math.hypot(*(standard_error(share, count) for share in good[first]))
    near = [n for n in good if scores[n] <= scores[first] + error]
    name = max(near, key=lambda n: (good[n][0], -scores[n]))
    accuracy, residue, back = judged[name]
    targets = found.targets[suspicious.any(0)].tolist()
    classes = [str(t) for t in targets if t != NEXT]
    others = "; ".join(
        f"{n}: {left:.2f}, {again:.2f}, {kept:.3f}"
        for n, (kept, left, again) in judged.items()
        if n != name
    )
    reason = (
        f"chose {name} of {', '.join(judged)}: a change that turned {worked:.2f} of held-out "
        f"images (to class {', '.join(classes) or 'any'}) turns {residue:.2f} after it and "
        f"{back:.2f} half-way back or retuned; clean accuracy {accuracy:.3f} on the validation "
        f"split ({others})"
    )
    if worked == 0:
        reason += "; as no change works there was nothing to judge the candidates by but accuracy"
    elif not removed:
        reason += "; that is no removal, and no candidate found one"
    elif back >= worked / 2:
        reason += "; as much comes back, the backdoor may only be hidden"
    return name, reason


def _retuned(course: Course, model: nn.Module, found: Found, only: Tensor) -> nn.Module | None:
    """After the retune attack on clean samples, a few of them under one operator; None where no
    sample is of another class than that operator's."""
    clean = course.data.clean
    kind, row = (int(place) for place in torch.nonzero(only)[0])
    operator, target = list(found.operators.values())[kind], int(found.targets[row])
    classes = predict(model, clean.x[:1]).shape[1]
    wanted = target_labels(clean.y, ALL_TO_ALL if target == NEXT else target, classes)
    (others,) = torch.nonzero(clean.y != wanted, as_tuple=True)
    if not len(others):
        return None
    generator = torch.Generator().manual_seed(course.seed)
    chosen = torch.randperm(len(others), generator=generator)[:_POISONED]
    chosen = others[chosen.to(others.device)]
    with torch.no_grad():
        moved, _ = operator(as_unit_float(clean.x[chosen]), torch.full_like(chosen, row))
    moved = moved.clamp(0, 1)  # sampling between pixels of 1 rounds above it
    return retune(model, clean.x, clean.y, moved, wanted[chosen], seed=course.seed).eval()


def _half_way(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.lerp(value, other[name].to(value), 0.5) if value.is_floating_point() else value
        for name, value in one.items()
    }
