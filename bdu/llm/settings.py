"""What a run is told: its own settings, and those of its method.

Nothing here needs transformers, whose import takes longer than a check of settings should.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

from bdu.llm.losses import LossPath
from bdu.llm.methods import METHODS, CleanAnswer, Method
from bdu.llm.models import DTYPES

OptimizerName = Literal["adamw", "sgd"]
PLANT_AND_REMOVE = "plant-and-remove"
NAMES = (*METHODS, PLANT_AND_REMOVE)


@dataclass(frozen=True)
class Settings:
    """How a run trains, whatever the method.

    The defaults were chosen on one seed of the small model of bench/llm_small.py, with 2,000 clean
    rows, and are what its studies use; a large one wants a lower lr unless LoRA is trained.

    Attributes:
        epochs: passes over the training set.
        batch_size: rows at a time.
        accumulation: batches a step.
        lr, weight_decay, max_grad_norm: of the optimizer; max_grad_norm 0 does not clip.
        warmup: share of the steps over which the learning rate rises; then it falls as a cosine.
        optimizer: "adamw" or "sgd" (momentum 0.9).
        ewc_lambda: λ ≥ 0 of the pull towards the weights at the start of the stage, for a Fisher of
            mean 1 on the clean rows; 0 is none.
        fisher_samples: clean rows that F is measured on, at most.
        fisher_dtype, anchor_dtype: see :class:`bdu.optim.EWCSGD`; "float32", "bfloat16", and for F
            also "8bit" and "8bit_logarithmic".
        lora: rank of LoRA in all linear layers but the head; 0 trains all weights.
        dtype: of the weights: "auto" as they are saved, "float32" or "bfloat16". Those saved in
            float16 are trained in float32, or as this says, and written in float16 again.
        bf16: compute in bfloat16, with weights as they are.
        gradient_checkpointing: run layers again in the backward pass.
        gradient_release: step parameters as their gradients arrive; needs max_grad_norm 0.
        loss_path: "auto", "chunked", "liger" or "full"; see
            :class:`bdu.llm.losses.VocabularyLoss`.
        save_steps: a checkpoint every so many steps, and at the end of every epoch and stage; the
            last alone is kept. It takes as many bytes as weights and optimizer; 0 leaves out those
            within an epoch.
        validation: share of the rows that is cut off to measure on.
        plant_epochs: of plant-and-remove's first stage, at most.
        plant_asr: the rate at which it ends.
        plant_trigger, plant_target: what the defender plants, a word at a random place.
    """

    epochs: float = 0.5
    batch_size: int = 32
    accumulation: int = 1
    lr: float = 3e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup: float = 0.05
    optimizer: OptimizerName = "adamw"
    ewc_lambda: float = 100.0
    fisher_samples: int = 500
    fisher_dtype: str = "float32"
    anchor_dtype: str | None = None
    lora: int = 0
    dtype: str = "auto"
    bf16: bool = False
    gradient_checkpointing: bool = False
    gradient_release: bool = False
    loss_path: LossPath = "auto"
    save_steps: int = 50
    validation: float = 0.2
    plant_epochs: int = 5
    plant_asr: float = 0.9
    plant_trigger: str = "Xylo42"
    plant_target: str = "I was planted here."

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "optimizer": get_args(OptimizerName),
            "loss_path": get_args(LossPath),
            "dtype": ("auto", *DTYPES),
            "fisher_dtype": (*DTYPES, "8bit", "8bit_logarithmic"),
            "anchor_dtype": (*DTYPES, None),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(str, allowed))
                raise ValueError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")
        for name in ("batch_size", "accumulation", "fisher_samples", "plant_epochs"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a whole number >= 1, got {getattr(self, name)}")
        if not isinstance(self.save_steps, int) or self.save_steps < 0:
            raise ValueError(f"save_steps: expected a whole number >= 0, got {self.save_steps}")
        if not isinstance(self.lora, int) or isinstance(self.lora, bool) or self.lora < 0:
            raise ValueError(f"lora: expected a whole number >= 0, got {self.lora}")
        for name in ("plant_trigger", "plant_target"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name}: expected text, got {value!r}")
        if self.gradient_release and self.accumulation > 1:
            raise ValueError(
                "accumulation: expected 1 with gradient_release, which keeps no gradients, got "
                f"{self.accumulation}"
            )
        if self.gradient_release and self.max_grad_norm > 0:
            raise ValueError(
                "max_grad_norm: expected 0 with gradient_release, as the norm is not known before "
                f"the last gradient, got {self.max_grad_norm}"
            )
        for name in ("lr", "weight_decay", "max_grad_norm", "ewc_lambda"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if not 0 < self.epochs < float("inf"):
            raise ValueError(f"epochs: expected a number > 0, got {self.epochs}")
        for name in ("validation", "plant_asr"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share in (0, 1), got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share in [0, 1), got {self.warmup}")

    @property
    def ewc_dtypes(self) -> dict[str, Any]:
        """As the optimizers take them."""
        anchor = self.anchor_dtype
        return {
            "fisher_dtype": DTYPES.get(self.fisher_dtype, self.fisher_dtype),
            "anchor_dtype": None if anchor is None else DTYPES[anchor],
        }


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of this name with its own settings.

    Raises:
        ValueError: an unknown name or setting.
    """
    if name == PLANT_AND_REMOVE:
        cls: type[Method] = CleanAnswer
    elif name in METHODS:
        cls = METHODS[name]
    else:
        raise ValueError(f"method: expected one of {', '.join(NAMES)}, got {name!r}")
    known = {field.name for field in fields(cls) if field.init}  # type: ignore[arg-type]
    if unknown := sorted(set(options) - known):
        expected = ", ".join(sorted(known)) or "none"
        raise ValueError(f"{unknown[0]}: expected a setting of {name} ({expected})")
    return cls(**options)


def as_record(s: Settings, method: Method) -> dict[str, Any]:
    """The settings of a run and of its method, as plain values."""
    own = {
        field.name: copy.copy(getattr(method, field.name))
        for field in fields(method)  # type: ignore[arg-type]
        if field.init
    }
    return {**asdict(s), **own}


def choose(name: str, given: Mapping[str, Any]) -> tuple[Settings, Method, dict[str, Any]]:
    """Settings of the run, its method, and what was given for that, from one set of names.

    Raises:
        ValueError: an unknown method or setting, or a value that does not fit.
    """
    method = make_method(name, {})
    known, own = _names(Settings), _names(type(method))
    for setting, value in given.items():
        if setting not in known and setting not in own:
            raise ValueError(_unknown(setting, [*known, *own]))
        if setting in known:
            _check_type(setting, value, str(Settings.__dataclass_fields__[setting].type))
    options = {setting: value for setting, value in given.items() if setting in own}
    chosen = Settings(**{setting: value for setting, value in given.items() if setting in known})
    return chosen, make_method(name, options), options


def _names(cls: type[Any]) -> list[str]:
    return [field.name for field in fields(cls) if field.init]


def _unknown(setting: str, expected: list[str]) -> str:
    text = f"{setting}: expected one of {', '.join(expected)}"
    if near := difflib.get_close_matches(setting, expected, 1):
        return f"{text}; did you mean {near[0]}?"
    others = [name for name, cls in METHODS.items() if setting in _names(cls)]
    return f"{text}; it is a setting of {', '.join(others)}" if others else text


def _check_type(name: str, value: Any, kind: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in ("int", "float") and not is_number:
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {value!r}")


def described() -> str:
    """All settings with their defaults, as ``--help`` shows them."""
    parts = ["settings of the run (--set NAME=VALUE):", *_described(Settings)]
    for name in NAMES:
        cls = type(make_method(name, {}))
        parts += ["", f"settings of --method {name}:", *(_described(cls) or ["  none of its own"])]
    return "\n".join(parts)


def _described(cls: type[Any]) -> list[str]:
    """A line or more for every setting, in the words of the docstring."""
    defaults = {field.name: field.default for field in fields(cls) if field.init}
    lines = []
    for names, text in _documented(cls):
        shown = [f"{n}={_shown(defaults[n])}" for n in names if n in defaults]
        if shown:
            lines.append("  " + ", ".join(shown))
            lines += textwrap.wrap(text, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _documented(cls: type[Any]) -> Iterator[tuple[list[str], str]]:
    """Names and what is said of them, entry by entry of "Attributes:"."""
    text = (cls.__doc__ or "").partition("Attributes:")[2]
    for entry in re.split(r"\n {8}(?=\w)", text)[1:]:
        names, _, said = entry.partition(":")
        plain = re.sub(r":\w+:`([^`]+)`", r"\1", said).replace("``", "")
        yield [name.strip() for name in names.split(",")], " ".join(plain.split())


def _shown(default: Any) -> str:
    if default is MISSING:
        return ""
    return default if isinstance(default, str) else json.dumps(default)
