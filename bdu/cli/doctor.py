"""Print versions, devices, and which backend serves which operation."""

from __future__ import annotations

import argparse

import torch

from bdu import dispatch, native
from bdu.cli import common
from bdu.runs import versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bdu doctor``."""
    common.add_traceback(parser)


def run(options: argparse.Namespace) -> None:
    """Look and print."""
    for package, found in versions().items():
        print(f"{package:12} {found or 'not installed'}")
    print(f"{'threads':12} {torch.get_num_threads()}")
    if dispatch.absence("cpp") is None:
        library = native.library()
        print(f"{'CPU kernels':12} {library.instruction_set()}")
        build = library.cuda_build()
        if build is None:
            print(f"{'CUDA part':12} not compiled (nvcc was not found, or BDU_CUDA=OFF)")
        else:
            print(f"{'CUDA part':12} compiled, runtime {build['runtime']}")
            for device in build["devices"]:
                gigabytes = device["memory_bytes"] / 2**30
                capability = f"sm_{device['major']}{device['minor']}"
                print(f"{'':12} {device['name']}, {capability}, {gigabytes:.0f} GiB")
    print(f"{'torch CUDA':12} {'available' if torch.cuda.is_available() else 'no device'}")
    print()
    for backend in dispatch.BACKENDS:
        reason = dispatch.absence(backend)
        print(f"{backend:12} {'available' if reason is None else reason}")
    forced = dispatch.forced_backend()
    if forced is not None:
        print(f"{'BDU_BACKEND':12} {forced}")
    print()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    print(f"{'operation':18}{'device':8}" + "".join(f"{str(d)[6:]:>12}" for d in dtypes))
    for operation in dispatch.TABLE:
        for device in devices:
            served = [_serving(operation, device, dtype) for dtype in dtypes]
            print(f"{operation:18}{device:8}" + "".join(f"{name:>12}" for name in served))


def _serving(operation: str, device: str, dtype: torch.dtype) -> str:
    for line in dispatch.TABLE[operation]:
        if line.device != device or dtype not in line.dtypes:
            continue
        forced = dispatch.forced_backend()
        if forced in (None, line.backend) and dispatch.absence(line.backend) is None:
            return line.backend
    return "-"
