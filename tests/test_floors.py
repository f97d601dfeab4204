"""Imports go downwards only: every module has a floor, and looks at its own floor or below."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Module, or folder with a dot after it, to floor. The longest name that fits counts.
FLOORS = {
    "bdu": 7,
    "bdu.__main__": 7,
    "bdu.cli.": 7,
    "bdu.trainer": 6,
    "bdu.auto": 6,
    "bdu.defenses.": 5,
    "bdu.llm.": 5,
    "bdu.attacks.": 5,
    "bdu.monitor.": 5,
    "bdu.optim.": 4,
    "bdu.fisher.": 4,
    "bdu.fisher_ops": 3,
    "bdu.native_fisher": 2,
    "bdu.metrics": 4,
    "bdu.data": 4,
    "bdu.models": 4,
    "bdu.checkpoint": 4,
    "bdu.memory": 4,
    "bdu.training": 4,
    "bdu.runs": 4,
    "bdu.ops": 3,
    "bdu.library": 4,
    "bdu.reference": 1,
    "bdu.quantization": 0,
    "bdu.rounding": 0,
    "bdu.native": 1,
    "bdu.cuda": 2,
    "bdu.dispatch": 1,
    "bdu.kernels.": 0,
}
# Here modules do not look at their neighbours: on the floors of the backends (kernels may), and
# on that of the systems unless they are of one folder.
BASEMENT, SYSTEMS = 1, 5
FOREIGN_TO_KERNELS = ("torch", "triton")
# Whoever has no language models has none of these either.
FOR_LANGUAGE_MODELS = ("transformers", "peft", "accelerate", "tokenizers", "liger_kernel")


def sources() -> dict[str, str]:
    """Every module of the package by its full name."""
    found = {}
    for folder, package in (("bdu", "bdu"), ("kernels", "bdu.kernels")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = file.read_text()
    return found


def folder_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def floor_of(module: str) -> int:
    if module in FLOORS:
        return FLOORS[module]
    if folder_of(module) + "." in FLOORS:
        return FLOORS[folder_of(module) + "."]
    raise LookupError(f"{module} has no floor: give it one in tests/test_floors.py")


def imports_of(source: str, modules: set[str], package: str) -> Iterator[str]:
    """Full names imported anywhere in a source, also inside functions and by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def allowed(importer: str, imported: str) -> bool:
    above, below = floor_of(importer), floor_of(imported)
    if above != below:
        return above > below
    if above <= BASEMENT:
        return folder_of(importer) == folder_of(imported) == "bdu.kernels"
    if above != SYSTEMS:
        return True
    if folder_of(importer) != folder_of(imported):
        return False
    # What defences share; none looks at another.
    shared = ("", ".protocol", ".course", ".head", ".inversion", ".ascent")
    shared += (".feature_shift", ".classwise", ".deficit", ".random_patterns", ".distillation")
    return folder_of(importer) != "bdu.defenses" or imported in [f"bdu.defenses{m}" for m in shared]


def violations(files: dict[str, str]) -> list[str]:
    found = []
    modules = set(files)
    packages = {m for m in modules if any(other.startswith(m + ".") for other in modules)}
    for module, source in files.items():
        floor_of(module)
        package = module if module in packages else module.rpartition(".")[0]
        for imported in imports_of(source, modules, package):
            top = imported.split(".")[0]
            if top in FOR_LANGUAGE_MODELS and folder_of(module) != "bdu.llm":
                found.append(f"{module} imports {imported}")
            elif top == "bdu":
                # The compiled part is no module of ours; it lies on floor 0 as csrc does.
                if imported == "bdu._native":
                    continue
                if imported != module and not allowed(module, imported):
                    found.append(f"{module} imports {imported}")
            elif (
                folder_of(module) == "bdu.kernels"
                and top not in FOREIGN_TO_KERNELS
                and top not in sys.stdlib_module_names
            ):
                found.append(f"{module} imports {imported}")
    return found


def test_imports_go_downwards_only():
    assert violations(sources()) == []


def test_the_whole_package_is_looked_at():
    found = sources()
    for module in ("bdu", "bdu.ops", "bdu.optim.sgd", "bdu.kernels.ewc_step", "bdu.cli"):
        assert module in found
    assert all(floor_of(module) >= 0 for module in found)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("bdu.ops", "from bdu import fisher", "bdu.ops imports bdu.fisher"),
        ("bdu.ops", "def f():\n    import bdu.optim.sgd", "bdu.ops imports bdu.optim.sgd"),
        ("bdu.ops", "importlib.import_module('bdu.trainer')", "bdu.ops imports bdu.trainer"),
        ("bdu.ops", "from . import fisher", "bdu.ops imports bdu.fisher"),
        ("bdu.ops", "from bdu import __version__", "bdu.ops imports bdu"),
        ("bdu.native", "from bdu.reference import Mode", "bdu.native imports bdu.reference"),
        ("bdu.trainer", "from bdu.cli import common", "bdu.trainer imports bdu.cli.common"),
        (
            "bdu.attacks.blended",
            "from bdu.monitor.report import verdict",
            "bdu.attacks.blended imports bdu.monitor.report",
        ),
        (
            "bdu.defenses.other",
            "from bdu.defenses import balanced",
            "bdu.defenses.other imports bdu.defenses.balanced",
        ),
        ("bdu.kernels.new", "import numpy as np", "bdu.kernels.new imports numpy"),
        ("bdu.kernels.new", "from bdu import reference", "bdu.kernels.new imports bdu.reference"),
        (
            "bdu.models",
            "from transformers import AutoModel",
            "bdu.models imports transformers",
        ),
    ],
)
def test_an_import_that_goes_up_is_found(module, source, message):
    assert violations(sources() | {module: source}) == [message]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bdu.llm.new", "from transformers import Trainer\nfrom bdu.llm import data"),
        ("bdu.cli.demo", "from bdu.cli import common\nfrom bdu import __version__"),
        ("bdu.ops", "importlib.import_module('bdu.kernels.ewc_step')"),
        ("bdu.defenses.other", "from bdu.defenses.protocol import Result"),
        ("bdu.fisher", "from bdu.checkpoint import atomic_path\nimport numpy"),
        ("bdu.kernels.new", "import math, torch, triton.language as tl"),
    ],
)
def test_an_import_that_goes_down_is_left_alone(module, source):
    assert violations(sources() | {module: source}) == []


def test_a_new_module_without_a_floor_is_an_error():
    with pytest.raises(LookupError, match=r"bdu\.novel has no floor"):
        violations({"bdu.novel": ""})
