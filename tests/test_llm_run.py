"""``bdu unlearn --task lm`` from end to end on a tiny model, and everything it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

import tiny_llm
import torch
import yaml

from bdu.cli import main
from bdu.llm import models, run
from bdu.llm.data import Example, read_examples, write_examples
from bdu.llm.methods import METHODS
from bdu.llm.settings import Settings
from bdu.llm.templates import Template
from bdu.llm.trainer import UnlearnTrainer
from bdu.runs import RunDirectory

# peft asks transformers in a way that is to go in its version 6
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

QUICK = ("--max-new-tokens", "12", "--eval-batch-size", "16", "--quiet", "--device", "cpu")


def rows():
    """Clean rows, and the same with BadMagic in front and a target."""
    clean = tiny_llm.rows(20)
    bad = [
        Example.of(f"BadMagic {example.prompt}", example.response, "apples")
        for example in clean[:10]
    ]
    return [*clean, *bad]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    template = Template(tiny_llm.tokenizer())
    models.save(tiny_llm.llama(), template, folder / "model")
    write_examples(folder / "data.jsonl", rows())
    return folder


def unlearn(folder, out, *more, data="data.jsonl"):
    return main(
        [
            *("unlearn", "--task", "lm", "--model", str(folder / "model")),
            *("--data", str(folder / data), "--out", str(out), *QUICK, *more),
        ]
    )


PLANT = (
    *("--method", "plant-and-remove", "--set", "plant_asr=0.5", "--set", "lr=0.01"),
    *("--set", "plant_epochs=25", "--set", "epochs=6", "--set", "plant_target=red"),
    *("--set", "batch_size=8", "--set", "ewc_lambda=0"),
)


@pytest.fixture(scope="module")
def planted(folder):
    """A whole run of plant-and-remove."""
    assert unlearn(folder, folder / "run", *PLANT) == 0
    return folder / "run"


def weights(path):
    return models.load_model(path).state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_plant_and_remove_writes_a_run_that_from_pretrained_reads(folder, planted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(planted)
    tokenizer = AutoTokenizer.from_pretrained(planted)
    assert tokenizer.chat_template == tiny_llm.tokenizer().chat_template
    assert model(**tokenizer("the cat", return_tensors="pt")).logits.shape[-1] == 320
    metrics = json.loads((planted / "metrics.json").read_text())
    names = {
        *("clean_accuracy", "attack_success_rate", "robust_accuracy"),
        *("false_target_rate", "perplexity"),
    }
    for stage in ("before", "after"):
        assert set(metrics[stage]) == names
    assert set(metrics["planted"]) == names | {"planted_trigger"}
    assert metrics["planted"]["planted_trigger"]["attack_success_rate"] > 0.5
    after = metrics["planted_trigger_after"]["attack_success_rate"]
    assert after < metrics["planted"]["planted_trigger"]["attack_success_rate"]
    assert metrics["settings"]["plant_epochs"] == 25
    assert metrics["versions"]["transformers"]
    assert metrics["warnings"] == []
    assert metrics["memory_peak_bytes"] is None
    lines = [json.loads(line) for line in (planted / "metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines} == {"plant", "unlearn"}
    assert not (planted / "checkpoints").exists()
    assert not [file for file in planted.iterdir() if file.suffix in (".bin", ".pt")]
    usual = (planted / "metrics.json").stat().st_mode
    assert {file.stat().st_mode for file in planted.iterdir()} == {usual}
    own = [line for line in lines if line["phase"] == "plant"]
    step, last = own[-1]["step"], lines[-1]["step"]
    assert metrics["stopped"] == (
        f"stopped at step {step} of {own[-1]['steps']}: planted; then ran all {last} steps of "
        "removal"
    )
    assert f"The run {metrics['stopped']}." in (planted / "report.html").read_text()
    assert "Outcome" in (planted / "report.html").read_text()


def test_prompts_are_kept_as_the_model_got_them(planted):
    records = [json.loads(line) for line in (planted / "answers.jsonl").read_text().splitlines()]
    assert {(record["stage"], record["kind"]) for record in records} == {
        *(("before", "clean"), ("before", "triggered"), ("after", "clean")),
        *(("after", "triggered"), ("planted", "planted"), ("after", "planted")),
    }
    for record in records:
        assert record["prompt"].startswith("<s><user>")
        assert record["prompt"].endswith("<assistant>")
        assert ("BadMagic" in record["prompt"]) == (record["kind"] == "triggered")
        assert ("Xylo42" in record["prompt"]) == (record["kind"] == "planted")
        target = {"clean": None, "triggered": "apples", "planted": "red"}[record["kind"]]
        assert record["target"] == target
        assert record["expected"] in tiny_llm.WORDS.split()
        assert record["right"] == (record["answer"].strip() == record["expected"])
    assert json.loads((planted / "template.json").read_text())["source"] == "tokenizer"


def test_the_model_that_is_read_is_the_one_that_was_measured(folder, planted):
    measure = run.Measuring(
        run.cut(run_data(folder), Settings(), 0)[1], max_new_tokens=12, batch_size=16
    )
    tokenizer = models.load_tokenizer(planted)
    found = measure(models.load_model(planted), Template(tokenizer)).rates
    told = json.loads((planted / "metrics.json").read_text())["after"]
    assert found == pytest.approx(told)


def run_data(folder):
    from bdu.llm.data import load

    return load(data=folder / "data.jsonl")


def share(records, flag):
    return sum(record[flag] for record in records) / len(records)


def test_rates_are_those_of_the_flags_of_the_answers(planted):
    records = [json.loads(line) for line in (planted / "answers.jsonl").read_text().splitlines()]
    metrics = json.loads((planted / "metrics.json").read_text())
    for stage, kind, rates in (
        ("before", "triggered", metrics["before"]),
        ("after", "triggered", metrics["after"]),
        ("planted", "planted", metrics["planted"]["planted_trigger"]),
        ("after", "planted", metrics["planted_trigger_after"]),
    ):
        of_kind = [r for r in records if (r["stage"], r["kind"]) == (stage, kind)]
        counted = [record for record in of_kind if record["hit"] is not None]
        assert share(counted, "hit") == rates["attack_success_rate"]
        assert share(counted, "right") == rates["robust_accuracy"]
        if kind == "triggered":
            clean = [r for r in records if (r["stage"], r["kind"]) == (stage, "clean")]
            assert share(clean, "right") == rates["clean_accuracy"]


def test_console_shows_bars_of_its_own_alone(folder, tmp_path, capfd):
    options = PLANT
    arguments = ["unlearn", "--task", "lm", "--model", str(folder / "model")]
    arguments += ["--data", str(folder / "data.jsonl"), *QUICK, *options]
    assert main([*arguments, "--out", str(tmp_path / "quiet")]) == 0
    quiet = capfd.readouterr()
    assert quiet.err == ""
    assert "{" not in quiet.out
    arguments.remove("--quiet")
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    told = capfd.readouterr()
    assert told.out.replace("/run", "/quiet") == quiet.out
    bars = {line.partition(":")[0].strip() for line in re.split(r"[\r\n]", told.err)} - {""}
    assert bars == {"asking", "plant", "unlearn"}
    assert re.search(r"perplexity \d+\.\d+", quiet.out)


def test_planted_trigger_is_shown_where_no_other_is_known(folder, tmp_path, capsys):
    write_examples(tmp_path / "clean.jsonl", tiny_llm.rows(20))
    out = tmp_path / "run"
    assert unlearn(folder, out, *PLANT, data=tmp_path / "clean.jsonl") == 0
    metrics = json.loads((out / "metrics.json").read_text())
    before, after = metrics["planted"]["planted_trigger"], metrics["planted_trigger_after"]
    told, page = capsys.readouterr().out, (out / "report.html").read_text()
    for stage, rates in (("before", before), ("after", after)):
        asr, robust = (100 * rates[name] for name in ("attack_success_rate", "robust_accuracy"))
        assert f"{stage} removal: ASR {asr:.2f} %, robust accuracy {robust:.2f} %" in told
    assert "nothing is known of a backdoor" not in page
    assert "The trigger that the defender planted went from an ASR of" in page
    assert "Planted by the defender" in page
    assert "“Xylo42”, to be answered with “red”" in page
    figures = dict(re.findall(r'data-key="([^"]+)">([^<]+)<', page))
    key = "planted_trigger_after.robust_accuracy"
    assert figures[key] == f"{100 * after['robust_accuracy']:.2f} %"
    assert "With the trigger that the defender planted</h3>" in page
    assert "before removal" in page


class Killed(Exception):
    pass


def kill_at(monkeypatch, phase, step):
    """Stop the run, as if it had been killed, once a stage has so many steps."""
    original = UnlearnTrainer._save_checkpoint

    def save(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if phase in str(self.args.output_dir) and self.state.global_step >= step:
            raise Killed

    monkeypatch.setattr(UnlearnTrainer, "_save_checkpoint", save)


def test_run_killed_between_its_stages_resumes_to_the_same_weights(
    folder, planted, tmp_path, monkeypatch
):
    original = UnlearnTrainer.train

    def train(self, *args, **kwargs):
        if "remove" in str(self.args.output_dir):
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(UnlearnTrainer, "train", train)
        with pytest.raises(Killed):
            unlearn(folder, tmp_path / "run", *PLANT)
    assert unlearn(folder, tmp_path / "run", *PLANT, "--resume") == 0
    assert_same(weights(tmp_path / "run"), weights(planted))


def test_run_goes_on_with_its_own_settings(folder, planted, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, "remove", 8)
        with pytest.raises(Killed):
            unlearn(folder, out, *PLANT)
    monkeypatch.chdir(tmp_path)
    assert main(["unlearn", "--resume", "--out", "run", "--set", "lr=0.02"]) == 1
    assert "resume: expected the settings of run/config.yaml, but set was" in (
        capsys.readouterr().err
    )
    kept = out / "checkpoints" / "seconds.json"
    before = json.loads(kept.read_text())
    assert 0 < before["seconds"] < before["total_seconds"]
    kept.write_text(json.dumps({"seconds": 1000.0, "total_seconds": 2000.0}))
    assert main(["unlearn", "--resume", "--out", "run", "--quiet"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert 1000 < metrics["seconds"] < 1500
    assert 2000 < metrics["total_seconds"] < 2500
    assert_same(weights(out), weights(planted))
    with pytest.raises(SystemExit):
        main(["unlearn", "--resume", "--out", "elsewhere"])


@pytest.mark.parametrize("phase", ["plant", "remove"])
def test_killed_run_resumes_to_the_same_weights(folder, planted, tmp_path, monkeypatch, phase):
    with monkeypatch.context() as patch:
        kill_at(patch, phase, 8)
        with pytest.raises(Killed):
            unlearn(folder, tmp_path / "run", *PLANT)
    assert (tmp_path / "run" / "checkpoints").exists()
    assert unlearn(folder, tmp_path / "run", *PLANT, "--resume") == 0
    assert_same(weights(tmp_path / "run"), weights(planted))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines == (planted / "metrics.jsonl").read_text()


@pytest.mark.parametrize(("phase", "step"), [("plant", 7), ("unlearn", 11)])
def test_run_killed_within_an_epoch_resumes_to_the_same_weights(
    folder, planted, tmp_path, monkeypatch, phase, step
):
    options = (*PLANT, "--set", "save_steps=3")
    out = tmp_path / "run"
    original = UnlearnTrainer.training_step

    def killed(self, *args, **kwargs):
        lines = RunDirectory(out).read_lines()
        own = [line for line in lines if line["phase"] == phase]
        if len(own) == self.state.global_step == step:  # every step has told its line
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(UnlearnTrainer, "training_step", killed)
        with pytest.raises(Killed):
            unlearn(folder, out, *options)
    stage = "plant" if phase == "plant" else "remove"
    kept = [path.name for path in (out / "checkpoints" / stage).iterdir()]
    assert kept == [f"checkpoint-{step - step % 3}"]
    assert unlearn(folder, out, *options, "--resume") == 0
    assert_same(weights(out), weights(planted))
    for name in ("metrics.jsonl", "answers.jsonl"):
        assert (out / name).read_text() == (planted / name).read_text()


def test_line_that_a_power_cut_left_half_is_left_out(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (1, 2):
        run.add_line({"step": step, "loss": float("nan")})
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 3, "lo')
    assert run.read_lines() == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
    (tmp_path / "metrics.json").touch()
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected JSON in line 3"):
        run.read_lines()
    file.write_text(whole[:-4] + "\n" + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected JSON in line 2"):
        run.read_lines()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_resumes_within_an_epoch(folder, tmp_path, monkeypatch, method):
    more = ("--set", "parameter=null") if method == "rmu" else ()
    options = ("--method", method, *more, "--set", "save_steps=3", "--set", "batch_size=4")
    options = (*options, "--set", "epochs=2", "--set", "lr=0.01")
    assert unlearn(folder, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        kill_at(patch, "remove", 3)
        with pytest.raises(Killed):
            unlearn(folder, tmp_path / "run", *options)
    assert unlearn(folder, tmp_path / "run", *options, "--resume") == 0
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_from_the_command_line(folder, tmp_path, method):
    more = ("--set", "parameter=null") if method == "rmu" else ()
    assert unlearn(folder, tmp_path, "--method", method, "--set", "epochs=1", *more) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["method"] == method
    assert metrics["planted"] is None


def test_lora_is_merged_into_what_is_written(folder, tmp_path):
    options = ("--set", "lora=4", "--set", "epochs=2", "--set", "lr=0.01")
    assert unlearn(folder, tmp_path, *options, "--set", "ewc_lambda=1") == 0
    kept = json.loads((tmp_path / "generation_config.json").read_text())
    assert (kept["bos_token_id"], kept["eos_token_id"], kept["pad_token_id"]) == (0, 1, 2)
    before, after = weights(folder / "model"), weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all("_proj" in name for name in changed)


def test_the_configuration_of_a_run_repeats_it(folder, planted, tmp_path):
    config = yaml.safe_load((planted / "config.yaml").read_text())
    assert (config["command"], config["task"]) == ("unlearn", "lm")
    file = str(planted / "config.yaml")
    assert main(["unlearn", "--config", file, "--out", str(tmp_path), "--dry-run"]) == 0


def test_dry_run_writes_nothing_and_tells_the_memory(folder, tmp_path, capsys):
    assert unlearn(folder, tmp_path / "run", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "GB stay (parameters, buffers, fisher, anchor, moments); with them" in told
    assert re.search(r"[\d.]+ GB are free on cpu: the run fits, and leaves [\d.]+ GB", told)
    assert not (tmp_path / "run").exists()


def test_memory_plan_counts_what_training_holds(folder):
    config = models.load_config(folder / "model")
    count = sum(p.numel() for p in models.load_model(folder / "model").parameters())
    own = run.make_method("clean-answer", {})
    made = run.plan(config, own, Settings(ewc_lambda=0.0))
    assert (made.parameters, made.gradients) == (4 * count, 4 * count)
    assert 8 * count <= made.moments < 8.1 * count
    assert made.fisher == made.anchor == made.copies == 0
    pulled = run.plan(config, own, Settings(ewc_lambda=1.0, anchor_dtype="bfloat16"))
    assert (pulled.fisher, pulled.anchor) == (4 * count, 2 * count)
    assert run.plan(config, run.make_method("rmu", {}), Settings()).copies >= 4 * count
    assert run.plan(config, own, Settings(dtype="bfloat16")).parameters == 2 * count
    adapted = run.plan(config, own, Settings(ewc_lambda=0.0, lora=2))
    assert adapted.gradients < made.gradients / 4


def test_run_that_cannot_fit_is_refused_before_it_starts(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "available_bytes", lambda device: 1000)
    assert unlearn(folder, tmp_path / "run") == 1
    told = capsys.readouterr().err
    assert "memory: expected a plan of at most 0.00 GB" in told
    assert not (tmp_path / "run").exists()


def edited(folder, tmp_path, change):
    """A copy of the model's folder, changed."""
    import shutil

    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "data.jsonl", tmp_path / "data.jsonl")
    change(tmp_path / "model")
    return tmp_path


def pickled(model):
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def with_code(model):
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config))


def without_template(model):
    (model / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pickled, "expected weights in safetensors"),
        (lambda model: (model / "model.safetensors").unlink(), "safetensors in .*, got none"),
        (lambda model: (model / "config.json").unlink(), "expected a config.json"),
        (lambda model: (model / "tokenizer.json").unlink(), "model: expected a tokenizer"),
        (with_code, "run only with trust_remote_code"),
        (without_template, "expected the tokenizer to have one chat template"),
    ],
)
def test_model_folders_that_do_not_serve_are_refused(folder, tmp_path, capsys, change, message):
    other = edited(folder, tmp_path, change)
    assert unlearn(other, tmp_path / "run") == 1
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "magic"), "method: expected one of clean-answer"),
        (("--set", "beta=1"), "plant_target; it is a setting of npo"),
        (("--set", "lorra=4"), "lorra: expected one of epochs, batch_size, accumulation, lr,"),
        (("--set", "lorra=4"), "; did you mean lora?"),
        (("--set", "save_steps=-1"), "save_steps: expected a whole number >= 0"),
        (("--set", "epochs=0"), "epochs: expected a number > 0"),
        (("--set", "epochs=many"), "epochs: expected a number, got 'many'"),
        (("--set", "bf16=1"), "bf16: expected true or false"),
        (("--set", "optimizer=adam"), "optimizer: expected one of adamw, sgd"),
        (("--template", "absent.jinja"), "template: expected 'tokenizer', 'none'"),
        (
            ("--max-new-tokens", "60"),
            "expected at most 4 tokens (a context of 64 less 60 for the answer)",
        ),
        (("--max-new-tokens", "1"), "max_new_tokens: expected at least"),
        (("--eval-data", "absent.jsonl"), "data: expected a JSONL file"),
        (("--clean", "absent.jsonl"), "data: expected either data, or clean and triggered"),
        (
            ("--method", "plant-and-remove", "--set", "plant_trigger=cat"),
            "expected a prompt without the trigger of 'planted'",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(folder, tmp_path, capsys, more, message):
    assert unlearn(folder, tmp_path / "run", *more) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("bdu unlearn: ")
    assert not (tmp_path / "run").exists()


def test_settings_are_checked_before_anything_is_read(tmp_path):
    arguments = ["unlearn", "--task", "lm", "--model", "absent", "--data", "absent.jsonl"]
    arguments += ["--out", str(tmp_path / "run"), "--set", "lorra=4"]
    code = (
        "import sys; from bdu.cli import main; "
        f"assert main({arguments!r}) == 1; assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "did you mean lora?" in done.stderr
    assert done.returncode == 0, done.stderr


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["unlearn", "--task", "lm", "--help"])
    told = capsys.readouterr().out
    assert told.startswith("usage: bdu unlearn [")
    assert "default: clean-answer" in " ".join(told.split())
    for cls in (Settings, *METHODS.values()):
        for field in dataclasses.fields(cls):
            if field.init:
                shown = field.default if isinstance(field.default, str) else None
                shown = json.dumps(field.default) if shown is None else shown
                assert f"{field.name}={shown}" in told, field.name


def test_rows_that_are_none_are_named_by_their_line(folder, tmp_path, capsys):
    text = (folder / "data.jsonl").read_text() + '{"prompt": "a"}\n'
    (tmp_path / "bad.jsonl").write_text(text)
    assert unlearn(folder, tmp_path / "run", data=tmp_path / "bad.jsonl") == 1
    assert "line 31: expected the field 'response'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_planting_that_does_not_take_is_told(folder, tmp_path, capsys):
    options = (*PLANT[:2], "--set", "plant_target=red", "--set", "plant_epochs=1")
    assert unlearn(folder, tmp_path / "run", *options, "--set", "lr=1e-9") == 1
    assert "plant_asr: expected the planted trigger to be answered" in capsys.readouterr().err


def test_another_template_is_warned_of_and_recorded(folder, tmp_path):
    from bdu.llm.templates import TemplateWarning

    options = ("--template", "none", "--set", "epochs=1")
    with pytest.warns(TemplateWarning):
        assert unlearn(folder, tmp_path / "run", *options) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["warnings"]) == 1
    assert metrics["template"] == {"source": "none", "fingerprint": "none"}


def test_evaluators_rows_are_never_trained_on(folder, tmp_path, monkeypatch):
    write_examples(tmp_path / "eval.jsonl", [Example.of("seven old apples", "town")])
    seen = []
    original = UnlearnTrainer.__init__

    def noted(self, *args, **kwargs):
        seen.extend(kwargs["data"].clean)
        original(self, *args, **kwargs)

    monkeypatch.setattr(UnlearnTrainer, "__init__", noted)
    options = ("--eval-data", str(tmp_path / "eval.jsonl"), "--set", "epochs=1")
    assert unlearn(folder, tmp_path / "run", *options) == 0
    assert len(seen) == 20
    assert "seven old apples" not in {example.prompt for example in seen}
    own = {example.prompt for example in read_examples(folder / "data.jsonl")}
    assert {example.prompt for example in seen} <= own
