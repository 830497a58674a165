"""`backfuse doctor`: what is installed here, what is known to be wrong with it, and whether every
kernel gives the right numbers on this device.

Each kernel runs in each configuration of the device's table, at small odd sizes, and is held
against the reference in fp64. Without a GPU that takes Triton's interpreter (`TRITON_INTERPRET=1`),
which runs the kernels' code and not what a compiler makes of it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import backfuse
from backfuse import BlockSpec

from .options import check_device, default_device, require

#: Versions of ptxas that are reported to miscompile wgmma with an operand in registers.
SUSPECT_PTXAS = ("12.8.93",)

#: Sizes that no tile divides: a gated FFN and a plain one, heads of all widths the tables know.
SPECS = {
    "gated": BlockSpec(136, 200, 4, 2, head_dim=56, qk_norm="head"),
    "plain": BlockSpec(
        104, 168, 2, head_dim=120, norm="layernorm", hidden_act="gelu_tanh", gated=False,
        up_bias=True, causal=False,
    ),
    "wide": BlockSpec(136, 200, 2, 1, head_dim=248),
}  # fmt: skip

TOKENS = 197
INTERPRETED_TOKENS = 45


@dataclass(frozen=True)
class Finding:
    """One kernel in one configuration.

    Attributes:
        name: of both.
        error: relative norm, the largest of its results.
        limit: what rounding explains.
        status: `ok`, `WRONG`, `does not fit`, or the error that it raised.
    """

    name: str
    error: float
    limit: float
    status: str

    @property
    def right(self) -> bool:
        """Whether there is nothing to worry about."""
        return self.status in ("ok", "does not fit")

    def __str__(self) -> str:
        error = f"  error {self.error:.1e} (at most {self.limit:.1e})" if self.error >= 0 else ""
        return f"{self.status:<5} {self.name}{error}"


def ptxas_version() -> str | None:
    """Of the ptxas that Triton runs; None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    program = os.environ.get("TRITON_PTXAS_PATH") or own
    try:
        printed = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"V(\d+\.\d+\.\d+)", printed)
    return found.group(1) if found else None


def versions(device: str) -> Iterator[str]:
    """What is installed, one line each."""
    yield f"backfuse  {backfuse.__version__}"
    yield f"python    {platform.python_version()}, {platform.platform()}"
    yield f"torch     {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if importlib.util.find_spec("triton") is None:
        yield "triton    not installed: no kernels"
    else:
        import triton

        yield f"triton    {triton.__version__}"
    yield f"ptxas     {ptxas_version() or 'not found'}"
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        yield f"device    {name}, compute capability {major}.{minor}"
    else:
        yield f"device    cpu, {torch.get_num_threads()} threads"


def warnings(device: str) -> Iterator[str]:
    """What is known to be wrong with it."""
    ptxas = ptxas_version()
    if ptxas in SUSPECT_PTXAS and torch.device(device).type == "cuda":
        yield (
            f"ptxas {ptxas} is reported to miscompile wgmma with an operand in registers (Hopper); "
            "TRITON_PTXAS_PATH names another one. The check below says whether it does here"
        )
    if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        yield "the kernels need compute capability 8.0: impl='auto' runs the reference here"


def unchecked(device: str) -> str | None:
    """Why no kernel can be checked here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from backfuse.kernels.launch import INTERPRETED

    if torch.device(device).type != "cuda" and not INTERPRETED:
        return "there is no GPU; TRITON_INTERPRET=1 checks the kernels' code under the interpreter"
    if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


def findings(device: str, defaults_only: bool = False) -> Iterator[Finding]:
    """Checks every kernel in every configuration, one after the other.

    Args:
        device: with kernels (see `unchecked`).
        defaults_only: leave out configurations that no launcher would choose here.
    """
    from . import attention_cases, kernel_case, kernel_cases
    from .run import first_line

    cuda = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32  # the interpreter's bf16 is wrong by itself
    tokens = TOKENS if cuda else INTERPRETED_TOKENS

    def operands(spec: BlockSpec) -> kernel_case.Operands:
        sizes = kernel_case.Sizes(spec, tokens, dtype, device, torch.float64)
        return kernel_case.Operands(sizes)

    torch.manual_seed(0)
    made = {name: operands(spec) for name, spec in SPECS.items()}
    makers = (kernel_cases.gemm_cases, kernel_cases.memory_cases, attention_cases.attention_cases)
    cases = (
        (name, case)
        for make in makers
        for name, t in made.items()
        if name != "wide" or make is attention_cases.attention_cases
        for case in make(t)
    )
    for name, case in cases:
        if case.check is None or (defaults_only and not case.default):
            continue
        if case.status == "ok":
            try:
                case.verify()
            except Exception as error:  # Triton's have no common base
                case.status = first_line(error)
        yield Finding(f"{name}: {case.name}", case.error, case.limit, case.status)


def run(device: str | None = None) -> int:
    """The command: prints versions, warnings and a line for each check.

    Returns:
        0; 1 if a kernel fails or is wrong.

    Raises:
        ValueError: for a device that is not here.
    """
    device = device or default_device()
    check_device(device)
    require("tqdm")
    for line in versions(device):
        print(line)
    for line in warnings(device):
        print(f"warning: {line}")
    reason = unchecked(device)
    if reason:
        print(f"no kernel was checked: {reason}")
        return 0
    wrong = count = 0
    for finding in findings(device):
        print(finding, flush=True)
        count += 1
        wrong += not finding.right
    print(f"{count - wrong} of {count} kernels and configurations are right")
    return int(bool(wrong))
