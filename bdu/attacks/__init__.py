"""Attacks that plant a backdoor, by name. One file each; `trigger.py` holds what they share."""

from __future__ import annotations

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
    if name not in ATTACKS:
        raise ValueError(f"name: expected one of {', '.join(sorted(ATTACKS))}, got {name!r}")
    try:
        return ATTACKS[name](**options)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


def load_attack(path: str | os.PathLike[str]) -> Trigger:
    """The trigger in an attack.json; a file that it names lies relative to that one's folder.

    Raises:
        FileNotFoundError: no file there, or not the one that it names.
        ValueError: not an attack.json, or as make_attack.
    """
    path = Path(path)
    try:
        options = dict(json.loads(path.read_text())["trigger"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: expected an attack.json with a trigger, got {path}") from error
    if options.get("file") is not None:
        options["file"] = str(path.parent / options["file"])
    return make_attack(**options)


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
    "load_trigger",
    "make_attack",
    "poison",
]
