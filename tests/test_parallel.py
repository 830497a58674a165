"""`parallelize` in a single process: a mesh of one rank changes nothing."""

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, make_block, make_input, results, same_bits

from backfuse import BlockStack, parallelize

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


def test_arguments_are_checked_all_the_same(mesh):
    with pytest.raises(ValueError, match="holds no TransformerBlock"):
        parallelize(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(TypeError, match="mesh is a int"):
        parallelize(BlockStack(FAMILIES["llama"], 1), 1)
