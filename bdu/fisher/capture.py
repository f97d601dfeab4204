"""One forward and one backward of a batch, and every layer's squared gradients out of them.

The model's parameters require no gradient meanwhile, so autograd computes none. Each call that
plan.py chose gets a tap: an identity in autograd's graph that holds the layer's input and is handed
the gradient of its output. The input is saved as autograd's own tensors are: freed as the backward
goes on, and recomputed where the model checkpoints its activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdu import dispatch
from bdu.fisher.calls import Call, Watch, backward
from bdu.fisher.contributions import (
    Contribution,
    Rows,
    TiedTable,
    Tokens,
    add_squares,
    add_weight_and_bias,
    joined_rows,
)
from bdu.fisher.layout import Layout


@dataclass(frozen=True)
class Plan:
    """What is captured.

    Attributes:
        parameters: name → parameter, of those that taps give.
        layouts: (kind of call, name) → where the samples are.
        others: (name, function) that a parameter was given to besides, without effect on the loss.
        classes: of the model's logits.
    """

    parameters: Mapping[str, nn.Parameter]
    layouts: Mapping[tuple[str, str], Layout]
    classes: int
    others: frozenset[tuple[str, Any]] = frozenset()


class Capture:
    """Adds squared per-sample gradients to totals, batch by batch.

    Args:
        plan: what plan.py found.
        totals: name → tensor of the parameter's shape, on any device; added to.
        gradients: likewise, for the sum of the gradients themselves; None: not wanted.
    """

    def __init__(
        self,
        plan: Plan,
        totals: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._plan, self._totals, self._gradients = plan, totals, gradients
        # A backward on a device runs in another thread, which knows nothing of this one's choice.
        self._backend = dispatch.forced_backend()
        names = {id(p): name for name, p in plan.parameters.items()}
        self._watch = Watch(names, self._seen, self._refuse_other)

    @contextmanager
    def batch(self, samples: int, positions: set[int]) -> Iterator[None]:
        """Watch a forward of so many samples; `positions`: counts that its input has."""
        self._samples, self._positions = samples, set(positions)
        self._in_backward = False
        self._root: Tensor | None = None
        self._uses: dict[str, list[type[Contribution]]] = {}
        self._tokens: dict[str, list[Tokens]] = {}
        self._waiting: dict[str, list[Contribution]] = {}
        self._tables: dict[str, TiedTable] = {}
        self._waiting_rows: dict[str, list[Rows]] = {}
        self._received: Counter[str] = Counter()
        with self._watch:
            yield

    def backward(self, total: Tensor) -> None:
        """Differentiate down to the first taps, which do the work."""
        if self._root is None:
            return
        self._in_backward = True
        backward([total], inputs=[self._root])
        for name in list(self._waiting):  # some uses have no influence on the loss
            self._add(name, self._waiting.pop(name))
        for name, table in self._tables.items():
            if rows := self._waiting_rows.pop(name, None):
                total, gradient = self._working(name)
                table.add_rows(total, gradient, joined_rows(rows))
                self._keep(name, total, gradient)
            self._finish(name, table)

    def _seen(self, call: Call, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return output
        names = list(call.names.values())
        if (call.kind, names[0]) not in self._plan.layouts:
            shown = ", ".join(names)
            raise RuntimeError(
                f"{shown}: expected the uses of the first batch, got another: {call.kind}"
            )
        layout = self._plan.layouts[call.kind, names[0]]
        if layout.is_repeated:
            output = repeated(output, self._samples, layout.leads)
        elif not layout.fits(output.shape, call.positions, self._samples, self._positions):
            raise RuntimeError(
                f"{', '.join(names)}: expected {self._samples} samples in axis {layout.axis} "
                f"({layout.order}), as in the first batch, got {tuple(output.shape)}"
            )
        elif not layout.is_folded and call.kind != "conv":
            others = [
                n for axis, n in enumerate(output.shape[: call.positions]) if axis != layout.axis
            ]
            self._positions.add(int(torch.Size(others).numel()))
        if not self._in_backward:
            for role, kind in call.kinds().items():
                self._uses.setdefault(call.names[role], []).append(kind)
            if call.kind == "embedding":
                assert call.activations is not None
                found = call.contributions(call.activations, output.detach(), layout, self._samples)
                (tokens,) = found.values()
                assert isinstance(tokens, Tokens)
                self._tokens.setdefault(names[0], []).append(
                    Tokens(tokens.indices, None, tokens.padding_idx)
                )
        if self._root is None:
            self._root = torch.zeros((), device=output.device, requires_grad=True)
        if output._is_view():
            output = output.clone()
        # what a checkpoint recomputes is tapped only so that it saves the same tensors
        receiver = None if self._in_backward else (self, call, layout)
        saved = () if call.activations is None else (call.activations.detach(),)
        # The graph's nodes live until the backward ends; what they saved is freed as it goes.
        call.activations = None
        return _Tap.apply(output, self._root, receiver, *saved)

    def _refuse_other(self, name: str, function: Any) -> None:
        if torch.is_grad_enabled() and (name, function) not in self._plan.others:
            shown = getattr(function, "__name__", function)
            raise RuntimeError(
                f"{name}: expected the uses of the first batch, got another: {shown}"
            )

    @property
    def is_in_backward(self) -> bool:
        """Whether gradients that arrive are those of the samples' losses."""
        return self._in_backward

    def receive(
        self, call: Call, layout: Layout, activations: Tensor | None, gradients: Tensor
    ) -> None:
        """Take the gradients of a call's output."""
        # nothing in here is the model's
        forced = nullcontext() if self._backend is None else dispatch.use_backend(self._backend)
        device = gradients.device.type
        is_cast = torch.is_autocast_enabled(device)
        uncast = torch.autocast(device, enabled=False) if is_cast else nullcontext()
        with forced, torch._C.DisableTorchFunction(), uncast:
            found = call.contributions(activations, gradients, layout, self._samples)
            if call.is_pair and all(len(self._uses[name]) == 1 for name in call.names.values()):
                self._add_pair(call.names["weight"], call.names["bias"], found["weight"])
                return
            for role, use in found.items():
                self._receive(call.names[role], use)

    def _receive(self, name: str, use: Contribution) -> None:
        kinds = self._uses[name]
        self._received[name] += 1
        if len(kinds) == 1:
            self._add(name, [use])
            return
        if Rows in kinds and Tokens in kinds:
            self._receive_tied(name, use)
            return
        waiting = self._waiting.setdefault(name, [])
        waiting.append(use)
        if len(waiting) == len(kinds):
            self._add(name, self._waiting.pop(name))

    def _receive_tied(self, name: str, use: Contribution) -> None:
        total, gradient = self._working(name)
        if name not in self._tables:
            outputs, inputs = total.shape
            self._tables[name] = TiedTable(self._tokens[name], outputs, inputs, total)
        table = self._tables[name]
        if isinstance(use, Tokens):
            table.add_tokens(gradient, use)
        elif isinstance(use, Rows):
            rows = self._waiting_rows.setdefault(name, [])
            rows.append(use)
            if len(rows) == self._uses[name].count(Rows):
                table.add_rows(total, gradient, joined_rows(self._waiting_rows.pop(name)))
        self._keep(name, total, gradient)
        if self._received[name] == len(self._uses[name]):
            self._finish(name, self._tables.pop(name))

    def _finish(self, name: str, table: TiedTable) -> None:
        total, gradient = self._working(name)
        table.finish(total)
        self._keep(name, total, gradient)

    def _add(self, name: str, uses: list[Contribution]) -> None:
        total, gradient = self._working(name)
        add_squares(total, gradient, uses)
        self._keep(name, total, gradient)

    def _add_pair(self, weight: str, bias: str, use: Contribution) -> None:
        (total, gradient), (other, other_gradient) = self._working(weight), self._working(bias)
        add_weight_and_bias((total, other), (gradient, other_gradient), use)
        self._keep(weight, total, gradient)
        self._keep(bias, other, other_gradient)

    def _working(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The total and the gradient, or zeros beside the parameter where they are elsewhere."""
        device = self._plan.parameters[name].device
        found: list[Tensor | None] = []
        for kept in (self._totals, self._gradients):
            own = None if kept is None else kept[name]
            if own is not None and own.device != device:
                own = torch.zeros_like(own, device=device)
            found.append(own)
        assert found[0] is not None
        return found[0], found[1]

    def _keep(self, name: str, total: Tensor, gradient: Tensor | None) -> None:
        for kept, own in ((self._totals, total), (self._gradients, gradient)):
            if kept is not None and own is not None and own is not kept[name]:
                kept[name].add_(own.to(kept[name].device))


def repeated(output: Tensor, samples: int, leads: bool) -> Tensor:
    """The output of a call that knows no samples, once for each sample, in front."""
    if leads:
        output = output[0]
    return output.expand(samples, *output.shape).clone()


class _Tap(torch.autograd.Function):
    """The identity. `root` requires a gradient, so the graph starts at the first tap."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor, receiver: Any, *saved: Tensor) -> Tensor:
        ctx.receiver, ctx.is_used = receiver, False
        ctx.save_for_backward(*saved)
        ctx.mark_dirty(output)  # the same tensor: nothing is copied
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, gradients: Tensor | None) -> tuple[Any, ...]:
        # A model may differentiate something of its own on the way.
        if gradients is not None and ctx.receiver is not None and ctx.receiver[0].is_in_backward:
            capture, call, layout = ctx.receiver
            if ctx.is_used:
                raise RuntimeError(
                    f"{', '.join(call.names.values())}: expected one backward through the layer, "
                    "got another, from inside the model"
                )
            ctx.is_used = True
            try:
                saved = ctx.saved_tensors
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                names = ", ".join(call.names.values())
                raise RuntimeError(
                    f"{names}: the layer's input was changed in place afterwards"
                ) from error
            capture.receive(call, layout, saved[0] if saved else None, gradients)
        return (gradients, *[None] * (len(ctx.needs_input_grad) - 1))
