"""What the compiler's graphs hold: the policy's tensors, whatever its partitioner is told."""

import json
import operator
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, make_block, make_input, results, same_bits
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.library import opcheck

from backfuse import BlockSpec, BlockStack, attention, ffn, kept_bytes
from backfuse.blocks import function
from backfuse.blocks.told import read

POLICIES = ("keep", "selective", "lean", "full")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that notes the partitioned graphs and runs them as they are."""

    def __init__(self):
        compile_ = aot_autograd(
            fw_compiler=self.note("forward"),
            bw_compiler=self.note("backward"),
            partition_fn=min_cut_rematerialization_partition,
        )
        self.compile = compile_

    def __call__(self, *args, **kwargs):
        return self.compile(*args, **kwargs)

    def note(self, name):
        def compiler(graph, _):
            setattr(self, name, graph)
            return torch._functorch.aot_autograd.make_boxed_func(graph.forward)

        return compiler

    @property
    def saved(self):
        """Nodes that the forward graph hands to the backward graph, its inputs apart."""
        *_, output = self.forward.graph.nodes
        names = {node.name for node in self.backward.graph.nodes if node.op == "placeholder"}
        return [node for node in output.args[0] if node.op != "placeholder" and node.name in names]

    def calls(self, name):
        """How often the backward graph calls an operator of that name."""
        return sum(name in str(node.target) for node in self.backward.graph.nodes)


def traced(module, x, grad, budget):
    graphs = Graphs()
    run = torch.compile(module, fullgraph=True, backend=graphs)
    run.zero_grad, run.parameters = module.zero_grad, module.parameters
    with torch._functorch.config.patch(activation_memory_budget=budget):
        got = results(run, x, grad)
    return graphs, got


def size(nodes):
    return sum(node.meta["val"].numel() * node.meta["val"].element_size() for node in nodes)


@pytest.mark.parametrize("policy", POLICIES)
def test_saved_is_what_the_policy_keeps(policy):
    spec = FAMILIES["gpt2"]  # drops out: a seed drawn twice would be seen
    stack = BlockStack(spec, 2, policy, chunk_size=64)
    x, grad = make_input(spec)
    expected = results(stack, x, grad)
    sizes = kept_bytes(spec, policy, batch_size=2, seq_len=70)
    own = 2 * sum(sizes.values())
    for budget in (1, 0.5, 0.001):
        torch._dynamo.reset()
        graphs, got = traced(stack, x, grad, budget)
        assert same_bits(got, expected)
        assert graphs.calls("block_forward") == graphs.calls("randint") == 0
        assert size(graphs.saved) == own, budget


def test_saved_among_other_layers():
    """Others may be computed again, for a budget; blocks are not."""
    spec = FAMILIES["phi3"]
    stack = BlockStack(spec, 2, ["lean", "keep"], segments=2, chunk_size=64)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), stack)
    x, grad = make_input(spec)
    expected = results(model, x, grad)
    sizes = []
    for budget in (1, 0.5, 0.01):
        torch._dynamo.reset()
        graphs, got = traced(model, x, grad, budget)
        assert same_bits(got, expected)
        assert graphs.calls("block_forward") == graphs.calls("randint") == 0
        ours = [n for n in graphs.saved if n.target is operator.getitem]
        sizes.append((size(ours), size(graphs.saved) - size(ours)))
    assert len({ours for ours, _ in sizes}) == 1
    assert sizes[-1][1] < sizes[0][1]


def test_a_budget_of_nothing_is_refused():
    block = make_block(FAMILIES["llama"], "full")
    x, grad = make_input(block.spec)
    with pytest.raises(Exception, match="activation_memory_budget is 0, expected more"):
        traced(block, x, grad, 0)
    with torch._functorch.config.patch(activation_memory_budget=0), torch.no_grad():
        torch.compile(block, fullgraph=True, backend="aot_eager")(x)  # nothing is rebuilt


def test_nothing_is_merged_that_drops_out_differently():
    block = make_block(BlockSpec(32, 48, 4, residual_dropout=0.5), "full")
    x, grad = make_input(block.spec)

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(x) - self.block(x)

    graphs, got = traced(Twice(), x, grad, 1)
    assert same_bits(got, results(Twice(), x, grad))
    assert graphs.calls("block_backward") == 2


def operators(run):
    """The arguments of every operator that `run()` calls, in order."""
    calls = []

    class Notes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "backfuse":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patch, Notes():
        patch.setattr(function, "operators_matter", lambda: True)
        run().sum().backward()
    return calls


RUNS = {
    "block": lambda block, x: block(x),
    "packed": lambda block, x: block(x[:1], cu_seqlens=torch.tensor([0, 3, 9]), max_seqlen=6),
    "attention": lambda block, x: attention(
        x, dict(block.named_parameters()), block.spec, "lean", training=True
    ),
    "ffn": lambda block, x: ffn(x, dict(block.named_parameters()), block.spec, "selective"),
}


@pytest.mark.parametrize(
    "family, run, policy",
    [
        ("gpt2", "block", "keep"),
        ("gemma2", "block", "lean"),
        ("llama", "packed", "lean"),
        ("gpt2", "attention", "full"),
        ("olmo2", "ffn", "full"),
        ("odd-sizes", "block", "lean"),  # biases of projections side by side
        ("geglu-layernorm-post", "block", "full"),
    ],
)
def test_opcheck(family, run, policy):
    block = make_block(FAMILIES[family], policy)
    x, _ = make_input(block.spec, seq_len=9)
    calls = operators(lambda: RUNS[run](block, x))
    assert len(calls) == 2
    for op, args in calls:
        args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        if "forward" in str(op):
            x_, weights, *side = args
            args = (x_.requires_grad_(), [w.requires_grad_() for w in weights], *side)
        opcheck(op, args)


def test_opcheck_of_a_segment():
    stack = BlockStack(FAMILIES["phi3"], 3, "lean", segments=((1, 2),))
    x, _ = make_input(stack.spec, seq_len=9)
    calls = operators(lambda: stack(x))
    assert len(calls) == 2
    for op, args in calls:
        opcheck(op, torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args))


def test_the_text_says_it_all(tmp_path):
    """Another process runs a stored operator call, and finds the same bits."""
    stack = BlockStack(FAMILIES["gemma2"], 3, ["keep", "lean", "full"], segments=((1, 2),))
    x, _ = make_input(stack.spec, seq_len=9)
    calls = operators(lambda: stack(x))
    text = calls[0][1][-1]
    told = json.loads(text)
    assert told["tree"] == [0, [1, 2]] and BlockSpec(**told["spec"]) == stack.spec
    assert read(text).layers[2].policy == stack.policies[2].with_x("keep")
    stored = [(str(op), args, op(*args)) for op, args in calls]
    torch.save(torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, stored), tmp_path / "c")
    script = (
        "import sys, torch, backfuse\n"
        "for name, args, outs in torch.load(sys.argv[1], weights_only=False):\n"
        "    namespace, op, overload = name.split('.')\n"
        "    with torch.no_grad():\n"
        "        again = getattr(torch.ops.backfuse, op)(*args)\n"
        "    assert all(torch.equal(a, b) for a, b in zip(again, outs, strict=True)), name\n"
        "print('same')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c")], capture_output=True, text=True
    )
    assert done.stdout == "same\n", done.stderr
