"""The table of attacks and defences: what it takes from earlier runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def defenses(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("defenses")
    sys.modules.pop("defenses", None)


@pytest.fixture
def table(defenses, tmp_path):
    np.savez(tmp_path / "images.npz", x=np.zeros(1))
    return defenses.Table(tmp_path / "runs", {"cifar10": tmp_path / "images.npz"})


def row(defenses, case, defense, **changes):
    return {
        "case": case.label,
        "case_seed": case.seed,
        "defense": defense,
        "anchored": False,
        "seed": case.seed,
        "settings": defenses.SETTINGS.get(defense, {}),
        **changes,
    }


def test_rows_of_an_earlier_table_count_as_run_where_the_settings_are_todays(defenses, table):
    case = defenses.Case("cifar10", "badnets")
    old = row(defenses, case, "ulrl, ours", settings={"alpha": 0.123})
    elsewhere = {**row(defenses, case, "fst"), "case": "cifar10, no such attack 10 %"}
    table.adopt([row(defenses, case, "fst"), old, elsewhere], [case])
    cells = sorted(file.name for file in (table.runs / "cells").rglob("*.json"))
    assert cells == [table.cell(case, "fst", 0, False).name]


def test_cells_that_are_there_are_not_replaced(defenses, table):
    case = defenses.Case("cifar10", "badnets")
    file = table.cell(case, "fst", 0, False)
    defenses.write_row(file, {"mine": True})
    table.adopt([row(defenses, case, "fst")], [case])
    assert file.read_text() == '{"mine": true}\n'


def test_kept_models_are_put_back_before_planting(defenses, table, tmp_path, monkeypatch):
    monkeypatch.setattr(defenses, "PLANTED", tmp_path / "planted")
    case = defenses.Case("cifar10", "badnets")
    folder = table.folder(case)
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "attack.json", "metrics.json", "evaluator.npz"):
        (folder / name).write_text(name)
    table.keep(case)
    kept = tmp_path / "planted" / folder.name
    assert {file.name for file in kept.iterdir()} == {"model.safetensors", "attack.json"}

    called = []

    def call(*arguments):
        called.append({file.name: file.read_text() for file in folder.iterdir()})

    monkeypatch.setattr(defenses, "call", call)
    elsewhere = defenses.Table(tmp_path / "other", table._data)
    folder = elsewhere.folder(case)
    elsewhere.plant(case)
    assert called == [{"model.safetensors": "model.safetensors", "attack.json": "attack.json"}]


def test_what_was_not_planted_is_not_kept(defenses, table, tmp_path, monkeypatch):
    monkeypatch.setattr(defenses, "PLANTED", tmp_path / "planted")
    table.keep(defenses.Case("cifar10", "badnets"))
    assert not (tmp_path / "planted").exists()
