"""`parallelize` in a single process: a mesh of one rank changes nothing."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, make_block, make_input, results, same_bits

from backfuse import BlockStack, parallelize, patch
from backfuse.blocks.context import Context

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tensor",))
    dist.destroy_process_group()


def test_one_rank_keeps_the_bits(mesh):
    """Also of what two ranks would be refused."""
    for family, spec in FAMILIES.items():
        block = make_block(spec, "lean")
        x, grad = make_input(spec)
        expected = results(block, x, grad)
        parameters = list(block.parameters())
        assert parallelize(block, mesh) is block
        assert all(map(lambda a, b: a is b, parameters, block.parameters())), family
        assert same_bits(results(block, x, grad), expected), family


@pytest.mark.parametrize("impl", ["reference", "triton", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "sinks-and-wide-values"])
def test_every_core_runs_between_all_to_alls(mesh, family, impl):
    if impl == "sdpa" and family != "llama":
        pytest.skip("PyTorch's has no sinks")
    block = make_block(FAMILIES[family], "lean")
    block.impl = impl
    x, grad = make_input(block.spec, seq_len=20)
    expected = results(block, x, grad)
    assert parallelize(block, context=mesh).context is None
    block.context = Context.of(mesh)
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as sends:
        assert same_bits(results(block, x, grad), expected)
    assert sends.call_count == 4


def test_parts_of_a_block_cannot_be_sharded(mesh):
    from torch.distributed.fsdp import fully_shard

    stack = BlockStack(FAMILIES["llama"], 1)
    x, _ = make_input(FAMILIES["llama"])
    fully_shard(stack.layers[0].mlp, mesh=mesh)
    with pytest.raises(TypeError, match="mlp.gate_proj.weight is a DTensor, .* not its parts"):
        stack(x)


def test_patched_models(mesh):
    """One rank changes nothing; what PyTorch splits runs its own forward."""
    from tiny_models import batch, make_model, step
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = make_model("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM .* patch comes first"):
        parallelize(model, mesh)
    patch(model)
    expected = step(model, batch("llama"))
    assert parallelize(model, mesh) is model
    found = step(model, batch("llama"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    parts = {"model.layers.*.self_attn.q_proj": ColwiseParallel()}
    parallelize_module(model, mesh, parts)
    with pytest.warns(UserWarning, match="model.layers.0 .* runs its own forward"):
        model(torch.randint(64, (1, 8)))


def test_arguments_are_checked_all_the_same(mesh):
    with pytest.raises(ValueError, match="holds no TransformerBlock"):
        parallelize(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(TypeError, match="mesh is a int"):
        parallelize(BlockStack(FAMILIES["llama"], 1), 1)
