"""Train a backdoored model, and set apart what a defender and an evaluator may see."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdu import models
from bdu.attacks import JointlyTrained, Poisoned, Prepared, Saved, Trigger, load_attack, poison
from bdu.attacks.trigger import drawn, triggered_like
from bdu.attacks.trojannn import TrojanNN, last_linear
from bdu.checkpoint import atomic_write, digest, load_into, save_state_dict
from bdu.cli import common
from bdu.data import ImageData, as_unit_float, save_npz, split_indices
from bdu.metrics import target_labels
from bdu.monitor.report import write_report
from bdu.runs import DATA, RunDirectory, versions
from bdu.training import SCHEDULES, fit

EVALUATOR_SHARE = 0.2
_LEAST_LEARNT = 0.1  # of ASR above the false-target rate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bdu poison``."""
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        help=common.IMAGE_FILES,
    )
    parser.add_argument("--split", default=None, help="part of --data to train on")
    parser.add_argument("--eval-split", default=None, help="part of --data for the evaluator")
    common.add_model(parser, checkpoint=False)
    common.add_images(parser)
    common.add_attack(parser, required=True)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one of the attack's own options, for example strength=0.75; may be repeated",
    )
    parser.add_argument(
        "--surrogate",
        type=Path,
        default=None,
        metavar="FILE",
        help="clean weights of --model, for attacks that need some; by default they are trained",
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=0.1,
        help="share poisoned, default %(default)s; 0: no backdoor, what --attack does is measured",
    )
    parser.add_argument(
        "--defender-clean",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of the images to train on, set apart with true labels for the defender, "
        "default %(default)s",
    )
    parser.add_argument(
        "--defender-triggered",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="likewise, with the trigger on them, default %(default)s",
    )
    parser.add_argument(
        "--retune",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="likewise, for the retune attack, default %(default)s",
    )
    parser.add_argument("--epochs", type=int, default=20, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=128, help="default %(default)s")
    parser.add_argument(
        "--lr", type=float, default=0.1, help="peak learning rate of SGD, default %(default)s"
    )
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="one-cycle",
        help="of the learning rate, default %(default)s",
    )
    parser.add_argument(
        "--no-augment", action="store_true", help="neither shift nor mirror the images"
    )
    common.add_run_folder(parser)
    common.add_common(parser, resume=True)


def run(options: argparse.Namespace) -> None:
    """Split, poison, train, measure.

    Of the training part, the shares of the defender and of the retune attack are held out: the
    attacker trains on the rest. The evaluator gets ``--eval-split``, or where there is none a fifth
    of everything. All of them are written as ``.npz`` and share no image. A run that is resumed
    with its model trained takes that and its ``attack.json`` as they are, and does the rest.
    """
    start = time.perf_counter()
    # Before anything is written: a run that cannot be must leave no folder behind.
    for name in ("epochs", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(options, name)}")
    if not 0 < options.lr < math.inf:
        raise ValueError(f"lr: expected a positive number, got {options.lr}")
    device = common.device(options)
    trigger, target = common.evaluators_view(options, common.settings(options.set))
    if trigger is None or target is None:
        raise ValueError("--attack: expected, or --trigger with a picture")
    directory = RunDirectory(options.out)
    config = {"command": "poison", **common.config(options)}
    directory.check(config, resume=options.resume)
    if options.resume and directory.has_ended():
        print(common.ended(directory))
        return
    train, evaluator = _parts(options)
    config[DATA] = digest([train.x, train.y, evaluator.x, evaluator.y])
    directory.check(config, resume=options.resume)
    classes = max(train.num_classes, evaluator.num_classes)
    clean, triggered, retune, rest = split_indices(
        train.y, _sizes(options, len(train)), options.seed, tracks=train.tracks
    )
    # The defender's triggered samples are of other classes than the target, as the attacker's are.
    wanted = target_labels(train.y, target, classes)
    triggered = triggered[train.y[triggered] != wanted[triggered]]
    attacker = train.subset(rest)
    plan: dict[str, Any] = {"target": target, "num_classes": classes, "seed": options.seed}
    model = _model(options, train, classes, options.seed).to(device)
    poisoned: Poisoned | None = None
    attack_file = directory.path / "attack.json"
    is_trained = options.resume and directory.model.exists() and attack_file.exists()
    # What can be refused is refused before hours of training.
    if isinstance(trigger, Saved) and trigger.spec()["file"] is not None:
        trigger(as_unit_float(train.x[:1]))
    surrogate = None
    if options.surrogate is not None and not is_trained:
        if not isinstance(trigger, Prepared):
            name = trigger.spec()["name"]
            raise ValueError(f"--surrogate: expected none, as {name} takes no clean model")
        surrogate = _model(options, train, classes, options.seed)
        with common.named("--surrogate"):
            load_into(surrogate, options.surrogate)
    if isinstance(trigger, (JointlyTrained, Prepared)):
        trigger.mask(train.x.shape)
        is_clean_label = getattr(trigger, "clean_label", False)
        if isinstance(trigger, TrojanNN) and not is_trained:
            last_linear(model)
        drawn(attacker.y, rate=options.rate, clean_label=is_clean_label, **plan)
    if is_trained:
        trigger = load_attack(attack_file)
        load_into(model, directory.model)
    elif isinstance(trigger, Prepared):
        directory.start(config, resume=options.resume)
        if options.resume and attack_file.exists():
            trigger = load_attack(attack_file)
            assert isinstance(trigger, Prepared)
        trigger.prepare(
            lambda: _surrogate(options, attacker, classes, device, directory, given=surrogate),
            attacker.x,
            attacker.y,
            **plan,
        )
    if not (is_trained or isinstance(trigger, JointlyTrained)):
        poisoned = poison(attacker.x, attacker.y, trigger, rate=options.rate, **plan)
    directory.start(config, resume=options.resume or isinstance(trigger, Prepared))
    _write_part(directory, "defender_clean", train.subset(clean))
    _write_part(directory, "retune", train.subset(retune))
    _write_part(directory, "evaluator", evaluator)

    def write_triggered() -> None:
        images = ImageData(triggered_like(train.x[triggered], trigger), wanted[triggered])
        _write_part(directory, "defender_triggered", images, y_true=train.y[triggered])

    def write_attack() -> None:
        if isinstance(trigger, Saved):
            trigger.save(directory.path / "trigger.safetensors")
        write_triggered()
        record = {
            "trigger": _spec(trigger),
            "target": target,
            "rate": options.rate,
            "seed": options.seed,
            "classes": train.classes,
            **_changes(poisoned, rest),
        }
        atomic_write(attack_file, json.dumps(record) + "\n")

    lines: list[dict[str, Any]] = []

    def keep(line: dict[str, Any]) -> None:
        lines.append(line)
        directory.write_lines(lines)

    if options.resume:
        lines = directory.read_lines()
    training = {
        **_training(options),
        "callbacks": [keep],
        "state_file": directory.state,
    }
    if is_trained:
        write_triggered()
        history = lines
    elif isinstance(trigger, JointlyTrained):
        history = trigger.fit(model, attacker.x, attacker.y, rate=options.rate, **plan, **training)
        write_attack()
    else:
        assert poisoned is not None
        write_attack()
        history = fit(model, poisoned.x, poisoned.y, seed=options.seed, **training)
    directory.write_lines(history)
    if not is_trained:
        save_state_dict(directory.model, model.state_dict())
    after = common.rates(model, evaluator, trigger, target)
    seconds = time.perf_counter() - start
    told = ("progress", "resume")
    directory.write_metrics(
        {
            "before": None,
            "after": after,
            "method": "poison",
            "settings": {k: v for k, v in _training(options).items() if k not in told},
            "stopped": "ran all its steps",
            "seconds": seconds,
            "total_seconds": seconds,
            "seed": options.seed,
            "versions": versions(),
        }
    )
    write_report(directory)
    directory.state.unlink(missing_ok=True)
    print(common.table([("planted", after)]))
    success, floor = after["attack_success_rate"], after["false_target_rate"]
    is_weak = success is not None and floor is not None and success < floor + _LEAST_LEARNT
    if is_weak and options.rate > 0:
        print(
            f"the backdoor was not learnt: ASR {100 * success:.1f} % at a false-target rate of "
            f"{100 * floor:.1f}; more --epochs or a higher --rate may help"
        )
    print(f"wrote {directory.path}")


def _spec(trigger: Trigger) -> dict[str, Any]:
    """Options that rebuild it, with the file that it names relative to the run's folder."""
    options = trigger.spec()
    if options.get("file") is not None:
        options["file"] = Path(options["file"]).name
    return options


def _changes(poisoned: Poisoned | None, rest: torch.Tensor) -> dict[str, Any]:
    """Which samples of the training part were changed; None where every batch has its own."""
    if poisoned is None:
        return {"clean_label": False, "poisoned_indices": None, "cover_indices": None}
    return {
        "clean_label": poisoned.clean_label,
        "poisoned_indices": rest[poisoned.indices].tolist(),
        "cover_indices": rest[poisoned.cover_indices].tolist(),
    }


def _training(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "epochs": options.epochs,
        "lr": options.lr,
        "batch_size": options.batch_size,
        "schedule": options.schedule,
        "augment": not options.no_augment,
        "progress": not options.quiet,
        "resume": options.resume,
    }


def _model(options: argparse.Namespace, train: ImageData, classes: int, seed: int) -> nn.Module:
    return models.build(
        options.model,
        num_classes=classes,
        in_channels=train.x.shape[1],
        mean=options.mean,
        std=options.std,
        seed=seed,
    )


def _surrogate(
    options: argparse.Namespace,
    attacker: ImageData,
    classes: int,
    device: torch.device,
    directory: RunDirectory,
    *,
    given: nn.Module | None,
) -> nn.Module:
    """A model that never saw a trigger: given, or trained as the backdoored one will be."""
    if given is not None:
        return given.to(device)
    file = directory.path / "surrogate.safetensors"
    seed = options.seed + 1  # the attacker does not have the victim's initial weights
    model = _model(options, attacker, classes, seed)
    if options.resume and file.exists():
        load_into(model, file)
        return model.to(device)
    state = directory.path / "surrogate_state.pt"
    model.to(device)
    fit(model, attacker.x, attacker.y, seed=seed, state_file=state, **_training(options))
    save_state_dict(file, model.state_dict())
    state.unlink(missing_ok=True)
    return model


def _sizes(options: argparse.Namespace, total: int) -> list[float | int]:
    """The shares that are held out, and how many images are left to the attacker.

    Raises:
        ValueError: no share, or none left.
    """
    names = ("defender_clean", "defender_triggered", "retune")
    shares = [getattr(options, name) for name in names]
    for name, share in zip(names, shares, strict=True):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected a share in [0, 1], got {share}")
    left = total - sum(round(share * total) for share in shares)
    if left < 1:
        raise ValueError(
            f"{', '.join(names)}: expected shares that leave images to train on, "
            f"got {', '.join(map(str, shares))}"
        )
    return [*shares, left]


def _parts(options: argparse.Namespace) -> tuple[ImageData, ImageData]:
    train = common.images(options.data, options, "--data", options.split)
    if options.eval_split is not None:
        evaluation = common.images(options.data, options, "--data", options.eval_split, like=train)
        return train, evaluation
    held_out, rest = split_indices(
        train.y, [EVALUATOR_SHARE, 1 - EVALUATOR_SHARE], options.seed, tracks=train.tracks
    )
    return train.subset(rest), train.subset(held_out)


def _write_part(directory: RunDirectory, name: str, data: ImageData, **more: torch.Tensor) -> None:
    x = data.x.permute(0, 2, 3, 1) if data.x.dtype == torch.uint8 else data.x
    arrays = {"x": x, "y": data.y, **more}
    save_npz(directory.path / f"{name}.npz", **arrays)
