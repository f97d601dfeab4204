"""Which parameters the layers' formulas give exactly, found by trying the model on two samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bdu.fisher.calls import Call, Watch
from bdu.fisher.capture import Plan, repeated
from bdu.fisher.contributions import Unjoinable, check_joinable
from bdu.fisher.layout import Layout, candidates
from bdu.fisher.likelihood import Loss, drawn_labels
from bdu.fisher.model import known_positions, mapped, random_states, rows_of, run

# Images are squared image by image, so their batch has to be the first axis, alone.
_IN_FRONT = ("conv", "group_norm", "batch_norm", "copies")


@dataclass
class _Trial:
    calls: list[tuple[Call, Tensor]]
    logits: Tensor
    losses: Tensor
    leaks: bool  # whether the loss has parameters of its own
    others: frozenset[tuple[str, Any]]  # (name, function that no rule knows)


def make_plan(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    losses: Loss,
    x: Any,
    y: Tensor,
    draw: bool,
) -> Plan:
    """Choose the parameters whose every use is a call that calls.py knows, laid out by sample.

    Two runs, of one sample and of two, show where the samples are; their graph shows that nothing
    else uses the parameter; and the gradients of the first sample's loss show that no sample
    reaches another.

    Raises:
        ValueError: the model or the loss mixes samples, draws random numbers, or has no gradient.
    """
    by_id = {id(p): name for name, p in selected.items()}
    for parameter in selected.values():
        parameter.requires_grad_()
    attempt = partial(_attempt, model, by_id, losses, x, y, draw)

    before = random_states(model)
    one, two = attempt(1), attempt(2)
    if not all(map(torch.equal, before, random_states(model))):
        raise ValueError("model: expected no random numbers in its forward, got some drawn")
    if two.losses.grad_fn is None:
        raise ValueError("loss: expected a function of the model's parameters, got one detached")

    if two.leaks:
        raise ValueError(
            "loss: expected a function of logits and y alone, got one that uses parameters"
        )
    layouts = _layouts(one, two, known_positions(x))
    edges = _edges(two.losses.grad_fn)
    counts = Counter(name for call, _ in two.calls for name in call.names.values())
    idle = _idle(two)
    names = {
        name
        for name, parameter in selected.items()
        if counts[name] == edges[id(parameter)] > 0
        and name not in idle
        and _is_complete(name, two, layouts)
    }
    unbatched = {key for key, layout in layouts.items() if layout and layout.is_repeated}
    if any(name in names for _, name in unbatched):
        tapped = _with_repetition(attempt, layouts, two)
        if tapped is None:
            names -= {name for _, name in unbatched}
        else:
            two = tapped
    _refuse_mixing(two, layouts, names)
    second = attempt(1, first=1)
    for own, trial in enumerate((one, second)):
        _refuse_other_logits(trial.logits, two.logits[own : own + 1])
    for parameter in selected.values():
        parameter.requires_grad_(False)
    return Plan(
        {name: p for name, p in selected.items() if name in names},
        {key: layout for key, layout in layouts.items() if layout and key[1] in names},
        two.logits.shape[-1],
        two.others,
    )


def _attempt(
    model: nn.Module,
    by_id: Mapping[int, str],
    losses: Loss,
    x: Any,
    y: Tensor,
    draw: bool,
    size: int,
    change: Callable[[Call, Tensor], Tensor] = lambda call, output: output,
    first: int = 0,
) -> _Trial:
    calls: list[tuple[Call, Tensor]] = []
    others: set[tuple[str, Any]] = set()

    def seen(call: Call, output: Tensor) -> Tensor:
        output = change(call, output)
        call.activations = None
        calls.append((call, output))
        return output.clone()  # an in-place activation may follow

    rows = [min(i, len(y) - 1) for i in range(first + size)]
    x_trial, labels = rows_of(x, rows), y[rows]
    if len(y) == 1 < len(rows):  # a sample unlike the first, to tell their positions apart
        x_trial = mapped(x_trial, _second_reversed)
    x_trial, labels = rows_of(x_trial, slice(first, None)), labels[first:]
    with Watch(by_id, seen, lambda name, function: others.add((name, function))):
        logits = run(model, mapped(x_trial, torch.clone))
    if draw:
        labels = drawn_labels(logits.detach(), labels, torch.Generator())
    leaks = losses(logits.detach(), labels).requires_grad
    return _Trial(calls, logits, losses(logits, labels), leaks, frozenset(others))


def _second_reversed(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:1], tensor[1:].flip(-1)]) if tensor.dim() > 1 else tensor


def _layouts(one: _Trial, two: _Trial, positions: set[int]) -> dict[tuple[str, str], Layout | None]:
    """(kind of call, name) → the layout of all such calls; None: none, or not one alone."""
    found: dict[tuple[str, str], Layout | None] = {}
    matched = len(one.calls) == len(two.calls)
    known = set(positions)
    for (call, output), (_, small) in zip(two.calls, one.calls, strict=False):
        layout = _layout(call, small, output, known) if matched else None
        for name in call.names.values():
            key = (call.kind, name)
            found[key] = layout if found.get(key, layout) == layout else None
    return found if matched else {key: None for key in found}


def _layout(call: Call, one: Tensor, two: Tensor, known: set[int]) -> Layout | None:
    if call.kind == "embedding" and one.shape == two.shape and one.dim() <= 3:
        return Layout(0, "repeated", leads=two.shape[:1] == (1,))
    possible = candidates(one.shape, two.shape, call.positions)
    possible = [p for p in possible if p.fits(two.shape, call.positions, 2, known)]
    if len(possible) > 1:
        tolerance = torch.finfo(one.dtype).eps ** 0.5
        possible = [
            layout
            for layout in possible
            if torch.allclose(layout.one_sample(two, 2, 0), one, tolerance, tolerance)
        ]
    if len(possible) != 1:
        return None
    (layout,) = possible
    if call.kind in _IN_FRONT and layout != Layout(0):
        return None
    if not layout.is_folded and call.kind != "conv":
        others = [n for axis, n in enumerate(two.shape[: call.positions]) if axis != layout.axis]
        known.add(int(torch.Size(others).numel()))
    return layout


def _is_complete(
    name: str, trial: _Trial, layouts: Mapping[tuple[str, str], Layout | None]
) -> bool:
    """Whether all calls with this parameter are laid out, and can be joined."""
    calls = [call for call, _ in trial.calls if name in call.names.values()]
    kinds = [
        kind for call in calls for role, kind in call.kinds().items() if call.names[role] == name
    ]
    groups = max(call.settings.get("groups", 1) for call in calls)
    try:
        check_joinable(kinds, groups)
    except Unjoinable:
        return False
    return all(layouts.get((call.kind, name)) is not None for call in calls)


def _with_repetition(
    attempt: Callable[..., _Trial],
    layouts: Mapping[tuple[str, str], Layout | None],
    plain: _Trial,
) -> _Trial | None:
    """The run with the outputs that know no samples repeated, or None if that is another model."""

    def change(call: Call, output: Tensor) -> Tensor:
        layout = layouts[call.kind, next(iter(call.names.values()))]
        if layout is None or not layout.is_repeated:
            return output
        return repeated(output, 2, layout.leads)

    try:
        trial = attempt(2, change)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return None  # shapes that no longer fit, whoever says so
    tolerance = torch.finfo(trial.logits.dtype).eps ** 0.5
    same = trial.logits.shape == plain.logits.shape and torch.allclose(
        trial.logits, plain.logits, tolerance, tolerance, equal_nan=True
    )
    return trial if same else None


def _idle(trial: _Trial) -> set[str]:
    """Parameters with a call whose output has no influence on the losses: another use may hide
    behind it where edges are counted."""
    found = [(call, output) for call, output in trial.calls if output.requires_grad]
    outputs = [output for _, output in found]
    gradients: Sequence[Tensor | None] = ()
    if outputs:
        gradients = torch.autograd.grad(
            trial.losses.sum(), outputs, allow_unused=True, retain_graph=True
        )
    used = {id(call) for (call, _), g in zip(found, gradients, strict=True) if g is not None}
    return {name for call, _ in trial.calls if id(call) not in used for name in call.names.values()}


def _refuse_other_logits(alone: Tensor, beside: Tensor) -> None:
    """Raise ValueError if a sample's logits are others beside another sample."""
    alone, beside = alone.detach(), beside.detach()
    if alone.shape != beside.shape:  # padded to another length, for one
        return
    tolerance = torch.finfo(alone.dtype).eps ** 0.5
    finite = alone[torch.isfinite(alone)].abs()
    scale = float(finite.max()) if len(finite) else 0.0
    if not torch.allclose(alone, beside, tolerance, tolerance * scale, equal_nan=True):
        difference = float((alone - beside).abs().max())
        raise ValueError(
            "model: expected samples that do not depend on each other or on chance, got logits of "
            f"one that differ by {difference:g} beside another"
        )


def _refuse_mixing(
    trial: _Trial, layouts: Mapping[tuple[str, str], Layout | None], names: set[str]
) -> None:
    """Raise ValueError if the loss of a sample depends on the other."""
    tapped = [
        (call, output, layout)
        for call, output in trial.calls
        for layout in [layouts[call.kind, next(iter(call.names.values()))]]
        if layout is not None and names.issuperset(call.names.values())
    ]
    inputs = [trial.logits, *(output for _, output, _ in tapped)]
    places = [("loss", Layout(0)), *(("model", layout) for _, _, layout in tapped)]
    who = ["", *(", ".join(call.names.values()) for call, _, _ in tapped)]
    for own in (0, 1):
        gradients = torch.autograd.grad(
            trial.losses[own], inputs, allow_unused=True, retain_graph=own == 0
        )
        for (what, layout), gradient, call in zip(places, gradients, who, strict=True):
            if gradient is None:
                continue
            other = layout.one_sample(gradient, 2, 1 - own)
            # what is not finite says nothing
            if bool(((other != 0) & torch.isfinite(other)).any()):
                where = f" through {call}" if call else ""
                raise ValueError(
                    f"{what}: expected samples that do not depend on each other, "
                    f"got one whose loss depends on another{where}"
                )


def _edges(root: Any) -> Counter[int]:
    """Count the edges that lead into every leaf tensor of an autograd graph, by id."""
    edges: Counter[int] = Counter()
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node.name() == "CheckpointFunctionBackward":
                raise ValueError(
                    "model: expected activation checkpoints with use_reentrant=False, got True, "
                    "whose gradients torch gives to whole backward passes only"
                )
            if hasattr(node, "variable"):
                edges[id(node.variable)] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return edges
