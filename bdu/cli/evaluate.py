"""Measure a checkpoint: clean accuracy and, with a trigger, how far the backdoor works."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bdu.checkpoint import atomic_write
from bdu.cli import common
from bdu.runs import versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bdu evaluate``."""
    common.add_model(parser, checkpoint=True)
    common.add_images(parser)
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        help=f"images with true labels: {common.IMAGE_FILES}",
    )
    parser.add_argument("--split", default=None, help="part of --data")
    common.add_attack(parser, required=False)
    parser.add_argument(
        "--retune-data", type=Path, default=None, help="clean images for the retune attack"
    )
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="JSON to write")
    common.add_common(parser)


def run(options: argparse.Namespace) -> None:
    """Load, measure, print."""
    trigger, target = common.evaluators_view(options)
    if options.retune_data is not None and trigger is None:
        raise ValueError("--retune-data: expected --attack or --trigger, and --target, with it")
    data = common.images(options.data, options, "--data", options.split)
    retune_data = None
    if options.retune_data is not None:
        retune_data = common.images(options.retune_data, options, "--retune-data", like=data)
    model = common.build_loaded(options, data.x.shape[1])
    rates = common.rates(model, data, trigger, target)
    print(common.table([("", rates)]))
    if retune_data is not None and trigger is not None and target is not None:
        retuned = common.retuned_rate(model, retune_data, data, trigger, target, options.seed)
        rates["retuned_attack_success_rate"] = retuned
        print(f"ASR after the retune attack {100 * retuned:.2f} %")
    if options.out is not None:
        content = {**rates, "seed": options.seed, "versions": versions()}
        atomic_write(options.out, json.dumps(content, indent=2) + "\n")
        print(f"wrote {options.out}")
