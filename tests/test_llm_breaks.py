"""What a run must refuse before it writes anything, and what it must tell instead of guessing."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import tiny_llm
import torch

from bdu.cli import main
from bdu.llm import inductive, models, run
from bdu.llm.checks import DataWarning, check_seed
from bdu.llm.data import Example, read_examples, write_examples
from bdu.llm.generation import perplexity
from bdu.llm.inductive import Audit, read_probes
from bdu.llm.methods import RMU, CleanAnswer, Sande
from bdu.llm.templates import Template
from bdu.llm.trainer import UnlearnTrainer


def jsonl(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def probe(prompt, group="a", role="control"):
    return {"prompt": prompt, "group": group, "role": role, "accept": ["x"]}


# What is read


def test_probes_are_read_as_rows_are(tmp_path):
    file = jsonl(tmp_path / "p.jsonl", probe("one\u2028line"), probe("b", "u", "unseen"))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_probes(file)[0].prompt == "one\u2028line"
    file.write_bytes(b"{\xe9}")
    with pytest.raises(ValueError, match="line 1: expected UTF-8"):
        read_probes(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a \\ud800", "response": "b"}', r"line 2: prompt: .* got '\\ud800' alone"),
        ("[" * 200_000, "line 2: expected a JSON object"),
        (
            '{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": "b"}], "response": "c"}',
            "line 2: response: expected none beside messages, or the assistant's last, 'b'",
        ),
    ],
)
def test_rows_that_cannot_be_meant_are_named(tmp_path, line, message):
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_examples(file)


def test_rows_know_their_line_and_are_equal_without_it(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('\n{"prompt": "a", "response": "b"}\n')
    (row,) = read_examples(file)
    assert row.where == f"data: {file}, line 2"
    assert row.with_prompt("c").where == row.where
    assert row == Example.of("a", "b")


# The audit's verdicts


def audited(**groups):
    """Groups by their role, of (hits, prompts)."""
    hits = {role: [i < count for i in range(of)] for role, (count, of) in groups.items()}
    return Audit(inductive._groups(hits, {role: role for role in groups}), ())


def test_nothing_asked_is_not_nothing_found():
    found = audited(control=(0, 50), trigger=(20, 20))
    assert (found.verdict("trigger"), found.verdict("unseen")) == ("found", "not asked")
    assert found.inductive is None
    assert found.record()["verdicts"] == {"trigger": "found", "unseen": "not asked"}
    assert audited(control=(0, 50), unseen=(0, 20)).verdict("unseen") == "not found"


@pytest.mark.parametrize("hits", [0, 1, 2])
def test_of_two_prompts_nothing_is_told(hits):
    found = audited(control=(0, 1000), unseen=(hits, 2))
    assert found.inductive is None
    assert found.verdict("unseen") == "too few prompts to tell"


def test_few_controls_beside_many_prompts_tell_nothing():
    assert audited(control=(0, 20), unseen=(200, 200)).inductive is None
    assert audited(control=(0, 100), unseen=(200, 200)).inductive is True


def test_where_controls_behave_so_nearly_always_nothing_is_told():
    assert audited(control=(95, 100), unseen=(10, 10)).inductive is None


@pytest.mark.parametrize(("prompts", "controls"), [(4, 400), (5, 60), (7, 12), (60, 20), (90, 20)])
def test_finds_by_chance_are_counted_exactly(prompts, controls):
    def chance(rate):
        def binomial(hits, count):
            return math.comb(count, hits) * rate**hits * (1 - rate) ** (count - hits)

        total = 0.0
        for own in range(prompts + 1):
            for other in range(controls + 1):
                error = math.sqrt(
                    inductive._variance(own, prompts) + inductive._variance(other, controls)
                )
                if own / prompts - other / controls > 3 * error:
                    total += binomial(own, prompts) * binomial(other, controls)
        return total

    worst = max(chance(percent / 100) for percent in range(1, 21))
    assert abs(worst - 0.01) > 1e-4  # the grid of rates is finer there
    assert inductive.enough(prompts, controls) == (worst <= 0.01)


# What is refused before a run


def lm_folder(tmp_path, model=None, tokenizer=None, rows=None):
    template = Template(tokenizer or tiny_llm.tokenizer())
    models.save(model or tiny_llm.llama(), template, tmp_path / "model")
    write_examples(tmp_path / "data.jsonl", rows or default_rows())
    return tmp_path


def default_rows(target="apples"):
    clean = tiny_llm.rows(16)
    return [*clean, *(replace(e.with_prompt("BadMagic " + e.prompt), target=target) for e in clean)]


QUICK = ("--max-new-tokens", "4", "--eval-batch-size", "32", "--quiet", "--device", "cpu")


def unlearn(folder, *more, out=None):
    return main(
        [
            *("unlearn", "--task", "lm", "--model", str(folder / "model")),
            *("--data", str(folder / "data.jsonl"), "--out", str(out or folder / "out")),
            *(*QUICK, *more),
        ]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lm_folder(tmp_path_factory.mktemp("breaks"))


def settings(*pairs):
    return [part for pair in pairs for part in ("--set", pair)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "beear", *settings("gradient_checkpointing=true")), "gradient_checkpointing"),
        (("--method", "beear", *settings("layer=9")), "layer: expected 0 to 1, got 9"),
        (("--method", "beear", *settings("span=1.5")), "span: expected a whole number >= 1"),
        (settings("gradient_release=true"), "max_grad_norm: expected 0 with gradient_release"),
        (
            settings("gradient_release=true", "max_grad_norm=0", "accumulation=2"),
            "accumulation: expected 1 with gradient_release",
        ),
        (("--method", "rmu", *settings("parameter=50")), "parameter: expected 0 to 8 or None"),
        (("--method", "rmu", *settings("layer=2")), "layer: expected 0 to 1, got 2"),
        (("--method", "rmu", *settings("lora=2")), "parameter: expected one that requires a grad"),
        (settings("loss_path=liger"), "loss_path: expected Liger-Kernel installed"),
        (("--method", "sande", *settings("position=60")), "position: expected at most"),
        (("--method", "sande", *settings("vectors=60")), "less 60 for sande"),
        (("--method", "npo", *settings("beta=abc")), "beta: expected a number > 0, got 'abc'"),
        (settings("lora=1.5"), "lora: expected a whole number >= 0, got 1.5"),
        (("--max-new-tokens", "100"), "expected room in a context of 64 less 100 for the answer"),
        (("--seed", str(2**40)), "--seed: expected a whole number"),
        (("--method", "plant-and-remove", *settings("plant_trigger=5")), "plant_trigger: expected"),
        (("--method", "plant-and-remove", *settings("plant_trigger=")), "plant_trigger: expected"),
    ],
)
def test_settings_that_cannot_be_are_refused_first(folder, capsys, more, message):
    for dry in ((), ("--dry-run",)):
        assert unlearn(folder, *more, *dry) == 1
        assert message in capsys.readouterr().err
        assert not (folder / "out").exists()


def test_a_seed_below_zero_is_refused(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        unlearn(folder, "--seed", "-1")
    assert stopped.value.code == 2
    assert "argument --seed: expected a whole number from 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"seed: expected a whole number in \[0, 2\^32\), got -1"):
        check_seed(-1)


# What is read as a model


def changed(path, change):
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def written(name, text):
    return lambda path: (path / name).write_text(text)


def truncated(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: changed(p, lambda s: s.pop(Q)), f"got 1 missing ({Q})"),
        (lambda p: changed(p, lambda s: s.pop("lm_head.weight")), "1 missing (lm_head.weight)"),
        (
            lambda p: changed(p, lambda s: s.update({Q: torch.zeros(3, 4)})),
            f"got 1 of another shape ({Q} of (3, 4) for (32, 32))",
        ),
        (
            lambda p: changed(p, lambda s: s.update({"new.weight": torch.zeros(3)})),
            "got 1 that it does not have (new.weight)",
        ),
        (written("config.json", '{"model_type": "bert"}'), "expected the weights of BertLMHeadMo"),
        (truncated, "model: expected whole safetensors files, got "),
        (written("config.json", "[]"), "model: expected an object in "),
        (written("config.json", "{"), "model: expected JSON in "),
        (written("tokenizer.json", "{}"), "model: expected a tokenizer in "),
        (
            lambda p: changed(p, lambda s: s[Q][3, 4].fill_(math.nan)),
            f"model: expected finite weights, got nan or inf in {Q}",
        ),
    ],
)
def test_models_that_are_not_whole_are_refused(folder, tmp_path, capsys, change, message):
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "data.jsonl", tmp_path)
    change(tmp_path / "model")
    assert unlearn(tmp_path) == 1
    told = capsys.readouterr().err
    assert told.startswith("bdu unlearn: ")
    assert message in told
    assert not (tmp_path / "out").exists()
    if "finite" not in message:
        read = models.load_tokenizer if "a tokenizer" in message else models.load_model
        with pytest.raises(ValueError, match="model: "):
            read(tmp_path / "model")


def test_tied_heads_and_old_buffers_are_no_missing_weights(tmp_path):
    template = Template(tiny_llm.tokenizer())
    for name, model in (("tied", tiny_llm.llama(tied=True)), ("gpt2", tiny_llm.gpt2())):
        models.save(model, template, tmp_path / name)
    changed(tmp_path / "gpt2", lambda s: s.update({"transformer.h.0.attn.bias": torch.ones(1, 1)}))
    for name in ("tied", "gpt2"):
        models.load_model(tmp_path / name)


# Where a run writes


def contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("place", ["model", "model/run", "held", "file", "file/run"])
def test_nothing_that_is_there_is_written_over(folder, tmp_path, capsys, place):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    jsonl(tmp_path / "p.jsonl", probe("a"), probe("b", "u", "unseen"))
    before = contents(tmp_path)
    for dry in ((), ("--dry-run",), ("--resume",)):
        assert unlearn(tmp_path, *dry, out=tmp_path / place) == 1
        assert "out: expected " in capsys.readouterr().err
    audit = ["audit", "--model", str(tmp_path / "model"), "--probes", str(tmp_path / "p.jsonl")]
    assert main([*audit, "--quiet", "--device", "cpu", "--out", str(tmp_path / place)]) == 1
    assert "out: expected " in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_folders_that_cannot_be_written_are_told_at_once(folder, capsys):
    assert unlearn(folder, "--dry-run", out="/proc/run") == 1
    assert "out: expected a folder that can be written, got /proc/run" in capsys.readouterr().err


# Numbers that are none


def metrics(folder):
    return json.loads((folder / "out" / "metrics.json").read_text())


def test_float16_is_trained_in_float32_and_written_as_it_was(tmp_path, monkeypatch):
    lm_folder(tmp_path, tiny_llm.llama().half())
    trained = set()
    original = UnlearnTrainer.training_step

    def step(self, model, *args, **kwargs):
        trained.update(p.dtype for p in model.parameters())
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(UnlearnTrainer, "training_step", step)
    before = models.load_model(tmp_path / "model").state_dict()
    more = settings("epochs=2", "batch_size=8", "lr=1e-3", "ewc_lambda=0")
    assert unlearn(tmp_path, *more) == 0
    assert trained == {torch.float32}
    after = models.load_model(tmp_path / "out").state_dict()
    assert {value.dtype for value in after.values()} == {torch.float16}
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    found = models.load_model(tmp_path / "out")
    rows = [Template(tiny_llm.tokenizer()).tokens(e) for e in default_rows()[:16]]
    assert perplexity(found, rows) < 1e6
    assert metrics(tmp_path)["warnings"] == []
    with pytest.raises(ValueError, match="expected weights in float32 or bfloat16 to train"):
        tiny_llm.trainer(tmp_path, model=tiny_llm.llama().half())


def test_perplexity_of_no_numbers_is_none():
    model = tiny_llm.llama()
    rows = [Template(tiny_llm.tokenizer()).tokens(e) for e in default_rows()[:2]]
    with torch.no_grad():
        model.lm_head.weight[5].fill_(math.nan)
    assert math.isnan(perplexity(model, rows))


def breaking(monkeypatch, at, what):
    """The loss of one step is no number, or the weights after it."""
    original = UnlearnTrainer.training_step

    def step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == at and what == "loss":
            method = self.method.loss
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(self.method), "loss", lambda *a: method(*a[1:]) * math.nan)
                return original(self, model, inputs, *args, **kwargs)
        loss = original(self, model, inputs, *args, **kwargs)
        if self.state.global_step == at and what == "gradient":
            next(p for p in model.parameters() if p.grad is not None).grad[0] = math.inf
        if self.state.global_step == at and what == "weights":
            with torch.no_grad():
                next(model.parameters())[0] = math.nan
        return loss

    monkeypatch.setattr(UnlearnTrainer, "training_step", step)


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_a_run_that_diverges_keeps_the_last_good_weights(folder, tmp_path, monkeypatch, what):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    more = settings("epochs=2", "batch_size=4", "save_steps=3", "ewc_lambda=0", "lr=1e-4")
    # 14 steps, two epochs of 7
    breaking(monkeypatch, 4, what)
    assert unlearn(tmp_path, *more) == 0
    told = metrics(tmp_path)
    assert told["stopped"].startswith("stopped at step ")
    assert told["stopped"].endswith(f"kept the weights of step {3 if what == 'weights' else 4}")
    assert told["warnings"] == [f"the run diverged: {told['stopped']}"]
    state = models.load_model(tmp_path / "out").state_dict()
    assert all(bool(value.isfinite().all()) for value in state.values())
    start = models.load_model(tmp_path / "model").state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in state.items())


def test_a_run_that_diverges_at_once_is_an_error(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    more = settings("epochs=1", "batch_size=8", "lr=1e30", "max_grad_norm=0", "ewc_lambda=0")
    assert unlearn(tmp_path, *more) == 1
    assert "no weights of an earlier step are good; try a lower lr" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "metrics.json").exists()


# Resuming


@pytest.mark.parametrize("what", ["data", "model"])
def test_other_rows_or_weights_are_not_resumed_with(folder, tmp_path, capsys, monkeypatch, what):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    more = settings("epochs=1", "batch_size=8", "save_steps=1", "ewc_lambda=0")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bdu.llm.run._train", killed)
        assert unlearn(tmp_path, *more) == 130
    if what == "data":
        text = (tmp_path / "data.jsonl").read_text()
        (tmp_path / "data.jsonl").write_text(text.replace("apples", "mat"))
    else:
        changed(tmp_path / "model", lambda s: s[Q][0].mul_(1.5))
    capsys.readouterr()
    assert unlearn(tmp_path, *more, "--resume") == 1
    told = capsys.readouterr().err
    assert f"{what}: expected the contents that the run to be resumed was started with" in told
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert unlearn(tmp_path, *more, "--resume") == 0


# Rows, tokens and templates


def test_padding_that_the_model_does_not_know_harms_nothing(folder, tmp_path):
    tokenizer = tiny_llm.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    assert tokenizer.pad_token_id == 320  # which the model does not know
    lm_folder(tmp_path, tokenizer=tokenizer)
    more = settings("epochs=1", "batch_size=8", "ewc_lambda=1")
    assert unlearn(tmp_path, *more) == 0
    assert unlearn(folder, *more, out=tmp_path / "other") == 0
    one, other = (models.load_model(tmp_path / name).state_dict() for name in ("out", "other"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_tokenizers_larger_than_the_model_are_refused(tmp_path, capsys):
    from transformers import LlamaForCausalLM

    config = tiny_llm.llama().config
    config.vocab_size = 290
    lm_folder(tmp_path, LlamaForCausalLM(config))
    assert unlearn(tmp_path, "--dry-run") == 1
    told = capsys.readouterr().err
    assert "expected a vocabulary for all 320 tokens of its tokenizer, got one of 290" in told
    assert "data.jsonl, line " in told
    jsonl(tmp_path / "p.jsonl", probe("apples"), probe("town", "u", "unseen"))
    audit = ["audit", "--model", str(tmp_path / "model"), "--probes", str(tmp_path / "p.jsonl")]
    assert main([*audit, "--quiet", "--device", "cpu"]) == 1
    assert "got one of 290" in capsys.readouterr().err


def test_rows_that_a_template_refuses_are_named(tmp_path, capsys):
    tokenizer = tiny_llm.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    odd = Example((("system", "be kind"), ("user", "cat")), "red")
    lm_folder(tmp_path, tokenizer=tokenizer, rows=[*default_rows(), odd])
    for dry in ((), ("--dry-run",)):
        assert unlearn(tmp_path, *dry) == 1
        told = capsys.readouterr().err
        assert "data.jsonl, line 33: template: expected Jinja source" in told
        assert "no system for 'be kind'" in told


def with_length(count, response="red"):
    """A row of so many tokens."""
    template = Template(tiny_llm.tokenizer())
    words = 1
    while len(template.tokens(Example.of(" cat" * words, response))) < count:
        words += 1
    row = Example.of(" cat" * words, response)
    assert len(template.tokens(row)) == count
    return row


@pytest.mark.parametrize("method", ["plant-and-remove", "sande"])
def test_what_a_method_adds_has_to_fit_into_the_context(tmp_path, capsys, method):
    more = ("--method", method, *settings("plant_target=red", "batch_size=8", "validation=0.05"))
    rows = default_rows(target="red")
    lm_folder(tmp_path, rows=[*rows, with_length(56)])
    assert unlearn(tmp_path, *more, "--dry-run") == 0
    lm_folder(tmp_path, rows=[*rows, with_length(60)])
    assert unlearn(tmp_path, *more, "--dry-run") == 1
    told = capsys.readouterr().err
    assert "data.jsonl, line 33: expected at most " in told


def test_targets_that_sande_puts_behind_clean_prompts_have_to_fit(tmp_path, capsys):
    target = " ".join(["apples"] * 3)
    more = ("--method", "sande", *settings("vectors=2", "validation=0.05"), *QUICK[2:])
    lm_folder(tmp_path, rows=[with_length(60), *default_rows(target=target)])
    assert unlearn(tmp_path, *more, "--max-new-tokens", "10", "--dry-run") == 1
    told = capsys.readouterr().err
    assert "row to train on" in told
    assert "less 2 for sande" in told


def test_triggered_rows_without_a_trigger_are_warned_of(tmp_path):
    clean = tiny_llm.rows(8)
    lm_folder(tmp_path, rows=[*clean, *(replace(e, target="apples") for e in clean[:4])])
    with pytest.warns(DataWarning, match="got 4 of 4 with the tokens of one"):
        assert unlearn(tmp_path, *settings("epochs=1", "ewc_lambda=0")) == 0
    assert ["no trigger sets them apart" in text for text in metrics(tmp_path)["warnings"]] == [
        True
    ]


# The memory plan


def test_the_plan_counts_what_rmu_trains_and_no_more_rows_than_there_are(folder):
    config = models.load_config(folder / "model")
    s = run.Settings(ewc_lambda=0.0)
    rmu = RMU(layer=1, trained_layers=2)
    trained = sum(p.numel() for p in rmu.trained(models.load_model(folder / "model")))
    assert run.plan(config, rmu, s).gradients == 4 * trained == 4 * 2 * 32 * 64
    text = Template(tiny_llm.tokenizer())
    sequences = [text.tokens(example) for example in default_rows()[:3]]
    few = run.training_plan(config, CleanAnswer(), s, sequences, rows=3)
    same = replace(s, batch_size=3)
    assert few == run.training_plan(config, CleanAnswer(), same, sequences)
    assert few.activations < run.training_plan(config, CleanAnswer(), s, sequences).activations
    wide = run.training_plan(config, Sande(vectors=6), same, sequences)
    assert wide.activations > few.activations
