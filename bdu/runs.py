"""A run directory: what a command was told, what it measured, and what it made.

``config.yaml`` (the settings), ``metrics.jsonl`` (a line a look, epoch or step), ``metrics.json``
(the outcome; a run that has not ended has none), ``model.safetensors`` and ``report.html``. Every
file is written whole or not at all, but for lines that are added to ``metrics.jsonl``. Shares are
in [0, 1]; what is no number is null.

``metrics.json`` has all of these keys, null where nothing was measured or there is no such thing:

- ``before``, ``after``: rates of the evaluator: ``clean_accuracy``, ``attack_success_rate``,
  ``robust_accuracy``, ``false_target_rate``, and of images ``per_class_accuracy`` (a list), of a
  language model ``perplexity``. Null without an evaluator; each rate is null
  where there was nothing to measure it on.
- ``method``, ``settings`` (of the method, all), ``seed``, ``versions``.
- ``stopped``: why it ended, in words.
- ``seconds`` of the method, or of ``bdu poison`` in all; ``total_seconds`` with loading and
  measuring. Of a run that was resumed: since then, but of a language model's since its start.
- ``weight_change``: ‖θ − θ before‖ / ‖θ before‖ by weight, of images only.
- ``der``, ``retuned_attack_success_rate``: see :mod:`bdu.metrics` and :mod:`bdu.attacks.retune`.
- ``planted``, ``planted_trigger_after``, ``template``, ``warnings``, ``memory_plan_bytes``: of
  language models, see :mod:`bdu.llm.run`; they have ``memory_peak_bytes``, too, what was held at
  most on a GPU, and null on a CPU.

Every line of ``metrics.jsonl`` has ``step``: how many steps of the optimizer were done, of the
``phase`` where a language model's run has several, and 0 in every line of method auto, whose
candidates have optimizers of their own. ``steps`` is how many there will be; where that is not
known, ``round`` and ``rounds`` count the phase. What else a line has, its method measured.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from bdu.checkpoint import atomic_write

# What earlier versions called a value of a line.
_RENAMED = {
    "trigger_attention_share": "tar_share",
    "trigger_attention_by_area": "tar_share_by_area",
    "trigger_attention_ratio": "tar_ratio",
}
STARTED_IN, DATA = "started_in", "data_digest"
"""What ``config.yaml`` has beside the settings: a folder, and what tells data from others."""
METRICS = (
    *("before", "after", "method", "settings", "stopped", "seconds", "total_seconds", "seed"),
    *("versions", "weight_change", "der", "retuned_attack_success_rate"),
    *("planted", "planted_trigger_after", "template", "warnings", "memory_plan_bytes"),
)
PARTS = ("defender_clean", "defender_triggered", "retune", "evaluator")
"""What ``bdu poison`` splits its data into, each an ``.npz``."""
WRITTEN = frozenset(
    {
        *("config.yaml", "metrics.json", "metrics.jsonl", "model.safetensors", "report.html"),
        *("state.pt", "seconds.json", "attention.npz", "attack.json", "trigger.safetensors"),
        *("surrogate.safetensors", "surrogate_state.pt", *(f"{part}.npz" for part in PARTS)),
    }
)
"""The files of runs of ``bdu poison`` and ``bdu unlearn``."""
_VERSIONED = ("bdu", "torch", "triton", "numpy", "safetensors")


def versions() -> dict[str, str | None]:
    """Version of Python and of every package that results depend on; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


class Clock:
    """Seconds of a run, those before it was resumed among them.

    Args:
        file: where they are kept.
        start: of the command, as ``time.perf_counter`` tells it.
        resume: whether to go on from what is kept.
    """

    def __init__(self, file: Path, start: float, *, resume: bool) -> None:
        self.file, self.start, self.began = file, start, time.perf_counter()
        self.earlier = {"seconds": 0.0, "total_seconds": 0.0}
        if resume and file.is_file():
            self.earlier |= json.loads(file.read_text())

    @property
    def seconds(self) -> float:
        """Of the method."""
        return self.earlier["seconds"] + time.perf_counter() - self.began

    @property
    def total_seconds(self) -> float:
        """With loading and measuring."""
        return self.earlier["total_seconds"] + time.perf_counter() - self.start

    def keep(self) -> None:
        """Write them down."""
        kept = {"seconds": self.seconds, "total_seconds": self.total_seconds}
        atomic_write(self.file, json.dumps(kept))


class RunDirectory:
    """One run's folder.

    Args:
        path: the folder; made by :meth:`start`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def start(self, config: dict[str, Any], *, resume: bool) -> None:
        """Make the folder and write ``config.yaml``, with the current folder as ``started_in``.

        Raises:
            FileExistsError, ValueError: as :meth:`check`.
        """
        self.check(config, resume=resume)
        kept = {**config, STARTED_IN: os.getcwd()}
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
        try:  # another run may have started here since the check
            atomic_write(self.path / "config.yaml", text, exclusive=not resume)
        except FileExistsError as error:
            raise self._taken() from error

    def check(self, config: dict[str, Any], *, resume: bool) -> None:
        """Whether :meth:`start` would do; nothing is written.

        Raises:
            FileExistsError: there is a run in it already and ``resume`` is False, or a file that
                would be written over.
            NotADirectoryError: it is a file.
            ValueError: ``resume`` with other settings than the run was started with, or data.
        """
        known = self.path / "config.yaml"
        if not known.exists():
            # A planted model may come as its weights and attack.json alone, the rest to be made.
            if not (resume and (self.path / "attack.json").exists()):
                self._check_free()
            return
        if not resume:
            raise self._taken()
        before = yaml.safe_load(known.read_text())
        if DATA in config and before.get(DATA, config[DATA]) != config[DATA]:
            raise ValueError(f"resume: expected the data that {self.path} was begun with")
        for key in config.keys() - {DATA}:
            if not _same(before.get(key), config[key]):
                raise ValueError(
                    f"resume: expected the settings of {known}, but {key} was "
                    f"{before.get(key)!r} and is now {config[key]!r}"
                )

    def has_ended(self) -> bool:
        """Whether there is a whole run in it, which leaves nothing to resume."""
        return (self.path / "metrics.json").exists() and not self.state.exists()

    def _check_free(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"out: expected a folder, got {self.path}, a file")
        if there := sorted(name for name in WRITTEN if (self.path / name).exists()):
            raise FileExistsError(
                f"out: expected a folder without {', '.join(there)}, which would be written over, "
                f"got {self.path}"
            )

    def _taken(self) -> FileExistsError:
        return FileExistsError(
            f"out: {self.path} holds a run already; choose another folder, or continue that "
            "run with --resume"
        )

    @property
    def model(self) -> Path:
        """Where the weights go."""
        return self.path / "model.safetensors"

    @property
    def state(self) -> Path:
        """Where a run keeps what it needs to be resumed; removed once it has finished."""
        return self.path / "state.pt"

    @property
    def attention(self) -> Path:
        """Where the heat maps of the run go."""
        return self.path / "attention.npz"

    def write_lines(self, lines: list[dict[str, Any]]) -> None:
        """Replace ``metrics.jsonl``."""
        text = "".join(json.dumps(_plain(line)) + "\n" for line in lines)
        atomic_write(self.path / "metrics.jsonl", text)

    def add_line(self, line: dict[str, Any]) -> None:
        """Add one to ``metrics.jsonl``."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(line)) + "\n")

    def read_lines(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, with the names of today; none where there is no file."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        lines = []
        has_ended = (self.path / "metrics.json").exists()  # and all lines were written as one
        texts = file.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(texts, 1):
            if not line.strip():
                continue
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                if number == len(texts) and not has_ended:
                    continue  # without an end: a power cut came while it was added
                raise ValueError(
                    f"{file}: expected JSON in line {number}, got {line[:60]!r}"
                ) from error
            if not isinstance(lines[-1], dict):
                raise ValueError(f"{file}: expected an object in line {number}, got {line[:60]!r}")
        return [{_RENAMED.get(key, key): v for key, v in line.items()} for line in lines]

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write ``metrics.json``; keys that are not given are null."""
        content = dict.fromkeys(METRICS) | _plain(metrics)
        atomic_write(self.path / "metrics.json", json.dumps(content, indent=2) + "\n")

    def read_metrics(self) -> dict[str, Any]:
        """Read ``metrics.json``; keys that earlier versions did not write are None."""
        file = self.path / "metrics.json"
        try:
            metrics = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: expected JSON, got {error}") from error
        if not isinstance(metrics, dict):
            raise ValueError(f"{file}: expected an object, got {type(metrics).__name__}")
        return dict.fromkeys(METRICS) | metrics


def _same(before: Any, now: Any) -> bool:
    """Whether two settings are one; earlier runs kept paths as they were typed."""
    if isinstance(before, str) and isinstance(now, str) and os.path.isabs(now):
        before = str(Path(before).absolute())
    return bool(before == now)


def _plain(value: Any) -> Any:
    # NaN is not JSON; a reader in another language would fail on it.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
