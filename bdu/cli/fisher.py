"""Compute the exact Fisher diagonal of a checkpoint and write it as safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from bdu.cli import common
from bdu.data import as_unit_float
from bdu.fisher import fisher_diagonal, save_fisher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bdu fisher``."""
    common.add_model(parser, checkpoint=True)
    common.add_images(parser)
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        help="class folders, CIFAR-10's binary files, or an .npz",
    )
    parser.add_argument("--split", default=None, help="part of --data, for example train")
    parser.add_argument("--samples", type=int, default=None, help="at most; default: all")
    parser.add_argument(
        "--labels",
        choices=("empirical", "model"),
        default="empirical",
        help="those of the data, or drawn from the model's own distribution",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="changes nothing but time")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors")
    common.add_common(parser, resume=True)


def run(options: argparse.Namespace) -> None:
    """Load, compute, write."""
    if options.out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a .safetensors file, got {options.out}")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {options.batch_size}")
    partial = options.out.with_name(options.out.name + ".partial")
    if partial.exists() and not options.resume:
        raise FileExistsError(
            f"{partial}: expected none, got the sums of a stopped computation; --resume goes on "
            "from it"
        )
    data = common.images(options.data, options, "--data", options.split)
    model = common.build_loaded(options, data.x.shape[1])
    count = len(data) if options.samples is None else min(options.samples, len(data))
    batches = (
        (as_unit_float(x), y)
        for x, y in zip(
            data.x.split(options.batch_size), data.y.split(options.batch_size), strict=True
        )
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fisher = fisher_diagonal(
        model,
        batches,
        resume=partial,
        samples=count,
        labels=options.labels,
        seed=options.seed,
        progress=not options.quiet,
    )
    save_fisher(options.out, fisher, {"samples": count, "labels": options.labels})
    entries = sum(f.numel() for f in fisher.values())
    mean = sum(float(f.double().sum()) for f in fisher.values()) / entries
    print(
        f"{entries} entries in {len(fisher)} tensors, mean {mean:.3g}, of {count} samples; "
        f"wrote {options.out}"
    )
