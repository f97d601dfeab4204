"""What training a language model will hold at its peak, activations included, before it starts.

::

    peak = state − G + max(G, A + W + [accumulation > 1] · G)

with G the gradients, state what :func:`bdu.memory_plan` counts (G among it), A the activations
that one micro-batch keeps for its backward pass, and W what the loss over the vocabulary works in.
As the activations go, the gradients come: of a step without accumulation the larger of the two
counts. A is found by a forward pass on the "meta" device, which allocates nothing: what autograd
saves is summed up, storage by storage. Attention is taken as fused, as scaled dot product attention
runs it on CPUs and GPUs; eager attention holds T² values a head more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from bdu.llm.losses import SMALLEST_CHUNK, inner_model
from bdu.memory import MemoryPlan


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes of a run; ``str()`` of it is a table.

    Attributes:
        state: what stays from step to step, and gradients.
        activations: A.
        work: W.
        accumulates: whether gradients are there in the forward pass already.
    """

    state: MemoryPlan
    activations: int
    work: int
    accumulates: bool

    @property
    def peak_bytes(self) -> int:
        """The most that is held at one time."""
        gradients = self.state.gradients
        forward = self.activations + self.work + (gradients if self.accumulates else 0)
        return self.state.total_bytes - gradients + max(gradients, forward)

    def __str__(self) -> str:
        rows = (
            ("activations", self.activations),
            ("loss", self.work),
            ("peak", self.peak_bytes),
        )
        table = str(self.state).rsplit("; activations", 1)[0]
        lines = [f"{name:<12}{count / 1e9:>10.3f}{count:>20,}" for name, count in rows]
        return "\n".join([table, "", *lines, "", self.explained()])

    def explained(self) -> str:
        """What is held together at the peak, in words."""
        state, forward = self.state, self.activations + self.work
        names = ("parameters", "buffers", "fisher", "anchor", "moments", "copies")
        stays = ", ".join(name for name in names if getattr(state, name))
        start = f"at the peak {(state.total_bytes - state.gradients) / 1e9:.3f} GB stay ({stays}); "
        if self.accumulates:
            return (
                f"{start}with them {state.gradients / 1e9:.3f} GB of gradients of the "
                f"micro-batches before, and {forward / 1e9:.3f} GB of activations and loss"
            )
        if forward >= state.gradients:
            return (
                f"{start}with them {forward / 1e9:.3f} GB of activations and loss, at the end of "
                "the forward pass: as they go, the gradients come"
            )
        return (
            f"{start}with them {state.gradients / 1e9:.3f} GB of gradients, at the end of the "
            "backward pass: the activations have gone by then"
        )

    def beside(self, free: int | None, where: str) -> str:
        """How the peak compares with the memory that is free there, in words."""
        if free is None:
            return f"how much memory is free on {where} cannot be told"
        left = free - self.peak_bytes
        said = f"fits, and leaves {left / 1e9:.3f} GB" if left >= 0 else "does not fit"
        return f"{free / 1e9:.3f} GB are free on {where}: the run {said}"


def activation_bytes(
    model: Any, *, rows: int, length: int, gradient_checkpointing: bool = False, bf16: bool = False
) -> int:
    """A of a batch of ``rows`` sequences of ``length`` tokens.

    Args:
        model: on the "meta" device, with or without LoRA; its mode is put back.
        gradient_checkpointing: then the inputs of all layers, and what one layer keeps and its
            backward pass makes.
        bf16: computed in bfloat16 under autocast: activations of half the size, and a copy of the
            weights; an estimate, since autocast leaves some of it in float32.
    """
    inner = inner_model(model)
    # transformers asks tensors of masks for their values, unless they are fake ones
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(t) for t in (*inner.parameters(), *inner.buffers())]
    own = {id(t.untyped_storage()) for t in fakes}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage  # held, so that no other gets its number
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    was_training = inner.training
    inner.train()
    try:
        with mode, hooks, _fused_attention():
            ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
            states = inner.base_model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).last_hidden_state
    finally:
        inner.train(was_training)
    total = sum(storage.nbytes() for storage in kept.values())
    config = inner.config.get_text_config()
    if gradient_checkpointing:
        layers, size = config.num_hidden_layers, states.numel() * states.itemsize
        wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        # two slopes of the widest values are there while the first layer is run again and undone
        total = layers * size + math.ceil(total / layers + 2 * size * wide / config.hidden_size)
    if bf16 and states.itemsize > 2:
        total = total // 2 + 2 * sum(p.numel() for p in inner.parameters() if p.dim() > 1)
    return total


def loss_bytes(model: Any, *, labels: int, full: bool = False) -> int:
    """W: chunks of logits and their slopes, in float32.

    Args:
        labels: labelled tokens in a micro-batch.
        full: with all logits at once.
    """
    config = inner_model(model).config.get_text_config()
    vocabulary, width = config.vocab_size, config.hidden_size
    rows = max(SMALLEST_CHUNK, math.ceil(labels * width / vocabulary))
    rows = labels if full else min(labels, rows)
    return 2 * rows * vocabulary * torch.float32.itemsize


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the "meta" device scaled dot product attention would take the way that keeps T² values."""

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key = key.repeat_interleave(groups, -3)
            value = value.repeat_interleave(groups, -3)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    with mock.patch.object(functional, "scaled_dot_product_attention", fused):
        yield
