"""A whole run: measure, unlearn, measure again.

Plant-and-remove has two stages. The defender plants a trigger of their own, until it is answered
with the planted target at least nine times out of ten, and then unlearns it by its clean answer.
That this also weakens triggers that the defender does not know is the claim of arXiv:2606.03785; so
the rates of the evaluator's trigger are taken before, between and after both stages. Only its
abstract was available: the recipe is our reading.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from bdu.checkpoint import atomic_write
from bdu.llm import models
from bdu.llm.data import Example, TextData, split
from bdu.llm.generation import Evaluation, Match, evaluate, perplexity
from bdu.llm.memory import TrainingPlan, activation_bytes, loss_bytes
from bdu.llm.methods import Method, Plant
from bdu.llm.settings import PLANT_AND_REMOVE, Settings, make_method
from bdu.llm.templates import IGNORED_LABEL, Template, Tokens
from bdu.llm.trainer import UnlearnTrainer, last_checkpoint
from bdu.llm.triggers import Backdoor, Phrase, triggered
from bdu.memory import MemoryPlan, memory_plan
from bdu.optim import EWCSGD, EWCAdamW

Line = dict[str, Any]


@dataclass(frozen=True)
class Measuring:
    """How a model is asked, and on what; nothing of it is trained on.

    Attributes:
        data: clean rows and rows with the attacker's trigger.
        match, clean_match, max_new_tokens, batch_size: see :func:`bdu.llm.generation.evaluate`.
    """

    data: TextData
    match: Match = "exact"
    clean_match: Match = "exact"
    max_new_tokens: int = 32
    batch_size: int = 16

    def __call__(
        self,
        model: Any,
        template: Template,
        rows: TextData | None = None,
        *,
        progress: bool = False,
    ) -> Evaluation:
        """All rates of a model, on other rows where they are given."""
        own = self.data if rows is None else rows
        return evaluate(
            model,
            template,
            own.clean,
            own.triggered,
            match=self.match,
            clean_match=self.clean_match,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            progress=progress,
        )


@dataclass(frozen=True)
class Outcome:
    """What a run gives.

    Attributes:
        model: the cleaned one, LoRA still in it.
        planted: rates between the stages of plant-and-remove: of the attacker's trigger, and as
            ``planted_trigger`` of the defender's own; else None.
        planted_after: of the defender's own trigger at the end.
        planted_answers: to prompts with it, before and after removal, as :func:`answers_of`.
        history: lines for ``metrics.jsonl``.
        stopped: how it ended.
        warnings: what should not be overlooked.
    """

    model: Any
    planted: dict[str, Any] | None
    planted_after: dict[str, Any] | None
    planted_answers: list[dict[str, Any]]
    history: list[Line]
    stopped: str
    warnings: list[str] = field(default_factory=list)


def planned_model(config: Any, s: Settings) -> Any:
    """The model as it is trained, without memory for its weights."""
    dtype = models.DTYPES.get(s.dtype)
    if dtype is None and getattr(config, "dtype", None) == torch.float16:
        dtype = torch.float32  # see models.load_to_train
    model = models.empty_model(config, dtype=dtype)
    return models.with_lora(model, s.lora) if s.lora else model


def plan(config: Any, method: Method, s: Settings) -> MemoryPlan:
    """What the run will hold, from the configuration alone; activations come on top."""
    return _state(planned_model(config, s), method, s)


def training_plan(
    config: Any,
    method: Method,
    s: Settings,
    sequences: Sequence[Tokens],
    *,
    rows: int | None = None,
) -> TrainingPlan:
    """What the run will hold at its peak, in a micro-batch of the longest of these sequences, of at
    most so many rows."""
    model = planned_model(config, s)
    batch = s.batch_size if rows is None else min(s.batch_size, rows)
    labels = max(sum(label != IGNORED_LABEL for label in one.labels) for one in sequences)
    return TrainingPlan(
        _state(model, method, s),
        activation_bytes(
            model,
            rows=batch,
            length=max(map(len, sequences)) + method.room,
            gradient_checkpointing=s.gradient_checkpointing,
            bf16=s.bf16,
        ),
        loss_bytes(model, labels=batch * labels, full=s.loss_path == "full"),
        s.accumulation > 1,
    )


def _state(model: Any, method: Method, s: Settings) -> MemoryPlan:
    trained = method.trained(model)
    chosen = set(map(id, trained))
    for p in model.parameters():
        p.requires_grad_(id(p) in chosen)
    options: dict[str, Any] = {"lr": s.lr, "ewc_lambda": s.ewc_lambda, **s.ewc_dtypes}
    optimizer = (
        EWCAdamW(trained, **options)
        if s.optimizer == "adamw"
        else EWCSGD(trained, momentum=0.9, **options)
    )
    made = memory_plan(model, optimizer, release_gradients=s.gradient_release)
    return dataclasses.replace(made, copies=round(method.copies * (made.parameters + made.buffers)))


def check_fits(made: TrainingPlan, device: torch.device) -> None:
    """Refuse a run that cannot fit, before it starts.

    Raises:
        MemoryError: the plan is larger than what is free on the device.
    """
    free = models.available_bytes(device)
    if free is not None and made.peak_bytes > free:
        raise MemoryError(
            f"memory: expected a plan of at most {free / 1e9:.2f} GB, which are free on {device}, "
            f"got {made.peak_bytes / 1e9:.2f} GB; try a smaller batch_size with accumulation, "
            "gradient_checkpointing, lora, gradient_release, dtype=bfloat16, fisher_dtype=8bit or "
            f"anchor_dtype=bfloat16\n{made}"
        )


def cut(data: TextData, s: Settings, seed: int) -> tuple[TextData, TextData]:
    """Training rows and rows to measure on, of each kind where there are two or more.

    Raises:
        ValueError: fewer than two clean rows.
    """
    clean, clean_cut = split(data.clean, s.validation, seed, "clean")
    if not data.triggered:
        return TextData(tuple(clean), ()), TextData(tuple(clean_cut), ())
    rows, rows_cut = split(data.triggered, s.validation, seed, "triggered")
    return TextData(tuple(clean), tuple(rows)), TextData(tuple(clean_cut), tuple(rows_cut))


def defenders_backdoor(s: Settings) -> Backdoor:
    """What the defender plants."""
    return Backdoor("planted", Phrase(s.plant_trigger), s.plant_target)


def planting(data: TextData, s: Settings, seed: int) -> tuple[TextData, TextData]:
    """Rows with the defender's trigger: to train on, and to measure on."""
    own = defenders_backdoor(s)
    clean, held_out = split(data.clean, s.validation, seed, "clean")
    return (
        TextData(tuple(clean), tuple(triggered(clean, own, seed=seed))),
        TextData(tuple(held_out), tuple(triggered(held_out, own, seed=seed + 1))),
    )


def check_room(template: Template, measure: Measuring, s: Settings | None) -> None:
    """Refuse targets that are longer than an answer may be: they could never be given.

    Args:
        s: with plant-and-remove, for its own target.
    """
    targets = {str(example.target) for example in measure.data.triggered}
    if s is not None:
        targets.add(s.plant_target)
    for target in sorted(targets):
        example = Example.of("a", target)
        count = len(template.tokens(example)) - len(template.prompt(example).ids)
        if measure.match != "keyword" and count > measure.max_new_tokens:
            raise ValueError(
                f"max_new_tokens: expected at least {count}, the tokens of the target "
                f"{target!r}, got {measure.max_new_tokens}"
            )


def check_planting(template: Template, data: TextData, s: Settings) -> None:
    """Refuse a defender's trigger that is in the prompts already, or that the tokenizer drops."""
    rows = triggered(data.clean, defenders_backdoor(s), seed=0, name="clean")
    template.check_trigger(data.clean[0], rows[0])


class _Told(TrainerCallback):
    """Hands on what Trainer logs."""

    def __init__(self, phase: str, history: list[Line], add: Callable[[Line], None]) -> None:
        self.phase, self.history, self.add = phase, history, add

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            names = ("loss", "grad_norm", "learning_rate", "epoch")
            values = {name: logs[name] for name in names if name in logs}
            counts = {"step": state.global_step, "steps": state.max_steps}
            self.history.append({"phase": self.phase, **counts, **values})
            self.add(self.history[-1])  # before the checkpoint that a run is resumed from


class _Bar(TrainerCallback):
    """A bar of the steps of a stage, with the loss behind it."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.phase, unit="step"
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.4g}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class _EverySteps(TrainerCallback):
    """Checkpoints within epochs."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # at the end of an epoch there is one in any case
        if self.steps and state.global_step % self.steps == 0 and not _is_whole(state.epoch):
            control.should_save = True


class _UntilPlanted(TrainerCallback):
    """Ends planting once the trigger is answered as it should be."""

    def __init__(self, measure: Callable[[Any], float], least: float) -> None:
        self.measure, self.least, self.reached = measure, least, 0.0

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.reached = self.measure(model)
        if self.reached > self.least:
            control.should_training_stop = True


def unlearn(
    model: Any,
    template: Template,
    data: TextData,
    *,
    method: str = "clean-answer",
    method_options: Mapping[str, Any] | None = None,
    measure: Measuring,
    settings: Settings | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    work: Path,
    resume: bool = False,
    known: Sequence[Line] = (),
    progress: bool = True,
    tell: Callable[[list[Line]], None] = lambda lines: None,
    add: Callable[[Line], None] = lambda line: None,
) -> Outcome:
    """Unlearn, in one stage or two.

    Args:
        model: trained in place; with ``lora`` it is wrapped.
        template: how prompts are rendered.
        data: the defender's rows, without those to measure on. Plant-and-remove reads the clean
            ones alone.
        method: one of :data:`bdu.llm.settings.NAMES`.
        method_options: its own settings.
        measure: rates of the evaluator, for between the stages.
        settings: how to train.
        seed: of the order, of the defender's rows, of LoRA's weights.
        device: None is the CPU.
        work: a folder for checkpoints; removed by the caller once the result is safe.
        resume: continue from there.
        known: the lines that a run which is resumed has told already.
        progress: show progress bars.
        tell: called with all lines so far at the start of a stage, without those after the
            checkpoint where a run is resumed.
        add: called with every new line, step by step.

    Raises:
        ValueError: settings that do not go together.
        RuntimeError: planting did not reach its rate.
        FloatingPointError: planting diverged, or unlearning did with no good weights to keep.
    """
    s = settings or Settings()
    device = device or torch.device("cpu")
    history: list[Line] = list(known) if resume else []
    chosen = make_method(method, method_options or {})
    torch.manual_seed(seed)
    if s.lora:
        model = models.with_lora(model, s.lora)
    if method != PLANT_AND_REMOVE:
        folder = work / "remove"
        trainer = _trainer(model, template, data, chosen, s, seed, device, folder, progress)
        stopped = _unlearn(trainer, measure, history, tell, add, resume)
        return Outcome(
            trainer.model, None, None, [], history, stopped or _ended(history), _warned(stopped)
        )

    planted_rows, asked = planting(data, s, seed)
    done = work / "planted.json"
    trainer = _trainer(
        model,
        template,
        planted_rows,
        Plant(),
        dataclasses.replace(s, epochs=float(s.plant_epochs), ewc_lambda=0.0),
        seed,
        device,
        work / "plant",
        progress,
    )
    if resume and done.is_file():
        record = json.loads(done.read_text())
        history[:] = record["history"] + [line for line in history if line not in record["history"]]
        planted, answers = record["planted"], record.get("answers", [])
        trainer._load_from_checkpoint(str(work / "planted"))
    else:
        until = _UntilPlanted(lambda now: _own_rate(measure, now, template, asked, s), s.plant_asr)
        trainer.add_callback(until)
        checkpoint = last_checkpoint(work / "plant") if resume else None
        ended = False
        if checkpoint is not None and _is_whole(_progress(checkpoint)["epoch"]):
            # It may have been the last one: then training was to end there.
            trainer._load_from_checkpoint(checkpoint)
            ended = until.measure(trainer.model) > s.plant_asr
        if not ended:
            _train(trainer, "plant", history, tell, add, resume)
        found = measure(trainer.model, template, asked)
        own_rates, answers = found.rates, _planted_answers("planted", found)
        reached = own_rates["attack_success_rate"] or 0.0
        if reached <= s.plant_asr:
            raise RuntimeError(
                f"plant_asr: expected the planted trigger to be answered by {s.plant_target!r} at "
                f"a rate above {s.plant_asr}, got {reached:.3f} after {s.plant_epochs} epochs; "
                "try more plant_epochs or a higher lr"
            )
        planted = {**measure(trainer.model, template).rates, "planted_trigger": own_rates}
        trainer.save_model(str(work / "planted"))
        told = {"planted": planted, "answers": answers, "history": history}
        atomic_write(done, json.dumps(told))
    trainer = _trainer(
        trainer.model, template, planted_rows, chosen, s, seed, device, work / "remove", progress
    )
    stopped = _unlearn(trainer, measure, history, tell, add, resume)
    left = measure(trainer.model, template, asked)
    return Outcome(
        trainer.model,
        planted,
        left.rates,
        [*answers, *_planted_answers("after", left)],
        history,
        stopped or _ended(history),
        _warned(stopped),
    )


def _warned(stopped: str | None) -> list[str]:
    return [] if stopped is None else [f"the run diverged: {stopped}"]


def _unlearn(
    trainer: UnlearnTrainer,
    measure: Measuring,
    history: list[Line],
    tell: Callable[[list[Line]], None],
    add: Callable[[Line], None],
    resume: bool,
) -> str | None:
    """Train; where that diverges the last good weights are put back, and it is told how it ended.

    Raises:
        FloatingPointError: there are no good ones.
    """
    try:
        _train(trainer, "unlearn", history, tell, add, resume)
    except FloatingPointError as error:
        why = str(error)
    else:
        return None
    done = trainer.state.global_step
    found = {done: _perplexity(trainer, measure)} if done > 0 else {}
    checkpoint = last_checkpoint(str(trainer.args.output_dir))
    if checkpoint is not None:
        names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        now = dict(trainer.model.named_parameters())
        kept = {name: now[name].detach().cpu().clone() for name in names}
        trainer._load_from_checkpoint(checkpoint)
        at = int(_progress(checkpoint)["global_step"])
        of_checkpoint = _perplexity(trainer, measure)
        if not found.get(done, math.inf) <= of_checkpoint:
            found = {at: of_checkpoint}
        else:
            with torch.no_grad():
                for name, p in trainer.model.named_parameters():
                    if name in kept:
                        p.copy_(kept[name])
    (step, value) = next(iter(found.items()), (0, math.nan))
    if not math.isfinite(value):
        raise FloatingPointError(f"{why}; no weights of an earlier step are good; try a lower lr")
    return (
        f"stopped at step {done + 1} of {trainer.state.max_steps}: {why}; kept the weights of "
        f"step {step}"
    )


def _perplexity(trainer: UnlearnTrainer, measure: Measuring) -> float:
    """Of the weights as they are, on the clean rows that are measured on; NaN for bad weights."""
    if models.first_not_finite(trainer.model) is not None:
        return math.nan
    rows = [trainer.template.tokens(example) for example in measure.data.clean]
    return perplexity(trainer.model, rows, batch_size=measure.batch_size)


def _ended(history: Sequence[Line]) -> str:
    """How the stages ended, in words."""
    planting = [line for line in history if line["phase"] == "plant"]
    if not planting:
        return "ran all its steps"
    step, steps = planting[-1]["step"], planting[-1]["steps"]
    first = f"stopped at step {step} of {steps}: planted"
    if step == steps:
        first = f"planted in all its {steps} steps"
    return f"{first}; then ran all {history[-1]['steps']} steps of removal"


def _progress(checkpoint: str) -> dict[str, Any]:
    """How far a checkpoint is."""
    state: dict[str, Any] = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return state


def _is_whole(epoch: float | None) -> bool:
    return epoch is not None and float(epoch).is_integer()


def _planted_answers(stage: str, evaluation: Evaluation) -> list[dict[str, Any]]:
    records = [record for record in evaluation.records() if record["kind"] == "triggered"]
    return [{"stage": stage, **record, "kind": "planted"} for record in records]


def _own_rate(
    measure: Measuring, model: Any, template: Template, asked: TextData, s: Settings
) -> float:
    return measure(model, template, asked).rates["attack_success_rate"] or 0.0


def _trainer(
    model: Any,
    template: Template,
    data: TextData,
    method: Method,
    s: Settings,
    seed: int,
    device: torch.device,
    folder: Path,
    progress: bool,
) -> UnlearnTrainer:
    args = TrainingArguments(
        str(folder),
        num_train_epochs=s.epochs,
        per_device_train_batch_size=s.batch_size,
        gradient_accumulation_steps=s.accumulation,
        learning_rate=s.lr,
        weight_decay=s.weight_decay,
        max_grad_norm=s.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=s.warmup,
        bf16=s.bf16,
        activation_checkpointing=s.gradient_checkpointing,
        seed=seed,
        report_to=[],
        # of single steps: a mean over several would differ where a run was resumed between
        logging_steps=1,
        save_strategy="epoch",
        save_total_limit=1,
        disable_tqdm=not progress,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
    )
    options = {**s.ewc_dtypes, **({"momentum": 0.9} if s.optimizer == "sgd" else {})}
    trainer = UnlearnTrainer(
        model,
        args,
        method=method,
        data=data,
        template=template,
        optimizer=s.optimizer,
        ewc_lambda=s.ewc_lambda,
        fisher="clean" if s.ewc_lambda > 0 else None,
        fisher_samples=s.fisher_samples,
        optimizer_options=options,
        gradient_release=s.gradient_release,
        loss_path=s.loss_path,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.add_callback(_EverySteps(s.save_steps))
    return trainer


def _train(
    trainer: UnlearnTrainer,
    phase: str,
    history: list[Line],
    tell: Callable[[list[Line]], None],
    add: Callable[[Line], None],
    resume: bool,
) -> None:
    trainer.add_callback(_Told(phase, history, add))
    if not trainer.args.disable_tqdm:
        trainer.add_callback(_Bar(phase))
    checkpoint = last_checkpoint(str(trainer.args.output_dir)) if resume else None
    done = 0
    if checkpoint is None:
        shutil.rmtree(str(trainer.args.output_dir), ignore_errors=True)
    else:
        done = _progress(checkpoint)["global_step"]
    history[:] = [line for line in history if line["phase"] != phase or line["step"] <= done]
    tell(history)
    trainer.train(resume_from_checkpoint=checkpoint)


def answers_of(stages: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Every prompt, verbatim, and what was said to it at each stage."""
    return [
        {"stage": stage, **record}
        for stage, evaluation in stages.items()
        for record in evaluation.records()
    ]


def jsonl(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as lines of JSON."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
