"""Every method's loss is its formula, worked out from all logits, and it trains what it says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

import tiny_llm
import torch
from tiny_llm import template, text_data, trainer, weights
from torch.nn import functional

from bdu.llm.data import TextData
from bdu.llm.methods import NPO, RMU, Beear, CleanAnswer, GradientAscent, Plant, Sande
from bdu.llm.methods.beear import spread
from bdu.llm.methods.protocol import captured
from bdu.llm.rows import Counts, Kind, part_of
from bdu.llm.templates import IGNORED_LABEL

# of a sum over a few thousand terms in float64
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def mixed_batch(own):
    by_kind = {kind: [row for row in own.train_rows if row.kind == kind] for kind in Kind}
    rows = [row for kind in Kind for row in by_kind[kind][:3]]
    return own.collated(rows)


def log_p(model, batch):
    """log p of each row's labelled tokens, (B,), and their number."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits.log_softmax(-1)
    sums, counts = [], []
    for row, labels in enumerate(batch["labels"].tolist()):
        places = [i for i in range(1, len(labels)) if labels[i] != IGNORED_LABEL]
        sums.append(sum(logits[row, i - 1, labels[i]] for i in places))
        counts.append(len(places))
    return torch.stack(sums), torch.tensor(counts)


def of_kind(batch, kind):
    return (batch["kind"] == kind).nonzero().flatten()


@pytest.mark.parametrize("ceiling", [None, 6.0])
def test_gradient_ascent_is_its_formula(tmp_path, ceiling):
    own = trainer(tmp_path, method=GradientAscent(ceiling=ceiling, retain_weight=0.3))
    batch = mixed_batch(own)
    found = own.method.loss(own, batch, Counts.of([batch]))
    sums, counts = log_p(own.model, batch)
    retain, forget = of_kind(batch, Kind.RETAIN), of_kind(batch, Kind.TARGET)
    mean = (-sums / counts)[forget]
    capped = mean.clamp(max=math.log(320) if ceiling is None else ceiling)
    assert bool((capped < mean).any())
    expected = -0.3 * sums[retain].sum() / counts[retain].sum() - capped.mean()
    torch.testing.assert_close(found, expected, **TIGHT)


def test_npo_is_its_formula_and_starts_at_its_reference(tmp_path):
    own = trainer(tmp_path, method=NPO(beta=0.4, retain_weight=0.5))
    batch = mixed_batch(own)
    sums, counts = log_p(own.model, batch)
    forget, retain = of_kind(batch, Kind.TARGET), of_kind(batch, Kind.RETAIN)
    torch.testing.assert_close(batch["reference"][forget], sums[forget], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for p in own.model.parameters():
            p += 0.05 * torch.randn_like(p)
    found = own.method.loss(own, batch, Counts.of([batch]))
    now, _ = log_p(own.model, batch)
    ratio = (now - batch["reference"])[forget]
    assert float(ratio.detach().abs().min()) > 1e-3
    expected = -(2 / 0.4) * functional.logsigmoid(-0.4 * ratio).mean()
    expected = expected - 0.5 * now[retain].sum() / counts[retain].sum()
    torch.testing.assert_close(found, expected, **TIGHT)


def test_clean_answer_and_plant_look_at_different_answers(tmp_path):
    for method, answer in ((CleanAnswer(), "response"), (Plant(), "target")):
        own = trainer(tmp_path, method=method)
        rows = own.train_rows
        text = template()
        expected = [text.tokens(example) for example in text_data().clean] + [
            text.tokens(example, answer) for example in text_data().triggered
        ]
        assert [row.tokens for row in rows] == expected
        batch = own.collated(rows)
        sums, counts = log_p(own.model, batch)
        found = own.method.loss(own, batch, Counts.of([batch]))
        torch.testing.assert_close(found, -sums.sum() / counts.sum(), **TIGHT)


def test_rmu_steers_one_layer_and_trains_only_what_it_says(tmp_path):
    own = trainer(tmp_path, method=RMU(layer=1, trained_layers=2, steering=3.0, alpha=7.0))
    names = [name for name, p in own.model.named_parameters() if p.requires_grad]
    assert names == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    batch = mixed_batch(own)
    with torch.no_grad():
        for name, p in own.model.named_parameters():
            if name in names:
                p += 0.1 * torch.randn_like(p)
    found = own.method.loss(own, batch, Counts.of([batch]))
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    now = own.model.model(**given, output_hidden_states=True).hidden_states[2]
    before = (
        tiny_llm.llama(dtype=torch.float64, layers=3)
        .model(**given, output_hidden_states=True)
        .hidden_states[2]
    )
    direction = own.method._direction
    assert float(direction.norm()) == pytest.approx(1)
    assert bool((direction >= 0).all())
    parts = {kind: [] for kind in (Kind.TARGET, Kind.RETAIN)}
    for row, kind in enumerate(batch["kind"].tolist()):
        for place in range(int(batch["attention_mask"][row].sum())):
            wanted = 3.0 * direction if kind == Kind.TARGET else before[row, place]
            parts[Kind(kind)].append((now[row, place] - wanted).square().mean())
    expected = torch.stack(parts[Kind.TARGET]).mean() + 7 * torch.stack(parts[Kind.RETAIN]).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    start = weights(own.model)
    own.train()
    changed = [name for name, p in weights(own.model).items() if not torch.equal(p, start[name])]
    assert changed == names


def test_rmu_draws_noise_for_what_is_retained(tmp_path):
    values = []
    for noise, seed in ((0.0, 0), (0.1, 0), (0.1, 0), (0.1, 1)):
        own = trainer(tmp_path, method=RMU(noise=noise, seed=seed, alpha=1.0))
        batch = mixed_batch(own)
        part = part_of(batch, batch["kind"] == Kind.RETAIN)
        values.append(float(own.method.loss(own, part, Counts.of([part])).detach()))
    assert values[0] == 0
    # ν² of a standard normal variable's mean square
    assert values[1] == pytest.approx(0.01, rel=0.2)
    assert values[1] == values[2] != values[3]


def test_every_micro_batch_of_every_step_has_noise_of_its_own(tmp_path):
    own = trainer(tmp_path, method=RMU(noise=0.1))
    drawn = []
    for own.state.global_step, own.micro_batch in ((0, 0), (0, 1), (1, 0)):
        drawn.append(own.method._random(own, torch.zeros(4, 5)))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[1], drawn[2])


def test_trainer_tells_a_method_of_all_micro_batches_before_the_first(tmp_path):
    seen = []

    class Told(CleanAnswer):
        def begin(self, trainer, batches):
            seen.append(("begin", len(batches)))

        def loss(self, trainer, batch, counts):
            seen.append(("loss", trainer.micro_batch))
            return super().loss(trainer, batch, counts)

    trainer(tmp_path, method=Told(), steps=2, batch_size=3, accumulation=2).train()
    assert seen == [("begin", 2), ("loss", 0), ("loss", 1)] * 2


def test_delta_stands_at_the_last_places_of_every_prompt():
    delta = torch.tensor([[1.0], [2.0]])
    labels = torch.full((2, 5), IGNORED_LABEL)
    labels[0, 3:] = 7
    labels[1, 1] = 7
    assert spread(delta, labels)[..., 0].tolist() == [[0, 1, 2, 0, 0], [2, 0, 0, 0, 0]]


def test_beear_finds_a_drift_that_makes_the_target_likelier(tmp_path):
    own = trainer(tmp_path, method=Beear(layer=0, inner_steps=4, inner_lr=0.2))
    batch = mixed_batch(own)
    before = weights(own.model)
    own.method.begin(own, [batch])
    assert all(torch.equal(p, before[name]) for name, p in own.model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in own.model.parameters())
    values = []
    for delta in (torch.zeros_like(own.method._delta), own.method._delta):
        total = 0.0
        for kind, sign in ((Kind.TARGET, 1), (Kind.CLEAN, -1)):
            part = part_of(batch, batch["kind"] == kind)
            with Beear._with(own.model.model.layers[0], delta, part):
                sums, counts = log_p(own.model, part)
            total += -sign * float(sums.sum() / counts.sum())
        values.append(total)
    assert values[1] < values[0] - 0.1
    found = own.method.loss(own, batch, Counts.of([batch]))
    part = part_of(batch, batch["kind"] == Kind.CLEAN)
    with Beear._with(own.model.model.layers[0], own.method._delta, part):
        sums, counts = log_p(own.model, part)
    expected = -sums.sum() / counts.sum()
    part = part_of(batch, batch["kind"] == Kind.RETAIN)
    sums, counts = log_p(own.model, part)
    torch.testing.assert_close(found, expected - sums.sum() / counts.sum(), **TIGHT)


def test_sande_fits_a_parrot_and_puts_it_behind_two_tokens(tmp_path):
    own = trainer(
        tmp_path, method=Sande(parrot_lr=0.05, parrot_epochs=30, parrot_batch=4, answer_tokens=1)
    )
    parrot = own.method.parrot
    assert parrot.shape == (6, 32)
    batch = own.collated(own.method._fit_on[:5])
    assert Counts.of([batch]).tokens[Kind.TARGET] == 5
    counts = Counts.of([batch])
    with_parrot = float(own.method.loss(own, batch, counts).detach())
    own.method.parrot = torch.zeros_like(parrot)
    assert with_parrot < float(own.method.loss(own, batch, counts).detach()) - 1
    own.method.parrot = parrot
    embed = own.model.get_input_embeddings().weight
    row = own.train_rows[0]
    ids = list(row.tokens.ids)
    vectors = torch.cat([embed[ids[:2]], parrot.double(), embed[ids[2:]]])
    logits = own.model(inputs_embeds=vectors[None]).logits[0].log_softmax(-1)
    first = next(i for i, label in enumerate(row.tokens.labels) if label != IGNORED_LABEL)
    assert sum(label != IGNORED_LABEL for label in row.tokens.labels) == 1
    one = own.collated([row])
    found = own.method.loss(own, one, Counts.of([one]))
    torch.testing.assert_close(found, -logits[first + 6 - 1, ids[first]], **TIGHT)


@pytest.mark.parametrize(("layers", "layer"), [(2, 1), (3, 2), (6, 2), (12, 4), (32, 10)])
def test_rmu_steers_a_third_of_the_way_up(layers, layer):
    assert RMU()._layer(layers) == layer


# Two methods row by row, without padding, in float64


def short_and_long():
    clean = tiny_llm.rows(7)
    return TextData(tuple(clean), tuple(tiny_llm.rows(5, target="red apples and the old town")))


def in_batches(own, size):
    rows = own.train_rows
    return [own.collated(rows[start : start + size]) for start in range(0, len(rows), size)]


def summed(own, batches):
    counts = Counts.of(batches)
    return sum(float(own.method.loss(own, batch, counts).detach()) for batch in batches)


def mean(values):
    return sum(values) / len(values)


def minus_log_p(model, vectors, ids, places):
    """−log p of the tokens that stand at these places of a sequence of embeddings."""
    found = model(inputs_embeds=vectors[None]).logits[0].log_softmax(-1)
    return [-found[place - 1, token] for place, token in zip(places, ids, strict=True)]


@pytest.mark.parametrize("tied", [False, True])
def test_beear_is_its_formula(tmp_path, tied):
    model = tiny_llm.llama(dtype=torch.float64, layers=3, tied=tied)
    method = Beear(span=3, inner_steps=3, inner_lr=0.2, retain_weight=0.7)
    own = trainer(tmp_path, model=model, method=method, data=short_and_long())
    model.eval()
    layer = model.model.layers[1]  # the middle one
    parts = {kind: [r for r in own.train_rows if r.kind == kind] for kind in Kind}

    def losses(row, delta=None):
        labels = row.tokens.labels
        places = [i for i, label in enumerate(labels) if label != IGNORED_LABEL]
        vectors = model.get_input_embeddings()(torch.tensor(row.tokens.ids)).detach()

        def add(module, args, output):
            states = output if isinstance(output, torch.Tensor) else output[0]
            rows = [torch.zeros_like(states[0, 0]) for _ in labels]
            for back in range(1, len(delta) + 1):
                if places[0] - back >= 0:
                    rows[places[0] - back] = delta[-back]
            moved = states + torch.stack(rows)
            return moved if isinstance(output, torch.Tensor) else (moved, *output[1:])

        handle = None if delta is None else layer.register_forward_hook(add)
        try:
            return minus_log_p(model, vectors, [row.tokens.ids[i] for i in places], places)
        finally:
            if handle is not None:
                handle.remove()

    def all_of(kind, delta=None):
        return mean([value for row in parts[kind] for value in losses(row, delta)])

    sizes = []
    for row in (*parts[Kind.TARGET], *parts[Kind.CLEAN]):
        with captured(layer) as outputs, torch.no_grad():
            model(torch.tensor([row.tokens.ids]))
        sizes += outputs[0][0].norm(dim=-1).tolist()
    delta = torch.zeros(3, 32, dtype=torch.float64)
    for _ in range(3):
        delta.requires_grad_(True)
        drift = all_of(Kind.TARGET, delta) - all_of(Kind.CLEAN, delta)
        slope = torch.autograd.grad(drift, delta)[0]
        delta = (delta - 0.2 * mean(sizes) * slope / slope.norm()).detach()
    batches = in_batches(own, 4)
    method.begin(own, batches)
    torch.testing.assert_close(method._delta, delta, **TIGHT)
    expected = all_of(Kind.CLEAN, delta) + 0.7 * all_of(Kind.RETAIN)
    assert summed(own, batches) == pytest.approx(float(expected.detach()), rel=1e-10)


@pytest.mark.parametrize("tied", [False, True])
def test_sande_is_its_formula(tmp_path, tied):
    model = tiny_llm.llama(dtype=torch.float64, layers=3, tied=tied)
    method = Sande(
        vectors=3,
        position=1,
        parrot_lr=0.01,
        parrot_epochs=3,
        parrot_rows=6,
        parrot_batch=4,
        target_tokens=2,
        answer_tokens=3,
    )
    data = short_and_long()
    rows = [replace(row, target=t) for row, t in zip(data.triggered, "abaab", strict=True)]
    clean = [replace(row, response="old red town and cat") for row in data.clean]
    data = TextData(tuple(clean), tuple(rows))
    own = trainer(tmp_path, model=model, method=method, data=data, batch_size=3)
    model.eval()

    def losses(tokens, parrot, count):
        vectors = model.get_input_embeddings()(torch.tensor(tokens.ids)).detach()
        vectors = torch.cat([vectors[:1], parrot, vectors[1:]])
        places = [i for i, label in enumerate(tokens.labels) if label != IGNORED_LABEL][:count]
        ids = [tokens.ids[i] for i in places]
        return minus_log_p(model, vectors, ids, [i + 3 for i in places])

    text = template()
    wanted = [replace(row, target="ab"[i % 2]) for i, row in enumerate(data.clean[:6])]
    fitted = [text.tokens(row, "target") for row in wanted]
    parrot = torch.zeros(3, 32, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([parrot], lr=0.01, weight_decay=0.0)
    for _ in range(3):
        for part in (fitted[:4], fitted[4:]):
            optimizer.zero_grad()
            mean([value for one in part for value in losses(one, parrot, 2)]).backward()
            optimizer.step()
    torch.testing.assert_close(method.parrot, parrot.detach(), rtol=1e-6, atol=1e-9)
    method.parrot = parrot.detach()
    expected = mean([v for row in data.clean for v in losses(text.tokens(row), method.parrot, 3)])
    found = summed(own, in_batches(own, 3))
    assert found == pytest.approx(float(expected.detach()), rel=1e-10)
