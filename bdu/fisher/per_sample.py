"""The path of every parameter that no layer's formula fits: its gradients, sample by sample."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bdu.fisher.likelihood import Loss, widened
from bdu.fisher.model import mapped, rows_of, run

# Per-sample gradients exist only in blocks of at most this many elements.
_BLOCK = 2**25

# What torch says when vmap cannot express a model, as opposed to the model being at fault.
_VMAP_LIMITS = (
    "vmap",
    "functorch",
    "Batching rule",
    "During a grad",
    "doesn't match the broadcast shape",  # recurrent layers, which write in place
    "don't yet support saved tensor hooks",  # checkpoints
    "Cannot access data pointer",  # a model that leaves torch
)


class PerSample:
    """Per-sample gradients of any parameters by `torch.func`, or one by one where vmap cannot."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], losses: Loss) -> None:
        self.model, self.parameters, self.losses = model, parameters, losses
        self.vectorised = True
        self.warned = ""

    def add(
        self,
        x: Any,
        y: Tensor,
        totals: Mapping[str, Tensor],
        sums: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the squared gradients of these samples to `totals`, and the gradients to `sums`."""
        if not self.parameters:
            return
        block = max(1, _BLOCK // max(1, sum(p.numel() for p in self.parameters.values())))
        for start in range(0, len(y), block):
            rows = slice(start, start + block)
            for gradients in self._gradients(rows_of(x, rows), y[rows]):
                for name, gradient in gradients.items():
                    gradient = widened(gradient)
                    totals[name].add_(gradient.square().sum(0).to(totals[name].device))
                    if sums is not None:
                        sums[name].add_(gradient.sum(0))

    def _gradients(self, x: Any, y: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield gradients with one or more samples in front, until all samples have come."""
        if self.vectorised:
            axes = mapped(x, lambda _: 0, lambda _: None)
            try:
                per_sample = torch.func.vmap(torch.func.grad(self._loss), (None, axes, 0))
                gradients = per_sample(self.parameters, x, y)
            except RuntimeError as error:
                if not any(limit in str(error) for limit in _VMAP_LIMITS):
                    raise
                self.vectorised = False
                self._warn(f"one sample at a time, since vmap cannot: {str(error).strip()[:200]}")
            else:
                self._warn("by vmap over per-sample gradients")
                yield gradients
                return
        for i in range(len(y)):
            leaves = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
            value = self._loss(leaves, rows_of(x, i), y[i])
            if not value.requires_grad:
                continue  # this sample uses none of the parameters
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            pairs = zip(leaves, found, strict=True)
            yield {name: g.unsqueeze(0) for name, g in pairs if g is not None}

    def _loss(self, parameters: dict[str, Tensor], x: Any, y: Tensor) -> Tensor:
        return self.losses(run(self.model, rows_of(x, None), parameters), y.unsqueeze(0)).sum()

    def _warn(self, how: str) -> None:
        if self.warned != how:
            names = ", ".join(self.parameters)
            message = f"fisher_diagonal: no layer formula fits {names}; exact but slower, {how}"
            warnings.warn(message, stacklevel=6)
            self.warned = how
