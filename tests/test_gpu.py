"""What only a CUDA device can show. On a machine without one, these are counted as not run.

``-k sanitize`` picks those that are worth running under compute-sanitizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backends import COLUMNS, Problem, make
from torch import Tensor, nn

from bdu import dispatch, ops
from bdu.optim import EWCSGD, EWCAdamW
from bdu.quantization import quantize
from bdu.rounding import Rounding
from bdu.trainer import unlearn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BACKENDS = [b for b in ("cuda", "triton") if dispatch.absence(b) is None]
BOTH = pytest.mark.parametrize("cls", [EWCSGD, EWCAdamW])
ON_BOTH_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
OPERATIONS = ("ewc_sgd_step", "ewc_adamw_step")
SHAPES = [(), (0,), (1,), (63,), (1024,), (1025,), (3, 5, 7), (40_001,), (2, 3, 33)]


class Interrupted(Exception):
    """Raised by a callback."""


@pytest.mark.parametrize("method", ["tbar", "bi-bau"])
def test_a_resumed_defence_finds_what_it_kept_on_its_device(method, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)).cuda()
    options: dict[str, Any] = {"clean": (torch.rand(60, 1, 8, 8), torch.arange(60) % 4)}
    options |= {"inversion_steps": 8, "epochs": 2, "state_file": tmp_path / "state.pt"}
    looks: list[Any] = []

    def stop(line: Any, _: nn.Module) -> None:
        looks.append(line)
        if len(looks) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        unlearn(model, method=method, callbacks=[stop], progress=False, **options)
    resumed = unlearn(model, method=method, resume=True, progress=False, **options)
    assert next(resumed.model.parameters()).is_cuda


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(
    operation: str, problem: Problem, backend: str, device: str = "cuda", **more: Any
) -> Tensor:
    columns = {name: problem[name] for name in COLUMNS[operation]}
    if "fisher_scale" in problem:
        columns["fisher_scale"] = problem["fisher_scale"]
    table = ops.ParameterTable(problem["param"], columns)
    hyper = {"lr": 0.1, "ewc_lambda": 0.7, "weight_decay": 0.01} | more
    if operation == "ewc_sgd_step":
        hyper["momentum"] = 0.9
    extra = (torch.full((len(problem["param"]),), 3.0, device=device),)
    with dispatch.use_backend(backend):
        return getattr(ops, operation)(
            table, problem["grad"], *(extra if operation == "ewc_adamw_step" else ()), **hyper
        )


def moved(problem: Problem, device: str) -> Problem:
    return {
        name: [None if t is None else t.to(device) for t in column]
        for name, column in problem.items()
    }


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["proximal", "gradient"])
def test_sanitize_the_device_computes_the_bits_that_the_host_computes(operation, dtype, mode):
    """The same source: expm1 apart, which AdamW's bias corrections take, there is no freedom."""
    problem = make(SHAPES, dtype, operation)
    host, device = moved(problem, "cpu"), moved(problem, "cuda")
    expected = step(operation, host, "cuda", "cpu", mode=mode)
    actual = step(operation, device, "cuda", mode=mode)
    rtol = 0.0 if operation == "ewc_sgd_step" else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0)
    for name, column in host.items():
        for mine, theirs in zip(device[name], column, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("rounding", [None, Rounding(3, 4)])
def test_sanitize_a_fisher_in_8_bits_and_odd_views(rounding):
    problem = make([(4096,), (5_001,), (33,)], torch.bfloat16)
    codes = [quantize(f, "square_root") for f in problem["fisher"]]
    problem["fisher"] = [q.codes for q in codes]
    problem["fisher_scale"] = [q.scale for q in codes]
    host, device = moved(problem, "cpu"), moved(problem, "cuda")
    # Not aligned to 16 bytes.
    storage = torch.zeros(5_002, dtype=torch.bfloat16, device="cuda")
    storage[1:] = device["param"][1]
    device["param"][1] = storage[1:]
    step("ewc_sgd_step", host, "cuda", "cpu", rounding=rounding)
    step("ewc_sgd_step", device, "cuda", rounding=rounding)
    for mine, theirs in zip(device["param"], host["param"], strict=True):
        assert torch.equal(mine.cpu(), theirs)


@ON_BOTH_BACKENDS
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_rerun_gives_the_same_bits(operation, backend):
    problem = make([(1_000_003,), *SHAPES], torch.float32, operation)
    penalties, params = [], []
    for _ in range(3):
        own = moved(problem, "cuda")
        own = {name: [t.clone() for t in column] for name, column in own.items()}
        penalties.append(step(operation, own, backend))
        params.append(own["param"][0])
    assert torch.equal(penalties[0], penalties[1])
    assert torch.equal(penalties[0], penalties[2])
    assert torch.equal(params[0], params[1])


@ON_BOTH_BACKENDS
@pytest.mark.parametrize("operation", OPERATIONS)
def test_more_elements_than_32_bits_count(operation, backend):
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB")
    elements = 2**31 + 77
    names = ("param", "grad", *COLUMNS[operation])
    problem = {n: [torch.zeros(elements, dtype=torch.bfloat16, device="cuda")] for n in names}
    problem["grad"][0][-5:] = 1.0
    problem["fisher"][0][-1] = 2.0
    problem["anchor"][0][-1] = 1.0
    penalty = step(operation, problem, backend, weight_decay=0.0)
    assert penalty.item() == pytest.approx(0.5 * 0.7 * 2.0)
    assert (problem["param"][0][:-5] == 0).all()
    assert (problem["param"][0][-5:] != 0).all()


# The optimizers


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(50, 200), nn.ReLU(), nn.Linear(200, 10)).to("cuda", dtype)


def optimizer_of(cls: Any, model: nn.Module, **more: Any) -> Any:
    torch.manual_seed(1)
    fisher = {name: torch.randn_like(p, dtype=torch.float32).square()
              for name, p in model.named_parameters()}  # fmt: skip
    settings = {"lr": 0.01, "ewc_lambda": 1.0, "fisher": fisher} | more
    return cls(model.named_parameters(), **settings)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(16, 50, generator=generator, device="cuda")
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@BOTH
@ON_BOTH_BACKENDS
def test_nothing_in_a_step_waits_for_the_device(cls, backend):
    model = network()
    optimizer = optimizer_of(cls, model, max_grad_norm=1.0)
    with dispatch.use_backend(backend):
        for number in range(3):
            loss_of(model, number).backward()
            with no_waiting():
                optimizer.grad_scale = torch.ones((), device="cuda")
                optimizer.found_inf = torch.zeros((), device="cuda")
                optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            optimizer.zero_grad()


@BOTH
@ON_BOTH_BACKENDS
def test_a_scaler_that_finds_an_infinity_keeps_the_step_from_writing(cls, backend):
    model = network()
    optimizer = optimizer_of(cls, model)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    with dispatch.use_backend(backend):
        scaler.scale(loss_of(model, 0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        before = weights(model)
        scaler.scale(loss_of(model, 1)).backward()
        model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weights(model), before)
        assert scaler.get_scale() == 2.0
        if cls is EWCAdamW:
            assert optimizer.state[model[0].weight]["step"].item() == 1
        optimizer.zero_grad()
        scaler.scale(loss_of(model, 2)).backward()
        scaler.step(optimizer)
        assert not torch.equal(weights(model), before)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_replays_as_it_runs(cls, dtype):
    if "cuda" not in BACKENDS:
        pytest.skip("the compiled kernels are not there")
    lr = torch.tensor(0.01, device="cuda")
    more = {"lr": lr, "capturable": True, "stochastic_rounding": 5, "max_grad_norm": 1.0}
    captured, plain = network(dtype), network(dtype)
    a = optimizer_of(cls, captured, **more)
    b = optimizer_of(cls, plain, **more | {"lr": 0.01, "capturable": False})
    for model in (captured, plain):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    def fill(model: nn.Module, seed: int) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad.copy_(torch.randn_like(p))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in range(2):
            fill(captured, seed)
            a.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for seed in range(2):
        fill(plain, seed)
        b.step()
    for seed in range(2, 6):
        new = 0.01 * seed
        lr.fill_(new)
        b.param_groups[0]["lr"] = new
        fill(captured, seed)
        fill(plain, seed)
        graph.replay()
        b.step()
        torch.testing.assert_close(a.penalty, b.penalty, rtol=1e-4, atol=1e-6)
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(weights(captured), weights(plain), rtol=rtol, atol=1e-6)


@BOTH
def test_a_capture_with_numbers_of_the_host_is_refused_by_name(cls):
    model = network()
    optimizer = optimizer_of(cls, model)
    loss_of(model, 0).backward()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="capturable: expected True for a step in a CUDA graph"),
        torch.cuda.graph(graph),
    ):
        optimizer.step()
    torch.cuda.synchronize()


@BOTH
@ON_BOTH_BACKENDS
def test_a_step_runs_on_the_current_stream(cls, backend):
    model = network()
    optimizer = optimizer_of(cls, model)
    with dispatch.use_backend(backend):
        loss_of(model, 0).backward()
        optimizer.step()
        before = weights(model)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            optimizer.step()
            after = weights(model)
        # The step waits behind the sleep of its own stream and not of another.
        assert torch.equal(weights(model), before) or not side.query()
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(weights(model), after)


@BOTH
def test_the_backend_on_a_gpu_is_the_compiled_one(cls):
    model = network()
    optimizer = optimizer_of(cls, model)
    loss_of(model, 0).backward()
    optimizer.step()
    assert dispatch.choose("ewc_sgd_step", "cuda", {torch.float32}) == BACKENDS[0]
    assert optimizer.penalty.device.type == "cuda"
