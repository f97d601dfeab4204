"""The optimizers with a Fisher in 8 bits, an anchor in bfloat16 and stochastic rounding."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdu.optim import EWCSGD, EWCAdamW
from bdu.quantization import dequantize, quantize

BOTH = pytest.mark.parametrize("cls", [EWCSGD, EWCAdamW])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 5), nn.Flatten(), nn.Linear(64 * 4, 100))


def fisher_of(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn_like(p).square() for name, p in model.named_parameters()}


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    torch.manual_seed(2)
    for _ in range(steps):
        images = torch.randn(2, 3, 6, 6, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(images).float().square().mean().backward()
        optimizer.step()


def make(cls: Any, model: nn.Module, **more: Any) -> Any:
    settings = {"lr": 0.01, "ewc_lambda": 2.0, "fisher": fisher_of(model)} | more
    return cls(model.named_parameters(), **settings)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@BOTH
@pytest.mark.parametrize("dtype", ["8bit", "8bit_logarithmic"])
def test_a_fisher_in_8_bits_steps_as_what_it_stands_for(cls, dtype):
    kind = "square_root" if dtype == "8bit" else "logarithmic"
    small, plain = network(), network()
    a = make(cls, small, fisher_dtype=dtype)
    fisher = {
        name: f if f.numel() < 4096 else dequantize(*quantize(f, kind))
        for name, f in fisher_of(plain).items()
    }
    b = make(cls, plain, fisher=fisher)
    assert a.state[small[0].weight]["fisher"].element_size() == 1
    assert a.state[small[0].bias]["fisher"].dtype == torch.float32
    assert "fisher_scale" not in a.state[small[0].bias]
    train(small, a)
    train(plain, b)
    torch.testing.assert_close(weights(small), weights(plain), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(a.penalty, b.penalty, rtol=1e-5, atol=0)


def test_the_state_of_ewc_takes_3_bytes_a_parameter():
    model = nn.Linear(1024, 1024, bias=False).to(torch.bfloat16)
    optimizer = make(EWCSGD, model, fisher_dtype="8bit", anchor_dtype=torch.bfloat16)
    state = optimizer.state[model.weight]
    taken = sum(state[key].nbytes for key in ("fisher", "fisher_scale", "anchor"))
    assert taken / 1024**2 == 3 + 1 / 16


@BOTH
def test_it_goes_through_state_dict_copy_and_a_file(cls):
    first, second = network(), network()
    a = make(cls, first, fisher_dtype="8bit", anchor_dtype=torch.bfloat16)
    train(first, a, 2)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    second.load_state_dict(first.state_dict())
    b = cls(second.named_parameters(), lr=0.5)
    b.load_state_dict(torch.load(file, weights_only=True))
    copied_model = copy.deepcopy(first)
    for key in ("fisher", "fisher_scale", "anchor"):
        mine, theirs = a.state[first[0].weight][key], b.state[second[0].weight][key]
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    train(first, a)
    train(second, b)
    assert torch.equal(weights(first), weights(second))
    del copied_model


@BOTH
def test_a_broken_state_is_refused_and_nothing_is_changed(cls):
    model = network()
    optimizer = make(cls, model, fisher_dtype="8bit")
    good = optimizer.state_dict()
    index = next(i for i, state in good["state"].items() if "fisher_scale" in state)
    for wrong in (None, torch.ones(3, dtype=torch.bfloat16), -good["state"][index]["fisher_scale"]):
        bad = copy.deepcopy(good)
        bad["state"][index]["fisher_scale"] = wrong
        with pytest.raises(ValueError, match=r"fisher_scale of 0\.weight: expected \(150,\)"):
            optimizer.load_state_dict(bad)
    train(model, optimizer)


def test_another_fisher_replaces_the_scale_too():
    model = network()
    optimizer = make(EWCSGD, model, fisher_dtype="8bit")
    optimizer.fisher_dtype = None
    optimizer.set_anchor(fisher=fisher_of(model))
    assert "fisher_scale" not in optimizer.state[model[0].weight]
    train(model, optimizer)
    optimizer.fisher_dtype = "8bit"
    optimizer.set_anchor(fisher=fisher_of(model))
    codes = optimizer.state[model[0].weight]["fisher"]
    optimizer.set_anchor()
    assert optimizer.state[model[0].weight]["fisher"] is codes
    assert optimizer.state[model[0].weight]["fisher_scale"].shape == (150,)
    train(model, optimizer)


def test_a_parameter_that_turns_channels_last_takes_its_codes_along():
    small, plain = network(), network()
    a = make(EWCSGD, small, fisher_dtype="8bit")
    fisher = {n: f if f.numel() < 4096 else dequantize(*quantize(f, "square_root"))
              for n, f in fisher_of(plain).items()}  # fmt: skip
    b = make(EWCSGD, plain, fisher=fisher)
    for model in (small, plain):
        model[0].weight.data = model[0].weight.data.to(memory_format=torch.channels_last)
    train(small, a, 1)
    train(plain, b, 1)
    # Blocks hold other entries now: one more rounding to 8 bits.
    torch.testing.assert_close(weights(small), weights(plain), rtol=0, atol=1e-4)


@BOTH
def test_averaging_a_fisher_in_8_bits_is_refused_and_nothing_is_written(cls):
    model = network()
    optimizer = make(cls, model, fisher_dtype="8bit", batch_fisher_decay=0.9)
    before = weights(model)
    with pytest.raises(ValueError, match=r"fisher of 0\.weight: expected a floating dtype with"):
        train(model, optimizer)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fisher_dtype": "4bit"}, "fisher_dtype: expected a floating dtype, '8bit'"),
        ({"fisher_dtype": torch.int8}, "fisher_dtype: expected a floating dtype"),
        ({"anchor_dtype": "8bit"}, "anchor_dtype: expected a floating dtype or None, got '8bit'"),
        ({"stochastic_rounding": 0.5}, "stochastic_rounding: expected a whole number of 64 bits"),
        ({"stochastic_rounding": True}, "stochastic_rounding: expected a whole number"),
        ({"stochastic_rounding": 2**64}, "stochastic_rounding: expected a whole number"),
    ],
)
@BOTH
def test_settings_out_of_range_are_named(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        make(cls, network(), **settings)


@BOTH
@pytest.mark.parametrize("fisher_dtype", [None, "8bit", torch.float32])
def test_codes_are_not_taken_for_a_fisher(cls, fisher_dtype):
    model = network()
    codes = quantize(fisher_of(model)["0.weight"], "square_root").codes
    fisher = fisher_of(model) | {"0.weight": codes}
    with pytest.raises(ValueError, match=r"fisher of 0\.weight: expected .*quantization\.dequant"):
        make(cls, model, fisher=fisher, fisher_dtype=fisher_dtype)


@BOTH
@pytest.mark.parametrize("dtype", ["8bit", "8bit_logarithmic"])
def test_a_floating_fisher_is_loaded_over_one_in_8_bits(cls, dtype):
    first, second = network(), network()
    a, b = make(cls, first), make(cls, second, fisher_dtype=dtype)
    train(first, a, 2)
    train(second, b, 1)
    second.load_state_dict(first.state_dict())
    b.load_state_dict(a.state_dict())
    assert "fisher_scale" not in b.state[second[0].weight]
    train(first, a)
    train(second, b)
    assert torch.equal(weights(first), weights(second))


def test_codes_find_their_blocks_again_where_the_strides_were_lost():
    model = network().to(memory_format=torch.channels_last)
    optimizer = make(EWCSGD, model, fisher_dtype="8bit")
    saved = optimizer.state_dict()
    before = weights(model)
    train(model, optimizer)
    expected = weights(model)
    for state in saved["state"].values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = value.contiguous()
    other = network().to(memory_format=torch.channels_last)
    assert torch.equal(weights(other), before)
    loaded = EWCSGD(other.named_parameters(), lr=0.01, ewc_lambda=0.0)
    loaded.load_state_dict(saved)
    train(other, loaded)
    assert torch.equal(weights(other), expected)


@BOTH
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fisher_dtype": torch.float16}, r"fisher of 0\.weight: expected finite entries >= 0"),
        ({"anchor_dtype": torch.float16}, r"anchor of 0\.weight: expected finite entries, got"),
    ],
)
def test_a_dtype_that_does_not_reach_as_far_is_refused(cls, settings, message):
    model = network()
    fisher = {name: torch.full_like(p, 1e6) for name, p in model.named_parameters()}
    with torch.no_grad():
        model[0].weight.fill_(1e6)
    with pytest.raises(ValueError, match=message):
        make(cls, model, fisher=fisher, **settings)


def test_an_anchor_that_is_not_finite_is_refused():
    model = network()
    anchor = {name: torch.full_like(p, torch.nan) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"anchor of 0\.weight: expected finite entries"):
        make(EWCSGD, model, anchor=anchor)


@pytest.mark.parametrize("lost", ["step", "exp_avg", "exp_avg_sq"])
def test_moments_that_do_not_belong_together_are_refused(lost):
    model = network()
    optimizer = make(EWCAdamW, model)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0][lost]
    with pytest.raises(ValueError, match=rf"state of 0\.weight: expected .* without {lost}$"):
        optimizer.load_state_dict(saved)


# Stochastic rounding


def test_a_capturable_optimizer_counts_its_steps_on_a_cpu_too():
    ends = []
    for capturable in (False, True):
        param = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = EWCSGD([param], lr=1.0, stochastic_rounding=3, capturable=capturable)
        for _ in range(20):
            param.grad = torch.full_like(param, -(2.0**-12))
            optimizer.step()
        ends.append(param.detach())
    assert torch.equal(*ends)


@BOTH
def test_small_updates_move_bfloat16_weights_on_average(cls):
    means = []
    for seed in (None, 3):
        param = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = cls([param], lr=1e-4, weight_decay=0.0, stochastic_rounding=seed)
        for _ in range(50):
            param.grad = torch.ones_like(param)
            optimizer.step()
        means.append(float(param.detach().double().mean()))
    assert means[0] == 1.0
    assert means[1] == pytest.approx(1 - 50e-4, abs=6 * (50 * 0.0256) ** 0.5 / 256 / 4096**0.5)


@BOTH
def test_a_resumed_run_draws_the_same_bits_as_one_that_was_not_cut(cls):
    whole, cut = network().to(torch.bfloat16), network().to(torch.bfloat16)
    a = make(cls, whole, stochastic_rounding=11)
    b = make(cls, cut, stochastic_rounding=11)
    train(whole, a)
    train(whole, a)
    train(cut, b)
    c = make(cls, cut)
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    train(cut, c)
    assert torch.equal(weights(whole), weights(cut))
    assert c.param_groups[0]["rounding_steps"] == 6


def test_a_parameter_without_a_gradient_does_not_change_the_bits_of_the_others():
    def run(freeze: bool) -> Tensor:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(100).to(torch.bfloat16)) for _ in range(3)]
        optimizer = EWCSGD(params, lr=0.01, stochastic_rounding=5)
        for param in params:
            param.grad = torch.ones_like(param)
        if freeze:
            params[0].grad = None
        optimizer.step()
        return params[2].detach()

    assert torch.equal(run(freeze=True), run(freeze=False))
