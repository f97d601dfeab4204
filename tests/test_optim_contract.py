"""What torch.optim promises beside the formula, and that a step that fails changes nothing."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from bdu import dispatch
from bdu.optim import EWCSGD, EWCAdamW

BOTH = pytest.mark.parametrize("cls", [EWCSGD, EWCAdamW])
THEIRS = {EWCSGD: torch.optim.SGD, EWCAdamW: torch.optim.AdamW}


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def backward(model: nn.Module, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, generator=generator).to(next(model.parameters()).dtype)
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def fisher_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.linspace(0.1, 2, p.numel()).reshape(p.shape)
        for name, p in model.named_parameters()
    }


def attached(
    cls: Any, model: nn.Module | None = None, **settings: Any
) -> tuple[nn.Module, EWCSGD | EWCAdamW]:
    """An optimizer with momentum and a pull, after one step, with gradients for the next."""
    model = make_model() if model is None else model
    if cls is EWCSGD:
        settings = {"momentum": 0.9, **settings}
    optimizer = cls(
        model.named_parameters(),
        **{"lr": 0.05, "ewc_lambda": 2.0, "fisher": fisher_of(model), **settings},
    )
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, seed=2)
    return model, optimizer


def everything(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Copies of all parameters and of all their state, to be compared bit by bit."""
    kept: list[Any] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            kept.append(p.detach().clone())
            kept.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()})
    return kept


def assert_same(before: list[Any], after: list[Any]) -> None:
    for b, a in zip(before, after, strict=True):
        if isinstance(b, Tensor):
            assert torch.equal(b, a)
            continue
        assert b.keys() == a.keys()
        for key in b:
            assert torch.equal(b[key], a[key]) if isinstance(b[key], Tensor) else b[key] == a[key]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def check_next_step_is_right(
    cls: Any, disturb: Callable[[Any, Any], None], **settings: Any
) -> None:
    """``disturb`` moves things about without changing a value: the next steps must not notice."""
    model, optimizer = attached(cls, **settings)
    expected_model, expected = attached(cls, **settings)
    for seed in (3, 4):
        disturb(model, optimizer)
        for m, o in ((model, optimizer), (expected_model, expected)):
            o.step()
            o.zero_grad()
            backward(m, seed)
    for own, known in zip(everything(optimizer), everything(expected), strict=True):
        # Not bit by bit: another layout may be multiplied in another order.
        torch.testing.assert_close(own, known)


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that need a backend of their own choice for float64."""
    monkeypatch.delenv("BDU_BACKEND", raising=False)


# Construction


@BOTH
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"ewc_lambda": -1.0}, "ewc_lambda"),
        ({"ewc_lambda": math.inf}, "ewc_lambda"),
        ({"mode": "implicit"}, "mode"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"batch_fisher_decay": 1.0}, "batch_fisher_decay"),
        ({"anchor": {}}, "anchor"),
    ],
    ids=str,
)
def test_an_argument_out_of_range_is_named(cls: Any, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        cls([Parameter(torch.ones(2))], **settings)
    if named != "max_grad_norm" and named != "anchor":
        optimizer = cls([Parameter(torch.ones(2))])
        with pytest.raises(ValueError, match=named):
            optimizer.add_param_group({"params": [Parameter(torch.ones(2))], **settings})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("cls", "settings", "named"),
    [
        (EWCSGD, {"momentum": -0.5}, "momentum"),
        (EWCSGD, {"nesterov": True}, "nesterov"),
        (EWCSGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov"),
        (EWCAdamW, {"betas": (1.0, 0.9)}, r"betas\[0\]"),
        (EWCAdamW, {"eps": -1e-8}, "eps"),
        (EWCAdamW, {"amsgrad": True}, "amsgrad"),
    ],
)
def test_an_argument_of_one_optimizer_out_of_range_is_named(
    cls: Any, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        cls([Parameter(torch.ones(2))], **settings)


@BOTH
def test_flags_of_torch_are_taken_or_refused_by_name(cls: Any) -> None:
    cls([Parameter(torch.ones(2))], foreach=True, fused=False)
    cls([Parameter(torch.ones(2))], fused=True, capturable=False, differentiable=False)
    cls([Parameter(torch.ones(2))], capturable=True)
    for flags in ({"foreach": True, "fused": True}, {"differentiable": True}):
        with pytest.raises(RuntimeError, match=next(iter(flags))):
            cls([Parameter(torch.ones(2))], **flags)


@BOTH
def test_complex_parameters_and_repeated_ones_are_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match="complex parameters are not supported"):
        cls([Parameter(torch.ones(2, dtype=torch.complex64))])
    p = Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="once"):
        cls([p, p])


@BOTH
def test_groups_keep_their_own_settings(cls: Any) -> None:
    a, b = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = cls([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.1, weight_decay=0.0)
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((3,), 0.5))
    torch.testing.assert_close(b.detach(), torch.full((3,), 0.9))


# Fisher and anchor


@BOTH
def test_a_fisher_by_name_and_one_by_parameter_do_the_same(cls: Any) -> None:
    model, by_name = attached(cls)
    other = make_model()
    names = fisher_of(other)
    fisher = {p: names[name] for name, p in other.named_parameters()}
    settings = {"momentum": 0.9} if cls is EWCSGD else {}
    # As Hugging Face's Trainer passes them: unnamed, in two groups.
    decay = [p for p in other.parameters() if p.ndim > 1]
    rest = [p for p in other.parameters() if p.ndim <= 1]
    by_parameter = cls(
        [{"params": decay}, {"params": rest}], lr=0.05, ewc_lambda=2.0, fisher=fisher, **settings
    )
    backward(other)
    by_parameter.step()
    by_parameter.zero_grad()
    backward(other, seed=2)
    by_name.step()
    by_parameter.step()
    for own, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, expected)


@BOTH
def test_names_need_named_parameters(cls: Any) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="made without names"):
        cls(model.parameters(), ewc_lambda=1.0, fisher=fisher_of(model))


@BOTH
@pytest.mark.parametrize("how", ["negative", "nan", "inf", "shape", "integers", "missing", "alien"])
def test_a_bad_fisher_is_refused_and_the_old_one_stays(cls: Any, how: str) -> None:
    _, optimizer = attached(cls)
    fisher = fisher_of(make_model())
    name = "2.bias"
    if how == "shape":
        fisher[name] = fisher[name][:1]
    elif how == "integers":
        fisher[name] = fisher[name].long()
    elif how == "missing":
        del fisher[name]
    elif how == "alien":
        fisher, name = {"module." + key: value for key, value in fisher.items()}, "fisher"
    else:
        fisher[name][0] = {"negative": -1e-6, "nan": math.nan, "inf": math.inf}[how]
    before = everything(optimizer)
    with pytest.raises(ValueError, match=name):
        optimizer.set_anchor(fisher=fisher)
    assert_same(before, everything(optimizer))


@BOTH
def test_a_bad_fisher_is_found_in_every_unnamed_group(cls: Any) -> None:
    params = [Parameter(torch.ones(2)) for _ in range(3)]
    for bad, param in enumerate(params):
        fisher = {p: torch.ones(2) for p in params}
        fisher[param] = torch.tensor([1.0, math.nan])
        with pytest.raises(ValueError, match=rf"params\[0\] of group {bad}"):
            cls([{"params": [p]} for p in params], fisher=fisher)


@BOTH
def test_a_frozen_parameter_needs_no_fisher(cls: Any) -> None:
    model = make_model()
    model[0].requires_grad_(False)
    fisher = {name: f for name, f in fisher_of(model).items() if not name.startswith("0.")}
    attached(cls, model, fisher=fisher)


@BOTH
def test_a_fisher_that_lies_right_is_not_copied_and_not_written(cls: Any) -> None:
    model = make_model()
    fisher = fisher_of(model)
    kept = copy.deepcopy(fisher)
    _, optimizer = attached(cls, model, fisher=fisher)
    for name, p in model.named_parameters():
        assert optimizer.state[p]["fisher"].data_ptr() == fisher[name].data_ptr()
    optimizer.param_groups[0]["batch_fisher_decay"] = 0.5
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(fisher[name], kept[name])
        assert not torch.equal(optimizer.state[p]["fisher"], kept[name])


@BOTH
def test_an_anchor_in_the_memory_of_the_parameters_is_copied(cls: Any) -> None:
    model = make_model()
    start = copy.deepcopy(model.state_dict())
    _, optimizer = attached(cls, model, anchor=model.state_dict())
    for name, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["anchor"], start[name])


@BOTH
def test_set_anchor_alone_moves_the_anchor_and_keeps_the_fisher(cls: Any) -> None:
    model, optimizer = attached(cls)
    fishers = [optimizer.state[p]["fisher"] for p in model.parameters()]
    optimizer.set_anchor()
    for p, fisher in zip(model.parameters(), fishers, strict=True):
        assert torch.equal(optimizer.state[p]["anchor"], p)
        assert optimizer.state[p]["fisher"] is fisher
    optimizer.step()
    assert float(optimizer.penalty) == 0
    with pytest.raises(ValueError, match="fisher"):
        cls(make_model().parameters()).set_anchor()


@BOTH
def test_a_float64_fisher_does_not_slow_float32_parameters_down(cls: Any) -> None:
    model = make_model()
    fisher = {name: f.double() for name, f in fisher_of(model).items()}
    _, optimizer = attached(cls, model, fisher=fisher)
    assert optimizer.state[model[0].weight]["fisher"].dtype == torch.float32


# A step that fails changes nothing, in no group


def two_groups(cls: Any, **settings: Any) -> tuple[list[Parameter], Any]:
    """The last parameter is in a group of its own, and none has been stepped yet."""
    torch.manual_seed(0)
    params = [Parameter(torch.randn(3)), Parameter(torch.randn(2, 2)), Parameter(torch.randn(4))]
    if cls is EWCSGD:
        settings = {"momentum": 0.9, **settings}
    optimizer = cls(
        [{"params": [("a", params[0]), ("b", params[1])]}, {"params": [("c", params[2])]}],
        lr=0.1,
        **settings,
    )
    for p in params:
        p.grad = torch.randn_like(p)
    return params, optimizer


def break_with(how: str, params: list[Parameter], optimizer: Any) -> None:
    last, group = params[-1], optimizer.param_groups[-1]
    if how == "sparse":
        last.grad = torch.ones(4).to_sparse()
    elif how == "misshapen":
        last.grad.data = torch.ones(2, 2)
    elif how == "nan":
        last.grad[1] = math.nan
    elif how == "lambda":
        group["ewc_lambda"] = -1.0
    elif how == "no fisher":
        group["ewc_lambda"] = 1.0
    elif how == "mode":
        group["mode"] = "implicit"
    elif how == "lr":
        group["lr"] = math.nan
    elif how == "expanded":
        last.data = torch.ones(1).expand(4)
    elif how == "shared":
        group["params"].append(Parameter(last.data[1:]))
        group["param_names"].append("d")
        group["params"][-1].grad = torch.ones(3)
    elif how == "fisher of outsiders":
        group["ewc_lambda"] = 1.0
        optimizer.state[last].update(fisher=torch.ones(5), anchor=torch.ones(4))
    elif how == "no anchor":
        group["ewc_lambda"] = 1.0
        optimizer.state[last]["fisher"] = torch.ones(4)
    elif how == "freed":
        last.grad.untyped_storage().resize_(0)
    elif how == "backend":
        last.data = last.data.double()
        last.grad = torch.ones(4, dtype=torch.float64)


FAILURES = {
    "sparse": (ValueError, "grad of c.*sparse"),
    "misshapen": (ValueError, r"grad of c: expected \(4,\) on cpu, got \(2, 2\)"),
    "nan": (FloatingPointError, "grad of c: expected finite values, got 1"),
    "lambda": (ValueError, "ewc_lambda"),
    "no fisher": (ValueError, "fisher of c"),
    "mode": (ValueError, "mode"),
    "lr": (ValueError, "lr"),
    "expanded": (ValueError, "c: expected elements that lie apart"),
    "shared": (ValueError, "c, d: expected parameters that lie apart"),
    "fisher of outsiders": (ValueError, r"fisher of c: expected \(4,\) on cpu, got \(5,\)"),
    "no anchor": (ValueError, "anchor of c"),
    "freed": (ValueError, "grad of c: expected a tensor with memory"),
    "backend": (RuntimeError, "none serves|does not serve"),
}


@BOTH
@pytest.mark.parametrize("stepped", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("how", FAILURES)
def test_a_failing_step_changes_nothing(cls: Any, how: str, stepped: bool) -> None:
    if how == "backend" and dispatch.absence("cpp") is not None:
        pytest.skip("cpp: the only backend here that does not serve float64")
    params, optimizer = two_groups(cls, error_if_nonfinite=True)
    if stepped:
        optimizer.step()
    penalty = optimizer.penalty
    break_with(how, params, optimizer)
    before = everything(optimizer)
    kind, message = FAILURES[how]
    forced = dispatch.use_backend("cpp") if how == "backend" else nullcontext()
    with forced, pytest.raises(kind, match=message):
        optimizer.step()
    assert_same(before, everything(optimizer))
    assert optimizer.penalty is penalty


@BOTH
def test_the_first_step_is_still_the_first_after_one_that_failed(cls: Any) -> None:
    settings = {"dampening": 0.5} if cls is EWCSGD else {}
    params, optimizer = two_groups(cls, error_if_nonfinite=True, **settings)
    expected_params, expected = two_groups(cls, **settings)
    params[-1].grad[1] = math.nan
    with pytest.raises(FloatingPointError):
        optimizer.step()
    params[-1].grad.copy_(expected_params[-1].grad)
    optimizer.step()
    expected.step()
    assert_same(everything(expected), everything(optimizer))


@BOTH
def test_a_parameter_without_gradient_takes_no_step_no_pull_and_no_penalty(cls: Any) -> None:
    model, optimizer = attached(cls)
    still = model[0].weight
    still.grad = None
    before, state = still.detach().clone(), copy.deepcopy(optimizer.state[still])
    moved = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert torch.equal(still, before)
    assert all(torch.equal(state[key], optimizer.state[still][key]) for key in state)
    penalty = sum(
        float((optimizer.state[p]["fisher"] * (q - optimizer.state[p]["anchor"]) ** 2).sum())
        for p, q in zip(model.parameters(), moved, strict=True)
        if p is not still
    )
    assert float(optimizer.penalty) == pytest.approx(penalty)
    optimizer.zero_grad()
    after = parameters_of(optimizer)
    optimizer.step()
    assert all(map(torch.equal, parameters_of(optimizer), after))
    assert float(optimizer.penalty) == 0


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_gradients_that_come_late_are_first_steps_of_their_own(dampening: float) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    expected = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    ours = EWCSGD(params, lr=0.1, momentum=0.9, dampening=dampening)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, dampening=dampening)
    for present in ([True, False], [True, True], [False, True], [True, True]):
        for p, q, there in zip(params, expected, present, strict=True):
            p.grad = torch.full_like(p, 0.3) if there else None
            q.grad = torch.full_like(q, 0.3) if there else None
        ours.step()
        theirs.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q)


def test_momentum_may_be_scheduled_from_zero() -> None:
    params, expected = [Parameter(torch.ones(3))], [Parameter(torch.ones(3))]
    ours = EWCSGD(params, lr=0.1, dampening=0.3)
    theirs = torch.optim.SGD(expected, lr=0.1, dampening=0.3)
    for momentum in (0.0, 0.9, 0.5, 0.0, 0.7):
        for p, optimizer in ((params[0], ours), (expected[0], theirs)):
            p.grad = p.detach() * 0.3
            optimizer.param_groups[0]["momentum"] = momentum
            optimizer.step()
    torch.testing.assert_close(params[0], expected[0])


# What tensors may look like


@BOTH
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(()),
        lambda: torch.randn(0),
        lambda: torch.randn(1),
        lambda: torch.randn(3, 5).t(),
        lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        lambda: torch.randn(6, 3, 1, 1).to(memory_format=torch.channels_last),
        lambda: torch.randn(4, 6)[:, ::2],
        lambda: torch.randn(4, 6)[:, 1],
        lambda: torch.randn(10)[3:],
    ],
)
@pytest.mark.parametrize("as_they_come", [True, False], ids=["own layout", "other layout"])
def test_any_dense_layout_is_stepped_right(
    cls: Any, make: Callable[[], Tensor], as_they_come: bool
) -> None:
    torch.manual_seed(0)
    value = make()
    p, q = Parameter(value), Parameter(value.contiguous().clone())
    fisher, anchor = torch.rand(value.shape), torch.randn(value.shape)
    settings = {"lr": 0.1, "ewc_lambda": 3.0} | ({"momentum": 0.9} if cls is EWCSGD else {})
    ours = cls([p], fisher={p: fisher}, anchor={p: anchor}, **settings)
    plain = cls([q], fisher={q: fisher.clone()}, anchor={q: anchor.clone()}, **settings)
    for _ in range(3):
        grad = torch.randn(value.shape)
        q.grad = grad.clone()
        p.grad = torch.empty_like(p).copy_(grad) if as_they_come else grad.clone()
        ours.step()
        plain.step()
    assert torch.equal(p, q)
    assert torch.equal(value, q)  # the memory that p is a view of
    assert p.stride() == value.stride()


@BOTH
def test_dtypes_may_be_mixed(cls: Any, unforced: None) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    torch.manual_seed(0)
    together = [Parameter(torch.randn(7).to(dtype)) for dtype in dtypes]
    alone = [Parameter(p.detach().clone()) for p in together]
    grads = [torch.randn(7).to(dtype) for dtype in dtypes]
    for params in (together, *([p] for p in alone)):
        for p in params:
            p.grad = grads[dtypes.index(p.dtype)]
        cls(params, lr=0.1).step()
    assert all(map(torch.equal, together, alone))


@BOTH
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64])
def test_a_gradient_may_have_another_dtype(
    cls: Any, grad_dtype: torch.dtype, unforced: None
) -> None:
    p, q = Parameter(torch.ones(5).bfloat16()), Parameter(torch.ones(5).bfloat16())
    p.grad_dtype = grad_dtype
    # Of no more digits than bfloat16 has, so that the step must be the same.
    grad = torch.tensor([1.0, -2.0, 0.5, 0.25, 3.0])
    p.grad, q.grad = grad.to(grad_dtype), grad.bfloat16()
    for param in (p, q):
        optimizer = cls([param], lr=0.1)
        optimizer.step()
        optimizer.step()
    # Each backend rounds its own arithmetic once; float64 gradients are not for every backend.
    torch.testing.assert_close(p, q, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@BOTH
def test_a_negated_view_keeps_its_sign(cls: Any) -> None:
    real, imaginary = Parameter(torch.ones(())), Parameter(torch.ones(()))
    torch.complex(real, imaginary).backward(torch.tensor(1 + 2j).conj())
    assert imaginary.grad.is_neg()
    assert float(imaginary.grad) == -2
    cls([real, imaginary], lr=0.1, weight_decay=0.0).step()
    assert float(imaginary.detach()) > 1


@BOTH
def test_tied_parameters_are_stepped_once(cls: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    fisher = {name: torch.ones(5, 3) for name in names}
    optimizer = cls(model.named_parameters(), lr=0.1, ewc_lambda=1.0, fisher=fisher)
    model.head(model.embedding(torch.tensor([1, 2]))).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 1


# Others between two steps


def replace_state(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        optimizer.state[p] = {k: v.clone() for k, v in optimizer.state[p].items()}


def swap_memory(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        p.data = p.data.clone()
        for value in optimizer.state[p].values():
            value.data = value.data.clone()


def replace_entries(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        state = optimizer.state[p]
        for key in list(state):
            state[key] = state[key].clone()


def transpose_in_place(model: nn.Module, optimizer: Any) -> None:
    for p in model.parameters():
        if p.ndim == 2:
            p.data = p.data.t().contiguous().t()


def reload_own_state(model: nn.Module, optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def through_a_file(model: nn.Module, optimizer: Any) -> None:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def zero_in_place(model: nn.Module, optimizer: Any) -> None:
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad(set_to_none=False)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert float(p.grad.abs().sum()) == 0
        p.grad.add_(grad)


@BOTH
@pytest.mark.parametrize(
    "disturb",
    [
        replace_state,
        swap_memory,
        replace_entries,
        transpose_in_place,
        reload_own_state,
        through_a_file,
        zero_in_place,
    ],
)
def test_what_others_move_between_steps_is_followed(cls: Any, disturb: Any) -> None:
    check_next_step_is_right(cls, disturb)


@BOTH
def test_cleared_state_starts_anew(cls: Any) -> None:
    settings = {"momentum": 0.9, "dampening": 0.5} if cls is EWCSGD else {}
    params, optimizer = two_groups(cls, **settings)
    optimizer.step()
    optimizer.state[params[0]] = {}
    optimizer.state[params[1]].clear()
    del optimizer.state[params[2]]
    fresh = [Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, fresh, strict=True):
        q.grad = p.grad.clone()
    expected = cls(fresh, lr=0.1, **settings)
    optimizer.step()
    expected.step()
    assert all(map(torch.equal, params, fresh))


def test_a_replaced_step_count_is_read() -> None:
    model, optimizer = attached(EWCAdamW)
    for p in model.parameters():
        optimizer.state[p]["step"] = torch.tensor(41.0)
    optimizer.step()
    assert {float(optimizer.state[p]["step"]) for p in model.parameters()} == {42.0}
    for p in model.parameters():
        step = optimizer.state[p]["step"]
        step.data = torch.tensor(7.0)
    optimizer.step()
    assert {float(optimizer.state[p]["step"]) for p in model.parameters()} == {8.0}


@BOTH
def test_a_parameter_of_another_dtype_at_the_old_address_is_noticed(cls: Any) -> None:
    memory = torch.zeros(8)
    p = Parameter(memory[:4])
    optimizer = cls([p], lr=0.5, weight_decay=0.0)
    p.grad = torch.ones(4)
    optimizer.step()
    behind = memory[2:].clone()
    p.data = memory.view(torch.bfloat16)[:4].fill_(1.0)
    p.grad = torch.ones(4, dtype=torch.bfloat16)
    optimizer.step()
    assert torch.equal(p, torch.full((4,), 0.5).bfloat16())
    assert torch.equal(memory[2:], behind)


@BOTH
def test_autograd_hears_of_the_write(cls: Any) -> None:
    p = Parameter(torch.ones(3))
    optimizer = cls([p], lr=0.1)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# The rest of torch.optim's contract


@BOTH
def test_a_closure_runs_with_gradients_and_its_loss_comes_back(cls: Any) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=0.001)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        return backward(model)

    with torch.no_grad():
        first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@BOTH
def test_schedulers_move_the_learning_rate(cls: Any) -> None:
    model = make_model()
    optimizer = cls(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    backward(model)
    optimizer.step()
    scheduler.step()
    before = parameters_of(optimizer)
    optimizer.step()
    assert all(map(torch.equal, before, parameters_of(optimizer)))
    total = torch.optim.lr_scheduler.OneCycleLR(
        cls(model.parameters(), **({"momentum": 0.9} if cls is EWCSGD else {})),
        max_lr=0.1,
        total_steps=4,
    )
    for _ in range(3):
        total.optimizer.step()
        total.step()


@BOTH
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_lr_is_read_at_every_step(cls: Any, shape: tuple[int, ...]) -> None:
    p = Parameter(torch.ones(2))
    lr = torch.full(shape, 0.5)
    optimizer = cls([p], lr=lr, weight_decay=0.0)
    p.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.5))
    lr.fill_(0.0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.5))


@BOTH
def test_hooks_and_the_profiler_see_the_step(cls: Any) -> None:
    _, optimizer = attached(cls)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert seen == ["before", "after"]
    name = f"Optimizer.step#{cls.__name__}.step"
    assert name in {event.key for event in profile.key_averages()}


@BOTH
@pytest.mark.parametrize("unscale_first", [False, True])
def test_the_grad_scaler_unscales_and_skips_infinities(cls: Any, unscale_first: bool) -> None:
    model, optimizer = attached(cls)
    _, expected = attached(cls)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for p in model.parameters():
        p.grad.mul_(1024.0)
    scaler.scale(torch.ones(()))
    if unscale_first:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    expected.step()
    assert_same(everything(expected), everything(optimizer))

    before = everything(optimizer)
    model[0].weight.grad[0, 0] = math.inf
    if unscale_first:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_same(before, everything(optimizer))
    assert scaler.get_scale() == 512.0


@BOTH
def test_a_scaled_gradient_is_clipped_at_its_own_size(cls: Any) -> None:
    model, optimizer = attached(cls, max_grad_norm=0.01)
    _, expected = attached(cls, max_grad_norm=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for p in model.parameters():
        p.grad.mul_(1024.0)
    scaler.step(optimizer)
    expected.step()
    for own, known in zip(parameters_of(optimizer), parameters_of(expected), strict=True):
        torch.testing.assert_close(own, known)


@BOTH
def test_a_failed_step_leaves_no_scale_behind(cls: Any) -> None:
    model, optimizer = attached(cls)
    _, expected = attached(cls)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for p in model.parameters():
        p.grad.mul_(8.0)
    optimizer.param_groups[0]["ewc_lambda"] = -1.0
    with pytest.raises(ValueError, match="ewc_lambda"):
        scaler.step(optimizer)
    optimizer.param_groups[0]["ewc_lambda"] = 2.0
    scaler.step(optimizer)
    expected.step()
    assert_same(everything(expected), everything(optimizer))


# State


@BOTH
def test_state_keeps_its_dtype_through_load_state_dict(cls: Any) -> None:
    model = make_model().bfloat16()
    _, optimizer = attached(cls, model)
    moment = "momentum_buffer" if cls is EWCSGD else "exp_avg_sq"
    for p in model.parameters():
        optimizer.state[p][moment] = optimizer.state[p][moment].float() + 1e-4
    optimizer.step()
    saved = optimizer.state_dict()
    other = cls(make_model().bfloat16().named_parameters())
    other.load_state_dict(saved)
    for p, q in zip(model.parameters(), other.param_groups[0]["params"], strict=True):
        for key, value in optimizer.state[p].items():
            assert other.state[q][key].dtype == value.dtype
            assert torch.equal(other.state[q][key], value)
        assert other.state[q]["fisher"].dtype == torch.float32
        assert other.state[q][moment].dtype == torch.float32
        assert other.state[q][moment].data_ptr() != optimizer.state[p][moment].data_ptr()


@BOTH
def test_state_without_ewc_leaves_what_is_attached(cls: Any) -> None:
    model, optimizer = attached(cls)
    saved = optimizer.state_dict(include_ewc=False)
    assert not any({"fisher", "anchor"} & set(state) for state in saved["state"].values())
    anchors = [optimizer.state[p]["anchor"].clone() for p in model.parameters()]
    optimizer.load_state_dict(saved)
    for p, anchor in zip(model.parameters(), anchors, strict=True):
        assert torch.equal(optimizer.state[p]["anchor"], anchor)


@BOTH
def test_a_state_dict_of_torch_goes_on_where_torch_was(cls: Any) -> None:
    settings = {"momentum": 0.9} if cls is EWCSGD else {}
    model, torch_model = make_model(), make_model()
    theirs = THEIRS[cls](torch_model.parameters(), lr=0.05, foreach=False, **settings)
    for seed in range(3):
        theirs.zero_grad()
        backward(torch_model, seed)
        theirs.step()
    model.load_state_dict(torch_model.state_dict())
    fisher = dict.fromkeys(model.parameters())
    fisher = {p: torch.zeros_like(p) for p in fisher}
    ours = cls(model.parameters(), ewc_lambda=7.0, fisher=fisher, mode="gradient", **settings)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["ewc_lambda"] == 7.0
    assert ours.param_groups[0]["mode"] == "gradient"
    assert ours.param_groups[0]["lr"] == 0.05
    for m, optimizer in ((model, ours), (torch_model, theirs)):
        optimizer.zero_grad()
        backward(m, seed=9)
        optimizer.step()
    for p, q in zip(model.parameters(), torch_model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_state_of_amsgrad_and_of_adam_is_refused() -> None:
    model = make_model()
    optimizer = EWCAdamW(model.parameters())
    for theirs, named in (
        (torch.optim.AdamW(model.parameters(), amsgrad=True), "amsgrad"),
        (torch.optim.Adam(model.parameters(), weight_decay=0.1), "weight_decay"),
    ):
        with pytest.raises(ValueError, match=named):
            optimizer.load_state_dict(theirs.state_dict())


@BOTH
@pytest.mark.parametrize("how", ["groups", "shape", "nan", "lambda"])
def test_a_bad_state_dict_changes_nothing(cls: Any, how: str) -> None:
    _, optimizer = attached(cls)
    bad = copy.deepcopy(optimizer.state_dict())
    if how == "groups":
        bad["param_groups"] *= 2
    elif how == "shape":
        bad["state"][3]["anchor"] = torch.zeros(7)
    elif how == "nan":
        bad["state"][3]["fisher"][0] = math.nan
    else:
        bad["param_groups"][0]["ewc_lambda"] = -1.0
    before, groups = everything(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError):  # noqa: PT011 - which one is torch's business, or above
        optimizer.load_state_dict(bad)
    assert_same(before, everything(optimizer))
    assert optimizer.state_dict()["param_groups"] == groups


@BOTH
def test_load_hooks_of_others_see_and_change_the_dictionary(cls: Any) -> None:
    model, optimizer = attached(cls)
    saved = optimizer.state_dict()
    seen = []

    def pre(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        loaded = copy.deepcopy(loaded)
        loaded["state"][0]["anchor"].fill_(5.0)
        return loaded

    def post(own: Any) -> None:
        seen.append(float(own.state[model[0].weight]["anchor"].mean()))

    optimizer.register_load_state_dict_pre_hook(pre)
    optimizer.register_load_state_dict_post_hook(post)
    optimizer.load_state_dict(saved)
    assert seen == [5.0]


@BOTH
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_a_copied_optimizer_steps_the_copied_model(cls: Any, duplicate: Any) -> None:
    pair = attached(cls, max_grad_norm=0.1)
    model, optimizer = pair
    grads = [p.grad for p in model.parameters()]
    copied_model, copied = duplicate(pair)
    assert copied.max_grad_norm == 0.1
    before = parameters_of(optimizer)
    for p, grad in zip(copied_model.parameters(), grads, strict=True):
        p.grad = grad.clone()
    copied.step()
    assert all(map(torch.equal, before, parameters_of(optimizer)))
    optimizer.step()
    assert_same(everything(optimizer), everything(copied))


@BOTH
def test_settings_missing_in_an_old_pickle_get_defaults(cls: Any) -> None:
    _, optimizer = attached(cls)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        for key in ("ewc_lambda", "mode", "maximize", "batch_fisher_decay"):
            del group[key]
    old = cls.__new__(cls)
    old.__setstate__(state)
    old.step()
    assert old.param_groups[0]["ewc_lambda"] == 0.0


@BOTH
def test_a_group_added_later_is_stepped_and_named_until_it_has_a_fisher(cls: Any) -> None:
    _, optimizer = attached(cls)
    late = Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("late", late)]})
    late.grad = torch.ones(3)
    with pytest.raises(ValueError, match="fisher of late"):
        optimizer.step()
    optimizer.param_groups[1]["ewc_lambda"] = 0.0
    optimizer.step()
    assert not torch.equal(late, torch.ones(3))


def test_float64_state_does_not_take_the_kernels_from_the_others(unforced: None) -> None:
    if dispatch.absence("cpp") is not None:
        pytest.skip("cpp: absent")
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = EWCSGD(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    backends = [one.grads.backend for one in optimizer._work()]
    assert backends == ["cpp", "reference"]
