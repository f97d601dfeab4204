"""Gradient release: step a parameter as its gradient arrives in the backward pass, and free that.

The gradients of a model then never stand in memory all at once. What a step of
:class:`bdu.optim.EWCSGD` or :class:`bdu.optim.EWCAdamW` does to a parameter depends on that
parameter alone, the EWC pull included, so the result is the same, bit by bit.

Source: Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited
Resources" (arXiv:2306.09782); ours are the pull and the batches of small tensors.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from bdu.ops import CheckedGrads
from bdu.optim.base import EWCOptimizer, Factors, Group, Launch, Work
from bdu.optim.checks import check_capture

SMALL = 65_536
"""A tensor of fewer elements waits for others: a launch of its own would cost more than it."""

BATCH = 2**20
"""Elements of small tensors that wait at most, before they are stepped together."""

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
_UNSCALED = Factors(clip=1.0, grad_scale=1.0, found_inf=None)
_END = object()


def release_gradients(model: nn.Module, optimizer: EWCOptimizer) -> GradientRelease:
    """Step every parameter of ``model`` as its gradient arrives, and free the gradient.

    ::

        with bdu.optim.release_gradients(model, optimizer):
            for x, y in loader:
                optimizer.zero_grad()          # finds nothing to do
                loss(model(x), y).backward()   # steps, and leaves no gradient behind
                optimizer.step()               # ends the step

    The loop stays as it is. ``step()`` also steps what still has a gradient: parameters that are
    not the model's or were thawed since. Settings, those of learning-rate schedulers among them,
    are read when a parameter is stepped. After a backward pass, and after ``step()``,
    ``optimizer.penalty`` is the sum over all parameters stepped since the ``step()`` before.

    A parameter of at least ``SMALL`` elements is stepped at once. Smaller ones wait, at most until
    they are ``BATCH`` elements together or the backward pass ends, and are stepped in one launch.
    A parameter that is used several times, or tied, is stepped once, when all of its gradient has
    arrived.

    What a failing step promises holds parameter by parameter: where a backward pass raises, those
    that were reached before stay stepped, and the next ``step()`` steps those that wait.
    ``torch.nn.utils.clip_grad_norm_`` finds no gradients, and does nothing.

    Args:
        model: its parameters that require a gradient are hooked; all have to be the optimizer's.
        optimizer: an :class:`bdu.optim.EWCSGD` or :class:`bdu.optim.EWCAdamW`, with any state.

    Returns:
        A handle: a context manager, with :meth:`GradientRelease.remove`.

    Raises:
        ValueError: another optimizer; one whose gradients are released already, that clips
            (``max_grad_norm`` needs all gradients before the first step) or has no parameter of the
            model; a parameter that requires a gradient and is in no group, whose gradient nobody
            would free; a model wrapped for several processes.

        Later, from ``backward()``, RuntimeError: a second gradient for a parameter before the next
        ``step()`` (gradient accumulation, a loop without ``step()``, or a parameter shared by two
        segments of a reentrant checkpoint); a gradient with a graph (``create_graph=True``), or one
        that something else has freed. ValueError: ``max_grad_norm`` was set in the meantime, and
        whatever a step refuses.

        From ``optimizer.step()``, RuntimeError: with a closure, or called by a ``GradScaler``. It
        is only known then that the gradients, already applied, were scaled.
    """
    return GradientRelease(model, optimizer)


class _Kept(NamedTuple):
    """Rows that were stepped together, and what they were stepped with."""

    rows: list[Tensor]
    needs: object
    launches: list[Launch]
    entries: list[Any]
    """Of the rows' state, as the tables have it."""


class GradientRelease:
    """What :func:`release_gradients` returns."""

    def __init__(self, model: nn.Module, optimizer: EWCOptimizer) -> None:
        self._optimizer = optimizer
        self._names = _checked(model, optimizer)
        self._groups: dict[Tensor, Group] = {}
        self._groups_of: list[tuple[Group, int]] = []
        self._kept: dict[Tensor, _Kept] = {}
        self._seen: set[Tensor] = set()
        self._waiting: list[Tensor] = []
        self._elements_waiting = 0
        self._penalties: list[Tensor] = []
        self._pass = -1
        self._is_left = False
        # Each device has a thread of its own in a backward pass.
        self._lock = threading.Lock()
        hook = _weakly(weakref.ref(self))
        self._handles: list[Any] = [
            p.register_post_accumulate_grad_hook(hook) for p in self._names if p.requires_grad
        ]
        # These keep the release alive as long as the optimizer; parameters do not, because a cycle
        # through their hooks would never be collected.
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def remove(self) -> None:
        """Back to the usual: the next backward pass leaves its gradients to ``step()``."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    # In a backward pass

    def _arrived(self, param: Tensor) -> None:
        with self._lock:
            self._check_arrival(param)
            self._seen.add(param)
            if self._pass != (current := torch._C._current_graph_task_id()):
                self._pass = current
                Variable._execution_engine.queue_callback(self._end_of_pass)
            if param.numel() >= SMALL:
                self._step([param])
                return
            self._waiting.append(param)
            self._elements_waiting += param.numel()
            if self._elements_waiting >= BATCH:
                self._step_waiting()

    def _check_arrival(self, param: Tensor) -> None:
        if param in self._seen:
            param.grad = None
            raise RuntimeError(
                f"grad of {self._names[param]}: expected one between two calls of "
                "optimizer.step(), got a second: with gradient release, gradients cannot be "
                "accumulated, every backward pass needs a step() after it, and a parameter that "
                "two checkpointed segments share needs use_reentrant=False"
            )
        if self._optimizer.max_grad_norm is not None:
            raise ValueError(_CLIPS.format(self._optimizer.max_grad_norm))
        if param.grad is not None and param.grad.requires_grad:
            raise RuntimeError(
                f"grad of {self._names[param]}: expected one without a graph, got one of "
                "backward(create_graph=True), which gradient release would free"
            )

    def _end_of_pass(self) -> None:
        with self._lock:
            self._step_waiting()
            self._publish_penalty()

    def _step_waiting(self) -> None:
        waiting = self._waiting
        self._stop_waiting()
        self._step(waiting)

    def _stop_waiting(self) -> None:
        self._waiting, self._elements_waiting = [], 0

    # Around optimizer.step()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            optimizer._drop_grad_scale()
            raise RuntimeError(
                "GradScaler: expected none with gradient release, got one: the gradients were "
                "stepped with, still scaled, as they arrived; the parameters are to be restored"
            )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            raise RuntimeError(
                "closure: expected None with gradient release, which steps while a backward pass "
                f"runs, got {closure!r}"
            )
        # Else step() leaves a zero on the CPU, which to add would wait for the device.
        self._is_left = any(p.grad is not None for g in optimizer.param_groups for p in g["params"])

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._is_left:
            self._penalties.append(optimizer.penalty)
        self._publish_penalty()
        for param in self._waiting:  # where the pass failed
            param.grad = None
        self._penalties = []
        self._seen.clear()
        self._stop_waiting()

    def _publish_penalty(self) -> None:
        if not self._penalties:
            return
        first = self._penalties[0]
        terms = torch.stack([p.to(first.device, torch.float64) for p in self._penalties])
        dtype = max((p.dtype for p in self._penalties), key=lambda dtype: dtype.itemsize)
        self._optimizer.penalty = terms.sum().to(dtype)

    # The step of some rows; all that can fail comes before the first is written

    @torch.no_grad()
    def _step(self, params: list[Tensor]) -> None:
        optimizer = self._optimizer
        self._look_up_groups()
        by_group: dict[int, tuple[Group, list[Tensor]]] = {}
        for param in params:
            if param.grad is None:
                raise RuntimeError(
                    f"grad of {self._names[param]}: expected the gradient that arrived, got None: "
                    "something else has freed it"
                )
            group = self._groups.get(param)
            if group is None:
                raise ValueError(f"{self._names[param]}: {_IN_NO_GROUP}")
            by_group.setdefault(id(group), (group, []))[1].append(param)
        ready: list[tuple[_Kept, list[Work]]] = []
        for group, rows in by_group.values():
            settings = optimizer._settings(group)
            kept, checked = self._prepare(group, rows)
            for launch in kept.launches:
                optimizer._require(launch, settings)
            pairs = zip(kept.launches, checked, strict=True)
            ready.append((kept, [Work(launch, own, settings) for launch, own in pairs]))
        check_capture(optimizer.param_groups)
        optimizer._clip([one for _, work in ready for one in work], 1.0)

        for kept, work in ready:
            for one in work:
                if one.launch.commit(optimizer.state):
                    self._kept[kept.rows[0]] = kept
                self._penalties.append(optimizer._launch(one, _UNSCALED))
                one.launch.is_first = False
            kept.entries[:] = self._entries_of(kept.rows)
        for param in params:
            param.grad = None

    def _prepare(self, group: Group, rows: list[Tensor]) -> tuple[_Kept, list[CheckedGrads]]:
        """Tables for these rows, those of the last time where nothing has changed, and their
        gradients, checked."""
        needs = self._optimizer._needs(group)
        kept = self._kept.get(rows[0])
        if kept is not None and (
            kept.needs == needs
            and len(kept.rows) == len(rows)
            and all(map(is_, kept.rows, rows))
            and all(map(is_, chain(self._entries_of(rows), (_END,)), chain(kept.entries, (_END,))))
        ):
            checked = self._check(kept.launches)
            if checked is not None:
                return kept, checked
        parts = self._optimizer._split(group, rows)
        launches = [self._optimizer._tabulate(group, part) for part in parts]
        checked = self._check(launches)
        assert checked is not None  # just made
        return _Kept(rows, needs, launches, []), checked

    def _check(self, launches: list[Launch]) -> list[CheckedGrads] | None:
        checked = []
        for launch in launches:
            grads = [p.grad for p in launch.rows if p.grad is not None]
            one = launch.table.check(self._optimizer._operation, grads)
            if one is None:
                return None
            checked.append(one)
        return checked

    def _entries_of(self, rows: list[Tensor]) -> list[Any]:
        state = self._optimizer.state
        return [value for p in rows if p in state for value in state[p].values()]

    def _look_up_groups(self) -> None:
        """The group that each parameter is in now: a loaded state brings new ones."""
        now = [(group, len(group["params"])) for group in self._optimizer.param_groups]
        if len(now) != len(self._groups_of) or any(
            own is not known or size != known_size
            for (own, size), (known, known_size) in zip(now, self._groups_of, strict=True)
        ):
            self._groups_of = now
            self._groups = {p: group for group, _ in now for p in group["params"]}


_CLIPS = (
    "max_grad_norm: expected None with gradient release, got {}: the norm of all gradients is not "
    "known before the last of them"
)
_IN_NO_GROUP = (
    "expected a parameter that requires a gradient to be in a group of the optimizer, or its "
    "gradient would stay"
)


def _checked(model: nn.Module, optimizer: EWCOptimizer) -> dict[Tensor, str]:
    """Name of each parameter of the model that is the optimizer's."""
    if not isinstance(optimizer, EWCOptimizer):
        raise ValueError(
            f"optimizer: expected an EWCSGD or EWCAdamW, got {type(optimizer).__name__}"
        )
    if any(
        isinstance(getattr(hook, "__self__", None), GradientRelease)
        for hook in optimizer._optimizer_step_pre_hooks.values()
    ):
        raise ValueError("optimizer: expected one whose gradients are not released already")
    if optimizer.max_grad_norm is not None:
        raise ValueError(_CLIPS.format(optimizer.max_grad_norm))
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS:
                raise ValueError(
                    f"model: expected one for a single process, got {kind.__name__}, which reduces "
                    "gradients between processes"
                )
    own = {p for group in optimizer.param_groups for p in group["params"]}
    names: dict[Tensor, str] = {}
    for name, param in model.named_parameters():
        if param in own:
            names[param] = name
        elif param.requires_grad:
            raise ValueError(f"{name}: {_IN_NO_GROUP}")
    if not names:
        raise ValueError("optimizer: expected parameters of the model, got none")
    return names


def _weakly(release: weakref.ref[GradientRelease]) -> Callable[[Tensor], None]:
    def arrived(param: Tensor) -> None:
        alive = release()
        if alive is not None:
            alive._arrived(param)

    return arrived
