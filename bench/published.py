"""Backdoored checkpoints that others published, cleaned by the command line without the trigger.

    python bench/published.py --data DATA --runs RUNS [--methods auto ulrl i-bau] [--seeds 4 5 6]

DATA is the folder with ``models/`` and ``vision/`` that bench/prepare.py reads as well. The
defender holds 500 clean images of the training set, other 500 serve the retune attack (five of them
poisoned), and the evaluator holds test images; every seed is another draw. Draws 0 to 3 of NAD have
been looked at while auto was made, for bi-bau's learning rate and for what its reference may call
the target; no setting was chosen on draws from 4 on. A method whose name ends in ", ours" has the
settings of bdu.trainer.OURS.

    NAD (Li et al. 2021)         WRN-16-1, CIFAR-10, 3x3 pattern, target 5, exact pixels
    badnets-pytorch (verazuo)    two convolutions, CIFAR-10 and MNIST, white 5x5 square, target 1
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from defenses import SETTINGS, commit, method_of
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from bdu.checkpoint import atomic_write
from bdu.cli import main as bdu
from bdu.data import save_npz
from bdu.runs import versions

CLEAN, RETUNE, EVALUATED = 500, 500, 2000
NAD_PATTERN = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]


class BadNet(nn.Module):
    """The network of badnets-pytorch; images in [0, 1] are brought to [−1, 1] by --mean, --std."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = self._convolution(in_channels, 16)
        self.conv2 = self._convolution(16, 32)
        side = {1: 4, 3: 5}[in_channels]  # of 28 and of 32 pixels
        self.fc1 = nn.Sequential(nn.Linear(32 * side * side, 512), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(512, num_classes), nn.Softmax(dim=-1))

    @staticmethod
    def _convolution(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 5), nn.ReLU(), nn.AvgPool2d(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to logits; the published softmax at the end is left to the loss."""
        hidden: Tensor = self.fc1(self.conv2(self.conv1(x)).flatten(1))
        logits: Tensor = self.fc2[0](hidden)
        return logits


@dataclass(frozen=True)
class Published:
    """A checkpoint, its data and its trigger."""

    name: str
    checkpoint: str
    images: str
    model: str
    target: int
    pattern: Any
    flags: tuple[str, ...] = ()


HALF = ("--mean", *("0.5",) * 3, "--std", *("0.5",) * 3)
WHITE = np.full((5, 5), 255)
CASES = (
    Published(
        *("NAD", "nad_wrn16-1_backdoored_student.pth.tar", "cifar10_lossless_subset.npz"),
        *("wrn16-1", 5, NAD_PATTERN),
    ),
    Published(
        *("badnets-pytorch CIFAR-10", "badnets_pytorch/badnet-CIFAR10.pth"),
        *("cifar10_lossless_subset.npz", "published:BadNet", 1, WHITE, HALF),
    ),
    Published(
        *("badnets-pytorch MNIST", "badnets_pytorch/badnet-MNIST.pth"),
        *("mnist.npz", "published:BadNet", 1, WHITE, ("--mean", "0.5", "--std", "0.5")),
    ),
)


def write_parts(case: Published, file: Path, parts: Path, seed: int) -> None:
    """Disjoint draws from the training images, test images, and the trigger's picture."""
    with np.load(file, allow_pickle=False) as archive:
        x, y = archive["train_x"], archive["train_y"].astype(np.int64)
        test_x, test_y = archive["test_x"], archive["test_y"].astype(np.int64)
    if x.ndim == 3:
        x, test_x = x[..., None], test_x[..., None]
    order = np.random.default_rng(seed).permutation(len(y))
    shown = np.random.default_rng(seed).permutation(len(test_y))[:EVALUATED]
    for name, chosen in (("clean", order[:CLEAN]), ("retune", order[CLEAN:][:RETUNE])):
        save_npz(parts / f"{name}.npz", x=x[chosen], y=y[chosen])
    save_npz(parts / "test.npz", x=test_x[shown], y=test_y[shown])
    pattern = np.asarray(case.pattern, dtype=np.uint8)
    if x.shape[-1] == 3:
        pattern = np.repeat(pattern[:, :, None], 3, axis=2)
    Image.fromarray(pattern).save(parts / "trigger.png")


def clean(case: Published, options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """One run of the command; what it measured."""
    short, plain = case.name.replace(" ", "-"), method.replace(", ", "-")
    parts, out = options.runs / f"{short}-{seed}", options.runs / f"{short}-{plain}-{seed}"
    settings = SETTINGS[method] if method != method_of(method) else {}
    if not (out / "metrics.json").exists():
        parts.mkdir(parents=True, exist_ok=True)
        write_parts(case, options.data / "vision" / case.images, parts, seed)
        side = np.asarray(Image.open(parts / "trigger.png")).shape[0]
        with np.load(parts / "test.npz") as archive:
            corner = archive["x"].shape[1] - side
        arguments = [
            *("unlearn", "--method", method_of(method), "--model", case.model, *case.flags),
            *("--checkpoint", options.data / "models" / case.checkpoint),
            *("--clean", parts / "clean.npz", "--eval-data", parts / "test.npz"),
            *("--retune-data", parts / "retune.npz", "--trigger", parts / "trigger.png"),
            *("--position", f"{corner},{corner}", "--target", case.target),
            *("--seed", seed, "--out", out, "--resume", "--quiet"),
            *(word for item in settings.items() for word in ("--set", "{}={}".format(*item))),
        ]
        if bdu([str(a) for a in arguments]) != 0:
            raise SystemExit(f"bdu {' '.join(map(str, arguments))} failed")
    metrics = json.loads((out / "metrics.json").read_text())
    if any(metrics["settings"][name] != value for name, value in settings.items()):
        raise SystemExit(f"{out}: expected a run of {settings}, got {metrics['settings']}")
    return {**metrics, "case": case.name, "method": method, "seed": seed}


COLUMNS = ("clean_accuracy", "attack_success_rate", "false_target_rate", "robust_accuracy")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over the seeds, in percent."""
    lines = [
        f"Published backdoored checkpoints, {CLEAN} clean images, trigger unknown to the method; "
        f"percent; commit {commit()}; {date.today().isoformat()}; torch {versions()['torch']}.",
        "",
        "| checkpoint | method | seeds | clean accuracy | ASR | false-target rate | "
        "robust accuracy | ASR retuned | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["method"]), []).append(row)
    seen = set()
    for (case, method), group in groups.items():
        if case not in seen:
            cells = [spread([row["before"][key] for row in group]) for key in COLUMNS]
            lines.append(f"| {case} | before | {len(group)} | {' | '.join(cells)} | – | – |")
            seen.add(case)
        cells = [spread([row["after"][key] for row in group]) for key in COLUMNS]
        cells.append(spread([row["retuned_attack_success_rate"] for row in group]))
        seconds = statistics.median(row["seconds"] for row in group)
        lines.append(f"| | {method} | {len(group)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation where there are several."""
    more = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{more}"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["auto"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--only", nargs="+", default=None, help="cases whose name holds one of")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args()
    chosen = [c for c in CASES if options.only is None or any(o in c.name for o in options.only)]
    jobs = [(c, m, seed) for c in chosen for m in options.methods for seed in options.seeds]
    rows = [clean(case, options, method, seed) for case, method, seed in tqdm(jobs, unit="run")]
    text = table(rows)
    print(text)
    if options.json is not None:
        atomic_write(options.json, json.dumps(rows, indent=1) + "\n")
    if options.markdown is not None:
        atomic_write(options.markdown, text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
