"""A ``transformers.Trainer`` that unlearns, with bdu's optimizers.

The loss of a step is a mean over the tokens (or rows) of all its micro-batches, so accumulating 4
batches of 4 gives what one batch of 16 does. F is handed to the optimizer by parameter, since
Trainer's groups have no names. Checkpoints hold F and θ*, so that a run that is resumed gives the
weights of one that was not interrupted.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bdu.fisher import fisher_diagonal, scale_to_unit_mean
from bdu.llm.data import TextData
from bdu.llm.losses import LossPath, VocabularyLoss, inner_model
from bdu.llm.methods.protocol import Method
from bdu.llm.models import first_not_finite
from bdu.llm.rows import Collator, Counts, Kind, Row
from bdu.llm.settings import OptimizerName
from bdu.llm.templates import (
    IGNORED_LABEL,
    Template,
    check_lengths,
    context_length,
    padding_id,
)
from bdu.models import modes_kept
from bdu.optim import EWCSGD, EWCAdamW, release_gradients
from bdu.optim.release import GradientRelease

_FORBIDDEN: Mapping[str, str] = {
    "fp16": "untested; use bf16",
    "label_smoothing_factor": "the methods have losses of their own",
    "deepspeed": "untested",
    "auto_find_batch_size": "a run would not be repeatable",
    "neftune_noise_alpha": "untested",
    "use_liger_kernel": "use loss_path='liger'",
}
# Of Trainer's own arguments.
_REFUSED: Mapping[str, str] = {
    "data_collator": "the method's rows have one of their own",
    "train_dataset": "the method makes it of data",
    "compute_loss_func": "the loss is the method's",
    "optimizers": "it is one of bdu's, by optimizer and optimizer_options",
    "eval_dataset": "the loss of a method says little of what is left of a trigger; measure with "
    "bdu.llm.evaluate",
}


class UnlearnTrainer(Trainer):
    """Trains with one of :mod:`bdu.llm.methods`.

    ::

        trainer = UnlearnTrainer(
            model, TrainingArguments("out", learning_rate=1e-4),
            method=CleanAnswer(), data=TextData(clean, triggered), template=Template(tokenizer),
            ewc_lambda=10.0, fisher="clean",
        )
        trainer.train()

    Args:
        model: a causal language model of transformers, or PEFT (LoRA) around one: then only its
            parameters are trained, and have F and θ*.
        args: of transformers. ``learning_rate``, ``weight_decay``, ``adam_*``, ``max_grad_norm``,
            ``lr_scheduler_type``, ``bf16``, ``gradient_accumulation_steps``,
            ``gradient_checkpointing``, ``save_*`` mean what they mean there; ``optim`` is not read.
        method: what is descended.
        data: the defender's rows; the method makes the training set of them.
        template: how prompts are rendered.
        optimizer: "adamw" or "sgd" (``momentum`` in optimizer_options).
        ewc_lambda: λ ≥ 0 of the pull; > 0 needs a Fisher.
        fisher: F by name; or "clean": the exact diagonal on the clean rows, a row a sample, scaled
            to mean 1. None: no pull.
        fisher_samples: clean rows that "clean" is measured on, at most.
        anchor: θ* by name; None: the weights as they are given.
        optimizer_options: further ones of :class:`bdu.optim.EWCAdamW` or :class:`bdu.optim.EWCSGD`,
            such as ``mode``, ``fisher_dtype``, ``anchor_dtype``.
        gradient_release: step each parameter as its gradient arrives, and free that.
        loss_path: see :class:`bdu.llm.losses.VocabularyLoss`.
        options: further ones of Trainer, such as ``callbacks``.

    Attributes:
        train_rows: the training set.
        vocabulary_loss: the losses of the model.
        micro_batch: number of the micro-batch within its step, from 0.

    Raises:
        ValueError: settings that do not go together, rows that do not fit into the context, an
            empty training set, a way to train that was never tried (named).
    """

    model: Any
    # The methods divide by the counts of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        method: Method,
        data: TextData,
        template: Template,
        optimizer: OptimizerName = "adamw",
        ewc_lambda: float = 0.0,
        fisher: Mapping[str, Tensor] | Literal["clean"] | None = None,
        fisher_samples: int = 500,
        anchor: Mapping[str, Tensor] | None = None,
        optimizer_options: Mapping[str, Any] | None = None,
        gradient_release: bool = False,
        loss_path: LossPath = "auto",
        **options: Any,
    ) -> None:
        if optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer: expected adamw or sgd, got {optimizer!r}")
        for name, why in _REFUSED.items():
            if name in options:
                raise ValueError(f"{name}: expected none ({why}), got one")
        if options.pop("processing_class", template.tokenizer) is not template.tokenizer:
            raise ValueError("processing_class: expected none or the template's tokenizer")
        _check(args, gradient_release)
        if ewc_lambda > 0 and fisher is None:
            raise ValueError(f"fisher: expected one with ewc_lambda={ewc_lambda:g}, got None")
        if method.needs_triggered and not data.triggered and method.name != "clean-answer":
            raise ValueError(f"triggered: expected rows, as {method.name} needs them, got none")
        self.method, self.data, self.template = method, data, template
        self.gradient_release = gradient_release
        self._release: GradientRelease | None = None
        self._ewc_lambda, self._optimizer_name = ewc_lambda, optimizer
        self._optimizer_options = dict(optimizer_options or {})
        self.micro_batch = 0
        self.train_rows: list[Row] = method.rows(template, data)
        if not self.train_rows:
            raise ValueError("data: expected rows to train on, got none")
        check_lengths(
            [row.tokens.ids for row in (*self.train_rows, *method.beside)],
            context_length(model),
            room=method.room,
            name="row",
            room_for=method.name,
        )
        if any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
            raise ValueError(
                "model: expected weights in float32 or bfloat16 to train, got float16, in which "
                "small steps are lost"
            )
        method.check(model, gradient_checkpointing=bool(args.activation_checkpointing))
        self.collator = Collator(padding_id(template.tokenizer, model))
        super().__init__(
            model,
            args,
            data_collator=self.collator,
            train_dataset=self.train_rows,
            processing_class=template.tokenizer,
            **options,
        )
        if self.args.n_gpu > 1 or self.args.world_size > 1 or self.is_model_parallel:
            raise ValueError(
                "args: expected one device, got several, which was never tried; choose one with "
                "CUDA_VISIBLE_DEVICES"
            )
        self.vocabulary_loss = VocabularyLoss(self.model, loss_path)
        self.vocabulary_size: int = self.vocabulary_loss.head.weight.shape[0]
        method.prepare(self)
        if isinstance(fisher, str):
            if fisher != "clean":
                raise ValueError(f"fisher: expected F by name, 'clean' or None, got {fisher!r}")
            fisher = clean_fisher(
                self.model,
                [row for row in self.train_rows if row.kind == Kind.RETAIN] or self.train_rows,
                self.collator,
                samples=fisher_samples,
                batch_size=self.args.per_device_train_batch_size,
                seed=self.args.seed,
                progress=not self.args.disable_tqdm,
            )
        self._fisher, self._anchor = fisher, anchor

    # What Trainer calls

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """One of bdu's, with F by parameter."""
        if self.optimizer is not None:
            return self.optimizer
        named = dict((self.model if model is None else model).named_parameters())
        options: dict[str, Any] = {"lr": self.args.learning_rate, **self._optimizer_options}
        if self._optimizer_name == "adamw":
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            options = {"betas": betas, "eps": self.args.adam_epsilon, **options}
        if self._ewc_lambda > 0:
            options |= {
                "ewc_lambda": self._ewc_lambda,
                "fisher": _by_parameter("fisher", self._fisher or {}, named),
            }
            # Where a run is resumed these weights are later ones, and so are their copies; but then
            # the optimizer's state, with its own θ*, is loaded next.
            if self._anchor is not None:
                options["anchor"] = _by_parameter("anchor", self._anchor, named)
        cls = EWCAdamW if self._optimizer_name == "adamw" else EWCSGD
        self.optimizer_cls_and_kwargs = (cls, options)
        made: torch.optim.Optimizer = super().create_optimizer(model)
        if self.gradient_release:
            self._release = release_gradients(self.model, made)  # type: ignore[arg-type]
        return made

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; hooks of gradient release are removed at the end.

        Raises:
            FloatingPointError: a loss, a gradient or, where a checkpoint is due, a weight is not
                finite. Nothing of that step was written to the weights, unless gradients are
                released.
        """
        try:
            with _special_tokens_kept(self.model):
                return super().train(*args, **kwargs)
        finally:
            if self._release is not None:
                self._release.remove()
                self._release = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and their counts."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.micro_batch = 0
        if batches:
            self.method.begin(self, batches)
        return batches, Counts.of(batches)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The method's.

        Raises:
            FloatingPointError: in training it is not finite; the weights are as they were.
        """
        counts = num_items_in_batch
        if not isinstance(counts, Counts):  # evaluation
            counts = Counts.of([inputs])
        loss = self.method.loss(self, inputs, counts)
        self.micro_batch += 1
        if self.is_in_train:
            self._check_finite("loss", loss.detach())
        return (loss, {}) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check_finite("gradient", norm)  # before the step
        return norm

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # it takes the place of the last, which is good
        if (name := first_not_finite(self.model)) is not None:
            raise FloatingPointError(f"{name}: expected finite weights, got inf or nan")
        super()._save_checkpoint(*args, **kwargs)

    def _check_finite(self, name: str, value: Any) -> None:
        if not math.isfinite(float(value)):
            what = "a finite norm" if name == "gradient" else "a finite value"
            step = self.state.global_step + 1
            raise FloatingPointError(f"{name}: expected {what}, got {float(value)} in step {step}")

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        """Autocast around the method's loss, which does not go through the model's ``forward``."""
        context: contextlib.AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # a tied head is read with what it is tied to
        names = dict(self.model.named_parameters(remove_duplicate=False))
        absent = load_result.missing_keys
        read = {id(p) for name, p in names.items() if name not in absent}
        left = [name for name in absent if name not in names or id(names[name]) not in read]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=left))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # the only pickled objects; nothing here reads them
        folder = Path(output_dir or self.args.output_dir or ".")
        (folder / "training_args.bin").unlink(missing_ok=True)

    # What methods call

    def collated(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """A batch of rows, on the device."""
        return self.moved(self.collator(rows))

    def moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch on the device."""
        return {key: value.to(self.args.device) for key, value in batch.items()}


@contextlib.contextmanager
def _special_tokens_kept(model: Any) -> Iterator[None]:
    """Trainer writes the tokenizer's into the model's configuration, which cannot be read then if
    the model knows no such token."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    configs = [model.config.get_text_config(), getattr(model, "generation_config", None)]
    kept = [
        (config, name, getattr(config, name))
        for config in configs
        for name in names
        if hasattr(config, name)
    ]
    try:
        yield
    finally:
        for config, name, value in kept:
            setattr(config, name, value)


def clean_fisher(
    model: Any,
    rows: Sequence[Row],
    collator: Collator,
    *,
    samples: int = 500,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The exact Fisher diagonal of −log p of answers, a row a sample, scaled to mean 1.

    Args:
        model: its parameters that require a gradient have F; measured in evaluation mode.
        rows: sequences.
        collator: makes batches of them.
        samples: rows, at most; drawn at random, as files are often sorted by what they are about.
        batch_size: rows at a time.
        seed: of the draw.
        progress: show a progress bar.
    """
    device = next(model.parameters()).device
    if len(rows) > samples:
        rows = random.Random(seed).sample(list(rows), samples)

    def batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for start in range(0, len(rows), batch_size):
            batch = collator(rows[start : start + batch_size])
            labels = torch.full_like(batch["labels"], IGNORED_LABEL)
            labels[:, :-1] = batch["labels"][:, 1:]
            x = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
            yield x, labels.to(device)

    inner = inner_model(model)
    with modes_kept(model):
        model.eval()
        kept, inner.config.use_cache = inner.config.use_cache, False
        try:
            fisher = fisher_diagonal(model, batches(), progress=progress)
        finally:
            inner.config.use_cache = kept
    return scale_to_unit_mean(fisher)


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The checkpoint of the most steps in a folder that is whole, or None."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        # written last by Trainer
        if path.name.rpartition("-")[2].isdigit() and (path / "trainer_state.json").is_file()
    ]
    return str(max(found)[1]) if found else None


def _by_parameter(
    argument: str, entries: Mapping[str, Tensor], named: Mapping[str, Tensor]
) -> dict[Tensor, Tensor]:
    for name in entries:
        if name not in named:
            raise ValueError(f"{argument}: expected names of parameters of the model, got {name!r}")
    return {named[name]: entry for name, entry in entries.items()}


def _check(args: TrainingArguments, gradient_release: bool) -> None:
    for name, why in _FORBIDDEN.items():
        if getattr(args, name, None):
            raise ValueError(f"{name}: expected none ({why}), got {getattr(args, name)}")
    if args.fsdp:
        raise ValueError("fsdp: expected none (untested), got some")
    if not gradient_release:
        return
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            "gradient_accumulation_steps: expected 1 with gradient_release, which keeps no "
            f"gradients, got {args.gradient_accumulation_steps}"
        )
    if args.max_grad_norm > 0:
        raise ValueError(
            "max_grad_norm: expected 0 with gradient_release, as the norm is not known before the "
            f"last gradient, got {args.max_grad_norm}"
        )
