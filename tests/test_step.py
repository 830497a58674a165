"""A whole step: its predicted peak against what the allocator saw, and budgets of it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from torch import nn

import backfuse
from backfuse import BlockSpec, BlockStack, ModelSpec
from backfuse.bench.measure import allocator_trace
from backfuse.bench.shapes import SHAPES
from backfuse.blocks.devices import Device
from backfuse.blocks.planner.optimal import BudgetError
from backfuse.blocks.policy import Policy

CPU = Device(
    "cpu", "interpreter", 1e11, 1.0, 1e10, 5e9, 10**10, 0, 1, 0, (torch.float32, torch.bfloat16)
)

LLAMA = BlockSpec(64, 176, 4, 2)
GPT2 = BlockSpec(
    64, 256, 4, norm="layernorm", hidden_act="gelu", gated=False, rope=None, qkv_bias=True,
    o_bias=True, up_bias=True, down_bias=True,
)  # fmt: skip
QWEN3 = BlockSpec(64, 176, 4, 2, qk_norm="head")


class Model(nn.Module):
    """Embedding, blocks, norm, head and loss, as `ModelSpec` has them."""

    def __init__(self, plan):
        super().__init__()
        spec, model = plan.spec, plan.model
        self.embedding = nn.Embedding(model.vocab_size, spec.hidden_size)
        self.blocks = BlockStack(spec, plan.num_layers)
        self.norm = nn.LayerNorm(spec.hidden_size, bias=False)
        self.head = nn.Linear(spec.hidden_size, model.vocab_size, bias=False)
        if model.tied:
            self.head.weight = self.embedding.weight
        for part in (self.embedding, self.norm, self.head):
            part.requires_grad_(model.trained)
        for name, parameter in self.blocks.named_parameters():
            layer, own = name.removeprefix("layers.").split(".", 1)
            parameter.requires_grad_(own in plan.requires_grad[int(layer)])
        backfuse.apply(self.blocks, plan)

    def forward(self, ids):
        logits = self.head(self.norm(self.blocks(self.embedding(ids))))
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def measured_peak(plan):
    """Bytes at most in a step, with what was there before it."""
    torch.manual_seed(0)
    model = Model(plan).to(plan.dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = None
    if plan.model.optimizer != "none":
        kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[plan.model.optimizer]
        optimizer = kind(trained, lr=1e-3)
    ids = torch.randint(plan.model.vocab_size, (plan.batch_size, plan.seq_len))

    def step():
        model(ids).backward()
        if optimizer:
            optimizer.step()
        for parameter in trained:  # a gradient that the trace has not seen come does not go
            parameter.grad = None

    step()  # the optimizer's states come with the first step
    states = optimizer.state_dict()["state"].values() if optimizer else ()
    state = [value for one in states for value in one.values() if torch.is_tensor(value)]
    there = sum(t.nbytes for t in (*model.parameters(), *state)) + 2 * ids.nbytes
    return there + allocator_trace(step).peak_bytes


LM = ModelSpec(vocab_size=300)
CASES = {
    "llama-keep": (LLAMA, {0: "keep"}, LM, {}),
    "llama-selective": (LLAMA, {"*": "selective"}, LM, {}),
    "llama-lean": (LLAMA, {"*": "lean"}, LM, {}),
    "llama-full": (LLAMA, {"*": "full"}, ModelSpec(50, optimizer="sgd"), {}),
    "llama-mixed": (LLAMA, {"*[01]": "keep", "*": "full"}, ModelSpec(50, optimizer="none"), {}),
    "llama-big-head": (LLAMA, {"*": "full"}, ModelSpec(3000, tied=True), {}),
    "llama-chunks": (LLAMA, {"*": "lean"}, LM, {"seq_len": 2100, "batch_size": 1}),
    "llama-bf16": (LLAMA, {"*": "lean"}, LM, {"dtype": torch.bfloat16}),
    "gpt2-keep": (GPT2, {0: "keep"}, LM, {}),
    "gpt2-full": (GPT2, {"*": "full"}, LM, {}),
    "qwen3-lean": (QWEN3, {"*": "lean"}, LM, {}),
    "frozen": (
        LLAMA, {"*": "lean"}, ModelSpec(300, trained=False),
        {"requires_grad": ["self_attn.q_proj.weight", "self_attn.v_proj.weight"]},
    ),
    "segments": (LLAMA, None, ModelSpec(50), {"strategy": "uniform", "budget": 280_000}),
}  # fmt: skip


def make_plan(spec, rules, model, **options):
    sizes = {"num_layers": 4, "batch_size": 2, "seq_len": 256, "dtype": torch.float32}
    how = {} if rules is None else {"strategy": "manual", "policies": rules}
    return backfuse.plan(spec, device=CPU, model=model, **{**sizes, **how, **options})


@pytest.mark.parametrize("case", CASES)
def test_the_predicted_peak_is_the_measured_one(case):
    spec, rules, model, options = CASES[case]
    plan = make_plan(spec, rules, model, **options)
    assert plan.peak_bytes == pytest.approx(measured_peak(plan), rel=0.05)
