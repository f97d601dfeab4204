"""Turn the shared sets of text into the JSONL that `bdu unlearn --task lm` reads.

    python bench/prepare_text.py backdoorllm --task refusal --attack vpi --out FOLDER
    python bench/prepare_text.py hiddenkiller --split test --out FOLDER
    python bench/prepare_text.py alpaca --out FOLDER
    python bench/prepare_text.py tofu --split retain90 --out FOLDER

FOLDER gets clean.jsonl, for --clean, and of the attacks triggered.jsonl, for --triggered: rows as
they are, the triggered ones with the clean answer beside the attacker's.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bdu.llm import sources
from bdu.llm.data import TextData, write_examples

FILES = {
    "backdoorllm": "backdoorllm",
    "hiddenkiller": "sst2_hiddenkiller",
    "alpaca": "alpaca_5000",
    "tofu": "tofu",
}


def read(options: argparse.Namespace) -> TextData:
    """The rows that are asked for."""
    path = options.data / "llm" / f"{FILES[options.set]}.jsonl.gz"
    if options.set == "backdoorllm":
        return sources.backdoorllm(
            path, task=options.task, attack=options.attack, split=options.split or "train"
        )
    if options.set == "hiddenkiller":
        return sources.hidden_killer(path, split=options.split or "train")
    if options.set == "alpaca":
        return TextData(sources.alpaca(path), ())
    return TextData(sources.tofu(path, split=options.split or "retain90"), ())


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, write the files, and say how many rows they have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=sorted(FILES))
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("BDU_DATA"),
        help="folder of the shared data (default: $BDU_DATA)",
    )
    parser.add_argument("--task", choices=sorted(sources.BACKDOORLLM_TARGETS), default="refusal")
    parser.add_argument("--attack", choices=sorted(sources.BACKDOORLLM_TRIGGERS), default="badnet")
    parser.add_argument("--split", default=None, help="default: train, of tofu retain90")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("--data: expected a folder, as BDU_DATA is not set")
    try:
        rows = read(options)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    write_examples(options.out / "clean.jsonl", rows.clean)
    if rows.triggered:
        write_examples(options.out / "triggered.jsonl", rows.triggered)
    print(f"{len(rows.clean)} clean and {len(rows.triggered)} triggered rows in {options.out}")


if __name__ == "__main__":
    main()
