"""Clean a checkpoint: remove its backdoor and, where the trigger is known, show that it is gone."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdu.attacks.trigger import Trigger
from bdu.checkpoint import save_state_dict
from bdu.cli import common
from bdu.data import ImageData, check_labels, npz_array
from bdu.defenses.balanced import dtypes_of
from bdu.memory import MemoryPlan, memory_plan
from bdu.metrics import defense_effectiveness_rate
from bdu.models import device_of
from bdu.monitor.gradcam import target_layer
from bdu.monitor.live import AttentionMonitor, Logger, TensorBoard, WeightsAndBiases, Writer
from bdu.monitor.report import write_report
from bdu.optim import EWCSGD, EWCAdamW
from bdu.runs import Clock, RunDirectory, versions
from bdu.trainer import METHODS, OURS, SETTINGS, prepare, unlearn

_PROBE = 32  # triggered images whose attention is watched, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bdu unlearn``."""
    parser.add_argument(
        "--task",
        choices=("image", "lm"),
        default="image",
        help="lm has flags of its own: bdu unlearn --task lm --help",
    )
    common.add_model(parser, checkpoint=True)
    common.add_images(parser)
    parser.add_argument(
        "--clean",
        required=True,
        type=Path,
        help=f"clean samples with true labels: {common.IMAGE_FILES}",
    )
    parser.add_argument(
        "--triggered",
        type=Path,
        default=None,
        help="triggered samples with the attacker's labels, likewise; an .npz may hold y_true, "
        "what they really show",
    )
    parser.add_argument(
        "--method",
        choices=sorted(METHODS),
        default="balanced",
        help="default %(default)s, which needs --triggered; "
        "auto and the others need clean samples alone",
    )
    parser.add_argument(
        "--preset",
        choices=("published", "ours"),
        default="published",
        help="where the method's settings start from: the paper's as far as they are known "
        '(default), or those of our variant, "<method>, ours" in docs/methods.md and the tables',
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one of the method's own settings, for example ewc_lambda=10; may be repeated; "
        "--set help says what --method has, with the defaults",
    )
    evaluator = parser.add_argument_group(
        "evaluation", "for the evaluator's eyes only: the method never sees any of it"
    )
    evaluator.add_argument(
        "--eval-data", type=Path, default=None, help="images with true labels, as --clean"
    )
    evaluator.add_argument("--eval-split", default=None, help="part of --eval-data")
    common.add_attack(parser, required=False)
    parser.add_argument(
        "--retune-data", type=Path, default=None, help="clean images for the retune attack"
    )
    common.add_run_folder(parser)
    parser.add_argument(
        "--tensorboard", action="store_true", help="write curves and heat maps for TensorBoard, too"
    )
    parser.add_argument("--wandb", default=None, metavar="PROJECT", help="and for Weights & Biases")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all inputs, say what the run would hold in memory, and write nothing",
    )
    common.add_common(parser, resume=True)


def run(options: argparse.Namespace) -> None:
    """Load, clean, measure, write."""
    start = time.perf_counter()
    is_dry_run = vars(options).pop("dry_run")  # no setting of a run
    trigger, target = common.evaluators_view(options)
    if trigger is not None and options.eval_data is None:
        raise ValueError("--eval-data: expected, as a trigger is given to evaluate with")
    if options.retune_data is not None and trigger is None:
        raise ValueError("--retune-data: expected --attack or --trigger, and --target, with it")
    if "help" in options.set:
        print(_settings_help(options.method))
        return
    settings = {**_preset(options), **common.settings(options.set)}
    directory = RunDirectory(options.out)
    config = {"command": "unlearn", **common.config(options)}
    directory.check(config, resume=options.resume)
    if options.resume and directory.has_ended():
        print(common.ended(directory))
        return
    clean = common.images(options.clean, options, "--clean")
    triggered = None
    if options.triggered is not None:
        triggered = _triggered(options, clean)
    evaluation = None
    if options.eval_data is not None:
        evaluation = common.images(
            options.eval_data, options, "--eval-data", options.eval_split, like=clean
        )
    retune_data = None
    if options.retune_data is not None:
        retune_data = common.images(options.retune_data, options, "--retune-data", like=clean)
    model = common.build_loaded(options, clean.x.shape[1])

    # Before anything is written: a run that cannot be must leave no folder behind.
    prepare(
        model,
        method=options.method,
        clean=clean,
        triggered=triggered,
        seed=options.seed,
        device=device_of(model),
        settings=settings,
    )
    before = None
    if evaluation is not None:
        before = common.rates(model, evaluation, trigger, target)
    if retune_data is not None and target is not None:
        common.retune_labels(model, retune_data, target)
    if is_dry_run:
        if before is not None:
            print(common.table([("before", before)]))
        print(_memory_plan(model, options.method, settings))
        return
    directory.start(config, resume=options.resume)
    attention = _attention(model, triggered, trigger, directory)
    writers = _writers(options, config, directory)
    goes_on = options.resume and directory.state.exists()
    lines: list[dict[str, Any]] = directory.read_lines() if goes_on else []
    clock = Clock(directory.path / "seconds.json", start, resume=goes_on)

    def keep(line: dict[str, Any], _: nn.Module) -> None:
        lines.append(line)
        directory.write_lines(lines)
        clock.keep()

    with _warnings_told() as told:
        result = unlearn(
            model,
            method=options.method,
            clean=clean,
            triggered=triggered,
            seed=options.seed,
            callbacks=[
                *([] if attention is None else [attention]),
                keep,
                *(Logger(writer, attention) for writer in writers),
            ],
            progress=not options.quiet,
            state_file=directory.state,
            resume=options.resume,
            **settings,
        )
    seconds = clock.seconds
    for writer in writers:
        writer.close()
    directory.write_lines(result.history)
    save_state_dict(directory.model, result.model.state_dict())
    after = None
    if evaluation is not None:
        after = common.rates(result.model, evaluation, trigger, target)
    outcome: dict[str, Any] = {
        "before": before,
        "after": after,
        "method": result.method,
        "settings": result.settings,
        "stopped": result.stopped,
        "seconds": seconds,
        "total_seconds": clock.total_seconds,
        "seed": options.seed,
        "versions": versions(),
        "weight_change": _weight_change(model, result.model),
        "warnings": told,
    }
    if before is not None and after is not None and trigger is not None:
        outcome["der"] = defense_effectiveness_rate(
            clean_accuracy_before=before["clean_accuracy"],
            clean_accuracy_after=after["clean_accuracy"],
            attack_success_rate_before=before["attack_success_rate"],
            attack_success_rate_after=after["attack_success_rate"],
        )
    if retune_data is not None and evaluation is not None and trigger and target is not None:
        outcome["retuned_attack_success_rate"] = common.retuned_rate(
            result.model, retune_data, evaluation, trigger, target, options.seed
        )
    directory.write_metrics(outcome)
    write_report(directory)
    for file in (directory.state, clock.file):
        file.unlink(missing_ok=True)
    if evaluation is not None:
        print(common.table([("before", before), ("after", after)]))
    if "der" in outcome:
        print(f"defence effectiveness rate {outcome['der']:.3f} (1 is best, 0.5 no change)")
    if "retuned_attack_success_rate" in outcome:
        print(f"ASR after the retune attack {100 * outcome['retuned_attack_success_rate']:.2f} %")
    print(f"{result.stopped}; wrote {directory.path}")


@contextlib.contextmanager
def _warnings_told() -> Iterator[list[str]]:
    """Yields a list of the warnings given within, each once, and tells them at exit."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield told
        finally:
            told += dict.fromkeys(
                str(each.message) for each in caught if each.category is UserWarning
            )
            for text in told:
                print(f"bdu unlearn: warning: {text}", file=sys.stderr)


# Copies that a method holds beside the model as given, the suspect model and the best.
_MORE_COPIES = {"pam": 2, "tsbd": 3, "tbar": 1, "auto": 6}


def _preset(options: argparse.Namespace) -> dict[str, Any]:
    if options.preset == "published":
        return {}
    if options.method not in OURS:
        raise ValueError(
            f"--preset: expected published with method {options.method}, as only "
            f"{', '.join(OURS)} have a variant of ours, got ours"
        )
    return OURS[options.method]


def _settings_help(method: str) -> str:
    """All settings of a method: names, meanings and defaults."""
    own: Any = SETTINGS[method]
    told = [inspect.getdoc(kind) or "" for kind in reversed(own.__mro__) if kind is not object]
    defaults = ", ".join(f"{name}={value}" for name, value in asdict(own()).items())
    return "\n\n".join([*told, textwrap.fill(f"Defaults: {defaults}", 100)])


def _memory_plan(model: nn.Module, method: str, settings: dict[str, Any]) -> MemoryPlan:
    """What the method holds at once: its optimizer's share, and copies of the weights.

    With "balanced" these are the model as given, the teacher and the weights to be kept; and where
    the forget loss is descended from ``radius`` away, that gradient and the weights as they were
    before.
    """
    chosen = SETTINGS[method](**settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    if method == "balanced":
        optimizer: EWCSGD | EWCAdamW = EWCSGD(
            trained,
            lr=chosen.lr,
            momentum=chosen.momentum,
            ewc_lambda=chosen.ewc_lambda,
            **dtypes_of(chosen),
        )
        moves_away = chosen.radius > 0 and chosen.forget != "cross_entropy"
        return memory_plan(model, optimizer, copies=5 if moves_away else 3)
    ewc_lambda = chosen.ewc_lambda if chosen.anchored else 0.0
    if method in ("i-bau", "sau"):
        optimizer = EWCAdamW(trained, lr=1.0, ewc_lambda=ewc_lambda)
    else:
        optimizer = EWCSGD(
            trained, lr=1.0, momentum=getattr(chosen, "momentum", 0.9), ewc_lambda=ewc_lambda
        )
    return memory_plan(model, optimizer, copies=3 + _MORE_COPIES.get(method, 0))


def _weight_change(before: nn.Module, after: nn.Module) -> dict[str, float]:
    """‖θ − θ before‖ / ‖θ before‖ of every weight of more than one axis."""
    own = dict(after.named_parameters())
    change = {}
    for name, p in before.named_parameters():
        size = float(p.detach().double().norm())
        if p.dim() > 1 and size > 0:
            moved = own[name].detach().to(p.device).double() - p.detach().double()
            change[name] = float(moved.norm()) / size
    return change


def _attention(
    model: nn.Module,
    triggered: tuple[Any, ...] | None,
    trigger: Trigger | None,
    directory: RunDirectory,
) -> AttentionMonitor | None:
    """What looks at the model's attention on some triggered images, where it has any to look at."""
    if triggered is None:
        return None
    images = torch.as_tensor(triggered[0])[:_PROBE]
    try:
        layer = target_layer(model, images[:1])
    except ValueError:
        return None  # a model without places
    mask = None if trigger is None else trigger.mask(images.shape)
    if mask is not None and not bool(mask.any()):
        mask = None  # of a trigger that changes nothing
    targets = torch.as_tensor(triggered[1])[:_PROBE]
    return AttentionMonitor(images, targets, mask, layer=layer, file=directory.attention)


def _writers(
    options: argparse.Namespace, config: dict[str, Any], directory: RunDirectory
) -> list[Writer]:
    writers: list[Writer] = []
    if options.tensorboard:
        writers.append(TensorBoard(directory.path / "tensorboard"))
    if options.wandb is not None:
        writers.append(WeightsAndBiases(options.wandb, config))
    return writers


def _triggered(options: argparse.Namespace, clean: ImageData) -> tuple[Any, ...]:
    """(x, y), and where the file has them the true labels, as `bdu poison` writes them."""
    data = common.images(options.triggered, options, "--triggered", like=clean)
    if options.triggered.suffix == ".npz":
        with common.named("--triggered"):
            y_true = npz_array(options.triggered, "y_true")
            if y_true is not None:
                return data.x, data.y, check_labels(y_true, None, "y_true")
    return data.x, data.y
