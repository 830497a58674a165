"""`flash_attention` as an operator: what torch.compile and selective checkpoints see of it."""

import functools
from unittest import mock

import pytest
import torch
from conftest import DEVICE
from families import same_bits
from test_compile_graphs import Graphs, operators
from test_flash_attention import CASES, F32, IMPLS, call, tensors
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from backfuse import SAVE_OPS, flash_attention
from backfuse.blocks import flash_attention as public
from backfuse.blocks import flash_attention_op as operator
from backfuse.kernels import attention_backward


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def case(name, frozen=()):
    """A call of tensors, and the tensors: q, k, v and perhaps sinks, some of which are frozen."""
    sizes, options, with_sinks = CASES[name]
    torch.manual_seed(1)
    leaves = tensors(*sizes, F32)
    if with_sinks:
        leaves.append(torch.linspace(-2, 2, sizes[3]).requires_grad_())
    for index in frozen:
        leaves[index].requires_grad_(False)

    def run(q, k, v, sinks=None):
        return call(q, k, v, sinks=sinks, **options)

    return run, leaves


def step(run, leaves):
    """Output and gradients, None where there is none."""
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(3)
    out = run(*leaves)
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", ["causal", "cross", "decoding", "packed-cross"])
def test_compiled_it_has_eager_bits(name):
    run, leaves = case(name)
    expected = step(run, leaves)
    for budget in (1, 0.01) if name == "cross" else (1,):  # a seed drawn twice would be seen
        torch._dynamo.reset()
        graphs = Graphs()
        with torch._functorch.config.patch(activation_memory_budget=budget):
            found = step(torch.compile(run, fullgraph=True, backend=graphs), leaves)
        assert same_bits(found, expected)
        called = [str(n.target) for n in graphs.backward.graph.nodes if n.op == "call_function"]
        assert called.count("backfuse.flash_attention_backward.default") == 1
        assert not any("randint" in target for target in called)


def test_inductor_and_one_graph_for_all_lengths():
    counter = CompileCounterWithBackend("inductor")


    def run(q, k, v):
        return flash_attention(q, k, v, softcap=5.0)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    frames = None
    for queries, keys in ((40, 50), (33, 20), (57, 57)):
        leaves = tensors(2, queries, keys, 4, 2, 16, 16, F32)
        expected = step(run, leaves)
        assert same_bits(step(compiled, leaves), expected)
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


@pytest.mark.parametrize(
    "name, frozen", [("causal", ()), ("cross", ()), ("packed", ()), ("sinks", (0, 3))]
)
def test_opcheck(name, frozen):
    run, leaves = case(name, frozen)
    with mock.patch.object(public, "operators_matter", lambda: True):
        calls = operators(lambda: run(*leaves))
    assert [str(op).split(".")[1] for op, _ in calls] == [
        "flash_attention_forward", "flash_attention_backward",
    ]  # fmt: skip
    for op, args in calls:
        given = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        if "forward" in str(op):
            wanted = [leaf.requires_grad for leaf in leaves]
            for x, want in zip(given, wanted, strict=False):
                x.requires_grad_(want)
        opcheck(op, given)


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("name", ["causal", "sinks", "cross", "decoding", "latent"])
def test_only_what_is_wanted_is_computed_and_counted(name, frozen):
    """Of what is written out; PyTorch's own kernel computes all."""
    run, leaves = case(name, frozen)
    if len(frozen) == len(leaves):
        pytest.skip("nothing is wanted")
    everything = step(*case(name))
    counts = []
    for on in (True, False):
        with (
            mock.patch.object(public, "operators_matter", lambda on=on: on),
            FlopCounterMode(display=False) as counter,
        ):
            found = step(run, leaves)
        counts.append(counter.get_total_flops())
        assert [grad is None for grad in found[1:4]] == [index in frozen for index in range(3)]
        pairs = zip(found, everything, strict=True)
        assert all(mine is None or torch.equal(mine, true) for mine, true in pairs)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("frozen, runs", [((), 2), ((0,), 1), ((1, 2), 1), ((0, 1, 2), 0)])
def test_kernels_of_unwanted_gradients_are_not_launched(frozen, runs):
    q, k, v = (x.to(DEVICE).detach() for x in tensors(1, 20, 20, 2, 1, 16, 16, F32))
    sinks = torch.zeros(2, device=DEVICE, requires_grad=True)
    leaves = [q, k, v, sinks]
    for index in {0, 1, 2} - set(frozen):
        leaves[index].requires_grad_()
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("attention_dkdv_kernel", "attention_dq_kernel"):
            kernel = getattr(attention_backward, name)

            class Noted:
                def __getitem__(self, grid, name=name, kernel=kernel):
                    launched.append(name)
                    return kernel[grid]

            patch.setattr(attention_backward, name, Noted())
        flash_attention(q, k, v, sinks=sinks, impl="triton").sum().backward()
    assert len(launched) == runs
    assert [leaf.grad is None for leaf in leaves] == [index in frozen for index in range(4)]


@pytest.mark.parametrize("saved, runs", [(SAVE_OPS, 1), ((), 2)])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_selective_checkpoint_saves_it(saved, runs, backend):
    run, leaves = case("sinks")
    expected = step(run, leaves)
    contexts = functools.partial(create_selective_checkpoint_contexts, list(saved))

    def region(*leaves):
        return checkpoint(run, *leaves, use_reentrant=False, context_fn=contexts)

    if backend:
        region = torch.compile(region, fullgraph=True, backend=backend)
        assert same_bits(step(region, leaves), expected)
        return
    with mock.patch.object(operator, "_forward", wraps=operator._forward) as forward:
        assert same_bits(step(region, leaves), expected)
    assert forward.call_count == runs


@pytest.mark.parametrize("budget", [0.0, 0.01, 0.5])
def test_dropout_under_a_memory_budget(budget):
    """o is linear in v: so its share in the backward pass must be that of the forward's dropout."""
    q, k, v = tensors(2, 20, 20, 4, 2, 8, 8, torch.float64)
    w = torch.randn(2, 20, 4, 8, dtype=torch.float64)

    def run(q, k, v):
        return flash_attention(q * 1.1, k.sin(), v * 2, dropout=0.3) * 3

    run = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch._functorch.config.patch(activation_memory_budget=budget):
        if not budget:  # PyTorch computes everything again, its own dropout anew
            with pytest.raises(Exception, match="activation_memory_budget is 0, expected more"):
                run(q, k, v)
            return
        out = run(q, k, v)
    dv, = torch.autograd.grad((out * w).sum(), v)
    torch.testing.assert_close((dv * v).sum(), (out * w).sum())


@pytest.mark.parametrize("compiled", [True, False])
def test_no_gradient_flows_through_lse(compiled):
    run, (q, k, v) = functools.partial(flash_attention, return_lse=True), case("causal")[1]
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    with mock.patch.object(public, "operators_matter", lambda: True):
        out, lse = run(q, k, v)
    assert out.requires_grad and not lse.requires_grad
    assert torch.equal(lse, flash_attention(q, k, v, return_lse=True)[1])


def test_eager_bypasses_the_operator():
    run, leaves = case("causal")
    with mock.patch.object(public, "forward_op", side_effect=AssertionError):
        step(run, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_and_wrong_offsets_under_compile(impl):
    q, k, v = tensors(1, 20, 20, 2, 1, 16, 16, F32)
    run = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(q, k, v, impl=impl), flash_attention(q, k, v, impl=impl))
    wrong = torch.tensor([0, 7, 19], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens_q is \[0, 7, 19\], expected"):
        run(q[0], k[0], v[0], cu_seqlens_q=wrong, impl=impl)
