"""−log p of the labelled tokens, without the logits of all of them at once.

For hidden states h (N, D) and the output embedding W (V, D)::

    ℓ_n = logsumexp_v(W h_n + b)_v − (W h_n + b)_{y_n}

is taken over a few rows of h at a time, and their logits are computed anew in the backward pass:
the largest tensor beside W's gradient has about N · D elements instead of N · V, and tokens without
a label take part in nothing. A step costs one more product with W than with all logits kept.

As in Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989), whose fused kernel is used where it is
installed and a plain sum is wanted. Ours returns each token's loss, which capped and weighted
losses need, so it cannot take the gradient in the forward pass as that one does.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bdu.llm.templates import IGNORED_LABEL
from bdu.models import modes_kept

LossPath = Literal["auto", "liger", "chunked", "full"]
SMALLEST_CHUNK = 64


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """ℓ of every row; see the module's docstring.

    Args:
        hidden: h (N, D).
        weight: W (V, D), in h's dtype.
        labels: y (N,), in [0, V).
        bias: b (V,), or None.
        chunk: rows at a time; None: as many as make N · D logits, and at least 64.

    Returns:
        (N,), float64 for float64 and else float32, in which the softmax is taken too.
    """
    if chunk is None:
        chunk = max(SMALLEST_CHUNK, math.ceil(hidden.numel() / max(1, len(weight))))
    values: Tensor = _TokenLosses.apply(hidden, weight, bias, labels, chunk)
    return values


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int
    ) -> Tensor:
        wide = _wide(hidden)
        sums = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        losses = torch.empty_like(sums)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = functional.linear(hidden[rows], weight, bias).to(wide)
            sums[rows] = logits.logsumexp(1)
            losses[rows] = sums[rows] - logits.gather(1, labels[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, labels, sums)
        ctx.chunk = chunk
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, sums = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide = _wide(hidden)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # a bfloat16 sum over chunks would lose the small ones
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = functional.linear(hidden[rows], weight, bias).to(wide)
            softmax = logits.sub_(sums[rows, None]).exp_()
            softmax.scatter_add_(1, labels[rows, None], -torch.ones_like(softmax[:, :1]))
            softmax.mul_(grad[rows, None])
            if grad_bias is not None:
                grad_bias += softmax.sum(0)
            slope = softmax.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[rows])
            if grad_weight is not None and slope.dtype == wide:
                grad_weight.addmm_(slope.T, hidden[rows])
            elif grad_weight is not None:
                grad_weight += torch.mm(slope.T, hidden[rows])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def head_losses(
    head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, *, chunk: int
) -> Tensor:
    """The same for any head, such as one with LoRA in it: its chunks are run anew in the backward
    pass."""
    losses = []
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        losses.append(
            checkpoint(_chunk_losses, head, hidden[rows], labels[rows], use_reentrant=False)
        )
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=_wide(hidden))


def _chunk_losses(head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    return functional.cross_entropy(logits.to(_wide(logits)), labels, reduction="none")


@dataclass(frozen=True)
class Losses:
    """Of the labelled tokens of a batch.

    Attributes:
        values: ℓ, (M,).
        rows: the row of the batch that each belongs to, (M,).
        size: rows of the batch.
    """

    values: Tensor
    rows: Tensor
    size: int

    def sums(self) -> Tensor:
        """Σ ℓ of each row, (B,): −log p of its answer."""
        return self.values.new_zeros(self.size).index_add(0, self.rows, self.values)

    def counts(self) -> Tensor:
        """Labelled tokens of each row, (B,), in the dtype of ℓ."""
        return self.values.new_zeros(self.size).index_add(
            0, self.rows, torch.ones_like(self.values.detach())
        )


class VocabularyLoss:
    """The losses of a causal language model, by the cheapest way that fits it.

    ==========  ==================================================================================
    "chunked"   :func:`token_losses`, or :func:`head_losses` where the head is no plain linear layer
    "liger"     Liger-Kernel's fused loss where a plain sum is wanted, else "chunked"
    "full"      all logits: for models that do something to them after the head
    "auto"      "full" where the model's logits are not those of its head (which is tried out),
                else "liger" on CUDA where it is installed, else "chunked"
    ==========  ==================================================================================

    Args:
        model: of transformers, or a PEFT model around one.
        path: see above.
        chunk: rows at a time, for tests; None: see :func:`token_losses`.

    Raises:
        ValueError: another path, one that does not fit the model, or a model without an output
            embedding.
        ImportError: "liger", and it is not installed.
    """

    def __init__(self, model: Any, path: LossPath = "auto", *, chunk: int | None = None) -> None:
        if path not in get_args(LossPath):
            raise ValueError(
                f"loss_path: expected one of {', '.join(get_args(LossPath))}, got {path!r}"
            )
        self.inner = inner_model(model)
        self.decoder: Any = self.inner.base_model
        self.head: Any = self.inner.get_output_embeddings()
        self.chunk = chunk
        if self.head is None or self.decoder is self.inner:
            raise ValueError(
                f"model: expected one with a head over the vocabulary, got {type(model).__name__}"
            )
        has_liger = importlib.util.find_spec("liger_kernel") is not None
        if path == "liger" and not has_liger:
            raise ImportError("loss_path: liger needs Liger-Kernel: pip install liger-kernel")
        head_is_all = path == "full" or self._head_gives_the_logits()
        if path == "auto":
            on_cuda = next(self.inner.parameters()).is_cuda
            fused: LossPath = "liger" if has_liger and on_cuda and self._is_plain else "chunked"
            path = fused if head_is_all else "full"
        elif not head_is_all or (path == "liger" and not self._is_plain):
            raise ValueError(
                f"loss_path: expected full, as {type(self.inner).__name__} changes the logits of "
                f"its head, or the head is no plain linear layer, got {path}"
            )
        self.path: LossPath = path

    @property
    def _is_plain(self) -> bool:
        return type(self.head) is nn.Linear

    def hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """Last hidden states (B, T, D) of ``input_ids`` or ``inputs_embeds``, and a mask."""
        given = {key: value for key, value in inputs.items() if key in _INPUTS}
        states: Tensor = self.decoder(**given, use_cache=False).last_hidden_state
        return states

    def total(self, inputs: Mapping[str, Any]) -> Tensor:
        """Σ ℓ over all labelled tokens, 0-dim."""
        if self.path != "liger":
            return self.tokens(inputs).values.sum()
        from liger_kernel.transformers import (  # type: ignore[import-not-found,unused-ignore]
            LigerFusedLinearCrossEntropyLoss,
        )

        hidden, labels, _ = self._labelled(self.hidden(inputs), inputs["labels"])
        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        total: Tensor = fused(self.head.weight, hidden, labels, self.head.bias)
        return total

    def tokens(self, inputs: Mapping[str, Any]) -> Losses:
        """ℓ of every labelled token.

        Args:
            inputs: ``input_ids`` or ``inputs_embeds``, ``attention_mask``, and ``labels`` (B, T)
                that stand below their own tokens, -100 where there is none; each is predicted from
                the tokens before it, and the first of a row from none, so it is left out.
        """
        labels = inputs["labels"]
        if self.path == "full":
            given = {key: value for key, value in inputs.items() if key in _INPUTS}
            states = self.inner(**given, use_cache=False).logits
        else:
            states = self.hidden(inputs)
        picked, wanted, rows = self._labelled(states, labels)
        if self.path == "full":
            values = functional.cross_entropy(picked.to(_wide(picked)), wanted, reduction="none")
        elif self._is_plain:
            weight, bias = self._cast(picked, self.head.weight, self.head.bias)
            picked = picked.to(weight.dtype)
            with torch.autocast(picked.device.type, enabled=False):
                values = token_losses(picked, weight, wanted, bias, chunk=self.chunk)
        else:
            least = math.ceil(picked.numel() / self.inner.config.get_text_config().vocab_size)
            size = self.chunk or max(SMALLEST_CHUNK, least)
            values = head_losses(self.head, picked, wanted, chunk=size)
        return Losses(values, rows, len(labels))

    @staticmethod
    def _labelled(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states that predict a labelled token, (M, ·), its label and its row, (M,)."""
        rows, places = torch.nonzero(labels[:, 1:] != IGNORED_LABEL, as_tuple=True)
        return states[rows, places], labels[rows, places + 1], rows

    @staticmethod
    def _cast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if dtype is None or weight.dtype == torch.float64:
            return weight, bias
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    @torch.no_grad()
    def _head_gives_the_logits(self) -> bool:
        device = next(self.inner.parameters()).device
        ids = torch.tensor([[0, 1, 2]], device=device)
        with modes_kept(self.inner):
            self.inner.eval()
            whole = self.inner(input_ids=ids, use_cache=False).logits
            own = self.head(self.decoder(input_ids=ids, use_cache=False).last_hidden_state)
        return own.shape == whole.shape and bool(torch.allclose(own, whole, rtol=1e-3, atol=1e-3))


_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


def inner_model(model: Any) -> Any:
    """The transformers model within a PEFT model of the kind that changes modules, or the model.

    Raises:
        ValueError: PEFT that prepends prompts.
    """
    if not hasattr(model, "peft_config"):
        return model
    adapter = model.active_adapter
    config = model.peft_config[adapter if isinstance(adapter, str) else adapter[0]]
    if config.is_prompt_learning:
        raise ValueError(
            f"model: expected LoRA or another adapter of modules, got {config.peft_type}"
        )
    return model.get_base_model()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
