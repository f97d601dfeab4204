"""The last layer of a classifier, and scores of its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bdu.models import logits_of, modes_kept

_CONSISTENT = 1.4826  # makes the median absolute deviation of a normal sample its deviation
_ROUNDING = 1024  # of a doubled layer's logits, in units of eps; only a log-softmax rounds at all


def head_of(model: nn.Module, images: Tensor) -> str:
    """Name of the layer that gives the logits: the last linear or convolution called whose outputs
    are as many as the classes, if the logits double with it (up to a constant over the classes).

    Args: images: (N, C, H, W) float in [0, 1], on the model's device.

    Raises:
        ValueError: there is none; its weight is computed, shared with another layer, or does not
            scale the logits.
    """
    # A spectral norm in training mode takes another step whenever its weight is read.
    with torch.no_grad(), modes_kept(model):
        model.eval()
        logits, called = _logits_and_layers(model, images[:1])
        fitting = [name for name, layer in called if len(layer.weight) == logits.shape[1]]
        if not fitting:
            raise ValueError(
                f"model: expected a final layer of {logits.shape[1]} outputs, got none "
                f"among {len(called)} linear layers and convolutions"
            )
        head = fitting[-1]
        own = _own_parameters(model, head)
        doubled = {name: 2 * parameter for name, parameter in own.items()}
        twice = logits_of(functional_call(model, doubled, (images[:1],)))
    one, two = (each - each.mean(1, keepdim=True) for each in (logits, twice))
    most = _ROUNDING * torch.finfo(logits.dtype).eps * float(logits.abs().max())
    if not bool(((two - 2 * one).abs() <= most).all()) and bool(logits.isfinite().all()):
        raise ValueError(
            f"model: expected logits in proportion to the final layer, got others from {head}; "
            "the outputs are to be those of a linear layer or convolution, before any softmax"
        )
    return head


def _logits_and_layers(model: nn.Module, images: Tensor) -> tuple[Tensor, list[tuple[str, Any]]]:
    """With the linear layers and convolutions by name, in the order they are called in."""
    called: list[tuple[str, Any]] = []
    handles = [
        module.register_forward_hook(lambda module, _, __, name=name: called.append((name, module)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    try:
        return logits_of(model(images)), called
    finally:
        for handle in handles:
            handle.remove()


def _own_parameters(model: nn.Module, head: str) -> dict[str, nn.Parameter]:
    """Those of the layer by their names in the model."""
    own = dict(model.get_submodule(head).named_parameters(prefix=head, recurse=False))
    if f"{head}.weight" not in own:
        raise ValueError(
            f"model: expected a final layer with a weight of its own, got {head} with a computed "
            "one; call torch.nn.utils.parametrize.remove_parametrizations on it first"
        )
    names = [
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if p is own[f"{head}.weight"]
    ]
    if len(names) > 1:
        raise ValueError(
            f"model: expected a final layer with a weight of its own, got {head} sharing it "
            f"({', '.join(names)})"
        )
    return own


def deviations(scores: Tensor) -> Tensor:
    """(s − median) / (1.4826 · MAD) of scores (K,); 0 where they do not differ from the median."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # no quantile of halves
    offset = scores - scores.quantile(0.5)
    spread = _CONSISTENT * offset.abs().quantile(0.5)
    # With half of the scores equal the spread is 0, and everything else would be infinitely far.
    return torch.where(offset == 0, offset, offset / spread.clamp(min=1e-12))


def row_changes(before: Tensor, after: Tensor) -> Tensor:
    """Σ_j |after_cj − before_cj| of every row c, (K,), whatever axes follow."""
    return (after - before).detach().flatten(1).abs().sum(1)
