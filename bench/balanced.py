"""Records what the balanced method reaches, through the command line, with mean and spread.

    python bench/balanced.py cifar10 --data cifar10.npz --runs RUNS     # from bench/prepare.py
    python bench/balanced.py nad --data lossless.npz --checkpoint STUDENT.pth.tar --runs RUNS

"cifar10" plants BadNets (10 %, target 0) in a narrow ResNet-18 on each seed, cleans it with clean
samples of 5 % and triggered ones of 1 % of the training set's size, once knowing the true classes
of the triggered ones and once not, and attacks the results, and a model that never had a backdoor,
with the retune attack. "nad" cleans the published WRN-16-1 student
of NAD (bboylyg/NAD) with 500 clean and 50 triggered images.

Runs that are there already are taken as they are, so it can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bdu.checkpoint import atomic_write
from bdu.cli import main as bdu
from bdu.data import save_npz
from bdu.runs import versions

NAD_PATTERN = ((0, 0, 255), (0, 255, 0), (255, 0, 255))
NAD_TARGET = 5
NAD_CLEAN, NAD_TRIGGERED, NAD_RETUNE = 500, 50, 1000

RATES = ("clean_accuracy", "attack_success_rate", "robust_accuracy", "false_target_rate")


def call(*arguments: str | Path) -> None:
    """One command of bdu, in this process."""
    if bdu([str(a) for a in arguments]) != 0:
        raise SystemExit(f"bdu {' '.join(map(str, arguments))} failed")


def cifar10(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Plant, clean, attack; one row a seed, and the control's."""
    model = ("--model", options.model)
    attack = ("--attack", "badnets", "--target", "0")

    def plant(run: Path, seed: int, rate: float) -> None:
        if not (run / "metrics.json").exists():
            call(
                *("poison", "--data", options.data, "--split", "train", "--eval-split", "test"),
                *(*model, *attack, "--rate", str(rate), "--epochs", str(options.epochs)),
                *("--seed", str(seed), "--out", run, "--resume"),
            )

    rows = []
    for seed in options.seeds:
        planted = options.runs / f"planted{seed}"
        plant(planted, seed, 0.1)
        for known, forget, more in cleanings(options.small_state):
            suffix = "_small_state" if options.small_state else ""
            cleaned = options.runs / f"cleaned{seed}_{forget}{suffix}"
            if not (cleaned / "metrics.json").exists():
                call(
                    *("unlearn", *model, "--checkpoint", planted / "model.safetensors"),
                    *("--clean", planted / "defender_clean.npz"),
                    *("--triggered", planted / "defender_triggered.npz"),
                    *("--eval-data", planted / "evaluator.npz", *attack),
                    *("--retune-data", planted / "retune.npz", "--set", f"forget={forget}"),
                    *more,
                    *("--seed", str(seed), "--out", cleaned, "--resume"),
                )
            rows.append(outcome(f"seed {seed}{known}", cleaned) | {"group": f"after{known}"})
    control = options.runs / "clean0"
    plant(control, 0, 0.0)
    for seed in options.seeds:
        file = control / f"retuned{seed}.json"
        if not file.exists():
            call(
                *("evaluate", *model, "--checkpoint", control / "model.safetensors"),
                *("--data", control / "evaluator.npz", *attack),
                *("--retune-data", control / "retune.npz", "--seed", str(seed), "--out", file),
            )
        rates = json.loads(file.read_text())
        row = f"never backdoored, attack seed {seed}"
        rows.append({"row": row, "after": rates, "group": "never backdoored"})
    return rows


def cleanings(small_state: bool) -> list[tuple[str, str, tuple[str, ...]]]:
    """What to call a cleaning, its forget loss, and more flags."""
    if small_state:
        flags = ("--set", "fisher_dtype=8bit", "--set", "anchor_dtype=bfloat16")
        return [(", F in 8 bits, anchor in bfloat16", "true_label", flags)]
    return [("", "true_label", ()), (", true classes unknown", "unlikelihood", ())]


def nad(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Clean the published student with three draws of samples."""
    rows = []
    for seed in options.seeds:
        parts, cleaned = options.runs / f"nad{seed}", options.runs / f"nad_cleaned{seed}"
        trigger = parts / "trigger.png"
        if not trigger.exists():
            write_nad_parts(options.data, parts, seed)
        if not (cleaned / "metrics.json").exists():
            call(
                *("unlearn", "--model", "wrn16-1", "--checkpoint", options.checkpoint),
                *("--clean", parts / "clean.npz", "--triggered", parts / "triggered.npz"),
                *("--eval-data", parts / "test.npz", "--retune-data", parts / "retune.npz"),
                *("--trigger", trigger, "--target", str(NAD_TARGET)),
                *("--seed", str(seed), "--out", cleaned, "--resume"),
            )
        rows.append(outcome(f"seed {seed}", cleaned) | {"group": "after"})
    return rows


def write_nad_parts(data: Path, parts: Path, seed: int) -> None:
    """Disjoint draws from the training part, the test part, and the trigger's picture."""
    with np.load(data, allow_pickle=False) as archive:
        x, y = archive["train_x"], archive["train_y"]
        test_x, test_y = archive["test_x"], archive["test_y"]
    order = np.random.default_rng(seed).permutation(len(y))
    clean, order = order[:NAD_CLEAN], order[NAD_CLEAN:]
    retune, order = order[:NAD_RETUNE], order[NAD_RETUNE:]
    triggered = order[y[order] != NAD_TARGET][:NAD_TRIGGERED]
    pattern = np.repeat(np.array(NAD_PATTERN, dtype=np.uint8)[:, :, None], 3, axis=2)
    stamped = x[triggered].copy()
    stamped[:, 29:32, 29:32] = pattern
    save_npz(parts / "clean.npz", x=x[clean], y=y[clean])
    save_npz(parts / "retune.npz", x=x[retune], y=y[retune])
    save_npz(parts / "test.npz", x=test_x, y=test_y)
    save_npz(parts / "triggered.npz", x=stamped, y=np.full(len(triggered), NAD_TARGET))
    Image.fromarray(pattern).save(parts / "trigger.png")


def outcome(name: str, run: Path) -> dict[str, Any]:
    """What one run's ``metrics.json`` says."""
    metrics = json.loads((run / "metrics.json").read_text())
    keys = ("before", "after", "seconds", "der", "retuned_attack_success_rate", "settings")
    row = {key: metrics[key] for key in keys}
    row["after"]["retuned_attack_success_rate"] = row.pop("retuned_attack_success_rate")
    return {"row": name, **row}


def table(case: str, rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, in percent, with mean and standard deviation over the seeds."""
    heads = ("clean accuracy", "ASR", "robust accuracy", "false-target rate", "ASR after retune")
    keys = (*RATES, "retuned_attack_success_rate")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    lines = [
        f"Balanced method, case {case}; percent; commit {commit}; {date.today().isoformat()}; "
        f"torch {versions()['torch']}; default settings.",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]

    def add(name: str, rates: dict[str, Any]) -> None:
        cells = ["–" if rates.get(k) is None else f"{100 * rates[k]:.2f}" for k in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    for row in rows:
        if "before" in row:
            add(f"{row['row']}, before", row["before"])
            add(f"{row['row']}, after", row["after"])
    kept = []
    for title in dict.fromkeys(row["group"] for row in rows):
        group = [row for row in rows if row["group"] == title]
        values = {k: [row["after"][k] for row in group] for k in keys}
        add(f"**{title}, mean**", {k: statistics.mean(v) for k, v in values.items()})
        if len(group) > 1:
            add(f"{title}, standard deviation", {k: statistics.stdev(v) for k, v in values.items()})
        if "before" in group[0]:
            shares = [
                row["after"]["clean_accuracy"] / row["before"]["clean_accuracy"] for row in group
            ]
            kept.append(
                f"{title}: clean accuracy kept {100 * statistics.mean(shares):.2f} % of before, "
                f"{statistics.mean(row['seconds'] for row in group):.0f} s for the method."
            )
    lines += ["", *kept]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run one case and write its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=("cifar10", "nad"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=None, help="nad: the student")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="resnet18-w16", help="cifar10: the network")
    parser.add_argument("--epochs", type=int, default=10, help="cifar10: of planting")
    parser.add_argument(
        "--small-state", action="store_true", help="cifar10: F in 8 bits, the anchor in bfloat16"
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args()
    if options.case == "nad" and options.checkpoint is None:
        parser.error("--checkpoint: expected the student's file for nad")
    rows = (cifar10 if options.case == "cifar10" else nad)(options)
    text = table(options.case, rows)
    print(text)
    if options.json is not None:
        atomic_write(options.json, json.dumps(rows, indent=1) + "\n")
    if options.markdown is not None:
        atomic_write(options.markdown, text)


if __name__ == "__main__":
    main()
