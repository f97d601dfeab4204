"""The table of attacks and defences: what it takes from earlier runs."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
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


def row(defenses, table, case, defense, **changes):
    return {
        "case": case.label,
        "case_seed": case.seed,
        "model": table.folder(case).name,
        "defense": defense,
        "anchored": False,
        "seed": case.seed,
        "settings": defenses.SETTINGS.get(defense, {}),
        **changes,
    }


def test_rows_of_an_earlier_table_count_as_run_where_the_settings_are_todays(defenses, table):
    case = defenses.Case("cifar10", "badnets")
    old = row(defenses, table, case, "ulrl, ours", settings={"alpha": 0.123})
    elsewhere = {**row(defenses, table, case, "fst"), "case": "cifar10, no such attack 10 %"}
    other = row(defenses, table, case, "ulrl", model="cifar10-badnets-0-of-other-data")
    table.adopt([row(defenses, table, case, "fst"), old, elsewhere, other], [case])
    cells = sorted(file.name for file in (table.runs / "cells").rglob("*.json"))
    assert cells == [table.cell(case, "fst", 0, False).name]


def test_what_a_case_is_to_have(defenses):
    def names(case, anchored=False):
        every = defenses.planned(case, defenses.DEFENSES)
        return [defense for defense, is_anchored in every if is_anchored == anchored]

    control, badnets = defenses.cases()[0], defenses.twelve()[0]
    assert names(badnets) == list(defenses.DEFENSES)
    assert names(control) == [d for d in defenses.DEFENSES if d != "balanced"]
    usual = [d for d in defenses.DEFENSES if d not in defenses.DISTILLED]
    for other in (defenses.twelve()[1], replace(badnets, seed=1), replace(badnets, rate=0.01)):
        assert names(other) == usual
        assert names(other, anchored=True) == []
    published = ["fine-tuning", "fst", "ulrl", "bi-bau", "tsbd", "i-bau", "sau", "pam", "tbar"]
    assert names(badnets, anchored=True) == names(control, anchored=True) == published
    assert defenses.planned(control, ["fst"]) == [("fst", False), ("fst", True)]


def test_cells_that_are_there_are_not_replaced(defenses, table):
    case = defenses.Case("cifar10", "badnets")
    file = table.cell(case, "fst", 0, False)
    defenses.write_row(file, {"mine": True})
    table.adopt([row(defenses, table, case, "fst")], [case])
    assert file.read_text() == '{"mine": true}\n'


def test_rows_that_are_not_chosen_stay(defenses, table):
    every = [defenses.Case("cifar10", name) for name in ("badnets", "blended")]
    earlier = [
        row(defenses, table, case, name, seconds=1) for case in every for name in ("fst", "ulrl")
    ]
    gone = {**earlier[0], "case": "a case that is in the table no more"}
    old = row(defenses, table, every[1], "ulrl, ours", settings={"alpha": 0.123})
    table.adopt([row(defenses, table, every[0], "fst", seconds=2)], every)
    rows, missing = table.gather([*earlier, gone, old], every, every[:1], ["fst", "tbar"])
    found = [(row["case"], row["defense"], row["seconds"]) for row in rows]
    assert found == [
        ("cifar10, badnets 10 %", "fst", 2),
        ("cifar10, badnets 10 %", "ulrl", 1),
        ("cifar10, blended 10 %", "fst", 1),
        ("cifar10, blended 10 %", "ulrl", 1),
    ]
    assert missing == sum(len(defenses.planned(case, defenses.DEFENSES)) for case in every) - 4


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


def measured(case, defense, seed, **rates):
    after = {"clean_accuracy": 0.8, "attack_success_rate": None, "false_target_rate": None}
    return {
        "case": case,
        "case_seed": seed,
        "defense": defense,
        "anchored": False,
        "seconds": 10.0 + seed,
        "before": after,
        "after": {**after, "robust_accuracy": None, **rates},
    }


def test_a_defence_is_summed_up_over_first_seeds_of_attacked_models(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    text = importlib.import_module("defenses_table").summary_of(
        [
            measured("clean", "fst", 0, clean_accuracy=0.75),
            {**measured("a", "none", 0, attack_success_rate=1.0), "control_retuned": 0.02},
            {**measured("a", "fst", 0, attack_success_rate=0.01), "retuned": 0.12},
            measured("a", "fst", 2, attack_success_rate=0.9),
            measured("b", "fst", 0, attack_success_rate=0.04, clean_accuracy=0.8001),
            measured("other", "fst", 0, attack_success_rate=0.9),
            measured("other", "sau", 0, attack_success_rate=0.9),
        ],
        attacked=["a", "b"],
        innocent=["clean", "empty"],
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[2][-2:] == ["lost on clean", "lost on empty"]
    assert lines[4:] == [
        ["fst", "2", "2.5", "4.0", "0.0", "0.0", "10.0", "10.0", "5.0", "–"],
        ["none", "1", "100.0", "100.0", "0.0", "0.0", "–", "–", "–", "–"],
    ]


def test_seeds_are_gathered_in_one_row_and_the_control_has_its_own(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    text = importlib.import_module("defenses_table").text_of(
        [
            {**measured("a", "none", 0), "control_retuned": 0.02, "retuned": 0.99},
            measured("a", "fst", 0, attack_success_rate=0.01),
            measured("a", "fst", 2, attack_success_rate=0.03),
            {**measured("b", "fst", 0), "anchored": True},
        ],
        missing=6,
        setting="on a toy",
    )
    lines = text.splitlines()
    assert "on a toy" in lines[0]
    none, control, fst, anchored = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:8]
    )
    assert none[:4] == ["a", "none", "1", "80.0"]
    assert none[8] == "99.0"
    assert control[:3] == ["a", "never backdoored", "1"]
    assert control[8] == "2.0"
    assert fst[:5] == ["a", "fst", "2", "80.0 ± 0.0", "2.0 ± 1.4"]
    assert fst[-1] == "11"
    assert anchored[:3] == ["b", "fst + anchored", "1"]
    assert anchored[4] == "–"
    assert lines[-1] == "Not run: 6 of 10 cells, all that are not above."
