"""`backfuse bench static`: what the compilers make of the kernels, for GPUs that need not be here.

Each case is compiled ahead of time, in processes of their own: a compiler that dies takes one row
with it. Registers, spills and serialised tensor-core instructions come from ptxas's log, spills
inside loops from the disassembly, the rest from Triton's metadata; for gfx942, all from the
assembly. Results are kept on disk under a hash of the sources, the case and Triton's version.

What stands beside that in the table, programs at a time, share of a GEMM's speed and microseconds,
is a model, not a measurement: see `static_model.py`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd

import backfuse.kernels

from .options import check_positive, choose, progress_bar, require, writable_folder
from .shapes import SHAPES
from .static_case import Case, bind
from .static_cases import ARCHITECTURES, EXPERIMENTS, MODULES, cases
from .static_check import read_tables, regressions
from .static_model import (
    PROCESSORS,
    TIMES,
    TOKENS,
    programs_per_processor,
    speed_share,
    times,
)

TENSOR_CORE = re.compile(r"(?<![.\w])[A-Z]+MMA\b|\bv_mfma")  # HFMA2.MMA is none
SPILL = re.compile(r"\b(?:LDL|STL)\b|\bscratch_(?:load|store)|Folded (?:Spill|Reload)")
EXIT = re.compile(r"\bEXIT\b|\bs_endpgm\b")


def read_ptxas(log: str) -> dict[str, Any]:
    """Registers, spilled bytes (stores and loads of a thread) and serialisation, from `ptxas -v`.

    Raises:
        ValueError: if that is no such log.
    """
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise ValueError(f"log is {log[:80]!r}, expected ptxas's, with registers and spills")
    return {
        "registers": max(registers),
        "spill_bytes": sum(int(stores) + int(loads) for stores, loads in spills),
        "serialized": "serialized" in log,
    }


def read_amdgcn(assembly: str) -> dict[str, Any]:
    """VGPRs, and 4 bytes for every VGPR or SGPR that was spilled, from AMD's metadata.

    Raises:
        ValueError: if the metadata is missing.
    """
    found = dict(re.findall(r"\.(vgpr_count|[sv]gpr_spill_count):\s+(\d+)", assembly))
    if len(found) != 3:
        raise ValueError("assembly holds no metadata of registers, expected AMD's")
    spilled = int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
    return {
        "registers": int(found["vgpr_count"]), "spill_bytes": 4 * spilled, "serialized": False,
    }  # fmt: skip


def read_sass(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions of a `cuobjdump -sass`, and its jumps: from one's index to another's."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", sass, re.MULTILINE)
    index = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    jumps = []
    for i, (_, text) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) in index:
            jumps.append((i, index[int(target[1], 16)]))
    return [text for _, text in lines], jumps


def read_assembly(assembly: str) -> tuple[list[str], list[tuple[int, int]]]:
    """As `read_sass`, of AMD's assembly with labels."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        label = re.match(r"(\.LBB\w+):", line)
        if label:
            labels[label[1]] = len(code)
        elif re.match(r"\s+[a-z]\w+", line):
            code.append(line.strip())
    jumps = []
    for i, text in enumerate(code):
        target = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", text)
        if target and target[1] in labels:
            jumps.append((i, labels[target[1]]))
    return code, jumps


def loop_spills(code: Sequence[str], jumps: Sequence[tuple[int, int]]) -> int | None:
    """Instructions that spill or reload inside the innermost loops with tensor-core instructions.

    A jump back over an exit is the way home from a block that stands behind the kernel's end (a
    barrier's slow path), no loop.

    Returns:
        Their number; None if there is no such loop.
    """
    ends: dict[int, int] = {}
    for source, target in jumps:
        body = code[target : source + 1]
        if body and any(map(TENSOR_CORE.search, body)) and not any(map(EXIT.search, body)):
            ends[target] = max(source, ends.get(target, 0))
    loops = [
        (start, end)
        for start, end in ends.items()
        if not any(start < other and last <= end for other, last in ends.items())
    ]
    if not loops:
        return None
    return sum(bool(SPILL.search(text)) for start, end in loops for text in code[start : end + 1])


def tensor_core(text: str) -> str:
    """The tensor-core instructions of some PTX or AMD assembly, the widest first."""
    patterns = {
        "wgmma": r"wgmma\.mma_async\S*\.(m\d+n\d+k\d+)",
        "mma": r"\bmma\.sync\S*?\.(m\d+n\d+k\d+)",
        "tcgen05.mma": r"tcgen05\.mma()\.",
        "mfma": r"\bv_mfma_(\w+)",
    }
    for name, pattern in patterns.items():
        shapes = set(re.findall(pattern, text))
        if shapes:
            order = sorted(shapes, key=lambda s: [-int(n) for n in re.findall(r"\d+", s)])
            return f"{name} {'+'.join(order)}".strip()
    return "none"


def compile_case(case: Mapping[str, Any]) -> dict[str, Any]:
    """Compile a case in this process and read what came out."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    architecture, name = case["architecture"], case["kernel"]
    package = "bench" if name in EXPERIMENTS else "kernels"
    module = importlib.import_module(f"backfuse.{package}.{MODULES[name]}")
    function = getattr(module, f"{name}_kernel")
    unspecialized = [p.name for p in function.params if p.do_not_specialize]
    signature, values, attributes = bind(case, function.arg_names, unspecialized)
    dtypes = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    values = {
        at: dtypes[value] if function.arg_names[at[0]].endswith("DTYPE") else value
        for at, value in values.items()
    }
    nvidia = architecture in PROCESSORS
    target = GPUTarget("hip", architecture, 64)
    if nvidia:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        source = ASTSource(function, signature, values, attributes)
        kernel = triton.compile(source, target=target, options=dict(case["options"]))
    if nvidia:
        assembly = kernel.asm["ptx"]
        found = read_ptxas(log.getvalue())
        code = read_sass(_disassemble(kernel.asm["cubin"]))
    else:
        assembly = kernel.asm["amdgcn"]
        found, code = read_amdgcn(assembly), read_assembly(assembly)
    return found | {
        "loop_spills": loop_spills(*code),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "tensor_core": tensor_core(assembly),
        "tma": "cp.async.bulk.tensor" in assembly,
        "ptxas": _ptxas_version(target.arch) if nvidia else "",
    }


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _ptxas_version(architecture: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas_version

    version = re.search(r"\bV([\d.]+)", get_ptxas_version(architecture))
    return version[1] if version else ""


def serve() -> None:
    """Answer cases on standard input, one line of JSON each, with lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is no answer
    for line in sys.stdin:
        try:
            found = compile_case(json.loads(line))
        except Exception as error:  # a failure is a row of the table, whatever it is
            found = {"error": _reason(error)}
        print(json.dumps(found), file=answers, flush=True)


def _reason(error: BaseException) -> str:
    """The innermost cause of an error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


class Compiler:
    """A process that compiles; a fresh one after a crash. Triton's interpreter is off in it."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir()
        self._scratch, self._errors = scratch, scratch / "errors"
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, case: Case) -> dict[str, Any]:
        """What `compile_case` finds, or the `error`."""
        process = self._process or self._start()
        assert process.stdin and process.stdout
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(case.as_dict()) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if answer:
            return json.loads(answer)
        self._process = None
        said = self._errors.read_text("utf-8", "replace").strip().splitlines()
        status = f"the compiling process ended with status {process.wait()}"
        return {"error": ": ".join([status, *said[-1:]])}

    def _start(self) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_ALWAYS_COMPILE": "1",  # Triton's cache has no logs
            "TRITON_CACHE_DIR": str(self._scratch / "triton"),
        }
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from backfuse.bench.static_report import serve; serve()"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment,
                cwd=self._scratch,  # an import has to find the package, not the checkout's folders
                start_new_session=True,  # Ctrl-C is for the one who asked
            )  # fmt: skip
        return self._process

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process and process.stdin and process.stdout:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def default_cache() -> Path:
    """Where results are kept: in `$BACKFUSE_CACHE`, or the user's cache."""
    base = os.environ.get("BACKFUSE_CACHE") or Path.home() / ".cache" / "backfuse"
    return Path(base, "static")


def cache_key(case: Case) -> str:
    """A hash of what a result depends on: the case, Triton, these files and the kernel's."""
    here = Path(__file__)
    names = ("static_case.py", "static_cases.py", "static_rows.py")
    sources = {here, *(here.with_name(name) for name in names)}
    folder, pending = Path(backfuse.kernels.__path__[0]), [MODULES[case.kernel]]
    if case.kernel in EXPERIMENTS:
        sources.add(here.with_name(f"{MODULES[case.kernel]}.py"))
        pending = ["ffn_dact"]
    while pending:
        path = folder / f"{pending.pop()}.py"
        if path not in sources and path.exists():
            sources.add(path)
            siblings = re.findall(r"^from \.(\w+) import", path.read_text("utf-8"), re.MULTILINE)
            pending += [name for name in siblings if name != "configs"]  # those are in the case
    parts = [path.read_bytes() for path in sorted(sources)]
    parts += [json.dumps(case.as_dict(), sort_keys=True).encode(), _version("triton").encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def compile_all(
    wanted: Sequence[Case], jobs: int, cache: Path
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Compile cases in processes, and remember the results; those that failed are tried again.

    Yields:
        A case's index and what `compile_case` found, as they come.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing: dict[int, Path] = {}
    for index, case in enumerate(wanted):
        path = cache / f"{cache_key(case)}.json"
        if path.exists():
            yield index, json.loads(path.read_text("utf-8"))
        else:
            missing[index] = path
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        compilers = [Compiler(Path(folder, str(number))) for number in range(jobs)]
        idle: queue.SimpleQueue[Compiler] = queue.SimpleQueue()
        for compiler in compilers:
            idle.put(compiler)

        def work(index: int) -> int:
            compiler = idle.get()
            try:
                found[index] = compiler(wanted[index])
            finally:
                idle.put(compiler)
            return index

        found: dict[int, dict[str, Any]] = {}
        futures = [pool.submit(work, index) for index in missing]
        try:
            for future in as_completed(futures):
                index = future.result()
                unchanged = cache_key(wanted[index]) == missing[index].stem  # by somebody editing
                if "error" not in found[index] and unchanged:
                    partial = missing[index].with_suffix(f".{os.getpid()}")
                    partial.write_text(json.dumps(found[index]), "utf-8")
                    partial.replace(missing[index])
                yield index, found[index]
        finally:
            for future in futures:
                future.cancel()
            for compiler in compilers:
                compiler.close()


def row(case: Case, found: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    warps = case.options.get("num_warps", found.get("warps", 4))
    line: dict[str, Any] = {
        "kernel": case.kernel, "arch": case.architecture, "dtype": case.dtype,
        "variant": case.variant, "tile": case.tile, "warps": warps,
    }  # fmt: skip
    names = ("stages", "registers", "spill_bytes", "loop_spills", "shared_bytes")
    line |= {name: found.get(name) for name in names}
    line["programs_per_sm"] = None
    if "error" not in found:
        line["programs_per_sm"] = programs_per_processor(
            case.architecture, found["registers"], found["shared_bytes"], warps
        )
    line |= {name: found.get(name) for name in ("tensor_core", "tma", "serialized")}
    line["gemm_share"] = speed_share(case, warps)
    line |= {"error": found.get("error", ""), "ptxas": found.get("ptxas", "")}
    return line | times(case, line["gemm_share"], line["programs_per_sm"])


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The table, whole numbers as such although some are missing."""
    table = pd.DataFrame(rows)
    counts = ("stages", "registers", "spill_bytes", "loop_spills", "shared_bytes")
    kinds = dict.fromkeys((*counts, "programs_per_sm"), "Int64") | {"gemm_share": "float64"}
    kinds |= dict.fromkeys(TIMES, "float64")
    return table.astype(kinds)


def show(table: pd.DataFrame) -> None:
    """Print what the compilers found, then the modelled times of the default configurations."""
    shown = table.drop(columns=["error", "ptxas", *TIMES])
    shown["gemm_share"] = shown["gemm_share"].map("{:.2f}".format)
    print(shown.astype(object).where(table.notna(), "-").to_string(index=False))
    served = table.dropna(subset=TIMES, how="all")
    # per kernel and shape the first row that serves it: the default
    defaults = served.groupby(["arch", "kernel"], sort=False)[list(TIMES)].first()
    if len(defaults):
        defaults.columns = pd.Index(SHAPES)
        print(f"\nmodelled microseconds of the defaults, {TOKENS} tokens in one sequence:")
        print(defaults.map(lambda us: "-" if pd.isna(us) else f"{us:,.0f}").to_string())


def run(
    architectures: Sequence[str] = ARCHITECTURES,
    kernels: Sequence[str] = tuple(MODULES),
    csv: Path | None = None,
    check: Path | None = None,
    jobs: int = 2,
    cache: Path | None = None,
) -> int:
    """The command: compiles, prints, compares, writes.

    Args:
        architectures: names from `ARCHITECTURES`.
        kernels: names from `MODULES`.
        csv: file for the table; None for no file.
        check: folder of earlier tables, `<architecture>.csv`, to compare with; None for none.
        jobs: processes that compile.
        cache: folder of earlier results; None for the user's.

    Returns:
        The exit code: 0; 1 if a case failed or is worse than before; 130 after Ctrl-C, with the
        table until then.

    Raises:
        ValueError: for a name that is not known, too few jobs, or an earlier table that is none.
        OSError: if a file cannot be read or written.
    """
    for name in architectures:
        choose("arch", name, ARCHITECTURES)
    for name in kernels:
        choose("kernel", name, MODULES)
    check_positive("jobs", jobs)
    require("triton")
    if csv:
        writable_folder(csv.parent)
    earlier = read_tables(check, architectures) if check else None
    wanted = cases(architectures, kernels)
    found: dict[int, dict[str, Any]] = {}
    interrupted = False
    try:
        with progress_bar(total=len(wanted), unit="kernel") as bar:
            for index, result in compile_all(wanted, jobs, cache or default_cache()):
                found[index] = result
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
    if not found:
        print("nothing was compiled")
        return 130 if interrupted else 0
    table = frame([row(wanted[index], found[index]) for index in sorted(found)])
    show(table)
    failed = table[table["error"] != ""]
    for _, line in failed.iterrows():
        print(f"failed: {line['kernel']} {line['arch']} {line['variant']}: {line['error']}")
    triton = _version("triton")
    worse = [] if earlier is None else regressions(table, earlier, triton)
    print("\n".join(worse), end="\n" if worse else "")
    if earlier is not None and triton not in set(earlier["triton"]):
        print(f"note: the earlier tables are not of triton {triton}: nothing was compared")
    if interrupted:
        print("note: interrupted: the table holds what was compiled until then")
    if csv:
        table["triton"], table["date"] = triton, datetime.date.today().isoformat()
        table.to_csv(csv, index=False)
        print(f"wrote {csv}")
    return 130 if interrupted else int(len(failed) > 0 or len(worse) > 0)
