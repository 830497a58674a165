"""What four ranks check of tensor parallelism of patched models: two groups of two."""

import functools
import shutil
import tempfile
from unittest import mock

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks_sharded import held_bytes
from checks_tensor import mesh, refused
from tiny_models import batch, make_model, step
from torch.distributed.fsdp import fully_shard

from backfuse import kept_bytes, parallelize, patch, unpatch
from backfuse.blocks import parallel
from backfuse.blocks.adapters.patched import state_of

#: Family -> changes of its tiny configuration; the mistral's window is shorter than its sequences.
MODELS = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "qwen3": {},
    "mistral": {},
}
POLICIES = ("keep", "selective", "lean", "full")
ADAPTED = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def made(family, dtype=torch.float64):
    return make_model(family, dtype, **MODELS[family])


@functools.cache
def exact(family, padded=False):
    """One process's step, in fp64; of a patched model, whose norms are in fp64 too."""
    plain, model = made(family), made(family)
    patch(model, "keep")
    found = step(model, inputs(padded))
    assert_close(found, step(plain, inputs(padded)), 1e-4)
    return found


def inputs(padded=False):
    given = batch("llama")
    if padded:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, :5] = 0
    return given


def split(family, policy="lean", dtype=torch.float64, **options):
    model = made(family, dtype)
    assert all(row.status == "fused" for row in patch(model, policy))
    return parallelize(model, mesh()["tensor"], **options)


def whole(values):
    return {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in values.items()}


def local(values):
    return {n: v.to_local() if hasattr(v, "to_local") else v for n, v in values.items()}


def assert_close(found, expected, rtol=1e-10):
    """Rounding in fp64, if nobody says more."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = rtol * 0.1 * value.abs().max().item()
        close = functools.partial(torch.testing.assert_close, rtol=rtol, atol=atol)
        close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def check_one_process_under_every_policy():
    for family in MODELS:
        for sequence_parallel in (True, False)[: 1 + (family == "llama")]:
            first = None
            for policy in POLICIES:
                model = split(family, policy, sequence_parallel=sequence_parallel)
                found = step(model, inputs())
                assert_close(whole(found), exact(family))
                bits = local(found)
                first = first or bits
                assert all(torch.equal(bits[name], first[name]) for name in first), policy


def check_padding():
    for family in ("llama", "mistral"):
        found = step(split(family), inputs(padded=True))
        assert_close(whole(found), exact(family, padded=True))


def check_frozen_layers_and_a_second_backward():
    model, plain = split("qwen3", "full"), made("qwen3")
    patch(plain)
    for own in (model, plain):
        own.model.embed_tokens.requires_grad_(False)
        own.model.layers[0].requires_grad_(False)
        own.model.layers[1].mlp.up_proj.requires_grad_(False)
    assert_close(whole(step(model, inputs())), step(plain, inputs()))
    once, twice = ({n: p for n, p in own.named_parameters() if p.requires_grad}
                   for own in (plain, model))  # fmt: skip
    loss = model(**inputs(), labels=inputs()["input_ids"]).loss
    model.zero_grad()
    loss.backward(retain_graph=True)
    loss.backward()
    plain.zero_grad()
    (2 * plain(**inputs(), labels=inputs()["input_ids"]).loss).backward()
    assert_close(whole({n: p.grad for n, p in twice.items()}),
                 {n: p.grad for n, p in once.items()})  # fmt: skip


def check_what_is_kept_and_sent():
    """A part of x and mid, and of the rest what belongs to the rank's heads; one gather of x."""
    tokens = inputs()["input_ids"]
    for policy, checkpointing in (("keep", False), ("lean", False), ("keep", True)):
        model = split("llama", policy, torch.float32)
        if checkpointing:
            model.activation_checkpointing_enable()
        layer, config = model.model.layers[0], model.config
        sizes = {"batch_size": len(tokens), "seq_len": tokens.shape[1], "dtype": torch.float32}
        means = "full" if checkpointing else policy
        kept = kept_bytes(state_of(layer).parallel.spec, means, **sizes)
        part = tokens.numel() // 2 * config.hidden_size * 4
        angles = 2 * tokens.shape[1] * config.head_dim * 4
        others = sum(size for name, size in kept.items() if name not in ("x", "mid"))
        weights = sum(p.to_local().nbytes for p in model.model.layers.parameters())
        sent = []

        def counted(name, sent=sent):
            call = getattr(parallel, name)

            def count(*args, **kwargs):
                sent.append(name)
                return call(*args, **kwargs)

            return mock.patch.object(parallel, name, count)

        with counted("_all_gather"), counted("_reduce_scatter"):
            loss = model(input_ids=tokens).logits.sum()
            assert held_bytes(loss) == 2 * (others + 2 * part) + weights + angles, policy
            # of each half one, and one behind the last layer; then two, and one before the first
            assert (sent.count("_all_gather"), sent.count("_reduce_scatter")) == (5, 4)
            sent.clear()
            loss.backward()
            assert (sent.count("_all_gather"), sent.count("_reduce_scatter")) == (9, 4)


def check_with_fsdp_in_the_other_dimension():
    for family in ("llama", "qwen3"):
        model, given = split(family), inputs()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh()["data"])
        fully_shard(model, mesh=mesh()["data"])
        share = given["input_ids"].chunk(2)[mesh().get_local_rank("data")]
        found = whole(step(model, {"input_ids": share}))
        expected = dict(exact(family))
        for name in ("logits", "loss"):  # the loss is its share's
            del found[name], expected[name]
        assert_close(found, expected)
        norms = [parameter.grad.norm() for parameter in model.parameters()]
        norm = torch.stack([n.full_tensor() for n in norms]).norm()
        torch.testing.assert_close(norm, torch.stack([v.norm() for v in expected.values()]).norm())


def check_lora():
    for patched_first in (True, False):
        models = []
        for parallel_too in (False, True):
            model = made("llama")
            if patched_first:
                patch(model, "lean")
            config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=ADAPTED)
            model = peft.get_peft_model(model, config)
            model.add_adapter("b", peft.LoraConfig(r=2, target_modules=ADAPTED[1:]))
            torch.manual_seed(3)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data = torch.randn_like(parameter) * 0.1
            if not patched_first:
                patch(model, "lean")
            models.append(parallelize(model, mesh()["tensor"]) if parallel_too else model)
        plain, model = models
        for name in ("default", "b"):  # the other one was not active when the model was split
            plain.set_adapter(name)
            model.set_adapter(name)
            assert_close(whole(step(model, inputs())), step(plain, inputs()))


def check_checkpoints_are_those_of_one_process():
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    [folder] = folders
    model, plain = split("llama"), made("llama")
    assert model.state_dict().keys() == plain.state_dict().keys()
    dcp.save(model.state_dict(), checkpoint_id=f"{folder}/split")
    fresh = blank(plain)
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/split", no_dist=True)
    fresh.load_state_dict(state)
    assert all(map(torch.equal, fresh.state_dict().values(), made("llama").state_dict().values()))
    if dist.get_rank() == 0:
        dcp.save(plain.state_dict(), checkpoint_id=f"{folder}/whole", no_dist=True)
    dist.barrier()
    blank(model)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/whole")
    model.load_state_dict(state)
    assert_close(whole(step(model, inputs())), exact("llama"))
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def blank(model):
    """A model without what it knows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def check_what_cannot_be_split_is_refused():
    tensor = mesh()["tensor"]

    def given(family, **changes):
        model = make_model(family, **changes)
        patch(model)
        return model

    halved = make_model("llama", attention_bias=False, mlp_bias=False)
    patch(halved.model.layers[0])
    for model, *parts in (
        (made("llama"), "module is a LlamaForCausalLM", "patch comes first"),
        (given("llama"), "o_bias is True"),
        (given("llama", **MODELS["llama"], num_key_value_heads=3), "num_key_value_heads is 3"),
        (given("llama", **MODELS["llama"], intermediate_size=81), "intermediate_size is 81"),
        (given("phi3"), "stacked_qkv is True"),
        (given("gpt2"), "stacked_qkv is True"),
        (given("mixtral"), "model.layers.0 is a MixtralDecoderLayer of which the attention half"),
        (halved, "model.layers.1 is a LlamaDecoderLayer that is not patched"),
        (with_adapters(lora_dropout=0.1), "self_attn.q_proj has an adapter that drops out"),
        (with_adapters(lora_bias=True), "self_attn.o_proj has an adapter with a bias"),
        (with_adapters(use_dora=True), "runs its own forward for now"),
    ):  # fmt: skip
        before = [(type(m), *map(id, m.parameters(False))) for m in model.modules()]
        refused(lambda model=model: parallelize(model, tensor), *parts)
        assert before == [(type(m), *map(id, m.parameters(False))) for m in model.modules()]
    model = split("llama")
    refused(lambda: parallelize(model, tensor), "model.layers.0 is sharded already")
    refused(lambda: unpatch(model), "q_proj.weight is a DTensor", "patch first")
    refused(lambda: patch(model), "q_proj.weight is a DTensor", "patch first")
    tokens = inputs()["input_ids"]
    refused(lambda: model(tokens[:, :7]), "has 7 tokens a sequence, expected a multiple of 2")
    refused(lambda: model.eval()(tokens), "model.layers.0 is split over ranks", "cache")
    with torch.no_grad():
        found = model(tokens, use_cache=False).logits
    assert_close({"logits": found}, {"logits": exact("llama")["logits"]})


def with_adapters(**options):
    model = made("llama")
    patch(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], **options)
    return peft.get_peft_model(model, config)
