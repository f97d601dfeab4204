"""Image data: reading, checking, splitting, augmenting and saving.

Images stay uint8 as long as possible and become float32 in [0, 1] batch by batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bdu.checkpoint import atomic_path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
CIFAR10_RECORD = 1 + 3 * 32 * 32
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
Classes = Sequence[str] | Mapping[str, int]


@dataclass
class ImageData:
    """Labelled images.

    Attributes:
        x: (N, C, H, W), uint8, or float32 in [0, 1].
        y: (N,), int64, from 0 on.
        classes: name of each label in label order, or None where the source has no names.
        tracks: (N,) int64, or None: images of one class and track are nearly the same, as frames
            of a film are, and belong into one part of a split.
    """

    x: Tensor
    y: Tensor
    classes: list[str] | None = None
    tracks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def num_classes(self) -> int:
        """Number of names, or the largest label + 1 where there are no names."""
        return int(self.y.max()) + 1 if self.classes is None else len(self.classes)

    def subset(self, indices: Tensor) -> ImageData:
        """The samples at `indices`, (M,) int64, in that order."""
        tracks = None if self.tracks is None else self.tracks[indices]
        return ImageData(self.x[indices], self.y[indices], self.classes, tracks)


def as_unit_float(x: Tensor) -> Tensor:
    """x / 255 in float32 for uint8, otherwise x in float32; values then lie in [0, 1]."""
    if x.dtype == torch.uint8:
        return x.to(torch.float32).div_(255)
    return x.to(torch.float32)


def check_labels(y: Any, num_classes: int | None = None, name: str = "y") -> Tensor:
    """Return labels as int64, (N,).

    Args:
        y: tensor, array or list of integers in [0, num_classes).
        num_classes: upper bound (exclusive), or None for none.
        name: the argument's name in errors.

    Raises:
        ValueError: not one-dimensional, not integer, negative, or num_classes and above.
    """
    labels = torch.as_tensor(y if isinstance(y, Tensor) else _signed(np.asarray(y), name))
    if labels.dim() != 1:
        raise ValueError(f"{name}: expected shape (N,), got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {labels.dtype}")
    labels = labels.to(torch.int64)
    if len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0:
            raise ValueError(f"{name}: expected labels of 0 and above, got {low}")
        if num_classes is not None and high >= num_classes:
            raise ValueError(f"{name}: expected labels below {num_classes}, got {high}")
    return labels


def _signed(y: np.ndarray, name: str) -> np.ndarray:
    if y.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers, got {y.dtype}")
    return y.astype(np.int64)


def check_seed(seed: Any, bits: int = 63) -> int:
    """Return a seed as an int.

    Raises:
        ValueError: not a whole number from 0 to 2**bits - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**bits:
        raise ValueError(f"seed: expected a whole number from 0 to 2**{bits} - 1, got {seed!r}")
    return int(seed)


def check_images(x: Any, name: str = "x") -> Tensor:
    """Return images as uint8 or float32 in [0, 1], (N, C, H, W) with N at least 1.

    Raises:
        ValueError: another shape or type, no images, NaN, or values outside [0, 1].
    """
    images = torch.as_tensor(x)
    if images.dim() != 4:
        raise ValueError(f"{name}: expected (N, C, H, W), got {tuple(images.shape)}")
    if images.numel() == 0:
        raise ValueError(f"{name}: expected at least one image, got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"{name}: expected uint8 or float in [0, 1], got {images.dtype}")
    images = images.to(torch.float32)
    low, high = (float(value) for value in torch.aminmax(images))
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{name}: expected float values in [0, 1] without NaN, got {low:g} to {high:g}; for "
            "a model of normalised images see bdu.models.Normalize, or --mean and --std"
        )
    return images


def load_images(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    classes: Classes | None = None,
) -> ImageData:
    """Read labelled images from a folder of class folders, an .npz, or CIFAR-10's binary files.

    - Class folders: the sorted folder names are the labels 0, 1, ...; with a split they lie in
      path/split. Images that are all grey have one channel, otherwise all become RGB.
    - .npz: `x` (uint8 NHWC or NHW, or float NCHW in [0, 1] or NHW) and `y`; with a split
      `<split>_x` and `<split>_y`. A text array `classes` in it names the labels, and an array
      `track` or `<split>_track` of integers, (N,), tells the films that images are frames of.
    - A folder with data_batch_*.bin or test_batch.bin, or the folder above it; split "train"
      or "test".

    Args:
        path: folder or file.
        split: part to read, or None for the whole.
        image_size: height and width (one number for both) to resize to, bilinear with
            antialiasing; None keeps the size, which must then be the same for all images.
        classes: names in label order, or a map from name to label, saved with an earlier run;
            labels then follow it, and classes may be absent here.

    Raises:
        FileNotFoundError: nothing at path, or the split is not there (it lists what is).
        ValueError: anything in the files that is not as described above.
    """
    path = Path(path)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"image_size: expected a positive height and width, got {image_size}")
    names = None if classes is None else _class_names(classes)
    if path.is_file():
        if path.suffix != ".npz":
            raise ValueError(f"path: expected a folder or an .npz file, got {path}")
        data = _load_npz(path, split, names)
    elif path.is_dir():
        inner = path / CIFAR10_FOLDER
        binary = inner if inner.is_dir() else path
        if (path / "data_batch_1").is_file() or (path / "test_batch").is_file():
            raise ValueError(
                f"path: expected CIFAR-10's binary version, got pickled batches in {path}; "
                "bdu never unpickles"
            )
        if _cifar10_files(binary):
            data = _load_cifar10(binary, split, names)
        else:
            return _load_class_folders(path, split, size, names)
    else:
        raise FileNotFoundError(f"path: expected a folder or an .npz file, {path} is not there")
    return data if size is None else replace(data, x=_resize(data.x, size))


def _class_names(classes: Classes) -> list[str]:
    if isinstance(classes, Mapping):
        if sorted(classes.values()) != list(range(len(classes))):
            raise ValueError(
                f"classes: expected each label from 0 to {len(classes) - 1} once, "
                f"got {sorted(classes.values())}"
            )
        return sorted(classes, key=lambda name: classes[name])
    names = list(classes)
    if isinstance(classes, str) or len(set(names)) != len(names):
        raise ValueError(f"classes: expected a list of different names, got {classes!r}")
    return names


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    resized = functional.interpolate(x, size=size, mode="bilinear", antialias=True)
    return resized if x.dtype == torch.uint8 else resized.clamp(0, 1)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def _load_class_folders(
    path: Path, split: str | None, size: tuple[int, int] | None, names: list[str] | None
) -> ImageData:
    if split is not None:
        if not (path / split).is_dir():
            there = ", ".join(folder.name for folder in _folders(path)) or "no folder"
            raise FileNotFoundError(f"split: expected a folder {split!r} in {path}, got {there}")
        path = path / split
    folders = _folders(path)
    if not folders:
        raise ValueError(f"path: expected one folder for each class in {path}, got no folder")
    are_given = names is not None
    if names is None:
        names = [folder.name for folder in folders]
    if unknown := [folder.name for folder in folders if folder.name not in names]:
        raise ValueError(f"path: expected only the given classes in {path}, got {unknown[0]!r} too")
    images: list[Image.Image] = []
    labels: list[int] = []
    files: list[Path] = []
    for folder in folders:
        found = _images_in(folder)
        if not found:
            if are_given and not _folders(folder):
                continue  # a class that is absent here
            inner = ", ".join(f.name for f in _folders(folder)[:5])
            hint = f" but folders ({inner}): is {folder.name!r} a split?" if inner else ""
            raise ValueError(f"path: expected images in {folder}, got none{hint}")
        for file in found:
            images.append(_open_image(file))
            labels.append(names.index(folder.name))
            files.append(file)
    if not images:
        raise ValueError(f"path: expected images in {path}, got none")
    mode = "L" if all(image.mode in ("1", "L") for image in images) else "RGB"
    tensors: list[Tensor] = []
    for image, file in zip(images, files, strict=True):
        pixels = torch.from_numpy(np.array(image.convert(mode)))
        pixels = pixels[None] if mode == "L" else pixels.permute(2, 0, 1)
        if size is not None:
            pixels = _resize(pixels[None], size)[0]
        elif tensors and pixels.shape != tensors[0].shape:
            expected, got = tuple(tensors[0].shape[1:]), tuple(pixels.shape[1:])
            raise ValueError(
                f"image_size: expected a value, as {files[0]} is {expected} and {file} is {got}"
            )
        tensors.append(pixels)
    return ImageData(torch.stack(tensors), torch.tensor(labels), names)


def _open_image(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"path: expected an image, cannot read {file}: {error}") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"path: expected 8 bits a channel, got mode {image.mode} in {file}")
    return image


def npz_array(path: str | os.PathLike[str], name: str) -> np.ndarray | None:
    """One array of an .npz, or None where it has none of that name.

    Raises:
        ValueError: not an .npz, or the array is pickled or broken.
    """
    with _opened_npz(Path(path)) as archive:
        return _member(archive, name) if name in archive.files else None


def _opened_npz(path: Path) -> Any:
    try:
        archive = np.load(path, allow_pickle=False)
    except Exception as error:  # a broken file can make the reader raise anything
        raise ValueError(f"path: expected an .npz file, cannot read {path}: {error}") from error
    if isinstance(archive, np.ndarray):
        raise ValueError(f"path: expected an .npz file, got a single array in {path}")
    return archive


def _load_npz(path: Path, split: str | None, names: list[str] | None) -> ImageData:
    with _opened_npz(path) as archive:
        keys = archive.files
        x_name, y_name = ("x", "y") if split is None else (f"{split}_x", f"{split}_y")
        if x_name not in keys or y_name not in keys:
            splits = [key[:-2] for key in keys if key.endswith("_x") and key[:-2] + "_y" in keys]
            there = "splits to choose from: " + ", ".join(splits)
            if not splits:
                there = "the arrays " + ", ".join(keys)
            message = f"split: expected {x_name} and {y_name} in {path}, got {there}"
            raise FileNotFoundError(message)
        x_array, y_array = _member(archive, x_name), _member(archive, y_name)
        own = [str(n) for n in _member(archive, "classes")] if "classes" in keys else None
        track_name = "track" if split is None else f"{split}_track"
        tracks = _member(archive, track_name) if track_name in keys else None
    x = _npz_images(x_array, x_name)
    if len(x) != len(y_array):
        raise ValueError(f"{y_name}: expected {len(x)} labels, as {x_name}, got {len(y_array)}")
    y = check_labels(y_array, None if own is None else len(own), y_name)
    if tracks is not None and (tracks.shape != y_array.shape or tracks.dtype.kind not in "iu"):
        expected = f"{track_name}: expected {len(x)} integers, as {y_name}"
        raise ValueError(f"{expected}, got {tracks.dtype} {tracks.shape}")
    known = None if tracks is None else torch.from_numpy(tracks.astype(np.int64))
    return ImageData(x, *_renamed(y, own, names, y_name), known)


def _member(archive: Any, name: str) -> np.ndarray:
    try:
        return archive[name]
    except Exception as error:  # as above
        raise ValueError(
            f"{name}: expected a plain array, got a pickled or broken one: {error}"
        ) from error


def _npz_images(x: np.ndarray, name: str) -> Tensor:
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim != 4:
        raise ValueError(f"{name}: expected 3 or 4 dimensions, got {x.shape}")
    elif x.dtype == np.uint8:
        if x.shape[3] not in (1, 3):
            raise ValueError(
                f"{name}: expected uint8 (N, H, W, C) with 1 or 3 channels, got {x.shape}"
            )
        x = x.transpose(0, 3, 1, 2)
    elif x.dtype.kind == "f" and x.shape[1] not in (1, 3):
        raise ValueError(f"{name}: expected float (N, C, H, W) with 1 or 3 channels, got {x.shape}")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ValueError(f"{name}: expected uint8 or float in [0, 1], got {x.dtype}")
    return check_images(torch.from_numpy(np.ascontiguousarray(x)), name)


def _renamed(
    y: Tensor, own: list[str] | None, names: list[str] | None, y_name: str
) -> tuple[Tensor, list[str] | None]:
    if names is None:
        return y, own
    if own is None:
        return check_labels(y, len(names), y_name), names
    if unknown := [name for name in own if name not in names]:
        raise ValueError(f"classes: expected all names in the file, {unknown[0]!r} is not given")
    return torch.tensor([names.index(name) for name in own])[y], names


def _cifar10_files(path: Path) -> list[Path]:
    return sorted([*path.glob("data_batch_*.bin"), *path.glob("test_batch.bin")])


def _load_cifar10(path: Path, split: str | None, names: list[str] | None) -> ImageData:
    present = _cifar10_files(path)
    parts = {
        "train": [file for file in present if file.name != "test_batch.bin"],
        "test": [file for file in present if file.name == "test_batch.bin"],
    }
    if not parts.get(split or ""):
        there = ", ".join(name for name, files in parts.items() if files)
        raise FileNotFoundError(f"split: expected one of those in {path} ({there}), got {split!r}")
    records = []
    for file in parts[split or ""]:
        content = np.fromfile(file, dtype=np.uint8)
        if content.size == 0 or content.size % CIFAR10_RECORD:
            raise ValueError(
                f"path: expected records of {CIFAR10_RECORD} bytes in {file}, got {content.size}"
            )
        records.append(content.reshape(-1, CIFAR10_RECORD))
    table = np.concatenate(records)
    x = torch.from_numpy(np.ascontiguousarray(table[:, 1:]).reshape(-1, 3, 32, 32))
    y = check_labels(table[:, 0], len(CIFAR10_CLASSES))
    return ImageData(x, *_renamed(y, list(CIFAR10_CLASSES), names, "y"))


def as_tensors(source: Any, name: str) -> tuple[Tensor, ...]:
    """Turn a data source into checked tensors (x, y) or (x, y, y_true).

    Args:
        source: a tuple or list of 2 or 3 tensors or arrays, an ImageData, a Dataset or a
            DataLoader whose items have 2 or 3 parts.
        name: the argument's name in errors.

    Returns:
        x (N, C, H, W), uint8 or float32 in [0, 1]; then one or two label tensors (N,), int64.

    Raises:
        TypeError: another kind of source, or images that are not tensors.
        ValueError: no samples, another number of parts, or values that do not fit.
    """
    if isinstance(source, ImageData):
        parts: Sequence[Any] = (source.x, source.y)
    elif isinstance(source, (tuple, list)):
        parts = source
    elif isinstance(source, TensorDataset):
        parts = source.tensors
    elif isinstance(source, DataLoader):
        parts = _joined([tuple(batch) for batch in source], torch.cat, name)
    elif isinstance(source, Dataset):
        count = len(source)  # type: ignore[arg-type]
        parts = _joined([tuple(source[i]) for i in range(count)], torch.stack, name)
    else:
        raise TypeError(
            f"{name}: expected a Dataset, a DataLoader or a tuple of tensors, "
            f"got {type(source).__name__}"
        )
    if len(parts) == 3 and parts[2] is None:
        parts = parts[:2]
    if len(parts) not in (2, 3):
        raise ValueError(f"{name}: expected (x, y) or (x, y, y_true), got {len(parts)} parts")
    for index, part in enumerate(parts):
        if not isinstance(part, (Tensor, np.ndarray)):
            raise TypeError(f"{name}[{index}]: expected a tensor, got {type(part).__name__}")
    x = check_images(parts[0], f"{name}[0]").detach()
    labels = [check_labels(part, None, f"{name}[{i}]") for i, part in enumerate(parts[1:], 1)]
    for index, label in enumerate(labels, 1):
        if len(label) != len(x):
            raise ValueError(f"{name}[{index}]: expected {len(x)} labels, got {len(label)}")
    return (x, *labels)


def _joined(items: list[tuple[Any, ...]], join: Any, name: str) -> list[Tensor]:
    if not items:
        raise ValueError(f"{name}: expected at least one sample, got none")
    joined = []
    for index, column in enumerate(zip(*items, strict=True)):
        if index == 0 and not all(isinstance(value, (Tensor, np.ndarray)) for value in column):
            raise TypeError(
                f"{name}: expected images as tensors, got {type(column[0]).__name__}; "
                "give the dataset a transform to tensors"
            )
        joined.append(join([torch.as_tensor(value) for value in column]))
    return joined


def augment(
    x: Tensor,
    generator: torch.Generator,
    *,
    padding: int = 4,
    mode: Literal["reflect", "zero"] = "reflect",
    mirror: bool = True,
) -> Tensor:
    """Shift each image by up to `padding` pixels both ways and mirror half of them.

    The same as cropping at random from the padded image; every image draws its own shift.

    Args:
        x: (N, C, H, W), any dtype; not changed.
        generator: source of the draws, on any device.
        padding: largest shift, 0 to below min(H, W).
        mode: what lies beyond the border: the mirrored image, or 0.
        mirror: False only shifts, for images whose mirror image means something else.

    Returns:
        A new tensor like x.

    Raises:
        ValueError: padding or mode out of range.
    """
    count, channels, height, width = x.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding: expected 0 to {min(height, width) - 1}, got {padding}")
    if mode not in ("reflect", "zero"):
        raise ValueError(f"mode: expected 'reflect' or 'zero', got {mode!r}")
    device = generator.device
    shift = torch.randint(
        -padding, padding + 1, (2, count, 1), generator=generator, device=device
    ).to(x.device)
    mirrored = torch.randint(0, 2, (count, 1), generator=generator, device=device).to(x.device)
    mirrored = mirrored.bool() & mirror
    rows = torch.arange(height, device=x.device) + shift[0]
    columns = torch.arange(width, device=x.device) + shift[1]
    columns = torch.where(mirrored, columns.flip(1), columns)
    result = x[
        torch.arange(count, device=x.device)[:, None, None, None],
        torch.arange(channels, device=x.device)[None, :, None, None],
        _reflected(rows, height)[:, None, :, None],
        _reflected(columns, width)[:, None, None, :],
    ]
    if mode == "zero":
        inside = (
            (((rows >= 0) & (rows < height))[:, :, None])
            & (((columns >= 0) & (columns < width))[:, None, :])
        )
        result = result * inside[:, None].to(result.dtype)
    return result


def _reflected(index: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - index.abs()).abs()


def split_indices(
    n_or_labels: int | Tensor,
    sizes: Sequence[int | float],
    seed: int,
    *,
    tracks: Tensor | None = None,
) -> list[Tensor]:
    """Draw disjoint index sets; with labels each set holds every class in proportion.

    Every sample gets the rank (position within its shuffled class + ½) / class size; the sets are
    consecutive runs in the order of rank. Counts per class are off by about one at most, and any
    prefix of a set is again in proportion.

    Args:
        n_or_labels: number of samples, or their labels (N,), integer.
        sizes: of each set, a count (int) or a share of N (float in [0, 1]).
        seed: of a generator of its own.
        tracks: (N,), integer, beside labels: samples of one class and track stay together, and a
            set has as many samples as whole tracks allow. A class of k tracks is in the first set
            if that is a share of more than about 1 / 2k.

    Returns:
        One int64 tensor for each size, in a random order.

    Raises:
        ValueError: a size out of range, or together more than there is; tracks without labels.
    """
    labels = None if isinstance(n_or_labels, int) else check_labels(n_or_labels, None, "labels")
    total = n_or_labels if isinstance(n_or_labels, int) else len(n_or_labels)
    counts = []
    for size in sizes:
        if size < 0 or (isinstance(size, float) and size > 1):
            raise ValueError(f"sizes: expected counts, or shares in [0, 1], got {size}")
        counts.append(round(size * total) if isinstance(size, float) else size)
    if sum(counts) > total:
        raise ValueError(f"sizes: expected at most {total} together, got {sum(counts)}")
    generator = torch.Generator().manual_seed(seed)
    if tracks is not None:
        if labels is None or tracks.shape != labels.shape:
            raise ValueError(f"tracks: expected as many as labels, got {tuple(tracks.shape)}")
        return _split_tracks(labels.cpu(), tracks.cpu(), counts, generator)
    order = torch.randperm(total, generator=generator)
    if labels is not None:
        order = _in_proportion(order, labels.cpu())
    return list(order[: sum(counts)].split(counts)) if counts else []


def _in_proportion(order: Tensor, labels: Tensor) -> Tensor:
    """These indices by rank (see `split_indices`) within their class, equal ranks as they were."""
    rank = torch.empty(len(order), dtype=torch.float64)
    own = labels[order]
    for label in own.unique():
        places = (own == label).nonzero().flatten()
        rank[places] = (torch.arange(len(places), dtype=torch.float64) + 0.5) / len(places)
    return order[torch.argsort(rank, stable=True)]


def save_npz(path: str | os.PathLike[str], **arrays: np.ndarray | Tensor) -> None:
    """Write arrays to an .npz that needs no unpickling, whole or not at all.

    Raises:
        ValueError: another suffix than .npz, or an array of Python objects.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"path: expected the suffix .npz, got {path}")
    plain = {
        name: value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for name, value in arrays.items()
    }
    for name, array in plain.items():
        if array.dtype.hasobject:
            raise ValueError(f"{name}: expected numbers or text, got an array of objects")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **plain)  # type: ignore[arg-type]


def _split_tracks(
    labels: Tensor, tracks: Tensor, counts: list[int], generator: torch.Generator
) -> list[Tensor]:
    """As samples are drawn in `split_indices`, whole tracks, each by the middle of its run."""
    units, unit_of, sizes = torch.stack([labels, tracks], 1).unique(
        dim=0, return_inverse=True, return_counts=True
    )
    drawn = torch.randperm(len(units), generator=generator)
    rank = torch.empty(len(units), dtype=torch.float64)
    for label in units[:, 0].unique():
        own = drawn[units[drawn, 0] == label]
        ends = sizes[own].cumsum(0)
        rank[own] = (ends - sizes[own] / 2).double() / ends[-1]
    order = drawn[torch.argsort(rank[drawn], stable=True)]
    middles = sizes[order].cumsum(0) - sizes[order] / 2
    bounds = torch.tensor(counts).cumsum(0)
    part_of = torch.empty(len(units), dtype=torch.int64)
    part_of[order] = torch.searchsorted(bounds.to(middles), middles, right=True)
    shuffled = torch.randperm(len(labels), generator=generator)
    parts = [shuffled[part_of[unit_of[shuffled]] == part] for part in range(len(counts))]
    return [_in_proportion(part, labels) for part in parts]
