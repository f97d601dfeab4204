"""Reading and writing weights and training state, without ever unpickling code.

Every file is written under a temporary name beside its destination and moved there whole, so a
reader sees the old file or the new one and an interrupted write leaves no half a file.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".tar")
WRAPPER_KEYS = ("state_dict", "model", "model_state_dict", "net")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
NAMED_IN_ERRORS = 5


class CheckpointError(ValueError):
    """A file that is not the checkpoint it should be; the message names the file and why."""


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, exclusive: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; at a clean exit it becomes `path`.

    Folders above are made. On an exception the temporary file is removed and `path` is untouched.

    Args:
        exclusive: of several that write the same `path`, at once or later, only one succeeds.

    Raises:
        FileExistsError: `exclusive`, and there is a file already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        yield temporary
        # without it a power cut after the rename can leave an empty file under the final name
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        allow_as_usual(temporary)
        if exclusive:
            _move_to_nothing(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _move_to_nothing(temporary: Path, path: Path) -> None:
    """A rename that refuses to replace, which no call of the system's is everywhere."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links here, as in some shared folders: whoever makes the file has it
        path.touch(exist_ok=False)
        os.replace(temporary, path)


def allow_as_usual(path: Path) -> None:
    """The permissions of any new file; safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def atomic_write(
    path: str | os.PathLike[str], content: bytes | str, *, exclusive: bool = False
) -> None:
    """Write `content` (text as UTF-8, line ends kept) to `path`, whole or not at all.

    Raises:
        FileExistsError: as atomic_path.
    """
    with atomic_path(path, exclusive=exclusive) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in a .pt, .pth, .th, .tar or .safetensors file, onto the CPU.

    The state dict may lie under "state_dict", "model", "model_state_dict" or "net", also nested.
    A prefix "module." (DataParallel) or "_orig_mod." (torch.compile) that all keys have is
    taken off.

    Raises:
        FileNotFoundError: no file there.
        CheckpointError: another suffix, a broken file, one that needs unpickling, or one
            without a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a checkpoint file, got {path}, which is not there")
    if path.suffix == ".safetensors":
        try:
            return _unwrapped(load_file(path, device="cpu"))
        except SafetensorError as error:
            raise CheckpointError(f"{path}: expected a safetensors file: {error}") from error
    if path.suffix not in TORCH_SUFFIXES:
        raise CheckpointError(
            f"{path}: expected one of {', '.join((*TORCH_SUFFIXES, '.safetensors'))}, "
            f"got {path.suffix or 'no suffix'}"
        )
    return _unwrapped(_state_dict_in(_torch_load(path), path))


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise CheckpointError(
                f"{path}: expected a file written by torch.save with plain tensors, "
                f"got one that torch.load(weights_only=True) refuses: {error}"
            ) from error
        raise CheckpointError(
            f"{path}: expected plain tensors, got a pickle that asks for {named.group(1)}; bdu "
            "never unpickles, because a pickle can run any code. To convert it, where you trust "
            "the file: model = torch.load(path, weights_only=False); "
            'torch.save(model.state_dict(), "weights.pt")'
        ) from error
    except Exception as error:  # a broken file can make the reader raise anything
        raise CheckpointError(
            f"{path}: expected a file written by torch.save: {str(error) or type(error).__name__}"
        ) from error


def _state_dict_in(content: Any, path: Path) -> Mapping[str, Tensor]:
    level = content
    seen: set[int] = set()
    while isinstance(level, Mapping) and id(level) not in seen:  # one may hold itself
        seen.add(id(level))
        if level and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in level.items()):
            return level
        level = next((level[key] for key in WRAPPER_KEYS if key in level), None)
    found = type(content).__name__
    if isinstance(content, Mapping):
        keys = [str(key) for key in content]
        found = f"a dict with {_named(keys) or 'no keys'}"
    raise CheckpointError(
        f"{path}: expected a state dict (names to tensors), alone or under "
        f"{', '.join(WRAPPER_KEYS)}, got {found}"
    )


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = dict(state)
    while result:
        prefix = next((p for p in WRAPPER_PREFIXES if all(k.startswith(p) for k in result)), None)
        if prefix is None:
            break
        result = {key.removeprefix(prefix): value for key, value in result.items()}
    return result


def _named(names: list[str]) -> str:
    rest = len(names) - NAMED_IN_ERRORS
    return ", ".join(names[:NAMED_IN_ERRORS]) + (f" and {rest} more" if rest > 0 else "")


def load_into(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights in `path` into `model`; every key and every shape must agree.

    Raises:
        FileNotFoundError, CheckpointError: as load_state_dict.
        CheckpointError: missing or unexpected keys or other shapes; the model is then unchanged.
    """
    state = load_state_dict(path)
    own = model.state_dict()
    problems = []
    if missing := [key for key in own if key not in state]:
        problems.append(f"{len(missing)} missing ({_named(missing)})")
    if unexpected := [key for key in state if key not in own]:
        problems.append(f"{len(unexpected)} unexpected ({_named(unexpected)})")
    if other := [
        f"{key}: expected {tuple(own[key].shape)}, got {tuple(state[key].shape)}"
        for key in own
        if key in state and isinstance(own[key], Tensor) and own[key].shape != state[key].shape
    ]:
        problems.append(f"{len(other)} of another shape ({_named(other)})")
    if unusable := [
        f"{key}: {value.layout}, {value.dtype} on {value.device}"
        for key, value in state.items()
        if key in own
        and (
            value.layout != torch.strided
            or value.is_quantized
            or value.is_meta
            or (value.is_complex() and not own[key].is_complex())
        )
    ]:
        problems.append(f"{len(unusable)} that are not plain dense tensors ({_named(unusable)})")
    if problems:
        raise CheckpointError(
            f"{path}: expected the weights of {type(model).__name__}, got " + "; ".join(problems)
        )
    model.load_state_dict(state, strict=True)


def save_state_dict(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `state_dict` as safetensors, with `metadata` (text to text) in its header.

    Tensors that share memory are written once each under their own name.

    Raises:
        ValueError: another suffix than .safetensors.
        TypeError: a value that is not a tensor, or metadata that is not text.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path: expected the suffix .safetensors, got {path}")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict[{name!r}]: expected a tensor, got {type(value).__name__}")
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses two names over one storage, also where the views do not overlap
        if storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata[{key!r}]: expected text, got {type(text).__name__}")
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=dict(metadata) if metadata else None)


def save_state(path: str | os.PathLike[str], state: Any) -> None:
    """Write resumable training state: tensors, numbers, text, None, lists, tuples and dicts.

    Raises:
        TypeError: anything else in it, named by its place, since load_state could not read it.
    """
    _check_plain(state, "state")
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_state(path: str | os.PathLike[str]) -> Any:
    """Read what save_state wrote, onto the CPU.

    Raises:
        FileNotFoundError: no file there.
        CheckpointError: a broken file or one that needs unpickling.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a state file, got {path}, which is not there")
    return _torch_load(path)


def digest(tensors: Iterable[Tensor], *more: str) -> str:
    """32 hexadecimal digits (BLAKE2b) of values, shapes and dtypes, in order, and of texts."""
    hashed = hashlib.blake2b(digest_size=16)
    for text in more:
        hashed.update(text.encode())
    for tensor in tensors:
        hashed.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        hashed.update(flat.view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def known_state(path: str | os.PathLike[str] | None, *, resume: bool) -> Any:
    """What a run goes on from: what load_state reads, or None where it starts anew.

    Args:
        path: where it keeps its state, or None: nowhere.
        resume: whether it is to go on from there, if there is anything.

    Raises:
        ValueError: nowhere to resume from, or a folder.
        FileExistsError: something is there, and it is not to be resumed.
        CheckpointError: as load_state.
    """
    if path is None:
        if resume:
            raise ValueError("state_file: expected a path to resume from, got None")
        return None
    if Path(path).is_dir():
        raise ValueError(f"state_file: expected a file, got {path}, a folder")
    if not Path(path).exists():
        return None
    if not resume:
        raise FileExistsError(
            f"state_file: expected a new file, or resume to go on from it, got {path}"
        )
    return load_state(path)


def _check_plain(value: Any, place: str) -> None:
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor):
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {place}")
            _check_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    else:
        raise TypeError(
            f"{place}: expected tensors, numbers, text, None, lists, tuples or dicts, "
            f"got {type(value).__name__}"
        )
