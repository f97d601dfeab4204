"""Plain supervised training of an image classifier, resumable bit for bit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from bdu.checkpoint import digest, known_state, save_state
from bdu.data import as_unit_float, check_images, check_labels, check_seed
from bdu.data import augment as augmented
from bdu.models import device_of, logits_of, modes_kept

Schedule = Literal["one-cycle", "cosine", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("one-cycle", "cosine", "constant")
WARM_UP_SHARE = 0.25
STEPS_BETWEEN_CHECKS = 32


class Companion(Protocol):
    """What is trained along with a classifier, for example the maker of a trigger.

    `fit` hands it every batch, adds its loss to the classifier's, and lets it step after the
    backward pass. Its draws have to come from the generator that it is given.
    """

    def settings(self) -> dict[str, Any]:
        """Plain values; a run with other ones cannot be resumed."""
        ...

    def batch(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """The batch to train on and a loss of its own.

        Args:
            images: (N, C, H, W) float32 in [0, 1], augmented, on the classifier's device.
            labels: (N,) int64.
            generator: on the CPU; kept through a resume.

        Returns:
            Images (M, C, H, W), their labels (M,), and what is added to the cross-entropy.
        """
        ...

    def step(self, factor: float) -> None:
        """Use the gradients and clear them; factor as of learning_rate_factor."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what state_dict gave."""
        ...


def learning_rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at `step` of `steps` (0 ≤ step < steps).

    - "one-cycle": linear from near 0 to 1 in the first quarter, then linear to near 0.
    - "cosine": (1 + cos(π step / steps)) / 2.
    - "constant": 1.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    if schedule == "one-cycle":
        peak = max(1, round(WARM_UP_SHARE * steps))
        return min((step + 1) / peak, (steps - step) / (steps - peak + 1))
    raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 128,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: Schedule = "one-cycle",
    nesterov: bool = False,
    augment: bool = True,
    label_smoothing: float = 0.0,
    autocast_dtype: torch.dtype | None = None,
    channels_last: bool = True,
    seed: int,
    progress: bool = True,
    callbacks: Iterable[Callable[[dict[str, Any]], object]] = (),
    state_file: str | os.PathLike[str] | None = None,
    resume: bool = False,
    companion: Companion | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place with SGD on the cross-entropy of (x, y).

    All data are moved to the model's device at the start and become float batch by batch. Order,
    augmentation and dropout come from `seed` alone, and the global random state is left as it
    was. A last batch of one sample joins the batch before it, as batch norm needs two.

    Args:
        model: takes float images in [0, 1], (N, C, H, W), and returns logits, see
            `bdu.models.logits_of`. Every module trains during an epoch; afterwards the training
            flags are as they were.
        x: (N, C, H, W), uint8 or float in [0, 1].
        y: (N,) classes, integer.
        epochs: passes over the data, at least 1.
        lr: peak learning rate, positive.
        batch_size: samples in a step, at least 1.
        momentum: of SGD, in [0, 1).
        weight_decay: of SGD, on all parameters.
        schedule: see learning_rate_factor; stepped every batch.
        nesterov: Nesterov momentum.
        augment: random shift by up to 4 pixels (reflected) and mirroring.
        label_smoothing: in [0, 1).
        autocast_dtype: torch.bfloat16 to compute in it, None for the parameters' own type.
        channels_last: compute in that memory format; parameters are contiguous again at the end.
        seed: see above.
        progress: show a progress bar.
        callbacks: each is called with the history line after every epoch.
        state_file: where the whole state is written after every epoch, before the callbacks.
        resume: continue from state_file where it exists, otherwise start anew. On the CPU the
            weights are bit for bit those of a run that was never interrupted; on a GPU that
            takes deterministic kernels.
        companion: what is trained along; see Companion.

    Returns:
        One line an epoch, those before a resume included: epoch (from 1), step and steps (done
        and in all), loss and accuracy (means over the epoch's training batches), seconds, lr (of
        the last step).

    Raises:
        ValueError: an argument out of range, or a state_file of a run with other settings or
            other data.
        FileExistsError: there is something at state_file, and resume is False.
        FloatingPointError: a loss is NaN or infinite; names the epoch and the step (from 1).
    """
    settings: dict[str, Any] = {
        "samples": len(x),
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "nesterov": nesterov,
        "augment": augment,
        "label_smoothing": label_smoothing,
        "autocast_dtype": None if autocast_dtype is None else str(autocast_dtype),
        "channels_last": channels_last,
        "seed": check_seed(seed),
    }
    if companion is not None:
        settings["companion"] = companion.settings()
    _check_settings(settings)
    device = device_of(model)
    x, y = check_images(x).to(device), check_labels(y).to(device)
    if len(x) != len(y):
        raise ValueError(f"y: expected {len(x)} labels, as x, got {len(y)}")
    if state_file is not None:
        settings["data"] = digest([x, y])
    state = known_state(state_file, resume=resume)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
    )
    generator = torch.Generator().manual_seed(seed)
    history: list[dict[str, Any]] = []
    if state is not None:
        _check_same_run(state, settings, state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        if companion is not None:
            companion.load_state_dict(state["companion"])
        history = state["history"]
    steps = len(_batches(torch.arange(len(x)), batch_size))
    for line in history:  # of a version that did not count them
        line |= {"step": line["epoch"] * steps, "steps": epochs * steps}
    rng_devices = [device] if device.type == "cuda" else []
    callbacks = list(callbacks)
    with (
        modes_kept(model),
        _in_memory_format(model, memory_format),
        tqdm(
            total=epochs * steps,
            initial=len(history) * steps,
            disable=not progress,
            unit="step",
            dynamic_ncols=True,
        ) as bar,
    ):
        for epoch in range(len(history) + 1, epochs + 1):
            start = time.perf_counter()
            model.train()
            order = torch.randperm(len(x), generator=generator)
            dropout_seed = int(torch.randint(2**62, (), generator=generator))
            correct = torch.zeros((), dtype=torch.int64, device=device)
            loss_sum, seen = 0.0, 0
            pending: list[tuple[int, Tensor]] = []
            with torch.random.fork_rng(devices=rng_devices):
                torch.manual_seed(dropout_seed)
                for step, indices in enumerate(_batches(order, batch_size)):
                    done = (epoch - 1) * steps + step
                    factor = learning_rate_factor(schedule, done, epochs * steps)
                    step_lr = lr * factor
                    for group in optimizer.param_groups:
                        group["lr"] = step_lr
                    indices = indices.to(device)
                    images, labels = x[indices], y[indices]
                    if augment:
                        images = augmented(images, generator)
                    images = as_unit_float(images)
                    extra: Tensor | float = 0.0
                    if companion is not None:
                        images, labels, extra = companion.batch(images, labels, generator)
                    images = images.contiguous(memory_format=memory_format)
                    with torch.autocast(
                        device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None
                    ):
                        logits = logits_of(model(images))
                    loss = functional.cross_entropy(
                        logits.float(), labels, label_smoothing=label_smoothing
                    )
                    if companion is not None:
                        loss = loss + extra
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    if companion is not None:
                        companion.step(factor)
                    correct += (logits.detach().argmax(1) == labels).sum()
                    pending.append((len(labels), loss.detach()))
                    seen += len(labels)
                    # reading a loss waits for the device, so it is done for many steps at once
                    if len(pending) == STEPS_BETWEEN_CHECKS or step + 1 == steps:
                        loss_sum += _checked_sum(pending, epoch, step + 2 - len(pending))
                        bar.set_postfix(epoch=epoch, loss=f"{float(pending[-1][1]):.3f}")
                        pending = []
                    bar.update()
            line = {
                "epoch": epoch,
                "step": epoch * steps,
                "steps": epochs * steps,
                "loss": loss_sum / seen,
                "accuracy": int(correct) / seen,
                "seconds": time.perf_counter() - start,
                "lr": step_lr,
            }
            history.append(line)
            if state_file is not None:
                save_state(
                    state_file,
                    {
                        "settings": settings,
                        "model": dict(model.state_dict()),
                        "optimizer": optimizer.state_dict(),
                        "generator": generator.get_state(),
                        "history": history,
                        "companion": None if companion is None else companion.state_dict(),
                    },
                )
            for callback in callbacks:
                callback(line)
    optimizer.zero_grad(set_to_none=True)
    return history


@contextmanager
def _in_memory_format(model: nn.Module, memory_format: torch.memory_format) -> Iterator[None]:
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    try:
        yield
    finally:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _check_settings(settings: dict[str, Any]) -> None:
    for name in ("epochs", "batch_size", "samples"):
        if settings[name] < 1:
            name_shown = "x" if name == "samples" else name
            raise ValueError(f"{name_shown}: expected at least 1, got {settings[name]}")
    if not 0 < settings["lr"] < math.inf:
        raise ValueError(f"lr: expected a positive number, got {settings['lr']}")
    for name in ("label_smoothing", "momentum"):
        if not 0 <= settings[name] < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {settings[name]}")
    if not 0 <= settings["weight_decay"] < math.inf:
        raise ValueError(f"weight_decay: expected a number >= 0, got {settings['weight_decay']}")
    # float16 would need loss scaling, which this loop does not do
    if settings["autocast_dtype"] not in (None, "torch.bfloat16"):
        raise ValueError(
            f"autocast_dtype: expected torch.bfloat16 or None, got {settings['autocast_dtype']}"
        )
    learning_rate_factor(settings["schedule"], 0, 1)


def _check_same_run(
    state: Any, settings: dict[str, Any], path: str | os.PathLike[str] | None
) -> None:
    if not isinstance(state, dict) or "settings" not in state:
        raise ValueError(f"state_file: expected one that fit wrote, got {path}")
    for name, value in settings.items():
        if state["settings"].get(name) == value:
            continue
        if name == "data":
            raise ValueError(f"x, y: expected the data of the run in {path}, got others")
        raise ValueError(
            f"state_file: expected a run with {name}={value}, "
            f"got one with {name}={state['settings'].get(name)} in {path}"
        )


def _batches(order: Tensor, batch_size: int) -> list[Tensor]:
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _checked_sum(pending: list[tuple[int, Tensor]], epoch: int, first_step: int) -> float:
    losses = torch.stack([loss for _, loss in pending]).tolist()
    for step, loss in enumerate(losses, first_step):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss: expected a finite value, got {loss} in epoch {epoch}, step {step}; "
                "try a smaller lr"
            )
    return sum(count * loss for (count, _), loss in zip(pending, losses, strict=True))
