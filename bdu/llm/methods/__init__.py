"""Ways to make a language model forget a trigger, one small file each."""

from __future__ import annotations

from bdu.llm.methods.beear import Beear
from bdu.llm.methods.clean_answer import CleanAnswer
from bdu.llm.methods.gradient_ascent import GradientAscent
from bdu.llm.methods.npo import NPO
from bdu.llm.methods.plant import Plant
from bdu.llm.methods.protocol import Method
from bdu.llm.methods.rmu import RMU
from bdu.llm.methods.sande import Sande

METHODS: dict[str, type[Method]] = {
    "clean-answer": CleanAnswer,
    "gradient-ascent": GradientAscent,
    "npo": NPO,
    "sande": Sande,
    "beear": Beear,
    "rmu": RMU,
}
"""Name to method; "plant-and-remove" is :class:`Plant` and :class:`CleanAnswer`, one after the
other (:mod:`bdu.llm.run`)."""

__all__ = [
    "METHODS",
    "NPO",
    "RMU",
    "Beear",
    "CleanAnswer",
    "GradientAscent",
    "Method",
    "Plant",
    "Sande",
]
