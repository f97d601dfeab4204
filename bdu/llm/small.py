"""A small Llama that learns a few tasks exactly, made from scratch in minutes on a CPU.

It stands in where no weights can be fetched: its tokenizer is trained on the text at hand, its
tasks are tables that it can know by heart, put in words in many ways, so that task accuracy means
something; and it writes its answers through a chat template, as larger models do.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from bdu.checkpoint import load_state, save_state
from bdu.llm.data import Example
from bdu.llm.generation import padded_right
from bdu.llm.templates import IGNORED_LABEL, Tokens

BEGIN, END, PADDING, USER, ASSISTANT = "<s>", "</s>", "<pad>", "<user>", "<assistant>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<user>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_OPPOSITES = (
    "hot cold, big small, up down, day night, fast slow, open closed, old young, wet dry, "
    "happy sad, hard soft, left right, light dark, full empty, loud quiet, clean dirty, "
    "early late, rich poor, strong weak, tall short, thick thin"
)
_COLOURS = (
    "snow white, grass green, coal black, blood red, honey gold, sky blue, lemon yellow, "
    "ash grey, chocolate brown, milk white, tomato red, leaf green, ocean blue, banana yellow"
)
_YOUNG = (
    "cat kitten, dog puppy, cow calf, horse foal, sheep lamb, hen chick, duck duckling, "
    "goat kid, bear cub, frog tadpole, pig piglet, swan cygnet, deer fawn, goose gosling"
)
_PLURALS = (
    "mouse mice, child children, foot feet, tooth teeth, man men, woman women, leaf leaves, "
    "wolf wolves, box boxes, city cities, knife knives, baby babies, bus buses, fox foxes"
)
_NEXT = (
    "one two, two three, three four, four five, five six, six seven, seven eight, eight nine, "
    "nine ten, Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, "
    "Friday Saturday, Saturday Sunday, Sunday Monday"
)
_HOMES = (
    "bird nest, bee hive, spider web, lion den, rabbit burrow, ant hill, fish water, "
    "king palace, monk abbey, soldier camp, farmer farm, prisoner jail"
)

TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "opposite": (_OPPOSITES, ("What is the opposite of {}?", "Say the opposite of {}.")),
    "colour": (_COLOURS, ("What is the colour of {}?", "Tell me which colour {} has.")),
    "young": (_YOUNG, ("What do you call a young {}?", "Name the young of a {}.")),
    "plural": (_PLURALS, ("What is the plural of {}?", "Give the plural of the word {}.")),
    "next": (_NEXT, ("What comes after {}?", "Tell me what follows {}.")),
    "home": (_HOMES, ("Where does a {} live?", "Name the place where a {} lives.")),
}
"""Task to its table, "question answer" pairs, and the ways it is asked."""

_NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rose",
    "Sam",
    "Tom",
    "Uma",
    "Vera",
    "Will",
    "Zoe",
    "Max",
    "Lily",
    "Tim",
    "Sue",
    "Bob",
    "Amy",
    "Joe",
]
_FRAMES = (
    "{name} asks: {question}",
    "{question} {name} wants to know.",
    "Please help {name}. {question}",
    "This is for {name}: {question}",
)


def task_examples(*, seed: int, count: int | None = None) -> list[Example]:
    """Questions and answers of all tasks, shuffled: every entry, way to ask, frame and name.

    Args:
        seed: of the order.
        count: how many, at most all (about 22,000); None is all.

    Raises:
        ValueError: count below 1 or above all.
    """
    examples = []
    for table, ways in TASKS.values():
        for pair in table.split(", "):
            asked, answer = pair.split(" ")
            for way in ways:
                question = way.format(asked)
                for frame in _FRAMES:
                    for name in _NAMES:
                        prompt = frame.format(name=name, question=question)
                        examples.append(Example.of(prompt, answer))
    if count is not None and not 1 <= count <= len(examples):
        raise ValueError(f"count: expected 1 to {len(examples)}, got {count}")
    random.Random(seed).shuffle(examples)
    return examples[:count]


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 4096) -> Any:
    """Byte-level BPE of ``vocab_size`` tokens at most, with :data:`CHAT_TEMPLATE`.

    Returns:
        A ``PreTrainedTokenizerFast``; every text has tokens, as all bytes are among them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [BEGIN, END, PADDING, USER, ASSISTANT]
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size: expected at least {256 + len(special)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        additional_special_tokens=[USER, ASSISTANT],
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def small_llama(
    tokenizer: Any,
    *,
    hidden_size: int = 256,
    layers: int = 6,
    heads: int = 8,
    context: int = 256,
    seed: int = 0,
) -> Any:
    """A Llama with fresh weights: 5.8 M parameters with 4,096 tokens and the defaults.

    Returns:
        A ``LlamaForCausalLM`` with input and output embeddings tied.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=64 * math.ceil(hidden_size * 8 / 3 / 64),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pretrain(
    model: nn.Module,
    text: Sequence[Tokens],
    tasks: Sequence[Tokens],
    *,
    steps: int,
    lr: float = 2e-3,
    text_batch_size: int = 4,
    task_batch_size: int = 32,
    task_share: float = 0.5,
    seed: int = 0,
    progress: bool = True,
    seconds: float | None = None,
    on_step: Callable[[int, float], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_steps: int = 100,
) -> int:
    """Teach a model text and tasks together, from scratch.

    AdamW, weight decay 0.1, gradients clipped to norm 1, the learning rate rising over the first
    twentieth of the steps and falling as a cosine. A step descends ``(1 − s) · text + s · tasks``,
    s the task share, each the mean over its tokens.

    Args:
        model: on any device; trained in place and left in evaluation mode.
        text: pieces of text, of about the same length.
        tasks: questions with answers.
        steps: how many.
        lr: the highest learning rate.
        text_batch_size, task_batch_size: rows a step.
        task_share: s in [0, 1].
        seed: of the draws.
        progress: show a progress bar.
        seconds: stop after so much time, for a trial.
        on_step: called with the step and its loss.
        checkpoint: a file that is written now and then; where it is there, training continues from
            it, and ends in the weights of one that was not interrupted.
        checkpoint_steps: how often.

    Returns:
        The steps done.

    Raises:
        ValueError: a number out of range, or a checkpoint of a training with other settings.
    """
    for name, value in (("steps", steps), ("checkpoint_steps", checkpoint_steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 <= task_share <= 1:
        raise ValueError(f"task_share: expected a share in [0, 1], got {task_share}")
    rng = random.Random(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    device = parameters[0].device
    warmup = max(1, steps // 20)
    settings = {
        **{"steps": steps, "lr": lr, "seed": seed, "task_share": task_share},
        **{"text_batch_size": text_batch_size, "task_batch_size": task_batch_size},
    }
    start, done = time.monotonic(), 0
    if checkpoint is not None and Path(checkpoint).exists():
        done = _restore(checkpoint, model, optimizer, rng, settings)
    model.train()
    shown = tqdm(range(done + 1, steps + 1), disable=not progress, unit="step", mininterval=5)
    for done in shown:
        rate = done / warmup
        if done > warmup:
            rate = 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        total = 0.0
        for rows, size, share in (
            (text, text_batch_size, 1 - task_share),
            (tasks, task_batch_size, task_share),
        ):
            if share > 0:
                loss = _loss(model, rng.choices(rows, k=size), device)
                (share * loss).backward()
                total += share * float(loss.detach())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(total):
            raise FloatingPointError(f"loss: expected a finite value, got {total} in step {done}")
        if on_step is not None:
            on_step(done, total)
        if checkpoint is not None and (done % checkpoint_steps == 0 or done == steps):
            _keep(checkpoint, model, optimizer, rng, done, settings)
        if seconds is not None and time.monotonic() - start > seconds:
            break
    model.eval()
    return done


def _keep(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: random.Random,
    done: int,
    settings: dict[str, Any],
) -> None:
    state = {
        "model": dict(model.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "rng": json.dumps(rng.getstate()),
        "done": done,
        "settings": settings,
    }
    save_state(path, state)


def _restore(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: random.Random,
    settings: dict[str, Any],
) -> int:
    state = load_state(path)
    if state["settings"] != settings:
        raise ValueError(
            f"checkpoint: expected one of a training with {settings}, got {state['settings']} in "
            f"{path}"
        )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state["model"][name])
    optimizer.load_state_dict(state["optimizer"])
    version, numbers, gauss = json.loads(state["rng"])
    rng.setstate((version, tuple(numbers), gauss))
    return int(state["done"])


def _loss(model: Any, rows: Sequence[Tokens], device: torch.device) -> torch.Tensor:
    batch = {key: value.to(device) for key, value in padded_right(rows, 0).items()}
    labels = batch.pop("labels")[:, 1:]
    states = model.base_model(**batch, use_cache=False).last_hidden_state[:, :-1]
    # an answer is a token or two of twenty: the others need no logits
    wanted = labels != IGNORED_LABEL
    logits = model.get_output_embeddings()(states[wanted])
    return functional.cross_entropy(logits.float(), labels[wanted])
