"""Which backend serves which operation: one table, read top to bottom.

A backend is chosen by name before anything runs. ``BDU_BACKEND=triton`` or
``with use_backend("triton")`` forces one; where it is absent, or does not serve the device or the
dtypes at hand, that is an error that says so. Nothing falls back by catching an exception.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch

_HALF_OR_FLOAT = frozenset({torch.float32, torch.bfloat16, torch.float16})
_ALL = _HALF_OR_FLOAT | {torch.float64}


class Serves(NamedTuple):
    """One line of the table: this backend serves these dtypes on this kind of device."""

    backend: str
    device: str
    dtypes: frozenset[torch.dtype]


_STEP = (
    Serves("cpp", "cpu", _HALF_OR_FLOAT),
    Serves("cuda", "cuda", _HALF_OR_FLOAT),
    Serves("triton", "cuda", _HALF_OR_FLOAT),
    Serves("reference", "cpu", _ALL),
    Serves("reference", "cuda", _ALL),
    # On CPU tensors these two are interpreted: for tests, so only when they are forced.
    Serves("triton", "cpu", _HALF_OR_FLOAT),
    Serves("cuda", "cpu", _HALF_OR_FLOAT),
)

_FISHER = (
    Serves("cpp", "cpu", _HALF_OR_FLOAT),
    Serves("triton", "cuda", _HALF_OR_FLOAT),
    Serves("reference", "cpu", _ALL),
    Serves("reference", "cuda", _ALL),
    Serves("triton", "cpu", _HALF_OR_FLOAT),
)

TABLE: dict[str, tuple[Serves, ...]] = {
    "ewc_sgd_step": _STEP,
    "ewc_adamw_step": _STEP,
    "grad_norm": _STEP,
    "fisher_linear": _FISHER,
    "fisher_conv": _FISHER,
    "fisher_embedding": _FISHER,
    "fisher_affine": _FISHER,
}

BACKENDS = ("reference", "cpp", "cuda", "triton")

# What has a backend for the device work on CPU tensors, slowly.
_INTERPRETED = {"triton": "TRITON_INTERPRET", "cuda": "BDU_CUDA_ON_HOST"}


def is_interpreted(backend: str) -> bool:
    """Whether a backend made for the device was asked to work on CPU tensors, for tests."""
    return backend in _INTERPRETED and os.environ.get(_INTERPRETED[backend]) == "1"


@cache  # looked up on the disk, and asked for at every step
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _absence_of_cpp() -> str | None:
    if not _is_installed("bdu._native"):
        return "bdu was installed without its compiled part (bdu._native)"
    return None


def _absence_of_cuda() -> str | None:
    if (reason := _absence_of_cpp()) is not None:
        return reason
    if is_interpreted("cuda"):
        return None
    if not _has_cuda_kernels():
        return "bdu was installed where there was no CUDA compiler (nvcc)"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


@cache
def _has_cuda_kernels() -> bool:
    return importlib.import_module("bdu._native").cuda_build() is not None


def _absence_of_triton() -> str | None:
    if not _is_installed("triton"):
        return "the triton package is not installed (pip install 'bdu[triton]')"
    if not torch.cuda.is_available() and not is_interpreted("triton"):
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


_ABSENCE: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "cpp": _absence_of_cpp,
    "cuda": _absence_of_cuda,
    "triton": _absence_of_triton,
}


def absence(backend: str) -> str | None:
    """Why a backend cannot be used here, or None where it can.

    Raises:
        ValueError: no backend has this name.
    """
    if backend not in _ABSENCE:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return _ABSENCE[backend]()


_forced: ContextVar[str | None] = ContextVar("bdu_backend", default=None)


def forced_backend() -> str | None:
    """The backend forced by :func:`use_backend` or by ``BDU_BACKEND``, or None."""
    return _forced.get() or os.environ.get("BDU_BACKEND") or None


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block; wins over the environment variable BDU_BACKEND.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend is absent here, with the reason.
    """
    _require(backend)
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(operation: str, device: str, dtypes: Collection[torch.dtype]) -> str:
    """The backend for an operation on tensors of these dtypes on this kind of device.

    Raises:
        RuntimeError: a forced backend is absent or does not serve this device and these dtypes, or
            no backend does.
    """
    lines = (
        line
        for line in TABLE[operation]
        if line.device == device and line.dtypes.issuperset(dtypes) and _reaches(line)
    )
    forced = forced_backend()
    if forced is None:
        for line in lines:
            if absence(line.backend) is None:
                return line.backend
    wanted = f"{operation} on {device} with {', '.join(sorted(map(str, dtypes)))}"
    if forced is None:
        raise RuntimeError(f"backend: none serves {wanted}")
    _require(forced)
    if not any(line.backend == forced for line in lines):
        raise RuntimeError(f"backend: {forced!r} was forced, but does not serve {wanted}")
    return forced


def refuse_capture(backend: str, on_device: Collection[str]) -> None:
    """Raise where a graph is captured and a backend would have to wait for these values.

    Raises:
        RuntimeError: with the names of the values.
    """
    if on_device and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{', '.join(on_device)}: expected numbers of the host to capture a graph with backend "
            f"{backend!r}, got tensors, which only backend 'cuda' reads on the device"
        )


def _reaches(line: Serves) -> bool:
    # On the device, they would take a CPU tensor's address for one of the device's.
    return line.device != "cpu" or line.backend not in _INTERPRETED or is_interpreted(line.backend)


def _require(backend: str) -> None:
    reason = absence(backend)
    if reason is not None:
        raise RuntimeError(f"backend: {backend!r} was forced, but {reason}")
