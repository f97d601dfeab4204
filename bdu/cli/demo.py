"""Plant a backdoor in a small CNN on scikit-learn's digits, remove it, and write a report."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from pathlib import Path

import numpy as np

from bdu.cli import common
from bdu.data import save_npz


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bdu demo``."""
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="default %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_traceback(parser)


def run(options: argparse.Namespace) -> None:
    """Run ``bdu poison`` and ``bdu unlearn`` on the digits, showing both commands."""
    from bdu.cli.command_line import main  # which knows this module

    out: Path = options.out
    if (out / "metrics.json").exists():
        raise FileExistsError(f"out: {out} holds a run already; choose another folder")
    save_npz(out / "digits.npz", **digits())
    planted = out / "planted"
    split = [
        *("--defender-clean", "0.15", "--defender-triggered", "0.05", "--retune", "0.1"),
        *("--seed", str(options.seed)),
    ]
    poison = [
        *("poison", "--data", str(out / "digits.npz"), "--model", "smallcnn"),
        *("--attack", "badnets", "--target", "0", "--rate", "0.1"),
        *("--epochs", "25", "--batch-size", "64", "--lr", "0.1", "--no-augment"),
        *split,
        *("--out", str(planted)),
    ]
    unlearn = [
        *("unlearn", "--model", "smallcnn"),
        *("--checkpoint", str(planted / "model.safetensors")),
        *("--clean", str(planted / "defender_clean.npz")),
        *("--triggered", str(planted / "defender_triggered.npz")),
        *("--eval-data", str(planted / "evaluator.npz")),
        *("--attack", str(planted / "attack.json")),
        *("--retune-data", str(planted / "retune.npz")),
        *("--seed", str(options.seed), "--out", str(out)),
    ]
    for command in (poison, unlearn):
        print(f"\n$ bdu {shlex.join(command)}")
        quiet = ["--quiet"] if options.quiet else []
        if main([*command, *quiet]) != 0:
            raise RuntimeError(f"bdu {command[0]} failed, see above")
    print(f"\nopen {out / 'report.html'}")


def digits() -> dict[str, np.ndarray]:
    """The 1,797 handwritten digits that scikit-learn ships: x (N, 8, 8) uint8, y (N,).

    Raises:
        ImportError: scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("the demo's data come with scikit-learn: pip install 'bdu[demo]'")
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    bundle = load_digits()
    x = np.rint(bundle.images * (255 / 16)).astype(np.uint8)
    return {"x": x, "y": bundle.target.astype(np.int64)}
