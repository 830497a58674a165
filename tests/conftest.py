"""What every test gets: a clean import path, a seed, the `gpu` marker, kernels that run.

Without a CUDA device the Triton kernels run under Triton's interpreter, on CPU tensors.
"""

import gc
import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the checkout first on the path, where kernels/ would shadow
# Hugging Face's package of that name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Before anything imports triton: the variable is read when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreted

    interpreted.install()

#: Where the kernels run.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator in use before each test, so that no test depends on its neighbours."""
    value = 0
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def quick_collector():
    """For measurements of bytes, which collect garbage: what has been imported is none."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh floating and complex memory with NaN, so that reading it unwritten shows.

    Covers `torch.empty`, `torch.empty_like` and `Tensor.new_empty`, as called from Python.
    """

    def poison(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() or tensor.is_complex():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
