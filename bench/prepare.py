"""Turn the shared vision data into an .npz that `bdu --data` reads.

    python bench/prepare.py --out cifar10.npz               all of CIFAR-10, from its JPEG set
    python bench/prepare.py --lossless --out lossless.npz   the subset with exact pixels
    python bench/prepare.py --gtsrb --out gtsrb.npz         GTSRB at 32x32, with train_track

The output holds train_x, train_y, test_x, test_y (x uint8 NHWC, y int64) and, where known,
classes. GTSRB's train_track numbers the tracks within a class, 30 near-identical frames each, and
`bdu poison` splits by (label, track). The SHA-256 printed for decoded JPEGs depends on the JPEG
decoder, so compare it before comparing figures between machines.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bdu.data import save_npz


def decode_jpegs(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Decode JPEG i = data[offsets[i]:offsets[i + 1]] to RGB; (N, H, W, 3) uint8."""
    content = data.tobytes()
    images = [
        np.asarray(Image.open(io.BytesIO(content[start:stop])).convert("RGB"))
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]
    return np.stack(images)


def read_jpeg_set(path: Path) -> dict[str, np.ndarray]:
    """Arrays of the JPEG set: <split>_jpeg (bytes), <split>_off (offsets), <split>_y, classes."""
    arrays: dict[str, np.ndarray] = {}
    with np.load(path, allow_pickle=False) as archive:
        for split in ("train", "test"):
            arrays[f"{split}_x"] = decode_jpegs(archive[f"{split}_jpeg"], archive[f"{split}_off"])
            arrays[f"{split}_y"] = archive[f"{split}_y"].astype(np.int64)
        arrays["classes"] = archive["classes"]
    return arrays


def read_plain_set(path: Path, also: Sequence[str]) -> dict[str, np.ndarray]:
    """<split>_x and <split>_y of an .npz, and those arrays of `also` that it has."""
    with np.load(path, allow_pickle=False) as archive:
        names = ["train_x", "train_y", "test_x", "test_y"]
        arrays = {name: archive[name] for name in (*names, *also) if name in archive.files}
    for name in ("train_y", "test_y"):
        arrays[name] = arrays[name].astype(np.int64)
    return arrays


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, write the file, and print each array's shape and SHA-256."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("BDU_DATA"),
        help="folder of the shared data (default: $BDU_DATA)",
    )
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--lossless", action="store_true", help="CIFAR-10 with exact pixels")
    kind.add_argument("--gtsrb", action="store_true", help="GTSRB at 32x32")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("--data: expected a folder, as BDU_DATA is not set")
    vision = options.data / "vision"
    if options.gtsrb:
        arrays = read_plain_set(vision / "gtsrb32.npz", also=["train_track"])
    elif options.lossless:
        arrays = read_plain_set(vision / "cifar10_lossless_subset.npz", also=["classes"])
    else:
        arrays = read_jpeg_set(vision / "cifar10_jpeg.npz")
    save_npz(options.out, **arrays)
    for name, array in arrays.items():
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        print(f"{name:12} {array.dtype!s:6} {array.shape!s:22} sha256 {digest}")


if __name__ == "__main__":
    main()
