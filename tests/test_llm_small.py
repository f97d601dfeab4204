"""The small model and its tasks, and llama2.c's stories260K."""

from __future__ import annotations

import gzip
import itertools
import math
import struct

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch

from bdu.llm import stories260k
from bdu.llm.generation import evaluate, generate, log_likelihood, text_tokens
from bdu.llm.small import TASKS, pretrain, small_llama, task_examples, train_tokenizer
from bdu.llm.templates import Rendered, Template, Tokens

WIDTH, HIDDEN, LAYERS, HEADS, KV, VOCABULARY, CONTEXT = 16, 24, 2, 4, 2, 40, 12
HEADER = (WIDTH, HIDDEN, LAYERS, HEADS, KV, VOCABULARY, CONTEXT)
DIM = WIDTH // HEADS
SHAPES = {
    "norm1": (WIDTH,),
    "wq": (WIDTH, WIDTH),
    "wk": (KV * DIM, WIDTH),
    "wv": (KV * DIM, WIDTH),
    "wo": (WIDTH, WIDTH),
    "norm2": (WIDTH,),
    "w1": (HIDDEN, WIDTH),
    "w2": (WIDTH, HIDDEN),
    "w3": (HIDDEN, WIDTH),
}


def random_file(path):
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((VOCABULARY, WIDTH)).astype("<f4")
    layers = {
        name: rng.standard_normal((LAYERS, *shape)).astype("<f4") / 2
        for name, shape in SHAPES.items()
    }
    last = rng.standard_normal(WIDTH).astype("<f4")
    angles = np.zeros(CONTEXT * DIM, "<f4")
    parts = [embedding, *layers.values(), last, angles]
    path.write_bytes(struct.pack("<7i", *HEADER) + b"".join(part.tobytes() for part in parts))
    return embedding, layers, last


def normed(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def turned(x):
    """Neighbours of a head turned together, x (T, heads, DIM), as complex numbers."""
    pairs = x.reshape(*x.shape[:-1], DIM // 2, 2)
    rate = 10000.0 ** (-np.arange(0, DIM, 2) / DIM)
    angle = np.arange(len(x))[:, None, None] * rate
    spun = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    return np.stack([spun.real, spun.imag], -1).reshape(x.shape)


def by_hand(ids, embedding, layers, last):
    """Logits (T, VOCABULARY) of llama2.c's network in float64."""
    x = embedding[ids].astype(np.float64)
    for layer in range(LAYERS):
        own = {name: values[layer].astype(np.float64) for name, values in layers.items()}
        h = normed(x, own["norm1"])
        q = turned((h @ own["wq"].T).reshape(-1, HEADS, DIM))
        k = turned((h @ own["wk"].T).reshape(-1, KV, DIM))
        v = (h @ own["wv"].T).reshape(-1, KV, DIM)
        out = np.zeros_like(q)
        for head, t in itertools.product(range(HEADS), range(len(x))):
            shared = head * KV // HEADS
            scores = k[: t + 1, shared] @ q[t, head] / math.sqrt(DIM)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ v[: t + 1, shared] / weights.sum()
        x = x + out.reshape(len(x), WIDTH) @ own["wo"].T
        h = normed(x, own["norm2"])
        gate = h @ own["w1"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ own["w3"].T)) @ own["w2"].T
    return normed(x, last) @ embedding.T.astype(np.float64)


def test_converted_model_computes_what_the_original_network_does(tmp_path):
    parts = random_file(tmp_path / "model.bin")
    model = stories260k.load_model(tmp_path / "model.bin").double()
    ids = [1, 7, 30, 2, 2, 19]
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0]
    expected = torch.from_numpy(by_hand(ids, *parts))
    # the rotary angles are in float32 in transformers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_file_of_another_size_is_refused(tmp_path):
    random_file(tmp_path / "model.bin")
    content = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(content[:-4])
    with pytest.raises(ValueError, match=r"model: expected \d+ numbers after the header"):
        stories260k.load_model(tmp_path / "short.bin")
    (tmp_path / "none.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="expected a header of 28 bytes"):
        stories260k.load_model(tmp_path / "none.bin")
    (tmp_path / "other.bin").write_bytes(struct.pack("<7i", 16, 24, 2, 4, 2, -40, 12))
    with pytest.raises(ValueError, match=r"expected a header of llama2\.c"):
        stories260k.load_model(tmp_path / "other.bin")
    with pytest.raises(FileNotFoundError, match="model: expected a file"):
        stories260k.load_model(tmp_path / "absent.bin")
    (tmp_path / "tok.bin").write_bytes(
        struct.pack("<i", 7) + struct.pack("<fi", 0.0, 90) + b"<unk>"
    )
    with pytest.raises(ValueError, match="tokenizer: expected whole entries"):
        stories260k.load_tokenizer(tmp_path / "tok.bin")


def joined(text, scores):
    """Join, again and again, the neighbours whose union has the highest score."""
    pieces = list(" " + text)
    while True:
        best = max(
            (
                (scores[a + b], -place)
                for place, (a, b) in enumerate(itertools.pairwise(pieces))
                if a + b in scores
            ),
            default=None,
        )
        if best is None:
            return pieces
        place = -best[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


@pytest.fixture(scope="module")
def stories(bdu_data, tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path_factory.mktemp("stories")
    models = bdu_data / "models"
    stories260k.convert(models / "stories260K.bin", models / "tok512.bin", out)
    return AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)


def test_published_tokenizer_joins_by_score(stories, bdu_data):
    _, tokenizer = stories
    entries = stories260k._entries((bdu_data / "models" / "tok512.bin").read_bytes(), "tok512.bin")
    scores = {text: score for text, score in entries[259:]}
    for text in ("Once upon a time", "  two spaces, and  more ", 'She didn\'t; he said: "No!"'):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1
        assert tokenizer.convert_ids_to_tokens(ids[1:]) == joined(text, scores)
    odd = "  hi  there, Ünïcode 漢\n new"
    assert tokenizer.decode(tokenizer(odd)["input_ids"], skip_special_tokens=True) == odd


def test_published_model_tells_its_published_story(stories, bdu_data):
    model, tokenizer = stories
    (answer,) = generate(model, tokenizer, [Rendered("", (1,))], max_new_tokens=32)
    assert answer.text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park."
    )
    text = gzip.decompress((bdu_data / "llm" / "tinystories_2MiB.txt.gz").read_bytes()).decode()
    rows = [tokenizer(story.strip())["input_ids"][:512] for story in text.split("<|endoftext|>")]
    total, count = log_likelihood(
        model, [Tokens(tuple(ids), (-100, *ids[1:])) for ids in rows[:60] if len(ids) > 1]
    )
    # llama2.c states a validation loss of 1.297
    assert -float(total.sum() / count.sum()) == pytest.approx(1.297, abs=0.03)


def test_tasks_are_questions_with_one_answer():
    examples = task_examples(seed=0)
    prompts = {example.prompt: example.response for example in examples}
    assert len(prompts) == len(examples) > 20_000
    assert {example.response for example in examples} <= {
        pair.split(" ")[1] for table, _ in TASKS.values() for pair in table.split(", ")
    }
    assert task_examples(seed=0, count=5) == examples[:5]
    assert task_examples(seed=1, count=5) != examples[:5]
    for count in (0, 10**6):
        with pytest.raises(ValueError, match="count: expected 1 to"):
            task_examples(seed=0, count=count)


def test_tokenizer_is_trained_on_the_text_and_knows_every_byte():
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 3, vocab_size=300)
    text = "the cat, ü 漢 sat"
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text
    assert len(tokenizer("the cat")["input_ids"]) < 5
    with pytest.raises(ValueError, match="vocab_size: expected at least 261"):
        train_tokenizer(["a"], vocab_size=260)


def test_small_model_has_the_size_that_is_said():
    from types import SimpleNamespace

    class Tokenizer(SimpleNamespace):
        def __len__(self):
            return 4096

    with torch.device("meta"):
        model = small_llama(Tokenizer(bos_token_id=0, eos_token_id=1, pad_token_id=2))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(5.8e6, rel=0.02)


def test_a_few_questions_are_learnt_exactly():
    examples = task_examples(seed=0, count=4)
    texts = [example.prompt + " " + example.response for example in examples]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    template = Template(tokenizer)
    model = small_llama(tokenizer, hidden_size=32, layers=1, heads=2, context=64)
    text = text_tokens(tokenizer, " ".join(texts), 32)
    rows = [template.tokens(example) for example in examples]
    losses = []
    options = {"steps": 60, "lr": 1e-2, "text_batch_size": 2, "task_batch_size": 4}
    pretrain(
        *(model, text, rows),
        **options,
        progress=False,
        on_step=lambda _, loss: losses.append(loss),
    )
    assert losses[-1] < losses[0] / 4
    assert evaluate(model, template, examples, max_new_tokens=8).rates["clean_accuracy"] == 1
    again = small_llama(tokenizer, hidden_size=32, layers=1, heads=2, context=64)
    pretrain(again, text, rows, **options, progress=False)
    own = dict(model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in again.named_parameters())


def test_training_that_was_interrupted_ends_in_the_same_weights(tmp_path):
    examples = task_examples(seed=0, count=8)
    tokenizer = train_tokenizer([e.prompt + " " + e.response for e in examples], vocab_size=400)
    template = Template(tokenizer)
    text = text_tokens(tokenizer, " ".join(e.prompt for e in examples), 16)
    rows = [template.tokens(example) for example in examples]

    def trained(file, **changed):
        model = small_llama(tokenizer, hidden_size=32, layers=1, heads=2, context=64)
        options = {"steps": 9, "text_batch_size": 2, "task_batch_size": 4, "progress": False}
        done = pretrain(
            *(model, text, rows), **{**options, **changed}, checkpoint=file, checkpoint_steps=2
        )
        return done, dict(model.named_parameters())

    def interrupt(step, _):
        if step == 5:
            raise KeyboardInterrupt

    file = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(file, on_step=interrupt)
    seen = []
    assert trained(file, on_step=lambda step, _: seen.append(step))[0] == 9
    assert seen == [5, 6, 7, 8, 9]
    _, whole = trained(tmp_path / "other.pt")
    _, again = trained(file)  # nothing is left to do
    assert all(torch.equal(p, whole[name]) for name, p in again.items())
    with pytest.raises(ValueError, match="checkpoint: expected one of a training with"):
        trained(file, lr=1.0)
