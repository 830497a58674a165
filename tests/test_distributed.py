"""DDP, FSDP2, tensor and pipeline parallelism on four processes: a group for each matter."""

import os
import pickle

import pytest
import ranks
import torch.distributed

from backfuse import BlockSpec, plan, plan_on_all_ranks
from backfuse.blocks.planner.optimal import BudgetError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]


@pytest.mark.parametrize(
    "module",
    [
        "checks_sharded", "checks_tensor", "checks_tensor_patched", "checks_context",
        "checks_pipeline",
    ],
)
def test_on_four_ranks(module, tmp_path):
    if module == "checks_tensor_patched":
        pytest.importorskip("peft")
    went = ranks.run(tmp_path, module)
    assert went or "CHECKS" in os.environ
    assert not any(went.values()), "\n".join(
        f"{name}:\n{said}" for name, said in went.items() if said
    )


def test_a_plan_alone_is_a_plan():
    spec = BlockSpec(32, 48, 4)
    options = {"num_layers": 3, "batch_size": 1, "seq_len": 64, "device": "h100"}
    assert plan_on_all_ranks(spec, **options) == plan(spec, **options)
    with pytest.raises(BudgetError, match="budget is 1 bytes") as caught:
        plan_on_all_ranks(spec, budget=1, allow=("recompute",), **options)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.least == caught.value.least
