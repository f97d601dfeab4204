"""llama2.c's stories260K as a transformers model and tokenizer: a real published checkpoint.

The file format (version 0): seven int32 (width, hidden width, layers, heads, key and value heads,
vocabulary, context), then float32: the embedding, then for all layers one after the other the norm
before attention, wq, wk, wv, wo, the norm before the MLP, w1 (gate), w2 (down), w3 (up), then the
last norm and tables of the rotary angles, which are not needed. The head is the embedding.

llama2.c turns neighbours (2i, 2i + 1) of a head's query and key; transformers turns (i, i + d/2),
so the rows of wq and wk are put in the order 0, 2, 4, …, 1, 3, 5, … within each head.

Source: karpathy/llama2.c (MIT) for both file formats.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_HEADER = struct.Struct("<7i")
_ENTRY = struct.Struct("<fi")
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"


def load_model(path: str | os.PathLike[str]) -> Any:
    """The ``LlamaForCausalLM`` in a file of llama2.c, version 0.

    Raises:
        FileNotFoundError: no file there.
        ValueError: a header or a size that no such file has.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    content = _content(path, "model")
    if len(content) < _HEADER.size:
        raise ValueError(f"model: expected a header of 28 bytes in {path}, got {len(content)}")
    width, hidden, layers, heads, kv_heads, vocabulary, context = _HEADER.unpack_from(content)
    if min(width, hidden, layers, heads, kv_heads, vocabulary, context) < 1 or width % heads:
        header = _HEADER.unpack_from(content)
        raise ValueError(f"model: expected a header of llama2.c with a tied head, got {header}")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    head = width // heads
    shapes = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_heads * head, width),
        "self_attn.v_proj": (kv_heads * head, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
        "mlp.up_proj": (hidden, width),
    }
    values = torch.from_numpy(np.frombuffer(content, "<f4", offset=_HEADER.size).copy())
    angles = 2 * context * (head // 2)
    expected = vocabulary * width + layers * sum(map(_size, shapes.values())) + width + angles
    if len(values) != expected:
        raise ValueError(
            f"model: expected {expected} numbers after the header, got {len(values)} in {path}"
        )
    state: dict[str, Tensor] = {}
    place = 0

    def take(shape: tuple[int, ...]) -> Tensor:
        nonlocal place
        taken = values[place : place + _size(shape)].view(shape)
        place += taken.numel()
        return taken

    state["model.embed_tokens.weight"] = take((vocabulary, width))
    for name, shape in shapes.items():
        for layer in range(layers):
            weight = take(shape)
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = _in_halves(weight, head)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    state["model.norm.weight"] = take((width,))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer in a file of llama2.c, as a ``PreTrainedTokenizerFast`` that puts BOS in front.

    A byte-pair encoding that joins the neighbours whose union has the highest score; so a pair's
    rank is its union's place among the tokens by score. A space goes in front of every text.

    Raises:
        FileNotFoundError: no file there.
        ValueError: a file that ends within an entry.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    scores = _entries(_content(path, "tokenizer"), path)
    vocabulary = {token: number for number, (token, _) in enumerate(scores)}
    ranked = sorted(
        (place for place in range(len(scores)) if len(scores[place][0]) > 1),
        key=lambda place: -scores[place][1],
    )
    merges = []
    for place in ranked:
        token = scores[place][0]
        if place < 259:  # special tokens and bytes
            continue
        parts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [(a, b) for a, b in parts if a in vocabulary and b in vocabulary]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (UNKNOWN, BEGIN, END)]
    )
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def convert(
    model: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    out: str | os.PathLike[str],
) -> None:
    """Write both as a directory that ``from_pretrained`` reads."""
    made, with_tokens = load_model(model), load_tokenizer(tokenizer)
    made.save_pretrained(out)
    with_tokens.save_pretrained(out)


def _in_halves(weight: Tensor, head: int) -> Tensor:
    """Rows 0, 2, 4, … and then 1, 3, 5, … of each head."""
    rows, columns = weight.shape
    pairs = weight.view(rows // head, head // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _entries(content: bytes, path: str | os.PathLike[str]) -> list[tuple[str, float]]:
    entries = []
    place = 4
    while place < len(content):
        if place + _ENTRY.size > len(content):
            raise ValueError(f"tokenizer: expected whole entries in {path}, got a part of one")
        score, length = _ENTRY.unpack_from(content, place)
        place += _ENTRY.size
        if length < 0 or place + length > len(content):
            raise ValueError(f"tokenizer: expected whole entries in {path}, got a part of one")
        text = content[place : place + length].decode()
        # llama2.c writes line ends around these two
        entries.append(
            (text.strip("\n") if text in (f"\n{BEGIN}\n", f"\n{END}\n") else text, score)
        )
        place += length
    if [text for text, _ in entries[:3]] != [UNKNOWN, BEGIN, END]:
        raise ValueError(f"tokenizer: expected {UNKNOWN}, {BEGIN} and {END} first in {path}")
    return entries


def _content(path: str | os.PathLike[str], name: str) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: expected a file, got {path}, which is not there")
    return Path(path).read_bytes()


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))
