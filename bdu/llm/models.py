"""Reading and writing language models: safetensors only, and no code of the model's own unless it
is asked for."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bdu.checkpoint import allow_as_usual
from bdu.llm.losses import inner_model
from bdu.llm.templates import Template

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_directory(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> None:
    """Refuse a folder that cannot be read, or not without running or unpickling something.

    A name that is no folder is taken for an id of the Hugging Face hub, and passes.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: no configuration, weights in pickles alone or none, or code of its own.
    """
    folder = Path(path)
    if not folder.is_dir():
        text = os.fspath(path)
        if folder.is_absolute() or text.startswith(".") or text.count("/") > 1 or folder.exists():
            raise FileNotFoundError(f"model: expected a folder, got {text}, which is none")
        return
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"model: expected a config.json in {folder}, got none")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(
            p.name for suffix in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{suffix}")
        )
        if pickles:
            raise ValueError(
                f"model: expected weights in safetensors in {folder}, got pickles alone "
                f"({', '.join(pickles[:3])}), which can run any code; where you trust them, load "
                "them elsewhere and save_pretrained() the model"
            )
        raise ValueError(f"model: expected weights in safetensors in {folder}, got none")
    for weights in folder.glob("*.safetensors"):
        try:
            with safe_open(weights, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"model: expected whole safetensors files, got {weights}: {error}"
            ) from error
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: expected JSON in {file}, got {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model: expected an object in {file}, got {type(config).__name__}")
    if config.get("auto_map") and not trust_remote_code:
        raise ValueError(
            f"model: {folder} brings code of its own, which is run only with trust_remote_code"
        )


def load_config(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The model's configuration."""
    from transformers import AutoConfig

    check_directory(path, trust_remote_code=trust_remote_code)
    return AutoConfig.from_pretrained(os.fspath(path), trust_remote_code=trust_remote_code)


def load_tokenizer(path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.fspath(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file can make the reader raise anything
        raise ValueError(
            f"model: expected a tokenizer in {path}: {str(error) or type(error).__name__}"
        ) from error


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model, in evaluation mode, on the CPU.

    Args:
        path: a folder, or an id of the Hugging Face hub.
        dtype: of its weights; None: as they are saved.
        trust_remote_code: run code that comes with the model.

    Raises:
        FileNotFoundError, ValueError: as :func:`check_directory`; weights that are missing, of
            another shape, or of another model, by their names.
    """
    from transformers import AutoModelForCausalLM

    check_directory(path, trust_remote_code=trust_remote_code)
    with _quiet():  # of what is refused here
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            os.fspath(path),
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, found = loaded
    _check_loaded(type(model).__name__, found)
    return model.eval()


def load_to_train(
    path: str | os.PathLike[str],
    config: Any,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, torch.dtype | None]:
    """The model, and what its weights are to be written in where that is not as they are.

    Small steps are lost in float16, and large gradients overflow: such weights are made float32.

    Args:
        path, dtype, trust_remote_code: see :func:`load_model`.
        config: of :func:`load_config`.
    """
    model = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
    is_half = any(p.dtype == torch.float16 for p in model.parameters())
    if is_half:
        _cast(model, torch.float32)
    was_half = is_half or getattr(config, "dtype", None) == torch.float16
    return model, torch.float16 if was_half else None


def as_written(model: Any, dtype: torch.dtype | None) -> Any:
    """The model with weights of this dtype, LoRA merged into them; None: as it is."""
    if dtype is None:
        return model
    if hasattr(model, "peft_config"):
        inner_model(model)  # refuses what cannot be merged
        model = model.merge_and_unload()
    _cast(model, dtype)
    return model


def _cast(model: Any, dtype: torch.dtype) -> None:
    # the model's own method would cast the frequencies of positions, too
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)


# Buffers of earlier versions of transformers, which are made anew.
_NO_WEIGHTS = re.compile(r"(inv_freq|masked_bias|attn\.bias|position_ids)$")


def _check_loaded(name: str, found: Mapping[str, Any]) -> None:
    unexpected = [key for key in found["unexpected_keys"] if not _NO_WEIGHTS.search(key)]
    mismatched = [
        f"{key} of {tuple(there)} for {tuple(own)}" for key, there, own in found["mismatched_keys"]
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("missing", found["missing_keys"]),
            ("of another shape", mismatched),
            ("that it does not have", unexpected),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"model: expected the weights of {name}, got {'; '.join(problems)}")


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def empty_model(config: Any, *, dtype: torch.dtype | None = None) -> Any:
    """The model without memory for its weights, for :func:`bdu.memory_plan`."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    own = dtype or getattr(config, "dtype", None)
    return model.to(own) if isinstance(own, torch.dtype) else model


def first_not_finite(model: Any) -> str | None:
    """The first parameter or buffer with a value that is not finite, by name."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return str(name)
    return None


def with_lora(model: Any, rank: int, targets: Sequence[str] | None = None) -> Any:
    """The model with LoRA of this rank, α = 2 · rank, in its linear layers; the rest is frozen.

    Args:
        targets: names of modules; None: all linear layers but the head.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise ValueError(f"lora: expected a rank >= 1, got {rank}")
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(targets) if targets else "all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers in a way that is to go in its version 6
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config)


def save(model: Any, template: Template, folder: str | os.PathLike[str]) -> None:
    """Write model and tokenizer as ``from_pretrained`` reads them, LoRA merged into the weights.

    The files are made beside their places and moved there, the weights last.
    """
    if hasattr(model, "peft_config"):
        inner_model(model)  # refuses what cannot be merged
        model = model.merge_and_unload()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".model.{secrets.token_hex(8)}.tmp"
    try:
        model.save_pretrained(temporary)
        template.tokenizer.save_pretrained(temporary)
        files = sorted(temporary.iterdir(), key=lambda file: file.suffix == ".safetensors")
        for file in files:
            allow_as_usual(file)
            os.replace(file, folder / file.name)
        template.save(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def show_progress(show: bool) -> None:
    """Whether transformers draws its bars for reading and writing weights."""
    from transformers.utils import logging

    (logging.enable_progress_bar if show else logging.disable_progress_bar)()


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free on the device, or None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
