"""The compiled CUDA backend ("cuda"): one launch for all tensors of a table, without waiting.

A launch reads a :class:`DeviceTable`: int64 cells on the device, one row of cells a property and
one column a tensor::

    first tile | elements | dtypes, 4 bits a column | addresses of param, grad, moments, F, θ*,
    F's scale | number of the first element

It is sent once. Of what may change from step to step, only the gradients' addresses are sent again,
and only when they differ, from pinned memory. Values that live
on the device (a clip factor, GradScaler's scale and its found_inf, lr and λ of a captured graph)
are read there.

On CPU tensors the same code runs on the host, lane by lane: a test of the device's arithmetic and
indices for machines without one (``BDU_CUDA_ON_HOST=1``), not something to work with.

Callers (``bdu.ops``) have checked shapes, layouts, devices and dtypes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdu import native
from bdu.rounding import Rounding

# Where the rows of cells begin; csrc/cuda/warp_tile.h reads them.
_FIRST_TILE, _ELEMENTS, _DTYPES, _ADDRESSES = range(4)
_GRAD = 1

_MIXED = 3

Number = float | Tensor


class DeviceTable:
    """Addresses, sizes and dtypes of a launch's tensors, where the launch can read them.

    Args:
        address, dtype_code: (columns, n), the columns param, grad, and those of the operation; the
            address 0 where a tensor has none. Of a norm, the gradients alone.
        numel: (n,).
        device: of the tensors.
    """

    def __init__(
        self,
        address: native.Addresses,
        dtype_code: native.DtypeCodes,
        numel: native.Addresses,
        device: torch.device,
    ) -> None:
        self.device = device
        tile = native.library().CUDA_TILE
        ends = np.cumsum(-(-numel // tile))
        self.tensors, self.tiles = len(numel), int(ends[-1])
        columns = len(address)
        codes = np.zeros(self.tensors, np.int64)
        for column in range(columns):
            codes |= dtype_code[column].astype(np.int64) << (4 * column)
        # F's scale and the first elements' numbers do not count.
        here = slice(None, -2 if columns > 1 else None)
        self.stored = _stored(dtype_code[here][address[here] != 0])
        self.grad_stored = _stored(dtype_code[min(_GRAD, columns - 1)])
        self.grad_address = address[min(_GRAD, columns - 1)].copy()
        self._dtype_code = dtype_code.copy()
        cells = np.vstack([np.concatenate([[0], ends[:-1]]), numel, codes, address])
        self._captured: list[Tensor] = []
        self.stream = _stream(device)
        self.cells = torch.empty(cells.shape, dtype=torch.int64, device=device)
        self._send(cells, self.cells)
        self._partials: dict[torch.dtype, Tensor] = {}
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)

    def fits(self, dtype_code: native.DtypeCodes) -> bool:
        """Whether the table can be brought up to date by :meth:`send_grads` alone."""
        return self.stream == _stream(self.device) and np.array_equal(dtype_code, self._dtype_code)

    def send_grads(self, address: native.Addresses) -> None:
        """Send the gradients' addresses, (n,), where they are not those sent last."""
        if np.array_equal(address, self.grad_address):
            return
        self.grad_address = address.copy()
        self._send(address, self.cells[_ADDRESSES + _GRAD])

    def partials(self, dtype: torch.dtype) -> Tensor:
        """Room for one sum a tile."""
        if dtype not in self._partials:
            self._partials[dtype] = torch.empty(self.tiles, dtype=dtype, device=self.device)
        return self._partials[dtype]

    def _send(self, values: native.Addresses, into: Tensor) -> None:
        """Copy to the device in stream order, without waiting."""
        source = torch.from_numpy(values)
        if self.device.type == "cuda":
            # torch gives pinned memory to others only when the device has read it.
            source = source.pin_memory()
            if torch.cuda.is_current_stream_capturing():
                self._captured.append(source)  # every replay reads it again
        into.copy_(source, non_blocking=True)

    def launch(self, partials: Tensor, result: Tensor, stored: int) -> Any:
        """What the compiled part is told."""
        on_device = self.device.type == "cuda"
        return native.library().CudaLaunch(
            cells=self.cells.data_ptr(),
            tensors=self.tensors,
            tiles=self.tiles,
            stored=stored,
            partials=partials.data_ptr(),
            result=result.data_ptr(),
            ticket=self.ticket.data_ptr(),
            device=_index(self.device) if on_device else -1,
            stream=self.stream,
        )


def _result(table: DeviceTable, is_written: bool) -> Tensor:
    # A zero would be a launch of its own: only where the kernel writes nothing there.
    make = torch.empty if is_written and table.tiles > 0 else torch.zeros
    return make((), device=table.device)


def _kernel(table: DeviceTable, known: dict[str, Any]) -> int:
    # Stochastic rounding has no kernel of its own for bfloat16: the mixed one does it.
    return _MIXED if known["rounding"].is_stochastic else table.stored


def _stored(codes: native.DtypeCodes) -> int:
    return int(codes.flat[0]) if codes.size and (codes == codes.flat[0]).all() else _MIXED


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def ewc_sgd_step(
    table: DeviceTable,
    *,
    lr: Number,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    **common: Any,
) -> Tensor:
    """``reference.ewc_sgd_step``; columns of the table: param, grad, momentum_buffer, fisher,
    anchor. Numbers may be 0-dim float32 tensors on the device where ``Number`` says so."""
    on_device, known = _common(lr=lr, **common)
    penalty = _result(table, known["pull"] != 0)
    if table.tiles == 0:
        return penalty
    native.library().cuda_ewc_sgd_step(
        table.launch(table.partials(torch.float32), penalty, _kernel(table, known)),
        on_device,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay=weight_decay,
        **known,
    )
    return penalty


def ewc_adamw_step(
    table: DeviceTable,
    steps: Tensor,
    *,
    lr: Number,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    **common: Any,
) -> Tensor:
    """``reference.ewc_adamw_step``; columns of the table: param, grad, exp_avg, exp_avg_sq, fisher,
    anchor; ``steps`` (n,) float32 on the device, already counted up."""
    on_device, known = _common(lr=lr, **common)
    penalty = _result(table, known["pull"] != 0)
    if table.tiles == 0:
        return penalty
    native.library().cuda_ewc_adamw_step(
        table.launch(table.partials(torch.float32), penalty, _kernel(table, known)),
        on_device,
        steps.data_ptr(),
        beta1=betas[0],
        beta2=betas[1],
        log_beta1=_log(betas[0]),
        log_beta2=_log(betas[1]),
        epsilon=eps,
        weight_decay=weight_decay,
        **known,
    )
    return penalty


def grad_norm(table: DeviceTable) -> Tensor:
    """``reference.grad_norm`` of the table's gradients (of its only column, where it has one)."""
    norm = _result(table, is_written=True)
    if table.tiles == 0:
        return norm
    column = _GRAD if len(table.cells) > _ADDRESSES + 1 else 0
    launch = table.launch(table.partials(torch.float64), norm, table.grad_stored)
    native.library().cuda_grad_norm(launch, column)
    return norm


def _common(
    *,
    lr: Number,
    maximize: bool,
    ewc_lambda: Number,
    mode: str,
    clip: Number,
    grad_scale: Number,
    found_inf: Tensor | None,
    batch_fisher_decay: float | None,
    rounding: Rounding | None,
) -> tuple[Any, dict[str, Any]]:
    """What the device reads for itself, and the numbers that the host knows."""
    values = {"clip": clip, "grad_scale": grad_scale, "lr": lr, "ewc_lambda": ewc_lambda}
    addresses = {k: v.data_ptr() if isinstance(v, Tensor) else 0 for k, v in values.items()}
    step = None if rounding is None else rounding.step
    host_step = 0 if step is None or isinstance(step, Tensor) else step
    on_device = native.library().CudaOnDevice(
        found_inf=0 if found_inf is None else found_inf.data_ptr(),
        rounding_step=step.data_ptr() if isinstance(step, Tensor) else 0,
        **addresses,
    )
    known = {k: 1.0 if isinstance(v, Tensor) else v for k, v in values.items()}
    is_pulled = isinstance(ewc_lambda, Tensor) or ewc_lambda != 0
    return on_device, {
        **known,
        "sign": -1.0 if maximize else 1.0,
        "pull": native.PULL_CODE[mode] if is_pulled else 0,
        "fisher_decay": batch_fisher_decay or 0.0,
        "update_fisher": batch_fisher_decay is not None and not maximize,
        "rounding": native.native_rounding(rounding and rounding._replace(step=host_step)),
    }


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
