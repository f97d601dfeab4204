"""The course of a defence: its stages, its looks at the validation split, and how it is resumed.

A defence reads like its paper's pseudo-code; what all of them need besides is here. It goes through
named stages of so many rounds. After every round the student is looked at, the callbacks are told,
and the state is written, so that an interrupted run goes on with the same bits.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bdu.checkpoint import digest, known_state, save_state
from bdu.data import as_unit_float, augment
from bdu.defenses.distillation import absent, distilled_loss
from bdu.defenses.head import head_of
from bdu.defenses.inversion import Inversion, Inverted, invert_trigger
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
from bdu.models import Normalize
from bdu.optim import EWCSGD, EWCAdamW

COMPLETED = "ran all its steps"
USUAL_SPREAD = 3.5
"""`logit_spread` of our settings; the models that those were chosen on have about 3."""
_SPREAD_SAMPLES = 512

Kept = TypeVar("Kept")
Rows = Mapping[str, Tensor]
"""Name of a parameter → indices into its first axis, (K,) int64."""


@dataclass(frozen=True)
class Shared:
    """What every defence that knows no trigger can be told.

    Attributes:
        anchored: pull the weights to those of the suspect model, with the exact Fisher of the
            defender's clean samples, contrastive with the Fisher of the log-odds of the target that
            an inverted trigger finds (:mod:`bdu.defenses.inversion`). Ours; off is as published.
        ewc_lambda: λ ≥ 0 of that pull, for Fishers of mean 1.
        gamma: γ ≥ 0 of the contrastive Fisher; 0 is the clean Fisher alone, and inverts nothing.
        fisher_samples: clean samples that the Fisher is measured on, at most.
        augment: shift the clean images of every batch by up to an eighth of their size.
        mirror: mirror half of them, too; None: where the model calls mirrored clean images right as
            often, within a standard error.
        clean_accuracy_floor: stop when clean accuracy on the validation split falls below this
            share of what it was at the start.
        logit_spread: the logits' standard deviation over the classes at most, as a mean over clean
            images. Where it is more, the last layer is scaled while the method runs, by a power of
            two, and back at the end: learning rates and penalties that fit one model then fit
            one that was trained until its logits were large. Ours; None, as they come, is as
            published.
    """

    anchored: bool = False
    ewc_lambda: float = 10.0
    gamma: float = 10.0
    fisher_samples: int = 2000
    augment: bool = True
    mirror: bool | None = None
    clean_accuracy_floor: float = 0.5
    logit_spread: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self, counts=("fisher_samples",), shares=("clean_accuracy_floor",))
        check_numbers(self, at_least_zero=("ewc_lambda", "gamma"))
        if self.logit_spread is not None:
            check_numbers(self, positive=("logit_spread",))


@dataclass(frozen=True)
class Distilled(Shared):
    """And what those can be told that descend a loss on clean images.

    Attributes:
        distillation: share of the loss on clean images that is their divergence from what the
            suspect model makes of them, at temperature 2, instead of cross entropy; in [0, 1]. A
            few clean images teach a model more that way, and a trigger is on none of them. Costs a
            forward of the suspect model for each of the student. Ours; 0 is as published.
    """

    distillation: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, shares=("distillation",))


def check_numbers(
    settings: object,
    *,
    counts: Iterable[str] = (),
    positive: Iterable[str] = (),
    at_least_zero: Iterable[str] = (),
    shares: Iterable[str] = (),
    below_one: Iterable[str] = (),
) -> None:
    """Raise ValueError for a field out of range; counts are whole numbers of at least 1."""
    for name in counts:
        value = getattr(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    for name in positive:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name}: expected a number > 0, got {getattr(settings, name)}")
    for name in at_least_zero:
        if not 0 <= getattr(settings, name) < math.inf:
            raise ValueError(f"{name}: expected a number >= 0, got {getattr(settings, name)}")
    for name in shares:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(settings, name)}")
    for name in below_one:
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(settings, name)}")


@dataclass(frozen=True)
class Running:
    """How a defence is called, apart from its settings.

    Attributes: those of :func:`bdu.unlearn` with the same names.
    """

    seed: int
    callbacks: Iterable[Callback] = ()
    progress: bool = True
    state_file: str | os.PathLike[str] | None = None
    resume: bool = False


Settings = TypeVar("Settings", bound=Shared)
Own = TypeVar("Own")


def read_options(kind: type[Settings], options: Mapping[str, Any]) -> tuple[Running, Settings]:
    """What a defence's ``run`` was given besides model and data; ValueError for unknown names."""
    own = {field.name for field in fields(Running)}
    running = {name: value for name, value in options.items() if name in own}
    given = {name: value for name, value in options.items() if name not in own}
    return Running(**running), settings_of(kind, given)


def settings_of(kind: type[Own], given: Mapping[str, Any]) -> Own:
    """`kind`, a dataclass, of these values; ValueError for a name that it does not have."""
    known = {field.name for field in fields(cast(Any, kind))}
    for name in given:
        if name not in known:
            raise ValueError(f"{name}: expected one of {', '.join(sorted(known))}")
    return kind(**given)


class Course:
    """One run of a defence.

    Args:
        method: its name.
        model: the suspect model, left untouched.
        data: what the defender holds.
        settings: the method's, with those of `Shared`.
        running: how it was called.

    Attributes:
        before: the suspect model, frozen, in evaluation mode, scaled as `logit_spread` says.
        student: the copy that is cleaned, scaled alike until it is the result.
        generator: of all draws.
        steps: steps of optimizers so far.
        shown: (at most C,) classes that clean samples show, ascending.

    Raises:
        ValueError: a state file of another run, or none to resume from.
    """

    def __init__(
        self, method: str, model: nn.Module, data: DefenderData, settings: Shared, running: Running
    ) -> None:
        known = known_state(running.state_file, resume=running.resume)
        self.before = copy.deepcopy(model).eval().requires_grad_(False)
        self.student = copy.deepcopy(model).eval()
        self._logit_scale = logit_scale(self.before, data.clean, settings.logit_spread)
        if self._logit_scale != 1:
            for copied in (self.before, self.student):
                scale_logits(copied, data.clean, self._logit_scale)
        self.data, self.settings, self._method, self._running = data, settings, method, running
        self.shown = data.clean.y.unique()
        self._callbacks, self.seed = list(running.callbacks), running.seed
        self.generator = torch.Generator().manual_seed(running.seed)
        self.steps = 0
        self._history: list[Line] = []
        self._stopped = ""
        self._stage, self._round, self._done = "", 0, list[str]()
        self._kept_values: dict[str, Any] = {}
        self._optimizer_state: dict[str, Any] | None = None
        self._best: dict[str, Any] | None = None
        self._losses: list[Tensor] = []
        self._noted: dict[str, float] = {}
        self._started_with = {
            "method": method,
            **asdict(settings),
            "seed": running.seed,
            "model and data": fingerprint(model, data),
        }
        if known is not None:
            self._load(known)
        mirror = settings.mirror if settings.augment else False
        self._mirror = knows_mirrored(self.before, data.clean) if mirror is None else mirror
        if not self._history:
            self._look("before", guarded=True)

    # What a defence is written with.

    def stage(
        self,
        name: str,
        rounds: int,
        optimizer: EWCSGD | EWCAdamW | None = None,
        *,
        begin: Callable[[], None] | None = None,
        guarded_from: int | None = 0,
    ) -> Iterator[int]:
        """Yield the number, from 0, of every round that is still to do; none if the run stopped.

        Args:
            name: shown, and what a resumed run finds its place by.
            rounds: how many.
            optimizer: whose state goes into the state file.
            begin: called once, before the first round.
            guarded_from: the run stops where clean accuracy collapses after this round or a later
                one; None where the student is meant to be ruined.
        """
        if name in self._done or self._stopped:
            return
        if self._stage != name:
            if begin is not None:
                begin()
            self._stage, self._round = name, 0
        elif optimizer is not None and self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        shown = self._running.progress
        with tqdm(total=rounds, initial=self._round, desc=name, disable=not shown) as bar:
            while self._round < rounds and not self._stopped and name not in self._done:
                seed = int(torch.randint(2**62, (), generator=self.generator))
                with torch.random.fork_rng(self._cuda_devices()):
                    torch.manual_seed(seed)  # of dropout
                    yield self._round
                self._round += 1
                self._optimizer_state = None if optimizer is None else optimizer.state_dict()
                self.note(round=self._round, rounds=rounds)
                guarded = guarded_from is not None and self._round > guarded_from
                line = self._look(name, guarded=guarded)
                bar.set_postfix(summary(line))
                bar.update()
        if not self._stopped and name not in self._done:
            self._done.append(name)

    def end_stage(self) -> None:
        """The round that is going on is the last of its stage."""
        self._done.append(self._stage)

    def once(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What `make` returned the first time: tensors, numbers, text, lists and maps of them."""
        if name not in self._kept_values:
            self._kept_values[name] = make()
        value: Kept = self._kept_values[name]
        return value

    def bar(self, name: str) -> Callable[[Iterable[int]], Iterable[int]]:
        """Around the numbers of the steps of what takes long within a round: a progress bar."""
        shown = self._running.progress
        return lambda steps: tqdm(steps, desc=name, disable=not shown, leave=False)

    def batches(self, samples: Samples, size: int) -> Iterator[Samples]:
        """All samples once, in random order; a last batch of one joins the one before it."""
        order = torch.randperm(len(samples), generator=self.generator)
        parts = list(order.split(size))
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        for part in parts:
            if self._stopped:
                return
            yield samples.at(part)

    def images(self, samples: Samples) -> Tensor:
        """(N, C, H, W) float in [0, 1], augmented as the settings say."""
        (x,) = self.alike(samples.x)
        return as_unit_float(x)

    def alike(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Tensors (N, C, H, W) of the same N, H and W, the i-th of each shifted and mirrored alike.

        An inverted trigger goes onto images as they are and moves with them from here: a model that
        was trained on mirrored images has a mirrored trigger, too, and which is found is chance.
        """
        if not self.settings.augment:
            return parts
        x = torch.cat(parts, 1)
        x = augment(x, self.generator, padding=min(x.shape[2:]) // 8, mirror=self._mirror)
        return x.split([part.shape[1] for part in parts], 1)

    def clean_loss(
        self,
        logits: Tensor,
        images: Tensor,
        y: Tensor,
        distillation: float,
        suspect: Tensor | None = None,
        *,
        moved: Tensor | None = None,
    ) -> Tensor:
        """(1 − d) CE(logits, y) + d T² KL(softmax of the suspect's logits / T ‖ of these / T), T 2.

        Hinton et al. 2015 (arXiv:1503.02531), equation 4. CE leaves out the logits of classes that
        no clean sample shows, which it would only push down, but of images that were moved: there
        one of them may be what a trigger is to call.

        Args:
            logits: of the student, (N, C).
            images: that they are of, (N, C, H, W).
            y: their labels, (N,).
            distillation: d, in [0, 1].
            suspect: logits of the suspect model, where they are known.
            moved: which images something was done to, (N,) bool; None: none.
        """
        hidden = absent(self.shown, logits)
        if hidden is not None and moved is not None:
            hidden = hidden & ~moved[:, None]
        if suspect is None:
            suspect = self.suspect_logits(images, distillation)
        return distilled_loss(logits, y, suspect, distillation, hidden=hidden)

    def suspect_logits(self, images: Tensor, distillation: float) -> Tensor | None:
        """What the suspect model makes of images (N, C, H, W), where it is distilled at all."""
        if not distillation:
            return None
        with torch.no_grad():
            logits: Tensor = self.before(images)
        return logits

    def sgd(self, lr: float, *, free: Rows | None = None, **more: Any) -> EWCSGD:
        """EWCSGD of the student's parameters that require a gradient.

        Args:
            free: where the settings ask for an anchor, the rows of parameters that none holds.
            more: arguments of EWCSGD.
        """
        more = {"error_if_nonfinite": True, **self._pull(free or {})} | more
        return EWCSGD(self.named_parameters(), lr=lr, **more)

    def adam(self, lr: float, *, free: Rows | None = None, **more: Any) -> EWCAdamW:
        """As `sgd`, EWCAdamW; no weight decay unless given."""
        more = {"weight_decay": 0.0, "error_if_nonfinite": True, **self._pull(free or {})} | more
        return EWCAdamW(self.named_parameters(), lr=lr, **more)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of the student that require a gradient."""
        return [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]

    def step(self, optimizer: EWCSGD | EWCAdamW, loss: Tensor) -> None:
        """Descend a loss; the run stops where the gradient is not finite."""
        optimizer.zero_grad()
        loss.backward()
        self.apply(optimizer, loss)

    def apply(self, optimizer: EWCSGD | EWCAdamW, loss: Tensor) -> None:
        """As `step`, with the gradients that the parameters have."""
        try:
            optimizer.step()  # which writes nothing if it fails
        except FloatingPointError as error:
            self._stopped = f"stopped at step {self.steps + 1}: {error}"
            return
        self.steps += 1
        self._losses.append(loss.detach())

    def note(self, **values: float) -> None:
        """Add values to the next line of the history."""
        self._noted.update(values)

    def result(self) -> Result:
        """The student as it is now, or where the run was stopped the best that was seen."""
        stopped = self._stopped or COMPLETED
        if self._stopped and self._best is not None:
            self.student.load_state_dict(self._best["student"])
            stopped += kept_step(self._best["step"])
        settings = asdict(self.settings)
        for parameter in self.student.parameters():
            parameter.grad = None
        if self._logit_scale != 1:
            scale_logits(self.student, self.data.clean, 1 / self._logit_scale)
        return Result(self.student.eval(), self._history, self._method, settings, stopped)

    # What it takes.

    def _cuda_devices(self) -> list[torch.device]:
        return sorted({p.device for p in self.student.parameters() if p.is_cuda}, key=str)

    def _pull(self, free: Rows) -> dict[str, Any]:
        if not self.settings.anchored or self.settings.ewc_lambda == 0:
            return {}
        fisher = self.once("fisher", self._fisher)
        for name, rows in free.items():
            if name in fisher:
                fisher = fisher | {name: fisher[name].index_fill(0, rows, 0.0)}
        anchor = {name: p for name, p in self.before.named_parameters() if name in fisher}
        return {"ewc_lambda": self.settings.ewc_lambda, "fisher": fisher, "anchor": anchor}

    def _fisher(self) -> dict[str, Tensor]:
        wanted = [name for name, _ in self.named_parameters()]
        clean = self.data.clean
        samples = min(self.settings.fisher_samples, len(clean))
        pair = (as_unit_float(clean.x), clean.y)
        own = scale_to_unit_mean(
            fisher_diagonal(self.before, pair, samples=samples, parameters=wanted, progress=False)
        )
        if self.settings.gamma == 0:
            return own
        images, called = self.inverted()
        odds = fisher_diagonal(
            self.before,
            (images, called),
            loss=target_log_odds,
            parameters=wanted,
            progress=False,
        )
        return contrastive(own, scale_to_unit_mean(odds), self.settings.gamma)

    def inverted(self) -> tuple[Tensor, Tensor]:
        """Clean images under the inverted trigger, (M, C, H, W), and what they are then called."""
        found = self.once("inverted", lambda: self.trigger().samples(self.before, self.data.clean))
        return found[0], found[1]

    def trigger(self, settings: Inversion | None = None) -> Inverted:
        """φ and π of the suspect model, inverted once for the same settings."""
        settings = settings or Inversion()

        def make() -> dict[str, Any]:
            return invert_trigger(
                self.before,
                self.data.clean,
                seed=self.seed,
                settings=settings,
                wrap=self.bar("inversion"),
            ).state()

        return Inverted.from_state(self.once(f"trigger of {settings}", make))

    def _look(self, phase: str, *, guarded: bool) -> Line:
        try:
            clean = share_called(self.student, self.data.clean_validation)
        except FloatingPointError as error:
            self._stopped = f"stopped at step {self.steps}: {error}"
            clean = 0.0  # of outputs that are no numbers none is right
        line: Line = {"step": self.steps, "phase": phase, "validation_clean_accuracy": clean}
        if self._losses:
            line["loss"] = float(torch.stack(self._losses).mean())
            self._losses = []
        line.update(self._noted)
        self._noted = {}
        self._history.append(line)
        floor = self._history[0]["validation_clean_accuracy"] * self.settings.clean_accuracy_floor
        if guarded and clean < floor and not self._stopped:
            self._stopped = collapsed(self.steps, clean, floor)
        if guarded and (self._best is None or clean >= self._best["clean_accuracy"]):
            weights = {k: v.detach().clone() for k, v in self.student.state_dict().items()}
            self._best = {"clean_accuracy": clean, "step": self.steps, "student": weights}
        modes = [(module, module.training) for module in self.student.modules()]
        try:
            tell(self._callbacks, line, self.student)
        finally:
            for module, training in modes:
                module.training = training
            if self._running.state_file is not None and phase != "before":
                save_state(self._running.state_file, self._state())
        return line

    def _state(self) -> dict[str, Any]:
        return {
            "started_with": self._started_with,
            "stage": self._stage,
            "round": self._round,
            "done": self._done,
            "kept_values": self._kept_values,
            "stopped": self._stopped,
            "steps": self.steps,
            "history": self._history,
            "best": self._best,
            "student": dict(self.student.state_dict()),
            "training": {n: module.training for n, module in self.student.named_modules()},
            "optimizer": self._optimizer_state,
            "generator": self.generator.get_state(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        check_same_run(state, self._started_with)
        self._stage, self._round, self._done = state["stage"], state["round"], state["done"]
        self._kept_values = _onto(state["kept_values"], self.data.clean.y.device)
        self._stopped = state["stopped"]
        self.steps, self._history, self._best = state["steps"], state["history"], state["best"]
        self.student.load_state_dict(state["student"])
        for name, module in self.student.named_modules():
            module.training = state["training"][name]
        self._optimizer_state = state["optimizer"]
        self.generator.set_state(state["generator"])


def _onto(value: Any, device: torch.device) -> Any:
    """All tensors in lists and maps, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _onto(each, device) for name, each in value.items()}
    return [_onto(each, device) for each in value] if isinstance(value, list) else value


def cosine(optimizer: EWCSGD | EWCAdamW, lr: float, done: float, of: int) -> None:
    """Set the learning rate to lr (1 + cos(π done / of)) / 2."""
    optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * done / of)) / 2


def check_same_run(state: Any, started_with: Mapping[str, Any]) -> None:
    """Raise ValueError unless a state file is of the run that these values start."""
    if not isinstance(state, dict) or not isinstance(state.get("started_with"), dict):
        raise ValueError("state_file: expected the state of a run of this method, got another")
    before = state["started_with"]
    for name, value in started_with.items():
        if before.get(name) != value:
            raise ValueError(
                f"{name}: expected {before.get(name)!r}, as in the run to be resumed, got {value!r}"
            )


def fingerprint(model: nn.Module, data: DefenderData) -> str:
    """The same only for the same layers, weights, frozen ones, and samples in the same order."""
    parts = (data.clean, data.clean_validation, data.triggered, data.triggered_validation)
    tensors = [*model.parameters(), *model.buffers()]
    for part in parts:
        if part is not None:
            tensors += [part.x, part.y, *([] if part.y_true is None else [part.y_true])]
    # Another architecture may have the same weights, another dropout or normalisation, too.
    layers = [
        (name, type(module).__qualname__, module.extra_repr(), _normalisations(module))
        for name, module in model.named_modules()
    ]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return digest(tensors, repr([layers, trained]))


def _normalisations(module: nn.Module) -> list[str]:
    hooks = module._forward_pre_hooks.values()
    return [repr(hook) for hook in hooks if isinstance(hook, Normalize)]


def knows_mirrored(model: nn.Module, samples: Samples) -> bool:
    """Whether mirroring the images costs the model no accuracy that these samples could show."""
    plain = share_called(model, samples)
    mirrored = share_called(model, replace(samples, x=samples.x.flip(-1)))
    return mirrored >= plain - standard_error(plain, len(samples))


def logit_spread(model: nn.Module, samples: Samples) -> float:
    """The logits' standard deviation over the classes, a mean over samples."""
    first = samples.at(torch.arange(min(_SPREAD_SAMPLES, len(samples))))
    return float(predict(model, first.x).float().std(1).mean())


def logit_scale(model: nn.Module, samples: Samples, most: float | None) -> float:
    """What brings the spread of the logits to `most` or less: a power of two, so that what is left
    alone comes back bit for bit; 1 where it is not more, or no number."""
    spread = logit_spread(model, samples) if most is not None else 0.0
    if most is None or not most < spread < math.inf:
        return 1.0
    return 2.0 ** math.floor(math.log2(most / spread))


def scale_logits(model: nn.Module, samples: Samples, factor: float) -> None:
    """Multiply the last layer's weight and bias."""
    head = model.get_submodule(head_of(model, as_unit_float(samples.x[:1])))
    with torch.no_grad():
        for parameter in head.parameters(recurse=False):
            parameter.mul_(factor)


def standard_error(share: float, samples: int) -> float:
    """Of a share measured on so many samples.

    By the rule of succession: a few samples that are all right do not make a model faultless.
    """
    share = (share * samples + 1) / (samples + 2)
    return math.sqrt(share * (1 - share) / samples)


def share_called(model: nn.Module, samples: Samples) -> float:
    """Share of the samples that the model calls by their label ``y``."""
    return float((predict(model, samples.x).argmax(1) == samples.y.cpu()).float().mean())
