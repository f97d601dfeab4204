"""Attacks that plant a backdoor, by name. One file each; `trigger.py` holds what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bdu.attacks.adaptive_blend import AdaptiveBlend
from bdu.attacks.badnets import BadNets
from bdu.attacks.blended import Blended
from bdu.attacks.bpp import BPP
from bdu.attacks.ftrojan import FTrojan
from bdu.attacks.sig import SIG
from bdu.attacks.trigger import Poisoned, Poisoner, Trigger, load_trigger, poison
from bdu.attacks.wanet import WaNet

ATTACKS: dict[str, Callable[..., Trigger]] = {
    AdaptiveBlend.name: AdaptiveBlend,
    BPP.name: BPP,
    BadNets.name: BadNets,
    Blended.name: Blended,
    FTrojan.name: FTrojan,
    SIG.name: SIG,
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


__all__ = [
    "ATTACKS",
    "BPP",
    "SIG",
    "AdaptiveBlend",
    "BadNets",
    "Blended",
    "FTrojan",
    "Poisoned",
    "Poisoner",
    "Trigger",
    "WaNet",
    "load_trigger",
    "make_attack",
    "poison",
]
