"""Does attention leave the trigger as the backdoor goes, and what does watching cost?

    python bench/monitoring.py --runs RUNS --planted RUNS/planted0 RUNS/planted1 RUNS/planted2

`bdu unlearn --tensorboard` with default settings on models that `bdu poison` planted (BadNets on
CIFAR-10: bench/balanced.py plants them), each with its own seed. Of every run: TAR (the share of
the Grad-CAM heat map on the trigger, over the trigger's share of the image), the attack success
rate on the validation split, and their rank correlation over the looks; and the share of the run's
seconds that its callbacks took: Grad-CAM, heat maps, TensorBoard, the log.

Runs that are there already are taken as they are; their cost is known only from when they ran.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bdu.checkpoint import atomic_write
from bdu.cli import main as bdu
from bdu.defenses import protocol
from bdu.runs import RunDirectory, versions

TAR = "tar_share_by_area"


def watched(arguments: list[str]) -> dict[str, float]:
    """Run a command, and time what it tells its callbacks."""
    spent = 0.0
    tell = protocol.tell

    def timed(*args: Any) -> None:
        nonlocal spent
        start = time.perf_counter()
        tell(*args)
        spent += time.perf_counter() - start

    with mock.patch("bdu.defenses.balanced.tell", timed):
        if bdu(arguments) != 0:
            raise SystemExit(f"bdu {' '.join(arguments)} failed")
    return {"callback_seconds": spent}


def clean(planted: Path, out: Path, seed: int, model: str) -> dict[str, Any]:
    """One run; what its log says."""
    cost = out / "monitoring.json"
    if not (out / "metrics.json").exists():
        spent = watched(
            [
                *("unlearn", "--model", model),
                *("--checkpoint", str(planted / "model.safetensors")),
                *("--clean", str(planted / "defender_clean.npz")),
                *("--triggered", str(planted / "defender_triggered.npz")),
                *("--eval-data", str(planted / "evaluator.npz")),
                *("--attack", str(planted / "attack.json")),
                *("--retune-data", str(planted / "retune.npz")),
                *("--tensorboard", "--seed", str(seed), "--out", str(out), "--quiet"),
            ]
        )
        atomic_write(cost, json.dumps(spent) + "\n")
    metrics = json.loads((out / "metrics.json").read_text())
    lines = RunDirectory(out).read_lines()
    row = {
        "seed": seed,
        "steps": [line["step"] for line in lines],
        "attack_success_rate": [line["validation_attack_success_rate"] for line in lines],
        "tar": [line[TAR] for line in lines],
        "before": metrics["before"],
        "after": metrics["after"],
        "seconds": metrics["seconds"],
    }
    if cost.exists():
        row |= json.loads(cost.read_text())
    known = [
        pair
        for pair in zip(row["tar"], row["attack_success_rate"], strict=True)
        if pair[0] is not None
    ]
    row["rank_correlation"] = rank_correlation(*map(torch.tensor, zip(*known, strict=True)))
    return row


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, ties at their mean rank."""
    ranks = torch.stack([mean_ranks(values.double()) for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def mean_ranks(values: Tensor) -> Tensor:
    """From 0; equal values share one."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends - (counts + 1) / 2)[place]


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    text = [
        "BadNets on CIFAR-10, balanced method, default settings; TAR over the trigger's share of "
        "the image (1: attention takes no notice of it); "
        f"commit {commit}; {date.today().isoformat()}; torch {versions()['torch']}.",
        "",
        "| seed | TAR before | TAR after | ASR before | ASR after "
        "| rank correlation of TAR and ASR over the looks | callbacks, share of the seconds |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    for row in rows:
        spent = row.get("callback_seconds")
        share = "–" if spent is None else f"{100 * spent / row['seconds']:.1f} %"
        rates = [100 * row[k]["attack_success_rate"] for k in ("before", "after")]
        tars = [row["tar"][k] for k in (0, -1)]
        cells = [*map(shown, tars), *(f"{rate:.2f} %" for rate in rates)]
        text.append(
            f"| {row['seed']} | "
            + " | ".join(cells)
            + f" | {row['rank_correlation']:.2f} | {share} |"
        )
    text += ["", "Over the looks (step: TAR, ASR on the validation split):", ""]
    for row in rows:
        pairs = zip(row["steps"], row["tar"], row["attack_success_rate"], strict=True)
        curve = "; ".join(f"{s}: {shown(t)}, {100 * a:.0f} %" for s, t, a in pairs)
        text.append(f"- seed {row['seed']}: {curve}")
    return "\n".join(text) + "\n"


def main() -> None:
    """Run, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--planted", type=Path, nargs="+", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--model", default="resnet18-w16")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args()
    rows = [
        clean(planted, options.runs / f"watched{seed}", seed, options.model)
        for seed, planted in enumerate(options.planted)
    ]
    text = table(rows)
    print(text)
    if options.json is not None:
        atomic_write(options.json, json.dumps(rows, indent=1) + "\n")
    if options.markdown is not None:
        atomic_write(options.markdown, text)


if __name__ == "__main__":
    main()
