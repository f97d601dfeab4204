"""Times one EWC-anchored optimizer step against every way to write it in plain torch.

    python bench/step.py                           the whole table, as text
    python bench/step.py --json step.json          and as rows
    python bench/step.py --shapes resnet18 --dtype float32 --optimizer sgd
    python bench/step.py --device cuda             the arms of a GPU, see bench/gpu.sh

Every arm steps like tensors with the same gradients, Fisher and anchor, and produces the value
of the penalty. The arms take turns inside each round, so that a machine whose speed drifts slows
all of them alike; the medians over the rounds are compared. Gradients stand ready: what is timed
is the step and, in the autograd arms, the penalty's own forward and backward. On a GPU the time
between two events is what counts, and the host's time up to the return is shown beside it.

Arms
    bdu                    the fused step (mode "gradient", the same formula as the others)
    bdu proximal           the same in mode "proximal", which no other arm offers
    bdu triton             on a GPU, the Triton kernels in place of the CUDA ones
    autograd + X           ½λΣF(θ − θ*)² by autograd; torch.optim with X = for-loop, foreach, fused
    closed form + X        torch._foreach ops add λF(θ − θ*) to the gradients and sum the penalty
    compiled closed form   torch.compile of the whole closed-form step; compile time shown apart
    plain + fused          torch.optim with fused=True and no penalty at all, so less work
    X, graph               on a GPU, captured in a CUDA graph
    streaming limit        reads and writes the bytes of one step and computes nothing; on a GPU a
                           copy from device to device of as many bytes
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bdu import dispatch, models, native
from bdu.checkpoint import atomic_write
from bdu.optim import EWCSGD, EWCAdamW
from bdu.runs import versions

LAMBDA, LR, MOMENTUM = 1e-3, 1e-4, 0.9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPTIMIZERS = ("sgd", "adamw")


def resnet18_shapes() -> list[tuple[int, ...]]:
    """The 11.2 M parameters of a CIFAR ResNet-18."""
    return [tuple(p.shape) for p in models.build("resnet18").parameters()]


def transformer_shapes() -> list[tuple[int, ...]]:
    """A decoder of GPT-2 small's dimensions, head and embedding tied: about 124 M parameters."""
    width, layers, vocabulary, context = 768, 12, 50257, 1024
    layer = [
        *[(width,)] * 4,
        *((3 * width, width), (3 * width,), (width, width), (width,)),
        *((4 * width, width), (4 * width,), (width, 4 * width), (width,)),
    ]
    return [(vocabulary, width), (context, width), *layer * layers, (width,), (width,)]


def large_transformer_shapes() -> list[tuple[int, ...]]:
    """A Llama of 16 layers and width 2048: about 1.0 B parameters."""
    width, hidden, layers, vocabulary = 2048, 5632, 16, 32000
    layer = [*[(width, width)] * 4, (hidden, width), (hidden, width), (width, hidden)]
    return [
        (vocabulary, width),
        *[*layer, (width,), (width,)] * layers,
        (width,),
        (vocabulary, width),
    ]


SHAPES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "resnet18": resnet18_shapes,
    "transformer": transformer_shapes,
    "1B": large_transformer_shapes,
    "10000x64": lambda: [(64,)] * 10_000,
    "10x16M": lambda: [(2**24,)] * 10,
}
ON_CPU = ("resnet18", "transformer", "10000x64")
ON_GPU = ("resnet18", "1B", "10000x64", "10x16M")
# Bytes moved for each element: parameter and moments read and written, gradient, F and anchor read.
STREAMS = {"sgd": 7, "adamw": 9}


class Shared:
    """The tensors that every arm reads: at 124 M parameters a set for each would not fit.

    Args:
        shapes: of the parameters.
        dtype: of everything.
        device: likewise.
    """

    def __init__(
        self, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def tensors(positive: bool = False) -> list[Tensor]:
            made = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
            return [(t.abs() if positive else t).to(dtype) for t in made]

        self.anchor, self.grads, self.fisher = tensors(), tensors(), tensors(positive=True)
        # Some arms add to the gradients; each gets them fresh, before its time is taken.
        self.copies = [g.clone() for g in self.grads]


class Arm:
    """One way to step, on parameters and state of its own; what is only read is shared."""

    def __init__(self, shared: Shared) -> None:
        self.grads, self.fisher, self.anchor = shared.grads, shared.fisher, shared.anchor
        self.copies = shared.copies
        self.params = [torch.nn.Parameter(anchor.clone()) for anchor in self.anchor]

    def prepare(self) -> None:
        """Put the gradients in place; not timed."""
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def step(self) -> None:
        """What is timed."""
        raise NotImplementedError

    def torch_optimizer(self, name: str, **flags: Any) -> torch.optim.Optimizer:
        """torch's own, with the settings that all arms share."""
        if name == "sgd":
            return torch.optim.SGD(self.params, lr=LR, momentum=MOMENTUM, **flags)
        return torch.optim.AdamW(self.params, lr=LR, weight_decay=0.01, **flags)


class Fused(Arm):
    """bdu."""

    def __init__(
        self, name: str, mode: str, shared: Shared, backend: str | None = None, **more: Any
    ) -> None:
        super().__init__(shared)
        self.backend = backend
        settings: dict[str, Any] = {
            "lr": LR,
            "ewc_lambda": LAMBDA,
            "mode": mode,
            "fisher": dict(zip(self.params, self.fisher, strict=True)),
            **more,
        }
        if name == "sgd":
            self.optimizer: Any = EWCSGD(self.params, momentum=MOMENTUM, **settings)
        else:
            self.optimizer = EWCAdamW(self.params, weight_decay=0.01, **settings)

    def step(self) -> None:
        if self.backend is None:
            self.optimizer.step()
            return
        with dispatch.use_backend(self.backend):
            self.optimizer.step()


class Autograd(Arm):
    """The penalty as a loss term, as users write it."""

    def __init__(self, name: str, flags: dict[str, Any], shared: Shared) -> None:
        super().__init__(shared)
        self.optimizer = self.torch_optimizer(name, **flags)

    def prepare(self) -> None:
        # The backward adds to the gradients, so they have to be fresh in every round.
        torch._foreach_copy_(self.copies, self.grads)
        for param, grad in zip(self.params, self.copies, strict=True):
            param.grad = grad

    def step(self) -> None:
        penalty = torch.zeros((), device=self.params[0].device)
        for param, fisher, anchor in zip(self.params, self.fisher, self.anchor, strict=True):
            penalty = penalty + (fisher * (param - anchor).square()).sum()
        (0.5 * LAMBDA * penalty).backward()
        self.optimizer.step()


class Plain(Arm):
    """The step of torch without any pull."""

    def __init__(self, name: str, flags: dict[str, Any], shared: Shared) -> None:
        super().__init__(shared)
        self.optimizer = self.torch_optimizer(name, **flags)

    def step(self) -> None:
        self.optimizer.step()


class ClosedForm(Arm):
    """The penalty's gradient written down, with the foreach operations."""

    def __init__(self, name: str, flags: dict[str, Any], shared: Shared) -> None:
        super().__init__(shared)
        self.optimizer = self.torch_optimizer(name, **flags)

    prepare = Autograd.prepare

    @torch.no_grad()
    def step(self) -> None:
        drift = torch._foreach_sub(self.params, self.anchor)
        pull = torch._foreach_mul(drift, self.fisher)
        # Σ F d² as one dot product a tensor: one read of both, and no temporary.
        value = torch.stack(
            [torch.dot(d.flatten(), p.flatten()) for d, p in zip(drift, pull, strict=True)]
        ).sum()
        self.penalty = 0.5 * LAMBDA * value
        torch._foreach_add_([p.grad for p in self.params], pull, alpha=LAMBDA)
        self.optimizer.step()


class Compiled(Arm):
    """torch.compile of the closed-form step, written so that Inductor can fuse all of it."""

    def __init__(self, name: str, shared: Shared, **how: Any) -> None:
        super().__init__(shared)
        self.moments = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params] if name == "adamw" else []
        self.count = torch.zeros((), device=self.params[0].device)
        self.function = torch.compile(_sgd if name == "sgd" else _adamw, dynamic=False, **how)
        start = time.perf_counter()
        self.step()
        self.compile_seconds = time.perf_counter() - start

    def step(self) -> None:
        with torch.no_grad():
            self.count += 1
            state = (self.moments, self.second) if self.second else (self.moments,)
            self.penalty = self.function(
                self.params, self.grads, *state, self.fisher, self.anchor, self.count
            )


def _sgd(
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
    fishers: list[Tensor],
    anchors: list[Tensor],
    _: Tensor,
) -> Tensor:
    total = torch.zeros((), device=params[0].device)
    for p, g, m, f, a in zip(params, grads, moments, fishers, anchors, strict=True):
        pull = f * (p - a)
        total = total + (pull * (p - a)).sum(dtype=torch.float32)
        m.copy_(MOMENTUM * m + g + LAMBDA * pull)
        p.copy_(p - LR * m)
    return 0.5 * LAMBDA * total


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
    seconds: list[Tensor],
    fishers: list[Tensor],
    anchors: list[Tensor],
    count: Tensor,
) -> Tensor:
    total = torch.zeros((), device=params[0].device)
    correction = 1 - 0.9**count
    root = (1 - 0.999**count).sqrt()
    for p, g, m, v, f, a in zip(params, grads, moments, seconds, fishers, anchors, strict=True):
        pull = f * (p - a)
        total = total + (pull * (p - a)).sum(dtype=torch.float32)
        direction = g + LAMBDA * pull
        m.copy_(0.9 * m + 0.1 * direction)
        v.copy_(0.999 * v + 0.001 * direction * direction)
        p.copy_(p * (1 - LR * 0.01) - LR * (m / correction) / (v.sqrt() / root + 1e-8))
    return 0.5 * LAMBDA * total


class Graphed(Arm):
    """Another arm's step, captured once and replayed."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                arm.prepare()
                arm.step()
        torch.cuda.current_stream().wait_stream(side)
        arm.prepare()
        with torch.cuda.graph(self.graph):
            arm.step()

    def prepare(self) -> None:
        self.arm.prepare()

    def step(self) -> None:
        self.graph.replay()


class Copy(Arm):
    """The floor of a GPU: a copy that reads and writes as many bytes as one step."""

    def __init__(self, name: str, shared: Shared) -> None:
        elements = sum(t.numel() for t in shared.grads)
        taken = STREAMS[name] * elements * shared.grads[0].element_size()
        self.source = torch.empty(taken // 2, dtype=torch.uint8, device=shared.grads[0].device)
        self.target = torch.empty_like(self.source)

    def prepare(self) -> None:
        pass

    def step(self) -> None:
        self.target.copy_(self.source)


class Stream(Arm):
    """The floor: the bytes of one step and no arithmetic. SGD 5 streams, 2 written; AdamW 6, 3."""

    def __init__(self, name: str, shared: Shared) -> None:
        elements = sum(t.numel() for t in shared.grads)
        dtype = shared.grads[0].dtype
        made = [torch.randn(elements + elements % 2).to(dtype) for _ in range(6)]
        self.read, self.written = made[:3], made[3 : 5 if name == "sgd" else 6]

    def prepare(self) -> None:
        pass

    def step(self) -> None:
        native.memory_stream(self.read, self.written)


def arms(name: str, shared: Shared) -> dict[str, Callable[[], Arm]]:
    """How to make each arm."""
    flags: dict[str, dict[str, Any]] = {
        "for-loop": {"foreach": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }
    made: dict[str, Callable[[], Arm]] = {
        "bdu": lambda: Fused(name, "gradient", shared),
        "bdu proximal": lambda: Fused(name, "proximal", shared),
    }
    for flag, given in flags.items():
        made[f"autograd + {flag}"] = lambda given=given: Autograd(name, given, shared)
    for flag in ("foreach", "fused"):
        given = flags[flag]
        made[f"closed form + {flag}"] = lambda given=given: ClosedForm(name, given, shared)
    made["plain + fused"] = lambda: Plain(name, flags["fused"], shared)
    if len(shared.grads) <= 1000:
        # Ten thousand tensors would make one graph of half a million nodes.
        made["compiled closed form"] = lambda: Compiled(name, shared)
    if shared.grads[0].device.type == "cpu":
        made["streaming limit"] = lambda: Stream(name, shared)
        return made
    if dispatch.absence("cuda") is None:
        made["bdu triton"] = lambda: Fused(name, "gradient", shared, "triton")
    made["bdu, graph"] = lambda: Graphed(Fused(name, "gradient", shared, capturable=True))
    capturable = {"fused": True} | ({"capturable": True} if name == "adamw" else {})
    made["closed form + fused, graph"] = lambda: Graphed(ClosedForm(name, capturable, shared))
    if len(shared.grads) <= 1000:
        made["compiled closed form, reduce-overhead"] = lambda: Compiled(
            name, shared, mode="reduce-overhead"
        )
        made["compiled closed form, combo kernels"] = lambda: Compiled(
            name, shared, options={"combo_kernels": True}
        )
    made["streaming limit"] = lambda: Copy(name, shared)
    return made


def timed(it: Arm, device: torch.device) -> tuple[float, float]:
    """Seconds of one step, and of the host until it returns; both the same on a CPU."""
    it.prepare()
    if device.type == "cpu":
        start = time.perf_counter()
        it.step()
        seconds = time.perf_counter() - start
        return seconds, seconds
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    it.step()
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, host


def measure(
    name: str, shape_name: str, dtype_name: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Interleave all arms of one case; one row an arm."""
    rounds, device = options.rounds, torch.device(options.device)
    shared = Shared(SHAPES[shape_name](), DTYPES[dtype_name], device)
    made: dict[str, Arm] = {}
    failed: list[str] = []
    makers = arms(name, shared)
    for arm, make in tqdm(makers.items(), desc=f"{name} {shape_name} {dtype_name}", leave=False):
        if options.arm is None or options.arm in arm or arm in ("bdu", "streaming limit"):
            try:
                made[arm] = make()
            except Exception as error:  # an arm that torch cannot run must not hide the others
                if arm.startswith("bdu"):
                    raise
                failed.append(arm)
                print(f"{arm}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in made}
    gc.disable()
    for round_number in range(rounds + 2):
        for arm, it in made.items():
            seconds = timed(it, device)
            if round_number >= 2:  # the first rounds warm caches and allocate state
                times[arm].append(seconds)
    gc.enable()
    elements = sum(t.numel() for t in shared.grads)
    gigabytes = STREAMS[name] * elements * shared.grads[0].element_size() / 1e9
    ours = statistics.median(seconds for seconds, _ in times["bdu"])
    limit = statistics.median(seconds for seconds, _ in times["streaming limit"])
    rows = []
    for arm, it in made.items():
        median = statistics.median(seconds for seconds, _ in times[arm])
        quartiles = statistics.quantiles([seconds for seconds, _ in times[arm]], n=4)
        row = {
            "optimizer": name,
            "shapes": shape_name,
            "dtype": dtype_name,
            "arm": arm,
            "median_ms": 1e3 * median,
            "quartile_range_ms": 1e3 * (quartiles[2] - quartiles[0]),
            "host_ms": 1e3 * statistics.median(host for _, host in times[arm]),
            "ratio": median / ours,
            "minimum_bytes_per_s": 1e9 * gigabytes / median,
            "share_of_limit": limit / median,
            "rounds": rounds,
        }
        if isinstance(it, Compiled):
            row["compile_seconds"] = it.compile_seconds
        rows.append(row)
    return rows + [
        {"optimizer": name, "shapes": shape_name, "dtype": dtype_name, "arm": arm, "ratio": None}
        for arm in failed
    ]


def peak_memory(name: str, shape_name: str, dtype_name: str, arm: str) -> int:
    """Bytes that a GPU held at most for an arm, beyond parameters, gradients, F and anchor."""
    shared = Shared(SHAPES[shape_name](), DTYPES[dtype_name], torch.device("cuda"))
    shared.copies = shared.grads
    base = torch.cuda.memory_allocated()
    made = arms(name, shared)[arm]()
    params = sum(p.nbytes for p in made.params)
    for _ in range(3):
        made.prepare()
        made.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base - params


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to place the figures."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "instruction_set": native.library().instruction_set(),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
        "commit": commit,
        "date": date.today().isoformat(),
    }


def table(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"Device: {where['device']}, {where['threads']} threads, {where['instruction_set']}; "
        f"torch {where['versions']['torch']}; commit {where['commit']}; {where['date']}; "
        f"load average at the start {where['load_average']:.1f}.",
        "",
        "`ratio` is the arm's median over bdu's: above 1 bdu is faster. `limit` is the share of "
        "the streaming limit that the arm reaches, GB/s those of the fewest bytes that a step can "
        "move.",
        "",
        "| optimizer | shapes | dtype | arm | median ms | quartile range | host ms | ratio | GB/s "
        "| limit |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["ratio"] is None:
            lines.append(
                f"| {row['optimizer']} | {row['shapes']} | {row['dtype']} | {row['arm']} "
                "| did not run ||||||"
            )
            continue
        compile_time = (
            f" ({row['compile_seconds']:.0f} s to compile)" if "compile_seconds" in row else ""
        )
        lines.append(
            f"| {row['optimizer']} | {row['shapes']} | {row['dtype']} | {row['arm']}{compile_time} "
            f"| {row['median_ms']:.3f} | {row['quartile_range_ms']:.3f} | {row['host_ms']:.3f} "
            f"| {row['ratio']:.2f} | {row['minimum_bytes_per_s'] / 1e9:.0f} "
            f"| {row['share_of_limit']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what was asked for, print the table, write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, action="append")
    parser.add_argument("--shapes", choices=sorted(SHAPES), action="append")
    parser.add_argument("--dtype", choices=sorted(DTYPES), action="append")
    parser.add_argument("--arm", default=None, help="only arms whose name holds this, and bdu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--peak-memory", action="store_true", help="print the bytes of --arm alone, on a GPU"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--markdown", type=Path, default=None, metavar="FILE")
    options = parser.parse_args()
    if options.peak_memory:
        case = (options.optimizer[0], options.shapes[0], options.dtype[0], options.arm)
        print(peak_memory(*case))
        return
    where = environment(options.device)
    rows: list[dict[str, Any]] = []
    for shape_name in options.shapes or (ON_CPU if options.device == "cpu" else ON_GPU):
        for dtype_name in options.dtype or DTYPES:
            for name in options.optimizer or OPTIMIZERS:
                rows += measure(name, shape_name, dtype_name, options)
                gc.collect()
                if options.device == "cuda":
                    torch._dynamo.reset()
                    torch.cuda.empty_cache()
                if options.json is not None:
                    atomic_write(options.json, json.dumps(rows, indent=1) + "\n")
    text = table(rows, where)
    print(text)
    if options.markdown is not None:
        atomic_write(options.markdown, text)


if __name__ == "__main__":
    main()
