"""A Fisher on the disk: safetensors, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bdu.checkpoint import atomic_path
from bdu.fisher.combine import check_fisher

FILE_FORMAT = "bdu-fisher-1"


def save_fisher(
    path: str | os.PathLike[str],
    fisher: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a Fisher as safetensors, whole or not at all: a temporary file takes the path's place.

    Args: metadata: what it was made from, such as samples, labels and loss; kept as strings beside
        the format's version. A Fisher that is not finite and ≥ 0 raises ValueError.
    """
    check_fisher(fisher, "fisher")
    header = {key: str(value) for key, value in (metadata or {}).items()} | {"format": FILE_FORMAT}
    with atomic_path(path) as temporary:
        save_file({name: f.cpu().contiguous() for name, f in fisher.items()}, temporary, header)


def load_fisher(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what `save_fisher` wrote, onto the CPU; ValueError names the file and what is wrong."""
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found != FILE_FORMAT:
                raise ValueError(f"{path}: expected a Fisher of format {FILE_FORMAT}, got {found}")
            fisher = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
    check_fisher(fisher, str(path))
    return fisher
