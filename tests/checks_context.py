"""What four ranks check of context parallelism: each has a part of every sequence."""

import functools
from unittest import mock

import torch
import torch.distributed as dist
from checks_sharded import held_bytes
from checks_tensor import refused
from families import assert_as_good_as
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from backfuse import SAVE_OPS, BlockSpec, BlockStack, LoRA, kept_bytes, parallelize
from backfuse.blocks import function
from backfuse.kernels.reference.rope import rope_cos_sin

F64, BF16 = torch.float64, torch.bfloat16
SPECS = {
    "llama": BlockSpec(32, 48, 4, 2),
    "one kv head": BlockSpec(32, 48, 4, 1, qk_norm="full", stacked_qkv=True),
    "everything": BlockSpec(
        32, 64, 8, 4, head_dim=6, v_head_dim=10, attention_sinks=True, sliding_window=7,
        rope="interleaved", norm="layernorm", norm_position="both", qkv_bias=True, o_bias=True,
        hidden_act="gelu",
    ),
    "bidirectional": BlockSpec(
        32, 48, 4, rope=None, causal=False, parallel_residual=True, gated=False, layer_scale=True,
        attn_logit_softcapping=4.0,
    ),
}  # fmt: skip
POLICIES = ("keep", "selective", "lean", "full", "offload", {"attn_out": "recompute"})
BATCH, TOKENS = 2, 36


@functools.cache
def grid():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))


@functools.cache
def line():
    return init_device_mesh("cpu", (4,), mesh_dim_names=("context",))


def make_stack(spec, policy="lean", dtype=F64, segments=None):
    torch.manual_seed(1)
    stack = BlockStack(spec, 2, policy, chunk_size=64, dtype=F64, segments=segments)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return stack.to(dtype)


def inputs(dtype=F64, batch=BATCH):
    generator = torch.Generator().manual_seed(2)
    shape = (batch, TOKENS, 32)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for _ in range(2)]


def part(x, mesh, dim=1):
    return x.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()


def expected(spec, dtype=F64, batch=BATCH, **options):
    """One process's output and gradients."""
    stack, (x, grad) = make_stack(spec, "keep", dtype), inputs(dtype, batch)
    x.requires_grad_()
    out = stack(x, **options)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad for p in stack.parameters())]


def results(stack, mesh, dtype=F64, batch=BATCH, call=None, **options):
    """This rank's output and input gradient, and its share of the weights' gradients."""
    x, grad = (part(value, mesh) for value in inputs(dtype, batch))
    x.requires_grad_()
    out = (stack if call is None else call)(x, **options)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad for p in stack.parameters())]


def summed(found, mesh):
    """The same with the weights' gradients summed over the ranks of the context."""
    return found[:2] + [all_reduced(grad, mesh) for grad in found[2:]]


def all_reduced(x, mesh):
    total = x.to(F64)
    dist.all_reduce(total, group=mesh.get_group())
    return total


def assert_close(found, exact, mesh, rtol=1e-11):
    exact = [part(value, mesh) for value in exact[:2]] + exact[2:]
    for index, (mine, value) in enumerate(zip(found, exact, strict=True)):
        atol = rtol * value.abs().max().item()
        torch.testing.assert_close(mine, value, rtol=rtol, atol=atol, msg=str(index))


def check_one_process_under_every_policy():
    for name, spec in SPECS.items():
        exact = expected(spec)
        for mesh in (grid()["context"], line()):
            first = None
            for policy in POLICIES:
                stack = parallelize(make_stack(spec, policy), context=mesh)
                found = results(stack, mesh)
                first = first or found
                assert all(map(torch.equal, found, first)), (name, policy)
            assert_close(summed(first, mesh), exact, mesh)


def check_segments_and_a_second_backward():
    spec, mesh = SPECS["llama"], line()
    exact = results(parallelize(make_stack(spec, "keep"), context=mesh), mesh)
    stack = parallelize(make_stack(spec, "full", segments=2), context=mesh)
    x, grad = (part(value, mesh) for value in inputs())
    out = stack(x.requires_grad_())
    out.backward(grad, retain_graph=True)
    found = [out.detach(), x.grad, *(p.grad for p in stack.parameters())]
    assert all(map(torch.equal, found, exact))
    again = torch.autograd.grad(out, [x, *stack.parameters()], grad)
    assert all(map(torch.equal, again, exact[1:]))


def check_positions():
    """Angles are of the rank's tokens; by default, of their place in the sequence."""
    spec, mesh = SPECS["llama"], line()
    positions = torch.arange(TOKENS).flip(0) * 3 + torch.tensor([[0], [5]])
    angles = rope_cos_sin(positions, 8, spec.rope_theta, layout="half", dtype=F64)
    stack = parallelize(make_stack(spec), context=mesh)
    own = tuple(part(one, mesh) for one in angles)
    found = summed(results(stack, mesh, position_embeddings=own), mesh)
    assert_close(found, expected(spec, position_embeddings=angles), mesh)
    message = r"cos of position_embeddings", "[2 or 1, 9, 8]"
    refused(lambda: results(stack, mesh, position_embeddings=angles), *message)


def check_packed_sequences_and_masks():
    mesh = line()
    generator = torch.Generator().manual_seed(4)
    masks = torch.rand(1, 8, TOKENS, TOKENS, generator=generator) < 0.8
    offsets = torch.tensor([0, 7, 7, 30, TOKENS], dtype=torch.int32)
    for name, batch, options in (
        ("llama", 1, {"cu_seqlens": offsets}),
        ("everything", 1, {"cu_seqlens": offsets, "max_seqlen": 23}),
        ("everything", BATCH, {"attention_mask": masks}),
        ("llama", BATCH, {"attention_mask": masks[:, :1].double()}),
    ):
        for policy in ("lean", "full"):
            stack = parallelize(make_stack(SPECS[name], policy), context=mesh)
            found = summed(results(stack, mesh, batch=batch, **options), mesh)
            assert_close(found, expected(SPECS[name], batch=batch, **options), mesh)
    refused(
        lambda: results(make_split("llama"), mesh, batch=1, cu_seqlens=torch.tensor([0, 9])),
        "cu_seqlens is [0, 9]", "number of tokens (36)",
    )  # fmt: skip
    refused(
        lambda: results(make_split("llama"), mesh, attention_mask=masks[..., :9, :9]),
        "expected [2 or 1, 4 or 1, 36, 36]",
    )


def make_split(name, **options):
    return parallelize(make_stack(SPECS[name], **options), context=line())


def check_low_precision():
    mesh = line()
    for name in SPECS:
        stack = make_split(name, policy="selective", dtype=BF16)
        found = summed(results(stack, mesh, BF16), mesh)
        exact, plain = (expected(SPECS[name], dtype) for dtype in (F64, BF16))
        for index, (mine, usual, true) in enumerate(zip(found, plain, exact, strict=True)):
            usual, true = (part(v, mesh) if index < 2 else v for v in (usual, true))
            assert_as_good_as(f"{name} {index}", mine, usual, true, torch.finfo(BF16).eps)


def check_autocast():
    mesh = line()
    stack = make_split("everything", dtype=torch.float32)
    with torch.autocast("cpu", BF16):
        found = results(stack, mesh, torch.float32)
    assert all(value.dtype == torch.float32 for value in found)
    for mine, true in zip(summed(found, mesh), expected(SPECS["everything"]), strict=True):
        true = part(true, mesh) if mine.dim() == 3 else true
        assert (mine - true).abs().max() < 0.1 * true.abs().max()


def check_what_is_kept_and_sent():
    """Two all-to-alls each way; where attn_out is rebuilt, two more; all kept as one process."""
    for policy, again in (("keep", 0), ("selective", 0), ("lean", 0), ("full", 2)):
        stack = make_split("llama", policy=policy)
        x = part(inputs()[0], line()).requires_grad_()
        with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as sends:
            out = stack(x)
            assert sends.call_count == 2 * 2
            sizes = {"batch_size": BATCH, "seq_len": TOKENS // 4, "dtype": F64}
            kept = 2 * sum(kept_bytes(SPECS["llama"], policy, **sizes).values())
            weights = sum(p.nbytes for p in stack.parameters())
            assert held_bytes(out.sum()) == kept + weights, policy
            sends.reset_mock()
            out.backward(torch.ones_like(out))
            assert sends.call_count == 2 * (2 + again), policy


def check_frozen_weights():
    stack = make_stack(SPECS["everything"], "full")
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_("o_proj" in name or "sinks" in name or "post_att" in name)
    parallelize(stack, context=line())
    grads = expected(SPECS["everything"])[2:]
    exact = dict(zip(dict(stack.named_parameters()), grads, strict=True))
    x, grad = (part(value, line()) for value in inputs())
    stack(x).backward(grad)
    for name, parameter in stack.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            torch.testing.assert_close(all_reduced(parameter.grad, line()), exact[name])


def mean_gradients():
    """One process's: of the mean square over all sequences and tokens."""
    stack = make_stack(SPECS["everything"], "keep")
    stack(inputs()[0]).square().mean().backward()
    return dict(stack.named_parameters())


def check_data_parallelism_over_all_ranks():
    """FSDP2 or DDP over data and context together: each rank has half of each of its sequences."""
    exact, mesh = mean_gradients(), grid()["data", "context"]._flatten("ranks")
    x = part(part(inputs()[0], grid()["data"], 0), grid()["context"])
    for policy in ("keep", "lean", "full"):
        for engine in ("fsdp", "ddp"):
            stack = parallelize(make_stack(SPECS["everything"], policy), context=grid()["context"])
            model = stack
            if engine == "ddp":
                model = DistributedDataParallel(stack, process_group=mesh.get_group())
            else:
                for layer in stack.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(stack, mesh=mesh)
            model(x).square().mean().backward()
            for name, parameter in stack.named_parameters():
                grad = parameter.grad
                grad = grad.full_tensor() if engine == "fsdp" else grad
                torch.testing.assert_close(grad, exact[name].grad, rtol=1e-11, atol=1e-12)


def check_with_tensor_parallelism():
    """A rank has a quarter of every sequence: the context's half, and of that the tensor's."""
    spec = BlockSpec(32, 48, 8, 4, qk_norm="head", sliding_window=9)
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))
    exact = expected(spec)
    options = {"context": both["context"]}
    for sequence_parallel in (True, False):
        first = None
        for policy in ("keep", "lean", "full"):
            stack = parallelize(
                make_stack(spec, policy), both["tensor"],
                sequence_parallel=sequence_parallel, **options,
            )  # fmt: skip
            x, grad = (part(value, both["context"]) for value in inputs())
            if sequence_parallel:
                x, grad = part(x, both["tensor"]), part(grad, both["tensor"])
            out = stack(x.requires_grad_())
            out.backward(grad)
            mine = [p.grad for p in stack.parameters()]
            bits = [out.detach(), x.grad, *(grad.to_local() for grad in mine)]
            first = first or bits
            assert all(map(torch.equal, bits, first)), policy
        true = [part(value, both["context"]) for value in exact[:2]]
        true = [part(value, both["tensor"]) if sequence_parallel else value for value in true]
        whole = [all_reduced(grad.full_tensor(), both["context"]) for grad in mine]
        for found, value in zip([*bits[:2], *whole], true + exact[2:], strict=True):
            torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-11)


def check_compiled_in_one_graph():
    mesh = line()
    offsets = torch.tensor([0, 7, 7, 30, TOKENS], dtype=torch.int32)
    for name, options in (("everything", {}), ("one kv head", {"cu_seqlens": offsets})):
        batch = 1 if options else BATCH
        for segments in (None, 2):
            stack = make_split(name, segments=segments)
            bits = results(stack, mesh, batch=batch, **options)
            stack.zero_grad()
            call = torch.compile(stack, fullgraph=True, backend="aot_eager")
            found = results(stack, mesh, batch=batch, call=call, **options)
            assert all(map(torch.equal, found, bits))


def check_selective_checkpoints():
    bits = results(make_split("llama"), line())
    for saved, runs in ((SAVE_OPS, 0), ((), 1)):
        stack = make_split("llama")
        contexts = functools.partial(create_selective_checkpoint_contexts, list(saved))

        def call(x, stack=stack, contexts=contexts):
            return checkpoint(stack, x, use_reentrant=False, context_fn=contexts)

        with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as sends:
            found = results(stack, line(), call=call)
        assert all(map(torch.equal, found, bits))
        assert sends.call_count == 2 * (4 + 2 * runs)


def check_flops_are_those_of_what_runs():
    for name, policy in (("llama", "keep"), ("everything", "full")):
        stack, counts = make_split(name, policy=policy), []
        for on in (True, False):
            with (
                mock.patch.object(function, "operators_matter", lambda on=on: on),
                FlopCounterMode(display=False) as counter,
            ):
                results(stack, line())
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1], name


def check_what_cannot_be_split_is_refused():
    mesh = line()
    for fields, *parts in (
        ({"num_attention_heads": 6}, "num_attention_heads is 6, expected a multiple of 4"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3},
         "num_key_value_heads is 3, expected a multiple or a divisor of 4"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"activation_dropout": 0.1}, "activation_dropout is 0.1"),
    ):  # fmt: skip
        spec = BlockSpec(**{"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 4,
                            "head_dim": 4, **fields})  # fmt: skip
        stack = BlockStack(spec, 1)
        refused(lambda stack=stack: parallelize(stack, context=mesh), *parts)
        assert stack.layers[0].context is None
        stack(torch.randn(1, 3, 48))
    stack = make_stack(SPECS["llama"])
    refused(lambda: parallelize(stack), "mesh and context are both None")
    refused(lambda: parallelize(stack, context=grid()), "context has 2 dimensions")
    refused(lambda: parallelize(stack, context="cp"), "context is a str")
    refused(lambda: parallelize(stack, mesh, context=mesh), "are the same ranks")
    refused(lambda: parallelize(make_split("llama"), context=mesh), "sharded already", "together")
    sharded = make_stack(SPECS["llama"])
    fully_shard(sharded.layers[1], mesh=mesh)
    refused(lambda: parallelize(sharded, context=mesh), "layers.1 is sharded already")
    whole, odd = make_split("llama"), mesh.get_local_rank() == 1
    for sizes in ((2, 3 + odd), (2 + odd, 6 - 2 * odd)):  # the second of as many tokens
        refused(lambda sizes=sizes: whole(torch.randn(*sizes, 32, dtype=F64)), "on the ranks that")
    parallelize(stack.layers[0], context=mesh)
    refused(lambda: stack(inputs()[0]), "split over unlike ranks")
    refused(lambda: make_split("llama")(torch.randn(2, 3, 5)), "hidden_states is float32 [2, 3, 5]")


def check_adapters():
    """LoRA's gradients too are of the rank's tokens; its dropout is refused."""
    mesh, name = line(), "self_attn.q_proj"
    generator = torch.Generator().manual_seed(5)
    small = {
        f"{name}.lora_{kind}.default.weight": torch.randn(shape, generator=generator, dtype=F64)
        for kind, shape in (("A", (2, 32)), ("B", (32, 2)))
    }

    def run(context, x, grad, dropout=0.0):
        layer = make_stack(SPECS["llama"]).layers[0].requires_grad_(False)
        own = {key: value.clone().requires_grad_() for key, value in small.items()}
        out = function.block(
            x, {**dict(layer.named_parameters()), **own}, layer.spec, layer.policy,
            adapters=((name, (LoRA(2, 0.5, dropout),)),), context=context, training=True,
        )  # fmt: skip
        out.backward(grad)
        return [out.detach(), x.grad, *(value.grad for value in own.values())]

    whole = inputs()
    exact = run(None, whole[0].requires_grad_(), whole[1])
    x, grad = (part(value, mesh).detach() for value in whole)
    context = make_split("llama").layers[0].context
    assert_close(summed(run(context, x.requires_grad_(), grad), mesh), exact, mesh)
    refused(lambda: run(context, x, grad, dropout=0.5), "dropout is active")
