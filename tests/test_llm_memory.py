"""The peak that is planned is the peak that is held."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("transformers")

import tiny_llm
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from bdu.llm import models, run
from bdu.llm.memory import TrainingPlan, activation_bytes
from bdu.llm.methods import CleanAnswer
from bdu.llm.run import Settings
from bdu.memory import MemoryPlan

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CONFIG = LlamaConfig(
    vocab_size=320,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=2,
)


def held(action):
    """Bytes that torch holds at most during an action, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"batch_size": 2},
        {"accumulation": 3},
        {"gradient_checkpointing": True},
        {"lora": 2, "batch_size": 8},
        {"ewc_lambda": 1.0, "batch_size": 4},
        {"optimizer": "sgd"},
    ],
    ids=str,
)
def test_planned_peak_is_held_within_a_tenth(tmp_path, changed):
    s = Settings(**{"batch_size": 16, "ewc_lambda": 0.0, **changed})
    template = tiny_llm.template()
    # of one length: a plan is for the longest
    (row,) = tiny_llm.rows(1)
    row = row.with_prompt(row.prompt * 10)
    data = tiny_llm.TextData((row,) * (s.batch_size * s.accumulation), ())
    planned = run.training_plan(CONFIG, CleanAnswer(), s, [template.tokens(row)])
    torch.manual_seed(0)
    model = models.empty_model(CONFIG).to_empty(device="cpu")
    model.init_weights()
    if s.lora:
        model = models.with_lora(model, s.lora)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def train():
        tiny_llm.trainer(
            tmp_path,
            model=model,
            data=data,
            batch_size=s.batch_size,
            accumulation=s.accumulation,
            args={"activation_checkpointing": s.gradient_checkpointing},
            optimizer=s.optimizer,
            optimizer_options={"momentum": 0.9} if s.optimizer == "sgd" else {},
            ewc_lambda=s.ewc_lambda,
            fisher={n: torch.ones_like(p) for n, p in trained} if s.ewc_lambda else None,
        ).train()

    before = planned.state.parameters + planned.state.buffers
    assert held(train) == pytest.approx(planned.peak_bytes - before, rel=0.1)


def test_a_plan_allocates_nothing():
    model = models.empty_model(CONFIG)
    assert held(lambda: activation_bytes(model, rows=64, length=128)) < 1e5
    whole = activation_bytes(model, rows=64, length=128)
    assert whole == pytest.approx(2 * activation_bytes(model, rows=32, length=128), rel=0.01)
    again = activation_bytes(model, rows=64, length=128, gradient_checkpointing=True)
    assert again < whole / 2
    half = activation_bytes(model, rows=64, length=128, bf16=True)
    assert half == pytest.approx(whole / 2, rel=0.1)


@pytest.mark.parametrize(
    ("activations", "accumulates", "expected"),
    [
        (50, False, "0.050 GB of activations and loss, at the end of the forward pass"),
        (10, False, "0.020 GB of gradients, at the end of the backward pass"),
        (50, True, "0.020 GB of gradients of the micro-batches before, and 0.050 GB of"),
    ],
)
def test_the_peak_is_told_by_what_it_is_made_of(activations, accumulates, expected):
    million = 10**6
    state = MemoryPlan(20 * million, 0, 20 * million, 0, 0, 40 * million, 0, 5 * million, 0)
    made = TrainingPlan(state, activations * million, 0, accumulates)
    assert f"0.060 GB stay (parameters, moments); with them {expected}" in str(made)
    together = [float(n) for n in re.findall(r"([\d.]+) GB", made.explained())]
    assert sum(together) == pytest.approx(made.peak_bytes / 1e9)
    free = made.peak_bytes + 5 * million
    assert made.beside(free, "cuda:0").endswith("on cuda:0: the run fits, and leaves 0.005 GB")
    assert made.beside(made.peak_bytes - 1, "cpu").endswith("does not fit")
    assert "cannot be told" in made.beside(None, "cpu")
