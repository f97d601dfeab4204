"""The trainer: accumulation, resuming, LoRA, release and checkpointing change nothing they should
not."""

from __future__ import annotations

import copy
import random

import pytest

pytest.importorskip("transformers")

import tiny_llm
import torch
from tiny_llm import template, text_data, trainer, weights
from transformers import TrainerCallback

import bdu
from bdu.llm.data import TextData
from bdu.llm.losses import VocabularyLoss
from bdu.llm.methods import METHODS, NPO, RMU, Beear, CleanAnswer, GradientAscent, Plant, Sande
from bdu.llm.rows import Collator, Counts, Kind, one_to_one, rows_of
from bdu.llm.templates import IGNORED_LABEL
from bdu.llm.trainer import clean_fisher, last_checkpoint
from bdu.optim import EWCAdamW

# peft asks transformers in a way that is to go in its version 6
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

# of a sum over a few thousand terms in float64
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if tolerance:
            torch.testing.assert_close(value, other[name], **tolerance, msg=lambda m: m)
        else:
            assert torch.equal(value, other[name]), name


def lora(model=None, dtype=torch.float64):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    model = tiny_llm.llama(dtype=dtype, layers=3) if model is None else model
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    return get_peft_model(model, config).to(dtype)


METHODS_HERE = [
    *(CleanAnswer(), Plant(), GradientAscent(ceiling=5.0), NPO(), Beear()),
    *(Sande(parrot_epochs=2, parrot_batch=6), RMU()),
]
ALL = [*METHODS_HERE[:-2], Sande(parrot_epochs=3), RMU(alpha=1.0)]


@pytest.mark.parametrize("method", METHODS_HERE, ids=lambda method: method.name)
def test_accumulation_equals_the_large_batch(tmp_path, method):
    # the mixture has rows of several lengths and kinds, unevenly spread over micro-batches
    found = []
    for batch_size, accumulation in ((24, 1), (5, 5)):
        own = trainer(
            tmp_path,
            method=copy.deepcopy(method),
            batch_size=batch_size,
            accumulation=accumulation,
            steps=2,
            # with momentum and no preconditioner, rounding stays rounding
            optimizer="sgd",
            optimizer_options={"momentum": 0.9},
            args={"max_grad_norm": 0.5, "num_train_epochs": 2},
        )
        assert len(own.train_rows) <= 24
        own.train()
        found.append(weights(own.model))
    start = weights(tiny_llm.llama(dtype=torch.float64, layers=3))
    assert any(not torch.equal(value, start[name]) for name, value in found[0].items())
    assert_same(*found, **TIGHT)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (CleanAnswer(), {}),
        (NPO(), {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}}),
        (RMU(noise=0.1), {}),
        (Beear(), {}),
        (Sande(parrot_epochs=3), {}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_resumed_run_gives_the_weights_of_an_uninterrupted_one(tmp_path, method, options):
    def make(folder, *callbacks):
        return trainer(
            tmp_path / folder,
            model=tiny_llm.llama(layers=3),
            method=copy.deepcopy(method),
            steps=7,
            ewc_lambda=1.0 if method.name != "rmu" else 0.0,
            fisher="clean" if method.name != "rmu" else None,
            callbacks=list(callbacks),
            args={"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"},
            **options,
        )

    whole = make("whole")
    whole.train()
    with pytest.raises(Killed):
        make("cut", KillAt(5)).train()
    again = make("cut")
    checkpoint = last_checkpoint(again.args.output_dir)
    assert checkpoint.endswith("checkpoint-4")
    again.train(resume_from_checkpoint=checkpoint)
    assert again.state.global_step == 7
    assert_same(weights(whole.model), weights(again.model))


def test_resumed_run_draws_the_same_dropout(tmp_path):
    def make(folder, *callbacks):
        model = tiny_llm.gpt2()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        return trainer(
            tmp_path / folder,
            model=model,
            steps=6,
            callbacks=list(callbacks),
            args={"save_strategy": "steps", "save_steps": 3},
        )

    whole = make("whole")
    whole.train()
    with pytest.raises(Killed):
        make("cut", KillAt(4)).train()
    again = make("cut")
    again.train(resume_from_checkpoint=last_checkpoint(again.args.output_dir))
    assert_same(weights(whole.model), weights(again.model))


def test_lora_is_trained_alone_with_a_fisher_of_its_own_and_resumed(tmp_path):
    def make(folder, *callbacks):
        return trainer(
            tmp_path / folder,
            model=lora(),
            steps=4,
            ewc_lambda=5.0,
            fisher="clean",
            callbacks=list(callbacks),
            args={"save_strategy": "steps", "save_steps": 2},
        )

    whole = make("whole")
    before = weights(whole.model)
    whole.train()
    after = weights(whole.model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if "lora_" in name}
    assert set(whole._fisher) == changed
    attached = [s for s in whole.optimizer.state.values() if s.get("fisher") is not None]
    assert len(attached) == len(changed)
    with pytest.raises(Killed):
        make("cut", KillAt(3)).train()
    again = make("cut")
    again.train(resume_from_checkpoint=last_checkpoint(again.args.output_dir))
    assert_same(after, weights(again.model))


def by_hand(model, rows, *, fisher, lr, ewc_lambda, collator):
    """Three steps on the whole set, without Trainer."""
    optimizer = EWCAdamW(
        model.named_parameters(),
        lr=lr,
        weight_decay=0.0,
        ewc_lambda=ewc_lambda,
        fisher=fisher,
        max_grad_norm=1.0,
    )
    batch = collator(rows)
    for _ in range(3):
        optimizer.zero_grad()
        losses = VocabularyLoss(model, "full").tokens(batch)
        (losses.values.sum() / len(losses.values)).backward()
        optimizer.step()


def test_trainer_does_the_steps_of_a_plain_loop_with_the_pull(tmp_path):
    model = tiny_llm.llama(dtype=torch.float64, layers=3)
    twin = copy.deepcopy(model)
    own = trainer(
        tmp_path,
        model=model,
        batch_size=16,
        steps=3,
        ewc_lambda=40.0,
        fisher="clean",
        args={"lr_scheduler_type": "constant", "weight_decay": 0.0, "adam_epsilon": 1e-8},
    )
    rows, collator = own.train_rows, own.collator
    retain = [row for row in rows if row.kind == Kind.RETAIN]
    fisher = clean_fisher(twin, retain, collator, batch_size=3)
    by_hand(twin, rows, fisher=fisher, lr=1e-3, ewc_lambda=40.0, collator=collator)
    own.train()
    # rows come in another order, and AdamW divides by the root of small numbers
    assert_same(weights(model), weights(twin), rtol=1e-5, atol=1e-7)
    free = trainer(tmp_path, batch_size=16, steps=3, args={"lr_scheduler_type": "constant"})
    free.train()
    moved = (weights(free.model)["lm_head.weight"] - weights(model)["lm_head.weight"]).abs().max()
    assert float(moved) > 1e-5


def test_clean_fisher_is_the_mean_square_of_single_rows(tmp_path):
    model = tiny_llm.llama(dtype=torch.float64)
    rows = rows_of(template(), tiny_llm.rows(5), Kind.RETAIN)
    found = clean_fisher(model, rows, Collator(2), samples=4, batch_size=3, seed=7)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    drawn = random.Random(7).sample(rows, 4)
    assert drawn != rows[:4]
    for row in drawn:
        model.zero_grad()
        VocabularyLoss(model, "full").total(Collator(2)([row])).backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad.square()
    model.zero_grad()
    size = sum(float(f.sum()) for f in expected.values()) / sum(map(torch.numel, expected.values()))
    for name, f in found.items():
        torch.testing.assert_close(f, expected[name] / size, rtol=1e-8, atol=1e-10)


def test_gradient_release_gives_the_same_bits(tmp_path):
    found = []
    for release in (False, True):
        own = trainer(
            tmp_path,
            model=tiny_llm.llama(layers=3),
            steps=3,
            ewc_lambda=1.0,
            fisher="clean",
            gradient_release=release,
            args={"max_grad_norm": 0.0},
        )
        own.train()
        assert all(p.grad is None for p in own.model.parameters())
        found.append(weights(own.model))
    assert_same(*found)
    own.model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert all(p.grad is not None for p in own.model.parameters())  # the hooks are gone


def test_gradient_checkpointing_changes_nothing(tmp_path):
    found = []
    for checkpointing in (False, True):
        own = trainer(tmp_path, steps=2, args={"activation_checkpointing": checkpointing})
        own.train()
        found.append(weights(own.model))
    assert_same(*found, **TIGHT)


@pytest.mark.parametrize("method", [CleanAnswer(), RMU(), Beear()], ids=lambda m: m.name)
def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path, method):
    own = trainer(
        tmp_path, model=tiny_llm.llama(layers=3), method=method, args={"bf16": True}, steps=2
    )
    seen = set()
    layer = own.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    own.train()
    assert torch.bfloat16 in seen
    assert {p.dtype for p in own.model.parameters()} == {torch.float32}
    assert all(bool(torch.isfinite(p).all()) for p in own.model.parameters())


def test_weights_in_bfloat16_are_trained(tmp_path):
    own = trainer(
        tmp_path,
        model=tiny_llm.llama(dtype=torch.bfloat16),
        ewc_lambda=1.0,
        fisher="clean",
        optimizer_options={"stochastic_rounding": 1},
    )
    own.train()
    assert {f.dtype for f in own._fisher.values()} == {torch.float32}
    assert {p.dtype for p in own.model.parameters()} == {torch.bfloat16}


def test_run_can_be_saved_and_read_without_pickles(tmp_path):
    own = trainer(
        tmp_path,
        model=tiny_llm.llama(),
        args={"save_strategy": "steps", "save_steps": 1},
        ewc_lambda=1.0,
        fisher="clean",
    )
    own.train()
    folder = last_checkpoint(own.args.output_dir)
    state = torch.load(f"{folder}/optimizer.pt", weights_only=True)
    assert "anchor" in state["state"][0]
    assert not list((tmp_path / "out").rglob("training_args.bin"))
    assert list((tmp_path / "out").rglob("model.safetensors"))


def test_method_lowers_its_own_loss(tmp_path):
    for method in ALL:
        own = trainer(
            tmp_path,
            model=tiny_llm.llama(layers=3),
            method=copy.deepcopy(method),
            batch_size=24,
            steps=8,
            args={"logging_steps": 1, "learning_rate": 3e-3},
        )
        own.train()
        losses = [line["loss"] for line in own.state.log_history if "loss" in line]
        assert losses[-1] < losses[0], (method.name, losses)


# Rows


def test_shorter_parts_are_repeated():
    assert one_to_one([1, 2, 3], [7, 8], []) == [1, 2, 3, 7, 8, 7]


def test_padding_changes_no_loss(tmp_path):
    own = trainer(tmp_path)
    together = own.vocabulary_loss.tokens(own.collated(own.train_rows)).sums()
    for row, value in zip(own.train_rows, together, strict=True):
        torch.testing.assert_close(
            own.vocabulary_loss.tokens(own.collated([row])).sums()[0], value, **TIGHT
        )


def test_counts_are_those_of_all_micro_batches(tmp_path):
    own = trainer(tmp_path)
    rows = own.train_rows
    whole = Counts.of([own.collated(rows)])
    assert Counts.of([own.collated(rows[:3]), own.collated(rows[3:])]) == whole
    assert whole.rows == {Kind.RETAIN: 8, Kind.CLEAN: 8, Kind.TARGET: 0}
    labelled = [sum(label != IGNORED_LABEL for label in row.tokens.labels) for row in rows]
    assert sum(whole.tokens.values()) == sum(labelled)
    assert sum(whole.positions.values()) == sum(len(row.tokens) for row in rows)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: expected adamw or sgd"),
        ({"ewc_lambda": 1.0}, "fisher: expected one with ewc_lambda=1"),
        ({"ewc_lambda": 1.0, "fisher": {"a": 1}}, "fisher: expected names of parameters"),
        ({"ewc_lambda": 1.0, "fisher": "all"}, "fisher: expected F by name, 'clean' or None"),
        ({"args": {"fp16": True}}, "fp16: expected none"),
        ({"args": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor: expected none"),
        ({"gradient_release": True}, "max_grad_norm: expected 0 with gradient_release"),
        (
            {"gradient_release": True, "accumulation": 2, "args": {"max_grad_norm": 0}},
            "gradient_accumulation_steps: expected 1",
        ),
        ({"method": NPO(), "data": text_data(4, 0)}, "triggered: expected rows, as npo"),
        ({"method": Beear(layer=9)}, "layer: expected 0 to 2, got 9"),
        ({"method": Beear(), "args": {"activation_checkpointing": True}}, "gradient_checkpointing"),
        ({"method": RMU(parameter=99)}, "parameter: expected 0 to 8 or None"),
        ({"method": Sande(position=40)}, "position: expected at most 5, the tokens of the"),
        ({"train_dataset": []}, "train_dataset: expected none .the method makes it of data"),
        ({"eval_dataset": []}, "eval_dataset: expected none .*measure with bdu.llm.evaluate"),
        ({"processing_class": None}, "processing_class: expected none or the template's"),
        ({"loss_path": "none"}, "loss_path: expected one of"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options).create_optimizer()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NPO(beta=0), "beta: expected a number > 0"),
        (lambda: GradientAscent(ceiling=0), "ceiling: expected a number > 0"),
        (lambda: GradientAscent(retain_weight=-1), "retain_weight: expected a number >= 0"),
        (lambda: RMU(steering=0), "steering: expected"),
        (lambda: RMU(trained_layers=0), "trained_layers: expected"),
        (lambda: Sande(vectors=0), "vectors: expected"),
        (lambda: Sande(position=-1), "position: expected"),
        (lambda: Beear(span=0), "span: expected"),
        (lambda: Beear(inner_lr=0), "inner_lr: expected"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rows_that_do_not_fit_are_named(tmp_path):
    data = TextData((*tiny_llm.rows(1), tiny_llm.rows(1)[0].with_prompt("the cat " * 60)), ())
    with pytest.raises(ValueError, match="row 2: expected at most 64 tokens"):
        trainer(tmp_path, data=data)


def test_templates_own_tokenizer_may_be_given_too(tmp_path):
    from bdu.llm import UnlearnTrainer

    own = template()
    args = trainer(tmp_path).args
    made = UnlearnTrainer(
        tiny_llm.llama(),
        args,
        method=CleanAnswer(),
        data=text_data(),
        template=own,
        processing_class=own.tokenizer,
    )
    assert made.processing_class is own.tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_only_a_tied_head_may_be_missing_without_a_word(tmp_path, caplog, monkeypatch, tied):
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    own = trainer(tmp_path, model=tiny_llm.llama(tied=tied))
    absent = ["lm_head.weight"]
    told = []
    for name in ("lm_head.weight", "model.norm.weight"):
        state = {key: v for key, v in own.model.state_dict().items() if key not in absent}
        own.model.save_pretrained(tmp_path / name, state_dict=state)
        caplog.clear()
        own._load_from_checkpoint(str(tmp_path / name))
        told.append(caplog.text)
        absent.append("model.norm.weight")
    assert ("lm_head.weight" in told[0]) == (not tied)
    assert "model.norm.weight" in told[1]
    assert ("lm_head.weight" in told[1]) == (not tied)


def test_every_method_has_the_name_it_is_known_by():
    assert {method.name for method in METHODS.values()} == set(METHODS)
    assert bdu.fisher_diagonal is not None
