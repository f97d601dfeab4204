"""What is made of a Fisher: a scale that travels between models, and the contrast of two."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def scale_to_unit_mean(fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return F times one factor, so that its mean over all entries of all tensors is 1.

    A penalty weight λ then means the same for every model. Raises ValueError if F is all zero.
    """
    check_fisher(fisher, "fisher")
    total = sum(float(f.sum(dtype=torch.float64)) for f in fisher.values())
    if total == 0:
        raise ValueError("fisher: expected a positive entry, got all zero")
    factor = sum(f.numel() for f in fisher.values()) / total
    return {name: (f.double() * factor).to(f.dtype) for name, f in fisher.items()}


def contrastive(
    fisher_clean: Mapping[str, Tensor], fisher_trigger: Mapping[str, Tensor], gamma: float
) -> dict[str, Tensor]:
    """Return F_c · F_c / (F_c + γ F_t), 0 where F_c = 0: high where only clean data needs θ.

    Args: two Fishers of the same names and shapes, each scaled to unit mean by the caller, or γ ≥ 0
        would carry their scales; the result is not rescaled.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma: expected a finite number >= 0, got {gamma}")
    shapes = [{n: tuple(f.shape) for n, f in x.items()} for x in (fisher_clean, fisher_trigger)]
    if different := sorted(n for n, _ in shapes[0].items() ^ shapes[1].items()):
        raise ValueError(f"fisher_trigger: expected fisher_clean's shapes, got others: {different}")
    result = {}
    for name, clean in fisher_clean.items():
        # the ratio first: F_c · F_c can leave the range of float32
        share = clean / (clean + gamma * fisher_trigger[name])
        result[name] = torch.where(clean > 0, clean * share, torch.zeros_like(clean))
    return result


def check_fisher(fisher: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError with the name of a tensor that is not finite and ≥ 0."""
    for name, f in fisher.items():
        if not (f.is_floating_point() and bool(torch.isfinite(f).all()) and bool((f >= 0).all())):
            raise ValueError(f"{where}: expected {name} finite and >= 0, got other values")
