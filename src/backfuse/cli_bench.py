"""`backfuse bench`: the arguments of what it measures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backfuse.blocks.errors import nearest

#: Operation -> summary. `bench.registry` has them with all that belongs to them; that costs an
#: import of everything that is compared.
OPERATIONS = {
    "norm": "RMSNorm or LayerNorm",
    "rope": "qk-norm (where the block has it) and RoPE",
    "ffn": "the FFN half: norm, FFN, residual",
    "attention": "the attention core",
    "attention-half": "the attention half: norm, projections, attention, residual",
    "block": "a transformer block",
    "stack": "a stack of blocks",
    "offload": "a stack that keeps what it can in host memory; on a CPU, in files",
    "train": "a training step with AdamW of a small model around a stack",
    "model": "a whole Hugging Face model: loss and gradients",
    "lora": "the same with LoRA on all projections, the rest frozen",
}

#: Those of several blocks, where the user says so.
SEVERAL = ("ffn", "stack", "offload", "train", "model", "lora")


def names(text: str) -> tuple[str, ...]:
    """The names of a list such as `a,b`."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check_subject(names: Sequence[str]) -> None:
    """Raises a ValueError for something that cannot be measured, with the nearest name."""
    known = (*OPERATIONS, *OTHERS)
    for name in names:
        if not name.startswith("-") and name not in known:
            expected = f"expected one of {', '.join(known)}{nearest(name, known)}"
            raise ValueError(f"bench is asked for {name!r}, {expected}")


def add(commands: Any) -> None:
    """Adds the command."""
    bench = commands.add_parser("bench", help="measure against the alternatives")
    subjects = bench.add_subparsers(title="what to measure", required=True, metavar="WHAT")
    for op, summary in OPERATIONS.items():
        _add_operation(subjects, op, summary)
    for add_other in OTHERS.values():
        add_other(subjects)


def _add_operation(subjects: Any, op: str, summary: str) -> None:
    parser = subjects.add_parser(
        op, help=summary, description=f"Forward and backward of {summary}, against the others."
    )
    parser.add_argument(
        "--shape", type=names, metavar="A,B",
        help="see `backfuse bench list` (default: llama-3-8b on a GPU, small-512 on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", metavar="2k,8k", help="of a step (default: 8k on a GPU, 2k on a CPU)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="sequences (default: 1)")
    if op in SEVERAL:
        default = "1" if op == "ffn" else "4 on a GPU, 8 on a CPU"
        parser.add_argument("--layers", type=int, help=f"in a row (default: {default})")
    parser.add_argument(
        "--dtype", type=names, metavar="A,B",
        help="fp32, bf16, fp16 or fp64 (default: bf16 on a GPU, fp32 on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--mode", type=names, metavar="fwd,bwd,both", help="a row for each (default: both)"
    )
    parser.add_argument(
        "--provider", type=names, metavar="A,B",
        help="whom to measure; eager always runs (default: all)",
    )  # fmt: skip
    if op not in ("norm", "rope", "attention"):
        parser.add_argument(
            "--policy", type=names, metavar="A,B", help="backfuse's policies (default: all)"
        )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often everything is timed (default: 5)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU (default: its own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument(
        "--csv", type=Path, metavar="PATH",
        help="append rows there; what is there already is not measured again",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a picture (PNG) there")
    parser.add_argument(
        "--trace", type=Path, metavar="DIR", help="write a profiler's chrome trace of each step"
    )
    parser.add_argument(
        "--snapshot", type=Path, metavar="PATH", help="write CUDA's allocator history there"
    )
    parser.set_defaults(run=_operation, op=op)


def _operation(args: argparse.Namespace) -> int:
    from backfuse.bench import run

    options = _given(args)
    outputs = {name: options.pop(name, None) for name in ("csv", "plot", "trace", "snapshot")}
    threads = options.pop("threads", None)
    plural = {"mode": "modes", "provider": "providers", "policy": "policies"}
    setup = {plural.get(name, name): value for name, value in options.items()}
    return run.run(run.Setup(**setup), run.Outputs(**outputs), threads)


def _add_kernels(subjects: Any) -> None:
    parser = subjects.add_parser(
        "kernels",
        help="each kernel in each configuration, against the library; on a GPU",
        description="Time and error of every kernel in every configuration on a GPU.",
    )
    parser.add_argument("--shape", default="llama-3-8b", help="(default: %(default)s)")
    parser.add_argument("--tokens", metavar="8k", default="8k", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (default: bf16)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the table there")
    parser.set_defaults(run=_kernels)


def _kernels(args: argparse.Namespace) -> int:
    from backfuse.bench import kernels

    return kernels.run(**_given(args))


def _add_all(subjects: Any) -> None:
    parser = subjects.add_parser(
        "all",
        help="what matters most, in so many minutes",
        description="A numeric self-check, then every operation, the most important first. Stops "
        "in time; goes on where it stopped if it is run again.",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="(default: 9)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: bench/results/<device>)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.set_defaults(run=_all)


def _all(args: argparse.Namespace) -> int:
    from backfuse.bench import everything

    return everything.run(**_given(args))


def _add_check(subjects: Any) -> None:
    parser = subjects.add_parser(
        "check",
        help="others' published tables, measured again",
        description="The shapes of QuACK's and Liger's own tables, with what those say.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a table (default: all)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="append rows there")
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    from backfuse.bench import everything

    return everything.cross_check(**_given(args))


def _add_list(subjects: Any) -> None:
    parser = subjects.add_parser("list", help="operations, providers and shapes")
    parser.set_defaults(run=_list)


def _list(args: argparse.Namespace) -> int:
    from backfuse.bench import registry

    print(registry.listing())
    return 0


def _add_report(subjects: Any) -> None:
    parser = subjects.add_parser(
        "report",
        help="tables and pictures of README.md and docs/benchmarks.md from the CSVs",
        description="Writes what README.md and docs/benchmarks.md show of bench/results anew.",
    )
    parser.add_argument(
        "--root", type=Path, default=Path("."), help="of the repository (default: here)"
    )
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from backfuse.bench import report

    return report.run(args.root)


def _add_overhead(subjects: Any) -> None:
    parser = subjects.add_parser(
        "overhead",
        help="what Python takes to launch a pass",
        description="Forward and backward of both halves and of a block, with kernels and GEMMs "
        "that do nothing: microseconds of the host.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=2000, help="passes of each kind")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the table there")
    parser.set_defaults(run=_overhead)


def _overhead(args: argparse.Namespace) -> int:
    from backfuse.bench import overhead

    return overhead.run(**{name: value for name, value in vars(args).items() if name != "run"})


def _add_plans(subjects: Any) -> None:
    parser = subjects.add_parser(
        "plans",
        help="steps of a stack under its plans, against checkpoints, at equal bytes on the CPU",
        description="At each budget of kept bytes: the plan of every strategy, and PyTorch's "
        "checkpoint around every k-th layer, steps interleaved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shape", default="small-512", help="see `backfuse bench list`")
    parser.add_argument("--layers", type=int, default=8, help="how many")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens")
    parser.add_argument("--budgets", type=int, default=8, help="how many")
    parser.add_argument("--rounds", type=int, default=7, help="steps that are timed of each")
    parser.add_argument("--compiled", action="store_true", help="the compiler's budgets as well")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write CSV and picture there")
    parser.set_defaults(run=_plans)


def _plans(args: argparse.Namespace) -> int:
    from backfuse.bench import plans

    return plans.run(**{name: value for name, value in vars(args).items() if name != "run"})


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers of a list such as `4,8`."""
    return tuple(int(number) for number in names(text))


def _add_long(subjects: Any) -> None:
    parser = subjects.add_parser(
        "long",
        help="device memory against the length of the sequence: bytes per token and layer",
        description="Peak of forward and backward at several numbers of tokens and of layers, and "
        "its slopes; checkpoints, tiled MLPs and inputs on the host among them. Bytes, no times.",
    )
    parser.add_argument(
        "--shape",
        help="see `backfuse bench list` (default: llama-3.2-1b on a GPU, small-64 on a CPU)",
    )
    parser.add_argument(
        "--tokens", metavar="4k,8k",
        help="of a sequence, two numbers or more (default: 4k to 64k on a GPU, to 16k on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=_numbers, metavar="4,5",
        help="two numbers or more (default: 4,5: fewer offload nothing)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", help="fp32, bf16, fp16 or fp64 (default: bf16 on a GPU, fp32 on a CPU)"
    )
    parser.add_argument(
        "--provider", type=names, metavar="A,B", help="whom to measure (default: all)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--seed", type=int, help="of weights and inputs (default: 0)")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU (default: its own choice)")
    parser.add_argument(
        "--csv", type=Path, metavar="PATH",
        help="append rows there; what is there already is not measured again",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a picture (PNG) there")
    parser.set_defaults(run=_long)


def _long(args: argparse.Namespace) -> int:
    from backfuse.bench import long

    return long.run(**_given(args))


def _add_static(subjects: Any) -> None:
    parser = subjects.add_parser(
        "static",
        help="the kernels' registers, spills and shared memory, without a GPU",
        description="Compile every kernel ahead of time and read what the compilers made of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--arch", type=names, metavar="A,B,...", help="e.g. sm_90,gfx942 (default: all)"
    )
    parser.add_argument("--kernel", type=names, metavar="A,B,...", help="(default: all)")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the table there")
    parser.add_argument(
        "--check", type=Path, metavar="DIR", help="fail if a kernel is worse than in DIR/ARCH.csv"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.set_defaults(run=_static)


def _static(args: argparse.Namespace) -> int:
    from backfuse.bench import static_report

    options = {"arch": "architectures", "kernel": "kernels"}
    return static_report.run(**{options.get(n, n): value for n, value in _given(args).items()})


def _add_performance(subjects: Any) -> None:
    parser = subjects.add_parser(
        "performance",
        help="what blocks would take on a GPU, by arithmetic: the tables of docs/performance.md",
    )
    parser.add_argument(
        "--write", type=Path, metavar="PATH", help="write the tables into that document"
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write the frontier (PNG) there")
    parser.set_defaults(run=_performance)


def _performance(args: argparse.Namespace) -> int:
    from backfuse.bench import performance

    return performance.run(write=args.write, plot=args.plot)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that have a value."""
    return {n: value for n, value in vars(args).items() if n != "run" and value is not None}


#: What else can be asked for -> adds it.
OTHERS = {
    "kernels": _add_kernels,
    "all": _add_all,
    "check": _add_check,
    "list": _add_list,
    "long": _add_long,
    "overhead": _add_overhead,
    "performance": _add_performance,
    "plans": _add_plans,
    "report": _add_report,
    "static": _add_static,
}
