"""`backfuse plan`: the arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from backfuse.cli_bench import names

#: What a block's shape can be given by instead of a name, as arguments of `BlockSpec`.
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def add(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "plan",
        help="what each layer should keep on a device, for a number of bytes; needs no GPU",
        description="By arithmetic: the policy of every layer that is within the budgets and "
        "takes little time.",
    )
    parser.add_argument("--shape", metavar="NAME", help="see `backfuse bench list`")
    for name in SIZES:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, help="of a block, instead of a shape")
    parser.add_argument(
        "--config", type=Path, metavar="PATH", help="a Hugging Face config.json, instead of a shape"
    )
    parser.add_argument("--layers", type=int, help="how many (default: as --config says)")
    parser.add_argument("--seq-len", type=int, required=True, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences (default: 1)")
    parser.add_argument("--device", help="e.g. h200, a100, mi300x, cpu; not needed with --profile")
    parser.add_argument(
        "--profile", action="store_true", help="time the layers on this machine, once, instead"
    )
    parser.add_argument("--dtype", help="default: bf16; fp32 on a CPU")
    parser.add_argument("--budget", metavar="60GiB", help="bytes kept on the device")
    parser.add_argument(
        "--peak-budget", metavar="64GiB", help="bytes of that and of what backward rebuilds"
    )
    whole = parser.add_argument_group("a whole step, whose peak --peak-budget then limits")
    whole.add_argument("--vocab-size", type=int, help="of embedding and head (or as --config says)")
    whole.add_argument("--tied", action="store_true", help="one table for embedding and head")
    whole.add_argument("--optimizer", help="adamw (the default), adamw8bit, sgd, none")
    whole.add_argument("--world-size", type=int, help="of fully sharded data parallelism")
    whole.add_argument("--in-flight", type=int, help="micro-batches of a pipeline")
    whole.add_argument(
        "--loss-tokens", type=int, help="tokens whose logits exist at a time (default: all)"
    )
    parser.add_argument("--host-budget", metavar="200GiB", help="bytes kept on the host")
    parser.add_argument(
        "--strategy",
        default="optimal",
        help="optimal (the default), uniform, sqrt, recursive, chain, selective",
    )
    parser.add_argument(
        "--allow", type=names, default=("recompute", "offload"), metavar="A,B",
        help="of recompute, offload, fp8 (default: recompute,offload)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the plan there")
    parser.add_argument(
        "--plot", type=Path, metavar="PATH", help="draw memory against time (PNG) there"
    )
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    from backfuse.bench import plan

    options = {name: value for name, value in vars(args).items() if name != "run"}
    return plan.run(**options)
