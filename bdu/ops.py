"""The operations, checked once and sent to the backend that serves them.

The tensors that one launch walks over stand in a :class:`ParameterTable`: columns (parameter,
moments, Fisher, anchor), one row a parameter. Building it checks every row thoroughly; a step then
only looks at what may differ from the last one: the gradients, and where everything lies.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bdu import cuda, dispatch, native, quantization, reference
from bdu.reference import Mode
from bdu.rounding import Rounding

SGD_COLUMNS = ("momentum_buffer", "fisher", "anchor", "fisher_scale")
ADAMW_COLUMNS = ("exp_avg", "exp_avg_sq", "fisher", "anchor", "fisher_scale")

_DTYPE = attrgetter("dtype")
_IN_8_BITS = frozenset(quantization.CODES.values())


def is_8_bits(fisher: Tensor | None) -> bool:
    """Whether a Fisher is the codes of :mod:`bdu.quantization`."""
    return fisher is not None and fisher.dtype in _IN_8_BITS


def lay_out_like(tensor: Tensor, param: Tensor) -> Tensor:
    """``tensor`` with its elements in memory in the order that ``param``'s table row has.

    That order is ``torch.empty_like(param)``'s: the parameter's own where it is dense (whatever its
    memory format), and without gaps or overlaps where it has some. Returns ``tensor`` itself where
    it already lies so.

    Raises:
        ValueError: the shapes differ.
    """
    if tensor.shape != param.shape:
        raise ValueError(f"tensor: expected {describe(param)}, got {describe(tensor)}")
    return _lay_out(tensor, param, _row_strides(param))


def _lay_out(tensor: Tensor, param: Tensor, strides: Sequence[int]) -> Tensor:
    # A negated view keeps the sign outside of the memory.
    if _same_order(tensor, strides) and not tensor.is_neg():
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _row_strides(param: Tensor) -> tuple[int, ...]:
    return (
        param.stride() if param.is_contiguous() else torch.empty_like(param, device="meta").stride()
    )


def _same_order(tensor: Tensor, strides: Sequence[int]) -> bool:
    if tensor.numel() == 0 or tensor.stride() == strides:
        return True
    # The stride of a dimension of size 1 means nothing, and torch does not keep it tidy.
    return all(
        size == 1 or own == canonical
        for size, own, canonical in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


def _may_overlap_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def describe(tensor: Tensor) -> str:
    """Shape and device as the error messages name them: ``(3, 5) on cuda:0``."""
    return f"{tuple(tensor.shape)} on {tensor.device}"


class CheckedGrads(NamedTuple):
    """Gradients that :meth:`ParameterTable.check` found to fit, laid out like their rows."""

    backend: str
    tensors: Sequence[Tensor]
    address: native.Addresses
    dtype_code: native.DtypeCodes | None  # for cpp and cuda, where one differs from the parameter's
    table: ParameterTable


class ParameterTable:
    """The rows of one launch: parameters of one device with their state, checked.

    Args:
        params: parameters or tensors to be stepped in place; floating, strided, any shape. They
            share no memory: all rows are written at once.
        columns: name → one tensor (or None) a parameter, of the parameter's shape and device and
            laid out like it (:func:`lay_out_like`); any dtype a backend serves. A Fisher may be in
            8 bits (:mod:`bdu.quantization`), with its "fisher_scale".
        names: what to call each parameter in an error.
        watched: other tensors that outdate the table when they move.
        first_elements: the number of each parameter's first element, for stochastic rounding; None:
            counted over ``params``.

    Raises:
        ValueError: a tensor's shape, device or layout differs from its parameter's, it is not
            floating, or parameters overlap. Nothing has been written then.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        columns: Mapping[str, Sequence[Tensor | None]],
        names: Sequence[str] | None = None,
        *,
        watched: Sequence[Tensor] = (),
        first_elements: Sequence[int] | None = None,
    ) -> None:
        self.params = list(params)
        self.names = (
            list(names) if names is not None else [f"params[{i}]" for i in range(len(params))]
        )
        self.columns = {name: list(column) for name, column in columns.items()}
        if "fisher_scale" not in self.columns:
            self.columns["fisher_scale"] = [None] * len(self.params)
        self.device = self.params[0].device if self.params else torch.device("cpu")
        for row, param in enumerate(self.params):
            self._check_param(row, param)
        self._strides = [_row_strides(p) for p in self.params]
        for name, column in self.columns.items():
            for row, tensor in enumerate(column):
                if tensor is not None:
                    self._check_entry(name, row, tensor)
        self._check_separate()
        ends = accumulate((p.numel() for p in self.params), initial=0)
        self.first_elements = list(ends)[:-1] if first_elements is None else list(first_elements)

        # A parameter with gaps is stepped in a dense copy that is copied back.
        self._dense = [
            p if _same_order(p, strides) else torch.empty_like(p)
            for p, strides in zip(self.params, self._strides, strict=True)
        ]
        self._staged = [row for row, p in enumerate(self.params) if self._dense[row] is not p]

        moments = [
            t
            for name in self.columns
            if name not in ("fisher", "anchor", "fisher_scale")
            for t in self.columns[name]
            if t is not None
        ]
        fishers = [t for t in self.columns["fisher"] if t is not None]
        state = [t for column in self.columns.values() for t in column if t is not None]
        # Addresses go stale behind the table's back, so a step looks at every tensor again.
        self._watch = native.survey([*self.params, *state, *watched])
        self._rows = native.survey(self._dense)
        self._single = [row for row, p in enumerate(self.params) if p.numel() == 1]
        # All backends take a Fisher in 8 bits.
        self.dtypes = frozenset(map(_DTYPE, (*self.params, *state))) - _IN_8_BITS
        self._in_8_bits = next(
            (n for n, f in zip(self.names, self.columns["fisher"], strict=True) if is_8_bits(f)),
            None,
        )
        self._written = [t for t in (*self._dense, *moments) if not t.is_inference()]
        self._written_fisher = [t for t in fishers if not t.is_inference()]
        self._native: tuple[native.Addresses, native.DtypeCodes, native.Addresses] | None = None
        self._on_device: cuda.DeviceTable | None = None
        self._gaps = {name: self._first_gap(column) for name, column in self.columns.items()}
        self._unanchored = next(
            (
                name
                for name, fisher, anchor in zip(
                    self.names, self.columns["fisher"], self.columns["anchor"], strict=True
                )
                if fisher is not None and anchor is None
            ),
            None,
        )

    def _check_param(self, row: int, param: Tensor) -> None:
        name = self.names[row]
        if param.layout != torch.strided or not param.is_floating_point():
            kind = str(param.layout) if param.layout != torch.strided else str(param.dtype)
            raise ValueError(f"{name}: expected a dense floating-point tensor, got {kind}")
        if param.device != self.device:
            raise ValueError(f"{name}: expected a tensor on {self.device}, got {describe(param)}")
        if param.numel() > 0 and _may_overlap_itself(param):
            raise ValueError(
                f"{name}: expected elements that lie apart in memory, got strides {param.stride()} "
                f"for shape {tuple(param.shape)}"
            )
        self._check_memory(name, param)

    def _check_entry(self, column: str, row: int, tensor: Tensor) -> None:
        param, name = self.params[row], f"{column} of {self.names[row]}"
        fisher = self.columns["fisher"][row]
        if column == "fisher_scale":
            self._check_scale(name, fisher, tensor)
            return
        if column == "fisher" and is_8_bits(tensor):
            if self.columns["fisher_scale"][row] is None:
                raise ValueError(f"fisher_scale of {self.names[row]}: expected one, got None")
        elif tensor.layout != torch.strided or not tensor.is_floating_point():
            kind = str(tensor.layout) if tensor.layout != torch.strided else str(tensor.dtype)
            raise ValueError(f"{name}: expected a dense floating-point tensor, got {kind}")
        if tensor.shape != param.shape or tensor.device != param.device:
            raise ValueError(f"{name}: expected {describe(param)}, got {describe(tensor)}")
        if not _same_order(tensor, self._strides[row]):
            raise ValueError(
                f"{name}: expected strides {self._strides[row]}, got {tensor.stride()}"
            )
        self._check_memory(name, tensor)

    def _check_scale(self, name: str, fisher: Tensor | None, scale: Tensor) -> None:
        if fisher is None or not is_8_bits(fisher):
            raise ValueError(f"{name}: expected None without a fisher in 8 bits, got a tensor")
        blocks = quantization.blocks_of(fisher)
        if (
            scale.dtype != torch.bfloat16
            or scale.shape != (blocks,)
            or scale.device != fisher.device
            or not scale.is_contiguous()
        ):
            raise ValueError(
                f"{name}: expected ({blocks},) contiguous torch.bfloat16 on {fisher.device}, got "
                f"{describe(scale)}, {scale.dtype}"
            )

    def _check_memory(self, name: str, tensor: Tensor) -> None:
        """A wrapper (DTensor, FakeTensor) or a tensor whose storage was freed has no address."""
        if tensor.is_neg():
            raise ValueError(f"{name}: expected a plain tensor, got a negated view")
        if tensor.numel() > 0 and tensor.data_ptr() == 0:
            raise ValueError(
                f"{name}: expected a tensor with memory of its own, got a {type(tensor).__name__} "
                "without"
            )

    def _check_separate(self) -> None:
        """Rows are written side by side: one that is there twice would be a race."""
        spans = []
        for row, p in enumerate(self.params):
            if p.numel() == 0:
                continue
            last = sum(
                stride * (size - 1) for stride, size in zip(p.stride(), p.shape, strict=True)
            )
            gaps = not _same_order(p, self._strides[row])
            spans.append((p.data_ptr(), p.data_ptr() + (last + 1) * p.element_size(), gaps, row))
        spans.sort()
        for (begin, end, gaps, row), (next_begin, _, next_gaps, next_row) in pairwise(spans):
            # Two views with gaps may interleave without sharing an element.
            if next_begin < end and not (gaps and next_gaps and next_begin != begin):
                raise ValueError(
                    f"{self.names[row]}, {self.names[next_row]}: expected parameters that lie "
                    "apart in memory, got two that overlap"
                )

    @staticmethod
    def _first_gap(column: Sequence[Tensor | None]) -> int | None:
        return next((row for row, tensor in enumerate(column) if tensor is None), None)

    def check(self, operation: str, grads: Sequence[Tensor]) -> CheckedGrads | None:
        """Everything that can fail in a step on this table, before anything is written.

        Args:
            operation: the name of the step.
            grads: one a row, of the row's shape and device; any floating dtype and layout.

        Returns:
            What to hand to the operation, or None where a tensor of the table was moved or changed
            its shape or dtype: the table has to be made anew then.

        Raises:
            ValueError: a gradient is sparse, complex or without memory, or its shape or device is
                not its parameter's.
            RuntimeError: no backend serves this device and these dtypes, or a forced one is absent.
        """
        if len(grads) != len(self.params):
            raise ValueError(f"grads: expected {len(self.params)} tensors, got {len(grads)}")
        if not self._watch.is_current():
            return None
        dtypes = self.dtypes
        address = np.empty(len(grads), dtype=np.int64)
        # Autograd gives negated views to parameters that complex numbers are made of. They have
        # strides of their own, except where there is but one element.
        fit = self._rows.fit(grads, address) and not any(
            grads[row].is_neg() for row in self._single
        )
        if not fit:
            grads = [self._lay_out_grad(row, grad) for row, grad in enumerate(grads)]
            dtypes = dtypes.union(map(_DTYPE, grads))
            address = native.addresses(grads)
        if not address.all():
            for name, grad in zip(self.names, grads, strict=True):
                self._check_memory(f"grad of {name}", grad)
        backend = dispatch.choose(operation, self.device.type, dtypes)
        codes = native.dtype_codes(grads) if backend in ("cpp", "cuda") and not fit else None
        return CheckedGrads(backend, grads, address, codes, self)

    def _lay_out_grad(self, row: int, grad: Tensor) -> Tensor:
        param, name = self.params[row], self.names[row]
        if grad.layout != torch.strided:
            raise ValueError(f"grad of {name}: expected a dense tensor, got {grad.layout}")
        if grad.shape != param.shape or grad.device != param.device:
            raise ValueError(f"grad of {name}: expected {describe(param)}, got {describe(grad)}")
        if not grad.is_floating_point():
            raise ValueError(f"grad of {name}: expected a floating dtype, got {grad.dtype}")
        return _lay_out(grad, param, self._strides[row])

    # What follows is for the operations below.

    def require(self, column: str, reason: str) -> None:
        """Raise where a row has nothing in this column."""
        gap = self._gaps[column]
        if gap is not None:
            raise ValueError(f"{column} of {self.names[gap]}: expected a tensor {reason}, got None")

    def require_anchors(self) -> None:
        """Raise where a row has a Fisher and no anchor."""
        if self._unanchored is not None:
            raise ValueError(
                f"anchor of {self._unanchored}: expected one to go with its fisher, got None"
            )

    def load_staged(self) -> None:
        """Copy parameters with gaps into their dense stand-ins."""
        for row in self._staged:
            self._dense[row].copy_(self.params[row])

    def store_staged(self) -> None:
        """Copy the dense stand-ins back."""
        for row in self._staged:
            self.params[row].copy_(self._dense[row])

    def require_floating_fisher(self) -> None:
        """Raise where a row's Fisher cannot be averaged."""
        if self._in_8_bits is not None:
            raise ValueError(
                f"fisher of {self._in_8_bits}: expected a floating dtype with batch_fisher_decay, "
                "got 8 bits"
            )

    def lists(self, grads: Sequence[Tensor], *, dequantized: bool) -> list[Sequence[Tensor | None]]:
        """Parameters, gradients and the other columns but F's scale, as the reference takes them.

        Args:
            grads: one a row.
            dequantized: F in float32 where it is in 8 bits.
        """
        columns = {name: c for name, c in self.columns.items() if name != "fisher_scale"}
        if dequantized and self._in_8_bits is not None:
            columns["fisher"] = [
                quantization.dequantize(fisher, scale)
                if fisher is not None and scale is not None
                else fisher
                for fisher, scale in zip(
                    columns["fisher"], self.columns["fisher_scale"], strict=True
                )
            ]
        return [self._dense, grads, *columns.values()]

    def native_arrays(
        self, checked: CheckedGrads
    ) -> tuple[native.Addresses, native.DtypeCodes, native.Addresses]:
        """Addresses and dtype codes (columns, n) and element counts (n,) for the compiled part."""
        if self._native is None:
            columns: list[Sequence[Tensor | None]] = [self._dense, self._dense]
            columns += self.columns.values()
            shape = (len(columns) + 1, len(self.params))
            address, code = np.zeros(shape, np.int64), np.zeros(shape, np.uint8)
            address[-1] = self.first_elements
            for row, column in enumerate(columns):
                there = [i for i, tensor in enumerate(column) if tensor is not None]
                present = [tensor for tensor in column if tensor is not None]
                address[row, there] = native.addresses(present)
                code[row, there] = native.dtype_codes(present)
            numel = np.array([p.numel() for p in self.params], dtype=np.int64)
            self._native = address, code, numel
        address, code, numel = self._native
        address[1] = checked.address
        if checked.dtype_code is not None:
            code = code.copy()
            code[1] = checked.dtype_code
        return address, code, numel

    def on_device(self, checked: CheckedGrads) -> cuda.DeviceTable:
        """The same where a launch on the device reads it, sent again as far as it has changed."""
        address, code, numel = self.native_arrays(checked)
        if self._on_device is None or not self._on_device.fits(code):
            self._on_device = cuda.DeviceTable(address, code, numel, self.device)
        self._on_device.send_grads(checked.address)
        return self._on_device

    def bump_versions(self, wrote_fisher: bool) -> None:
        """Tell autograd of writes behind its back, or it returns silently wrong gradients."""
        torch.autograd.graph.increment_version(self._written)
        if wrote_fisher:
            torch.autograd.graph.increment_version(self._written_fisher)


def ewc_sgd_step(
    table: ParameterTable,
    grads: Sequence[Tensor] | CheckedGrads,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    ewc_lambda: float = 0.0,
    mode: Mode = "proximal",
    clip: float | Tensor = 1.0,
    grad_scale: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
    batch_fisher_decay: float | None = None,
    rounding: Rounding | None = None,
) -> Tensor:
    """One EWC-anchored SGD step over a table with the columns ``SGD_COLUMNS``, in place.

    The formulas and arguments are those of :func:`bdu.reference.ewc_sgd_step`; ``clip``,
    ``grad_scale``, ``lr`` and ``ewc_lambda`` may be 0-dim tensors, ``grads`` what
    :meth:`ParameterTable.check` returned. Where ``found_inf`` (0-dim) is not 0, nothing is written.

    Returns:
        ½ λ Σ F d² at θ before the step, 0-dim, on the table's device.

    Raises:
        ValueError: a gradient does not fit its parameter, a tensor of the table was moved since the
            table was made, or a column lacks what the settings need. Nothing has been written then.
        RuntimeError: no backend serves this device and these dtypes, or a forced one is absent.
    """
    settings = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "maximize": maximize,
        "ewc_lambda": ewc_lambda,
        "mode": mode,
        "batch_fisher_decay": batch_fisher_decay,
        "rounding": rounding,
    }
    if momentum != 0:
        table.require("momentum_buffer", f"with momentum={momentum}")
    return _step("ewc_sgd_step", table, grads, (), clip, grad_scale, found_inf, settings)


def ewc_adamw_step(
    table: ParameterTable,
    grads: Sequence[Tensor] | CheckedGrads,
    steps: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    ewc_lambda: float = 0.0,
    mode: Mode = "proximal",
    clip: float | Tensor = 1.0,
    grad_scale: float | Tensor = 1.0,
    found_inf: Tensor | None = None,
    batch_fisher_decay: float | None = None,
    rounding: Rounding | None = None,
) -> Tensor:
    """One EWC-anchored AdamW step over a table with the columns ``ADAMW_COLUMNS``, in place.

    The formulas and arguments are those of :func:`bdu.reference.ewc_adamw_step`; ``clip``,
    ``grad_scale``, ``lr`` and ``ewc_lambda`` may be 0-dim tensors, ``grads`` what
    :meth:`ParameterTable.check` returned; ``steps`` is float32, already counted up. Where
    ``found_inf`` (0-dim) is not 0, nothing is written.

    Returns:
        ½ λ Σ F d² at θ before the step, 0-dim, on the table's device.

    Raises:
        ValueError: a gradient does not fit its parameter, a tensor of the table was moved since the
            table was made, or a column lacks what the settings need. Nothing has been written then.
        RuntimeError: no backend serves this device and these dtypes, or a forced one is absent.
    """
    settings = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "maximize": maximize,
        "ewc_lambda": ewc_lambda,
        "mode": mode,
        "batch_fisher_decay": batch_fisher_decay,
        "rounding": rounding,
    }
    if (
        steps.dtype != torch.float32
        or steps.shape != (len(table.params),)
        or steps.device != table.device
        or not steps.is_contiguous()
    ):
        raise ValueError(
            f"steps: expected ({len(table.params)},) contiguous torch.float32 on {table.device}, "
            f"got {describe(steps)}, {steps.dtype}"
        )
    table.require("exp_avg", "in every row")
    table.require("exp_avg_sq", "in every row")
    return _step("ewc_adamw_step", table, grads, (steps,), clip, grad_scale, found_inf, settings)


def grad_norm(grads: Sequence[Tensor] | CheckedGrads) -> Tensor:
    """√ Σ g² over all tensors, in a fixed order of summation; see :func:`bdu.reference.grad_norm`.

    Raises:
        ValueError: the gradients lie on several devices or are not dense and floating.
    """
    tensors = grads.tensors if isinstance(grads, CheckedGrads) else grads
    if not tensors:
        return reference.grad_norm(tensors)
    if not isinstance(grads, CheckedGrads):
        # Any order of the elements gives the same norm, so only gaps and overlaps need a copy.
        tensors = [lay_out_like(g, g) for g in _require_dense(tensors)]
    backend = dispatch.choose("grad_norm", tensors[0].device.type, set(map(_DTYPE, tensors)))
    if backend == "reference":
        return reference.grad_norm(tensors)
    if backend == "cpp":
        numel = np.fromiter(map(Tensor.numel, tensors), np.int64, len(tensors))
        address, code = native.addresses(tensors), native.dtype_codes(tensors)
        return native.grad_norm(address[None], code[None], numel)
    if backend == "cuda":
        if isinstance(grads, CheckedGrads):
            return cuda.grad_norm(grads.table.on_device(grads))
        numel = np.fromiter(map(Tensor.numel, tensors), np.int64, len(tensors))
        address, code = native.addresses(tensors), native.dtype_codes(tensors)
        device = tensors[0].device
        return cuda.grad_norm(cuda.DeviceTable(address[None], code[None], numel, device))
    return _triton_launchers().grad_norm(tensors)


def _require_dense(grads: Sequence[Tensor]) -> Iterable[Tensor]:
    device = grads[0].device
    for i, grad in enumerate(grads):
        if grad.layout != torch.strided or not grad.is_floating_point() or grad.device != device:
            raise ValueError(
                f"grads[{i}]: expected a dense floating tensor on {device}, got "
                f"{grad.layout}, {grad.dtype} on {grad.device}"
            )
    return grads


def _step(
    operation: str,
    table: ParameterTable,
    grads: Sequence[Tensor] | CheckedGrads,
    extra: tuple[Tensor, ...],
    clip: float | Tensor,
    grad_scale: float | Tensor,
    found_inf: Tensor | None,
    settings: dict[str, Any],
) -> Tensor:
    if not table.params:
        return torch.zeros(())
    ewc_lambda = settings["ewc_lambda"]
    if isinstance(ewc_lambda, Tensor) or ewc_lambda != 0:
        table.require_anchors()
    checked = grads if isinstance(grads, CheckedGrads) else table.check(operation, grads)
    if checked is None:
        raise ValueError("table: expected its tensors where they lay when it was made, got others")
    updates_fisher = settings["batch_fisher_decay"] is not None and not settings["maximize"]
    if updates_fisher:
        table.require_floating_fisher()
    if checked.backend != "cuda":
        rounding = settings["rounding"]
        on_device = {
            "lr": settings["lr"],
            "ewc_lambda": settings["ewc_lambda"],
            "stochastic_rounding": None if rounding is None else rounding.step,
        }
        dispatch.refuse_capture(
            checked.backend, [k for k, v in on_device.items() if isinstance(v, Tensor)]
        )
        # Only the compiled device code reads them for itself.
        settings = settings | {name: float(settings[name]) for name in ("lr", "ewc_lambda")}
    if checked.backend in ("cpp", "reference") and found_inf is not None and bool(found_inf):
        return torch.zeros((), device=table.device)
    with torch.no_grad():
        table.load_staged()
        if checked.backend == "cpp":
            penalty = getattr(native, operation)(
                *table.native_arrays(checked),
                *extra,
                clip=float(clip),
                grad_scale=float(grad_scale),
                **settings,
            )
        elif checked.backend == "cuda":
            settings = settings | {k: _for_device(settings[k]) for k in ("lr", "ewc_lambda")}
            penalty = getattr(cuda, operation)(
                table.on_device(checked),
                *extra,
                clip=_for_device(clip),
                grad_scale=_for_device(grad_scale),
                found_inf=None if found_inf is None else found_inf.to(torch.float32),
                **settings,
            )
        else:
            launchers: Any = reference
            shared: dict[str, Any] = {"clip": clip, "grad_scale": grad_scale}
            if checked.backend == "triton":
                launchers = _triton_launchers()
                shared |= {"fisher_scales": table.columns["fisher_scale"], "found_inf": found_inf}
            penalty = getattr(launchers, operation)(
                *table.lists(checked.tensors, dequantized=checked.backend == "reference"),
                *extra,
                first_elements=table.first_elements,
                **shared,
                **settings,
            )
        if checked.backend != "reference":
            table.bump_versions(updates_fisher)
        table.store_staged()
    return penalty


def _for_device(value: float | Tensor) -> float | Tensor:
    # The kernels read float32. A number of one element on the device stays there.
    return value.detach().to(torch.float32).reshape(()) if isinstance(value, Tensor) else value


def _triton_launchers() -> Any:
    # Importing Triton costs a second and needs the package: only where it was chosen.
    return importlib.import_module("bdu.kernels.ewc_step")
