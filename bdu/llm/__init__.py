"""Backdoors in language models: planting, measuring and unlearning them.

Needs transformers and peft: ``pip install 'bdu[llm]'``.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("transformers") is None:
    raise ImportError("bdu.llm needs transformers and peft: pip install 'bdu[llm]'")

from bdu.llm.data import Example, TextData
from bdu.llm.generation import evaluate, generate, perplexity
from bdu.llm.templates import Template, TemplateWarning

if TYPE_CHECKING:
    from bdu.llm.trainer import UnlearnTrainer

__all__ = [
    "Example",
    "Template",
    "TemplateWarning",
    "TextData",
    "UnlearnTrainer",
    "evaluate",
    "generate",
    "perplexity",
]


def __getattr__(name: str) -> Any:
    # Of transformers' Trainer: seconds of import, which a check of settings can do without.
    if name == "UnlearnTrainer":
        from bdu.llm.trainer import UnlearnTrainer

        return UnlearnTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
