"""A run as its folder tells of it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bdu.runs import DATA, STARTED_IN, RunDirectory

_PATHS = (
    *("data", "checkpoint", "clean", "triggered", "eval_data", "retune_data", "trigger"),
    "surrogate",
)


@dataclass(frozen=True)
class Record:
    """What a run has left so far.

    Attributes:
        directory: its folder.
        command: ``bdu``'s that made it.
        config: its settings.
        started_in: the folder it was started in; "" of a run of an earlier version.
        metrics: of ``metrics.json``; empty while there is none, so while the run has not ended.
        lines: of ``metrics.jsonl``.
    """

    directory: RunDirectory
    command: str
    config: dict[str, Any]
    started_in: str
    metrics: dict[str, Any]
    lines: list[dict[str, Any]]

    @classmethod
    def read(cls, directory: RunDirectory) -> Record:
        """Read a folder.

        Raises:
            FileNotFoundError: there is no run in it.
            ValueError: a file is not what it should be; names it.
        """
        config = _config(directory.path / "config.yaml")
        ended = (directory.path / "metrics.json").exists()
        metrics = directory.read_metrics() if ended else {}
        command = str(config.pop("command", metrics.get("method", "run")))
        started_in = str(config.pop(STARTED_IN, ""))
        config.pop(DATA, None)
        return cls(directory, command, config, started_in, metrics, directory.read_lines())

    @property
    def method(self) -> str:
        """Its name."""
        named = self.metrics.get("method") or self.config.get("method") or self.command
        return str(named)

    @property
    def name(self) -> str:
        """Its folder's."""
        return self.directory.path.resolve().name

    @property
    def attack(self) -> str:
        """The name of the attack that it was planted by or measured with; "" without one."""
        given = str(self.config.get("attack") or "")
        if given.endswith(".json"):
            try:
                return str(json.loads(Path(given).read_text(encoding="utf-8"))["trigger"]["name"])
            except (OSError, ValueError, KeyError, TypeError):  # moved since, or no longer there
                return ""
        picture = self.config.get("trigger")
        return given or (Path(str(picture)).name if picture else "")

    @property
    def subject(self) -> str:
        """Method, model and attack in a few words."""
        model = str(self.config.get("model") or "")
        if self.asked == "prompts":
            model = model.rstrip("/").rpartition("/")[2]
        return ", ".join(part for part in (self.method, model, self.attack) if part)

    @property
    def asked(self) -> str:
        """What the model is given: "images", or of a language model "prompts"."""
        answers = self.directory.path / "answers.jsonl"
        return "prompts" if self.config.get("task") == "lm" or answers.exists() else "images"

    @property
    def has_relative_paths(self) -> bool:
        """Whether its settings hold only where it was started, as of earlier versions."""
        paths = [self.config.get(key) for key in _PATHS]
        paths += [v for v in (self.config.get("attack"),) if str(v).endswith(".json")]
        return any(path and not Path(str(path)).is_absolute() for path in paths)

    def again(self) -> str:
        """What to type to have the run once more, with its settings from its own config.yaml."""
        return self._typed("--out", "AGAIN")

    def resume(self) -> str:
        """What to type to have an unfinished run go on."""
        return self._typed("--out", str(self.directory.path.absolute()), "--resume")

    @property
    def keeps_state(self) -> bool:
        """Whether there is anything to go on from."""
        return self.directory.state.exists() or (self.directory.path / "checkpoints").exists()

    def _typed(self, *more: str) -> str:
        file = str(self.directory.path.absolute() / "config.yaml")
        line = shlex.join(["bdu", self.command, "--config", file, *more])
        if self.started_in and ":" in str(self.config.get("model")):
            # a factory, which is looked for there
            line = f"cd {shlex.quote(self.started_in)} && {line}"
        return line


def _config(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file.parent}: expected a run with config.yaml, got none")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: expected YAML, got {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected settings by name, got {type(config).__name__}")
    return config
