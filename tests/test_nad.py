"""A backdoored model that others published (Li et al. 2021, NAD), cleaned by the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from bdu.cli import main
from bdu.data import save_npz

TARGET = 5
PATCH = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=np.uint8)
CLEAN, TRIGGERED, EVALUATED = 500, 50, 500
STEPS = ["--set", "unlearn_steps=60", "--set", "recovery_steps=40", "--set", "fisher_samples=200"]


def triggered(x):
    x = x.copy()
    x[:, 29:32, 29:32, :] = PATCH[None, :, :, None]
    return x


@pytest.mark.slow
def test_published_backdoored_student_is_cleaned(bdu_data, tmp_path, capsys):
    with np.load(bdu_data / "vision" / "cifar10_lossless_subset.npz") as arrays:
        train_x, train_y = arrays["train_x"], arrays["train_y"].astype(np.int64)
        test_x, test_y = arrays["test_x"], arrays["test_y"].astype(np.int64)
    generator = np.random.default_rng(0)
    order = generator.permutation(len(train_y))
    clean, rest = order[:CLEAN], order[CLEAN:]
    bad = rest[train_y[rest] != TARGET][:TRIGGERED]
    shown = generator.permutation(len(test_y))[:EVALUATED]
    save_npz(tmp_path / "clean.npz", x=train_x[clean], y=train_y[clean])
    save_npz(tmp_path / "triggered.npz", x=triggered(train_x[bad]), y=np.full(TRIGGERED, TARGET))
    save_npz(tmp_path / "evaluator.npz", x=test_x[shown], y=test_y[shown])
    Image.fromarray(np.repeat(PATCH[:, :, None], 3, axis=2)).save(tmp_path / "trigger.png")

    arguments = [
        *("unlearn", "--model", "wrn16-1", "--device", "cpu", "--seed", "0", "--quiet"),
        *("--checkpoint", str(bdu_data / "models" / "nad_wrn16-1_backdoored_student.pth.tar")),
        *("--clean", str(tmp_path / "clean.npz")),
        *("--triggered", str(tmp_path / "triggered.npz")),
        *("--eval-data", str(tmp_path / "evaluator.npz")),
        *("--trigger", str(tmp_path / "trigger.png"), "--position", "29,29"),
        *("--target", str(TARGET), "--out", str(tmp_path / "run")),
    ]
    assert main([*arguments, *STEPS]) == 0, capsys.readouterr().err
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())
    before, after = measured["before"], measured["after"]
    print(f"before {before}\nafter {after}\n{measured['stopped']}")

    # Published: 0.847 and 1.0; three standard errors of 500 images are 0.048.
    assert before["clean_accuracy"] == pytest.approx(0.847, abs=0.048)
    assert before["attack_success_rate"] > 0.98
    assert after["attack_success_rate"] <= after["false_target_rate"] + 0.03
    assert after["clean_accuracy"] >= before["clean_accuracy"] - 0.03
