"""A step under FSDP2: backfuse's policies against a checkpoint around each block.

    torchrun --nproc-per-node 2 -m backfuse.bench.sharded --tokens 1024 --layers 2

Every layer is sharded over all processes, under gloo on a CPU. Rounds are interleaved, ratios are
within a round; the peak is the allocator's, above parameters, of the first process.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from backfuse import BlockSpec, BlockStack

from .measure import MIB, Spread, allocator_trace
from .plain import PlainBlock, rotary_tables

RIVAL = "checkpoint"


class Checkpointed(nn.Module):
    """Plain blocks, each behind PyTorch's `checkpoint_wrapper`."""

    def __init__(self, spec: BlockSpec, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(checkpoint_wrapper(PlainBlock(spec)) for _ in range(layers))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """The last block's output."""
        for layer in self.layers:
            x = layer(x, **options)
        return x


def sharded(kind: str, spec: BlockSpec, layers: int, mesh: DeviceMesh) -> nn.Module:
    """A stack of that kind, every layer a unit."""
    torch.manual_seed(0)
    model: Any = (
        Checkpointed(spec, layers) if kind == RIVAL else BlockStack(spec, layers, policy=kind)
    )
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    heads = args.hidden_size // 64
    spec = BlockSpec(args.hidden_size, -(-8 * args.hidden_size // 96) * 32, heads, head_dim=64)
    models = {kind: sharded(kind, spec, args.layers, mesh) for kind in (RIVAL, "lean", "full")}
    x = torch.randn(1, args.tokens, args.hidden_size)
    angles = rotary_tables(args.tokens, spec.head_dim)

    def step(kind: str) -> None:
        models[kind](x, position_embeddings=angles).square().mean().backward()

    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    peaks = {}
    for number in range(args.rounds + 2):  # one to warm up, the last for the peaks
        for kind, model in models.items():
            dist.barrier()
            begun = time.perf_counter()
            if number <= args.rounds:
                step(kind)
            else:
                peaks[kind] = allocator_trace(lambda kind=kind: step(kind)).peak_bytes  # type: ignore[misc]
            dist.barrier()
            if 0 < number <= args.rounds:
                seconds[kind].append(time.perf_counter() - begun)
            model.zero_grad()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, {args.layers} layers, {spec}")
        for kind, taken in seconds.items():
            ratios = [mine / theirs for mine, theirs in zip(taken, seconds[RIVAL], strict=True)]
            spread = Spread.of(ratios)
            print(
                f"{kind}: {spread.median:.2f} x {RIVAL} ({spread.p20:.2f} to {spread.p80:.2f}), "
                f"{Spread.of(taken).median:.2f} s, peak {peaks[kind] / MIB:.0f} MiB"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
