"""The exact diagonal of the empirical Fisher."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bdu.checkpoint import load_state, save_state
from bdu.fisher.capture import Capture, Plan
from bdu.fisher.likelihood import (
    IGNORED_LABEL,
    Loss,
    check_labels,
    cross_entropy,
    drawn_labels,
    losses_of,
    wide,
)
from bdu.fisher.model import (
    batches,
    known_positions,
    mapped,
    moved,
    refuse_coupled_samples,
    rows_of,
    run,
    selected_parameters,
    untouched,
)
from bdu.fisher.per_sample import PerSample
from bdu.fisher.plan import make_plan

_SAVE_EVERY = 60.0  # seconds


def fisher_diagonal(
    model: nn.Module,
    loader: Iterable[Any] | tuple[Any, Tensor],
    *,
    samples: int | None = None,
    labels: Literal["empirical", "model"] = "empirical",
    loss: Literal["cross_entropy"] | Loss = "cross_entropy",
    sample: Literal["sequence", "token"] = "sequence",
    parameters: Iterable[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    fisher_device: torch.device | str | None = None,
    resume: str | PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Return F_i = mean over samples of (∂ log p(y|x) / ∂θ_i)², exact whatever the batch size.

    Args:
        model: in the mode it is to be measured in; nothing may couple or randomise its samples.
            Returns logits (B, C) or (B, T, C), or an object with such `.logits`.
        loader: yields (x, y, ...), further fields ignored, or is a pair (x, y) of all samples. x is
            a tensor or a mapping of keyword arguments, every tensor with the batch in its first
            axis; it is moved to the model's device. y holds integer labels (B,) or (B, T), with
            -100 where a token of a sequence has none; they stand opposite the logits as given, so a
            causal language model's are shifted already.
        samples: use only the first so many, to the sample; None is all of them.
        labels: "empirical" takes y; "model" draws it from the model's own distribution, one uniform
            number a label in the order of the samples (one draw a sample of the true Fisher).
        loss: "cross_entropy" is −log p(y|x), summed over a sequence's labelled tokens; or a
            callable from (logits, y) to one value a sample, shape (B,), each of its sample alone.
        sample: of a language model's logits (B, T, C), "sequence": all labelled tokens of a row
            are one sample, their log-probabilities added before the square; "token": each labelled
            token given those before it is a sample, at one forward and backward a position.
        parameters: names from `model.named_parameters()`; None is all that require a gradient.
        seed: for labels="model".
        batch_size: samples that go through the model at once, at most; larger batches are cut,
            which changes nothing but rounding. None: as the loader gives them, and 64 of a pair.
        fisher_device: where F is added up; None is each parameter's own device. "cpu" keeps a large
            model's F out of the device's memory, at one copy of it a batch.
        resume: a file for the sums so far, written every minute and on Ctrl-C, deleted at the end.
            Where it exists the work goes on from it; the loader has to give the same samples again.
        progress: show a progress bar.

    Returns: name → tensor of the parameter's shape, ≥ 0; float64 for a float64 parameter, else
        float32, in which bf16 and fp16 models are accumulated too.

    The model comes back as it was: gradients, flags, buffers, hooks, and the random state.

    Warns: once, with the names of parameters that take `torch.func.vmap(grad)`, as exact and
        slower, because no layer's formula fits their use.

    Raises:
        ValueError: a setting, a label or a shape out of range, no sample, an unknown parameter, a
            model or loss whose samples are coupled or random, a file of another computation.
        FloatingPointError: a gradient is not finite; the parameter is named.
        RuntimeError: the way the model uses a layer changed between batches.
    """
    for name, count in (("samples", samples), ("batch_size", batch_size)):
        if count is not None and (not isinstance(count, int) or count <= 0):
            raise ValueError(f"{name}: expected a positive integer, got {count!r}")
    accumulator = FisherAccumulator(
        model,
        labels=labels,
        loss=loss,
        sample=sample,
        parameters=parameters,
        seed=seed,
        fisher_device=fisher_device,
    )
    total = samples
    if isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[1], Tensor):
        known = loader[1].shape[:1].numel()
        total = known if samples is None else min(samples, known)
    file = None if resume is None else Path(resume)
    if file is not None and file.exists():
        accumulator.load(file)
        if samples is not None and accumulator.rows > samples:
            raise ValueError(
                f"resume: expected at most {samples} rows in {file}, got {accumulator.rows}"
            )
    saved = time.monotonic()
    bar = tqdm(
        total=total, initial=accumulator.rows, desc="Fisher", unit="row", disable=not progress
    )
    try:
        with bar, untouched(model):
            for x, y in batches(loader, samples, batch_size, accumulator.rows):
                accumulator._add(x, y, None)
                bar.update(len(y))
                if file is not None and time.monotonic() - saved > _SAVE_EVERY:
                    accumulator.save(file)
                    saved = time.monotonic()
    except KeyboardInterrupt:
        # Within a batch the sums hold part of it; the file then stays at the last whole one.
        if file is not None and accumulator.samples and not accumulator._is_incomplete:
            accumulator.save(file)
        raise
    fisher = accumulator._finished()
    if file is not None:
        file.unlink(missing_ok=True)
    return fisher


class FisherAccumulator:
    """F of samples as they come: those of :func:`fisher_diagonal`, or of a training loop.

    ::

        accumulator = bdu.FisherAccumulator(model)
        for x, y in loader:
            losses = accumulator.backward(x, y)   # sets p.grad as losses.mean().backward() would
            optimizer.step()
        fisher = accumulator.diagonal()

    One backward gives both: each layer's gradient is formed per sample in registers, added up for
    the step, and squared for F. In such a loop F belongs to the weights of the moment.

    Args: those of :func:`fisher_diagonal`, with the same meaning.

    Attributes:
        samples: how many have been added.
        rows: the same, of the first axis of x; fewer where each of them has several tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        labels: Literal["empirical", "model"] = "empirical",
        loss: Literal["cross_entropy"] | Loss = "cross_entropy",
        sample: Literal["sequence", "token"] = "sequence",
        parameters: Iterable[str] | None = None,
        seed: int = 0,
        fisher_device: torch.device | str | None = None,
    ) -> None:
        if labels not in ("empirical", "model"):
            raise ValueError(f'labels: expected "empirical" or "model", got {labels!r}')
        if not (loss == "cross_entropy" or callable(loss)):
            raise ValueError(f'loss: expected "cross_entropy" or a callable, got {loss!r}')
        if sample not in ("sequence", "token"):
            raise ValueError(f'sample: expected "sequence" or "token", got {sample!r}')
        if sample == "token" and callable(loss):
            raise ValueError('sample: expected "sequence" beside a callable loss, got "token"')
        self._sample = sample
        self._model = model
        self._selected = selected_parameters(model, parameters)
        refuse_coupled_samples(model)
        self._labels, self._by_name = labels, not callable(loss)
        self._losses = partial(losses_of, loss if callable(loss) else cross_entropy)
        self._loss_name = loss if isinstance(loss, str) else getattr(loss, "__qualname__", "")
        self._generator = torch.Generator().manual_seed(seed)
        self._seed = seed
        self._device = next(iter(self._selected.values())).device
        self._totals = {
            name: _zeros(p, p.device if fisher_device is None else torch.device(fisher_device))
            for name, p in self._selected.items()
        }
        self._plan: Plan | None = None
        self._is_incomplete = False  # whether a batch was added in part
        self.samples = self.rows = 0

    def add(self, x: Any, y: Tensor) -> Tensor:
        """Add a batch; returns the loss of each row, (B,). Leaves the model as it was."""
        with untouched(self._model):
            return self._add(x, y, None)

    def backward(self, x: Any, y: Tensor) -> Tensor:
        """As `add`, and add the gradient of the mean loss to `p.grad` of the selected parameters.

        Returns: the loss of each row, (B,), without a graph.
        """
        sums = {name: _zeros(p, p.device) for name, p in self._selected.items()}
        with untouched(self._model):
            losses = self._add(x, y, sums)
        for name, parameter in self._selected.items():
            mean = sums.pop(name).div_(max(1, len(y))).to(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = mean.clone(memory_format=torch.preserve_format)
            else:
                parameter.grad.add_(mean)
        return losses

    def diagonal(self) -> dict[str, Tensor]:
        """F, the mean over all samples so far; see :func:`fisher_diagonal`."""
        if not self.samples:
            raise ValueError("loader: expected at least one sample, got none")
        if self._is_incomplete:
            raise RuntimeError("accumulator: expected whole batches, got one that failed half-way")
        _check_finite(self._totals)
        return {name: (total / self.samples).contiguous() for name, total in self._totals.items()}

    def _finished(self) -> dict[str, Tensor]:
        """As `diagonal`, without a second copy; nothing can be added any more."""
        if self.samples:
            _check_finite(self._totals)
            for name, total in self._totals.items():
                self._totals[name] = total.div_(self.samples).contiguous()
            return self._totals
        return self.diagonal()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the sums so far, whole or not at all."""
        state = {
            "samples": self.samples,
            "rows": self.rows,
            "generator": self._generator.get_state(),
        }
        totals = {name: total.cpu().contiguous() for name, total in self._totals.items()}
        save_state(path, {**state, "computation": self._computation(), "totals": totals})

    def load(self, path: str | PathLike[str]) -> None:
        """Go on from what `save` wrote; ValueError if that was another computation."""
        state = load_state(path)
        own = self._computation()
        theirs = state.get("computation", {}) if isinstance(state, dict) else {}
        for name, expected in own.items():
            if theirs.get(name) != expected:
                raise ValueError(
                    f"{path}: expected the sums of this computation, got another {name}"
                )
        for name, total in state["totals"].items():
            self._totals[name].copy_(total)
        self.samples, self.rows = state["samples"], state["rows"]
        self._is_incomplete = False
        self._generator.set_state(state["generator"])

    def _computation(self) -> dict[str, Any]:
        """What has to be the same for sums to be added to."""
        return {
            "labels": self._labels,
            "loss": self._loss_name,
            "sample": self._sample,
            "seed": self._seed,
            "parameters": {name: list(p.shape) for name, p in self._selected.items()},
            "model": {name: _fingerprint(t) for name, t in self._model.state_dict().items()},
        }

    def _check_parameters(self) -> None:
        known = dict(self._model.named_parameters(remove_duplicate=False))
        for name, parameter in self._selected.items():
            if known.get(name) is not parameter:
                raise RuntimeError(
                    f"{name}: expected the same parameter as when this was made, got another"
                )

    def _add(self, x: Any, y: Tensor, sums: Mapping[str, Tensor] | None) -> Tensor:
        """Within `untouched`."""
        if self._is_incomplete:
            raise RuntimeError(
                "accumulator: expected whole batches, got one that failed half-way; start anew or "
                "load() what was saved"
            )
        refuse_coupled_samples(self._model)
        self._check_parameters()
        x, y = moved(x, self._device), y.to(self._device)
        losses = self._add_rows(x, y, sums)
        self.rows += len(y)
        return losses

    def _add_rows(self, x: Any, y: Tensor, sums: Mapping[str, Tensor] | None) -> Tensor:
        if self._sample == "sequence":
            return self._add_samples(x, y, sums)
        if y.dim() != 2:
            raise ValueError(f'loader: expected y (B, T) with sample="token", got {tuple(y.shape)}')
        if self._labels == "model" and len(y):  # row by row, whatever the size of the batch
            with torch.no_grad():
                logits = run(self._model, mapped(x, torch.clone))
            y = drawn_labels(logits, y, self._generator)
        losses = torch.zeros(len(y), device=y.device)
        for position in range(y.shape[1]):
            (labelled,) = torch.nonzero(y[:, position] != IGNORED_LABEL, as_tuple=True)
            alone = torch.full_like(y[labelled], IGNORED_LABEL)
            alone[:, position] = y[labelled, position]
            losses[labelled] += self._add_samples(rows_of(x, labelled), alone, sums).float()
            self._is_incomplete = True
        self._is_incomplete = False
        return losses

    def _add_samples(self, x: Any, y: Tensor, sums: Mapping[str, Tensor] | None) -> Tensor:
        if not len(y):
            return torch.zeros(0, device=self._device)
        if self._plan is None:
            draw = self._by_name or self._labels == "model"
            self._plan = make_plan(self._model, self._selected, self._losses, x, y, draw)
            self._per_sample = PerSample(self._model, {}, self._losses)
        # As they are now: p.data may be another tensor than in the batch before.
        planned = self._plan.parameters
        rest = {name: p.detach() for name, p in self._selected.items() if name not in planned}
        self._per_sample.parameters = rest
        draws = self._labels == "model" and self._sample == "sequence"
        if self._by_name and not draws:
            check_labels(y, self._plan.classes)
        capture = Capture(self._plan, self._totals, sums)
        with capture.batch(len(y), known_positions(x)):
            # A model that prepares its input in place must find it as it was when it runs again.
            logits = run(self._model, mapped(x, torch.clone))
            with torch._C.DisableTorchFunction() if self._by_name else nullcontext():
                if draws:
                    y = drawn_labels(logits.detach(), y, self._generator)
                losses = self._losses(logits, y)
                total = losses.sum()
            del logits
            self._is_incomplete = True
            capture.backward(total)
        if rest:
            self._per_sample.add(mapped(x, torch.clone), y, self._totals, sums)
        self._is_incomplete = False
        if self.samples == 0:
            _check_finite(self._totals)
        self.samples += len(y)
        return losses.detach()


def _zeros(parameter: Tensor, device: torch.device) -> Tensor:
    # With the channels last, as the convolutions are read, the kernel adds to neighbours.
    last = parameter.dim() == 4 and device.type == "cpu" and parameter.device.type == "cpu"
    return torch.zeros_like(
        parameter,
        dtype=wide(parameter.dtype),
        device=device,
        requires_grad=False,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _fingerprint(parameter: Tensor) -> int:
    """Of some elements; other weights differ in nearly all."""
    flat = parameter.detach().reshape(-1)
    some = flat[:: math.ceil(max(1, flat.numel()) / 64)].double().cpu()
    return zlib.crc32(some.numpy().tobytes())


def _check_finite(totals: Mapping[str, Tensor]) -> None:
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise FloatingPointError(f"{name}: expected finite squared gradients, got inf or nan")
