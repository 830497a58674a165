"""The `backfuse` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from backfuse import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments; None: the process's own.

    Returns:
        0; 1 if something measured failed; 2 for what the user can put right, said in one line;
        130 after Ctrl-C.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"backfuse: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("backfuse: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="backfuse",
        description="Transformer blocks that choose what to keep for the backward pass.",
    )
    parser.add_argument("--version", action="version", version=f"backfuse {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    bench = commands.add_parser("bench", help="measure against the alternatives")
    subjects = bench.add_subparsers(title="what to measure", required=True, metavar="WHAT")
    _add_bench_block(subjects)
    _add_bench_ffn(subjects)
    _add_bench_overhead(subjects)
    _add_bench_static(subjects)
    _add_bench_performance(subjects)
    _add_tune(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small language model under every policy: table, picture, sample",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each contender")
    parser.add_argument("--seq-len", type=int, default=256, help="bytes of a sequence")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a step")
    parser.add_argument("--hidden-size", type=int, default=192, help="width of the model")
    parser.add_argument(
        "--data", type=Path, help="a text file instead of the Python standard library's source"
    )
    parser.add_argument("--out", type=Path, default=Path("backfuse-demo"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from backfuse.bench import demo

    options = {name: value for name, value in vars(args).items() if name != "run"}
    return demo.run(demo.Settings(**options))


def _add_bench_block(subjects: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subjects.add_parser(
        "block",
        help="a stack of blocks: time, held bytes, peak",
        description="Forward and backward of a stack of Llama blocks, against Hugging Face's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--intermediate-size", type=int, default=1408)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="(default: as many as heads)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16, fp16 or fp64")
    parser.add_argument("--rounds", type=int, default=5, help="how often each one is timed")
    parser.add_argument(
        "--provider",
        type=_names,
        metavar="A,B,...",
        help="whom to measure; backfuse is one of them, plain always runs (default: all)",
    )
    parser.add_argument(
        "--policy", type=_names, metavar="A,B,...", help="backfuse's policies (default: all)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU (default: its own choice)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the table there")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a picture (PNG) there")
    parser.set_defaults(run=_bench_block)


def _bench_block(args: argparse.Namespace) -> int:
    from backfuse.bench import block, block_results

    options = {name: value for name, value in vars(args).items() if name != "run"}
    outputs = {name: options.pop(name) for name in ("csv", "plot", "threads")}
    names = {"provider": "providers", "policy": "policies"}
    setup = {names.get(name, name): value for name, value in options.items() if value is not None}
    return block.run(block_results.Setup(**setup), **outputs)


def _add_bench_ffn(subjects: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subjects.add_parser(
        "ffn",
        help="the FFN half: time, held bytes, peak; and its kernels against the library",
        description="Forward and backward of an FFN half, and the kernels one by one on a GPU.",
    )
    parser.add_argument(
        "--shape", metavar="NAME", help="(default: llama-3-8b on a GPU, a small Llama on a CPU)"
    )
    parser.add_argument("--hidden-size", type=int, help="instead of the shape's")
    parser.add_argument("--intermediate-size", type=int, help="instead of the shape's")
    parser.add_argument("--tokens", type=int, help="(default: 8192 on a GPU, 2048 on a CPU)")
    parser.add_argument(
        "--dtype", help="fp32, bf16, fp16 or fp64 (default: bf16 on a GPU, fp32 on a CPU)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often everything is timed (default: 5)"
    )
    parser.add_argument(
        "--provider",
        type=_names,
        metavar="A,B,...",
        help="whom to measure; backfuse is one of them, eager always runs (default: all)",
    )
    parser.add_argument(
        "--tables", type=_names, metavar="A,B", help="half and kernels (default: both)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="PATH",
        help="write PATH-half.csv and PATH-kernels.csv; with one table, PATH.csv",
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a picture (PNG) there")
    parser.set_defaults(run=_bench_ffn)


def _bench_ffn(args: argparse.Namespace) -> int:
    from backfuse.bench import ffn, ffn_results

    options = {name: value for name, value in vars(args).items() if name != "run"}
    outputs = {name: options.pop(name) for name in ("csv", "plot")}
    names = {"provider": "providers"}
    setup = {names.get(name, name): value for name, value in options.items() if value is not None}
    return ffn.run(ffn_results.Setup(**setup), **outputs)


def _add_bench_overhead(subjects: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    parser.set_defaults(run=_bench_overhead)


def _bench_overhead(args: argparse.Namespace) -> int:
    from backfuse.bench import overhead

    return overhead.run(**{name: value for name, value in vars(args).items() if name != "run"})


def _add_bench_static(subjects: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subjects.add_parser(
        "static",
        help="the kernels' registers, spills and shared memory, without a GPU",
        description="Compile every kernel ahead of time and read what the compilers made of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--arch", type=_names, metavar="A,B,...", help="e.g. sm_90,gfx942 (default: all)"
    )
    parser.add_argument("--kernel", type=_names, metavar="A,B,...", help="(default: all)")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the table there")
    parser.add_argument(
        "--check", type=Path, metavar="DIR", help="fail if a kernel is worse than in DIR/ARCH.csv"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.set_defaults(run=_bench_static)


def _bench_static(args: argparse.Namespace) -> int:
    from backfuse.bench import static_report

    options = {name: value for name, value in vars(args).items() if name != "run"}
    names = {"arch": "architectures", "kernel": "kernels"}
    return static_report.run(
        **{names.get(name, name): value for name, value in options.items() if value is not None}
    )


def _add_bench_performance(subjects: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subjects.add_parser(
        "performance",
        help="what blocks would take on a GPU, by arithmetic: the tables of docs/performance.md",
    )
    parser.add_argument(
        "--write", type=Path, metavar="PATH", help="write the tables into that document"
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write the frontier (PNG) there")
    parser.set_defaults(run=_bench_performance)


def _bench_performance(args: argparse.Namespace) -> int:
    from backfuse.bench import performance

    return performance.run(write=args.write, plot=args.plot)


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure kernels and attention cores on this GPU, and use the fastest from now on",
    )
    parser.add_argument("--shape", metavar="NAME", help="a model's sizes (default: llama-3-8b)")
    parser.add_argument(
        "--parts",
        type=_names,
        metavar="A,B",
        help="what to measure: ffn, attention (default: both)",
    )
    parser.add_argument("--hidden-size", type=int, help="of the FFN, instead of the shape's")
    parser.add_argument("--intermediate-size", type=int, help="likewise")
    parser.add_argument("--dtype", help="bf16, fp16 or fp32 (default: bf16)")
    parser.add_argument(
        "--tokens", type=int, help="rows of a call of the FFN, a chunk's worth (default: 4096)"
    )
    parser.add_argument(
        "--seq-lens",
        type=_integers,
        metavar="N,N,...",
        help="of attention, each for the lengths up to the next power of two (default: 1024 to "
        "32768)",
    )
    parser.add_argument("--window", type=int, help="of attention, instead of the shape's")
    parser.add_argument("--packed", action="store_true", help="attention over packed sequences")
    parser.add_argument("--device", help="(default: cuda)")
    parser.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    from backfuse.bench import tune

    given = {name: value for name, value in vars(args).items() if value is not None}
    return tune.run(**{name: value for name, value in given.items() if name != "run"})


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in _names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected integers such as 1024,4096") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
