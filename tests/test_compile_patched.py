"""Patched Hugging Face models compile as one graph, each layer one operator of it."""

import pytest
import torch
from families import results, same_bits
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
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "bos_token_id": 0, "eos_token_id": 1},
}


@pytest.mark.parametrize("family", CONFIGS)
def test_one_graph(family):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, **CONFIGS[family]
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert len(backfuse.patch(model, policy="lean").fused) == 2
    tokens = torch.randint(64, (2, 17))
    padded = torch.ones_like(tokens)  # so that a mask comes in both: a traced one is not looked at
    padded[0, :3] = 0
    grad = torch.randn(2, 17, 64)

    def step(run):
        def logits(_):
            return run(input_ids=tokens, attention_mask=padded, use_cache=False).logits

        logits.zero_grad, logits.parameters = model.zero_grad, model.parameters
        return results(logits, torch.zeros(1), grad)

    expected = step(model)
    counter = CompileCounterWithBackend("aot_eager")
    got = step(torch.compile(model, fullgraph=True, backend=counter))
    assert same_bits(got, expected)
    [graph] = counter.graphs
    assert sum("block_forward" in str(node.target) for node in graph.graph.nodes) == 2
