"""Backdoors in language models: planting, measuring and unlearning them.

Needs transformers and peft: ``pip install 'bdu[llm]'``.
"""

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ImportError("bdu.llm needs transformers and peft: pip install 'bdu[llm]'")

from bdu.llm.data import Example, TextData
from bdu.llm.generation import evaluate, generate, perplexity
from bdu.llm.templates import Template, TemplateWarning
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
