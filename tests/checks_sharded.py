"""What four ranks check of data parallelism: DDP, FSDP2 in all its ways."""

import functools

import torch
import torch.distributed as dist
from families import assert_as_good_as
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from backfuse import BlockSpec, BlockStack, kept_bytes

SPEC = BlockSpec(32, 48, 4, 2, qk_norm="head", qkv_bias=True)
LAYERS, BATCH, TOKENS = 3, 8, 20
POLICIES = ("keep", "selective", "lean", "full", "offload")


@functools.cache
def mesh(*sizes):
    names = {1: ("ranks",), 2: ("replicas", "shards")}[len(sizes)]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def make_stack(policy="lean", segments=None, layers=LAYERS, **options):
    """The same weights on every rank."""
    torch.manual_seed(1)
    return BlockStack(SPEC, layers, policy, segments=segments, chunk_size=64, **options)


def batch(dtype=torch.float32):
    """All ranks' input, and this rank's share of it."""
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(BATCH, TOKENS, SPEC.hidden_size, generator=generator).to(dtype)
    return whole, whole.chunk(dist.get_world_size())[dist.get_rank()].clone()


def loss_of(model, x):
    return model(x).float().square().mean()


@functools.cache
def expected(layers=LAYERS, dtype=torch.float32, parts=1):
    """One process's gradients for the whole batch: of the mean, in `parts` batches."""
    stack = make_stack("keep", layers=layers).to(dtype)
    for part in batch(dtype)[0].chunk(parts):
        model_out = stack(part)
        wide = torch.promote_types(dtype, torch.float32)
        (model_out.to(wide).square().mean() / parts).backward()
    return {name: p.grad for name, p in stack.named_parameters()}


def whole_gradients(model):
    """The gradients of a sharded model, put together again, by names of a stack's parameters."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def assert_expected(found, reference=None):
    reference = expected() if reference is None else reference
    assert found.keys() == reference.keys()
    for name, grad in reference.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(found[name], grad, rtol=2e-5, atol=2e-6 * scale + 1e-9, msg=name)


def shard(stack, **options):
    """Every layer, then the rest."""
    for layer in stack.layers:
        fully_shard(layer, **options)
    return fully_shard(stack, **options)


def held_bytes(loss):
    """Bytes of all storages that the graph behind a loss has saved in our functions."""
    storages, seen, stack = {}, set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        if "RecomputeFunction" in node.name():
            for tensor in node.saved_tensors:
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def predicted(policy):
    sizes = {"batch_size": BATCH // dist.get_world_size(), "seq_len": TOKENS}
    return LAYERS * sum(kept_bytes(SPEC, policy, **sizes, dtype=torch.float32).values())


def check_ddp():
    for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        for policy in ("keep", "lean"):
            model = DistributedDataParallel(make_stack(policy), **options)
            for _ in range(2):
                model.zero_grad()
                loss_of(model, batch()[1]).backward()
                assert_expected(whole_gradients(model.module))


def check_ddp_of_segments_accumulating():
    model = DistributedDataParallel(make_stack("full", (1, 2)))
    first, second = batch()[1].chunk(2)
    with model.no_sync():
        (loss_of(model, first) / 2).backward()
    (loss_of(model, second) / 2).backward()
    assert_expected(whole_gradients(model.module))


def check_every_policy_gives_the_same_bits():
    results = []
    for policy in POLICIES:
        stack = shard(make_stack(policy), mesh=mesh(4))
        loss = loss_of(stack, batch()[1])
        loss.backward()
        results.append([loss.detach(), *(p.grad.to_local() for p in stack.parameters())])
        assert_expected(whole_gradients(stack))
    for policy, result in zip(POLICIES[1:], results[1:], strict=True):
        assert all(map(torch.equal, result, results[0])), policy


def check_no_unsharded_weight_is_alive_between_the_passes():
    for policy in ("keep", "lean", "full"):
        stack = shard(make_stack(policy), mesh=mesh(4), reshard_after_forward=True)
        loss = loss_of(stack, batch()[1])
        assert held_bytes(loss) == predicted(policy), policy
        loss.backward()
        assert_expected(whole_gradients(stack))


def check_without_resharding_the_weights_stay():
    stack = shard(make_stack("lean"), mesh=mesh(4), reshard_after_forward=False)
    loss = loss_of(stack, batch()[1])
    weights = sum(p.numel() * 4 for p in stack.parameters())
    assert held_bytes(loss) >= predicted("lean") + weights
    loss.backward()
    assert_expected(whole_gradients(stack))


def check_replicas_of_shards():
    for reshard in (True, False):
        stack = shard(make_stack(), mesh=mesh(2, 2), reshard_after_forward=reshard)
        loss_of(stack, batch()[1]).backward()
        assert_expected(whole_gradients(stack))


def check_accumulation_without_synchronising():
    stack = shard(make_stack(), mesh=mesh(4))
    first, second = batch()[1].chunk(2)
    stack.set_requires_gradient_sync(False)
    (loss_of(stack, first) / 2).backward()
    stack.set_requires_gradient_sync(True)
    (loss_of(stack, second) / 2).backward()
    assert_expected(whole_gradients(stack))


def check_mixed_precision():
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    for policy in ("keep", "full"):
        stack = shard(make_stack(policy), mesh=mesh(4), mp_policy=low)
        loss_of(stack, batch()[1]).backward()
        results.append(whole_gradients(stack))
    exact, plain = expected(dtype=torch.float64), expected(dtype=torch.bfloat16)
    eps = torch.finfo(torch.bfloat16).eps
    for name, grad in results[0].items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, results[1][name])
        assert_as_good_as(name, grad, plain[name], exact[name], eps)


def check_made_on_the_meta_device():
    with torch.device("meta"):
        stack = make_stack()
    shard(stack, mesh=mesh(4))
    stack.to_empty(device="cpu")
    state = make_stack().state_dict() if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(stack, state, options=options)
    loss_of(stack, batch()[1]).backward()
    assert_expected(whole_gradients(stack))


def check_frozen_weights():
    stack = make_stack("selective")
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    shard(stack, mesh=mesh(4))
    loss_of(stack, batch()[1]).backward()
    for name, grad in whole_gradients(stack).items():
        assert (grad is None) == ("mlp" in name)
    found = {n: g for n, g in whole_gradients(stack).items() if g is not None}
    assert_expected(found, {n: g for n, g in expected().items() if n in found})


def check_a_segment_is_sharded_as_a_stack():
    model = torch.nn.Sequential(*(make_stack("full", 2, layers=2) for _ in range(2)))
    model.load_state_dict(make_pair().state_dict())
    for part in model:
        fully_shard(part, mesh=mesh(4))
    fully_shard(model, mesh=mesh(4))
    loss = loss_of(model, batch()[1])
    # One x for two layers, and each layer's norms' statistics.
    statistics = predicted("full") // LAYERS - batch()[1].nbytes
    assert held_bytes(loss) == 2 * batch()[1].nbytes + 4 * statistics
    loss.backward()
    pair = make_pair()
    loss_of(pair, batch()[0]).backward()
    assert_expected(whole_gradients(model), {n: p.grad for n, p in pair.named_parameters()})


def make_pair():
    torch.manual_seed(3)
    return torch.nn.Sequential(*(BlockStack(SPEC, 2, "keep", chunk_size=64) for _ in range(2)))


def check_a_sharded_layer_in_a_segment_is_refused():
    stack = shard(make_stack("full", (1, 2)), mesh=mesh(4))
    try:
        stack(batch()[1])
    except ValueError as error:
        assert "layers.1 has hooks" in str(error) and "layers 1 to 2" in str(error)
    else:
        raise AssertionError("expected a ValueError")
    stack.set_policy("full")
    loss_of(stack, batch()[1]).backward()
    assert_expected(whole_gradients(stack))
