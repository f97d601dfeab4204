"""Build the report of a run again, or one page that compares several."""

from __future__ import annotations

import argparse
from pathlib import Path

from bdu.cli import common
from bdu.monitor.comparison import write_comparison
from bdu.monitor.report import write_report
from bdu.runs import RunDirectory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bdu report``."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FILE.html",
        help="default: report.html in the run's folder; of several runs comparison.html here",
    )
    common.add_traceback(parser)


def run(options: argparse.Namespace) -> None:
    """Read, write, say where."""
    directories = [RunDirectory(path) for path in options.runs]
    if len(directories) == 1:
        print(f"wrote {write_report(directories[0], options.out)}")
        return
    path = options.out or Path("comparison.html")
    write_comparison(directories, path)
    print(f"wrote {path}")
