"""What a command leaves of a run, and the commands that its report names."""

from __future__ import annotations

import html
import json
import re
import shlex

import numpy as np
import pytest
import torch
import yaml

from bdu import runs
from bdu.checkpoint import load_state_dict
from bdu.cli import main
from bdu.data import save_npz
from bdu.runs import METRICS, RunDirectory

CLASSES = 3
FACTORY = f"""from bdu.models import build
def make():
    return build('smallcnn', num_classes={CLASSES}, in_channels=1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a backdoored model, and in `the run` a cleaned one; all paths typed relative."""
    folder = tmp_path_factory.mktemp("work")
    generator = np.random.default_rng(0)
    y = np.arange(400) % CLASSES
    x = generator.integers(0, 90, (400, 8, 8, 1), dtype=np.uint8)
    save_npz(folder / "images.npz", x=x + (80 * y).astype(np.uint8)[:, None, None, None], y=y)
    (folder / "my_network.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        poison = [
            *("poison", "--data", "images.npz", "--model", "smallcnn", "--attack", "badnets"),
            *("--target", "1", "--rate", "0.2", "--epochs", "2", "--batch-size", "32"),
            *("--defender-clean", "0.2", "--defender-triggered", "0.1", "--retune", "0.1"),
        ]
        assert main([*poison, "--out", "planted", "--quiet"]) == 0
        assert main(unlearn("the run", "--eval-data", "planted/evaluator.npz", *ATTACK)) == 0
    return folder


ATTACK = ("--attack", "planted/attack.json")


def unlearn(out, *more, model="smallcnn"):
    return [
        *("unlearn", "--model", model, "--checkpoint", "planted/model.safetensors"),
        *("--clean", "planted/defender_clean.npz"),
        *("--triggered", "planted/defender_triggered.npz"),
        *("--set", "unlearn_steps=6", "--set", "recovery_steps=4", "--set", "evaluate_every=3"),
        *("--out", out, "--quiet", *more),
    ]


def commands(page):
    """What stands in the page to be typed, apart from `cd`."""
    typed = re.findall(r"<pre>((?:cd|bdu) [^<]*)</pre>", page)
    return [shlex.split(html.unescape(line)) for line in typed]


def assert_same_weights(one, other):
    one, other = (load_state_dict(run / "model.safetensors") for run in (one, other))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_every_run_writes_the_same_keys(folder):
    for name in ("planted", "the run"):
        metrics = json.loads((folder / name / "metrics.json").read_text())
        assert tuple(metrics) == METRICS
        text = runs.__doc__
        assert [key for key in metrics if f"``{key}``" not in text] == []
        for line in RunDirectory(folder / name).read_lines():
            assert 0 <= line["step"] <= line["steps"]
    assert metrics["weight_change"]
    for key in ("seconds", "total_seconds", "stopped", "settings", "der"):
        assert metrics[key] is not None, key


def test_other_methods_count_the_rounds_of_a_phase(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    out, own = tmp_path / "run", unlearn(str(tmp_path / "run"))
    own = [*own[: own.index("--set")], "--out", str(out), "--quiet"]
    assert main([*own, "--method", "fine-tuning", "--set", "epochs=2"]) == 0
    lines = RunDirectory(out).read_lines()
    assert [(line.get("round"), line.get("rounds")) for line in lines] == [
        (None, None),
        (1, 2),
        (2, 2),
    ]


def test_of_two_runs_that_start_at_once_one_is_refused(tmp_path, monkeypatch):
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    check = RunDirectory.check

    def overtaken(self, config, *, resume):
        check(self, config, resume=resume)
        if self is second:
            first.start({"seed": 1}, resume=False)

    monkeypatch.setattr(RunDirectory, "check", overtaken)
    with pytest.raises(FileExistsError, match="holds a run already"):
        second.start({"seed": 2}, resume=False)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 1
    assert [file.name for file in first.path.iterdir()] == ["config.yaml"]


def test_earlier_metrics_have_every_key(tmp_path):
    run = RunDirectory(tmp_path)
    (tmp_path / "metrics.json").write_text('{"method": "poison", "of_old": 1}')
    metrics = run.read_metrics()
    assert metrics["weight_change"] is None
    assert metrics["of_old"] == 1
    run.write_metrics({"seconds": float("nan")})
    assert run.read_metrics() == dict.fromkeys(METRICS)


def test_again_works_from_any_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("planted", "the run"):
        (command,) = commands((folder / name / "report.html").read_text())
        assert command[:3] == ["bdu", command[1], "--config"]
        assert main([*command[1:], "--quiet"]) == 0
        assert_same_weights(tmp_path / "AGAIN", folder / name)
        (tmp_path / "AGAIN").rename(tmp_path / f"once {name}")


@pytest.mark.parametrize("page", ["report", "comparison"])
@pytest.mark.parametrize("name", ["planted", "the run"])
def test_a_killed_run_goes_on_by_what_its_report_says(
    folder, tmp_path, monkeypatch, capsys, page, name
):
    killed, write = tmp_path / "killed run", RunDirectory.write_lines

    def stop(self, lines):
        write(self, lines)
        if len(lines) == (1 if name == "planted" else 3):
            raise KeyboardInterrupt

    config = str(folder / name / "config.yaml")
    command = "poison" if name == "planted" else "unlearn"
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_lines", stop)
        assert main([command, "--config", config, "--out", str(killed), "--quiet"]) == 130
    monkeypatch.chdir(tmp_path)
    runs = [str(killed)] if page == "report" else [str(folder / name), str(killed)]
    assert main(["report", *runs, "--out", "page.html"]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "It goes on from its last look." in text
    assert ("step 6 of 10" in text) == (name == "the run")
    (resume,) = [command for command in commands(text) if "--resume" in command]
    assert main([*resume[1:], "--quiet"]) == 0, capsys.readouterr().err
    assert_same_weights(killed, folder / name)


def test_a_factory_is_looked_for_where_it_was_found(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    out = str(tmp_path / "run")
    assert main(unlearn(out, model="my_network:make")) == 0
    (command,) = commands((tmp_path / "run" / "report.html").read_text())
    assert command[:3] == ["cd", str(folder), "&&"]
    again = str(tmp_path / "again")
    assert main([again if word == "AGAIN" else word for word in command[4:]]) == 0
    assert_same_weights(tmp_path / "again", tmp_path / "run")


def test_earlier_runs_kept_relative_paths(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    run = folder / "early"
    assert main(unlearn("early")) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["started_in"]
    config = {
        key: v.replace(f"{folder}/", "") if isinstance(v, str) else v for key, v in config.items()
    }
    assert config["clean"] == "planted/defender_clean.npz"
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["report", "early"]) == 0
    assert "the folder it was started in: type it there" in (run / "report.html").read_text()
    whole = {k: v for k, v in config.items() if k not in ("checkpoint", "clean", "triggered")}
    (run / "config.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    assert main(["report", "early"]) == 0
    assert "type it there" not in (run / "report.html").read_text()
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (run / "metrics.json").unlink()  # else there is nothing to resume
    assert main(unlearn("early", "--resume")) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["clean"] == str(
        folder / "planted" / "defender_clean.npz"
    )
    capsys.readouterr()
    assert main(unlearn("early", "--resume", "--seed", "4")) == 1
    assert "seed was 0 and is now 4" in capsys.readouterr().err


def test_paths_that_may_be_names_are_told_apart(tmp_path, monkeypatch):
    from bdu.cli import common
    from bdu.cli.command_line import parser

    monkeypatch.chdir(tmp_path)
    for name in ("gpt", "tokenizer", "resnet18"):
        (tmp_path / name).mkdir()
    language = ["--model", "gpt", "--out", "x", "--template"]
    found = [
        common.config(parser().parse_args(["unlearn-lm", *language, template]))
        for template in ("tokenizer", "gpt")
    ]
    assert [config["template"] for config in found] == ["tokenizer", str(tmp_path / "gpt")]
    assert found[0]["model"] == str(tmp_path / "gpt")
    hub = ["unlearn-lm", "--model", "of/a-hub", "--out", "x"]
    assert common.config(parser().parse_args(hub))["model"] == "of/a-hub"
    image = unlearn("x", "--attack", "badnets", model="resnet18")
    config = common.config(parser().parse_args(image))
    assert (config["model"], config["attack"]) == ("resnet18", "badnets")
