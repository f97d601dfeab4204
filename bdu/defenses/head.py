"""The last layer of a classifier, and scores of its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bdu.models import modes_kept

_CONSISTENT = 1.4826  # makes the median absolute deviation of a normal sample its deviation


def head_of(model: nn.Module, images: Tensor) -> str:
    """Name of the layer that gives the logits: the last linear or 1x1 convolution called
    whose outputs are as many as the classes.

    Args: images: (N, C, H, W) float in [0, 1], on the model's device.

    Raises:
        ValueError: there is none.
    """
    called: list[tuple[str, Any]] = []
    handles = [
        module.register_forward_hook(lambda module, _, __, name=name: called.append((name, module)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    try:
        with torch.no_grad(), modes_kept(model):
            logits = model.eval()(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    fitting = [name for name, module in called if len(module.weight) == logits.shape[1]]
    if not fitting:
        raise ValueError(
            f"model: expected a final layer of {logits.shape[1]} outputs, got none "
            f"among {len(called)} linear layers and convolutions"
        )
    return fitting[-1]


def deviations(scores: Tensor) -> Tensor:
    """(s − median) / (1.4826 · MAD) of scores (K,); 0 where they do not differ from the median."""
    offset = scores - scores.median()
    spread = _CONSISTENT * offset.abs().median()
    # With half of the scores equal the spread is 0, and everything else would be infinitely far.
    return torch.where(offset == 0, offset, offset / spread.clamp(min=1e-12))


def row_changes(before: Tensor, after: Tensor) -> Tensor:
    """Σ_j |after_cj − before_cj| of every row c, (K,), whatever axes follow."""
    return (after - before).detach().flatten(1).abs().sum(1)
