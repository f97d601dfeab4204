"""Peak memory of each way to step, on a GPU, every arm in a process of its own.

    python bench/memory.py --markdown memory.md

Counted is what an arm holds at most beyond parameters, gradients, Fisher and anchor, which all arms
need: the optimizer's state and its temporaries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bdu.checkpoint import atomic_write

ARMS = (
    "bdu",
    "bdu triton",
    "autograd + for-loop",
    "autograd + foreach",
    "closed form + foreach",
    "closed form + fused",
    "compiled closed form",
)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="1B")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args()
    rows = []
    for optimizer in ("sgd", "adamw"):
        for arm in ARMS:
            done = subprocess.run(
                [
                    *(sys.executable, str(Path(__file__).with_name("step.py")), "--peak-memory"),
                    *("--optimizer", optimizer, "--shapes", options.shapes, "--device", "cuda"),
                    *("--dtype", options.dtype, "--arm", arm),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            taken = int(done.stdout.split()[-1]) if done.returncode == 0 else None
            rows.append({"optimizer": optimizer, "arm": arm, "bytes": taken})
            if taken is None:
                print(f"{optimizer} {arm}: {done.stderr[-300:]}", file=sys.stderr)
    lines = [
        f"{options.shapes}, {options.dtype}: bytes beyond parameters, gradients, F and anchor.",
        "",
        "| optimizer | arm | GB |",
        "|---|---|---:|",
    ]
    for row in rows:
        shown = "did not run" if row["bytes"] is None else f"{row['bytes'] / 1e9:.3f}"
        lines.append(f"| {row['optimizer']} | {row['arm']} | {shown} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.json is not None:
        atomic_write(options.json, json.dumps(rows, indent=1) + "\n")
    if options.markdown is not None:
        atomic_write(options.markdown, text)


if __name__ == "__main__":
    main()
