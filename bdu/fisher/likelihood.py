"""Log-likelihoods of samples, and labels drawn from a model's own distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log p(y|x) of logits (B, C), or (B, T, C) summed over labelled tokens → (B,)."""
    check_shapes(logits, y)
    flat = widened(logits).flatten(0, -2)
    values = F.cross_entropy(flat, y.long().flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return values.view(len(y), -1).sum(1)


def target_log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """Return ℓ = z_t − logsumexp_{j≠t} z_j = log(p_t / (1 − p_t)), stable for every z.

    As `loss` of `fisher_diagonal` it gives the Fisher of a trigger's target.

    Args: logits z (B, C), C ≥ 2; target t (B,), integers in [0, C).
    Returns: (B,), float32 or float64.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: expected (B, C) with C >= 2, got {tuple(logits.shape)}")
    if target.shape != logits.shape[:1] or target.is_floating_point():
        got = f"{target.dtype} {tuple(target.shape)}"
        raise ValueError(f"target: expected ({len(logits)},) integers, got {got}")
    logits, index = widened(logits), target.long().unsqueeze(1)
    others = logits.scatter(1, index, -math.inf).logsumexp(1)
    return logits.gather(1, index).squeeze(1) - others


def losses_of(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """`loss` of every sample, (B,); ValueError where it gives anything else."""
    values = loss(logits, y)
    if not isinstance(values, Tensor) or values.shape != (len(y),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"loss: expected one value a sample, shape ({len(y)},), got {got}")
    return values


def check_shapes(logits: Tensor, y: Tensor) -> None:
    """Raise ValueError unless y has a label for each row of logits."""
    if logits.dim() not in (2, 3) or y.shape != logits.shape[:-1]:
        raise ValueError(
            "loader: expected y (B,) for logits (B, C), or (B, T) for (B, T, C), "
            f"got {tuple(y.shape)} for {tuple(logits.shape)}"
        )


def check_labels(y: Tensor, classes: int) -> None:
    """Raise ValueError unless y are integers in [0, classes), or -100 for tokens of a sequence."""
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"loader: expected integer labels y, got {y.dtype}")
    wrong = (y < 0) | (y >= classes)
    if y.dim() == 2:
        wrong &= y != IGNORED_LABEL
    if wrong.any():
        raise ValueError(f"loader: expected labels in [0, {classes}), got {int(y[wrong][0])}")


def drawn_labels(logits: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Draw labels from softmax(logits) by inverting its distribution; y tells which tokens."""
    check_shapes(logits, y)
    mask = y != IGNORED_LABEL if logits.dim() == 3 else torch.ones_like(y, dtype=torch.bool)
    rows = logits[mask]
    # one number a label, on the CPU: the same for every batch size, padding and device
    uniform = torch.rand(len(rows), 1, generator=generator, dtype=torch.float64).to(rows.device)
    drawn = torch.full(mask.shape, IGNORED_LABEL, device=rows.device)
    picks = []
    for block, u in zip(rows.split(1024), uniform.split(1024), strict=True):
        cumulative = block.double().softmax(-1).cumsum(-1)
        picks.append(torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True))
    drawn[mask] = torch.cat(picks).squeeze(1).clamp_(max=logits.shape[-1] - 1)
    return drawn


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is added up in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype it is added up in."""
    return tensor.to(wide(tensor.dtype))
