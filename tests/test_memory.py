"""The memory plan says what is allocated later, to the byte, and `--dry-run` writes nothing."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from bdu import memory_plan
from bdu.checkpoint import save_state_dict
from bdu.cli import main
from bdu.data import save_npz
from bdu.models import build
from bdu.optim import EWCSGD, EWCAdamW, release, release_gradients
from bdu.trainer import METHODS

KINDS = {
    "sgd": lambda params, **more: EWCSGD(params, **more),
    "sgd with momentum": lambda params, **more: EWCSGD(params, momentum=0.9, **more),
    "adamw": lambda params, **more: EWCAdamW(params, **more),
}


class Net(nn.Module):
    """Large and small tensors; tied and frozen ones, and buffers of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(300, 256)
        self.first = nn.Linear(256, 1003)
        self.norm = nn.BatchNorm1d(1003)
        self.second = nn.Linear(1003, 256)
        self.narrow = nn.Linear(256, 15)  # 3,840 elements: no 8 bits
        self.frozen = nn.Linear(15, 15).requires_grad_(False)
        self.head = nn.Linear(256, 300)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(self.embed(tokens))))
        return self.head(x).sum() + self.frozen(self.narrow(x)).sum()


def fisher_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.rand(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def made(kind: str, model: nn.Module, **settings: Any) -> Any:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return KINDS[kind](trained, ewc_lambda=1.0, **settings)


def planned(kind: str, model: nn.Module, **settings: Any) -> Any:
    momentum = {"momentum": 0.9} if "momentum" in kind else {}
    return memory_plan(model, kind.split()[0], **momentum, **settings)


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def held(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """What is allocated after a step."""
    states = list(optimizer.state.values())
    # The last is a few numbers a tensor, and in the host's memory.
    ewc = ("fisher", "fisher_scale", "anchor", "fisher_strides")
    return {
        "parameters": bytes_of(model.parameters()),
        "buffers": bytes_of(model.buffers()),
        "gradients": bytes_of(p.grad for p in model.parameters() if p.grad is not None),
        "fisher": bytes_of(s[key] for s in states for key in ewc[:2] if key in s),
        "anchor": bytes_of(s["anchor"] for s in states if "anchor" in s),
        "moments": bytes_of(v for s in states for key, v in s.items() if key not in ewc),
    }


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.arange(8)).backward()
    optimizer.step()


# To the byte


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("fisher_dtype", "anchor_dtype"),
    [
        (None, None),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, None),
        (torch.float64, None),
        ("8bit", torch.bfloat16),
        ("8bit_logarithmic", None),
    ],
    ids=str,
)
def test_the_plan_is_what_a_step_allocates(
    kind: str, dtype: torch.dtype, fisher_dtype: Any, anchor_dtype: torch.dtype | None
) -> None:
    model = Net().to(dtype)
    dtypes = {"fisher_dtype": fisher_dtype, "anchor_dtype": anchor_dtype}
    plan = planned(kind, model, **dtypes)
    optimizer = made(kind, model, fisher=fisher_of(model), **dtypes)
    step(model, optimizer)
    known = held(model, optimizer)
    assert {part: getattr(plan, part) for part in known} == known
    assert plan.total_bytes == sum(known.values())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert plan.anchored == sum(p.numel() for p in trained)
    assert plan.elements == plan.anchored + 15 * 15 + 15
    per_parameter = (known["fisher"] + known["anchor"]) / plan.anchored
    assert plan.ewc_bytes_per_parameter == per_parameter
    more = planned(kind, model, copies=2, **dtypes)
    assert more.copies == 2 * (known["parameters"] + known["buffers"])
    assert more.total_bytes == plan.total_bytes + more.copies


def test_8_bits_and_a_bfloat16_anchor_take_little_more_than_three_bytes() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(100)])
    plan = memory_plan(
        model, fisher_dtype="8bit", anchor_dtype=torch.bfloat16, release_gradients=True
    )
    assert plan.ewc_bytes_per_parameter == pytest.approx(3 + 2 / 32, abs=1e-3)
    assert plan.gradients == 4096 * 4096 * 4 + 100 * 4096 * 4


def test_nothing_is_allocated_and_the_device_does_not_matter() -> None:
    with torch.device("meta"):
        abstract = Net()
        optimizer = made("sgd with momentum", abstract, fisher_dtype="8bit")
    settings = {"momentum": 0.9, "fisher_dtype": "8bit"}
    plan = memory_plan(abstract, **settings)
    assert plan == memory_plan(Net(), **settings) == memory_plan(abstract, optimizer)
    assert not optimizer.state
    with torch.device("meta"):
        huge = nn.Linear(2**20, 2**20)
    assert memory_plan(huge, "adamw").total_bytes > 24 * 2**40


def test_the_most_that_lives_with_gradient_release_is_planned() -> None:
    model = nn.Sequential(
        *[layer for _ in range(6) for layer in (nn.Linear(300, 300), nn.LayerNorm(300))]
    )
    optimizer = made("sgd", model, fisher=fisher_of(model))
    storages: dict[int, tuple[StorageWeakRef, int]] = {}
    most = 0

    def add_up(p: Tensor) -> None:
        nonlocal most
        storage = p.grad.untyped_storage()
        storages[id(p)] = StorageWeakRef(storage), storage.nbytes()
        most = max(most, sum(size for ref, size in storages.values() if not ref.expired()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(add_up)
    with release_gradients(model, optimizer):
        model(torch.randn(2, 300)).sum().backward()
        optimizer.step()
    plan = memory_plan(model, optimizer, release_gradients=True)
    # The last large one comes when all but one of the small ones, its own bias among them, wait.
    assert 0 <= plan.gradients - most <= 300 * 4
    assert plan.gradients < 0.25 * memory_plan(model, optimizer).gradients


def test_small_gradients_wait_in_bounded_memory() -> None:
    with torch.device("meta"):
        model = nn.ParameterList([torch.empty(1000, dtype=torch.bfloat16) for _ in range(5000)])
    plan = memory_plan(model, release_gradients=True)
    assert plan.gradients == 2 * (release.BATCH + release.SMALL - 2)
    assert memory_plan(model).gradients == 2 * 1000 * 5000


# With an optimizer of one's own


def test_groups_of_an_optimizer_have_their_own_settings() -> None:
    model = nn.ParameterList([torch.ones(10) for _ in range(4)])
    optimizer = EWCSGD(
        [
            {"params": [model[0]], "ewc_lambda": 0.0},
            {"params": [model[1]], "momentum": 0.0, "ewc_lambda": torch.tensor(1.0)},
            {"params": [model[2]], "ewc_lambda": 0.0, "batch_fisher_decay": 0.9},
        ],
        momentum=0.9,
        fisher_dtype=torch.bfloat16,
        anchor_dtype=torch.float16,
    )
    plan = memory_plan(model, optimizer)
    # The averaged F is the optimizer's own, in float32, and its anchor in the parameter's dtype.
    assert (plan.fisher, plan.anchor, plan.moments) == (20 + 40, 20 + 40, 80)
    assert plan.gradients == 160
    for i, p in enumerate(model):
        p.grad = torch.ones(10)
        if i == 1:
            optimizer.set_anchor(fisher={p: torch.ones(10)})
    optimizer.step()
    known = held(model, optimizer)
    assert {part: getattr(plan, part) for part in known} == known
    # And asked for in other dtypes:
    other = memory_plan(model, optimizer, fisher_dtype=torch.float32, anchor_dtype=torch.bfloat16)
    assert (other.fisher, other.anchor) == (80, 40)


@pytest.mark.parametrize("fisher_dtype", [None, "8bit", torch.float16], ids=str)
def test_state_that_is_there_counts_as_it_is(fisher_dtype: Any) -> None:
    model = Net().to(torch.bfloat16)
    optimizer = EWCAdamW(model.named_parameters(), ewc_lambda=1.0, fisher_dtype=fisher_dtype)
    fisher = fisher_of(model) | {"frozen.weight": torch.ones(15, 15)}
    fisher["second.weight"] = fisher["second.weight"].to(torch.bfloat16)
    anchor = {name: f.float() for name, f in fisher.items()}
    optimizer.set_anchor(fisher=fisher, anchor=anchor)
    # As after loading a state, which keeps its dtypes.
    optimizer.fisher_dtype, optimizer.anchor_dtype = torch.float32, torch.float16
    for p in model.parameters():
        if p.requires_grad:
            moment = torch.zeros_like(p, dtype=torch.float32)
            own = {"step": torch.zeros(()), "exp_avg": moment, "exp_avg_sq": moment.clone()}
            optimizer.state[p].update(own)
    step(model, optimizer)
    plan, known = memory_plan(model, optimizer), held(model, optimizer)
    assert {part: getattr(plan, part) for part in known} == known
    assert plan.anchored == sum(f.numel() for f in fisher.values())
    assert plan.anchor == 4 * plan.anchored


# Refused by name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "lion"}, r'optimizer: expected "sgd", "adamw".*got .lion'),
        ({"optimizer": torch.optim.SGD([torch.ones(1)])}, r'optimizer: expected "sgd"'),
        ({"optimizer": EWCSGD([torch.ones(1)])}, "optimizer: expected parameters of the model"),
        ({"optimizer": "adamw", "momentum": 0.9}, "momentum: expected None"),
        ({"momentum": -0.5}, "momentum"),
        ({"fisher_dtype": "4bit"}, "fisher_dtype: expected a floating dtype"),
        ({"fisher_dtype": torch.int8}, "fisher_dtype: expected a floating dtype"),
        ({"anchor_dtype": "8bit"}, "anchor_dtype: expected a floating dtype"),
        ({"copies": -1}, "copies: expected a number >= 0, got -1"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_plan(nn.Linear(2, 2), **arguments)


def test_models_without_shapes_or_without_trained_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.weight: expected a parameter of known shape"):
        memory_plan(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="model: expected a parameter that requires a gradient"):
        memory_plan(nn.Linear(2, 2).requires_grad_(False))


# The table


def test_the_table_names_every_part_in_gigabytes_and_bytes() -> None:
    with torch.device("meta"):
        model = nn.Linear(20_000, 50_000, bias=False).to(torch.bfloat16)
    plan = memory_plan(model, "sgd", fisher_dtype="8bit", momentum=0.9, copies=1)
    rows = {line.split()[0]: line.split()[1:] for line in str(plan).splitlines()[1:-1]}
    assert rows == {
        "parameters": ["2.000", "2,000,000,000", "2.000"],
        "gradients": ["2.000", "2,000,000,000", "2.000"],
        "fisher": ["1.062", "1,062,500,000", "1.062"],
        "anchor": ["2.000", "2,000,000,000", "2.000"],
        "moments": ["2.000", "2,000,000,000", "2.000"],
        "copies": ["2.000", "2,000,000,000", "2.000"],
        "total": ["11.062", "11,062,500,000", "11.062"],
    }
    assert "takes 3.062 bytes for each" in str(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.fisher = 0


# bdu unlearn --dry-run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    generator = np.random.default_rng(0)
    x = generator.integers(0, 255, (60, 8, 8, 1), dtype=np.uint8)
    save_npz(folder / "clean.npz", x=x, y=np.arange(60) % 3)
    save_npz(folder / "triggered.npz", x=x[:20], y=np.ones(20, np.int64))
    model = build("smallcnn", num_classes=3, in_channels=1, seed=0)
    save_state_dict(folder / "model.safetensors", model.state_dict())
    return folder


def dry_run(inputs: Path, out: Path, *more: str) -> list[str]:
    return [
        *("unlearn", "--model", "smallcnn", "--checkpoint", str(inputs / "model.safetensors")),
        *("--clean", str(inputs / "clean.npz"), "--triggered", str(inputs / "triggered.npz")),
        *("--set", "unlearn_steps=2", "--set", "recovery_steps=0", "--quiet", "--device", "cpu"),
        *("--out", str(out), "--dry-run", *more),
    ]


def total(text: str) -> int:
    return int(re.search(r"^total +\S+ +(\S+)", text, re.M)[1].replace(",", ""))


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated = ("--eval-data", str(inputs / "clean.npz"), "--attack", "badnets", "--target", "1")
    assert main(dry_run(inputs, tmp_path / "run", *evaluated)) == 0
    printed = capsys.readouterr().out
    assert "clean accuracy" in printed
    assert list(tmp_path.iterdir()) == []
    elements = sum(
        p.numel() for p in build("smallcnn", num_classes=3, in_channels=1, seed=0).parameters()
    )
    # θ, gradient, F, θ*, momentum and five copies, and the buffers that stand among the copies.
    assert 40 * elements <= total(printed) < 40.5 * elements
    for setting in ("radius=0", "forget=cross_entropy"):
        assert main(dry_run(inputs, tmp_path / "run", "--set", setting)) == 0
        assert 32 * elements <= total(capsys.readouterr().out) < 32.5 * elements
    assert main(dry_run(inputs, tmp_path / "run", "--set", "ewc_lambda=0")) == 0
    printed = capsys.readouterr().out
    assert "fisher " not in printed.split("parameters;")[0]
    assert 32 * elements <= total(printed) < 32.5 * elements


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"balanced"}))
def test_a_dry_run_knows_every_method(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    command = [*dry_run(inputs, tmp_path / "run", "--method", method)]
    del command[command.index("--set") : command.index("--quiet")]
    totals = []
    for more in ([], ["--set", "anchored=true"]):
        assert main([*command, *more]) == 0
        totals.append(total(capsys.readouterr().out))
    elements = sum(
        p.numel() for p in build("smallcnn", num_classes=3, in_channels=1, seed=0).parameters()
    )
    assert totals[0] >= (1 + 1 + 1 + 3) * 4 * elements  # θ, gradient, a moment, copies
    assert totals[1] == totals[0] + 8 * elements  # F and θ*
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--set", "speed=3"), "speed: expected one of"),
        (("--clean", "absent.npz"), "absent.npz"),
        (("--checkpoint", "absent.pt"), "absent.pt"),
        (("--attack", "badnets"), "--target: expected"),
    ],
)
def test_a_dry_run_checks_the_inputs(
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    assert main(dry_run(inputs, tmp_path / "run", *more)) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_looks_at_the_folder_as_the_run_would(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = dry_run(inputs, tmp_path / "run")
    wet = [argument for argument in dry if argument != "--dry-run"]
    assert main(wet) == 0
    assert "dry_run" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for arguments in (dry, wet):
        assert main(arguments) == 1
        assert "holds a run already" in capsys.readouterr().err
    assert main([*dry, "--resume"]) == 0
    assert main([*dry, "--resume", "--seed", "1"]) == 1
    assert "resume: expected the settings" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
