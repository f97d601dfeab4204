"""Balanced unlearning: forget the trigger, keep the rest, stay near the start where it matters.

    θ* ← θ,  F ← F_c · F_c / (F_c + γ F_t)                 # F_c clean, F_t of the target log-odds
    unlearn:   descend  clean(θ) + w · forget(θ)           # the pull of EWC inside every step
    recover:   the same at a learning rate that falls to 0
    keep the latest weights that the validation split cannot tell from the best

Following arXiv:2511.21291 (gradient ascent on triggered samples, EWC on the clean Fisher, recovery;
only its abstract was available) and arXiv:2408.12416 (Fisher-weighted anchor). Ours are: the
unlikelihood loss in place of the ascended cross-entropy, the proximal pull in place of the explicit
penalty, and the contrastive Fisher, which frees what only the backdoor needs. The triggered samples
stay in the loss during recovery, so that clean descent cannot bring the backdoor back.

Cost of a step: a forward and a backward pass over batch_size clean images, two of each over
triggered_batch_size triggered ones, and a forward pass of the teacher over the clean ones. F costs
a forward and a backward pass over each triggered sample and fisher_samples clean ones, once.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from bdu.checkpoint import known_state, save_state
from bdu.data import as_unit_float, augment
from bdu.defenses.course import (
    check_numbers,
    check_same_run,
    fingerprint,
    knows_mirrored,
    settings_of,
    share_called,
    standard_error,
)
from bdu.defenses.distillation import absent, distilled_loss
from bdu.defenses.protocol import (
    Callback,
    DefenderData,
    Line,
    Result,
    Samples,
    collapsed,
    kept_step,
    summary,
    tell,
)
from bdu.fisher import contrastive, fisher_diagonal, scale_to_unit_mean, target_log_odds
from bdu.metrics import predict
from bdu.ops import grad_norm
from bdu.optim import EWCSGD

Forget = Literal["unlikelihood", "cross_entropy", "true_label"]
FisherKind = Literal["contrastive", "clean"]
FisherStored = Literal["float32", "bfloat16", "8bit", "8bit_logarithmic"]
AnchorStored = Literal["float32", "bfloat16"]
_DTYPES: dict[Any, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """The knobs of the balanced method; the defaults are meant to be left alone.

    Attributes:
        forget: what is descended on triggered samples. "true_label": CE with the true class, which
            the defender has to give. "unlikelihood": softplus(ℓ) with ℓ the target's log-odds, full
            slope at the start and none at the end. "cross_entropy": the paper's ascent,
            −min(CE, ceiling). None: "true_label" where the true classes are given, else
            "unlikelihood".
        triggered_weight: w, the weight of that loss.
        ceiling: where "cross_entropy" stops ascending, in nats; None is 2 ln(classes).
        radius: ρ ≥ 0. That loss is descended with its gradient at θ + ρ ∇/‖∇‖, towards the backdoor
            (SAM, Foret et al. 2021, on that loss alone), so that a few steps do not bring it back.
            Not used with "cross_entropy".
        fisher: "contrastive", or "clean" for F_c alone.
        gamma: γ ≥ 0 of the contrastive Fisher.
        fisher_samples: clean samples that F_c is measured on, at most.
        fisher_dtype: what the optimizer keeps F in: "float32", "bfloat16", "8bit" or
            "8bit_logarithmic" (:mod:`bdu.quantization`).
        anchor_dtype: what it keeps θ* in, "float32" or "bfloat16"; None: as the parameters.
        ewc_lambda: λ ≥ 0, for F_c and F_t of mean 1.
        distillation: share of the clean loss that is the divergence from the model before, in
            [0, 1]; the rest is cross-entropy with the labels.
        temperature: of that divergence, > 0.
        unlearn_steps, recovery_steps: length of the two phases.
        lr, momentum: of SGD; recovery lets lr fall linearly to 0.
        max_grad_norm: Euclidean norm the gradient is clipped to.
        batch_size, triggered_batch_size: samples a step, at most as many as there are.
        augment: shift the clean images of every batch by up to an eighth of their size.
        mirror: mirror half of them, too; right for photographs, wrong for digits and signs. None:
            where the model calls mirrored clean images right as often, within a standard error.
        evaluate_every: steps between two looks at the validation split.
        clean_accuracy_floor: stop when clean accuracy on the validation split falls below this
            share of what it was at the start.
    """

    forget: Forget | None = None
    triggered_weight: float = 0.2
    ceiling: float | None = None
    fisher: FisherKind = "contrastive"
    gamma: float = 10.0
    fisher_samples: int = 2000
    fisher_dtype: FisherStored = "float32"
    anchor_dtype: AnchorStored | None = None
    ewc_lambda: float = 10.0
    radius: float = 0.5
    distillation: float = 0.8
    temperature: float = 2.0
    unlearn_steps: int = 300
    recovery_steps: int = 200
    lr: float = 1e-2
    momentum: float = 0.9
    max_grad_norm: float = 5.0
    batch_size: int = 64
    triggered_batch_size: int = 32
    augment: bool = True
    mirror: bool | None = None
    evaluate_every: int = 25
    clean_accuracy_floor: float = 0.5

    def __post_init__(self) -> None:
        choices = {
            "forget": (*get_args(Forget), None),
            "fisher": get_args(FisherKind),
            "fisher_dtype": get_args(FisherStored),
            "anchor_dtype": (*get_args(AnchorStored), None),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(str, allowed))
                raise ValueError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")
        at_least_one = ("fisher_samples", "batch_size", "triggered_batch_size", "evaluate_every")
        for name in ("unlearn_steps", "recovery_steps", *at_least_one):
            value, least = getattr(self, name), int(name in at_least_one)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")
        if self.unlearn_steps + self.recovery_steps == 0:
            raise ValueError("unlearn_steps: expected at least one step in all, got 0")
        if self.ceiling is not None and not 0 < self.ceiling < math.inf:
            raise ValueError(f"ceiling: expected a number > 0 or None, got {self.ceiling}")
        check_numbers(
            self,
            at_least_zero=("triggered_weight", "radius", "gamma", "ewc_lambda"),
            below_one=("momentum",),
            positive=("lr", "temperature", "max_grad_norm"),
            shares=("distillation", "clean_accuracy_floor"),
        )


def run(
    model: nn.Module,
    data: DefenderData,
    *,
    seed: int,
    callbacks: Iterable[Callback] = (),
    progress: bool = True,
    state_file: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **settings: Any,
) -> Result:
    """Remove a backdoor whose trigger the defender holds samples of; see the module's docstring.

    Batch norm keeps its statistics: the few samples of a defender would make worse ones.

    Args:
        model: classifier of images in [0, 1], logits (N, classes); left untouched.
        data: with triggered samples.
        seed: of the order and of the augmentation.
        callbacks: called with (line, model) at every look at the validation split, the first before
            any step.
        progress: show a progress bar.
        state_file: where the state is written at every look.
        resume: continue from there where it exists; the same weights as an uninterrupted run.
        settings: fields of :class:`Settings`.

    Returns:
        The cleaned copy, in evaluation mode.

    Raises:
        ValueError: a setting out of range, or no triggered samples.
    """
    s = fitting(settings_of(Settings, settings), data)
    assert data.triggered is not None
    callbacks = list(callbacks)
    known = known_state(state_file, resume=resume)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    if s.mirror is None:
        s = replace(s, mirror=knows_mirrored(teacher, data.clean))
    student = copy.deepcopy(model).eval()
    optimizer = EWCSGD(
        [(name, p) for name, p in student.named_parameters() if p.requires_grad],
        lr=s.lr,
        momentum=s.momentum,
        ewc_lambda=s.ewc_lambda,
        fisher=_fisher(student, data, s) if s.ewc_lambda > 0 else None,
        **dtypes_of(s),
        max_grad_norm=s.max_grad_norm,
        error_if_nonfinite=True,
    )
    forget = _forget(s)
    # The ascended cross-entropy has no slope where the model is certain, so no way to the backdoor.
    radius = 0.0 if s.forget == "cross_entropy" else s.radius
    shown = data.clean.y.unique()
    course = _Course(student, optimizer, torch.Generator().manual_seed(seed), s)
    started_with = asdict(s) | {"seed": seed, "model and data": fingerprint(model, data)}
    if known is not None:
        course.load(known, started_with)
    if not course.history:
        tell(callbacks, course.look(data, phase="before"), student)
    steps = s.unlearn_steps + s.recovery_steps
    with tqdm(total=steps, initial=course.step, disable=not progress, unit="step") as bar:
        while course.step < steps and not course.stopped:
            recovering = course.step - s.unlearn_steps
            if recovering >= 0:
                optimizer.param_groups[0]["lr"] = s.lr * (1 - recovering / s.recovery_steps)
            clean = _draw(data.clean, s.batch_size, course.generator)
            bad = _draw(data.triggered, s.triggered_batch_size, course.generator)
            images = as_unit_float(_augmented(clean.x, course.generator, s))
            triggered = as_unit_float(bad.x)
            optimizer.zero_grad()
            with _moved_towards_the_backdoor(student, forget, triggered, bad, radius):
                forget_loss = forget(student(triggered), bad)
                (s.triggered_weight * forget_loss).backward()
            logits = student(images)
            with torch.no_grad():
                taught = teacher(images) if s.distillation else None
            clean_loss = distilled_loss(
                logits,
                clean.y,
                taught,
                s.distillation,
                temperature=s.temperature,
                hidden=absent(shown, logits),
            )
            clean_loss.backward()
            loss = clean_loss + s.triggered_weight * forget_loss
            try:
                optimizer.step()  # which writes nothing if it fails
            except FloatingPointError as error:
                course.stopped = f"stopped at step {course.step + 1}: {error}"
                break

            course.step += 1
            bar.update()
            if course.step % s.evaluate_every == 0 or course.step == steps:
                try:
                    line = course.look(
                        data,
                        phase="unlearn" if recovering < 0 else "recovery",
                        loss=float(loss.detach()),
                        clean_loss=float(clean_loss.detach()),
                        triggered_loss=float(forget_loss.detach()),
                        penalty=float(optimizer.penalty),
                        learning_rate=optimizer.param_groups[0]["lr"],
                    )
                except FloatingPointError as error:  # outputs that are no numbers
                    course.stopped = f"stopped at step {course.step}: {error}"
                    break
                accuracy = line["validation_clean_accuracy"]
                if accuracy < course.lowest_clean_accuracy:
                    least = course.lowest_clean_accuracy
                    course.stopped = collapsed(course.step, accuracy, least)
                try:
                    tell(callbacks, line, student)
                finally:
                    if state_file is not None:
                        save_state(state_file, course.state(started_with))
                bar.set_postfix(summary(line))
    stopped = course.stopped or "ran all its steps"
    kept = course.put_back_kept()
    if kept != course.step:
        stopped += kept_step(kept)
    optimizer.zero_grad()
    return Result(student, course.history, "balanced", asdict(s), stopped)


def fitting(s: Settings, data: DefenderData) -> Settings:
    """With `forget` chosen by what the defender knows; ValueError where the samples do not do."""
    bad = data.triggered
    if bad is None or data.triggered_validation is None:
        raise ValueError("triggered: expected samples, as the balanced method needs them, got None")
    if s.forget is None:
        s = replace(s, forget="unlikelihood" if bad.y_true is None else "true_label")
    if s.forget != "true_label":
        return s
    if bad.y_true is None:
        raise ValueError("triggered: expected (x, y_target, y_true) with forget='true_label'")
    if torch.equal(bad.y_true, bad.y):
        raise ValueError(
            "triggered: expected y_true to be what the images really show, got y_target everywhere"
        )
    return s


class _Course:
    """The run so far: the student, where it stands, and the weights to be kept."""

    def __init__(
        self, student: nn.Module, optimizer: EWCSGD, generator: torch.Generator, s: Settings
    ) -> None:
        self.student, self.optimizer, self.generator = student, optimizer, generator
        self._settings = s
        self.step = 0
        self.history: list[Line] = []
        self.stopped = ""  # why, where it ended before its last step
        self._best_score = -math.inf
        self._kept_step = 0
        self._kept: dict[str, Tensor] = {}

    def look(self, data: DefenderData, **values: Any) -> Line:
        """Measure on the validation split, write a line, and see whether to keep the weights.

        Few samples cannot tell good weights from better ones, and later ones are further from the
        backdoor: kept are the latest whose score, clean accuracy less ASR, is within one standard
        error of the best seen. Ruined ones are never kept: a model that calls everything one class
        has no backdoor either.
        """
        assert data.triggered_validation is not None
        bad = data.triggered_validation
        clean = share_called(self.student, data.clean_validation)
        called = predict(self.student, bad.x).argmax(1)
        attack = float((called == bad.y.cpu()).float().mean())
        line = {
            "step": self.step,
            "steps": self._settings.unlearn_steps + self._settings.recovery_steps,
            **values,
            "validation_clean_accuracy": clean,
            "validation_attack_success_rate": attack,
        }
        if bad.y_true is not None:
            restored = (called == bad.y_true.cpu()).float().mean()
            line["validation_robust_accuracy"] = float(restored)
        self.history.append(line)
        self.lowest_clean_accuracy = (
            self.history[0]["validation_clean_accuracy"] * self._settings.clean_accuracy_floor
        )
        error = standard_error(clean, len(data.clean_validation))
        if clean - attack >= self._best_score - error and clean >= self.lowest_clean_accuracy:
            self._kept_step = self.step
            self._kept = {k: v.detach().clone() for k, v in self.student.state_dict().items()}
        self._best_score = max(self._best_score, clean - attack)
        return line

    def put_back_kept(self) -> int:
        """Put the weights to be kept into the student; returns their step."""
        self.student.load_state_dict(self._kept)
        return self._kept_step

    def state(self, started_with: dict[str, Any]) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "started_with": started_with,
            "stopped": self.stopped,
            "step": self.step,
            "history": self.history,
            "best_score": self._best_score,
            "kept_step": self._kept_step,
            "kept": self._kept,
            "student": dict(self.student.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict[str, Any], started_with: dict[str, Any]) -> None:
        """Take up :meth:`state`.

        Raises:
            ValueError: it is of a run with other settings, another model or other data.
        """
        check_same_run(state, started_with)
        self.stopped = state["stopped"]
        self.step, self.history = state["step"], state["history"]
        self._best_score, self._kept_step = state["best_score"], state["kept_step"]
        self._kept = state["kept"]
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def dtypes_of(s: Settings) -> dict[str, Any]:
    """``fisher_dtype`` and ``anchor_dtype`` as the optimizers take them."""
    return {
        "fisher_dtype": _DTYPES.get(s.fisher_dtype, s.fisher_dtype),
        "anchor_dtype": _DTYPES.get(s.anchor_dtype),
    }


def _fisher(model: nn.Module, data: DefenderData, s: Settings) -> dict[str, Tensor]:
    """F_c of the clean samples, freed where the target's log-odds depend on the weight more."""
    assert data.triggered is not None
    clean = (as_unit_float(data.clean.x), data.clean.y)
    samples = min(s.fisher_samples, len(data.clean))
    clean_fisher = scale_to_unit_mean(
        fisher_diagonal(model, clean, samples=samples, progress=False)
    )
    if s.fisher == "clean" or s.gamma == 0:
        return clean_fisher
    triggered = (as_unit_float(data.triggered.x), data.triggered.y)
    # Not the cross-entropy: it is saturated on triggered samples, and its gradient vanishes.
    triggered_fisher = fisher_diagonal(model, triggered, loss=target_log_odds, progress=False)
    return contrastive(clean_fisher, scale_to_unit_mean(triggered_fisher), s.gamma)


def _forget(s: Settings) -> Callable[[Tensor, Samples], Tensor]:
    """The loss that is descended on triggered samples: (logits, samples) → 0-dim."""

    def unlikelihood(logits: Tensor, bad: Samples) -> Tensor:
        # softplus(ℓ) = −log(1 − p_target), which would overflow if it were written so.
        return functional.softplus(target_log_odds(logits, bad.y)).mean()

    def cross_entropy(logits: Tensor, bad: Samples) -> Tensor:
        classes = torch.tensor(float(logits.shape[1]))
        ceiling = 2 * float(classes.log()) if s.ceiling is None else s.ceiling
        return -functional.cross_entropy(logits, bad.y).clamp(max=ceiling)

    def true_label(logits: Tensor, bad: Samples) -> Tensor:
        assert bad.y_true is not None
        return functional.cross_entropy(logits, bad.y_true)

    return {
        "unlikelihood": unlikelihood,
        "cross_entropy": cross_entropy,
        "true_label": true_label,
    }[s.forget or "unlikelihood"]


@contextmanager
def _moved_towards_the_backdoor(
    model: nn.Module,
    forget: Callable[[Tensor, Samples], Tensor],
    images: Tensor,
    bad: Samples,
    radius: float,
) -> Iterator[None]:
    """Within it the weights stand at θ + radius · ∇/‖∇‖ of the forget loss."""
    if radius == 0:
        yield
        return
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(forget(model(images), bad), params, materialize_grads=True)
    scale = float(radius / (grad_norm(grads) + 1e-12))
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_add_(params, grads, alpha=scale)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, before)


def _draw(samples: Samples, count: int, generator: torch.Generator) -> Samples:
    return samples.at(torch.randperm(len(samples), generator=generator)[:count])


def _augmented(x: Tensor, generator: torch.Generator, s: Settings) -> Tensor:
    if not s.augment:
        return x
    return augment(x, generator, padding=min(x.shape[2:]) // 8, mirror=bool(s.mirror))
