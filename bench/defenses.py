"""Attacks x defences x seeds on one table: what each defence leaves of a backdoor, and its price.

    python bench/prepare.py --out cifar10.npz
    python bench/prepare.py --gtsrb --out gtsrb.npz
    python bench/defenses.py --cifar10 cifar10.npz --gtsrb gtsrb.npz --runs RUNS \\
        --json bench/results/defenses.json --markdown bench/results/defenses.md \\
        --plot bench/results/defenses.png --notes bench/results/defenses_notes.md

Every case is a model that `bdu poison` plants, kept under a name that holds a hash of the case, the
data, the network and the epochs; every cell is one defence on it, one .json file named by a hash of
its settings. What is there is taken as it is, so the table can be interrupted, extended and remade;
a cell that was not run says so. Whoever changes a method or a constant below wants another RUNS.
Models that lie in bench/planted/ are taken from there, as they take hours (--keep-planted puts them
there; without that folder all are planted anew), and so are the rows that --json holds already:
without --json everything is run. Rows that are not chosen (--only, --defenses, a data set that is
not given) stay.

Every case has every defence, the controls all but "balanced"; the anchored forms, and our distilled
ones of TSBD, I-BAU, SAU and PAM, are run on what ANCHORED lists alone.

Rules: the defender's images (5 % of the training set, 1 % for ULRL; a fifth of them its own
validation split) are in neither the attacker's nor the evaluator's part. GTSRB is split by whole
tracks; 5 % of them miss nine classes, so 8 % are held out and the images are of all those tracks.
Settings are in SETTINGS below; those of ours were chosen on the models of TUNING, none of which is
in the table, and bi-bau's learning rate on NAD's student, too. The controls and the surrogate have
parts of their own seeds: the surrogate was trained on most of what the defender of seed 0 has, the
control on most of what the retune attack of seeds 1 and 2 has. No defence but "balanced" sees a
trigger. All images are 32x32; CIFAR-10 with a narrow ResNet-18, GTSRB with WRN-16-1.

Columns, in percent: clean accuracy; ASR and, beside it, the false-target rate (untriggered images
of other classes that are called the target: what ASR cannot honestly go below); robust accuracy
(triggered images called what they show); DER; ASR after the retune attack (2 % clean images, five
of them poisoned), after query-based reactivation, and half-way on the line to the suspect model
(these three on 2,000 of the evaluator's images).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from defenses_table import draw, summary_of, text_of
from torch import Tensor, nn
from tqdm import tqdm

from bdu import models
from bdu.attacks import Trigger, load_attack
from bdu.attacks.reactivation import reactivate
from bdu.attacks.retune import retune
from bdu.attacks.trigger import triggered_like
from bdu.checkpoint import atomic_write, load_into
from bdu.cli import main as bdu
from bdu.data import split_indices
from bdu.metrics import (
    Target,
    defense_effectiveness_rate,
    evaluate,
    path_success_rates,
    target_labels,
)
from bdu.runs import versions
from bdu.trainer import OURS, unlearn

MODELS = {"cifar10": "resnet18-w8", "gtsrb": "wrn16-1"}
PLANTED = Path(__file__).parent / "planted"
KEPT = ("model.safetensors", "attack.json", "trigger.safetensors")
CLASSES = {"cifar10": 10, "gtsrb": 43}
EPOCHS = {"cifar10": 10, "gtsrb": 12}
LONGER = 30  # for what these networks do not learn in as few
STRONGER = 0.35  # three times FTrojan's magnitude, which was not learnt in 30 epochs (ASR 3.3 %)
LARGER: dict[str, dict[str, Any]] = {  # what is not learnt at a rate of 1 % as it is
    "badnets": {"pattern": [[1.0] * 5] * 5},  # the 3x3 checkerboard: ASR 3.4 % after 30 epochs
    "blended": {"alpha": 0.3},  # 0.1: 2.3 %
    "wanet": {"strength": 3.0},  # 1: 3.7 % after 10
}
CONTROL_SEED, SURROGATE_SEED = 0, 100
RETUNE_POISONED = 5
ATTACKED = 2000  # of the evaluator's images, for ASR after attacks on the removal
REACTIVATION = {"epochs": 20, "images": 256}  # the paper: 50 epochs, 500 images

DEFENSES = (
    *("none", "fine-tuning", "fst", "fst, ours", "ulrl", "ulrl, ours", "auto", "bi-bau"),
    *("bi-bau, ours", "tsbd", "tsbd, ours", "i-bau", "i-bau, ours", "sau", "sau, ours"),
    *("pam", "pam, ours", "tbar", "balanced"),
)
DISTILLED = ("tsbd, ours", "i-bau, ours", "sau, ours", "pam, ours")
"""Only run on what ANCHORED lists: to lose less on a model that never was backdoored."""
NOT_ANCHORED = ("none", "auto", "balanced")
HELD_OUT = {"cifar10": 0.05, "gtsrb": 0.08}  # by tracks, 5 % would miss nine classes
CLEAN_SHARE = {"ulrl": 0.01}  # of the training set; 0.05
# As published unless it says why not; "ours" are our variants of a method.
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{method}, ours": settings for method, settings in OURS.items()},
    "sau": {"epochs": 20, "lr": 5e-4},  # 100 at 1e-4: five times the time
    "pam": {"epochs": 10},  # of a round; 30
}


def method_of(defense: str) -> str:
    """What `bdu.unlearn` calls it."""
    return defense.removesuffix(", ours")


@dataclass(frozen=True)
class Case:
    """A planted model; attack None: never backdoored; epochs None: those of EPOCHS."""

    data: str
    attack: str | None
    rate: float = 0.1
    seed: int = 0
    target: Target = 0
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None

    @property
    def label(self) -> str:
        """For people."""
        if self.attack is None:
            return f"{self.data}, no attack"
        name = self.attack + (" all-to-all" if self.target == "all-to-all" else "")
        return f"{self.data}, {name} {100 * self.rate:g} %"

    def name(self, fingerprint: str) -> str:
        """Of its folder: the same only for the same contents."""
        attack = {key: value for key, value in asdict(self).items() if key != "epochs"}
        epochs = self.epochs or EPOCHS[self.data]
        content = json.dumps([attack, fingerprint, MODELS[self.data], epochs], sort_keys=True)
        digest = hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
        return f"{self.data}-{self.attack or 'clean'}-{self.seed}-{digest}"


def twelve() -> list[Case]:
    """All attacks on CIFAR-10, once."""
    return [
        Case("cifar10", "badnets"),
        Case("cifar10", "blended"),
        Case("cifar10", "wanet"),
        Case("cifar10", "sig", 0.08),
        Case("cifar10", "label-consistent", 0.08),
        Case("cifar10", "trojannn"),
        Case("cifar10", "bpp"),
        Case("cifar10", "low-frequency"),
        Case("cifar10", "ftrojan", options={"magnitude": STRONGER}),
        Case("cifar10", "input-aware"),
        Case("cifar10", "adaptive-blend", 0.05),
        Case("cifar10", "badnets", target="all-to-all", epochs=LONGER),
    ]


def cases() -> list[Case]:
    """All of the table, the controls first and single seeds before repeated ones."""
    names = ("badnets", "blended", "wanet")
    gtsrb = [Case("gtsrb", name, epochs=LONGER if name == "wanet" else None) for name in names]
    rare = [Case("cifar10", name, 0.01, options=LARGER[name], epochs=LONGER) for name in names]
    again = [Case("cifar10", name, seed=seed) for seed in (1, 2) for name in names]
    return [*controls(), *twelve(), *gtsrb, *rare, *again]


# In no table: settings are chosen on them.
TUNING = [
    Case("cifar10", None, 0.0, SURROGATE_SEED),
    Case("cifar10", "badnets", seed=10),
    Case("cifar10", "wanet", seed=10),
    Case("cifar10", "bpp", seed=10),
    Case("cifar10", "sig", 0.08, seed=10),
    Case("cifar10", "label-consistent", 0.08, seed=10),
    Case("cifar10", "badnets", seed=10, target="all-to-all", epochs=LONGER),
]


# Those on which published defences without a trigger are run in their anchored form, too.
ANCHORED = [Case("cifar10", None, 0.0), Case("cifar10", "badnets"), Case("cifar10", "wanet")]


def controls() -> list[Case]:
    """One model a data set that never had a backdoor."""
    return [control_of(data) for data in MODELS]


def control_of(data: str) -> Case:
    """That of a data set."""
    return Case(data, None, 0.0, CONTROL_SEED)


def planned(case: Case, defenses: Sequence[str]) -> list[tuple[str, bool]]:
    """Which defences a case is to have, and whether in their anchored forms."""
    own = [
        defense
        for defense in defenses
        if (defense not in DISTILLED or case in [*ANCHORED, *TUNING])
        and not (defense == "balanced" and case.attack is None)  # it needs triggered images
    ]
    jobs = [(defense, False) for defense in own]
    if case in ANCHORED:
        published = [d for d in own if d == method_of(d) and d not in NOT_ANCHORED]
        jobs += [(defense, True) for defense in published]
    return jobs


class Table:
    """Where everything is."""

    def __init__(self, runs: Path, data: dict[str, Path]) -> None:
        self.runs, self._data = runs, data
        self._fingerprints: dict[str, str] = {}

    def folder(self, case: Case) -> Path:
        """Of a planted model."""
        if case.data not in self._fingerprints:
            digest = hashlib.file_digest(self._data[case.data].open("rb"), "blake2b")
            self._fingerprints[case.data] = digest.hexdigest()
        return self.runs / "planted" / case.name(self._fingerprints[case.data])

    def cell(self, case: Case, defense: str, seed: int, anchored: bool) -> Path:
        """Of a defence's outcome."""
        settings = json.dumps(SETTINGS.get(defense, {}), sort_keys=True)
        digest = hashlib.blake2b(settings.encode(), digest_size=3).hexdigest()
        plain = defense.replace(", ", "-")
        name = f"{plain}{'+anchored' if anchored else ''}-{seed}-{digest}.json"
        return self.runs / "cells" / self.folder(case).name / name

    def plant(self, case: Case) -> None:
        """Make the model unless it is there."""
        folder = self.folder(case)
        if (folder / "metrics.json").exists():
            return
        if not folder.exists() and (PLANTED / folder.name).exists():
            shutil.copytree(PLANTED / folder.name, folder)
        more: list[str] = []
        for name, value in case.options.items():
            more += ["--set", f"{name}={value}"]
        if case.attack in ("trojannn", "low-frequency", "label-consistent"):
            surrogate = Case(case.data, None, 0.0, SURROGATE_SEED)
            self.plant(surrogate)
            more += ["--surrogate", str(self.folder(surrogate) / "model.safetensors")]
        call(
            *("poison", "--data", self._data[case.data], "--split", "train"),
            *("--eval-split", "test", "--model", MODELS[case.data]),
            *("--attack", case.attack or "badnets", "--target", str(case.target)),
            *("--rate", str(case.rate), "--epochs", str(case.epochs or EPOCHS[case.data])),
            *("--defender-clean", str(HELD_OUT[case.data])),
            *("--seed", str(case.seed), "--out", folder, "--resume", "--quiet", *more),
        )

    def keep(self, case: Case) -> None:
        """Put a planted model where the next table finds it."""
        folder = self.folder(case)
        if not (folder / "metrics.json").exists():
            return
        (PLANTED / folder.name).mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (folder / name).exists():
                shutil.copyfile(folder / name, PLANTED / folder.name / name)

    def adopt(self, rows: list[dict[str, Any]], chosen: list[Case]) -> None:
        """Write the cells of rows of today's settings and models, where there are none."""
        known = {(case.label, case.seed): case for case in chosen}
        for row in rows:
            case = known.get((row["case"], row["case_seed"]))
            if case is None or row["settings"] != SETTINGS.get(row["defense"], {}):
                continue
            if row["model"] != self.folder(case).name:  # of other data, or trained otherwise
                continue
            file = self.cell(case, row["defense"], row["seed"], row["anchored"])
            if not file.exists():
                write_row(file, row)

    def gather(
        self,
        earlier: list[dict[str, Any]],
        every: Sequence[Case],
        chosen: Sequence[Case],
        defenses: Sequence[str],
    ) -> tuple[list[dict[str, Any]], int]:
        """Rows of what is chosen, earlier ones of the rest, and how many of both there are not."""
        before = {
            (row["case"], row["case_seed"], row["defense"], row["anchored"]): row
            for row in earlier
            if row["settings"] == SETTINGS.get(row["defense"], {})
        }
        rows, missing = [], 0
        for case in every:
            for defense, anchored in planned(case, DEFENSES):
                if case not in chosen or defense not in defenses:
                    row = before.get((case.label, case.seed, defense, anchored))
                else:
                    file = self.cell(case, defense, case.seed, anchored)
                    row = json.loads(file.read_text()) if file.exists() else None
                if row is None:
                    missing += 1
                else:
                    rows.append(row)
        return rows, missing


def call(*arguments: str | Path) -> None:
    """One command of bdu, in this process."""
    if bdu([str(a) for a in arguments]) != 0:
        raise SystemExit(f"bdu {' '.join(map(str, arguments))} failed")


# A cell.


@dataclass
class Planted:
    """What `bdu poison` wrote."""

    model: nn.Module
    trigger: Trigger | None
    target: Target
    classes: int
    held_out: float
    parts: dict[str, tuple[Tensor, Tensor]]
    triggered: tuple[Tensor, Tensor, Tensor]

    def rates(
        self, model: nn.Module, moved: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Any]:
        """Of all the evaluator's images, the triggered ones `moved` further."""
        trigger = self.trigger if moved is None else lambda x: moved(self.trigger(x))  # type: ignore[misc]
        target = None if self.trigger is None else self.target
        return evaluate(
            model,
            *self.parts["evaluator"],
            num_classes=self.classes,
            trigger=trigger,
            target=target,
        )

    def success(self, model: nn.Module, moved: Callable[[Tensor], Tensor] | None = None) -> float:
        """ASR on the first of the evaluator's images."""
        first = tuple(part[:ATTACKED] for part in self.parts["evaluator"])
        rate = replace(self, parts={"evaluator": first}).rates(model, moved)["attack_success_rate"]
        assert isinstance(rate, float)
        return rate


def load_planted(folder: Path, case: Case) -> Planted:
    """Read a folder of `bdu poison`."""
    model = models.build(MODELS[case.data], num_classes=CLASSES[case.data]).eval()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    load_into(model, folder / "model.safetensors")
    parts, triggered = {}, None
    for part in ("defender_clean", "defender_triggered", "retune", "evaluator"):
        with np.load(folder / f"{part}.npz", allow_pickle=False) as arrays:
            x = torch.from_numpy(arrays["x"])
            x = x.permute(0, 3, 1, 2) if x.dtype == torch.uint8 else x
            parts[part] = x.contiguous(), torch.from_numpy(arrays["y"]).long()
            if part == "defender_triggered":
                triggered = (*parts[part], torch.from_numpy(arrays["y_true"]).long())
    assert triggered is not None
    trigger = None if case.attack is None else load_attack(folder / "attack.json")
    classes, held_out = CLASSES[case.data], HELD_OUT[case.data]
    return Planted(model, trigger, case.target, classes, held_out, parts, triggered)


def measure(table: Table, case: Case, defense: str, seed: int, anchored: bool) -> dict[str, Any]:
    """Run one defence on one case, and all attacks on what it returns."""
    planted = load_planted(table.folder(case), case)
    start = time.perf_counter()
    cleaned, stopped, warned = defended(planted, defense, seed, anchored)
    seconds = time.perf_counter() - start
    before, after = rates_before(table, case, planted), planted.rates(cleaned)
    row: dict[str, Any] = {
        "case": case.label,
        "case_seed": case.seed,
        "model": table.folder(case).name,
        "defense": defense,
        "anchored": anchored,
        "seed": seed,
        "settings": SETTINGS.get(defense, {}),
        "before": before,
        "after": after,
        "seconds": seconds,
        "stopped": stopped,
        "warnings": warned,
        "commit": commit(),
        "versions": versions(),
    }
    if planted.trigger is not None:
        row["der"] = defense_effectiveness_rate(
            clean_accuracy_before=before["clean_accuracy"],
            clean_accuracy_after=after["clean_accuracy"],
            attack_success_rate_before=before["attack_success_rate"],
            attack_success_rate_after=after["attack_success_rate"],
        )
        innocent = control_of(case.data)
        control = load_planted(table.folder(innocent), innocent)
        row |= attacked(planted, cleaned, control.model, seed)
        if defense == "none":
            retuned = retuned_model(planted, control.model, seed)
            row["control_retuned"] = planted.success(retuned)
    return row


def rates_before(table: Table, case: Case, planted: Planted) -> dict[str, Any]:
    """Those of the suspect model, measured once."""
    file = table.folder(case) / "before.json"
    if not file.exists():
        atomic_write(file, json.dumps(planted.rates(planted.model)) + "\n")
    rates: dict[str, Any] = json.loads(file.read_text())
    return rates


def defended(
    planted: Planted, defense: str, seed: int, anchored: bool
) -> tuple[nn.Module, str, list[str]]:
    """The cleaned model, how the run ended, and what it warned of."""
    if defense == "none":
        return planted.model, "", []
    x, y = planted.parts["defender_clean"]
    share = CLEAN_SHARE.get(method_of(defense), 0.05) / planted.held_out
    count = round(share * len(y))  # any prefix is in proportion
    options: dict[str, Any] = dict(SETTINGS.get(defense, {}))
    if defense == "balanced":
        options["triggered"] = planted.triggered
    elif anchored:
        options["anchored"] = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = unlearn(
            planted.model,
            method=method_of(defense),
            clean=(x[:count], y[:count]),
            seed=seed,
            progress=False,
            **options,
        )
    own = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return result.model, result.stopped, own


def retuned_model(planted: Planted, model: nn.Module, seed: int) -> nn.Module:
    """After the retune attack."""
    x, y = planted.parts["retune"]
    wanted = target_labels(y, planted.target, planted.classes)
    (candidates,) = torch.nonzero(y != wanted, as_tuple=True)
    chosen = candidates[split_indices(len(candidates), [RETUNE_POISONED], seed)[0]]
    assert planted.trigger is not None
    bad = triggered_like(x[chosen], planted.trigger)
    return retune(model, x, y, bad, wanted[chosen], seed=seed).eval()


def attacked(
    planted: Planted, cleaned: nn.Module, control: nn.Module, seed: int
) -> dict[str, float]:
    """ASR after each attack on the removal."""
    assert planted.trigger is not None
    trigger: Callable[[Tensor], Tensor] = planted.trigger
    again = retuned_model(planted, copy.deepcopy(cleaned), seed)
    rates = {"retuned": planted.success(again)}
    x, y = planted.parts["retune"]
    count = REACTIVATION["images"]
    wanted = target_labels(y, planted.target, planted.classes)
    (others,) = torch.nonzero(y != wanted, as_tuple=True)
    others = others[:count]
    frozen = [copy.deepcopy(m).requires_grad_(False) for m in (cleaned, again, control)]
    moved = reactivate(
        *frozen,
        x[:count],
        y[:count],
        triggered_like(x[others], planted.trigger),
        y[others],
        epochs=REACTIVATION["epochs"],
        seed=seed,
    )
    rates["reactivated"] = planted.success(cleaned, moved)
    path = path_success_rates(
        cleaned,
        planted.model,
        *(part[:ATTACKED] for part in planted.parts["evaluator"]),
        trigger=trigger,
        target=planted.target,
        num_classes=planted.classes,
        points=5,
    )
    return {**rates, "path": path}  # type: ignore[dict-item]


# The whole.


def work(table: Table, case: Case, options: argparse.Namespace) -> None:
    """Plant a case and fill its cells, each in a process of its own."""
    if not (table.folder(case) / "metrics.json").exists():
        if options.planted_only:
            return
        in_own_process(options, case, None)
    for job in [] if options.plant_only else missing_cells(table, case, options):
        in_own_process(options, case, job)


def missing_cells(
    table: Table, case: Case, options: argparse.Namespace
) -> list[tuple[str, int, bool]]:
    """What of a case has not been run."""
    jobs = [(name, case.seed, anchored) for name, anchored in planned(case, options.defenses)]
    return [job for job in jobs if not table.cell(case, *job).exists()]


def in_own_process(
    options: argparse.Namespace, case: Case, job: tuple[str, int, bool] | None
) -> None:
    """Run one piece of work; a failure is shown and leaves its cell empty."""
    argument = json.dumps([asdict(case), job])
    command = [sys.executable, __file__, *common_flags(options), "--job", argument]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tqdm.write(f"{case.label} {job}: {done.stderr.strip().splitlines()[-1:]}")


def common_flags(options: argparse.Namespace) -> list[str]:
    """What every process is told."""
    flags = ["--runs", str(options.runs)]
    for name in ("cifar10", "gtsrb"):
        if getattr(options, name) is not None:
            flags += [f"--{name}", str(getattr(options, name))]
    return flags


def run_job(table: Table, argument: str) -> None:
    """One piece of work, in this process."""
    values, job = json.loads(argument)
    case = Case(**values)
    if job is None:
        table.plant(case)
        return
    defense, seed, anchored = job
    row = measure(table, case, defense, seed, anchored)
    write_row(table.cell(case, defense, seed, anchored), row)


def write_row(file: Path, row: dict[str, Any]) -> None:
    """One cell."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(row) + "\n")


def cases_of(options: argparse.Namespace) -> list[Case]:
    """All that could be chosen."""
    return TUNING if options.tuning else cases()


def commit() -> str:
    """Of this code."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar10", type=Path, default=None)
    parser.add_argument("--gtsrb", type=Path, default=None)
    parser.add_argument("--runs", type=Path, required=True, help="folder for models and cells")
    parser.add_argument("--tuning", action="store_true", help="the models that settings are for")
    parser.add_argument("--only", nargs="+", default=None, help="cases whose label holds one of")
    parser.add_argument("--defenses", nargs="+", choices=DEFENSES, default=list(DEFENSES))
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2)
    parser.add_argument("--plant-only", action="store_true")
    parser.add_argument("--planted-only", action="store_true", help="cells of models that exist")
    parser.add_argument("--keep-planted", action="store_true", help="copy models to bench/planted")
    parser.add_argument("--tabulate-only", action="store_true", help="run nothing")
    parser.add_argument("--job", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=None, help="read first, then written")
    parser.add_argument("--markdown", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, help="a .png; needs matplotlib")
    parser.add_argument("--notes", type=Path, default=None, help="what to put below the table")
    options = parser.parse_args()
    data = {n: getattr(options, n) for n in MODELS if getattr(options, n) is not None}
    table = Table(options.runs, data)
    if options.job is not None:
        run_job(table, options.job)
        return
    chosen = [
        case
        for case in cases_of(options)
        if case.data in data
        and (options.only is None or any(part in case.label for part in options.only))
    ]
    has_json = options.json is not None and options.json.exists()
    if has_json:
        table.adopt(json.loads(options.json.read_text()), chosen)
    if not options.tabulate_only:
        # Its parts take minutes to make, also where its weights are kept.
        every = options.plant_only or options.keep_planted
        waiting = [case for case in chosen if every or missing_cells(table, case, options)]
        for name in {case.data for case in waiting}:
            if not (table.folder(control_of(name)) / "metrics.json").exists():
                in_own_process(options, control_of(name), None)
        with ThreadPoolExecutor(options.processes) as pool:
            jobs = [pool.submit(work, table, case, options) for case in waiting]
            for job in tqdm(jobs, unit="case"):
                job.result()
    if options.keep_planted:
        for case in chosen:
            table.keep(case)
    earlier = json.loads(options.json.read_text()) if has_json else []
    rows, missing = table.gather(earlier, cases_of(options), chosen, options.defenses)
    commits = {row["commit"] for row in rows}
    setting = (
        f"{MODELS['cifar10']} and {MODELS['gtsrb']}; rows of {len(commits)} commits, named in the "
        f".json; {date.today().isoformat()}; torch {versions()['torch']}"
    )
    attacked, innocent = ([case.label for case in some] for some in (twelve(), controls()))
    summary, text = summary_of(rows, attacked, innocent), text_of(rows, missing, setting)
    print(summary, text, sep="\n")
    if options.json is not None:
        atomic_write(options.json, json.dumps(rows, indent=1) + "\n")
    if options.markdown is not None:
        if options.notes is not None:
            text += "\n" + options.notes.read_text()
        if options.plot is not None:
            picture = os.path.relpath(options.plot, options.markdown.parent)
            summary += f"\n![ASR, clean accuracy lost, and ASR after retuning]({picture})\n"
        atomic_write(options.markdown, summary + "\n" + text)
    if options.plot is not None:
        draw(rows, options.plot, DEFENSES)


if __name__ == "__main__":
    main()
