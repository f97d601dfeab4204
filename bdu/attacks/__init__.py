"""Attacks that plant a backdoor, by name. One file each; `trigger.py` holds what they share."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bdu.attacks.adaptive_blend import AdaptiveBlend
from bdu.attacks.badnets import BadNets
from bdu.attacks.blended import Blended
from bdu.attacks.bpp import BPP
from bdu.attacks.ftrojan import FTrojan
from bdu.attacks.input_aware import InputAware
from bdu.attacks.label_consistent import LabelConsistent
from bdu.attacks.low_frequency import LowFrequency
from bdu.attacks.sig import SIG
from bdu.attacks.trigger import (
    JointlyTrained,
    Poisoned,
    Poisoner,
    Prepared,
    Saved,
    Target,
    Trigger,
    load_trigger,
    poison,
)
from bdu.attacks.trojannn import TrojanNN
from bdu.attacks.wanet import WaNet

ATTACKS: dict[str, Callable[..., Trigger]] = {
    AdaptiveBlend.name: AdaptiveBlend,
    BPP.name: BPP,
    BadNets.name: BadNets,
    Blended.name: Blended,
    FTrojan.name: FTrojan,
    InputAware.name: InputAware,
    LabelConsistent.name: LabelConsistent,
    LowFrequency.name: LowFrequency,
    SIG.name: SIG,
    TrojanNN.name: TrojanNN,
    WaNet.name: WaNet,
}


def make_attack(name: str, **options: Any) -> Trigger:
    """The trigger `name` with `options`; make_attack(**trigger.spec()) rebuilds a trigger.

    Raises:
        ValueError: an unknown name (the known ones are listed), or options out of range.
        TypeError: an option that the attack does not have.
    """
    if not isinstance(name, str) or name not in ATTACKS:
        raise ValueError(f"name: expected one of {', '.join(sorted(ATTACKS))}, got {name!r}")
    known = inspect.signature(ATTACKS[name]).parameters
    for option in options:
        if option not in known:
            raise TypeError(f"{option}: expected one of {', '.join(sorted(known))} ({name})")
    try:
        return ATTACKS[name](**options)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


def load_attack(path: str | os.PathLike[str]) -> Trigger:
    """The trigger in an attack.json; a file that it names lies beside it.

    Raises:
        FileNotFoundError: no file there, or not the one that it names.
        ValueError: not an attack.json, one that names a file elsewhere, or as make_attack.
    """
    path = Path(path)
    record = _record(path)
    if not isinstance(record.get("trigger"), dict):
        raise ValueError(f"path: expected an attack.json with a trigger, got {path}")
    options = dict(record["trigger"])
    # what came with a model may not have any file of this machine read
    for key in ("file", "pattern"):
        value = options.get(key)
        if value is None or (key == "pattern" and isinstance(value, list)):
            continue
        if not isinstance(value, str) or value in ("", "..") or Path(value).name != value:
            raise ValueError(f"{key}: expected the name of a file beside {path}, got {value!r}")
        options[key] = str(path.parent / value)
    return make_attack(options.pop("name", None), **options)


def load_target(path: str | os.PathLike[str]) -> Target:
    """The target in an attack.json, not checked.

    Raises:
        FileNotFoundError: no file there.
        ValueError: not an attack.json, or one without a target.
    """
    record = _record(Path(path))
    if "target" not in record:
        raise ValueError(f"path: expected an attack.json with a target, got {path}")
    target: Target = record["target"]
    return target


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: expected an attack.json, cannot read {path}: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"path: expected an attack.json, got {type(record).__name__} in {path}")
    return record


__all__ = [
    "ATTACKS",
    "BPP",
    "SIG",
    "AdaptiveBlend",
    "BadNets",
    "Blended",
    "FTrojan",
    "InputAware",
    "JointlyTrained",
    "LabelConsistent",
    "LowFrequency",
    "Poisoned",
    "Poisoner",
    "Prepared",
    "Saved",
    "Trigger",
    "TrojanNN",
    "WaNet",
    "load_attack",
    "load_target",
    "load_trigger",
    "make_attack",
    "poison",
]
