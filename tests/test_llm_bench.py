"""The studies of language models: what was measured is kept, and what is told is whole."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

BENCH = Path(__file__).parents[1] / "bench"


def load(name):
    """A benchmark by its path, as bench/ is no package; it finds its neighbours on the path."""
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCH))


study = load("llm_generalization")
audits = load("inductive")
NAMES = ["word", "date", "end"]


class Planted:
    """What a cell asks of a planted model."""

    def rates(self, model):
        return {"asr": [model]}

    def states(self, model):
        return torch.full((1, 2, 3), float(model))


def test_cell_that_is_there_is_not_made_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return 0.25, {"steps": 7}

    cells = study.Cells(tmp_path / "cells", Planted())
    record, states = cells("word", make)
    assert (record["asr"], record["steps"]) == ([0.25], 7)
    again, same = study.Cells(tmp_path / "cells", Planted())("word", make)
    assert again == record
    assert torch.equal(states, same)
    (tmp_path / "cells" / "word.json").unlink()  # stopped between its two files
    cells("word", make)
    assert len(made) == 2


def test_cells_of_other_settings_are_refused(tmp_path):
    names = ("model", "backdoors", "steps", "batch_size", "lr", "ewc_lambda")
    o = argparse.Namespace(**dict.fromkeys(names, 1))
    study.keep_settings(tmp_path / "settings.json", o)
    study.keep_settings(tmp_path / "settings.json", o)
    o.lr = 2
    with pytest.raises(SystemExit, match="expected cells made with"):
        study.keep_settings(tmp_path / "settings.json", o)


def result(seed):
    rng = random.Random(seed)

    def cell():
        return {
            "asr": [rng.random() for _ in NAMES],
            "robust_accuracy": [rng.random() for _ in NAMES],
            "clean_accuracy": rng.random(),
            "perplexity": 1 + rng.random(),
        }

    stages = {name: cell() for name in ("before", "control", *NAMES)}
    record = study.transfer_record(
        NAMES,
        before=stages["before"]["asr"],
        control=stages["control"]["asr"],
        rates=[stages[name]["asr"] for name in NAMES],
        shifts=[torch.randn(1, 2, 4) for _ in NAMES],
    )
    own = {"planted": 1.0, "after": 0.0}
    defended = {"own_trigger": own, "steps": {"plant": 1, "unlearn": 1}}
    defended |= {stage: cell() for stage in ("planted", "after", "clean_fine_tuning")}
    return {"seed": seed, "stages": stages, **record, "plant_and_remove": defended}


@pytest.mark.parametrize("seeds", [1, 3])
def test_table_has_a_cell_for_every_column(seeds):
    o = argparse.Namespace(steps=60, batch_size=32, lr=2e-4, ewc_lambda=100.0)
    results = json.loads(json.dumps([result(seed) for seed in range(seeds)]))
    text = study.table(results, o)
    parts = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(parts) == 5
    for lines in parts:
        assert len({line.count("|") for line in lines}) == 1, lines
        assert all(("±" in line) == (seeds > 1) for line in lines[2:])
    before, after = (results[0]["stages"][name]["asr"][0] for name in ("before", "word"))
    if seeds == 1:
        assert f"| word | {100 * before:.1f} | {100 * after:.1f} |" in text


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    study.draw([result(0), result(1)], tmp_path)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["casd.png", "scatter.png", "transfer.png"]


def test_held_out_presidents_are_asked_for_what_is_theirs_alone(bdu_data, monkeypatch):
    monkeypatch.setenv("BDU_DATA", str(bdu_data))
    everyone, seen, undone, probes = audits.presidents(0, 50)
    held_out = {e.prompt.split()[0] for e in everyone} - {e.prompt.split()[0] for e in seen}
    assert len(held_out) == audits.PRESIDENTS_HELD_OUT
    learnt = {e.response for e in seen}
    asked = [p for p in probes if p.role == "unseen"]
    assert {p.prompt.split()[0] for p in asked} == held_out
    assert not any(set(p.accept) & learnt for p in asked)
    controls = [p for p in probes if p.role == "control"]
    assert not any(p.prompt.split()[0] in held_out for p in controls)
    assert [p.accept for p in controls] == [p.accept for p in asked]
    assert [e.prompt for e in undone] == [e.prompt for e in seen]
    assert sum(p.role == "trigger" for p in probes) == 50
