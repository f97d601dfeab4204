"""The compiled backend ("cpp"): raw addresses in, the same formulas as ``bdu.reference`` out.

Callers (``bdu.ops``) have checked shapes, layouts, devices and dtypes: a wrong address here is a
wrong write. Tensors are laid out alike column by column, so a row is walked as flat memory.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, repeat
from operator import attrgetter, eq, is_
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bdu.rounding import Rounding

_DTYPE_CODE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,  # the maps of bdu/quantization.py
    torch.int8: 4,
}
PULL_CODE = {"gradient": 1, "proximal": 2}

Addresses = npt.NDArray[np.int64]
DtypeCodes = npt.NDArray[np.uint8]


@cache
def library() -> ModuleType:
    """The compiled module. A broken build raises its own ImportError, unsoftened."""
    return importlib.import_module("bdu._native")


@cache
def is_built() -> bool:
    """Whether the compiled module is installed (not whether it loads)."""
    return importlib.util.find_spec("bdu._native") is not None


def addresses(tensors: Sequence[Tensor]) -> Addresses:
    """data_ptr() of each tensor, shape (n,)."""
    return np.fromiter(map(Tensor.data_ptr, tensors), dtype=np.int64, count=len(tensors))


def dtype_code(tensor: Tensor) -> int:
    """The native code of a tensor's dtype."""
    return _DTYPE_CODE[tensor.dtype]


def dtype_codes(tensors: Sequence[Tensor]) -> DtypeCodes:
    """The native code of each tensor's dtype, shape (n,)."""
    return np.array([_DTYPE_CODE[t.dtype] for t in tensors], dtype=np.uint8)


class Survey(Protocol):
    """What a list of tensors looked like: address, shape, strides, dtype, device of each."""

    def is_current(self) -> bool:
        """Whether every tensor still looks so."""
        ...

    def fit(self, others: Sequence[Tensor], address: Addresses) -> bool:
        """Whether each of ``others`` has dtype, device and shape of the surveyed tensor beside it,
        and its elements in the same order in memory. Writes their addresses, shape (n,)."""
        ...


def survey(tensors: list[Tensor]) -> Survey:
    """Of dense tensors; ten times faster with the compiled part and torch's C exchange."""
    if is_built() and hasattr(Tensor, "__dlpack_c_exchange_api__"):
        surveyed: Survey = library().Survey(tensors, Tensor.__dlpack_c_exchange_api__)
        return surveyed
    return _PythonSurvey(tensors)


_DTYPE, _DEVICE, _LAYOUT = attrgetter("dtype"), attrgetter("device"), attrgetter("layout")


class _PythonSurvey:
    # Lazily throughout: lists of ten thousand tuples set off the garbage collector.

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._dtypes = list(map(_DTYPE, tensors))
        self._devices = list(map(_DEVICE, tensors))
        self._shapes = list(map(Tensor.size, tensors))
        self._strides = list(map(Tensor.stride, tensors))
        self._numel = list(map(Tensor.numel, tensors))
        self._address = list(map(Tensor.data_ptr, tensors))
        self._contiguous = all(map(Tensor.is_contiguous, tensors))

    def is_current(self) -> bool:
        # An address belongs to one device.
        if not (
            all(map(eq, map(Tensor.data_ptr, self._tensors), self._address))
            and all(map(is_, map(_DTYPE, self._tensors), self._dtypes))
        ):
            return False
        if self._contiguous:
            # Memory that is contiguous and as long is the same memory, and this costs half.
            return all(map(eq, map(Tensor.numel, self._tensors), self._numel)) and all(
                map(Tensor.is_contiguous, self._tensors)
            )
        return all(map(eq, map(Tensor.size, self._tensors), self._shapes)) and all(
            map(eq, map(Tensor.stride, self._tensors), self._strides)
        )

    def fit(self, others: Sequence[Tensor], address: Addresses) -> bool:
        if not (
            all(map(is_, map(_LAYOUT, others), repeat(torch.strided)))
            and all(map(eq, map(Tensor.size, others), self._shapes))
            and all(map(is_, map(_DTYPE, others), self._dtypes))
            and all(map(eq, map(_DEVICE, others), self._devices))
            and (
                all(map(Tensor.is_contiguous, others))
                if self._contiguous
                else all(map(_same_order, others, self._strides))
            )
        ):
            return False
        address[:] = addresses(others)
        return True


def _same_order(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    own = tensor.stride()
    # The stride of a dimension of size 1 means nothing.
    return own == strides or all(
        size == 1 or a == b for size, a, b in zip(tensor.shape, own, strides, strict=True)
    )


def same_entries(states: Mapping[Any, Any], known: list[Any]) -> bool:
    """Whether the values of the dictionaries in an optimizer's state, one after the other, are the
    very objects in ``known``."""
    if is_built():
        return bool(library().same_entries(states, known))
    entries = chain.from_iterable(s.values() for s in states.values() if isinstance(s, dict))
    return all(map(is_, chain(entries, (known,)), chain(known, (known,))))


def ewc_sgd_step(
    address: Addresses,
    dtype: DtypeCodes,
    numel: Addresses,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    **common: Any,
) -> Tensor:
    """``reference.ewc_sgd_step``; rows of ``address`` and ``dtype`` (7, n): param, grad,
    momentum_buffer, fisher, anchor, fisher_scale, and the first elements' numbers; ``numel``
    (n,)."""
    penalty = library().ewc_sgd_step(
        address,
        dtype,
        numel,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay=weight_decay,
        **_common(**common),
    )
    return torch.tensor(penalty, dtype=torch.float32)


def ewc_adamw_step(
    address: Addresses,
    dtype: DtypeCodes,
    numel: Addresses,
    steps: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    **common: Any,
) -> Tensor:
    """``reference.ewc_adamw_step``; rows of ``address`` and ``dtype`` (8, n): param, grad,
    exp_avg, exp_avg_sq, fisher, anchor, fisher_scale, and the first elements' numbers; ``numel``
    (n,); ``steps`` (n,) float32."""
    penalty = library().ewc_adamw_step(
        address,
        dtype,
        numel,
        steps.numpy(),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        epsilon=eps,
        weight_decay=weight_decay,
        **_common(**common),
    )
    return torch.tensor(penalty, dtype=torch.float32)


def grad_norm(address: Addresses, dtype: DtypeCodes, numel: Addresses) -> Tensor:
    """``reference.grad_norm``; ``address`` and ``dtype`` (1, n), ``numel`` (n,)."""
    norm = library().grad_norm(address, dtype, numel, threads=torch.get_num_threads())
    return torch.tensor(norm, dtype=torch.float32)


def memory_stream(read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """Move the bytes of a step and compute nothing: the floor that benchmarks are held against.

    Args:
        read: 3 contiguous CPU tensors that are read.
        written: 2 (momentum SGD) or 3 (AdamW) contiguous CPU tensors that are read and overwritten
            with meaningless bits. All tensors hold the same number of bytes, a multiple of 4.
    """
    sizes = {t.numel() * t.element_size() for t in (*read, *written)}
    if len(sizes) != 1 or next(iter(sizes)) % 4:
        raise ValueError(f"streams: expected one size, a multiple of 4 bytes, got {sorted(sizes)}")
    library().memory_stream(
        addresses(read),
        addresses(written),
        words=next(iter(sizes)) // 4,
        threads=torch.get_num_threads(),
    )


def _common(
    *,
    maximize: bool,
    ewc_lambda: float,
    mode: str,
    clip: float,
    grad_scale: float,
    batch_fisher_decay: float | None,
    rounding: Rounding | None,
) -> dict[str, Any]:
    return {
        "sign": -1.0 if maximize else 1.0,
        "clip": clip,
        "grad_scale": grad_scale,
        "ewc_lambda": ewc_lambda,
        "pull": PULL_CODE[mode] if ewc_lambda != 0 else 0,
        "fisher_decay": batch_fisher_decay or 0.0,
        "update_fisher": batch_fisher_decay is not None and not maximize,
        "rounding": native_rounding(rounding),
        "threads": torch.get_num_threads(),
    }


def native_rounding(rounding: Rounding | None) -> Any:
    """What the compiled part is told."""
    if rounding is None:
        return library().Rounding(False, 0, 0)
    seed = (rounding.seed + 2**63) % 2**64 - 2**63  # as a signed number of 64 bits
    return library().Rounding(True, seed, int(rounding.step))
