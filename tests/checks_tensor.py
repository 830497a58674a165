"""What four ranks check of tensor parallelism: two groups of two that share each layer."""

import functools
from unittest import mock

import torch
from checks_sharded import TOKENS, held_bytes
from families import assert_as_good_as
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from backfuse import SAVE_OPS, BlockSpec, BlockStack, kept_bytes, parallelize
from backfuse.blocks import parallel
from backfuse.blocks.split import local_spec

SPECS = {
    "llama": BlockSpec(32, 48, 4, 2),
    "qwen": BlockSpec(32, 64, 4, 2, head_dim=12, qkv_bias=True, up_bias=True, qk_norm="head"),
    "plain": BlockSpec(
        32, 48, 2, gated=False, hidden_act="gelu", norm="layernorm", attention_sinks=True,
        rope="interleaved", sliding_window=6,
    ),
}  # fmt: skip
POLICIES = ("keep", "selective", "lean", "full", "offload")
BATCH = 4


@functools.cache
def mesh():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def make_stack(spec, policy="lean", dtype=torch.float32):
    torch.manual_seed(1)
    stack = BlockStack(spec, 2, policy, chunk_size=64, dtype=dtype)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return stack


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(BATCH, TOKENS, 32, generator=generator).to(dtype) for _ in range(2)]


def expected(spec, dtype=torch.float32, **options):
    """One process's output and gradients."""
    stack, (x, grad) = make_stack(spec, "keep", dtype), inputs(dtype)
    if "cu_seqlens" in options:
        x, grad = x.flatten(0, 1)[None], grad.flatten(0, 1)[None]
    x.requires_grad_()
    out = stack(x, **options)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad for p in stack.parameters())]


def part(x, sequence_parallel):
    if not sequence_parallel:
        return x.clone()
    return x.chunk(2, 1)[mesh().get_local_rank("tensor")].clone()


def results(stack, sequence_parallel=True, dtype=torch.float32, **options):
    """This rank's output and input gradient, and its parts of the weights' gradients."""
    x, grad = inputs(dtype)
    if "cu_seqlens" in options:
        x, grad = x.flatten(0, 1)[None], grad.flatten(0, 1)[None]
    x, grad = part(x, sequence_parallel).requires_grad_(), part(grad, sequence_parallel)
    out = stack(x, **options)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad for p in stack.parameters())]


def assert_close(found, exact, sequence_parallel=True):
    for index, (mine, value) in enumerate(zip(found, exact, strict=True)):
        whole = mine.full_tensor() if index >= 2 else mine
        value = part(value, sequence_parallel) if index < 2 else value
        atol = 2e-6 * value.abs().max().item()
        torch.testing.assert_close(whole, value, rtol=2e-5, atol=atol, msg=str(index))


def check_one_process_under_every_policy():
    for spec in SPECS.values():
        exact = expected(spec)
        for sequence_parallel in (True, False):
            first = None
            for policy in POLICIES:
                stack = parallelize(
                    make_stack(spec, policy), mesh()["tensor"], sequence_parallel=sequence_parallel
                )
                found = results(stack, sequence_parallel)
                assert_close(found, exact, sequence_parallel)
                bits = [*found[:2], *(grad.to_local() for grad in found[2:])]
                first = first or bits
                assert all(map(torch.equal, bits, first)), policy


def check_gradients_lie_as_their_parameters_do():
    stack = parallelize(make_stack(SPECS["llama"]), mesh()["tensor"])
    results(stack)
    for name, parameter in stack.named_parameters():
        assert parameter.grad.placements == parameter.placements, name
    names = dict(stack.layers[0].named_parameters())
    assert names["self_attn.q_proj.weight"].to_local().shape == (16, 32)
    assert names["mlp.down_proj.weight"].to_local().shape == (32, 24)


def check_packed_sequences():
    options = {"cu_seqlens": torch.tensor([0, 7, 7, 50, BATCH * TOKENS], dtype=torch.int32)}
    stack = parallelize(make_stack(SPECS["llama"]), mesh()["tensor"])
    assert_close(results(stack, **options), expected(SPECS["llama"], **options))


def check_low_precision():
    low = torch.bfloat16
    stack = parallelize(make_stack(SPECS["qwen"], "selective", low), mesh()["tensor"])
    found = results(stack, dtype=low)
    exact, plain = expected(SPECS["qwen"], torch.float64), expected(SPECS["qwen"], low)
    for index, (mine, usual, true) in enumerate(zip(found, plain, exact, strict=True)):
        mine = mine.full_tensor() if index >= 2 else mine
        usual, true = (part(v, True) if index < 2 else v for v in (usual, true))
        assert_as_good_as(str(index), mine, usual, true, torch.finfo(low).eps)


def check_under_autocast():
    """The sum over ranks is in the input's dtype, whatever the products are in."""
    low, (x, grad) = torch.bfloat16, inputs()
    exact = expected(SPECS["llama"], torch.float64)
    plain = make_stack(SPECS["llama"], "keep")
    x.requires_grad_()
    with torch.autocast("cpu", low):
        out = plain(x)
    out.backward(grad)
    usual = [out.detach(), x.grad, *(p.grad for p in plain.parameters())]
    for sequence_parallel in (True, False):
        split = {"sequence_parallel": sequence_parallel}
        stack = parallelize(make_stack(SPECS["llama"], "lean"), mesh()["tensor"], **split)
        with torch.autocast("cpu", low):
            found = results(stack, sequence_parallel)
        for index, (mine, theirs, true) in enumerate(zip(found, usual, exact, strict=True)):
            mine = mine.full_tensor() if index >= 2 else mine
            theirs, true = (part(v, sequence_parallel) if index < 2 else v for v in (theirs, true))
            assert mine.dtype == torch.float32
            assert_as_good_as(str(index), mine, theirs, true, torch.finfo(low).eps)


def check_compiled_layers_break_the_graph_and_keep_the_bits():
    stack = parallelize(make_stack(SPECS["llama"]), mesh()["tensor"])
    bits = [getattr(v, "_local_tensor", v).clone() for v in results(stack)]
    stack.zero_grad()
    for layer in stack.layers:
        layer.compile(backend="aot_eager")
    found = [getattr(v, "_local_tensor", v) for v in results(stack)]
    assert all(map(torch.equal, found, bits))


def check_selective_checkpoints_replay_a_split_block():
    exact = expected(SPECS["llama"])
    for saved in (SAVE_OPS, [torch.ops.aten.mm.default]):
        stack = parallelize(make_stack(SPECS["llama"]), mesh()["tensor"])
        contexts = functools.partial(create_selective_checkpoint_contexts, list(saved))
        x, grad = (part(v, True) for v in inputs())
        x.requires_grad_()
        out = checkpoint(stack, x, use_reentrant=False, context_fn=contexts)
        out.backward(grad)
        assert_close([out.detach(), x.grad, *(p.grad for p in stack.parameters())], exact)


def check_frozen_weights():
    stack = make_stack(SPECS["qwen"], "selective")
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_("down_proj" in name or "input_layernorm" in name)
    parallelize(stack, mesh()["tensor"])
    exact = dict(zip(dict(stack.named_parameters()), expected(SPECS["qwen"])[2:], strict=True))
    results(stack)
    for name, parameter in stack.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.full_tensor(), exact[name])


def check_what_is_kept_and_sent():
    """A part of x and mid, and of the rest what belongs to the rank's heads; one gather of x."""
    spec = SPECS["llama"]
    for policy in ("keep", "lean", "full"):
        stack = parallelize(make_stack(spec, policy), mesh()["tensor"])
        x = part(inputs()[0], True).requires_grad_()
        sent = {}

        def counted(name, sent=sent):
            call = getattr(parallel, name)

            def count(*args, **kwargs):
                sent[name] = sent.get(name, 0) + 1
                return call(*args, **kwargs)

            return mock.patch.object(parallel, name, count)

        with counted("_all_gather"), counted("_reduce_scatter"):
            out = stack(x)
            assert sent == {"_all_gather": 4, "_reduce_scatter": 4}
            sizes = {"batch_size": BATCH, "seq_len": TOKENS, "dtype": torch.float32}
            kept = kept_bytes(local_spec(spec, 2), policy, **sizes)
            whole = {name: size for name, size in kept.items() if name not in ("x", "mid")}
            weights = sum(p.to_local().nbytes for p in stack.parameters())
            held = 2 * (sum(whole.values()) + 2 * x.nbytes) + weights
            assert held_bytes(out.sum()) == held, policy
            sent.clear()
            out.backward(torch.ones_like(out))
            assert sent == {"_all_gather": 8, "_reduce_scatter": 4}


def check_with_fsdp_in_the_other_dimension():
    spec = SPECS["qwen"]
    exact = expected(spec)
    for policy in ("keep", "lean"):
        stack = parallelize(make_stack(spec, policy), mesh()["tensor"])
        for layer in stack.layers:
            fully_shard(layer, mesh=mesh()["data"])
            layer.set_force_sum_reduction_for_comms(True)
            layer.set_gradient_divide_factor(1.0)
        fully_shard(stack, mesh=mesh()["data"])
        x, grad = (part(v, True).chunk(2)[mesh().get_local_rank("data")].clone() for v in inputs())
        x.requires_grad_()
        out = stack(x)
        sizes = {"batch_size": BATCH // 2, "seq_len": TOKENS, "dtype": torch.float32}
        kept = kept_bytes(local_spec(spec, 2), policy, **sizes)
        whole = {name: size for name, size in kept.items() if name not in ("x", "mid")}
        assert held_bytes(out.sum()) == 2 * (sum(whole.values()) + 2 * x.nbytes)
        out.backward(grad)
        found = [out.detach(), x.grad, *(p.grad for p in stack.parameters())]
        share = [part(v, True).chunk(2)[mesh().get_local_rank("data")] for v in exact[:2]]
        for index, (mine, value) in enumerate(zip(found, share + exact[2:], strict=True)):
            mine = mine.full_tensor() if index >= 2 else mine
            atol = 2e-6 * value.abs().max().item()
            torch.testing.assert_close(mine, value, rtol=2e-5, atol=atol, msg=str(index))


def refused(call, *parts):
    try:
        call()
    except (TypeError, ValueError) as error:
        assert all(text in str(error) for text in parts), error
    else:
        raise AssertionError(f"expected an error with {parts}")


def check_what_cannot_be_split_is_refused():
    tensor = mesh()["tensor"]
    for fields, *parts in (
        ({"num_attention_heads": 3}, "num_attention_heads is 3, expected a multiple of 2"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"intermediate_size": 47}, "intermediate_size is 47"),
        ({"stacked_qkv": True}, "stacked_qkv is True, expected False"),
        ({"norm_position": "both"}, "norm_position is 'both'"),
        ({"residual_dropout": 0.1}, "residual_dropout is 0.1"),
        ({"o_bias": True}, "o_bias is True"),
        ({"qk_norm": "full"}, "qk_norm is 'full'"),
    ):
        spec = BlockSpec(**{"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 4,
                            "head_dim": 12, **fields})  # fmt: skip
        stack = BlockStack(spec, 1)
        refused(lambda stack=stack: parallelize(stack, tensor), *parts)
        assert type(stack.layers[0].mlp.down_proj.weight) is torch.nn.Parameter
        stack(torch.randn(1, 3, 48))
    refused(lambda: parallelize(make_stack(SPECS["llama"]), mesh()), "mesh has 2 dimensions")
    refused(lambda: parallelize(make_stack(SPECS["llama"]), 2), "mesh is a int")
    refused(lambda: parallelize(torch.nn.Linear(2, 2), tensor), "holds no TransformerBlock")
    once = parallelize(make_stack(SPECS["llama"]), tensor)
    refused(lambda: parallelize(once, tensor), "layers.0 is sharded already")
    tied = make_stack(SPECS["llama"])
    tied.layers[1].mlp.down_proj.weight = tied.layers[0].mlp.down_proj.weight
    refused(
        lambda: parallelize(tied, tensor),
        "layers.0.mlp.down_proj.weight and layers.1.mlp.down_proj.weight are one parameter",
    )
    assert tied.layers[1].mlp.down_proj.weight is tied.layers[0].mlp.down_proj.weight
    once.set_policy("full", 2)
    refused(lambda: once(part(inputs()[0], True)), "layers.0 has hooks")
    refused(
        lambda: parallelize(make_stack(SPECS["llama"]), tensor)(torch.randn(2, 3, 5)),
        "hidden_states is float32 [2, 3, 5]",
    )


def check_state_dicts_are_those_of_one_process():
    stack = parallelize(make_stack(SPECS["llama"]), mesh()["tensor"])
    plain = make_stack(SPECS["llama"]).state_dict()
    split = stack.state_dict()
    assert split.keys() == plain.keys()
    assert all(torch.equal(split[name].full_tensor(), plain[name]) for name in plain)
