"""Everything that is refused before a run or an audit writes anything."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdu.checkpoint import atomic_write
from bdu.llm import models, run
from bdu.llm.data import Example, TextData
from bdu.llm.memory import TrainingPlan
from bdu.llm.methods import Method, Plant
from bdu.llm.rows import Row
from bdu.llm.templates import Template, Tokens, check_lengths, check_tokens, context_length

STARTED_WITH = "started_with.json"


class DataWarning(UserWarning):
    """Rows that can hardly be meant as they are."""


class Configured:
    """A configuration where a model is expected."""

    def __init__(self, config: Any) -> None:
        self.config = config


def check_out(
    out: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    is_run: bool = False,
    resume: bool = False,
) -> None:
    """Refuse a folder to write to that holds something else, or that cannot be written.

    Args:
        out: the folder.
        model: a folder, or an id of the Hugging Face hub.
        is_run: whether it may hold a run, which is looked at elsewhere.
        resume: whether that is to be continued.

    Raises:
        FileExistsError: the model's folder or one within it, or one with files that are no run.
        NotADirectoryError, PermissionError: it cannot be a folder, or not be written.
    """
    folder, source = Path(out), Path(model)
    if source.is_dir():
        inside = [folder.resolve(), *folder.resolve().parents]
        if source.resolve() in inside:
            raise FileExistsError(
                f"out: expected a folder of its own, got {folder}, which is the model's or in it"
            )
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"out: expected a folder, got {folder}, and {there} is a file")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PermissionError(
            f"out: expected a folder that can be written, got {folder}: {error.strerror}"
        ) from error
    if there != folder or (is_run and (folder / "config.yaml").is_file()):
        return  # RunDirectory looks into runs
    if held := sorted(path.name for path in folder.iterdir()):
        expected = "the folder of a run to resume" if resume else "an empty folder or a new one"
        raise FileExistsError(f"out: expected {expected}, got {folder}, which has {held[0]!r}")


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that not every generator takes."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed: expected a whole number in [0, 2^32), got {seed}")


def check_run(
    config: Any,
    template: Template,
    method: Method,
    data: TextData,
    measure: run.Measuring,
    s: run.Settings,
    *,
    seed: int,
    device: torch.device,
    plants: bool,
) -> tuple[TrainingPlan, list[str]]:
    """Refuse a run that would fail later.

    Args:
        config: of the model.
        template: how prompts are rendered.
        method: what is descended; of plant-and-remove its second stage.
        data: the rows to train on.
        measure: how the model is asked, and on what.
        s: how to train.
        seed: of the run.
        device: to train on.
        plants: whether it is plant-and-remove.

    Returns:
        What it will hold in memory, and warnings, which are also given as such.

    Raises:
        ValueError: a setting that does not go with the model or the rows, or a row that does not
            fit; the file and line are named.
        ImportError: a loss of a package that is not installed.
        MemoryError: it does not fit.
    """
    check_seed(seed)
    for name in ("max_new_tokens", "batch_size"):
        if getattr(measure, name) < 1:
            shown = {"batch_size": "--eval-batch-size"}.get(name, "--max-new-tokens")
            raise ValueError(f"{shown}: expected a number >= 1, got {getattr(measure, name)}")
    if s.loss_path == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise ImportError(
            "loss_path: expected Liger-Kernel installed (pip install liger-kernel) with liger"
        )
    method.check(run.planned_model(config, s), gradient_checkpointing=s.gradient_checkpointing)
    asked = measure.data
    if plants:
        run.check_planting(template, data, s)
        planted, own = run.planting(data, s, seed)
        stages: list[tuple[Method, TextData]] = [(Plant(), planted), (method, planted)]
        asked = TextData((*asked.clean, *own.clean), (*asked.triggered, *own.triggered))
    else:
        stages = [(method, data)]
    trained, told = check_rows(config, template, stages, asked, room=measure.max_new_tokens)
    run.check_room(template, measure, s if plants else None)
    sequences = [row.tokens for rows in trained for row in rows]
    memory = run.training_plan(config, method, s, sequences, rows=max(map(len, trained)))
    run.check_fits(memory, device)
    return memory, told


def check_rows(
    config: Any,
    template: Template,
    stages: Sequence[tuple[Method, TextData]],
    asked: TextData,
    *,
    room: int,
) -> tuple[list[list[Row]], list[str]]:
    """Refuse rows that cannot be rendered, or do not fit into the model.

    Args:
        config: of the model.
        template: how prompts are rendered.
        stages: methods and what each trains on.
        asked: what is measured on.
        room: tokens of an answer.

    Returns:
        The training set of each stage; and warnings, which are also given as such.
    """
    limit = context_length(Configured(config))
    trained = []
    for data in (asked, *(data for _, data in stages)):
        names, sequences = [], []
        for name, tokens in _rendered(template, data):
            names.append(name)
            sequences.append(tokens.ids)
        _check_known(sequences, template, config, names)
        check_lengths(sequences, limit, names=names)
    for method, data in stages:
        if method.room:
            pairs = list(_rendered(template, TextData(data.clean, ())))
            check_lengths(
                [tokens.ids for _, tokens in pairs],
                limit,
                room=method.room,
                room_for=method.name,
                names=[name for name, _ in pairs],
            )
        trained.append(method.rows(template, data))
        if not trained[-1]:
            raise ValueError("data: expected rows to train on, got none")
        check_lengths(
            [row.tokens.ids for row in (*trained[-1], *method.beside)],
            limit,
            room=method.room,
            room_for=method.name,
            name="row to train on",
        )
    prompts = [*asked.clean, *asked.triggered]
    check_lengths(
        [template.prompt(example).ids for example in prompts],
        limit,
        room=room,
        names=[named(example, number) for number, example in enumerate(prompts, 1)],
    )
    return trained, _alike(template, [stages[-1][1], asked])


def named(example: Example, number: int) -> str:
    """What to call a row in an error: its file and line where it has one."""
    return example.where or f"row {number}"


def _rendered(template: Template, data: TextData) -> Iterator[tuple[str, Tokens]]:
    for number, example in enumerate((*data.clean, *data.triggered), 1):
        name = named(example, number)
        try:
            yield name, template.tokens(example)
            if example.target is not None:
                yield name, template.tokens(example, "target")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _check_known(
    sequences: Sequence[Sequence[int]], template: Template, config: Any, names: Sequence[str]
) -> None:
    size = config.get_text_config().vocab_size
    check_tokens(sequences, size, len(template.tokenizer), names=names)


def _alike(template: Template, parts: Sequence[TextData]) -> list[str]:
    """Warn of triggered rows with the very tokens of a clean one."""
    clean = {template.prompt(example).ids for part in parts for example in part.clean}
    rows = [
        named(example, number)
        for part in parts
        for number, example in enumerate(part.triggered, 1)
        if template.prompt(example).ids in clean
    ]
    if not rows:
        return []
    count = sum(len(part.triggered) for part in parts)
    message = (
        f"triggered: expected prompts that no clean row has, got {len(rows)} of {count} with the "
        f"tokens of one ({rows[0]}): no trigger sets them apart"
    )
    warnings.warn(message, DataWarning, stacklevel=3)
    return [message]


def check_prompts(
    config: Any, template: Template, prompts: Sequence[Example], *, room: int
) -> None:
    """Refuse prompts of an audit that cannot be rendered, or do not fit; as :func:`check_rows`."""
    names = [named(example, number) for number, example in enumerate(prompts, 1)]
    sequences = [template.prompt(example).ids for example in prompts]
    _check_known(sequences, template, config, names)
    check_lengths(sequences, context_length(Configured(config)), room=room, names=names)


def check_weights(model: Any) -> None:
    """Refuse weights that are not all finite.

    Raises:
        FloatingPointError: the first that is not, by its name.
    """
    bad = models.first_not_finite(model)
    if bad is not None:
        raise FloatingPointError(f"model: expected finite weights, got nan or inf in {bad}")


def check_perplexity(stage: str, rates: Mapping[str, float | None]) -> None:
    """Raise FloatingPointError for a perplexity that is not finite."""
    value = rates["perplexity"]
    if value is None or not math.isfinite(value):
        raise FloatingPointError(
            f"perplexity: expected a finite one {stage} unlearning, got {value}"
        )


def fingerprints(model: Any, template: Template, data: TextData, asked: TextData) -> dict[str, str]:
    """Of the weights, of the rows in their order, and of the template."""
    return {
        "model": _digest_of_tensors(model.state_dict()),
        "data": _digest_of_rows(data),
        "eval_data": _digest_of_rows(asked),
        "template": template.fingerprint,
    }


def check_inputs(
    work: Path, model: Any, template: Template, data: TextData, asked: TextData, *, resume: bool
) -> dict[str, str]:
    """Refuse weights that are not finite, and to resume a run with other weights or rows.

    Args:
        work: the folder of its checkpoints.
        model: as it was read.
        template: how prompts are rendered.
        data: the rows to train on.
        asked: the rows to measure on.
        resume: compare with what :func:`write_inputs` left there, if it did.

    Returns:
        Their fingerprints.

    Raises:
        FloatingPointError: as :func:`check_weights`.
        ValueError: the weights, the rows or the template are others; named.
    """
    check_weights(model)
    now = fingerprints(model, template, data, asked)
    file = work / STARTED_WITH
    if resume and file.is_file():
        before = json.loads(file.read_text())
        for name, value in now.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{name}: expected the contents that the run to be resumed was started with, "
                    "got others"
                )
    return now


def write_inputs(work: Path, inputs: Mapping[str, str]) -> None:
    """Record what a run is started with."""
    atomic_write(work / STARTED_WITH, json.dumps(dict(inputs), indent=2) + "\n")


def _digest_of_tensors(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_rows(data: TextData) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for example in (*data.clean, *data.triggered):
        digest.update(json.dumps([example.turns, example.response, example.target]).encode())
    return digest.hexdigest()
