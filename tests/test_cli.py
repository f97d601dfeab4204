"""The command line: what each command writes, and how it refuses what it cannot do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from bdu import dispatch
from bdu.checkpoint import load_state_dict
from bdu.cli import common, main
from bdu.cli import unlearn as unlearn_command
from bdu.data import load_images, save_npz
from bdu.fisher import FisherAccumulator, load_fisher
from bdu.models import build
from bdu.runs import WRITTEN, RunDirectory
from bdu.trainer import METHODS, SETTINGS

CLASSES = 3
RUN_FILES = {"config.yaml", "metrics.jsonl", "metrics.json", "model.safetensors", "report.html"}
PARTS = ("defender_clean", "defender_triggered", "retune", "evaluator")
RATES = ("clean_accuracy", "attack_success_rate", "robust_accuracy", "false_target_rate")
COMMON = ("--quiet", "--device", "cpu")


def images(count=400, seed=0):
    """Noise around a grey level that tells the class; no two images are the same."""
    generator = np.random.default_rng(seed)
    y = np.arange(count) % CLASSES
    x = generator.integers(0, 90, (count, 8, 8, 1), dtype=np.uint8)
    return {"x": x + (80 * y).astype(np.uint8)[:, None, None, None], "y": y}


def poison(data, out, *more):
    return [
        *("poison", "--data", str(data), "--model", "smallcnn", "--attack", "badnets"),
        *("--target", "1", "--rate", "0.2", "--epochs", "2", "--batch-size", "32"),
        *("--defender-clean", "0.2", "--defender-triggered", "0.1", "--retune", "0.1"),
        *("--out", str(out), *COMMON, *more),
    ]


def on(planted, command, *more, checkpoint=None):
    checkpoint = planted / "model.safetensors" if checkpoint is None else checkpoint
    model = ("--model", "smallcnn", "--checkpoint", str(checkpoint))
    return [command, *model, *COMMON, *(str(m) for m in more)]


def unlearn(planted, out, *more, clean=None, triggered=None):
    return on(
        *(planted, "unlearn", "--out", out),
        *("--clean", clean or planted / "defender_clean.npz"),
        *("--triggered", triggered or planted / "defender_triggered.npz"),
        *("--set", "unlearn_steps=6", "--set", "recovery_steps=4", "--set", "evaluate_every=3"),
        *more,
    )


def evaluated(planted):
    return "--eval-data", planted / "evaluator.npz", "--attack", planted / "attack.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "images.npz"
    save_npz(file, **images())
    return file


@pytest.fixture(scope="module")
def planted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("poison") / "run"
    assert main(poison(data, out)) == 0
    return out


@pytest.fixture(scope="module")
def cleaned(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("unlearn") / "run"
    more = (*evaluated(planted), "--retune-data", planted / "retune.npz")
    assert main(unlearn(planted, out, *more)) == 0
    return out


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_weights(one, other):
    one, other = load_state_dict(one), load_state_dict(other)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_refused(arguments, message, capsys, folder):
    """The command fails with one clear line, and nothing changes in the folder."""
    before, folders = contents(folder), {p for p in folder.rglob("*") if p.is_dir()}
    capsys.readouterr()
    code, by_argparse = None, False
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code, by_argparse = stopped.code, True
    error = capsys.readouterr().err.strip()
    if by_argparse:
        # It shows the usage first.
        error = error.splitlines()[-1]
    assert code == (2 if by_argparse else 1)
    assert "\n" not in error
    assert error.startswith("bdu: error: " if by_argparse else f"bdu {arguments[0]}: ") or (
        by_argparse and error.startswith(f"bdu {arguments[0]}: error: ")
    )
    assert re.search(message, error), error
    assert contents(folder) == before
    assert {p for p in folder.rglob("*") if p.is_dir()} == folders


def assert_rates(rates):
    assert all(0 <= rates[name] <= 1 for name in RATES)


def test_poison_writes_a_whole_run_directory(planted):
    names = {p.name for p in planted.iterdir()}
    assert names == RUN_FILES | {f"{part}.npz" for part in PARTS} | {"attack.json"}
    config = yaml.safe_load((planted / "config.yaml").read_text())
    assert (config["command"], config["epochs"], config["rate"]) == ("poison", 2, 0.2)
    lines = [json.loads(line) for line in (planted / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    metrics = json.loads((planted / "metrics.json").read_text())
    assert metrics["before"] is None
    assert_rates(metrics["after"])
    assert (metrics["method"], metrics["seed"]) == ("poison", 0)
    assert metrics["seconds"] > 0
    assert {"python", "bdu", "torch"} <= metrics["versions"].keys()
    record = json.loads((planted / "attack.json").read_text())
    assert (record["target"], record["trigger"]["name"]) == (1, "badnets")
    model = build("smallcnn", num_classes=CLASSES, in_channels=1, seed=0)
    model.load_state_dict(load_state_dict(planted / "model.safetensors"))


def test_parts_written_by_poison_share_no_image(planted):
    seen = {}
    for part in PARTS:
        x = load_images(planted / f"{part}.npz").x.clone()
        x[:, :, 5:, 5:] = 0  # where the trigger lies
        seen[part] = {image.numpy().tobytes() for image in x}
        assert len(seen[part]) == len(x) > 0
    for i, one in enumerate(PARTS):
        for other in PARTS[i + 1 :]:
            assert not seen[one] & seen[other]
    # Nor does the attacker train on what the defender or the evaluator holds.
    assert sum(map(len, seen.values())) < len(images()["y"])


def test_triggered_samples_are_of_other_classes_and_carry_the_attackers_label(planted):
    with np.load(planted / "defender_triggered.npz") as arrays:
        assert set(arrays["y"]) == {1}
        assert set(arrays["y_true"]) == {0, 2}


def test_unlearn_writes_a_whole_run_directory(cleaned):
    assert {p.name for p in cleaned.iterdir()} == RUN_FILES | {"attention.npz"}
    config = yaml.safe_load((cleaned / "config.yaml").read_text())
    assert (config["command"], config["method"]) == ("unlearn", "balanced")
    lines = [json.loads(line) for line in (cleaned / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6, 9, 10]
    metrics = json.loads((cleaned / "metrics.json").read_text())
    assert_rates(metrics["before"])
    assert_rates(metrics["after"])
    for name in ("der", "retuned_attack_success_rate"):
        assert 0 <= metrics[name] <= 1
    assert (metrics["method"], metrics["seed"]) == ("balanced", 0)
    assert metrics["settings"]["unlearn_steps"] == 6
    assert metrics["stopped"]
    model = build("smallcnn", num_classes=CLASSES, in_channels=1, seed=0)
    model.load_state_dict(load_state_dict(cleaned / "model.safetensors"))


def test_unlearn_without_an_evaluator_leaves_the_rates_empty(planted, tmp_path, capsys):
    assert main(unlearn(planted, tmp_path / "run")) == 0
    assert "clean accuracy" not in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["before"] is None
    assert metrics["after"] is None
    assert metrics["der"] is None
    assert "no data were given to evaluate it" in (tmp_path / "run" / "report.html").read_text()


def test_what_the_evaluator_holds_does_not_change_the_weights(planted, cleaned, tmp_path):
    assert main(unlearn(planted, tmp_path / "run")) == 0
    assert_same_weights(cleaned / "model.safetensors", tmp_path / "run" / "model.safetensors")


def test_true_labels_in_the_triggered_file_are_used(planted, tmp_path):
    more = ("--set", "forget=true_label")
    assert main(unlearn(planted, tmp_path / "run", *more)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["settings"]["forget"] == "true_label"


def test_numbers_with_an_exponent_are_numbers(planted, tmp_path):
    assert main(unlearn(planted, tmp_path / "run", "--set", "lr=1e-3")) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["settings"]["lr"] == 1e-3


def test_a_preset_is_where_settings_start_from(planted, tmp_path):
    clean = ("unlearn", "--out", tmp_path / "run", "--clean", planted / "defender_clean.npz")
    more = ("--method", "fst", "--preset", "ours", "--set", "epochs=2")
    assert main(on(planted, *clean, *more)) == 0
    settings = json.loads((tmp_path / "run" / "metrics.json").read_text())["settings"]
    assert (settings["distillation"], settings["fresh_bias"], settings["epochs"]) == (0.9, False, 2)


def test_evaluate_agrees_with_the_run_it_measures(planted, cleaned, tmp_path, capsys):
    out = tmp_path / "rates.json"
    arguments = on(
        *(planted, "evaluate", "--data", planted / "evaluator.npz", "--out", out),
        *("--attack", planted / "attack.json"),
        checkpoint=cleaned / "model.safetensors",
    )
    assert main(arguments) == 0
    rates = json.loads(out.read_text())
    expected = json.loads((cleaned / "metrics.json").read_text())["after"]
    assert {name: rates[name] for name in expected} == expected
    assert f"{100 * rates['clean_accuracy']:.2f} %" in capsys.readouterr().out


def test_evaluate_without_a_trigger_tells_clean_accuracy_alone(planted, tmp_path):
    out = tmp_path / "rates.json"
    assert main(on(planted, "evaluate", "--data", planted / "evaluator.npz", "--out", out)) == 0
    rates = json.loads(out.read_text())
    assert 0 <= rates["clean_accuracy"] <= 1
    assert [rates[name] for name in RATES[1:]] == [None] * 3


def test_fisher_writes_a_file_for_every_parameter(planted, tmp_path):
    out = tmp_path / "fisher.safetensors"
    arguments = on(planted, "fisher", "--data", planted / "defender_clean.npz", "--out", out)
    assert main([*arguments, "--samples", "20"]) == 0
    fisher = load_fisher(out)
    model = build("smallcnn", num_classes=CLASSES, in_channels=1, seed=0)
    expected = {name: p.shape for name, p in model.named_parameters()}
    assert {name: f.shape for name, f in fisher.items()} == expected
    assert all(bool((f >= 0).all()) for f in fisher.values())


def test_stopped_fisher_is_gone_on_with_only_when_asked_to(planted, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "fisher.safetensors"
    partial = tmp_path / "new" / "fisher.safetensors.partial"
    arguments = on(planted, "fisher", "--data", planted / "defender_clean.npz", "--out", out)
    arguments = [*arguments, "--samples", "20", "--batch-size", "5", "--quiet"]
    assert main(arguments) == 0
    expected = load_fisher(out)
    out.unlink()

    add, calls = FisherAccumulator._add, []

    def stopped(self, x, y, sums):
        calls.append(len(y))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return add(self, x, y, sums)

    monkeypatch.setattr(FisherAccumulator, "_add", stopped)
    assert main(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    assert partial.exists()
    assert not out.exists()
    assert main(arguments) == 1
    assert "got the sums of a stopped computation" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert calls == [5, 5, 5, 5, 5]
    assert not partial.exists()
    for name, value in load_fisher(out).items():
        assert torch.equal(value, expected[name]), name


def test_doctor_names_every_operation_and_backend(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in (*dispatch.TABLE, *dispatch.BACKENDS, "bdu", "torch"):
        assert re.search(rf"^{re.escape(name)} ", shown, re.M), name


def test_report_stands_alone_and_shows_the_numbers_of_the_run(planted, cleaned):
    for run in (planted, cleaned):
        page = (run / "report.html").read_text()
        assert not re.search(r'https?://|<script|<link|@import|url\(|src="(?!data:)', page)
        metrics = json.loads((run / "metrics.json").read_text())
        shown = dict(re.findall(r'data-key="([^"]+)">([^<]+)<', page))
        shown = {key: v for key, v in shown.items() if "per_class" not in key}
        expected = {
            f"{when}.{name}": metrics[when][name]
            for when in ("before", "after")
            if metrics[when] is not None
            for name in RATES
        } | {
            k: metrics[k] for k in ("der", "retuned_attack_success_rate") if metrics[k] is not None
        }
        assert shown == {
            key: f"{value:.3f}" if key == "der" else f"{100 * value:.2f} %"
            for key, value in expected.items()
        }


def test_report_escapes_what_a_user_wrote(planted, tmp_path):
    out = tmp_path / "<b>run"
    clean = tmp_path / "<i>clean.npz"
    clean.write_bytes((planted / "defender_clean.npz").read_bytes())
    assert main(unlearn(planted, out, clean=clean)) == 0
    page = (out / "report.html").read_text()
    assert "<i>clean" not in page
    assert "&lt;i&gt;clean" in page


def test_flags_win_over_the_configuration_file(data, tmp_path):
    file = tmp_path / "poison.yaml"
    file.write_text(
        f"data: {data}\nmodel: smallcnn\nattack: badnets\ntarget: 1\nrate: 0.2\nepochs: 5\n"
        "batch-size: 32\ndefender_clean: 0.2\ndefender_triggered: 0.1\nretune: 0.1\nquiet: true\n"
        "no_augment: true\n"
    )
    out = tmp_path / "run"
    assert main(["poison", "--config", str(file), "--epochs", "1", "--out", str(out)]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    found = [config[key] for key in ("epochs", "batch_size", "rate", "target", "no_augment")]
    assert found == [1, 32, 0.2, "1", True]


def test_the_configuration_of_a_run_repeats_it(planted, tmp_path):
    out = tmp_path / "again"
    config = planted / "config.yaml"
    assert main(["poison", "--config", str(config), "--out", str(out), "--quiet"]) == 0
    assert_same_weights(planted / "model.safetensors", out / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoks: 3", r"--config: expected one of .*epochs.*, got 'epoks'"),
        ("command: unlearn", r"--config: .* is of bdu unlearn, got bdu poison"),
        ("schedule: steps", r"--config: schedule: expected one of"),
        ("- epochs", r"--config: expected names and values in .*, got list"),
        ("a: [", r"--config: "),
        ("epochs: many", r"argument --epochs: invalid int value: 'many'"),
    ],
)
def test_configuration_that_does_not_fit_is_refused(data, tmp_path, capsys, text, message):
    file = tmp_path / "poison.yaml"
    file.write_text(text)
    arguments = ["poison", "--config", file, "--data", data, "--model", "smallcnn"]
    assert_refused([*arguments, "--out", tmp_path / "run"], message, capsys, tmp_path)


def interrupt_after(lines, monkeypatch):
    write = RunDirectory.write_lines

    def stop(self, written):
        write(self, written)
        if len(written) == lines:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "write_lines", stop)


def test_interrupted_poison_resumes_to_the_same_weights(data, planted, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(1, patch)
        assert main(poison(data, out)) == 130
    assert "continue with --resume" in capsys.readouterr().err
    assert (out / "state.pt").exists()
    assert not (out / "model.safetensors").exists()
    assert main(poison(data, out, "--resume")) == 0
    assert_same_weights(planted / "model.safetensors", out / "model.safetensors")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert not (out / "state.pt").exists()


def test_interrupted_unlearn_resumes_to_the_same_weights(planted, cleaned, tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2, patch)
        assert main(unlearn(planted, out)) == 130
    assert main(unlearn(planted, out, "--resume")) == 0
    assert_same_weights(cleaned / "model.safetensors", out / "model.safetensors")
    # only the other run was told where the trigger is
    lines = [
        {key: v for key, v in line.items() if not key.startswith("tar_")}
        for line in RunDirectory(cleaned).read_lines()
    ]
    assert RunDirectory(out).read_lines() == lines


def test_a_run_that_kept_nothing_yet_starts_over(planted, cleaned, tmp_path, capsys):
    out = tmp_path / "run"

    def stop(model, *, callbacks, **more):
        for callback in callbacks:
            callback({"step": 0, "phase": "before"}, model)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bdu.cli.unlearn.unlearn", stop)
        assert main(unlearn(planted, out)) == 130
    assert "nothing was kept yet, start over with --resume" in capsys.readouterr().err
    assert main(unlearn(planted, out, "--resume")) == 0
    assert len(RunDirectory(out).read_lines()) == len(RunDirectory(cleaned).read_lines())


def test_a_backdoor_that_was_not_learnt_is_told(data, tmp_path, capsys):
    assert main(poison(data, tmp_path / "run", "--rate", "0.01", "--lr", "1e-6")) == 0
    assert "the backdoor was not learnt: ASR" in capsys.readouterr().out


def test_seconds_before_an_interruption_count(planted, tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2, patch)
        assert main(unlearn(planted, out)) == 130
    kept = {"seconds": 1000.0, "total_seconds": 2000.0}
    (out / "seconds.json").write_text(json.dumps(kept))
    assert main(unlearn(planted, out, "--resume")) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert 1000 < metrics["seconds"] < 1900
    assert metrics["total_seconds"] > 2000
    assert not (out / "seconds.json").exists()


def test_run_goes_on_with_its_own_settings(planted, cleaned, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2, patch)
        assert main(unlearn(planted, out)) == 130
    assert f"continue with --resume --out {out}" in capsys.readouterr().err
    assert main(["unlearn", "--resume", "--out", str(out), "--quiet"]) == 0
    assert_same_weights(cleaned / "model.safetensors", out / "model.safetensors")
    assert_refused(
        ["unlearn", "--resume", "--out", tmp_path / "other"], "are required", capsys, out
    )
    assert_refused(
        ["poison", "--resume", "--out", out], "is of bdu unlearn, got bdu poison", capsys, out
    )


def test_finished_run_resumed_gives_the_same_weights(data, tmp_path):
    out = tmp_path / "run"
    assert main(poison(data, out)) == 0
    first = load_state_dict(out / "model.safetensors")
    assert main(poison(data, out, "--resume")) == 0
    again = load_state_dict(out / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "attack",
    [
        ("badnets",),
        ("trojannn", "--set", "size=3", "--set", "steps=2"),
        ("input-aware", "--set", "width=4", "--set", "mask_steps=2"),
    ],
    ids=lambda attack: attack[0],
)
def test_model_and_attack_alone_resume_to_the_whole_run(data, tmp_path, attack):
    arguments = ("--attack", *attack)
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(poison(data, whole, *arguments)) == 0
    part.mkdir()
    kept = ["model.safetensors", "attack.json"]
    kept += [f.name for f in whole.glob("trigger.safetensors")]
    for name in kept:
        shutil.copy(whole / name, part)
    assert main(poison(data, part, *arguments, "--resume")) == 0
    before, after = contents(whole), contents(part)
    for name in map(Path, (*kept, *(f"{part}.npz" for part in PARTS))):
        assert after[name] == before[name], name
    rates = [json.loads(c[Path("metrics.json")])["after"] for c in (before, after)]
    assert rates[0] == rates[1]


def test_existing_run_is_refused_and_left_as_it_is(data, planted, cleaned, capsys):
    message = "holds a run already"
    assert_refused(poison(data, planted), message, capsys, planted)
    assert_refused(unlearn(planted, cleaned), message, capsys, cleaned)


def test_a_run_that_has_ended_is_left_as_it_is_by_resume(data, planted, cleaned, tmp_path, capsys):
    for folder, arguments in (
        (planted, poison(data, planted, "--resume")),
        (cleaned, ["unlearn", "--resume", "--out", str(cleaned), "--quiet"]),
    ):
        before = contents(folder)
        assert main(arguments) == 0
        assert "has ended; nothing is left to do" in capsys.readouterr().out
        assert contents(folder) == before


def test_an_interrupted_poison_is_not_resumed_on_other_data(data, tmp_path, capsys):
    own, out = tmp_path / "own.npz", tmp_path / "run"
    shutil.copy(data, own)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(1, patch)
        assert main(poison(own, out)) == 130
    save_npz(own, **images(seed=1))
    assert_refused(poison(own, out, "--resume"), "resume: expected the data that", capsys, out)


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_files_that_are_no_run_are_not_written_over(data, planted, tmp_path, capsys, more):
    shutil.copy(planted / "model.safetensors", tmp_path)
    checkpoint = tmp_path / "model.safetensors"
    message = "out: expected a folder without model.safetensors, which would be written over"
    assert_refused(poison(data, tmp_path, *more), message, capsys, tmp_path)
    clean = ("--method", "fine-tuning", "--clean", planted / "defender_clean.npz", *more)
    arguments = on(planted, "unlearn", "--out", tmp_path, *clean, checkpoint=checkpoint)
    if more:  # which has the rest read from a run that there is not
        arguments = [a for a in arguments if a != "--resume"] + ["--resume"]
    assert_refused(arguments, message, capsys, tmp_path)
    assert_refused(poison(data, checkpoint), "out: expected a folder, got", capsys, tmp_path)


def test_runs_write_no_file_that_is_not_looked_for_first(planted, cleaned):
    names = {path.name for folder in (planted, cleaned) for path in folder.iterdir()}
    assert names <= WRITTEN


def test_warnings_are_told_in_a_line_and_kept(planted, tmp_path, capsys):
    out, triggered = tmp_path / "run", planted / "defender_triggered.npz"
    options = ("--clean", planted / "defender_clean.npz", "--triggered", triggered)
    few = ("--method", "ulrl", "--set", "relearn_epochs=1", "--set", "threshold=1000")
    few += ("--set", "gamma=1")
    assert main(on(planted, "unlearn", "--out", out, *options, *few)) == 0
    told = capsys.readouterr().err.splitlines()
    expected = [
        "triggered: not looked at by method ulrl",
        "gamma: not used by method ulrl but anchored",
        "ulrl: no neuron stands out, so what follows is plain fine-tuning",
    ]
    assert [line.removeprefix("bdu unlearn: warning: ") for line in told] == expected
    assert RunDirectory(out).read_metrics()["warnings"] == expected
    page = (out / "report.html").read_text()
    assert all(text in page for text in expected)


def test_a_run_that_changed_nothing_says_so(data, tmp_path, capsys):
    planted = tmp_path / "planted"
    assert main(poison(data, planted, "--epochs", "10")) == 0
    options = ("--clean", planted / "defender_clean.npz", "--method", "fst", "--set", "lr=10")
    floor = ("--set", "clean_accuracy_floor=1.0")
    assert main(on(planted, "unlearn", "--out", tmp_path / "run", *options, *floor)) == 0
    said = capsys.readouterr().out
    assert "(clean_accuracy_floor); another lr, other epochs or more clean samples may help" in said
    assert "kept the weights of step 0, the model as it was, with any backdoor" in said
    assert main(["report", str(tmp_path / "run"), str(planted), "--out", str(tmp_path / "c")]) == 0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_settings_are_explained(planted, tmp_path, capsys, method):
    options = ("--clean", planted / "defender_clean.npz", "--method", method, "--set", "help")
    assert main(on(planted, "unlearn", "--out", tmp_path / "run", *options)) == 0
    said = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(SETTINGS[method]):
        assert re.search(rf"\b{field.name}\b.*: .*\b{field.name}=", said), field.name
    assert not (tmp_path / "run").exists()


def test_a_target_that_is_not_the_planted_one_is_refused(planted, tmp_path, capsys):
    data = ("--data", planted / "evaluator.npz", "--attack", planted / "attack.json")
    message = "--target: expected 1, as in .*attack.json, got 2"
    assert_refused(on(planted, "evaluate", *data, "--target", "2"), message, capsys, tmp_path)
    assert main(on(planted, "evaluate", *data, "--target", "1")) == 0


@pytest.mark.parametrize("flags", [("--seed", "-1"), ("--seed", str(2**64)), ("--seed", "x")])
def test_seeds_out_of_range_are_refused(data, tmp_path, capsys, flags):
    message = "argument --seed: expected a whole number from 0 to 4611686018427387903"
    assert_refused(poison(data, tmp_path / "run", *flags), message, capsys, tmp_path)


def test_options_that_an_attack_does_not_have_are_named(data, tmp_path, capsys):
    flags = ("--attack", "wanet", "--set", "foo=1")
    message = r"foo: expected one of .*grid.* \(wanet\)"
    assert_refused(poison(data, tmp_path / "run", *flags), message, capsys, tmp_path)


class WithoutLinear(torch.nn.Sequential):
    def __init__(self, num_classes, in_channels):
        head = torch.nn.Conv2d(4, num_classes, 1)
        pooled = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        super().__init__(torch.nn.Conv2d(in_channels, 4, 3), head, *pooled)


def test_trojannn_refuses_a_model_without_a_linear_layer_before_it_trains_one(
    data, tmp_path, capsys
):
    flags = ("--attack", "trojannn", "--model", f"{__name__}:WithoutLinear")
    message = "expected a classifier with a linear layer, got WithoutLinear"
    assert_refused(poison(data, tmp_path / "run", *flags), message, capsys, tmp_path)


def test_resume_with_other_settings_is_refused(data, planted, capsys):
    arguments = poison(data, planted, "--resume", "--lr", "0.01")
    assert_refused(arguments, r"resume: .*lr was 0\.1 and is now 0\.01", capsys, planted)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--set", "lambda=3"), "lambda: expected one of .*ewc_lambda"),
        (("--set", "lr"), "--set: expected NAME=VALUE, got 'lr'"),
        (("--set", "lr=["), r"--set: expected a plain value, got '\['"),
        (("--set", "lr=-1"), "lr: expected a number > 0, got -1"),
        (("--set", "lr=fast"), "lr: expected a number, got 'fast'"),
        (("--set", "forget=ascent"), "forget: expected one of"),
        (("--preset", "ours"), "--preset: expected published with method balanced"),
        (("--method", "prayer"), "--method: invalid choice: 'prayer'"),
        (("--target", "1"), "--attack or --trigger: expected"),
        (("--attack", "badnets"), "--target: expected"),
        (("--attack", "badnets", "--target", "one"), "--target: expected a class number"),
        (("--attack", "badnets", "--target", "1"), "--eval-data: expected"),
        (("--alpha", "0.2"), "--alpha: expected --attack or --trigger with it"),
        (("--attack", "sunrise", "--target", "1"), "--attack: expected one of .*badnets"),
        (("--device", "mps"), "--device: expected cpu or cuda, got mps"),
        (("--device", "gpu"), "--device: expected cpu or cuda, got 'gpu'"),
        (("--device", "cuda:99"), ", got cuda:99"),
        (("--num-classes", "4"), r"fc\.weight: expected \(4, 64\), got \(3, 64\)"),
    ],
)
def test_flags_that_do_not_fit_are_refused(planted, tmp_path, capsys, flags, message):
    assert_refused(unlearn(planted, tmp_path / "run", *flags), message, capsys, tmp_path)


@pytest.mark.parametrize("command", ["unlearn", "evaluate", "fisher"])
def test_labels_out_of_range_are_refused(planted, tmp_path, capsys, command):
    bad, out = tmp_path / "bad.npz", tmp_path / "out.safetensors"
    save_npz(bad, **images(30) | {"y": np.full(30, 7)})
    arguments = {
        "unlearn": unlearn(planted, tmp_path / "run", clean=bad),
        "evaluate": on(planted, "evaluate", "--data", bad, "--out", tmp_path / "rates.json"),
        "fisher": on(planted, "fisher", "--data", bad, "--out", out),
    }[command]
    assert_refused(arguments, r"expected .*\b3\b.*, got 7|got 7", capsys, tmp_path)


def test_images_of_another_shape_are_refused(planted, tmp_path, capsys):
    colour, small = tmp_path / "colour.npz", tmp_path / "small.npz"
    save_npz(colour, x=np.zeros((20, 8, 8, 3), np.uint8), y=np.arange(20) % 3)
    save_npz(small, x=np.zeros((20, 6, 6, 1), np.uint8), y=np.ones(20, np.int64))
    out = tmp_path / "run"
    message = r"features\.0\.weight: expected \(16, 3, 3, 3\)"
    assert_refused(unlearn(planted, out, clean=colour, triggered=colour), message, capsys, tmp_path)
    shown = evaluated(planted)
    for flag, arguments in {
        "--triggered": unlearn(planted, out, triggered=small),
        "--eval-data": unlearn(planted, out, *shown, "--eval-data", small),
        "--retune-data": unlearn(planted, out, *shown, "--retune-data", small),
    }.items():
        message = rf"{flag}: expected images of \(1, 8, 8\), .*, got \(1, 6, 6\)"
        assert_refused(arguments, message, capsys, tmp_path)


@pytest.mark.parametrize("command", ["unlearn", "evaluate"])
@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([0, 0, 2], "at least 5 images that are not of the target class, got 3"),
        ([1] * 20, "at least 5 images that are not of the target class, got 0"),
        ([0] * 19 + [7], "labels below 3, got 7"),
    ],
)
def test_retune_data_that_do_not_fit_are_refused_before_the_run(
    planted, tmp_path, capsys, monkeypatch, command, y, message
):
    monkeypatch.setattr(unlearn_command, "unlearn", None)
    file = tmp_path / "retune.npz"
    save_npz(file, x=images(len(y))["x"], y=np.array(y))
    arguments = {
        "unlearn": unlearn(planted, tmp_path / "run", *evaluated(planted)),
        "evaluate": on(
            *(planted, "evaluate", "--data", planted / "evaluator.npz"),
            *("--attack", planted / "attack.json", "--out", tmp_path / "rates.json"),
        ),
    }[command]
    message = f"--retune-data: expected {message}"
    assert_refused([*arguments, "--retune-data", file], message, capsys, tmp_path)


def test_missing_triggered_samples_are_refused(planted, tmp_path, capsys):
    arguments = on(
        *(planted, "unlearn", "--clean", planted / "defender_clean.npz"),
        *("--out", tmp_path / "run"),
    )
    assert_refused(arguments, "triggered: expected samples", capsys, tmp_path)


def test_true_label_without_true_labels_is_refused(planted, tmp_path, capsys):
    with np.load(planted / "defender_triggered.npz") as arrays:
        save_npz(tmp_path / "bare.npz", x=arrays["x"], y=arrays["y"])
    arguments = unlearn(
        *(planted, tmp_path / "run", "--set", "forget=true_label"),
        triggered=tmp_path / "bare.npz",
    )
    assert_refused(arguments, r"triggered: expected \(x, y_target, y_true\)", capsys, tmp_path)


def test_attack_json_without_a_target_is_refused(planted, tmp_path, capsys):
    file = tmp_path / "attack.json"
    file.write_text('{"trigger": {"name": "badnets"}}')
    arguments = unlearn(planted, tmp_path / "run", *evaluated(planted), "--attack", file)
    message = "path: expected an attack.json with a target, got "
    assert_refused(arguments, message, capsys, tmp_path)


def test_true_labels_that_cannot_be_read_are_refused(planted, tmp_path, capsys):
    with np.load(planted / "defender_triggered.npz") as arrays:
        known = dict(arrays)
    for y_true, message in (
        (known["y"].astype(object), "expected a plain array, got a pickled or broken one"),
        (known["y"] + 0.5, "expected integers, got float64"),
    ):
        np.savez(tmp_path / "bad.npz", **{**known, "y_true": y_true})
        arguments = unlearn(planted, tmp_path / "run", triggered=tmp_path / "bad.npz")
        assert_refused(arguments, f"--triggered: y_true: {message}", capsys, tmp_path)


def test_pickled_checkpoint_is_refused(planted, tmp_path, capsys):
    file = tmp_path / "model.pt"
    torch.save(build("smallcnn", num_classes=CLASSES, in_channels=1, seed=0), file)
    arguments = on(
        *(planted, "evaluate", "--data", planted / "evaluator.npz"),
        *("--out", tmp_path / "rates.json"),
        checkpoint=file,
    )
    assert_refused(arguments, "bdu never unpickles", capsys, tmp_path)


@pytest.mark.parametrize("command", ["poison", "unlearn", "evaluate", "fisher"])
def test_folder_without_images_is_refused(planted, tmp_path, capsys, command):
    folder = tmp_path / "photos"
    (folder / "cat").mkdir(parents=True)
    arguments = {
        "poison": poison(folder, tmp_path / "run"),
        "unlearn": unlearn(planted, tmp_path / "run", clean=folder),
        "evaluate": on(planted, "evaluate", "--data", folder, "--out", tmp_path / "rates.json"),
        "fisher": on(planted, "fisher", "--data", folder, "--out", tmp_path / "f.safetensors"),
    }[command]
    assert_refused(arguments, "path: expected images in .*cat, got none", capsys, tmp_path)


@pytest.mark.parametrize("command", ["poison", "unlearn", "evaluate"])
def test_trigger_larger_than_the_image_is_refused(data, planted, tmp_path, capsys, command):
    picture = tmp_path / "trigger.png"
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(picture)
    flags = ("--trigger", str(picture), "--target", "1")
    shown = ("--eval-data", planted / "evaluator.npz")
    arguments = {
        "poison": poison(data, tmp_path / "run", *flags),
        "unlearn": unlearn(planted, tmp_path / "run", *shown, *flags),
        "evaluate": on(planted, "evaluate", "--data", planted / "evaluator.npz", *flags),
    }[command]
    assert_refused(arguments, r"9.*8|8.*9", capsys, tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target", "7"), r"target: expected an integer in \[0, 2\] or all-to-all, got 7"),
        (("--rate", "1.5"), r"rate: expected a share in \[0, 1\], got 1\.5"),
        *(
            (flags, "expected shares that leave images to train on, got")
            for flags in (("--defender-clean", "1"), ("--defender-clean", ".9", "--retune", ".9"))
        ),
        (("--defender-clean", "nan"), r"defender_clean: expected a share in \[0, 1\], got nan"),
        (("--retune", "-0.1"), r"retune: expected a share in \[0, 1\], got -0\.1"),
        (("--mean", "nan", "--std", "1"), r"mean: expected finite values, got \(nan,\)"),
        (("--mean", "0", "--std", "inf"), r"std: expected positive, finite values, got \(inf,\)"),
        (("--surrogate", "clean.pt"), "--surrogate: expected none, as badnets takes no clean"),
        (("--split", "train"), "split: expected train_x and train_y"),
        (("--data", "nowhere.npz"), r"path: .*nowhere\.npz is not there"),
        (("--model", "resnet1000"), "resnet1000"),
        (("--epochs", "0"), "epochs: expected at least 1, got 0"),
        (("--lr", "0"), "lr: expected a positive number, got 0"),
        (("--lr", "inf"), "lr: expected a positive number, got inf"),
    ],
)
def test_poison_refuses_what_does_not_fit(data, tmp_path, capsys, flags, message):
    assert_refused(poison(data, tmp_path / "run", *flags), message, capsys, tmp_path)


def test_poison_without_an_attack_is_refused(data, tmp_path, capsys):
    arguments = ["poison", "--data", data, "--model", "smallcnn", "--target", "1"]
    message = "--attack or --trigger: expected"
    assert_refused([*arguments, "--out", tmp_path / "run"], message, capsys, tmp_path)


def test_unknown_command_is_refused(tmp_path, capsys):
    assert_refused(["cure"], "invalid choice: 'cure'", capsys, tmp_path)


@pytest.mark.slow
def test_demo_plants_and_removes_a_backdoor(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quiet"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert before["attack_success_rate"] > 0.9
    assert after["attack_success_rate"] <= after["false_target_rate"] + 0.03
    assert after["clean_accuracy"] >= before["clean_accuracy"] - 0.03
    assert (out / "report.html").exists()
    assert str(out / "report.html") in capsys.readouterr().out
    assert_refused(["demo", "--out", out, "--quiet"], "holds a run already", capsys, tmp_path)


def test_class_folders_are_labelled_by_the_names_of_the_clean_ones(planted, tmp_path):
    clean, triggered = tmp_path / "clean", tmp_path / "triggered"
    data = load_images(planted / "defender_clean.npz")
    for i, (image, label) in enumerate(zip(data.x, data.y.tolist(), strict=True)):
        folder = clean / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    bad = load_images(planted / "defender_triggered.npz")
    (triggered / "a").mkdir(parents=True)  # a class that is absent
    (triggered / "c").mkdir()
    for i, image in enumerate(bad.x):
        Image.fromarray(image[0].numpy()).save(triggered / "c" / f"{i}.png")
    options = argparse.Namespace(image_size=None, triggered=triggered)
    known = common.images(clean, options, "--clean")
    assert known.classes == ["a", "b", "c"]
    _, labels = unlearn_command._triggered(options, known)
    assert set(labels.tolist()) == {2}
    (triggered / "d").mkdir()
    with pytest.raises(ValueError, match="--triggered: path: expected only the given classes"):
        unlearn_command._triggered(options, known)


def test_a_factory_is_found_from_the_current_folder(planted, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_own_net.py").write_text(
        "from bdu.models import build\n"
        f"def make():\n    return build('smallcnn', num_classes={CLASSES}, in_channels=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p not in ("", str(tmp_path))])
    arguments = [str(a) for a in on(planted, "evaluate", "--data", planted / "evaluator.npz")]
    arguments[arguments.index("--model") + 1] = "my_own_net:make"
    assert main(arguments) == 0, capsys.readouterr().err
