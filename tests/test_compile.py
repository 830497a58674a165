"""torch.compile(fullgraph=True) gives eager's bits, whatever a block is and keeps."""

import pytest
import torch
from families import FAMILIES, make_block, make_input, results, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

from backfuse import BlockStack, attention, ffn


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module, backend="aot_eager", **options):
    """The module, compiled as one graph, with what `results` asks for."""
    graph = torch.compile(module, fullgraph=True, backend=backend, **options)

    def run(*args, **kwargs):
        return graph(*args, **kwargs)

    run.zero_grad, run.parameters = module.zero_grad, module.parameters
    return run


@pytest.mark.parametrize(
    "family, policy, frozen",
    [
        ("llama", "keep", "nothing"),
        ("qwen3", "selective", "all-but-norms"),
        ("gpt2", "lean", "projections"),
        ("gemma2", "full", "attention"),
        ("olmo2", "lean", "all-but-down"),
        ("phi3", "full", "ffn"),
        ("sinks-and-wide-values", "selective", "nothing"),
        ("odd-sizes", {"preact": "fp8", "qkv": "recompute"}, "everything"),
    ],
)
def test_a_block(family, policy, frozen):
    block = make_block(FAMILIES[family], policy, frozen=frozen)
    x, grad = make_input(block.spec)
    expected = results(block, x, grad)
    assert same_bits(results(compiled(block), x, grad), expected)


@pytest.mark.parametrize("policy", ["keep", "lean"])
def test_without_gradients(policy):
    block = make_block(FAMILIES["gpt2"], policy).eval()
    x, _ = make_input(block.spec, requires_grad=False)
    with torch.no_grad():
        assert torch.equal(compiled(block)(x), block(x))


@pytest.mark.parametrize("segments", [None, 2, ((1, 2), 1)])
def test_a_stack(segments):
    spec = FAMILIES["phi3"]
    policies = ["keep", "selective", "full", "lean"]
    stack = BlockStack(spec, 4, policies, segments=segments, chunk_size=64)
    x, grad = make_input(spec)
    for parameter in stack.layers[0].parameters():  # a frozen layer belongs to no segment
        parameter.requires_grad_(False)
    x.requires_grad_(segments is not None)
    expected = results(stack, x, grad)
    assert same_bits(results(compiled(stack), x, grad), expected)


def test_a_policy_set_afterwards_is_a_new_graph():
    block = make_block(FAMILIES["llama"], "keep")
    x, grad = make_input(block.spec)
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(block, counter)
    expected = results(run, x, grad)
    block.policy = "full"
    assert same_bits(results(run, x, grad), expected)
    assert counter.frame_count == 2


@pytest.mark.parametrize("half", [attention, ffn])
def test_a_half(half):
    spec = FAMILIES["gpt2"]
    block = make_block(spec)
    weights = dict(block.named_parameters())
    x, grad = make_input(spec)

    def run(x):
        return half(x, weights, spec, "full", training=True, chunk_size=64)

    run.zero_grad, run.parameters = block.zero_grad, block.parameters
    expected = results(run, x, grad)
    assert same_bits(results(compiled(run), x, grad), expected)


PACKED = torch.tensor([0, 20, 20, 61, 70], dtype=torch.int32)
ANGLES = tuple(torch.randn(2, 1, 70, 8, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(
    "batch_size, given",
    [
        (1, {"cu_seqlens": PACKED}),
        (1, {"cu_seqlens": PACKED, "max_seqlen": 41}),
        (2, {"attention_mask": torch.ones(2, 1, 70, 70, dtype=torch.bool).tril()}),
        (2, {"attention_mask": torch.zeros(1, 4, 70, 70)}),
        (2, {"position_embeddings": ANGLES}),
    ],
)
def test_side_inputs(batch_size, given):
    block = make_block(FAMILIES["llama"], "lean")
    x, grad = make_input(block.spec, batch_size=batch_size)
    expected = results(block, x, grad, **given)
    assert same_bits(results(compiled(block), x, grad, **given), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    stack = BlockStack(FAMILIES["olmo2"], 2, "selective").to(dtype)
    x, grad = make_input(stack.spec, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(stack, x, grad)
    run = compiled(stack)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(results(run, x, grad), expected)
    inside = results(compiled(lambda_of(stack)), x, grad)
    assert same_bits(inside, expected)


def lambda_of(stack):
    """The stack under autocast that is switched on inside what is compiled."""

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return stack(x)

    run.zero_grad, run.parameters = stack.zero_grad, stack.parameters
    return run


@pytest.mark.parametrize("dynamic", [True, None])
def test_one_graph_for_all_lengths(dynamic):
    spec = FAMILIES["gpt2"]
    stack = BlockStack(spec, 2, "lean", segments=2, chunk_size=64)
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(stack, counter, dynamic=dynamic)
    for seq_len in (70, 64, 65, 2, 128, 33, 96, 7, 200, 129):
        x, grad = make_input(spec, seq_len=seq_len)
        x = x.detach()
        if dynamic is None:
            torch._dynamo.mark_dynamic(x, 1)
        x.requires_grad_()
        assert same_bits(results(run, x, grad), results(stack, x, grad)), seq_len
    assert counter.frame_count == 1


def test_one_graph_for_all_batches_packings_and_lengths_of_both():
    block = make_block(FAMILIES["llama"], "lean")
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(block, counter, dynamic=True)
    for seq_len, offsets in ((70, [0, 20, 70]), (81, [0, 1, 50, 50, 81]), (40, [0, 3, 40])):
        x, grad = make_input(block.spec, batch_size=1, seq_len=seq_len)
        given = {"cu_seqlens": torch.tensor(offsets), "max_seqlen": 50}
        assert same_bits(results(run, x, grad, **given), results(block, x, grad, **given))
    assert counter.frame_count == 1
    for batch_size in (2, 3, 5):
        x, grad = make_input(block.spec, batch_size=batch_size)
        assert same_bits(results(run, x, grad), results(block, x, grad))
    assert counter.frame_count == 2


def test_strides_of_all_kinds():
    block = make_block(FAMILIES["qwen3"], "lean")
    run = compiled(block)
    x, grad = make_input(block.spec, seq_len=32)
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for gradient in (grad, grad[:1, :1].expand_as(grad), grad.transpose(1, 2)):
        assert same_bits(results(run, turned, gradient), results(block, turned, gradient))


def test_changed_in_place_afterwards():
    block = make_block(FAMILIES["llama"], "full")
    x, grad = make_input(block.spec)

    def run(x):
        y = block(x)
        y += 1
        return y

    run.zero_grad, run.parameters = block.zero_grad, block.parameters
    assert same_bits(results(compiled(run), x, grad), results(run, x, grad))


def test_a_second_backward_pass():
    block = make_block(FAMILIES["gpt2"], "selective")
    x, grad = make_input(block.spec)
    torch.manual_seed(2)
    y = compiled(block)(x)
    y.backward(grad, retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    y.backward(grad)
    assert torch.equal(x.grad, first)


def test_every_call_drops_out_anew():
    block = make_block(FAMILIES["gpt2"], "full")
    x, grad = make_input(block.spec)

    def twice(x):
        return block(x) - block(x)

    run = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert not torch.equal(run(x), torch.zeros_like(x))
    assert not torch.equal(block_of(run, x, 1), block_of(run, x, 2))
    assert torch.equal(block_of(run, x, 1), block_of(run, x, 1))


def block_of(run, x, seed):
    torch.manual_seed(seed)
    return run(x)


def test_inductor():
    torch.manual_seed(0)
    spec = FAMILIES["phi3"]
    stack = BlockStack(spec, 2, ["lean", "keep"], segments=2, chunk_size=64)
    x, grad = make_input(spec)
    with torch._inductor.config.patch(fallback_random=True):  # eager's random numbers
        expected = results(stack, x, grad)
        assert same_bits(results(compiled(stack, "inductor"), x, grad), expected)


def test_inductor_draws_anew():
    stack = BlockStack(FAMILIES["phi3"], 1)
    x, _ = make_input(stack.spec, requires_grad=False)
    run = torch.compile(stack.requires_grad_(False), fullgraph=True)
    outputs = [block_of(run, x, seed) for seed in (1, 2, 1)]
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


BAD = {
    "hidden_states": ({"x": torch.zeros(2, 70, 31)}, r"hidden_states is .*31\]"),
    "cu_seqlens": ({"cu_seqlens": PACKED}, "expected a batch of 1"),
    "attention_mask": ({"attention_mask": torch.zeros(1, 1, 70, 69)}, "attention_mask is"),
    "max_seqlen": ({"max_seqlen": 3}, "max_seqlen is 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    block = make_block(FAMILIES["llama"])
    given, message = BAD[name]
    x = given.get("x", make_input(block.spec)[0])
    given = {key: value for key, value in given.items() if key != "x"}
    with pytest.raises(ValueError, match=message):
        torch.compile(block, backend="aot_eager")(x, **given)


def test_offsets_that_no_graph_can_read_are_checked_when_it_runs():
    block = make_block(FAMILIES["llama"])
    x, _ = make_input(block.spec, batch_size=1)
    run = compiled(block)
    run(x, cu_seqlens=PACKED)
    with pytest.raises(ValueError, match="offsets that rise from 0"):
        run(x, cu_seqlens=PACKED.flip(0))


def test_offload_is_refused():
    block = make_block(FAMILIES["llama"], "offload")
    x, _ = make_input(block.spec)
    with pytest.raises(Exception, match="expected one that offloads nothing"):
        compiled(block)(x)
