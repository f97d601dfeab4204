"""What all tests share: the Triton interpreter where there is no GPU, and the real data."""

import os
from pathlib import Path

# Threads that spin while they wait starve each other on a shared machine. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    # Has to be set before the first import of triton.
    os.environ["TRITON_INTERPRET"] = "1"
# The device's code on the host, lane by lane; next to it a GPU runs the real one.
os.environ["BDU_CUDA_ON_HOST"] = "1"


@pytest.fixture(scope="session")
def bdu_data() -> Path:
    """The folder of real data, ``$BDU_DATA``; where it is not set the test counts as not run."""
    folder = os.environ.get("BDU_DATA")
    if not folder:
        pytest.skip("BDU_DATA is not set")
    path = Path(folder)
    assert path.is_dir(), f"BDU_DATA: expected a folder, got {path}"
    return path
