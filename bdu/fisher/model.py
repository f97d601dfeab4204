"""A model as the Fisher sees it: what is selected, how it is run, and left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from bdu.models import logits_of


def selected_parameters(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """The parameters of these names, or all that require a gradient; ValueError by name."""
    known = dict(model.named_parameters())
    chosen = [name for name, p in known.items() if p.requires_grad] if names is None else names
    if isinstance(chosen, str):
        raise ValueError(f"parameters: expected several names, got the string {chosen!r}")
    chosen = list(chosen)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"parameters: expected names from named_parameters(), got {unknown}")
    if other := [name for name in chosen if not known[name].is_floating_point()]:
        raise ValueError(f"parameters: expected real floating-point parameters, got {other}")
    if not chosen:
        raise ValueError("parameters: expected at least one that requires a gradient, got none")
    return {name: known[name] for name in chosen}


def refuse_coupled_samples(model: nn.Module) -> None:
    """Raise ValueError for a module that couples or randomises samples, with the reason."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: expected a module in Python, got one of TorchScript")
    for name, module in model.named_modules():
        match module:
            case torch.jit.ScriptModule(training=True):
                why = "is of TorchScript and in training mode, so it may mix samples unseen"
            case _BatchNorm() if module.training or module.running_mean is None:
                why = "takes its batch's statistics, so no sample has a gradient of its own"
            case _NormBase(training=True, track_running_stats=True):
                why = "changes its running statistics"
            case _DropoutNd(training=True) if module.p > 0:
                why = "is active, so the gradients are random"
            case nn.Embedding() if module.max_norm is not None or module.scale_grad_by_freq:
                why = "has max_norm or scale_grad_by_freq, which change weight or gradient"
            case _:
                continue
        hint = "; call model.eval() first" if module.training else ""
        raise ValueError(f"model: {type(module).__name__} {name!r} {why}{hint}")


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.is_cuda}, key=str)


def random_states(model: nn.Module) -> list[Tensor]:
    """Of the CPU and of the model's devices."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, _cuda_devices(model))]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; afterwards the model's flags and buffers and torch's
    own state are as they were."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    buffers = [
        (module._buffers, own, b, b._version, b.clone())
        for module in model.modules()
        for own, b in module._buffers.items()
        if b is not None
    ]
    fastpath, cache = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    with torch.random.fork_rng(_cuda_devices(model)), torch.enable_grad():
        try:
            # the fast path of attention skips modules; a cached cast hides a weight's second use
            torch.backends.mha.set_fastpath_enabled(False)
            torch.set_autocast_cache_enabled(False)
            for parameter, flag in flags:
                if flag:
                    parameter.requires_grad_(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_autocast_cache_enabled(cache)
            for parameter, flag in flags:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)
            for buffers_of, own, buffer, version, value in buffers:
                buffers_of[own] = buffer
                if buffer._version != version:
                    buffer.detach().copy_(value)


def batches(
    loader: Iterable[Any] | tuple[Any, Tensor],
    left: int | None,
    size: int | None,
    skipped: int = 0,
) -> Iterator[tuple[Any, Tensor]]:
    """Yield (x, y) of at most `size` samples, `left` in all, the first `skipped` of them left out.

    size None: as the loader gives them, and 64 of a pair of tensors.
    """
    if isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[1], Tensor):
        loader, size = [loader], size or 64
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError(f"loader: expected batches (x, y, ...), got {type(batch).__name__}")
        x, y = batch[:2]
        _check_batch(x, y)
        count = len(y) if left is None else min(left, len(y))
        first, skipped = min(skipped, count), max(0, skipped - count)
        for start in range(first, count, size or max(1, count)):
            piece = slice(start, min(count, start + (size or count)))
            yield rows_of(x, piece), y[piece]
        if left is not None:
            left -= count
            if left == 0:
                return


def moved(x: Any, device: torch.device) -> Any:
    """x on a device, out of any graph."""
    return mapped(x, lambda tensor: tensor.detach().to(device))


def _check_batch(x: Any, y: Any) -> None:
    tensors = [v for v in x.values() if isinstance(v, Tensor)] if isinstance(x, Mapping) else [x]
    for tensor in (*tensors, y):
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != y.shape[:1] or not y.dim():
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"loader: expected tensors x, y of one length in front, got {got}")


def mapped(x: Any, f: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda v: v) -> Any:
    """Apply f to x, or to every tensor of a mapping x and `other` to what else is in it."""
    if isinstance(x, Mapping):
        return {k: f(v) if isinstance(v, Tensor) else other(v) for k, v in x.items()}
    return f(x)


def rows_of(x: Any, index: Any) -> Any:
    """Index the first axis of x; None puts an axis in front."""
    return mapped(x, lambda tensor: tensor[index])


def run(model: nn.Module, x: Any, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """The model's logits of x, with other values for some parameters."""
    args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})
    if parameters:
        outputs = torch.func.functional_call(model, parameters, args, kwargs)
    else:
        outputs = model(*args, **kwargs)
    return logits_of(outputs)


def known_positions(x: Any) -> set[int]:
    """How many positions a sample of the input may be said to have: products of its first axes."""
    tensors = [v for v in x.values() if isinstance(v, Tensor)] if isinstance(x, Mapping) else [x]
    return {math.prod(t.shape[1:end]) for t in tensors for end in range(2, t.dim() + 1)}
