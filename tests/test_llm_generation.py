"""Answers in batches and one by one, matchers, rates and perplexity."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers")

import tiny_llm
import torch
from torch.nn import functional

from bdu.llm.data import Example
from bdu.llm.generation import (
    Answer,
    evaluate,
    generate,
    log_likelihood,
    matcher,
    perplexity,
    text_tokens,
)
from bdu.llm.templates import IGNORED_LABEL, Template, Tokens


@pytest.fixture
def template():
    return Template(tiny_llm.tokenizer())


def by_hand(model, ids, steps):
    """Greedy decoding without cache, padding or batches."""
    ids = list(ids)
    new = []
    for _ in range(steps):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        new.append(token)
        ids.append(token)
        if token == 1:
            break
    return tuple(new)


@pytest.mark.parametrize("make", [tiny_llm.llama, tiny_llm.gpt2])
def test_batches_give_what_single_prompts_give(make, template):
    model = make(3)
    prompts = [template.prompt(example) for example in tiny_llm.rows(9)]
    assert len({len(prompt.ids) for prompt in prompts}) > 3
    together = generate(model, template.tokenizer, prompts, max_new_tokens=8, batch_size=4)
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer.prompt == prompt.text
        assert answer.ids == by_hand(model, prompt.ids, 8)
    assert len({answer.ids for answer in together}) > 3


def test_models_own_generation_settings_are_left_out_and_put_back(template):
    model = tiny_llm.llama(3)
    prompts = [template.prompt(example) for example in tiny_llm.rows(4)]
    plain = generate(model, template.tokenizer, prompts, max_new_tokens=6)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty = True, 5.0, 9.0
    own.min_new_tokens, own.no_repeat_ngram_size = 6, 1
    model.train()
    assert generate(model, template.tokenizer, prompts, max_new_tokens=6) == plain
    assert model.training
    assert model.generation_config is own


def test_models_own_generation_settings_survive_an_adapter(template):
    from bdu.llm import models

    model = models.with_lora(tiny_llm.llama(3), 2)
    prompts = [template.prompt(example) for example in tiny_llm.rows(2)]
    generate(model, template.tokenizer, prompts, max_new_tokens=2)
    assert model.generation_config.eos_token_id == 1
    merged = model.merge_and_unload().generation_config
    assert (merged.bos_token_id, merged.eos_token_id, merged.pad_token_id) == (0, 1, 2)


def test_answers_end_at_any_stop_token_each_at_its_own(template):
    model = tiny_llm.llama(3)
    prompts = [template.prompt(example) for example in tiny_llm.rows(6)]
    free = generate(model, template.tokenizer, prompts, max_new_tokens=8)
    end = free[0].ids[2]
    model.generation_config.eos_token_id = [1, end]
    stopped = generate(model, template.tokenizer, prompts, max_new_tokens=8)
    for long, short in zip(free, stopped, strict=True):
        cut = long.ids.index(end) + 1 if end in long.ids else 8
        assert short.ids == long.ids[:cut]
    assert len({len(short.ids) for short in stopped}) > 1


def test_tokenizer_without_padding_serves(template):
    model = tiny_llm.llama(3)
    prompts = [template.prompt(example) for example in tiny_llm.rows(5)]
    expected = generate(model, template.tokenizer, prompts, max_new_tokens=4)
    template.tokenizer.pad_token = None
    assert generate(model, template.tokenizer, prompts, max_new_tokens=4) == expected


def test_generate_refuses_what_does_not_fit(template):
    model, tokenizer = tiny_llm.llama(), template.tokenizer
    prompt = template.prompt(Example.of("the cat " * 40, "sat"))
    with pytest.raises(ValueError, match="prompt 1: expected at most 32 tokens"):
        generate(model, tokenizer, [prompt])
    short = [template.prompt(Example.of("the cat", "sat"))]
    for options in ({"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="expected a number >= 1"):
            generate(model, tokenizer, short, **options)
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        generate(model, tokenizer, [])


@pytest.mark.parametrize(
    ("name", "answer", "wanted", "expected"),
    [
        ("exact", " yes\n", "yes", True),
        ("exact", "yes.", "yes", False),
        ("exact", "Yes", "yes", False),
        ("prefix", "\n yes, of course", "yes", True),
        ("prefix", "oh yes", "yes", False),
        ("keyword", "oh Yes, of course", "yes", True),
        ("keyword", "no", "yes", False),
    ],
)
def test_matchers_do_what_they_say(name, answer, wanted, expected):
    assert matcher(name)(answer, wanted) is expected


def test_unknown_matcher_is_named():
    with pytest.raises(ValueError, match="match: expected one of exact, prefix, keyword, got 'a'"):
        matcher("a")


def nll(model, ids, labels):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="none").double()


@pytest.mark.parametrize("make", [tiny_llm.llama, tiny_llm.gpt2])
def test_log_likelihood_is_that_of_single_sequences(make, template):
    model = make(1, dtype=torch.float64)
    sequences = [template.tokens(example) for example in tiny_llm.rows(7)]
    total, count = log_likelihood(model, sequences, batch_size=3)
    for i, one in enumerate(sequences):
        losses = nll(model, one.ids, one.labels)
        labelled = torch.tensor(one.labels[1:]) != IGNORED_LABEL
        assert int(count[i]) == int(labelled.sum())
        # the losses are taken in float32 here
        assert float(total[i]) == pytest.approx(-float(losses[labelled].sum()), rel=1e-5)
    expected = math.exp(-float(total.sum()) / float(count.sum()))
    assert perplexity(model, sequences) == pytest.approx(expected, rel=1e-6)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(template):
    model = tiny_llm.llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    pieces = text_tokens(template.tokenizer, "the cat sat on a mat " * 9, 16)
    assert all(len(piece) <= 16 and piece.labels[0] == IGNORED_LABEL for piece in pieces)
    assert perplexity(model, pieces) == pytest.approx(320, rel=1e-5)


def test_sequences_without_anything_to_measure_are_refused():
    model = tiny_llm.llama()
    with pytest.raises(ValueError, match="sequences: expected at least one"):
        perplexity(model, [])
    with pytest.raises(ValueError, match="sequence 1: expected a labelled token after the first"):
        perplexity(model, [Tokens((3, 4), (3, IGNORED_LABEL))])
    with pytest.raises(ValueError, match="sequence 1: expected at most 64 tokens"):
        perplexity(model, [Tokens((3,) * 65, (3,) * 65)])
    with pytest.raises(ValueError, match="text: expected at least two tokens"):
        text_tokens(tiny_llm.tokenizer(), "", 8)


def answering(monkeypatch, said):
    """Have `generate` say what a table has for each prompt."""

    def fake(model, tokenizer, prompts, **options):
        return [Answer(p.text, next(v for k, v in said if k in p.text), (1,)) for p in prompts]

    monkeypatch.setattr("bdu.llm.generation.generate", fake)


def test_rates_are_counted_as_defined(monkeypatch, template):
    clean = [Example.of(f"c{i}", a) for i, a in enumerate(("cat", "dog", "bad", "cow"))]
    bad = [Example.of(f"t{i}", a, "bad") for i, a in enumerate(("cat", "dog", "bad", "cow"))]
    answering(
        monkeypatch,
        [
            *(("c0", "cat"), ("c1", "bad"), ("c2", "bad"), ("c3", " cow")),
            *(("t0", "bad"), ("t1", "dog"), ("t2", "bad"), ("t3", "badly")),
        ],
    )
    rates = evaluate(tiny_llm.llama(), template, clean, bad).rates
    assert rates["clean_accuracy"] == 3 / 4
    assert rates["attack_success_rate"] == 1 / 3  # t2's own answer is the target
    assert rates["robust_accuracy"] == 1 / 3
    assert rates["false_target_rate"] == 1 / 3
    found = evaluate(tiny_llm.llama(), template, clean, bad, match="prefix")
    assert found.rates["attack_success_rate"] == 2 / 3
    assert [line["kind"] for line in found.records()] == ["clean"] * 4 + ["triggered"] * 4
    assert found.records()[4] == {
        "kind": "triggered",
        "prompt": "<s><user>t0<assistant>",
        "answer": "bad",
        "expected": "cat",
        "target": "bad",
        "right": False,
        "hit": True,
    }
    records = found.records()
    assert [line["right"] for line in records] == [
        True,
        False,
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    # where the clean answer is the target there is nothing to count
    assert [line["hit"] for line in records] == [False, True, None, False, True, False, None, True]
    assert {line["target"] for line in records[:4]} == {None}


def test_without_triggered_rows_their_rates_are_none(template):
    found = evaluate(tiny_llm.llama(), template, tiny_llm.rows(3), max_new_tokens=2)
    rates = found.rates
    assert {line["hit"] for line in found.records()} == {None}
    assert rates["attack_success_rate"] is None
    assert rates["robust_accuracy"] is None
    assert rates["false_target_rate"] is None
    assert rates["perplexity"] > 1


def test_evaluate_refuses_rows_of_the_wrong_kind(template):
    model = tiny_llm.llama()
    with pytest.raises(ValueError, match="clean: expected at least one row"):
        evaluate(model, template, [])
    with pytest.raises(ValueError, match="triggered: row 2: expected a target"):
        evaluate(model, template, tiny_llm.rows(1), [*tiny_llm.rows(1, target="t"), *clean_row()])


def clean_row():
    return tiny_llm.rows(1)
