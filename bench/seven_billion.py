"""Full-parameter EWC-SGD steps on a Llama of 7 B parameters with random weights, in bfloat16.

    python bench/seven_billion.py --json seven_billion.json

F in 8 bits, the anchor in bfloat16, gradients released as they arrive, activations checkpointed.
Random weights do for memory and time. Prints the plan made beforehand and the peak that was held.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import bdu
from bdu.checkpoint import atomic_write
from bdu.optim import EWCSGD, release_gradients


def main() -> None:
    """Run the steps and print what they took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=options.width * 43 // 16,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 128),
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable()
    model.train()
    plan = bdu.memory_plan(
        model, optimizer="sgd", fisher_dtype="8bit", anchor_dtype=torch.bfloat16,
        release_gradients=True,
    )  # fmt: skip
    print(plan)

    class OneByOne(dict):  # F of each parameter, made when it is asked for
        def get(self, name, default=None):
            param = dict(model.named_parameters())[name]
            return torch.rand_like(param)

    names = [name for name, _ in model.named_parameters()]
    fisher = OneByOne.fromkeys(names)
    optimizer = EWCSGD(
        model.named_parameters(),
        lr=1e-4,
        ewc_lambda=1.0,
        fisher=fisher,
        fisher_dtype="8bit",
        anchor_dtype=torch.bfloat16,
        stochastic_rounding=0,
    )
    tokens = torch.randint(0, config.vocab_size, (1, options.tokens), device=options.device)
    seconds, losses = [], []
    with release_gradients(model, optimizer):
        for _ in range(options.steps):
            start = time.perf_counter()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            seconds.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in model.parameters())
    row = {
        "parameters": parameters,
        "losses": losses,
        "seconds": seconds,
        "penalty": float(optimizer.penalty),
        "planned_bytes": plan.total_bytes,
    }
    if options.device == "cuda":
        row["device"] = torch.cuda.get_device_name()
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(row))
    if options.json is not None:
        atomic_write(options.json, json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
