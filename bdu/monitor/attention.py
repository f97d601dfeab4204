"""How much of a model's attention a trigger has: TAR, and how spread the attention is.

TAR ("trigger attention ratio") has two forms, since writings differ in which they mean: the share
of all attention that falls on the trigger (``tar_share`` in a run's files, "TAR" where no other is
named), and the ratio of the mean attention on the trigger to that beside it (``tar_ratio``). Low
attention does not prove that a backdoor is gone; ASR does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TAR:
    """Of each image, (N,) float64; NaN where the heat map is zero everywhere.

    Attributes:
        share: Σ(H·M) / ΣH, in [0, 1].
        share_by_area: the share divided by the share of the image that the trigger covers; 1 is no
            more attention than anywhere else.
        ratio: mean(H | M) / mean(H | ¬M), in [0, ∞]; NaN where the trigger covers the whole image.
    """

    share: Tensor
    share_by_area: Tensor
    ratio: Tensor


def tar(heat: Tensor, mask: Tensor) -> TAR:
    """Compare heat maps H with the mask M of a trigger.

    Args:
        heat: (N, H, W), ≥ 0, such as :func:`bdu.monitor.gradcam.grad_cam`'s.
        mask: (H, W) for all or (N, H, W), boolean, with at least one place set in each.

    Raises:
        ValueError: shapes that do not fit, negative heat, a mask that is no mask or empty.
    """
    if heat.dim() != 3 or not heat.is_floating_point():
        raise ValueError(f"heat: expected floats (N, H, W), got {heat.dtype} {tuple(heat.shape)}")
    if bool((heat < 0).any()):
        raise ValueError("heat: expected no negative values, got some")
    if mask.dtype != torch.bool or mask.shape not in (heat.shape, heat.shape[1:]):
        expected = f"booleans {tuple(heat.shape[1:])} or {tuple(heat.shape)}"
        raise ValueError(f"mask: expected {expected}, got {mask.dtype} {tuple(mask.shape)}")
    inside = mask.to(heat.device).expand(heat.shape).double()
    area = inside.mean((1, 2))
    if bool((area == 0).any()):
        raise ValueError("mask: expected at least one place of every image, got none")
    wide = heat.double()
    share = (wide * inside).sum((1, 2)) / wide.sum((1, 2))
    # 0 / 0 is NaN, as it should be: a dead map, or nothing beside the trigger
    ratio = (share / area) / ((1 - share) / (1 - area))
    return TAR(share, share / area, torch.where(area == 1, math.nan, ratio))


def attention_entropy(heat: Tensor) -> Tensor:
    """−Σ p log p / log(H W) of p = H / ΣH, (N,): 0 is one place, 1 is everywhere alike.

    Args: heat: (N, H, W), ≥ 0, of more than one place. NaN where it is zero everywhere.
    """
    flat = heat.double().flatten(1)
    p = flat / flat.sum(1, keepdim=True)
    return torch.special.entr(p).sum(1) / math.log(flat.shape[1])


def difference_mask(images: Tensor, triggered: Tensor, threshold: float = 0.0) -> Tensor:
    """Where a trigger changed images, (N, H, W): any channel by more than `threshold`.

    Args: images, triggered: (N, C, H, W), the same ones without and with it.
    """
    if images.shape != triggered.shape:
        got = f"{tuple(images.shape)} and {tuple(triggered.shape)}"
        raise ValueError(f"triggered: expected images of one shape, got {got}")
    return ((triggered.double() - images.double()).abs() > threshold).any(1)


def attribution_share(attributions: Tensor, is_trigger: Tensor) -> Tensor:
    """The share of |gradient × input| on a trigger's tokens, (N,): TAR of a language model.

    Args: attributions: (N, T), of any sign, 0 where there is padding; is_trigger: (N, T), boolean.
    Returns: in [0, 1]; NaN where all attributions are zero.
    """
    if attributions.shape != is_trigger.shape or is_trigger.dtype != torch.bool:
        got = f"{is_trigger.dtype} {tuple(is_trigger.shape)}"
        raise ValueError(f"is_trigger: expected booleans {tuple(attributions.shape)}, got {got}")
    size = attributions.double().abs()
    return (size * is_trigger).sum(1) / size.sum(1)
