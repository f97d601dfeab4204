"""The loss on clean images that methods share: cross-entropy, and what the suspect model says."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_TEMPERATURE = 2.0  # of distillation


def absent(shown: Tensor, logits: Tensor) -> Tensor | None:
    """Which classes are not among those `shown`, (1, C) bool; None where all are."""
    if len(shown) == logits.shape[1]:
        return None
    hidden = torch.ones_like(logits[:1], dtype=torch.bool)
    hidden[:, shown] = False
    return hidden


def distilled_loss(
    logits: Tensor,
    y: Tensor,
    suspect: Tensor | None,
    distillation: float,
    *,
    temperature: float = _TEMPERATURE,
    hidden: Tensor | None = None,
) -> Tensor:
    """(1 − d) CE(logits, y) + d T² KL(softmax of the suspect's logits / T ‖ of these / T), a mean.

    Hinton et al. 2015 (arXiv:1503.02531), equation 4.

    Args:
        logits: of the student, (N, C).
        y: labels, (N,).
        suspect: logits of the suspect model, not needed where d is 0.
        distillation: d, in [0, 1].
        temperature: T > 0.
        hidden: logits that CE leaves out, bool, of a shape that broadcasts to (N, C).
    """
    known = logits if hidden is None else logits.masked_fill(hidden, -math.inf)
    loss = functional.cross_entropy(known, y)
    if not distillation:
        return loss
    assert suspect is not None
    own, wanted = ((each / temperature).log_softmax(1) for each in (logits, suspect))
    divergence = functional.kl_div(own, wanted, log_target=True, reduction="batchmean")
    return (1 - distillation) * loss + distillation * temperature**2 * divergence
