"""What devices can do, by name: the rates that `costs.py` divides by.

Peaks, bandwidths and sizes are the vendors', from the data sheet named beside each entry. Two
columns are not on a data sheet, and are assumptions until they are measured:

- `matmul_share`: what a library GEMM of thousands of rows, on random numbers, reaches of the peak.
  0.79 on H200 is published (769 to 798 TFLOP/s at 8192 x 8192 x 8192 through cuBLAS); the others
  are rounded guesses from reports of the same kind: power limits hold the large chips below the
  peak.
- `link_bandwidth`: what a copy from pinned memory reaches of the nominal 63 GB/s (PCIe 5.0 x16) or
  31.5 GB/s (PCIe 4.0 x16) of a direction: four fifths.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import nearest

GB = 10**9
MIB = 2**20
KIB = 2**10

#: What tensor cores multiply at the same rate.
HALF = (torch.bfloat16, torch.float16)

#: Bytes per second of a direction that pinned copies reach over PCIe 5.0 and 4.0, x16.
PCIE_5, PCIE_4 = 50e9, 25e9


@dataclass(frozen=True)
class Device:
    """A device, as the cost model sees it.

    Attributes:
        name: the key of `DEVICES`, or `"cpu"`.
        architecture: the key of the kernels' tables of configurations (`kernels/configs.py`).
        matmul_flops: peak FLOP/s of a dense matmul in `dtypes`, accumulated in fp32.
        matmul_share: the share of it that a good GEMM reaches.
        memory_bandwidth: bytes per second of the device's memory.
        link_bandwidth: bytes per second to or from the host, each direction.
        memory: bytes; the data sheet's gigabytes taken as 10^9, of which some chips have more, and
            of which the driver keeps a part.
        l2: bytes of the cache that all processors share; 0 if nobody asked.
        processors: multiprocessors or compute units; of a CPU, PyTorch's threads.
        shared_memory: bytes of one processor's shared memory; 0 for none.
        dtypes: whose operands are multiplied at that rate.
    """

    name: str
    architecture: str
    matmul_flops: float
    matmul_share: float
    memory_bandwidth: float
    link_bandwidth: float
    memory: int
    l2: int
    processors: int
    shared_memory: int
    dtypes: tuple[torch.dtype, ...] = HALF

    @property
    def matmul_rate(self) -> float:
        """FLOP/s that a good GEMM reaches."""
        return self.matmul_flops * self.matmul_share

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise a ValueError unless the rate is that of this dtype."""
        if dtype not in self.dtypes:
            raise ValueError(
                f"dtype is {dtype}, expected {' or '.join(map(str, self.dtypes))}: the rate known "
                f"of {self.name} is theirs"
            )


#: Name -> device. A comment names the source of a row.
DEVICES: dict[str, Device] = {
    row.name: row
    for row in (
        # NVIDIA H100 Tensor Core GPU data sheet, SXM5; H100 architecture white paper
        Device("h100", "sm_90", 989.4e12, 0.70, 3.35e12, PCIE_5, 80 * GB, 50 * MIB, 132,
               228 * KIB),
        # NVIDIA H200 Tensor Core GPU data sheet, SXM: an H100 with other memory
        Device("h200", "sm_90", 989.4e12, 0.79, 4.8e12, PCIE_5, 141 * GB, 50 * MIB, 132,
               228 * KIB),
        # NVIDIA DGX B200 data sheet, an eighth of the system; processors and L2: CUDA's properties
        Device("b200", "sm_100", 2250e12, 0.70, 8e12, PCIE_5, 180 * GB, 126 * MIB, 148,
               228 * KIB),
        # NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM; A100 architecture white paper
        Device("a100", "sm_80", 312e12, 0.80, 2.039e12, PCIE_4, 80 * GB, 40 * MIB, 108,
               164 * KIB),
        # NVIDIA L40S data sheet; Ada architecture white paper
        Device("l40s", "sm_89", 362.05e12, 0.70, 864e9, PCIE_4, 48 * GB, 96 * MIB, 142,
               100 * KIB),
        # NVIDIA Ada architecture white paper, GeForce RTX 4090, FP32 accumulate
        Device("rtx-4090", "sm_89", 165.2e12, 0.90, 1008e9, PCIE_4, 24 * GB, 72 * MIB, 128,
               100 * KIB),
        # AMD Instinct MI300X data sheet; CDNA 3 white paper (L2: 4 MiB in each of 8 dies)
        Device("mi300x", "gfx942", 1307.4e12, 0.50, 5.3e12, PCIE_5, 192 * GB, 32 * MIB, 304,
               64 * KIB),
    )
}  # fmt: skip


def device(name: str) -> Device:
    """The device of that name; `"cpu"` is measured on the spot, in fp32 (see `measure_cpu`).

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    known = (*DEVICES, "cpu")
    if name not in known:
        raise ValueError(
            f"device is {name!r}, expected one of {', '.join(known)}" + nearest(name, known)
        )
    return measure_cpu(torch.float32) if name == "cpu" else DEVICES[name]


@functools.cache
def measure_cpu(dtype: torch.dtype) -> Device:
    """This machine's CPU: GEMM rate in one dtype and copy bandwidth, measured once a process.

    Takes about half a second, with the threads that PyTorch has. Memory and link have the same
    bandwidth: what is offloaded is copied from memory to memory.

    Args:
        dtype: of the GEMM's operands.
    """
    own = torch.Generator().manual_seed(0)  # the caller's numbers stay as they would be
    x, w = (torch.randn(1024, 1024, dtype=dtype, generator=own) for _ in range(2))
    product = torch.empty_like(x)
    matmul = fastest(lambda: torch.mm(x, w, out=product))
    source = torch.zeros(64 * MIB, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = fastest(lambda: target.copy_(source))
    bandwidth = 2 * source.numel() / copy  # read once, written once
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(
        "cpu", "interpreter", 2 * 1024**3 / matmul, 1.0, bandwidth, bandwidth / 2, memory, 0,
        torch.get_num_threads(), 0, (dtype,),
    )  # fmt: skip


def device_at(place: torch.device, dtype: torch.dtype) -> Device | None:
    """The entry of the table for a place of this machine; None for a GPU that is not in it.

    Args:
        place: a CPU's is measured on the spot.
        dtype: of what it multiplies there.
    """
    if place.type == "cpu":
        return measure_cpu(dtype)
    named = torch.cuda.get_device_name(place).lower() if place.type == "cuda" else ""
    return next((row for row in DEVICES.values() if row.name.replace("-", " ") in named), None)


def is_here(where: Device) -> bool:
    """Whether the device is this machine's CPU, or by its name the current GPU."""
    if where.name == "cpu":
        return True
    here = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return where.name.replace("-", " ") in here


def free_bytes(where: Device) -> int:
    """Bytes that are free on the device now; of one that is not here, its memory."""
    if where.name == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.mem_get_info()[0] if is_here(where) else where.memory


def fastest(function: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, within a quarter of a second; the first is not timed.

    A shared machine only ever makes a call slower.
    """
    function()
    best, stop = float("inf"), time.perf_counter() + 0.25
    while best == float("inf") or time.perf_counter() < stop:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best
