"""How far a Fisher in 8 bits is off, on the Fishers of two published models.

    python bench/small_state.py --data DATA --markdown TABLE.md

DATA holds models/nad_wrn16-1_clean_teacher.pth.tar (a WRN-16-1, bboylyg/NAD) with a lossless
subset of CIFAR-10, and models/stories260K.bin with tok512.bin (a Llama of 260,000 parameters that
tells stories, karpathy/tinyllamas) with llm/tinystories_2MiB.txt.gz. F is exact and of single
samples (bdu.fisher_diagonal); the drift that the penalty ½ Σ F d² is taken at is that of a few
steps of SGD. Every tensor is stored in 8 bits here, however small, so that there is something to
see; the optimizers keep those under 4,096 elements as they are.

Columns: the median relative error of an entry, the share of entries that become 0, the relative
error of the penalty, and bytes an entry.
"""

from __future__ import annotations

import argparse
import gzip
import struct
import subprocess
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bdu import models
from bdu.checkpoint import atomic_write, load_into
from bdu.fisher import fisher_diagonal
from bdu.quantization import dequantize, quantize

Loss = Callable[[nn.Module], Tensor]
Measured = tuple[nn.Module, dict[str, Tensor], Loss]


def wide_resnet(data: Path, images: Path, samples: int) -> Measured:
    """The network, its Fisher, and the loss to drift on."""
    model = models.build("wrn16-1").eval()
    load_into(model, data / "models" / "nad_wrn16-1_clean_teacher.pth.tar")
    with np.load(images) as archive:
        x = torch.from_numpy(archive["train_x"][:samples]).permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(archive["train_y"][:samples].astype(np.int64))
    fisher = fisher_diagonal(model, (x, y))
    return model, fisher, lambda model: nn.functional.cross_entropy(model(x[:256]), y[:256])


def story_teller(data: Path, samples: int) -> Measured:
    """Likewise of the Llama, on sequences of 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = (data / "models" / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack("7i", raw[:28])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    values = torch.from_numpy(np.frombuffer(raw, np.float32, offset=28).copy())
    place = 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        count = int(np.prod(shape))
        place += count
        return values[place - count : place].view(shape)

    def halves(weight: Tensor, heads: int) -> Tensor:
        # Rotated pairs lie side by side there, and half a head apart in transformers.
        rows = weight.view(heads, -1, 2, dim).transpose(1, 2)
        return rows.reshape(weight.shape)

    size = dim // heads
    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    parts = [
        ("input_layernorm", (dim,), None),
        ("self_attn.q_proj", (heads * size, dim), heads),
        ("self_attn.k_proj", (kv_heads * size, dim), kv_heads),
        ("self_attn.v_proj", (kv_heads * size, dim), None),
        ("self_attn.o_proj", (dim, heads * size), None),
        ("post_attention_layernorm", (dim,), None),
        ("mlp.gate_proj", (hidden, dim), None),
        ("mlp.down_proj", (dim, hidden), None),
        ("mlp.up_proj", (hidden, dim), None),
    ]
    for part, shape, rotated in parts:
        for layer, weight in enumerate(take(layers, *shape)):
            own = weight if rotated is None else halves(weight, rotated)
            state[f"model.layers.{layer}.{part}.weight"] = own
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)

    with gzip.open(data / "llm" / "tinystories_2MiB.txt.gz", "rt", encoding="utf-8") as stories:
        text = stories.read(samples * 200)
    tokens = encode(text, data / "models" / "tok512.bin")
    windows = torch.tensor(tokens[: len(tokens) // 65 * 65]).view(-1, 65)[:samples]
    x, y = windows[:, :-1], windows[:, 1:]
    loss = nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
    assert loss < 2.2, f"the model tells no stories: {loss:.2f} nats a token"
    fisher = fisher_diagonal(model, ({"input_ids": x}, y), batch_size=16)
    return (
        model,
        fisher,
        lambda model: nn.functional.cross_entropy(
            model(x[:32]).logits.flatten(0, 1), y[:32].flatten()
        ),
    )


def encode(text: str, tokenizer: Path) -> list[int]:
    """Byte pairs merged best score first, as llama2.c does, word by word."""
    raw = tokenizer.read_bytes()
    place, scores, ids = 4, [], {}
    while place < len(raw):
        score, length = struct.unpack_from("fi", raw, place)
        ids.setdefault(raw[place + 8 : place + 8 + length].decode("utf-8", "replace"), len(scores))
        scores.append(score)
        place += 8 + length
    tokens: list[int] = []
    for word in text.replace("\n", " ").split(" "):
        pieces = [c for c in " " + word if c in ids]
        while True:
            pairs = [
                (scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in ids
            ]
            if not pairs:
                break
            _, i = max(pairs)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        tokens += [ids[piece] for piece in pieces]
    return tokens


def drift(model: nn.Module, loss: Loss, lr: float, steps: int) -> dict[str, Tensor]:
    """θ − θ* after some steps of SGD."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return {name: p.detach() - start[name] for name, p in model.named_parameters()}


def row(
    name: str, stored: str, fisher: dict[str, Tensor], drifted: dict[str, Tensor],
    store: Callable[[Tensor], Tensor], size: float,
) -> str:  # fmt: skip
    """One line of the table."""
    errors, lost, total, exact, approximate = [], 0, 0, 0.0, 0.0
    for key, value in fisher.items():
        back = store(value)
        positive = value > 0
        errors.append(((back - value).abs() / value)[positive])
        lost += int(((back == 0) & positive).sum())
        total += int(positive.sum())
        exact += float((value.double() * drifted[key].double().square()).sum())
        approximate += float((back.double() * drifted[key].double().square()).sum())
    median = float(torch.cat(errors).median())
    return (
        f"| {name} | {stored} | {100 * median:.2f} | {100 * lost / total:.3f} "
        f"| {100 * abs(approximate / exact - 1):.4f} | {size:.2f} |"
    )


def main() -> None:
    """Measure both models and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="npz with train_x and train_y")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    lines = [
        f"F of {options.samples} samples; commit {commit}; {date.today().isoformat()}; "
        f"torch {torch.__version__}. Percent, but for the bytes.",
        "",
        "| model | F stored as | median error | entries lost | penalty error | bytes |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, made, lr in (
        ("WRN-16-1", wide_resnet(options.data, options.images, options.samples), 1e-3),
        ("Llama, 260 k", story_teller(options.data, options.samples), 1e-2),
    ):
        model, fisher, loss = made
        drifted = drift(model, loss, lr, steps=20)
        ways: list[tuple[str, Callable[[Tensor], Tensor], float]] = [
            ("8bit", lambda f: dequantize(*quantize(f, "square_root")), 1 + 2 / 32),
            ("8bit_logarithmic", lambda f: dequantize(*quantize(f, "logarithmic")), 1 + 2 / 32),
            ("bfloat16", lambda f: f.bfloat16().float(), 2.0),
            ("float16", lambda f: f.half().float(), 2.0),
        ]
        lines += [row(name, stored, fisher, drifted, store, size) for stored, store, size in ways]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.markdown is not None:
        atomic_write(options.markdown, text)


if __name__ == "__main__":
    main()
