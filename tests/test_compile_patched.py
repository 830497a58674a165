"""Patched Hugging Face models compile as one graph, each layer one operator of it."""

import pytest
import torch
from families import assert_as_good_as, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

import backfuse

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "llama": SIZES,
    "qwen3": SIZES,
    "gpt2": {
        "n_embd": 32, "n_head": 4, "n_layer": 2, "bos_token_id": 0, "eos_token_id": 1,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    },
}  # fmt: skip
#: Ten lengths of sequences.
LENGTHS = (17, 18, 20, 24, 29, 31, 33, 40, 47, 64)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(family, policy="lean"):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, **CONFIGS[family]
    )
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    if policy is not None:
        assert len(backfuse.patch(model, policy).fused) == 2
    return model


def step(model, run, tokens=17):
    """Logits, and the gradients of what is trained."""
    ids = torch.randint(64, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    padded = torch.ones_like(ids)  # so that a mask comes in both: a traced one is not looked at
    padded[0, :3] = 0
    model.zero_grad()
    logits = run(input_ids=ids, attention_mask=padded, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def blocks_of(counter):
    """How many operators of ours each graph has; a wrapper's, with nothing in it, left out."""
    nodes = [list(graph.graph.nodes) for graph in counter.graphs]
    return [sum("block_forward" in str(node.target) for node in own) for own in nodes if own]


@pytest.mark.parametrize("family", CONFIGS)
def test_one_graph_for_ten_lengths(family):
    model = made(family)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for tokens in LENGTHS:
        assert same_bits(step(model, compiled, tokens), step(model, model, tokens)), tokens
    assert blocks_of(counter) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_inductor(family):
    """What stands around the blocks is compiled for good: as exact as eager, not the same bits."""
    model, exact = made(family), made(family, policy=None).double()
    found = step(model, torch.compile(model, fullgraph=True))
    eager, true = step(model, model), step(exact, exact)
    names = ["logits", *dict(model.named_parameters())]
    for name, ours, plain, value in zip(names, found, eager, true, strict=True):
        assert_as_good_as(name, ours, plain, value, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_adapters_are_trained(dropout):
    peft = pytest.importorskip("peft")

    def trained(compiled):
        model = made("llama")
        options = {"r": 3, "lora_alpha": 5, "lora_dropout": dropout}
        names = ["q_proj", "o_proj", "up_proj", "down_proj"]
        config = peft.LoraConfig(target_modules=names, init_lora_weights=False, **options)
        model = peft.get_peft_model(model, config)
        counter = CompileCounterWithBackend("aot_eager")
        run = model
        if compiled:
            run = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        own = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(own, 0.05)
        results = []
        for tokens in LENGTHS[:3]:
            results += step(model, run, tokens)
            optimizer.step()
        assert blocks_of(counter) == ([2] if compiled else [])
        return results

    assert same_bits(trained(True), trained(False))
