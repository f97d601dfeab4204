"""Gradient release: the same bits as a step after the backward pass, and no gradients kept."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bdu.optim import EWCSGD, EWCAdamW, release, release_gradients
from bdu.quantization import quantize

BOTH = pytest.mark.parametrize("cls", [EWCSGD, EWCAdamW])
TOKENS, WIDTH = 300, 256
MOMENTS = {EWCSGD: {"momentum": 0.9, "dampening": 0.1}, EWCAdamW: {}}


class Net(nn.Module):
    """Large and small tensors; tied, used twice, frozen and unused ones."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.first = nn.Linear(WIDTH, TOKENS)
        self.second = nn.Linear(TOKENS, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH)  # as large as a tensor that does not wait
        self.norm = nn.LayerNorm(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.unused = Parameter(torch.randn(8))
        self.head = nn.Linear(WIDTH, TOKENS)
        self.head.weight = self.embed.weight
        self.reentrant = reentrant

    def block(self, x: Tensor) -> Tensor:
        return self.norm(x + self.second(F.gelu(self.first(x))))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.reentrant is None:
            x = self.block(x)
        else:
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(self.frozen(self.again(torch.tanh(self.again(x)))))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with settings of their own; small and large tensors in both."""
    named = list(model.named_parameters())
    return [
        {"params": named[::2], "lr": 0.05, "ewc_lambda": 2.0},
        {"params": named[1::2], "weight_decay": 0.0},
    ]


def fisher_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(p.shape, generator=generator)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def pair(
    cls: Any, dtype: torch.dtype = torch.float32, model: nn.Module | None = None, **settings: Any
) -> tuple[nn.Module, Any]:
    model = (Net() if model is None else model).to(dtype)
    settings = {"lr": 0.02, "ewc_lambda": 0.5, "weight_decay": 0.01, **MOMENTS[cls], **settings}
    return model, cls(groups_of(model), fisher=fisher_of(model), **settings)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TOKENS, (4, 6), generator=generator)
    return F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten().roll(1))


def train(
    model: nn.Module,
    optimizer: Any,
    context: AbstractContextManager[Any],
    steps: int = 3,
    first: int = 0,
) -> list[Tensor]:
    """A loop as it is without release; the penalties of its steps."""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    penalties = []
    with context:
        for seed in range(first, first + steps):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()
            scheduler.step()
            penalties.append(optimizer.penalty.clone())
    return penalties


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        found[name] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{key} of {name}"] = value
    return found


def assert_same(one: tuple[nn.Module, Any], other: tuple[nn.Module, Any]) -> None:
    own, expected = everything(*one), everything(*other)
    assert own.keys() == expected.keys()
    assert [name for name in own if not torch.equal(own[name], expected[name])] == []


def assert_close(penalties: list[Tensor], expected: list[Tensor]) -> None:
    # A sum of one float32 a launch, at most ten of them here, in another order.
    rtol = 10 * torch.finfo(torch.float32).eps
    for own, known in zip(penalties, expected, strict=True):
        torch.testing.assert_close(own, known, rtol=rtol, atol=0.0)


def without_gradients(model: nn.Module) -> bool:
    return all(p.grad is None for p in model.parameters())


def watch(optimizer: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The first arguments that a method of the optimizer is called with from now on."""
    calls: list[Any] = []
    original = getattr(optimizer, method)

    def watched(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(optimizer, method, watched)
    return calls


# The same bits


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mode": "gradient"},
        {"maximize": True},
        {"batch_fisher_decay": 0.5},
        {"fisher_dtype": "8bit", "anchor_dtype": torch.bfloat16, "stochastic_rounding": 7},
    ],
    ids=str,
)
def test_steps_are_those_without_release_bit_by_bit(
    cls: Any, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    own, expected = pair(cls, dtype, **settings), pair(cls, dtype, **settings)
    before = copy.deepcopy(everything(*own))
    penalties = train(*own, release_gradients(*own))
    assert_close(penalties, train(*expected, nullcontext()))
    assert_same(own, expected)
    moved = {name for name, value in everything(*own).items() if not name.count(" of ")} - {
        name
        for name, value in everything(*own).items()
        if name in before and torch.equal(value, before[name])
    }
    assert moved == dict(own[0].named_parameters()).keys() - {
        "unused",
        "frozen.weight",
        "frozen.bias",
    }
    assert float(penalties[-1]) > 0


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_are_recomputed_with_the_weights_they_had(
    cls: Any, reentrant: bool
) -> None:
    own, expected = pair(cls, model=Net(reentrant)), pair(cls)
    assert_close(train(*own, release_gradients(*own)), train(*expected, nullcontext()))
    assert_same(own, expected)


@BOTH
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_llama_takes_the_same_steps(cls: Any, checkpointing: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).train()
        if checkpointing:
            # From version 5.23 on it has another name.
            name = "activation_checkpointing_enable"
            getattr(model, name, model.gradient_checkpointing_enable)()
        return pair(cls, torch.bfloat16, model=model)

    def losses(model: nn.Module, optimizer: Any, context: AbstractContextManager[Any]) -> None:
        with context:
            for seed in range(2):
                generator = torch.Generator().manual_seed(seed)
                tokens = torch.randint(0, TOKENS, (2, 8), generator=generator)
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    own, expected = made(), made()
    losses(*own, release_gradients(*own))
    losses(*expected, nullcontext())
    assert_same(own, expected)


@BOTH
def test_normal_steps_go_on_before_and_after(cls: Any) -> None:
    own, expected = pair(cls), pair(cls)
    train(*expected, nullcontext(), steps=6)
    expected_again = pair(cls)
    for first, steps in ((0, 2), (2, 2), (4, 2)):
        released = first == 2
        train(*own, release_gradients(*own) if released else nullcontext(), steps, first)
        train(*expected_again, nullcontext(), steps, first)
    assert_same(own, expected_again)
    assert not without_gradients(own[0])


@BOTH
def test_a_state_that_others_replace_is_the_one_stepped(cls: Any) -> None:
    own, expected = pair(cls), pair(cls)
    handle = release_gradients(*own)
    for model, optimizer in (own, expected):
        train(model, optimizer, nullcontext(), steps=2)
        saved = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, nullcontext(), steps=1)
        optimizer.load_state_dict(saved)
        optimizer.set_anchor(fisher={n: 2 * f for n, f in fisher_of(model).items()})
        train(model, optimizer, nullcontext(), steps=2)
        optimizer.state[model.first.weight]["fisher"] = torch.full((TOKENS, WIDTH), 0.25)
        train(model, optimizer, nullcontext(), steps=1)
        # Memory that the tables do not know.
        for p in model.parameters():
            p.data = p.data.clone()
        train(model, optimizer, nullcontext(), steps=1)
    assert_same(own, expected)
    handle.remove()


@pytest.mark.parametrize(
    "change", [{"momentum": 0.9}, {"batch_fisher_decay": 0.5}, {"ewc_lambda": 3.0}], ids=str
)
def test_settings_that_need_another_state_may_change(change: dict[str, Any]) -> None:
    own, expected = (pair(EWCSGD, momentum=0.0, dampening=0.0) for _ in range(2))
    handle = release_gradients(*own)
    for model, optimizer in (own, expected):
        train(model, optimizer, nullcontext(), steps=1)
        for group in optimizer.param_groups:
            group.update(change)
        train(model, optimizer, nullcontext(), steps=2)
    assert_same(own, expected)
    handle.remove()


@pytest.mark.parametrize(
    ("cls", "settings"), [(EWCSGD, {}), (EWCSGD, MOMENTS[EWCSGD]), (EWCAdamW, {})], ids=str
)
def test_small_tensors_that_come_by_turns_are_stepped_right(
    cls: Any, settings: dict[str, Any]
) -> None:
    def made() -> tuple[nn.Module, Any]:
        model = nn.ParameterList([torch.full((3,), float(i)) for i in range(3)])
        return model, cls(model.parameters(), lr=0.1, **settings)

    own, expected = made(), made()
    handle = release_gradients(*own)
    for model, optimizer in (own, expected):
        for used in ((0, 1), (0, 2), (0, 1), (1, 2), (2, 1, 0)):
            sum(model[i].square().sum() for i in used).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(own, expected)
    handle.remove()


def test_parameters_of_several_precisions_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BDU_BACKEND", raising=False)  # none but the reference serves float64

    def made() -> tuple[nn.Module, Any]:
        model = nn.ParameterList([torch.ones(3), torch.ones(2, dtype=torch.float64)])
        return model, EWCAdamW(
            model.parameters(), ewc_lambda=1.0, fisher={p: torch.ones_like(p) for p in model}
        )

    own, expected = made(), made()
    for context, (model, optimizer) in (
        (release_gradients(*own), own),
        (nullcontext(), expected),
    ):
        with context:
            for _ in range(2):
                optimizer.zero_grad()
                sum(p.double().square().sum() for p in model).backward()
                optimizer.step()
    assert_same(own, expected)
    assert own[1].penalty.dtype == torch.float64


# Gradients are freed


@BOTH
def test_no_gradient_is_left_after_a_backward_pass(cls: Any) -> None:
    model, optimizer = pair(cls)
    before = copy.deepcopy(everything(model, optimizer))
    storages = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(
                lambda p: storages.append(StorageWeakRef(p.grad.untyped_storage()))
            )
    with release_gradients(model, optimizer):
        loss_of(model, 0).backward()
        assert without_gradients(model)
        assert len(storages) == 10
        assert all(storage.expired() for storage in storages)
        stepped = everything(model, optimizer)
        assert not torch.equal(stepped["norm.bias"], before["norm.bias"])
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
        after = everything(model, optimizer)
        assert all(torch.equal(stepped[name], after[name]) for name in stepped)


def test_a_large_tensor_is_stepped_while_the_pass_still_runs() -> None:
    model, optimizer = pair(EWCSGD)
    most = 0

    def add_up(_: Tensor) -> None:
        nonlocal most
        alive = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
        most = max(most, alive)

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(add_up)
    with release_gradients(model, optimizer):
        loss_of(model, 0).backward()
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    small = [n for n in trained if n < release.SMALL]
    assert most <= max(trained) + sum(small) < 0.4 * sum(trained)


@BOTH
def test_small_tensors_are_stepped_together(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ParameterList([torch.ones(10) for _ in range(7)])
    optimizer = cls(model.parameters())
    launches = watch(optimizer, "_launch", monkeypatch)
    handle = release_gradients(model, optimizer)

    def run() -> list[int]:
        launches.clear()
        sum(p.sum() for p in model).backward()
        optimizer.step()
        return [len(work.launch.rows) for work, *_ in launches]

    assert run() == [7]
    monkeypatch.setattr(release, "BATCH", 30)
    assert run() == [3, 3, 1]
    monkeypatch.setattr(release, "SMALL", 10)
    assert run() == [1] * 7
    handle.remove()


@BOTH
def test_tables_are_kept_from_step_to_step(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = pair(cls)
    handle = release_gradients(model, optimizer)
    train(model, optimizer, nullcontext(), steps=2)
    made = watch(optimizer, "_tabulate", monkeypatch)
    train(model, optimizer, nullcontext(), steps=2)
    assert made == []
    handle.remove()


# The loop around it


def test_settings_are_read_when_a_parameter_is_stepped() -> None:
    model = nn.ParameterList([torch.ones(release.SMALL)])
    optimizer = EWCSGD(model.parameters(), lr=1.0)
    with release_gradients(model, optimizer):
        for lr, expected in ((0.5, 0.5), (0.25, 0.25)):
            optimizer.param_groups[0]["lr"] = lr
            model[0].sum().backward()
            optimizer.step()
            assert float(model[0].detach().mean()) == expected


@BOTH
def test_the_penalty_is_there_after_the_backward_pass_and_after_the_step(cls: Any) -> None:
    own, expected = pair(cls), pair(cls)
    penalties = []
    with release_gradients(*own):
        for seed in range(2):
            loss_of(own[0], seed).backward()
            penalties.append(own[1].penalty)
            own[1].step()
            assert torch.equal(own[1].penalty, penalties[-1])
            own[1].zero_grad()
    known = []
    for seed in range(2):
        expected[1].zero_grad()
        loss_of(expected[0], seed).backward()
        expected[1].step()
        known.append(expected[1].penalty)
    assert float(known[1]) > 0
    assert_close(penalties, known)


@BOTH
def test_what_was_thawed_since_and_what_is_not_the_models_wait_for_the_step(cls: Any) -> None:
    def made() -> tuple[nn.Module, Any]:
        model, optimizer = pair(cls)
        optimizer.add_param_group({"params": [("outside", torch.ones(5).requires_grad_())]})
        optimizer.param_groups[-1]["ewc_lambda"] = 0.0
        return model, optimizer

    own, expected = made(), made()
    handle = release_gradients(*own)
    penalties: list[Tensor] = []
    for model, optimizer in (own, expected):
        model.frozen.requires_grad_(True)
        fisher = fisher_of(model)
        optimizer.set_anchor(
            fisher=fisher, anchor={n: torch.zeros(f.shape) for n, f in fisher.items()}
        )
        outside = optimizer.param_groups[-1]["params"][0]
        (loss_of(model, 0) + outside.sum()).backward()
        waiting = {name for name, p in model.named_parameters() if p.grad is not None}
        if model is own[0]:
            assert waiting == {"frozen.weight", "frozen.bias"}
        optimizer.step()
        penalties.append(optimizer.penalty)
    assert_same(own, expected)
    assert_close(penalties[:1], penalties[1:])
    handle.remove()


def test_a_gradient_for_some_parameters_at_a_time_is_fine() -> None:
    model = nn.ParameterList([torch.ones(3), torch.ones(3)])
    optimizer = EWCSGD(model.parameters(), lr=1.0)
    with release_gradients(model, optimizer):
        for expected in (0.0, -1.0):
            model[0].sum().backward()
            model[1].sum().backward()
            optimizer.step()
            for p in model:
                assert torch.equal(p, torch.full((3,), expected))


def test_after_a_backward_pass_that_failed_the_step_takes_what_waits() -> None:
    model = nn.ParameterList([torch.ones(3), torch.ones(release.SMALL), torch.ones(3)])

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ArithmeticError("on the way")

    optimizer = EWCSGD(model.parameters(), lr=1.0)
    with release_gradients(model, optimizer):
        with pytest.raises(ArithmeticError, match="on the way"):
            ((Fails.apply(model[2]) * model[0]).sum() * model[1]).sum().backward()
        assert torch.equal(model[0], torch.ones(3))
        assert torch.equal(model[1], torch.full((release.SMALL,), 1.0 - 3.0))
        optimizer.step()
        assert torch.equal(model[0], torch.full((3,), 1.0 - release.SMALL))
        assert without_gradients(model)
        sum(p.sum() for p in model).backward()
        optimizer.step()
        assert torch.equal(model[0], torch.full((3,), 0.0 - release.SMALL))
        assert torch.equal(model[2], torch.zeros(3))


def test_removing_brings_the_usual_back() -> None:
    model, optimizer = pair(EWCSGD)
    handle = release_gradients(model, optimizer)
    handle.remove()
    handle.remove()
    before = copy.deepcopy(everything(model, optimizer))
    loss_of(model, 0).backward()
    loss_of(model, 1).backward()
    assert [
        n for n, v in everything(model, optimizer).items() if not torch.equal(v, before[n])
    ] == []
    assert not without_gradients(model)
    optimizer.step(lambda: 1.0)
    with release_gradients(model, optimizer):
        pass
    assert not optimizer._optimizer_step_pre_hooks


def test_model_optimizer_and_handle_are_collected_together() -> None:
    model, optimizer = pair(EWCSGD)
    handle = release_gradients(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.step()
    alive = [weakref.ref(model), weakref.ref(model.first.weight), weakref.ref(optimizer)]
    alive.append(weakref.ref(handle))
    del model, optimizer, handle
    gc.collect()
    assert [one() for one in alive] == [None] * 4


def test_without_the_handle_release_goes_on_and_without_the_optimizer_it_ends() -> None:
    model, optimizer = pair(EWCSGD)
    release_gradients(model, optimizer)
    gc.collect()
    loss_of(model, 0).backward()
    assert without_gradients(model)
    del optimizer
    gc.collect()
    loss_of(model, 1).backward()
    assert not without_gradients(model)


def test_a_copied_optimizer_is_without_release() -> None:
    model, optimizer = pair(EWCSGD)
    with release_gradients(model, optimizer):
        copied_model, copied = copy.deepcopy((model, optimizer))
        loss_of(copied_model, 0).backward()
        assert not without_gradients(copied_model)
        copied.step()


# Refused by name


@BOTH
def test_gradients_cannot_be_accumulated(cls: Any) -> None:
    model, optimizer = pair(cls)
    with release_gradients(model, optimizer):
        loss_of(model, 0).backward()
        before = copy.deepcopy(everything(model, optimizer))
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"grad of head\.bias: expected one between two"):
                loss_of(model, 1).backward()
        optimizer.step()
        after = everything(model, optimizer)
        assert [name for name in after if not torch.equal(after[name], before[name])] == []
        loss_of(model, 1).backward()


def test_reentrant_segments_that_share_a_parameter_are_refused() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(release.SMALL // 256, 256)

        def forward(self, x: Tensor, reentrant: bool) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=reentrant)
            return x.sum()

    model = Shares()
    x = torch.randn(2, 256, requires_grad=True)
    optimizer = EWCSGD(model.parameters())
    with release_gradients(model, optimizer):
        model(x, False).backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"grad of layer\.\w+: .*use_reentrant=False"):
            model(x, True).backward()


def test_a_global_clip_is_refused_at_once_and_when_set_later() -> None:
    model, optimizer = pair(EWCSGD, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"max_grad_norm: expected None .* got 1\.0"):
        release_gradients(model, optimizer)
    optimizer.max_grad_norm = None
    before = copy.deepcopy(everything(model, optimizer))
    with release_gradients(model, optimizer):
        optimizer.max_grad_norm = 2.0
        with pytest.raises(ValueError, match=r"max_grad_norm: expected None .* got 2\.0"):
            loss_of(model, 0).backward()
    after = everything(model, optimizer)
    assert [name for name in after if not torch.equal(after[name], before[name])] == []


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_grad_scaler_is_refused(unscaled: bool) -> None:
    model, optimizer = pair(EWCSGD)
    scaler = torch.amp.GradScaler("cpu")
    with release_gradients(model, optimizer):
        scaler.scale(loss_of(model, 0)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="GradScaler: expected none"):
            scaler.step(optimizer)
        # What the scaler left behind does not spoil the steps without it.
        loss_of(copy.deepcopy(model), 0).backward()
        optimizer.step()
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    with release_gradients(model, optimizer):
        disabled.scale(loss_of(model, 0)).backward()
        disabled.step(optimizer)


def test_a_closure_is_refused_before_it_is_called() -> None:
    model, optimizer = pair(EWCSGD)

    def closure() -> float:
        raise AssertionError("called")

    with release_gradients(model, optimizer):
        optimizer.step(None)
        for call in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
            with pytest.raises(RuntimeError, match="closure: expected None"):
                call()


def test_a_parameter_in_no_group_is_refused_by_name() -> None:
    model = Net()
    others = [p for name, p in model.named_parameters() if name != "first.bias"]
    optimizer = EWCSGD(others)
    with pytest.raises(ValueError, match=r"first\.bias: expected a parameter that requires"):
        release_gradients(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    model.first.bias.requires_grad_(False)
    with release_gradients(model, optimizer):
        loss_of(model, 0).backward()
        optimizer.step()
        group = optimizer.param_groups[0]
        group["params"] = [p for p in group["params"] if p is not model.second.bias]
        with pytest.raises(ValueError, match=r"second\.bias: expected a parameter that requires"):
            loss_of(model, 0).backward()


def test_other_optimizers_models_and_wrappers_are_refused() -> None:
    model, optimizer = pair(EWCSGD)
    with pytest.raises(ValueError, match="optimizer: expected an EWCSGD or EWCAdamW, got SGD"):
        release_gradients(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="optimizer: expected parameters of the model, got none"):
        release_gradients(nn.Identity(), optimizer)
    with (
        release_gradients(model, optimizer),
        pytest.raises(ValueError, match="not released already"),
    ):
        release_gradients(model, optimizer)

    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(ValueError, match="single process, got DistributedDataParallel"):
        release_gradients(nn.Sequential(DistributedDataParallel(model)), optimizer)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_gradient_with_a_graph_and_one_that_others_freed_are_refused() -> None:
    model = nn.ParameterList([torch.ones(release.SMALL), torch.ones(2)])
    optimizer = EWCSGD(model.parameters())
    with (
        release_gradients(model, optimizer),
        pytest.raises(RuntimeError, match="grad of 0: expected one without a graph"),
    ):
        model[0].square().sum().backward(create_graph=True)
    optimizer.zero_grad()

    def free(p: Tensor) -> None:
        p.grad = None

    with release_gradients(model, optimizer):
        model[1].register_post_accumulate_grad_hook(free)
        with pytest.raises(RuntimeError, match=r"grad of 1: .* something else has freed it"):
            model[1].sum().backward()


@BOTH
@pytest.mark.parametrize("size", [3, release.SMALL], ids=["small", "large"])
def test_what_a_step_refuses_is_raised_by_the_backward_pass(cls: Any, size: int) -> None:
    model = nn.ParameterList([torch.ones(size)])
    optimizer = cls([("weight", model[0])], error_if_nonfinite=True)
    with release_gradients(model, optimizer):
        with pytest.raises(FloatingPointError, match="grad of weight: expected finite"):
            (model[0] * torch.inf).sum().backward()
        optimizer.zero_grad()
        optimizer.step()
        optimizer.param_groups[0]["ewc_lambda"] = 1.0
        with pytest.raises(ValueError, match="fisher of weight"):
            model[0].sum().backward()
        assert optimizer.state_dict()["state"] == {}
    assert torch.equal(model[0], torch.ones(size))


@BOTH
@pytest.mark.parametrize("how", ["anchor", "fisher"])
def test_small_tensors_that_are_stepped_together_are_all_checked_before(cls: Any, how: str) -> None:
    model = nn.ParameterList([torch.ones(3), torch.ones(3)])
    setting = {"ewc_lambda": 1.0} if how == "anchor" else {"batch_fisher_decay": 0.5}
    optimizer = cls([{"params": [model[0]]}, {"params": [model[1]], **setting}])
    state = optimizer.state[model[1]]
    if how == "anchor":
        state["fisher"] = torch.ones(3)
    else:
        codes, scale = quantize(torch.ones(3), "square_root")
        state.update(fisher=codes, fisher_scale=scale, anchor=torch.ones(3))
    with release_gradients(model, optimizer):
        with pytest.raises(ValueError, match=f"{how} of"):
            (model[0] * model[1]).sum().backward()
        assert optimizer.state_dict()["state"].keys() == {1}
    for p in model:
        assert torch.equal(p, torch.ones(3))


def test_a_weight_that_the_rest_of_the_pass_still_needs_is_noticed() -> None:
    weight = Parameter(torch.ones(release.SMALL))
    model = nn.ParameterList([weight, torch.ones(release.SMALL)])
    optimizer = EWCSGD(model.parameters())
    with (
        release_gradients(model, optimizer),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        # The product keeps the detached weight, whose own gradient comes first.
        (weight.detach() * model[1].tanh() + weight).sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
def test_on_a_device_gradients_are_released_without_waiting(cls: Any) -> None:
    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        layers = [layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.LayerNorm(512))]
        return pair(cls, model=nn.Sequential(*layers).cuda(), fisher_dtype=torch.bfloat16)

    def most_held(model: nn.Module, optimizer: Any, context: AbstractContextManager[Any]) -> int:
        rise = 0
        x = torch.linspace(-1, 1, 4 * 512, device="cuda").reshape(4, 512)
        with context:
            for step in range(3):
                optimizer.zero_grad()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                # The first step makes tables and buffers.
                torch.cuda.set_sync_debug_mode("error" if step else "default")
                try:
                    model(x).square().mean().backward()
                    optimizer.step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                rise = torch.cuda.max_memory_allocated() - before
        return rise

    own, expected = made(), made()
    assert most_held(*own, release_gradients(*own)) < 0.5 * most_held(*expected, nullcontext())
    assert_same(own, expected)
