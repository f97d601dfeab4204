"""auto: what fools a model and not its cleaned copy is a backdoor; clean models are left alone."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch

from bdu import auto, metrics
from bdu.attacks import make_attack, poison
from bdu.cli.demo import digits
from bdu.data import as_unit_float, split_indices
from bdu.defenses import deficit
from bdu.defenses.classwise import KINDS, NEXT
from bdu.defenses.course import Course, Running
from bdu.defenses.protocol import DefenderData, Result
from bdu.models import build
from bdu.trainer import unlearn
from bdu.training import fit

TARGET = 0


class Suspect:
    """A small network on digits of 16 x 16 pixels, with a backdoor or without.

    Of 8 x 8 the patch of BadNets would be a seventh, which is no unusually small change.
    """

    def __init__(self, rate: float) -> None:
        data = digits()
        x, y = torch.from_numpy(data["x"])[:, None], torch.from_numpy(data["y"])
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        attacker, clean, evaluator = split_indices(y, [1000, 250, 500], 0)
        self.trigger = make_attack("badnets")
        if rate:
            bad = poison(
                *(x[attacker], y[attacker], self.trigger),
                rate=rate,
                target=TARGET,
                num_classes=10,
                seed=0,
            )
            learned = bad.x, bad.y
        else:
            learned = x[attacker], y[attacker]
        self.model = build("smallcnn", num_classes=10, in_channels=1, seed=0)
        fit(
            *(self.model, *learned),
            epochs=8,
            lr=0.1,
            batch_size=64,
            augment=False,
            seed=0,
            progress=False,
        )
        self.model.eval()
        self.clean, self.evaluator = (x[clean], y[clean]), (x[evaluator], y[evaluator])

    def rates(self, model):
        return metrics.evaluate(
            model, *self.evaluator, num_classes=10, trigger=self.trigger, target=TARGET
        )

    def unlearn(self, **options):
        options = {"steps": 100, "inversion_steps": 100} | options
        return unlearn(
            self.model, method="auto", clean=self.clean, seed=0, progress=False, **options
        )


@pytest.fixture(scope="module")
def planted():
    return Suspect(0.1)


@pytest.fixture(scope="module")
def cleaned(planted):
    return planted.unlearn()


def test_a_backdoor_is_seen_and_removed(planted, cleaned):
    before, after = planted.rates(planted.model), planted.rates(cleaned.model)
    assert before["attack_success_rate"] > 0.9
    assert after["attack_success_rate"] < 0.4
    assert after["clean_accuracy"] > before["clean_accuracy"] - 0.05
    assert cleaned.stopped.startswith("chose ")
    assert cleaned.history[1]["anomaly"] >= 3
    assert cleaned.history[-1]["phase"] == "choose"


def test_a_clean_model_is_left_as_it_is():
    clean = Suspect(0.0)
    result = clean.unlearn()
    assert result.stopped.startswith("looks clean and was left as it is")
    weights = clean.model.state_dict()
    assert all(torch.equal(v, weights[n]) for n, v in result.model.state_dict().items())
    tried = [line for line in result.history if line["phase"] == "try"]
    assert len(tried) == 1  # no other candidate was run


class Judge:
    """What auto is left with once all candidates have been run."""

    def __init__(self, planted, cleaned) -> None:
        data = DefenderData.split(planted.clean, None, seed=0, device=torch.device("cpu"))
        self.settings = auto.Settings(inversion_steps=150)
        running = Running(0, progress=False)
        self.course = Course("auto", planted.model, data, self.settings, running)
        weights = cleaned.model.state_dict()
        tried = {"fst": weights}
        self.anomalies = auto._anomalies(self.course, self.settings, tried)
        self.found = auto._operators(self.course, self.settings, tried)

    def choose(self, weights, **settings):
        s = replace(self.settings, **settings)
        return auto._chosen(self.course, s, weights, self.anomalies >= s.threshold)


@pytest.fixture(scope="module")
def judge(planted, cleaned):
    return Judge(planted, cleaned)


def test_the_target_stands_out(judge):
    assert judge.found.targets[judge.anomalies.max(0).values.argmax()] == TARGET
    assert judge.anomalies[:, TARGET].max() >= judge.settings.threshold


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_what_turns_half_of_all_images_to_their_next_class_stands_out(judge, share, monkeypatch):
    fooled = torch.full_like(judge.anomalies, 0.3)
    fooled[1, judge.found.targets == NEXT] = share
    sizes = torch.full_like(fooled, 0.1)
    monkeypatch.setattr(auto, "judge", lambda *_: (fooled, sizes))
    monkeypatch.setattr(auto, "_operators", lambda *_: judge.found)
    running = Running(0, progress=False)
    course = Course("auto", judge.course.before, judge.course.data, judge.settings, running)
    anomalies = auto._anomalies(course, judge.settings, {"fst": judge.course.before.state_dict()})
    assert (anomalies >= judge.settings.threshold).any() == (share > 0.5)
    assert float(anomalies[:, judge.found.targets != NEXT].max()) == 0


def test_a_class_that_is_missed_and_never_called_is_a_deficit(planted, judge):
    blind = copy.deepcopy(planted.model)
    with torch.no_grad():
        list(blind.parameters())[-1][3] -= 1e3  # its bias
    course = Course("auto", blind, judge.course.data, judge.settings, Running(0, progress=False))
    deficits = deficit.deficits(course, judge.found.targets)
    of_class = sum(
        int((part.y == 3).sum()) for part in (course.data.clean, course.data.clean_validation)
    )
    assert float(deficits[3]) == pytest.approx(of_class**0.5)
    assert float(deficits[judge.found.targets == NEXT].abs().max()) == 0
    # of other targets, too, once it is kept
    assert deficit.deficits(course, torch.tensor([NEXT, 3])).tolist() == [0, float(deficits[3])]


def test_a_class_that_is_taken_for_another_as_often_as_it_is_missed_is_none(judge, monkeypatch):
    data = judge.course.data
    called = {id(part.x): part.y.clone() for part in (data.clean, data.clean_validation)}
    missed, wrongly = 6, 4
    labels = called[id(data.clean.x)]
    labels[torch.nonzero(data.clean.y == 3)[:missed, 0]] = 5
    labels[torch.nonzero(data.clean.y == 7)[:wrongly, 0]] = 3
    course = Course("auto", judge.course.before, data, judge.settings, Running(0, progress=False))
    monkeypatch.setattr(
        deficit, "predict", lambda model, x: torch.nn.functional.one_hot(called[id(x)], 10).float()
    )
    deficits = deficit.deficits(course, judge.found.targets)
    assert float(deficits[3]) == pytest.approx(
        (missed - 2 * wrongly) / (missed + 4 * wrongly) ** 0.5
    )
    assert float(deficits[5]) == pytest.approx(-2 * missed / (4 * missed) ** 0.5)
    assert float(deficits[7]) == pytest.approx(wrongly**0.5)


def test_a_deficit_makes_operators_suspicious_where_none_of_its_class_stands_out():
    anomalies = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
    for deficits, expected in (
        ([0.0, 0.0, 0.0], [[1, 0, 0], [0, 0, 0], [1, 0, 0]]),
        ([9.0, 0.0, 0.0], [[1, 0, 0], [0, 0, 0], [1, 0, 0]]),
        ([0.0, 3.0, 0.0], [[1, 1, 0], [0, 1, 0], [1, 1, 0]]),
    ):
        suspicious = auto._suspicious(anomalies, torch.tensor(deficits), 3.0)
        assert suspicious.int().tolist() == expected


def test_the_least_that_is_left_wins_among_those_that_kept_their_accuracy(planted, cleaned, judge):
    suspect, good = planted.model.state_dict(), cleaned.model.state_dict()
    blank = {name: torch.zeros_like(value) for name, value in suspect.items()}
    name, reason = judge.choose({"suspect": suspect, "cleaned": good, "blank": blank})
    assert name == "cleaned"
    assert "turns" in reason
    # given away all accuracy, nothing is left to turn
    name, _ = judge.choose(
        {"suspect": suspect, "cleaned": good, "blank": blank}, accuracy_margin=1.0
    )
    assert name in ("cleaned", "blank")


def test_of_two_alike_that_wins_to_which_it_comes_back_less(planted, cleaned, judge, monkeypatch):
    good = cleaned.model.state_dict()
    twice = {"first": good, "second": dict(good)}
    for expected in twice:
        retuned = {name: cleaned.model if name == expected else planted.model for name in twice}
        in_turn = iter(retuned.values())
        monkeypatch.setattr(auto, "_retuned", lambda *_, each=in_turn: next(each))
        name, reason = judge.choose(twice)
        assert name == expected
        assert "half-way back or retuned" in reason


def test_of_two_that_leave_the_same_that_wins_which_is_more_accurate(judge, cleaned, monkeypatch):
    good = cleaned.model.state_dict()
    for accuracies in ({"first": 0.9, "second": 0.895}, {"first": 0.895, "second": 0.9}):
        in_turn = iter(accuracies.values())
        monkeypatch.setattr(auto, "share_called", lambda *_, each=in_turn: next(each))
        name, reason = judge.choose({"first": good, "second": dict(good)})
        assert name == max(accuracies, key=accuracies.__getitem__)
        (other,) = accuracies.keys() - {name}
        assert re.search(rf"{name} .* 0\.900 .*\({other}: .*, 0\.895\)", reason)


@pytest.mark.parametrize(("left", "expected"), [(0.08, "accurate"), (0.4, "thorough")])
def test_little_less_residue_is_chance_and_buys_no_accuracy(
    judge, cleaned, left, expected, monkeypatch
):
    good = cleaned.model.state_dict()
    # of the suspect model, then of each half-way back, retuned and as it is
    shares = iter([0.9, 0.31, 0.0, 0.02, 0.31, 0.0, left])
    of_all = torch.ones_like(judge.anomalies)
    monkeypatch.setattr(auto, "judge", lambda *_: (next(shares) * of_all, of_all))
    monkeypatch.setattr(auto, "_retuned", lambda *_: cleaned.model)
    accuracies = iter([0.95, 0.98])
    monkeypatch.setattr(auto, "share_called", lambda *_: next(accuracies))
    name, _ = judge.choose({"thorough": good, "accurate": dict(good)})
    assert name == expected


@pytest.mark.parametrize(("accuracy", "expected"), [(0.90, "lasting"), (0.30, "hidden")])
def test_what_lasts_is_worth_some_accuracy_but_not_all(
    judge, cleaned, accuracy, expected, monkeypatch
):
    good = cleaned.model.state_dict()
    # of the suspect model, then of each half-way back, retuned and as it is
    shares = iter([0.9, 0.5, 0.6, 0.0, 0.0, 0.1, 0.0])
    of_all = torch.ones_like(judge.anomalies)
    monkeypatch.setattr(auto, "judge", lambda *_: (next(shares) * of_all, of_all))
    monkeypatch.setattr(auto, "_retuned", lambda *_: cleaned.model)
    accuracies = iter([0.98, accuracy])
    monkeypatch.setattr(auto, "share_called", lambda *_: next(accuracies))
    name, reason = judge.choose({"hidden": good, "lasting": dict(good)})
    assert name == expected
    assert ("may only be hidden" in reason) == (name == "hidden")


@pytest.mark.parametrize("target", [TARGET, NEXT])
def test_a_candidate_is_retuned_with_five_inverted_triggers(judge, target, monkeypatch):
    course, found = judge.course, judge.found
    only = torch.zeros_like(judge.anomalies, dtype=torch.bool)
    only[1, found.targets == target] = True
    seen = []
    monkeypatch.setattr(auto, "retune", lambda *given, **more: seen.append(given) or given[0])
    auto._retuned(course, course.before, found, only)
    ((_, x, y, moved, labels),) = seen
    assert x is course.data.clean.x
    assert y is course.data.clean.y
    row = torch.nonzero(only)[0, 1]
    operator = list(found.operators.values())[1]
    every, _ = operator(as_unit_float(x), torch.full_like(y, row))
    places = [int((every - image).abs().flatten(1).sum(1).argmin()) for image in moved]
    assert len(set(places)) == len(labels) == 5
    torch.testing.assert_close(moved, every[places], rtol=1e-5, atol=1e-6)
    wanted = (y[places] + 1) % 10 if target == NEXT else torch.full((5,), target)
    assert torch.equal(labels, wanted)
    assert (labels != y[places]).all()


def test_a_trigger_whose_pixels_round_beyond_white_is_retuned_with_all_the_same(judge, monkeypatch):
    course, found = judge.course, judge.found
    only = torch.zeros_like(judge.anomalies, dtype=torch.bool)
    only[1, found.targets == TARGET] = True
    kind = list(found.operators)[1]
    above = lambda x, rows: (torch.full_like(x, 1 + 1e-6), rows)  # noqa: E731
    monkeypatch.setitem(found.operators, kind, above)
    retuned = auto._retuned(course, course.before, found, only)
    assert all(p.isfinite().all() for p in retuned.parameters())


def test_what_removes_nothing_is_not_chosen_for_its_accuracy(planted, cleaned, judge):
    suspect, good = planted.model.state_dict(), cleaned.model.state_dict()
    worse = {name: value.clone() for name, value in good.items()}
    list(worse.values())[-1][3] -= 1e3  # the last bias: no image is called a 3 any more
    name, _ = judge.choose({"suspect": suspect, "cleaned": worse}, accuracy_margin=0.0)
    assert name == "cleaned"


def test_it_says_so_where_much_comes_back(planted, cleaned, judge, monkeypatch):
    def given_back(course, model, found, only):
        return auto._with(model, planted.model.state_dict())

    _, reason = judge.choose({"cleaned": cleaned.model.state_dict()})
    assert "comes back" not in reason
    monkeypatch.setattr(auto, "_retuned", given_back)
    _, reason = judge.choose({"cleaned": cleaned.model.state_dict()})
    assert reason.endswith("; as much comes back, the backdoor may only be hidden")


def test_it_says_so_where_nothing_helped(planted, judge):
    _, reason = judge.choose({"suspect": planted.model.state_dict()})
    assert reason.endswith("that is no removal, and no candidate found one")


def test_operators_that_turn_nothing_are_said_to_tell_nothing(planted, judge, monkeypatch):
    retuned = []

    def nothing(found, model, reference, samples, only=None):
        return torch.zeros_like(judge.anomalies), torch.ones_like(judge.anomalies)

    def kept(course, model, found, only):
        retuned.append(only)
        return model

    monkeypatch.setattr(auto, "judge", nothing)
    monkeypatch.setattr(auto, "_retuned", kept)
    suspicious = torch.zeros_like(judge.anomalies, dtype=torch.bool)
    suspicious[:, 3] = True
    tried = {"suspect": planted.model.state_dict()}
    _, reason = auto._chosen(judge.course, auto.Settings(), tried, suspicious)
    assert reason.endswith("nothing to judge the candidates by but accuracy")
    assert all(bool((only & ~suspicious).sum() == 0) and int(only.sum()) == 1 for only in retuned)


def test_settings_out_of_range_are_refused(planted):
    for name, value in (("threshold", -1), ("accuracy_margin", -1), ("inversion_steps", 0)):
        with pytest.raises(ValueError, match=name):
            planted.unlearn(**{name: value})


def test_bi_bau_inverts_against_the_first_candidate(planted, monkeypatch):
    seen = []
    before = [{"validation_clean_accuracy": 1.0}]

    def method(model, data, **more):
        seen.append(more.get("reference"))
        return Result(model, before, "x", {}, "ran all its steps")

    for name, (_, epochs, _) in list(auto.CANDIDATES.items()):
        monkeypatch.setitem(auto.CANDIDATES, name, (method, epochs, {"lr": 1.0}))
    monkeypatch.setattr(auto, "_anomalies", lambda *_: torch.full((len(KINDS), 11), 3.0))
    planted.unlearn(inversion_steps=1)
    assert [reference is None for reference in seen] == [True, False, True]
    for name, value in seen[1].state_dict().items():
        assert torch.equal(value, planted.model.state_dict()[name])


def candidate_run(planted, monkeypatch, name, works_from, stopped="ran all its steps", **more):
    """What a candidate returned, and what it was run with until its `works_from`-th call."""
    calls = []
    ruined = build("smallcnn", num_classes=10, in_channels=1, seed=3).eval()

    def method(model, data, **options):
        calls.append(options)
        before = [{"validation_clean_accuracy": 1.0}]
        if len(calls) == works_from:
            return Result(model, before, "x", {}, "ran all its steps")
        return Result(ruined, before, "x", {}, stopped)

    monkeypatch.setitem(auto.CANDIDATES, name, (method, "epochs", {"lr": 1.0}))
    data = DefenderData.split(planted.clean, None, seed=0, device=torch.device("cpu"))
    running = Running(0, progress=False)
    return auto._candidate(name, planted.model, data, auto.Settings(), running, **more), calls


@pytest.mark.parametrize("stopped", ["stopped at step 4: collapsed", "ran all its steps"])
def test_reference_that_loses_much_accuracy_is_pushed_less(planted, monkeypatch, stopped):
    cleaned, calls = candidate_run(planted, monkeypatch, "fst", 3, stopped)
    assert cleaned is planted.model
    assert [call["alpha"] for call in calls] == pytest.approx([0.1, 0.03, 0.01])


def test_candidate_that_collapses_is_run_again_more_gently(planted, monkeypatch):
    stopped = "stopped at step 4: clean accuracy fell"
    reference = planted.model
    cleaned, calls = candidate_run(planted, monkeypatch, "ulrl", 2, stopped, reference=reference)
    assert cleaned is planted.model
    assert [call["lr"] for call in calls] == pytest.approx([1.0, 0.1])


def test_without_a_usable_reference_auto_does_not_call_the_model_clean(planted, monkeypatch):
    cleaned, calls = candidate_run(planted, monkeypatch, "fst", None)
    assert cleaned is None
    assert len(calls) == 3
    result = planted.unlearn()
    assert result.stopped.startswith("cannot tell")
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, planted.model.state_dict()[name])
