"""Flags and steps that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from bdu import metrics, models
from bdu.attacks import ATTACKS, Trigger, load_attack, load_target, make_attack
from bdu.attacks.retune import retune
from bdu.attacks.trigger import triggered_like
from bdu.checkpoint import load_into, load_state_dict
from bdu.data import ImageData, as_unit_float, check_labels, load_images, split_indices
from bdu.models import usable_device
from bdu.runs import RunDirectory

RETUNE_POISONED = 5
_SEEDS = 2**62

IMAGE_FILES = "class folders, CIFAR-10's binary files, or an .npz of x (uint8, N x H x W x C) and y"

# What a command was told, apart from where it writes and how it is watched.
_NOT_CONFIG = frozenset({"config", "out", "resume", "traceback", "quiet"})


def add_common(parser: argparse.ArgumentParser, *, resume: bool = False) -> None:
    """Flags of every command that computes."""
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1; default: cuda if any")
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of all that is drawn, default %(default)s"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_traceback(parser)
    if resume:
        parser.add_argument(
            "--resume",
            action="store_true",
            help="continue the run in --out, with the settings in its config.yaml",
        )


def add_run_folder(parser: argparse.ArgumentParser) -> None:
    """The flag that says where a run is written."""
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="a new folder, or with --resume that of the run",
    )


def add_traceback(parser: argparse.ArgumentParser) -> None:
    """The flag that shows where an error came from."""
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def add_model(parser: argparse.ArgumentParser, *, checkpoint: bool) -> None:
    """Flags that say which network, and with ``checkpoint`` also which weights."""
    parser.add_argument(
        "--model",
        required=True,
        help="resnet18, resnet18-w<N>, wrn16-1, smallcnn, or package.module:factory",
    )
    if checkpoint:
        parser.add_argument(
            "--checkpoint",
            required=True,
            type=Path,
            metavar="FILE",
            help="its weights: .safetensors, or what torch.load reads with weights_only=True",
        )
        parser.add_argument(
            "--num-classes", type=int, default=None, help="default: read off the checkpoint"
        )
    parser.add_argument("--mean", type=float, nargs="+", default=None, help="a number a channel")
    parser.add_argument("--std", type=float, nargs="+", default=None, help="a number a channel")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Flags on how images are read."""
    parser.add_argument("--image-size", type=int, default=None, help="resize to this many pixels")


def add_attack(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Flags that say which trigger and which target."""
    parser.add_argument(
        "--attack",
        default=None,
        help=f"{', '.join(sorted(ATTACKS))}, or the attack.json of a `bdu poison` run",
    )
    parser.add_argument("--trigger", type=Path, default=None, metavar="PNG", help="its picture")
    parser.add_argument(
        "--position", default=None, help="bottom-right and so on, or row,column of the top left"
    )
    parser.add_argument(
        "--alpha", type=float, default=None, help="opacity of blended and adaptive-blend"
    )
    default = "; default: that of the attack.json" + (", or 0" if required else "")
    parser.add_argument("--target", default=None, help=f"a class, or all-to-all{default}")


def device(options: argparse.Namespace) -> torch.device:
    """The device asked for.

    Raises:
        ValueError: it is not here, or bdu was never tried on it.
    """
    if options.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(options.device, "--device")


def config(options: argparse.Namespace) -> dict[str, Any]:
    """The settings as ``config.yaml`` keeps them; paths absolute, to hold from any folder."""
    values = {key: value for key, value in vars(options).items() if key not in _NOT_CONFIG}
    is_language = values.get("task") == "lm"
    return {
        key: str(Path(value).absolute()) if _is_path(key, value, is_language) else value
        for key, value in values.items()
    }


def _is_path(key: str, value: Any, is_language: bool) -> bool:
    """Also of settings that may be a name or a file."""
    if isinstance(value, Path):
        return True
    if key == "attack":
        return isinstance(value, str) and value.endswith(".json")
    if key == "template" and value in ("tokenizer", "none"):
        return False
    return is_language and key in ("model", "template") and Path(value).exists()


def attack(options: argparse.Namespace, settings: dict[str, Any] | None = None) -> Trigger | None:
    """The trigger asked for, or None.

    Args:
        options: with the flags of add_attack.
        settings: more of the attack's options, as `settings` reads them.

    Raises:
        ValueError: flags that do not go together, or a trigger that cannot be read.
    """
    name = options.attack
    if name is not None and name.endswith(".json"):
        if settings:
            raise ValueError(f"--set: expected none beside an attack.json, got {settings}")
        return load_attack(name)
    given: dict[str, Any] = {}
    if options.trigger is not None:
        given["pattern"] = options.trigger
    if options.position is not None:
        given["position"] = _position(options.position)
    if options.alpha is not None:
        given["alpha"] = options.alpha
    if name is None:
        if options.trigger is None:
            if given:
                raise ValueError(f"--{next(iter(given))}: expected --attack or --trigger with it")
            if settings:
                raise ValueError("--set: expected --attack or --trigger with it")
            return None
        name = "badnets"
    for setting, value in (settings or {}).items():
        if setting in given:
            raise ValueError(f"--set: expected {setting} once, got it as a flag too")
        given[setting] = value
    if name not in ATTACKS:
        known = ", ".join(sorted(ATTACKS))
        raise ValueError(f"--attack: expected one of {known}, or an attack.json, got {name!r}")
    return make_attack(name, **given)


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs of ``--set`` as a dict; values are read as YAML.

    Raises:
        ValueError: no pair, or a value that cannot be read.
    """
    read: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"--set: expected NAME=VALUE, got {pair!r}")
        read[name.strip().replace("-", "_")] = _value(value)
    return read


def target(options: argparse.Namespace) -> metrics.Target | None:
    """The target class, "all-to-all", or None."""
    name, plants = options.attack, options.command == "poison"
    planted = load_target(name) if name is not None and name.endswith(".json") else None
    if options.target is None:
        return 0 if plants and planted is None else planted
    text = str(options.target)
    if text != metrics.ALL_TO_ALL and not re.fullmatch(r"\d+", text):
        raise ValueError(f"--target: expected a class number or all-to-all, got {text!r}")
    wanted = metrics.ALL_TO_ALL if text == metrics.ALL_TO_ALL else int(text)
    if not plants and planted is not None and wanted != planted:
        raise ValueError(f"--target: expected {planted}, as in {name}, got {text}")
    return wanted


def evaluators_view(
    options: argparse.Namespace, settings: dict[str, Any] | None = None
) -> tuple[Trigger | None, metrics.Target | None]:
    """Trigger and target for an evaluation: both or neither; arguments as of attack.

    Raises:
        ValueError: only one of them.
    """
    trigger, wanted = attack(options, settings), target(options)
    if (trigger is None) != (wanted is None):
        missing = "--attack or --trigger" if trigger is None else "--target"
        raise ValueError(f"{missing}: expected, as trigger and target go together")
    return trigger, wanted


def ended(directory: RunDirectory) -> str:
    """What is said where there is nothing to resume."""
    return f"{directory.path} holds a run that has ended; nothing is left to do"


@contextlib.contextmanager
def named(flag: str) -> Iterator[None]:
    """An error of what is read in it begins with the flag."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{flag}: {error}") from error


def images(
    path: Path,
    options: argparse.Namespace,
    flag: str,
    split: str | None = None,
    *,
    like: ImageData | None = None,
) -> ImageData:
    """Images of ``path`` in the size asked for; an error begins with the flag.

    Args:
        like: images read before, whose shape these must have: in another size a trigger would lie
            elsewhere. Class folders are labelled by the names of its classes, where it has any;
            some may be absent.
    """
    classes = like.classes if like is not None and path.is_dir() else None
    with named(flag):
        data = load_images(path, split=split, image_size=options.image_size, classes=classes)
    if like is not None and data.x.shape[1:] != like.x.shape[1:]:
        expected, got = tuple(like.x.shape[1:]), tuple(data.x.shape[1:])
        raise ValueError(f"{flag}: expected images of {expected}, as those read before, got {got}")
    return data


def build_loaded(options: argparse.Namespace, in_channels: int) -> nn.Module:
    """The model with the checkpoint's weights, on the device asked for, in evaluation mode."""
    classes = options.num_classes
    if classes is None:
        classes = _outputs(load_state_dict(options.checkpoint))
    model = models.build(
        options.model,
        num_classes=classes,
        in_channels=in_channels,
        mean=options.mean,
        std=options.std,
        seed=0,
    )
    load_into(model, options.checkpoint)
    return model.to(device(options)).eval()


def rates(
    model: nn.Module,
    data: ImageData,
    trigger: Trigger | None,
    wanted: metrics.Target | None,
) -> dict[str, Any]:
    """All rates of a model on the evaluator's data."""
    classes = metrics.predict(model, data.x[:1]).shape[1]
    return metrics.evaluate(
        model, data.x, data.y, num_classes=classes, trigger=trigger, target=wanted
    )


def retune_labels(
    model: nn.Module, retune_data: ImageData, wanted: metrics.Target
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the retune attack takes of its data: the attacker's labels, and whom to give them to.

    Returns:
        (N,) int64 labels, and the indices of the images whose own class is another one.

    Raises:
        ValueError: labels that the model does not have, or too few images to poison.
    """
    classes = metrics.predict(model, retune_data.x[:1]).shape[1]
    check_labels(retune_data.y, classes, "--retune-data")
    labels = metrics.target_labels(retune_data.y, wanted, classes)
    candidates = (retune_data.y != labels).nonzero().flatten()
    if len(candidates) < RETUNE_POISONED:
        raise ValueError(
            f"--retune-data: expected at least {RETUNE_POISONED} images that are not of the "
            f"target class, got {len(candidates)}"
        )
    return labels, candidates


def retuned_rate(
    model: nn.Module,
    retune_data: ImageData,
    evaluation: ImageData,
    trigger: Trigger,
    wanted: metrics.Target,
    seed: int,
) -> float:
    """Attack success rate after the retune attack with five poisoned samples."""
    labels, candidates = retune_labels(model, retune_data, wanted)
    chosen = candidates[split_indices(len(candidates), [RETUNE_POISONED], seed)[0]]
    attacked = retune(
        model,
        retune_data.x,
        retune_data.y,
        triggered_like(retune_data.x[chosen], trigger),
        labels[chosen],
        seed=seed,
    )
    rate: float = rates(attacked, evaluation, trigger, wanted)["attack_success_rate"]
    return rate


def table(rows: Sequence[tuple[str, dict[str, Any] | None]]) -> str:
    """Rates of several models as text, in percent."""
    names = ("clean_accuracy", "attack_success_rate", "robust_accuracy", "false_target_rate")
    heads = ("clean accuracy", "ASR", "robust accuracy", "false-target rate")
    lines = [" " * 8 + "".join(f"{head:>20}" for head in heads)]
    for title, row in rows:
        if row is None:
            continue
        cells = ["-" if row[n] is None else f"{100 * row[n]:.2f} %" for n in names]
        lines.append(f"{title:8}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) >= _SEEDS:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {_SEEDS - 1}")
    return int(text)


def _position(text: str) -> str | tuple[int, int]:
    numbers = re.fullmatch(r"(\d+),(\d+)", text)
    return (int(numbers.group(1)), int(numbers.group(2))) if numbers else text


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set: expected a plain value, got {text!r}") from error
    if value == "None":
        return None
    if isinstance(value, str):
        # YAML 1.1 takes 1e-3, without a point, for text.
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _outputs(state: dict[str, torch.Tensor]) -> int:
    # The last matrix of a classifier is its head.
    matrices = [value for value in state.values() if value.dim() == 2]
    if not matrices:
        raise ValueError("--num-classes: expected, as the checkpoint has no final linear layer")
    return matrices[-1].shape[0]


__all__ = [
    "add_attack",
    "add_common",
    "add_images",
    "add_model",
    "add_traceback",
    "as_unit_float",
    "attack",
    "build_loaded",
    "config",
    "device",
    "ended",
    "evaluators_view",
    "images",
    "named",
    "rates",
    "retune_labels",
    "retuned_rate",
    "settings",
    "table",
    "target",
]
