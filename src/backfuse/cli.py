"""The `backfuse` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from backfuse import __version__, cli_bench, cli_plan


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments; None: the process's own.

    Returns:
        0; 1 if something measured failed; 2 for what the user can put right, said in one line;
        130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["bench"]:
            cli_bench.check_subject(argv[1:2])
        args = _parser().parse_args(argv)
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
    cli_plan.add(commands)
    cli_bench.add(commands)
    _add_doctor(commands)
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


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor", help="versions, warnings, and whether every kernel is right on this device"
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from backfuse.bench import doctor

    return doctor.run(args.device)


def _add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure kernels and attention cores on this GPU, and use the fastest from now on",
    )
    parser.add_argument("--shape", metavar="NAME", help="a model's sizes (default: llama-3-8b)")
    parser.add_argument(
        "--parts",
        type=cli_bench.names,
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
        return tuple(int(number) for number in cli_bench.names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected integers such as 1024,4096") from None


if __name__ == "__main__":
    sys.exit(main())
