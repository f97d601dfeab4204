"""Balanced unlearning: a backdoor planted in a small CNN on digits is gone, and the rest stays."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional

from bdu import metrics
from bdu.attacks import make_attack, poison
from bdu.attacks.trigger import triggered_like
from bdu.cli.demo import digits
from bdu.data import split_indices
from bdu.defenses.balanced import Settings, _forget
from bdu.defenses.course import standard_error
from bdu.defenses.protocol import DefenderData, Samples
from bdu.models import build
from bdu.trainer import unlearn
from bdu.training import fit

TARGET = 0
VALIDATED = 50  # a fifth of the 250 clean samples
SHORT = {"unlearn_steps": 60, "recovery_steps": 40, "fisher_samples": 200, "progress": False}
TINY = {**SHORT, "unlearn_steps": 6, "recovery_steps": 4, "evaluate_every": 3}


class Interrupted(Exception):
    pass


class Planted:
    """A backdoored model and what its defender and its evaluator hold."""

    def __init__(self):
        data = digits()
        x, y = torch.from_numpy(data["x"])[:, None], torch.from_numpy(data["y"])
        attacker, clean, triggered, evaluator = split_indices(y, [1000, 250, 80, 467], 0)
        triggered = triggered[y[triggered] != TARGET]
        self.trigger = make_attack("badnets")
        bad = poison(
            x[attacker], y[attacker], self.trigger, rate=0.1, target=TARGET, num_classes=10, seed=0
        )
        self.model = build("smallcnn", num_classes=10, in_channels=1, seed=0)
        fit(
            *(self.model, bad.x, bad.y),
            epochs=12,
            lr=0.1,
            batch_size=64,
            augment=False,
            seed=0,
            progress=False,
        )
        self.clean = x[clean], y[clean]
        self.bad_x, self.y_true = triggered_like(x[triggered], self.trigger), y[triggered]
        self.triggered = self.bad_x, torch.full_like(self.y_true, TARGET)
        self.evaluator = x[evaluator], y[evaluator]

    def rates(self, model):
        return metrics.evaluate(
            model, *self.evaluator, num_classes=10, trigger=self.trigger, target=TARGET
        )

    def unlearn(self, **options):
        given = {"clean": self.clean, "triggered": self.triggered, "seed": 0, **TINY, **options}
        return unlearn(given.pop("model", self.model), **given)


@pytest.fixture(scope="module")
def planted():
    return Planted()


@pytest.fixture(scope="module")
def before(planted):
    return planted.rates(planted.model)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def flags(model):
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def kept_step(history):
    """The latest step whose score is within a standard error of the best until then."""
    best, kept = -math.inf, None
    for line in history:
        clean = line["validation_clean_accuracy"]
        score = clean - line["validation_attack_success_rate"]
        if score >= best - math.sqrt(clean * (1 - clean) / VALIDATED):
            kept = line["step"]
        best = max(best, score)
    return kept


def test_the_backdoor_is_there_before(before):
    assert before["attack_success_rate"] > 0.95
    assert before["clean_accuracy"] > 0.95


@pytest.mark.parametrize("forget", ["unlikelihood", "cross_entropy", "true_label"])
def test_the_backdoor_is_gone_and_clean_accuracy_is_kept(planted, before, forget):
    triggered = (*planted.triggered, planted.y_true)
    settings = SHORT | {"evaluate_every": 25, "forget": forget}
    if forget == "cross_entropy":
        settings["triggered_weight"] = 1.0  # no slope where the model is certain
    result = planted.unlearn(**settings, triggered=triggered)
    after = planted.rates(result.model)
    assert after["attack_success_rate"] <= after["false_target_rate"] + 0.03
    assert after["clean_accuracy"] >= before["clean_accuracy"] - 0.03
    assert after["robust_accuracy"] > 0.8
    assert result.method == "balanced"
    assert result.settings["forget"] == forget
    assert "ran all its steps" in result.stopped
    assert [line["step"] for line in result.history] == [0, 25, 50, 75, 100]
    phases = [line["phase"] for line in result.history]
    assert phases == ["before", "unlearn", "unlearn", "recovery", "recovery"]


def test_the_model_passed_in_is_untouched_bit_for_bit(planted):
    model = copy.deepcopy(planted.model).train()
    model.features[1].eval()
    model.features[0].weight.requires_grad_(False)
    state, marks = weights(model), flags(model)
    result = planted.unlearn(model=model)
    assert result.model is not model
    assert_same_bits(weights(model), state)
    assert flags(model) == marks
    assert all(p.grad is None for p in model.parameters())
    # What takes no gradient is not to be learned, so it stays in the copy, too.
    assert torch.equal(result.model.features[0].weight, state["features.0.weight"])
    assert not torch.equal(result.model.fc.weight, state["fc.weight"])


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(planted):
    torch.manual_seed(1)
    one = weights(planted.unlearn().model)
    torch.manual_seed(2)
    assert_same_bits(weights(planted.unlearn().model), one)
    other = weights(planted.unlearn(seed=1).model)
    assert not torch.equal(other["fc.weight"], one["fc.weight"])


def test_global_random_state_is_left_as_it_was(planted):
    state = torch.get_rng_state()
    planted.unlearn()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stop_at", [3, 6, 9])
def test_resumed_run_gives_bit_for_bit_the_weights_of_a_whole_one(planted, tmp_path, stop_at):
    whole = planted.unlearn()

    def stop(line, model):
        if line["step"] == stop_at:
            raise Interrupted

    file = tmp_path / "state.pt"
    with pytest.raises(Interrupted):
        planted.unlearn(callbacks=[stop], state_file=file)
    looked_at = []
    resumed = planted.unlearn(
        state_file=file, resume=True, callbacks=[lambda line, _: looked_at.append(line["step"])]
    )
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert resumed.history == whole.history
    assert resumed.stopped == whole.stopped
    assert looked_at == [step for step in (3, 6, 9, 10) if step > stop_at]


def test_state_of_a_run_with_other_settings_is_refused(planted, tmp_path):
    planted.unlearn(state_file=tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"^lr: expected 0\.01, as in the run to be resumed"):
        planted.unlearn(state_file=tmp_path / "state.pt", resume=True, lr=0.02)


def test_uint8_and_float_images_and_data_sets_give_the_same_run(planted):
    one = planted.unlearn()
    clean, bad = ((x.float() / 255, y) for x, y in (planted.clean, planted.triggered))
    other = planted.unlearn(clean=clean, triggered=torch.utils.data.TensorDataset(*bad))
    assert_same_bits(weights(other.model), weights(one.model))


def test_callbacks_see_every_look_and_may_add_to_it(planted):
    seen = []

    def add(line, model):
        return {"twice": 2 * line["step"]}

    result = planted.unlearn(callbacks=[add, lambda line, model: seen.append((line, model))])
    assert [line for line, _ in seen] == result.history
    assert [line["twice"] for line in result.history] == [2 * x["step"] for x in result.history]
    seen.pop(0)  # before any step
    for key in ("loss", "clean_loss", "triggered_loss", "penalty", "learning_rate"):
        assert all(math.isfinite(line[key]) for line, _ in seen)
    assert seen[-1][0]["learning_rate"] < seen[0][0]["learning_rate"]


@pytest.mark.parametrize("fisher", ["contrastive", "clean"])
def test_a_stronger_pull_stays_closer_to_the_start(planted, fisher):
    def distance(ewc_lambda):
        # With no look in between, both keep the weights of the last step.
        cleaned = planted.unlearn(ewc_lambda=ewc_lambda, fisher=fisher, evaluate_every=10).model
        pairs = zip(cleaned.parameters(), planted.model.parameters(), strict=True)
        return sum(float((p - start).detach().square().sum()) for p, start in pairs)

    weak, strong = distance(0.0), distance(1e4)
    assert 0 < strong < 0.9 * weak


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "none"}, "method: expected one of .*balanced"),
        ({"step_size": 1}, "step_size: expected one of .*augment"),
        ({"triggered": None}, "triggered: expected samples"),
        ({"forget": "true_label"}, r"triggered: expected \(x, y_target, y_true\)"),
        ({"forget": "ascent"}, "forget: expected one of unlikelihood"),
        ({"fisher": "running"}, "fisher: expected one of contrastive"),
        ({"unlearn_steps": -1}, "unlearn_steps: expected a whole number >= 0, got -1"),
        ({"recovery_steps": 2.5}, "recovery_steps: expected a whole number >= 0, got 2.5"),
        ({"unlearn_steps": 0, "recovery_steps": 0}, "unlearn_steps: expected at least one step"),
        ({"batch_size": 0}, "batch_size: expected a whole number >= 1, got 0"),
        ({"triggered_batch_size": 0}, "triggered_batch_size: expected a whole number >= 1"),
        ({"evaluate_every": 0}, "evaluate_every: expected a whole number >= 1, got 0"),
        ({"fisher_samples": 0}, "fisher_samples: expected a whole number >= 1, got 0"),
        ({"distillation": 1.5}, r"distillation: expected a share in \[0, 1\], got 1.5"),
        ({"clean_accuracy_floor": -0.1}, "clean_accuracy_floor: expected a share"),
        ({"lr": -1.0}, "lr: expected a number > 0, got -1.0"),
        ({"lr": float("nan")}, "lr: expected a number > 0, got nan"),
        ({"lr": "fast"}, "lr: expected a number, got 'fast'"),
        ({"lr": True}, "lr: expected a number, got True"),
        ({"ceiling": "high"}, "ceiling: expected a number or None, got 'high'"),
        ({"augment": "maybe"}, "augment: expected true or false, got 'maybe'"),
        ({"momentum": -0.5}, "momentum: expected"),
        ({"gamma": float("inf")}, "gamma: expected a number >= 0, got inf"),
        ({"ewc_lambda": -1.0}, "ewc_lambda: expected a number >= 0"),
        ({"triggered_weight": -1.0}, "triggered_weight: expected a number >= 0"),
        ({"temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected a number > 0, got 0.0"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name_and_nothing_is_written(
    planted, tmp_path, options, message
):
    with pytest.raises(ValueError, match="^" + message):
        planted.unlearn(**options, state_file=tmp_path / "state.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("clean", lambda x, y: (x, y + 1), "clean: expected labels below 10 .*, got 10"),
        ("clean", lambda x, y: (x, y - 1), r"clean\[1\]: expected labels of 0 and above, got -1"),
        ("clean", lambda x, y: (x, y[1:]), r"clean\[1\]: expected 250 labels, got 249"),
        ("clean", lambda x, y: (x[:4], y[:4]), "clean: expected at least 5 samples, got 4"),
        ("clean", lambda x, y: (x[:, 0], y), r"clean\[0\]: expected \(N, C, H, W\)"),
        ("clean", lambda x, y: (x.float(), y), r"clean\[0\]: expected float values in \[0, 1\]"),
        ("clean", lambda x, y: (x.repeat(1, 3, 1, 1), y), "triggered: expected images of"),
        ("triggered", lambda x, y: (x, y + 10), "triggered: expected labels below 10"),
        ("triggered", lambda x, y: (x, y, y + 10), "triggered: expected labels below 10"),
        ("triggered", lambda x, y: (x[..., :7], y), r"triggered: expected images of \(1, 8, 8\)"),
        ("triggered", lambda x, y: (x[:3], y[:3]), "triggered: expected at least 5 samples"),
    ],
)
def test_data_that_do_not_fit_are_refused_by_name_and_nothing_is_written(
    planted, tmp_path, part, change, message
):
    with pytest.raises(ValueError, match="^" + message):
        planted.unlearn(**{part: change(*getattr(planted, part))}, state_file=tmp_path / "state.pt")
    assert list(tmp_path.iterdir()) == []


def test_classes_without_a_clean_sample_are_warned_of(planted):
    x, y = planted.clean
    some = ~torch.isin(y, torch.tensor([2, 7]))
    message = r"^clean: has no sample of 2 of the model's 10 classes \(2, 7\); what the model knows"
    with pytest.warns(UserWarning, match=message):
        planted.unlearn(clean=(x[some], y[some]))


def test_images_that_the_model_does_not_take_are_refused_by_name(planted):
    clean, bad = ((x.repeat(1, 3, 1, 1), y) for x, y in (planted.clean, planted.triggered))
    message = r"^clean: expected images that the model takes, got \(3, 8, 8\)"
    with pytest.raises(ValueError, match=message):
        planted.unlearn(clean=clean, triggered=bad)


def test_a_source_of_another_kind_is_refused_by_name(planted):
    with pytest.raises(TypeError, match=r"^clean: expected a Dataset"):
        planted.unlearn(clean="images")


def test_the_validation_split_is_a_fifth_and_disjoint(planted):
    x = torch.arange(250 * 64, dtype=torch.float32).reshape(250, 1, 8, 8) / 16000
    data = DefenderData.split(
        (x, planted.clean[1]), planted.triggered, seed=0, device=torch.device("cpu")
    )
    assert (len(data.clean), len(data.clean_validation)) == (200, 50)
    first = torch.cat([data.clean.x, data.clean_validation.x])[:, 0, 0, 0]
    assert len(first.unique()) == 250
    assert set(data.clean_validation.y.tolist()) == set(range(10))


def test_a_run_that_loses_the_model_stops_early_and_says_so(planted):
    seen = {0: weights(planted.model)}
    result = planted.unlearn(
        lr=30.0,
        ewc_lambda=0.0,
        clean_accuracy_floor=1.0,
        callbacks=[lambda line, model: seen.update({line["step"]: weights(model)})],
    )
    assert result.stopped.startswith("stopped at step 3: clean accuracy on the validation split")
    assert "fell to" in result.stopped
    assert [line["step"] for line in result.history] == [0, 3]
    assert_same_bits(weights(result.model), seen[0])


def test_weights_below_the_floor_of_clean_accuracy_are_not_kept(planted):
    result = planted.unlearn(lr=30.0, ewc_lambda=0.0)
    assert result.stopped.startswith("stopped at step 3")
    assert "; kept the weights of step 0, the model as it was" in result.stopped
    assert_same_bits(weights(result.model), weights(planted.model))


def test_the_weights_kept_are_the_latest_that_validation_cannot_tell_from_the_best(planted):
    seen = {0: weights(planted.model)}
    result = planted.unlearn(
        **SHORT | {"evaluate_every": 10},
        callbacks=[lambda line, model: seen.update({line["step"]: weights(model)})],
    )
    kept = kept_step(result.history)
    assert_same_bits(weights(result.model), seen[kept])
    assert ("kept the weights of step" in result.stopped) == (kept != 100)


def test_unlikelihood_has_a_gradient_where_ascended_cross_entropy_has_none():
    logits = torch.tensor([[60.0, 0.0, -1.0], [0.0, 50.0, 3.0]])
    bad = Samples(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]))

    def slope(forget):
        z = logits.clone().requires_grad_()
        _forget(Settings(forget=forget))(z, bad).backward()
        return z.grad[torch.arange(2), bad.y]

    torch.testing.assert_close(slope("unlikelihood"), torch.full((2,), 0.5))
    assert float(slope("cross_entropy").abs().max()) < 1e-12


def test_unlikelihood_is_minus_log_of_one_minus_p_and_ends_flat():
    z = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    bad = Samples(torch.zeros(1, 1, 1, 1), torch.tensor([0]))
    loss = _forget(Settings())(z, bad)
    torch.testing.assert_close(loss, -(1 - z.softmax(1)[0, 0]).log())
    gone = torch.tensor([[-200.0, 0.0, 0.0]], requires_grad=True)
    _forget(Settings())(gone, bad).backward()
    assert float(gone.grad.abs().max()) < 1e-30
    huge = torch.tensor([[1e4, 0.0, 0.0]])
    assert math.isfinite(float(_forget(Settings())(huge, bad)))


def test_ascended_cross_entropy_stops_at_its_ceiling():
    bad = Samples(torch.zeros(1, 1, 1, 1), torch.tensor([0]))
    z = torch.tensor([[-1.0, 2.0, 0.0]], requires_grad=True)
    loss = _forget(Settings(forget="cross_entropy"))(z, bad)
    reached = float(functional.cross_entropy(z, bad.y).detach())
    assert reached > 2 * math.log(3)
    assert float(loss.detach()) == pytest.approx(-2 * math.log(3))
    loss.backward()
    assert float(z.grad.abs().max()) == 0.0
    higher = _forget(Settings(forget="cross_entropy", ceiling=10.0))(z, bad)
    assert float(higher.detach()) == pytest.approx(-reached)
    z.grad = None
    higher.backward()
    assert float(z.grad[0, 0]) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: expected 0, as in the run to be resumed, got 1"),
        ({"lr": 0.5}, "lr: expected"),
        ({"clean": None}, "model and data: expected"),
        ({"model": None}, "model and data: expected"),
    ],
)
def test_a_run_is_not_resumed_on_other_data_or_with_another_seed(
    planted, tmp_path, change, message
):
    file = tmp_path / "state.pt"
    planted.unlearn(state_file=file)
    if "clean" in change:
        x, y = planted.clean
        change = {"clean": (x.flip(0), y.flip(0))}
    if "model" in change:
        other = copy.deepcopy(planted.model)
        with torch.no_grad():
            next(other.parameters()).mul_(1.01)
        change = {"model": other}
    with pytest.raises(ValueError, match=message):
        planted.unlearn(state_file=file, resume=True, **change)


def test_a_run_that_stopped_early_stays_stopped_when_it_is_resumed(planted, tmp_path):
    file = tmp_path / "state.pt"
    settings = {"lr": 30.0, "ewc_lambda": 0.0, "state_file": file}
    first = planted.unlearn(**settings)
    assert "fell to" in first.stopped
    again = planted.unlearn(**settings, resume=True)
    assert again.stopped == first.stopped
    assert again.history == first.history


def test_resuming_from_nowhere_is_refused(planted):
    with pytest.raises(ValueError, match="state_file: expected a path to resume from, got None"):
        planted.unlearn(resume=True)


@pytest.mark.parametrize("mirror", ["None", "false", 0.5])
def test_mirror_is_true_false_or_none(planted, mirror):
    with pytest.raises(ValueError, match="mirror: expected true, false or None"):
        planted.unlearn(mirror=mirror)


def test_true_classes_that_are_the_target_everywhere_are_refused(planted):
    x, y = planted.triggered
    with pytest.raises(ValueError, match="triggered: expected y_true to be what the images really"):
        planted.unlearn(triggered=(x, y, y))


def test_a_few_samples_that_are_all_right_do_not_make_a_model_faultless():
    assert standard_error(1.0, 60) == pytest.approx(math.sqrt(61 / 62 * 1 / 62 / 60))
    assert standard_error(0.8, 10_000) == pytest.approx(0.004, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_dtype_is_named(planted, dtype):
    model = copy.deepcopy(planted.model).to(dtype)
    with pytest.raises(ValueError, match=f"model: expected float32 parameters, got .* in {dtype}"):
        planted.unlearn(model=model)


def test_images_with_a_gradient_and_classes_that_are_not_known_are_taken(planted):
    x, y = planted.clean
    bad, target = planted.triggered
    images = x.float().div(255).requires_grad_()
    result = planted.unlearn(clean=(images, y), triggered=(bad, target, None))
    assert_same_bits(weights(result.model), weights(planted.unlearn().model))


def test_outputs_that_are_no_numbers_end_the_run_with_the_best_weights(planted):
    result = planted.unlearn(ewc_lambda=0.0, lr=1e30, evaluate_every=1, radius=0.0)
    assert result.stopped.startswith("stopped at step 1: model: expected finite outputs")
    assert "kept the weights of step 0" in result.stopped
    assert_same_bits(weights(result.model), weights(planted.model))
