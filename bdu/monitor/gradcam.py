"""Grad-CAM: where in an image a class score comes from, for convolutional nets and transformers.

H = ReLU(Σ_k α_k A_k) with α_k the mean over places of ∂ logit_c / ∂A_k, for the feature maps A of
one layer; a transformer's tokens are laid out as the grid they came from.

Source: Selvaraju et al. 2017, "Grad-CAM: visual explanations from deep networks via gradient-based
localization", equations 1 and 2; the short cut for a linear head is Zhou et al. 2016, "Learning
deep features for discriminative localization".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdu.data import as_unit_float
from bdu.models import device_of, logits_of, modes_kept


def grad_cam(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | int,
    *,
    layer: str | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 128,
) -> Tensor:
    """Return the heat map of each image, H = ReLU(Σ_k α_k A_k), scaled up bilinearly.

    The model is run in evaluation mode and comes back as it was: mode, gradients, buffers, hooks
    and the random state, so it may be in the middle of its training. Where the layer is followed by
    global average pooling and a linear layer alone, α_k is that layer's weight divided by the
    number of places, and nothing is differentiated.

    Args:
        model: takes images, returns logits (N, classes), see :func:`bdu.models.logits_of`.
        images: (N, C, H, W), uint8, or floats as the model takes them; on any device, may be none.
        targets: the class c to explain: one for all, or (N,).
        layer: name from `model.named_modules()`, with output (N, K, h, w) or, of a transformer,
            (N, tokens, K); None takes :func:`target_layer`'s.
        size: of the result; None is that of the images.
        batch_size: images at once, at most.

    Returns: (N, *size), float32, ≥ 0, on the model's device; not normalised. All zero where every
        place speaks against the class. Within ``torch.inference_mode`` the same, for a model that
        was made outside of it.

    Raises:
        ValueError: an unknown layer, one whose output has no places, or targets that do not fit.
    """
    _check_images(images)
    with _undisturbed(model):
        device = device_of(model)
        chosen = _usable(torch.as_tensor(targets, device=device))
        if chosen.dim() == 0:
            chosen = chosen.expand(len(images))
        if chosen.shape != images.shape[:1] or chosen.is_floating_point():
            got = f"{chosen.dtype} {tuple(chosen.shape)}"
            raise ValueError(
                f"targets: expected an integer or ({len(images)},) integers, got {got}"
            )
        modules = dict(model.named_modules())
        if layer is not None and layer not in modules:
            raise ValueError(f"layer: expected a name from named_modules(), got {layer!r}")
        own = size or (int(images.shape[2]), int(images.shape[3]))
        if not len(images):
            return torch.zeros(0, *own, device=device)
        name = target_layer(model, images[:1]) if layer is None else layer
        maps = []
        for x, c in zip(images.split(batch_size), chosen.split(batch_size), strict=True):
            coarse = _coarse(model, modules[name], name, _input(model, x), c)
            maps.append(
                F.interpolate(coarse.unsqueeze(1), own, mode="bilinear", align_corners=False)[:, 0]
            )
        return torch.cat(maps)


def target_layer(model: nn.Module, images: Tensor) -> str:
    """The name of the last layer with places that the logits depend on everywhere.

    For a convolutional net that is its last feature map of more than one place. In a transformer
    that reads its class token, the last layers leave the other tokens without influence: it is the
    norm before the last attention.

    Args: images: at least one, (N, C, H, W).

    Raises:
        ValueError: no image, or no layer has places.
    """
    _check_images(images)
    if not len(images):
        raise ValueError(f"images: expected at least one, got {tuple(images.shape)}")
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return
            # tokens are taken where all of them are normalised, and not from one projection
            if _grid(output) and (output.dim() == 4 or "Norm" in type(module).__name__):
                outputs.append((name, output))

        return hook

    with _undisturbed(model), torch.enable_grad():
        handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if n]
        try:
            probe = _input(model, images[:1]).detach().clone().requires_grad_()
            logits = _logits(model(probe))
        finally:
            for handle in handles:
                handle.remove()
        # scores of all classes at once, unequally weighted so that they cannot cancel
        weights = torch.linspace(1, 2, logits.shape[1], device=logits.device, dtype=logits.dtype)
        tensors = [output for _, output in outputs]
        gradients: tuple[Tensor | None, ...] = ()
        if tensors:
            score = (logits * weights).sum()
            gradients = torch.autograd.grad(score, tensors, allow_unused=True)
    for (name, output), gradient in reversed(list(zip(outputs, gradients, strict=True))):
        if gradient is None:
            continue
        places = _places(gradient, output)
        # a rectifier may silence single places, never most of them
        if bool((places.abs().sum(1) > 0).float().mean() > 0.5):
            return name
    raise ValueError("model: expected a layer whose output has places, got none; name one")


def _coarse(model: nn.Module, module: nn.Module, name: str, x: Tensor, targets: Tensor) -> Tensor:
    """(N, h, w)"""
    features: list[Tensor] = []
    heads: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def start(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor) or _grid(output) is None:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer: expected places in the output of {name}, got {got}")
        features.append(output.detach().requires_grad_())
        # nothing before here is differentiated
        torch.set_grad_enabled(True)
        return features[-1].clone()  # a rectifier may work in place

    def keep(linear: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(linear, nn.Linear)
        heads[:] = [(linear, args[0], output)]

    handles = [module.register_forward_hook(start)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not module]
    handles += [m.register_forward_hook(keep) for m in linears]
    try:
        with torch.no_grad():
            logits = _logits(model(x))
    finally:
        for handle in handles:
            handle.remove()
    if not features:
        raise ValueError(f"layer: expected one that the model calls, got {name!r}")
    if targets.numel() and not (0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]):
        raise ValueError(f"targets: expected classes in [0, {logits.shape[1]}), got others")
    maps = features[-1]
    if (weight := _linear_head(maps, heads, logits)) is not None:
        alpha = weight[targets] / (maps.shape[2] * maps.shape[3])
    else:
        with torch.enable_grad():
            scores = logits.gather(1, targets.unsqueeze(1)).sum()
        (gradient,) = torch.autograd.grad(scores, maps)
        alpha = _places(gradient, maps).mean((2, 3))
    places = _places(maps.detach(), maps)
    return torch.einsum("nk,nkhw->nhw", alpha.float(), places.float()).relu()


def _linear_head(
    maps: Tensor, heads: list[tuple[nn.Linear, Tensor, Tensor]], logits: Tensor
) -> Tensor | None:
    """The weight of the last layer if all between the maps and it is pooling."""
    if maps.dim() != 4 or not heads:
        return None
    linear, pooled, output = heads[0]
    if output is not logits or pooled.shape != maps.shape[:2]:
        return None
    mean = maps.detach().mean((2, 3))
    tolerance = math.sqrt(torch.finfo(maps.dtype).eps)
    # And whether nobody changed what the layer made of it: a hook, a subclass, a scale in place.
    plain = torch.nn.functional.linear(mean, linear.weight, linear.bias).detach()
    for found, expected in ((pooled.detach(), mean), (logits.detach(), plain)):
        if not torch.allclose(found, expected, tolerance, tolerance * float(expected.abs().max())):
            return None
    return linear.weight.detach()


def _grid(output: Tensor) -> tuple[int, int] | None:
    """Height and width of the places in a layer's output, None if it has none."""
    if output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
        return int(output.shape[2]), int(output.shape[3])
    if output.dim() == 3:
        for extra in (1, 0, 2):  # a class token, none, or one for distillation, too
            side = math.isqrt(max(0, output.shape[1] - extra))
            if side > 1 and side * side == output.shape[1] - extra:
                return side, side
    return None


def _places(values: Tensor, output: Tensor) -> Tensor:
    """(N, K, h, w) of what belongs to a layer's output; tokens of no place are left out."""
    if output.dim() == 4:
        return values
    grid = _grid(output)
    assert grid is not None
    count = grid[0] * grid[1]
    return values[:, -count:].transpose(1, 2).unflatten(2, grid)


def _logits(output: Any) -> Tensor:
    logits = logits_of(output)
    if logits.dim() != 2:
        raise ValueError(f"model: expected logits (N, classes), got {tuple(logits.shape)}")
    return logits


def _check_images(images: Tensor) -> None:
    if images.dim() != 4:
        raise ValueError(f"images: expected (N, C, H, W), got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images: expected uint8 or floats, got {images.dtype}")


def _input(model: nn.Module, images: Tensor) -> Tensor:
    """As the model takes them: floats of its dtype, uint8 from 0 to 1, on its device."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    images = _usable(images.to(device_of(model)))
    return (as_unit_float(images) if images.dtype == torch.uint8 else images).to(dtype)


def _usable(tensor: Tensor) -> Tensor:
    # autograd cannot save what was made within torch.inference_mode
    return tensor.clone() if tensor.is_inference() else tensor


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards modes, the random state and autograd's switch are as before."""
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "model: expected one that can be differentiated, got one made within "
            "torch.inference_mode()"
        )
    devices = sorted({p.device for p in model.parameters() if p.is_cuda}, key=str)
    was_enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), modes_kept(model), torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            torch.set_grad_enabled(was_enabled)
