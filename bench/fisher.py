"""Times the exact diagonal of the empirical Fisher against every honest way to get it.

    python bench/fisher.py                         the whole table, as text
    python bench/fisher.py --json fisher.json      and as rows
    python bench/fisher.py --case mlp --arm vmap   some of it
    python bench/fisher.py --device cuda           the cases of a GPU, see bench/gpu.sh

Every arm adds Σ_n (∂ℓ_n/∂θ)² of one batch to totals of the parameters' shapes. The arms take turns
inside each round, and each is also divided by the forward and backward of the same round, so that a
machine whose speed drifts slows both alike. What takes less than 50 ms runs once untimed before,
with the arm before it out of the caches. All compute in float32 and none in TF32.

Every rival is given its best: the settings it has (how many samples at a time, how their gradients
are squared and added up, which convolution, whether p.grad is computed beside) are tried out on the
case before the rounds, one after the other, and the fastest are taken and named. Arms that hold
the gradients of all layers at once take so many samples at a time that these stay within --limit.
Where a library cannot express a model, it gets the same computation on the same weights in plain
modules.

Arms
    forward + backward       the unit: one forward, and one backward of the summed loss to p.grad
    bdu                      FisherAccumulator.add; its plan, made once a model, is shown apart
    bdu + gradient           FisherAccumulator.backward, which gives p.grad as well
    bdu reference            the same with the backend in plain torch; on a GPU, or by --arm
    bmm + square-sum         hooks, no p.grad, torch.bmm layer by layer (of images also torch's
                             convolutions), then square and sum; (g²)ᵀ(a²) where a sample has one
                             position: the strongest simple way
    batch-1 loop             autograd, one sample at a time
    vmap(grad)               torch.func
    Opacus X                 GradSampleModule: hooks, functorch, ExpandedWeights
    BackPACK                 SumGradSquared, with opt_einsum
    nngeometry               PMatDiag of the losses of the given labels: the empirical Fisher
    batch-mean² (inexact)    the square of the batch's gradient, times the batch: another quantity

Columns
    error        largest |F − F64| of a parameter over its largest F64, of a batch-1 loop in float64
                 on 4 samples (of GPT-2: 2 layers 128 wide, 512 tokens, 32 positions); the worst
                 parameter. One whose F64 is 0 but for rounding, such as the bias of the keys of an
                 attention, is held against the largest of all.
    extra MB     peak memory above that of forward + backward, from a process of its own for each
                 arm on a CPU; both have the result in it, p.grad there and F here. On a GPU what
                 torch's allocator held, on a CPU resident memory, every allocation a mapping.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import step
import torch
from fisher_arms import (
    ARMS,
    AS_GIVEN,
    PLAIN,
    UNIT,
    Arm,
    ForwardBackward,
    Ours,
    Settings,
    Squares,
)
from fisher_problems import CASES, ON_CPU, NotRun, Problem, build, logits_of
from tqdm import tqdm

from bdu.checkpoint import atomic_write

# What float32 loses stays below; a formula that leaves something out does not.
WRONG = 1e-3
QUICK_MS = 50.0
RIVALS = (
    "opacus",
    "backpack-for-pytorch",
    "nngeometry",
    "opt_einsum",
    "transformers",
)


def float64_loop(problem: Problem) -> Squares:
    """The definition: one sample at a time, in float64."""
    model = copy.deepcopy(problem.model).double()
    parameters = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    x, y = (t.double() if t.is_floating_point() else t for t in (problem.x, problem.y))
    for one, label in zip(x.split(1), y.split(1), strict=True):
        loss = problem.losses(logits_of(model, one), label).sum()
        for total, gradient in zip(
            totals.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            total.addcmul_(gradient, gradient)
    return totals


def worst_error(found: Squares, truth: Squares) -> tuple[float, str]:
    """The largest relative error of a parameter, and its name; see the columns above."""
    if found.keys() != truth.keys():
        missing = sorted(truth.keys() ^ found.keys())
        raise NotRun(f"no Fisher of {missing[0]}")
    largest = max(float(f.max()) for f in truth.values())
    errors = []
    for name, expected in truth.items():
        scale = float(expected.max())
        scale = scale if scale > 1e-20 * largest else largest
        error = float((found[name].double() - expected).abs().max()) / scale
        errors.append((error if error == error else float("inf"), name))
    return max(errors)


def chosen(
    make: type[Arm], problem: Problem, small: Problem, truth: Squares
) -> tuple[Arm, Arm, tuple[float, str]]:
    """The arm on the first form of the model with which it gives the truth, the same on the small
    problem, and its error there; NotRun with the reason of the last form that it cannot run.
    """
    forms = [form for form in make.models if form == AS_GIVEN or problem.plain is not None]
    found, reason = [], ""
    for form in forms:
        try:
            check = make(small, {"model": form})
            error = worst_error(check.squares(), truth) if make not in _NO_FISHER else (0.0, "")
        except NotRun as why:
            reason = str(why)
        except Exception as why:  # a library that cannot run a model must not hide the others
            reason = in_one_line(why)
        else:
            found.append((error, form, check))
            if error[0] < WRONG or not make.is_exact:
                break
    if not found:
        raise NotRun(reason)
    error, form, check = min(found, key=lambda one: one[0])
    return make(problem, {"model": form}), check, error


_NO_FISHER = (ForwardBackward,)


def in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:140]}"


def calibrate(arm: Arm, patience: float) -> tuple[Arm, float]:
    """Try an arm's settings one after the other; the arm with the fastest, and seconds of a step.

    Args:
        patience: seconds after which a step is timed only once.
    """
    device, last = arm.problem.x.device, None
    best = None
    for name, values in arm.choices().items():
        if len(values) == 1:
            continue
        seconds: dict[Any, float] = {}
        for value in values:
            arm.settings[name] = value
            try:
                taken = step.timed(arm, device)[0]
                if taken < min(patience, 5.0):  # a short one had more to warm than to do
                    taken = min(step.timed(arm, device)[0] for _ in range(2))
            except Exception as error:  # one value that a library cannot do, or that does not fit
                last = error
                # Some libraries count their calls at the parameters; this one was cut off.
                arm = type(arm)(arm.problem, {"model": arm.form, **arm.settings})
                continue
            seconds[value] = taken
        if not seconds:
            assert last is not None
            raise last
        arm.settings[name] = min(seconds, key=lambda value: seconds[value])
        best = min(seconds.values())
    if best is None:
        step.timed(arm, device)
        best = step.timed(arm, device)[0]
    arm.prepare()
    return arm, best


def measure(case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Interleave all arms of one case; one row an arm."""
    rows, made = prepared(case, options)
    for name, taken in interleaved(case, made, rows, options.rounds).items():
        seconds = [own for own, _ in taken]
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else None
        rows[name] |= {
            "median_ms": 1e3 * statistics.median(seconds),
            "quartile_range_ms": quartiles and 1e3 * (quartiles[2] - quartiles[0]),
            "ratio": statistics.median(ratio for _, ratio in taken),
        }
    made.clear()
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    if not options.no_memory:
        add_memory(case, rows, options)
    return list(rows.values())


def prepared(
    case: str, options: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, Arm]]:
    """Every arm that can run the case, with its fastest settings, and rows for all of them."""
    problem, small = (build(case, options.device, limit(options), small=s) for s in (False, True))
    truth = float64_loop(small)
    rows: dict[str, dict[str, Any]] = {}
    made: dict[str, Arm] = {}
    unit = 0.0
    names = [
        arm
        for arm in ARMS
        if arm in (UNIT, "bdu")
        or (options.arm is not None and options.arm in arm)
        or (options.arm is None and (arm != "bdu reference" or options.device == "cuda"))
    ]
    for name in tqdm(names, desc=f"{case}: settings", leave=False):
        row = rows[name] = {"case": case, "arm": name, "is_exact": ARMS[name].is_exact}
        row |= {"batch": len(problem.y), "parameters": problem.bytes // 4, "ratio": None}
        try:
            arm, check, _ = chosen(ARMS[name], problem, small, truth)
            patience = max(options.patience * unit, 2.0)
            arm, seconds = calibrate(arm, patience)
            if name == UNIT:
                unit = seconds
            else:
                # With the settings that are timed.
                fits = {"chunk": min(arm.settings.get("chunk", 1), len(small.y))}
                check.settings = {**arm.settings, **(fits if "chunk" in arm.settings else {})}
                row["error"], row["worst_parameter"] = worst_error(check.squares(), truth)
            if isinstance(arm, Ours):
                row["planning_ms"] = arm.planning_ms
        except Exception as error:
            if name == UNIT:
                raise
            row["reason"] = str(error) if isinstance(error, NotRun) else in_one_line(error)
            continue
        row["settings"] = arm.settings | ({"model": PLAIN} if arm.form == PLAIN else {})
        row["calibrated_ms"] = 1e3 * seconds
        row["rounds"] = 1 if name != UNIT and seconds > patience else options.rounds
        made[name] = arm
        del arm, check
        gc.collect()
    return rows, made


def interleaved(
    case: str, made: dict[str, Arm], rows: dict[str, dict[str, Any]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each arm in each round, and their ratio to the unit's of the same round."""
    device = made[UNIT].problem.x.device
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    gc.freeze()  # what is collected between the arms are their own cycles only
    gc.disable()
    for round_number in tqdm(range(rounds + 1), desc=f"{case}: rounds", leave=False):
        unit = 0.0
        for name, arm in made.items():
            left = rows[name]["rounds"] - len(times[name])
            # The first round warms up, but not what takes so long that it is timed once.
            if left == 0 or (round_number == 0 and rows[name]["rounds"] < rounds):
                continue
            gc.collect()
            if rows[name]["calibrated_ms"] < QUICK_MS:
                # The caches are full of the arm before, which is not this one's doing.
                arm.prepare()
                arm.step()
            seconds = step.timed(arm, device)[0]
            arm.prepare()
            unit = seconds if name == UNIT else unit
            if round_number > 0:
                times[name].append((seconds, seconds / unit))
    gc.enable()
    gc.unfreeze()
    return times


def limit(options: argparse.Namespace) -> int:
    """Bytes of per-sample gradients."""
    default = 256 if options.device == "cpu" else 8192
    return 2**20 * (options.limit or default)


# Memory, of each arm in a process of its own.


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


def peak_bytes(action: Callable[[], Any], device: torch.device) -> int:
    """Bytes held at most during an action, beyond those before it.

    On a CPU resident memory, so that what libraries allocate behind torch's back is in it. Blocks
    that malloc keeps for later would be missed; see `add_memory`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM afresh
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def hold(problem: Problem, name: str, settings: Settings) -> None:
    """Make an arm and add two batches, so that what it keeps is there as well."""
    own = dict(settings)
    if "chunk" in own:
        own["chunk"] = min(own["chunk"], len(problem.y))
    arm = ARMS[name](problem, own)
    for _ in range(2):
        arm.prepare()
        arm.step()


def peak_of_arm(case: str, name: str, settings: Settings, options: argparse.Namespace) -> int:
    """Bytes that an arm holds at most beyond model and batch, its totals and its plan included."""
    # Code, thread pools and workspaces are there before anything is counted.
    hold(build(case, options.device, limit(options), small=True), name, settings)
    problem = build(case, options.device, limit(options))
    return peak_bytes(lambda: hold(problem, name, settings), problem.x.device)


def peak_of_process(case: str, name: str, settings: Settings, options: argparse.Namespace) -> int:
    """`peak_of_arm` in a process of its own, of which nothing else is resident."""
    # Every allocation a mapping of its own, given back at once: what is resident is what is held.
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [
            *(sys.executable, __file__, "--peak-memory", json.dumps(settings)),
            *("--case", case, "--arm", name, "--device", options.device),
            *("--limit", str(limit(options) // 2**20)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | quiet,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-300:])
    return int(done.stdout.split()[-1])


def add_memory(case: str, rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Add each arm's peak to its row, and what it has more than the unit."""
    # The allocator of a GPU counts by itself, and is not disturbed by what was there before.
    peak = peak_of_arm if options.device == "cuda" else peak_of_process
    ran = [name for name, row in rows.items() if row["ratio"] is not None]
    for name in tqdm(ran, desc=f"{case}: memory", leave=False):
        try:
            rows[name]["peak_bytes"] = peak(case, name, rows[name]["settings"], options)
        except RuntimeError as error:
            print(f"{case}, {name}: {error}", file=sys.stderr)
    base = rows[UNIT].get("peak_bytes")
    for name in ran:
        if base is not None and "peak_bytes" in rows[name]:
            rows[name]["extra_bytes"] = rows[name]["peak_bytes"] - base


# The table.


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to place the figures."""
    where = step.environment(device)
    for package in RIVALS:
        try:
            where["versions"][package] = version(package)
        except PackageNotFoundError:
            where["versions"][package] = None
    return where


def described(row: dict[str, Any]) -> str:
    """An arm's settings in words."""
    words = []
    for name, value in row["settings"].items():
        if name == "block":
            words.append("one sample at a time" if not value else f"blocks of {value >> 20} MiB")
        elif name == "p.grad":
            words.append("p.grad beside" if value == "yes" else "no p.grad")
        else:
            words.append(value if name in ("model", "squares") else f"{name} {value}")
    if "planning_ms" in row:
        words.append(f"planning {row['planning_ms']:.0f} ms")
    if row["rounds"] == 1:
        words.append("1 round")
    return ", ".join(words)


def error_of(row: dict[str, Any]) -> str:
    """The error in words: wrong where an arm that claims to be exact is not."""
    if "error" not in row:
        return "–"
    text = f"{row['error']:.1e} ({row['worst_parameter']})"
    if not row["is_exact"]:
        return f"inexact: {text}"
    return text if row["error"] < WRONG else f"**wrong**: {text}"


def table(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The rows as Markdown."""
    libraries = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", *RIVALS))
    lines = [
        f"Device: {where['device']}, {where['threads']} threads, {where['instruction_set']}; "
        f"{libraries}; commit {where['commit']}; {where['date']}; "
        f"load average at the start {where['load_average']:.1f}. float32 without TF32.",
        "",
        f"`ratio` is to {UNIT} of the same round; `extra MB` is peak memory above that of "
        f"{UNIT}, and beside it in copies of the parameters. `error` is the largest relative error "
        "against a batch-1 loop in float64 on 4 samples (gpt2-small: 2 layers, 128 wide, 512 "
        "tokens). Per-sample gradients take at most the limit, and each rival's settings are the "
        "fastest of those tried.",
        "",
        "| case | arm | median ms | quartile range | ratio | extra MB | × parameters | error "
        "| settings |",
        "|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in rows:
        start = f"| {row['case']} | {row['arm']} "
        if row["ratio"] is None:
            reason = row["reason"].replace("|", "\\|")
            lines.append(f"{start}| not run: {reason} |||||||")
            continue
        spread = row["quartile_range_ms"]
        extra = row.get("extra_bytes")
        memory = "– | –"
        if extra is not None:
            memory = f"{extra / 1e6:.1f} | {extra / (4 * row['parameters']):.2f}"
        lines.append(
            f"{start}| {row['median_ms']:.3f} | {'–' if spread is None else f'{spread:.3f}'} "
            f"| {row['ratio']:.2f} | {memory} | {error_of(row)} | {described(row)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure what was asked for, print the table, write it where asked; 1 if bdu fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--arm", default=None, help=f"only arms whose name holds this, {UNIT}, bdu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--limit", type=int, default=None, help="MiB of per-sample gradients (256; a GPU 8192)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=30.0,
        help="ratio beyond which what takes over 2 s is timed once",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument(
        "--peak-memory", default=None, metavar="SETTINGS", help="print the bytes of --arm alone"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--markdown", type=Path, default=None, metavar="FILE")
    options = parser.parse_args()
    for message in ("Full backward hook is firing", "There is a performance drop", "In CPU auto"):
        warnings.filterwarnings("ignore", message)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if options.peak_memory is not None:
        settings = json.loads(options.peak_memory)
        print(peak_of_arm(options.case[0], options.arm, settings, options))
        return 0
    where = environment(options.device)
    rows: list[dict[str, Any]] = []
    for case in options.case or (ON_CPU if options.device == "cpu" else CASES):
        rows += measure(case, options)
        if options.json is not None:
            atomic_write(options.json, json.dumps(rows, indent=1) + "\n")
    text = table(rows, where)
    print(text)
    if options.markdown is not None:
        atomic_write(options.markdown, text)
    failed = 0
    for row in rows:
        if row["arm"].startswith("bdu") and not row.get("error", WRONG) < WRONG:
            failed = 1
            print(
                f"{row['case']}, {row['arm']}: {row.get('reason', error_of(row))}", file=sys.stderr
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
