"""The plain training loop: it learns, it resumes bit for bit, and it stops where it must."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from bdu.models import build
from bdu.training import fit, learning_rate_factor


class Interrupted(Exception):
    pass


def data(count=97):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    x = torch.randint(0, 100, (count, 1, 8, 8), dtype=torch.uint8, generator=g)
    return x + (70 * y)[:, None, None, None].to(torch.uint8), y


def with_dropout(seed):
    model = build("smallcnn", num_classes=3, in_channels=1, seed=seed)
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc)
    return model


def without_seconds(history):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in history]


OPTIONS = {"epochs": 4, "lr": 0.05, "batch_size": 16, "seed": 7, "progress": False}


def test_training_learns_and_tells_each_epoch():
    model = build("smallcnn", num_classes=3, in_channels=1, seed=0)
    lines = []
    history = fit(model, *data(), callbacks=[lines.append], **OPTIONS)
    assert lines == history
    assert [line["epoch"] for line in history] == [1, 2, 3, 4]
    assert set(history[0]) == {"epoch", "step", "steps", "loss", "accuracy", "seconds", "lr"}
    assert [line["step"] for line in history] == [k * history[0]["step"] for k in (1, 2, 3, 4)]
    assert {line["steps"] for line in history} == {history[-1]["step"]}
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["accuracy"] > 0.9
    assert 0 < history[-1]["lr"] < history[0]["lr"]


@pytest.mark.parametrize("channels_last", [True, False])
def test_resumed_run_gives_bit_for_bit_the_weights_of_a_whole_one(tmp_path, channels_last):
    options = OPTIONS | {"channels_last": channels_last}
    whole = with_dropout(0)
    expected = fit(whole, *data(), **options)

    def stop(line):
        if line["epoch"] == 2:
            raise Interrupted

    path = tmp_path / "state.pt"
    with pytest.raises(Interrupted):
        fit(with_dropout(0), *data(), **options, callbacks=[stop], state_file=path)
    resumed = with_dropout(1)
    history = fit(resumed, *data(), **options, state_file=path, resume=True)
    assert without_seconds(history) == without_seconds(expected)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_same_seed_gives_the_same_weights_whatever_the_global_state():
    first, second, other = with_dropout(0), with_dropout(0), with_dropout(0)
    fit(first, *data(), **OPTIONS)
    torch.rand(5)
    before = torch.random.get_rng_state()
    fit(second, *data(), **OPTIONS)
    assert torch.equal(torch.random.get_rng_state(), before)
    fit(other, *data(), **(OPTIONS | {"seed": 8}))
    assert torch.equal(first.fc[1].weight, second.fc[1].weight)
    assert not torch.equal(first.fc[1].weight, other.fc[1].weight)


def test_resume_of_a_finished_run_only_loads(tmp_path):
    model = with_dropout(0)
    fit(model, *data(), **OPTIONS, state_file=tmp_path / "s.pt")
    again = with_dropout(1)
    called = []
    history = fit(
        again,
        *data(),
        **OPTIONS,
        state_file=tmp_path / "s.pt",
        resume=True,
        callbacks=[called.append],
    )
    assert len(history) == 4
    assert called == []
    assert torch.equal(again.fc[1].weight, model.fc[1].weight)


def test_resume_with_other_settings_is_refused_by_name(tmp_path):
    fit(with_dropout(0), *data(), **OPTIONS, state_file=tmp_path / "s.pt")
    with pytest.raises(ValueError, match=r"state_file: expected a run with lr=0\.1, .* lr=0\.05"):
        fit(
            with_dropout(0),
            *data(),
            **(OPTIONS | {"lr": 0.1}),
            state_file=tmp_path / "s.pt",
            resume=True,
        )
    with pytest.raises(ValueError, match="state_file: expected a path"):
        fit(with_dropout(0), *data(), **OPTIONS, resume=True)


def test_resume_with_other_data_is_refused(tmp_path):
    fit(with_dropout(0), *data(), **OPTIONS, state_file=tmp_path / "s.pt")
    x, y = data()
    for other in ((1 - x, y), (x, y.flip(0))):
        with pytest.raises(ValueError, match=r"^x, y: expected the data of the run in"):
            fit(with_dropout(0), *other, **OPTIONS, state_file=tmp_path / "s.pt", resume=True)


def test_a_state_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "s.pt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"^state_file: expected a new file, or resume"):
        fit(with_dropout(0), *data(), **OPTIONS, state_file=tmp_path / "s.pt")
    assert (tmp_path / "s.pt").read_text() == "mine"


def test_resume_without_a_file_starts_anew(tmp_path):
    first, second = with_dropout(0), with_dropout(0)
    fit(first, *data(), **OPTIONS)
    fit(second, *data(), **OPTIONS, state_file=tmp_path / "s.pt", resume=True)
    assert torch.equal(first.fc[1].weight, second.fc[1].weight)


class BrokenAtStep(nn.Module):
    """Gives NaN from its n-th training batch on."""

    def __init__(self, step):
        super().__init__()
        self.fc = nn.Linear(64, 3)
        self.left = step

    def forward(self, x):
        self.left -= 1
        out = self.fc(x.flatten(1))
        return out if self.left > 0 else out * float("nan")


@pytest.mark.parametrize(
    ("batch", "epoch", "step"), [(1, 1, 1), (5, 1, 5), (60, 2, 11), (45, 1, 45)]
)
def test_loss_that_is_not_finite_names_epoch_and_step(batch, epoch, step):
    size = 2 if batch == 45 else OPTIONS["batch_size"] // 8
    x, y = data(98)
    with pytest.raises(FloatingPointError, match=rf"got nan in epoch {epoch}, step {step};"):
        fit(BrokenAtStep(batch), x, y, **(OPTIONS | {"batch_size": size}))


def test_last_batch_of_one_sample_joins_the_one_before():
    sizes = []
    model = build("smallcnn", num_classes=3, in_channels=1)
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    fit(model, *data(33), **(OPTIONS | {"epochs": 1}))
    assert sizes == [16, 17]


def test_training_leaves_flags_memory_format_and_gradients_as_they_were():
    model = build("smallcnn", num_classes=3, in_channels=1).eval()
    x, y = data()
    before = x.clone()
    fit(model, x, y, **OPTIONS)
    assert not model.training
    assert all(p.is_contiguous() and p.grad is None for p in model.parameters())
    assert torch.equal(x, before)


def test_frozen_parameters_stay():
    model = build("smallcnn", num_classes=3, in_channels=1)
    model.fc.weight.requires_grad_(False)
    before = copy.deepcopy(model.fc.weight)
    fit(model, *data(), **OPTIONS)
    assert torch.equal(model.fc.weight, before)


def test_bfloat16_autocast_learns_and_keeps_float32_weights():
    model = build("smallcnn", num_classes=3, in_channels=1, seed=0)
    history = fit(model, *data(), **OPTIONS, autocast_dtype=torch.bfloat16)
    assert history[-1]["loss"] < history[0]["loss"]
    assert model.fc.weight.dtype == torch.float32


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_learning_rate_stays_positive_and_within_its_peak(schedule, steps):
    factors = [learning_rate_factor(schedule, step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1


def test_one_cycle_rises_for_a_quarter_and_falls():
    factors = [learning_rate_factor("one-cycle", step, 100) for step in range(100)]
    assert factors.index(1) == 24
    assert factors[:25] == sorted(factors[:25])
    assert factors[24:] == sorted(factors[24:], reverse=True)
    assert learning_rate_factor("cosine", 50, 100) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"lr": math.inf}, "lr: expected a positive number, got inf"),
        ({"schedule": "step"}, "schedule: expected one of one-cycle, cosine, constant"),
        ({"autocast_dtype": torch.float16}, r"autocast_dtype: expected torch\.bfloat16"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected"),
        ({"momentum": 3.0}, r"momentum: expected a number in \[0, 1\), got 3.0"),
        ({"weight_decay": math.nan}, "weight_decay: expected a number >= 0, got nan"),
        ({"seed": 2**64}, "seed: expected a whole number from 0"),
        ({"seed": 1.5}, "seed: expected a whole number from 0 to .* got 1.5"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        fit(with_dropout(0), *data(), **(OPTIONS | change))


def test_labels_of_another_length_are_named():
    x, y = data()
    with pytest.raises(ValueError, match="y: expected 97 labels, as x, got 3"):
        fit(with_dropout(0), x, y[:3], **OPTIONS)
