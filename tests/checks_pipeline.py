"""What four ranks check of pipelines, of one plan for all, and of checkpoints."""

import os
import tempfile
import weakref
from pathlib import Path

import checks_sharded
import checks_tensor
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks_sharded import SPEC, mesh
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from backfuse import BlockStack, kept_bytes, parallelize, plan_on_all_ranks
from backfuse.blocks.planner.optimal import BudgetError

PARTS, BATCH, TOKENS = 4, 8, 12


def make_stacks(policy):
    torch.manual_seed(5)
    return [BlockStack(SPEC, 2, policy, chunk_size=64) for _ in range(2)]


def batch():
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(BATCH, TOKENS, 32, generator=generator) for _ in range(2)]


class Watch(torch.nn.Module):
    """A stage that notes how many forward passes still hold what they kept."""

    def __init__(self, stack):
        super().__init__()
        self.stack, self.nodes, self.most = stack, weakref.WeakSet(), 0

    def forward(self, x):
        out = self.stack(x)
        node = out.grad_fn
        while node is not None and "RecomputeFunction" not in node.name():
            node = node.next_functions[0][0]
        if node is not None:
            self.nodes.add(node)
        self.most = max(self.most, self.holding())
        return out

    def holding(self):
        """How many passes' kept tensors are still there."""
        return sum(map(self._holds, self.nodes))

    @staticmethod
    def _holds(node):
        try:
            return bool(node.saved_tensors)
        except RuntimeError:  # freed by its backward pass
            return False


def check_pipelines():
    """Two stages, four micro-batches: one process's gradients, and no more held than need be."""
    pair = mesh(2, 2)["shards"]
    stage_index = pair.get_local_rank()
    x, target = batch()

    def loss_of(out, wanted):
        return (out - wanted).square().mean()

    whole = make_stacks("keep")
    for part, wanted in zip(x.chunk(PARTS), target.chunk(PARTS), strict=True):
        (loss_of(whole[1](whole[0](part)), wanted) / PARTS).backward()
    expected = [p.grad for p in whole[stage_index].parameters()]
    for policy in ("selective", "full"):
        for schedule_of, most in ((ScheduleGPipe, (4, 4)), (Schedule1F1B, (2, 1))):
            watch = Watch(make_stacks(policy)[stage_index])
            stage = PipelineStage(
                watch, stage_index, 2, torch.device("cpu"), group=pair.get_group()
            )
            schedule = schedule_of(stage, n_microbatches=PARTS, loss_fn=loss_of)
            if stage_index == 0:
                schedule.step(x)
            else:
                schedule.step(target=target, losses=[])
            for parameter, grad in zip(watch.stack.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, grad, rtol=2e-5, atol=1e-7)
            assert watch.most == most[stage_index], (schedule_of, stage_index, watch.most)
            assert watch.holding() == 0


def check_one_plan_for_all():
    rank = dist.get_rank()
    sizes = {"num_layers": 6, "batch_size": 2, "seq_len": 64, "device": "h100"}
    full = 6 * sum(
        kept_bytes(SPEC, "full", batch_size=2, seq_len=64, dtype=torch.bfloat16).values()
    )
    budgets = [None, 3 * full, f"{2 * full}", 4 * full]
    made = plan_on_all_ranks(SPEC, budget=budgets[rank], allow=("recompute",), **sizes)
    assert made.budget == 2 * full and made.kept_bytes <= 2 * full
    everyones = [None] * 4
    dist.all_gather_object(everyones, made)
    assert all(other == made for other in everyones)
    for error, message, changes in (
        (BudgetError, "budget is 1 bytes, expected at least", {"budget": 1}),
        (ValueError, "rank 2: budget is", {"budget": "two" if rank == 2 else None}),
        (ValueError, "strategy is 'best'", {"strategy": "best"}),
        (ValueError, "seq_len is 128 on rank 2 and 64", {"seq_len": 128 if rank == 2 else 64}),
        (ValueError, "dtype is None on rank 1", {} if rank == 1 else {"dtype": torch.float16}),
    ):
        try:
            plan_on_all_ranks(SPEC, **{**sizes, "allow": ("recompute",), **changes})
        except error as caught:
            assert message in str(caught), caught
        else:
            raise AssertionError(message)


def shared_folder():
    """A new folder, the same on every rank."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return Path(made[0])


def check_checkpoints_fit_other_layouts():
    """Sharded over four; then over two and two, tensor-parallel, and whole: the same values."""
    folder = shared_folder()
    stack = checks_sharded.shard(checks_sharded.make_stack(), mesh=mesh(4))
    optimizer = torch.optim.AdamW(stack.parameters(), 1e-2)
    checks_sharded.loss_of(stack, checks_sharded.batch()[1]).backward()
    optimizer.step()
    model_state, optimizer_state = get_state_dict(stack, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    expected = {name: value.full_tensor() for name, value in model_state.items()}
    moments = {
        name: value["exp_avg"].full_tensor() for name, value in optimizer_state["state"].items()
    }

    def others():
        torch.manual_seed(9)
        yield checks_sharded.shard(fresh(), mesh=mesh(2, 2))
        yield parallelize(fresh(), checks_tensor.mesh()["tensor"])
        yield fresh()

    def fresh():
        return BlockStack(SPEC, checks_sharded.LAYERS, "full", chunk_size=64)

    for other in others():
        again = torch.optim.AdamW(other.parameters(), 1e-2)
        model, state = get_state_dict(other, again)
        loaded = {"model": model, "optimizer": state}
        dcp.load(loaded, checkpoint_id=folder)
        set_state_dict(
            other, again, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
        for name, parameter in other.named_parameters():
            moment = again.state[parameter]["exp_avg"]
            for mine, value in ((parameter.detach(), expected[name]), (moment, moments[name])):
                whole = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
                assert torch.equal(whole, value), name
    if dist.get_rank() == 0:
        for path in [*folder.glob("*"), *folder.glob(".metadata")]:
            if path.exists():
                os.remove(path)
        folder.rmdir()
