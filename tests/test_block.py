"""A block under every policy: the same bits, the right gradients, kept tensors untouched."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, FROZEN, POLICIES, make_block, make_input, results, same_bits
from torch.func import functional_call

from backfuse import BlockSpec, Policy, TransformerBlock, attention, ffn, rope_cos_sin
from backfuse.kernels.reference import explicit_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMED = ["keep", "selective", "lean", "full"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_policies_give_the_same_bits(family, dtype, poisoned_empty):
    spec = FAMILIES[family]
    block = make_block(spec, dtype=dtype)
    x, grad = make_input(spec, dtype=dtype, seq_len=75)  # 150 tokens: chunks of 64, 64 and 22
    expected = results(block, x, grad)
    assert all(t is not None and t.isfinite().all() for t in expected)
    for policy in POLICIES:
        block.policy = policy
        assert same_bits(results(block, x, grad), expected), policy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("input_grad", [True, False])
def test_frozen_subsets_give_the_same_bits(family, frozen, input_grad, poisoned_empty):
    """And what is not frozen gets what it gets when nothing is."""
    spec = FAMILIES[family]
    x, grad = make_input(spec, seq_len=40)
    everything = results(make_block(spec), x, grad)
    x, grad = make_input(spec, seq_len=40, requires_grad=input_grad)
    for policy in POLICIES:
        block = make_block(spec, policy, frozen=frozen)
        got = results(block, x, grad)
        wanted = [True, input_grad, *(p.requires_grad for p in block.parameters())]
        for value, full, want in zip(got, everything, wanted, strict=True):
            assert (value is not None) == want
            assert not want or torch.equal(value, full), policy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_same_bits_and_fp32_gradients(family, autocast, poisoned_empty):
    spec = FAMILIES[family]
    block = make_block(spec)
    x, grad = make_input(spec, seq_len=50)
    exact = results(block, x, grad)
    with torch.autocast("cpu", dtype=autocast):
        expected = results(block, x, grad)
    assert all(t.dtype == torch.float32 for t in expected)
    assert not torch.equal(expected[0], exact[0])  # it does compute in low precision
    for policy in POLICIES:
        block.policy = policy
        # autocast is on in forward only: backward must not depend on the state it finds
        with torch.autocast("cpu", dtype=autocast):
            torch.manual_seed(2)
            block.zero_grad()
            x.grad = None
            y = block(x)
        y.backward(grad)
        got = [y.detach(), x.grad, *(p.grad for p in block.parameters())]
        assert same_bits(got, expected), policy


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences(family, poisoned_empty):
    """The same bits under every policy; and each sequence is as it would be alone."""
    spec = FAMILIES[family]
    block = make_block(spec, dtype=torch.float64)
    x, grad = make_input(spec, batch_size=1, seq_len=90, dtype=torch.float64)
    bounds = [0, 30, 30, 31, 90]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    expected = results(block, x, grad, cu_seqlens=cu_seqlens)
    for policy in NAMED:
        block.policy = policy
        assert same_bits(results(block, x, grad, cu_seqlens=cu_seqlens), expected)
    block.eval()  # without dropout, whose mask depends on the place in the batch
    whole = results(block, x, grad, cu_seqlens=cu_seqlens)
    weight_grads = [torch.zeros_like(p) for p in block.parameters()]
    for a, b in zip(bounds, bounds[1:], strict=False):
        if a == b:
            continue
        part = x.detach()[:, a:b].clone().requires_grad_()
        alone = results(block, part, grad[:, a:b])
        torch.testing.assert_close(whole[0][:, a:b], alone[0])
        torch.testing.assert_close(whole[1][:, a:b], alone[1])
        for total, share in zip(weight_grads, alone[2:], strict=True):
            total += share
    torch.testing.assert_close(whole[2:], weight_grads)


@pytest.mark.parametrize("policy", NAMED)
def test_frozen_sinks_cost_nothing(policy, monkeypatch):
    spec = FAMILIES["sinks-and-wide-values"]
    block, (x, grad) = make_block(spec, policy), make_input(spec, seq_len=40)
    sinks = block.get_parameter("self_attn.sinks")
    expected = results(block, x, grad)
    assert sinks.grad.abs().min() > 0
    sinks.requires_grad_(False)
    monkeypatch.setattr(explicit_attention, "sink_gradient", None)
    for got, full in zip(results(block, x, grad), expected, strict=True):
        assert got is None or torch.equal(got, full)
    assert sinks.grad is None


def test_sinks_alone_are_trained():
    spec = FAMILIES["sinks-and-wide-values"]
    x, grad = make_input(spec, seq_len=40)
    expected = results(make_block(spec), x, grad)
    names = [name for name, _ in make_block(spec).named_parameters()]
    x.requires_grad_(False)
    for policy in NAMED:
        block = make_block(spec, policy, frozen="everything")
        block.get_parameter("self_attn.sinks").requires_grad_()
        got = dict(zip(names, results(block, x, grad)[2:], strict=True))
        assert torch.equal(got.pop("self_attn.sinks"), expected[2 + names.index("self_attn.sinks")])
        assert set(got.values()) == {None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["keep", "full"])
def test_gradcheck(family, policy):
    spec = FAMILIES[family]
    block = make_block(spec, policy, dtype=torch.float64)
    names = [name for name, _ in block.named_parameters()]
    x, _ = make_input(spec, seq_len=9, dtype=torch.float64)

    def run(x, *parameters):
        torch.manual_seed(2)
        return functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *block.parameters()), fast_mode=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["keep", "full"])
def test_gradcheck_of_the_halves(family, policy):
    spec = FAMILIES[family]
    block = make_block(spec, policy, dtype=torch.float64)
    x, _ = make_input(spec, seq_len=7, dtype=torch.float64)
    for half, names in ((ffn, spec.ffn_parameters()), (attention, spec.attention_parameters())):

        def run(x, *parameters, half=half, names=names):
            torch.manual_seed(2)
            weights = dict(zip(names, parameters, strict=True))
            return half(x, weights, spec, policy, training=True)

        weights = [block.get_parameter(name) for name in names]
        assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "phi3", "relu2"])
def test_the_halves_make_the_block(family):
    spec = FAMILIES[family]
    block = make_block(spec).eval()
    x, grad = make_input(spec)
    expected = results(block, x, grad)
    for policy in POLICIES[::5]:
        weights = dict(block.named_parameters())
        block.zero_grad()
        x.grad = None
        y = ffn(
            attention(x, weights, spec, policy, chunk_size=64), weights, spec, policy, chunk_size=64
        )
        y.backward(grad)
        got = [y.detach(), x.grad, *(p.grad for p in block.parameters())]
        assert same_bits(got, expected)


@pytest.mark.parametrize("change", [{"norm_position": "post"}, {"norm_position": "both"},
                                    {"shared_norm": True}, {}])  # fmt: skip
def test_parallel_halves_add_up(change):
    """Both read x; with norms at their ends too. `tests/families.py` has the rest."""
    spec = BlockSpec(32, 48, 4, parallel_residual=True, **change)
    block = make_block(spec, dtype=torch.float64)
    x, grad = make_input(spec, dtype=torch.float64)
    found = results(block, x, grad)
    for policy in NAMED[1:]:
        block.policy = policy
        assert same_bits(results(block, x, grad), found), policy
    weights = dict(block.named_parameters())
    y = attention(x, weights, spec, "full") + ffn(x, weights, spec, "full") - x
    expected = torch.autograd.grad(y, [x, *weights.values()], grad)
    torch.testing.assert_close(found, [y.detach(), *expected])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", NAMED)
def test_second_backward_through_a_retained_graph(family, policy):
    """Kept tensors are never written."""
    spec = FAMILIES[family]
    block = make_block(spec, policy)
    x, grad = make_input(spec)
    y = block(x)
    inputs = [x, *block.parameters()]
    first = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    again = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    doubled = torch.autograd.grad(y, inputs, 2 * grad)
    assert same_bits(first, again)
    for a, b in zip(first, doubled, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_only_read(family):
    spec = FAMILIES[family]
    block = make_block(spec, "keep")
    x, grad = make_input(spec)
    cos, sin = rope_cos_sin(torch.arange(70)[None], spec.rotary_dim, layout=spec.rope or "half")
    given = [x, grad, cos, sin, *block.parameters()]
    before = [t.detach().clone() for t in given]
    block(x, position_embeddings=(cos, sin)).backward(grad)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("policy", NAMED)
def test_gradients_of_any_layout(policy):
    spec = FAMILIES["llama"]
    block = make_block(spec, policy)
    x, grad = make_input(spec)
    expected = results(block, x, grad)
    noncontiguous = grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bits(results(block, x, noncontiguous), expected)
    ones = results(block, x, torch.ones_like(grad))
    x.grad = None
    block.zero_grad()
    block(x).sum().backward()  # a gradient of stride 0
    assert same_bits([x.grad, *(p.grad for p in block.parameters())], ones[1:])


def test_noncontiguous_input():
    spec = FAMILIES["llama"]
    block = make_block(spec, "full")
    x, grad = make_input(spec)
    expected = results(block, x, grad)
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert same_bits(results(block, strided, grad), expected)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2), (5, 13)])
@pytest.mark.parametrize("family", FAMILIES)
def test_few_tokens(shape, family, poisoned_empty):
    spec = FAMILIES[family]
    x, grad = make_input(spec, batch_size=shape[0], seq_len=shape[1])
    expected = results(make_block(spec, "keep"), x, grad)
    assert same_bits(results(make_block(spec, "full"), x, grad), expected)
    assert all(t.isfinite().all() for t in expected)


def test_the_chunk_size_bounds_scratch_and_changes_nothing_else():
    spec = FAMILIES["llama"]
    x, grad = make_input(spec, dtype=torch.float64, seq_len=200)
    whole = results(make_block(spec, "full", dtype=torch.float64, chunk_size=512), x, grad)
    chunked = results(make_block(spec, "full", dtype=torch.float64, chunk_size=64), x, grad)
    torch.testing.assert_close(whole, chunked)


def test_no_grad_keeps_nothing_and_gives_the_same_output():
    spec = FAMILIES["llama"]
    block = make_block(spec, "keep")
    x, grad = make_input(spec)
    expected = results(block, x, grad)[0]
    with torch.no_grad():
        y = block(x)
    assert torch.equal(y, expected) and not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(block(x.detach()), expected)


def test_dropout_follows_the_generator_and_training_mode():
    spec = FAMILIES["gpt2"]
    block = make_block(spec)
    x, grad = make_input(spec)
    torch.manual_seed(3)
    first, second = block(x), block(x)
    torch.manual_seed(3)
    assert torch.equal(block(x), first) and torch.equal(block(x), second)
    assert not torch.equal(first, second)
    block.eval()
    assert torch.equal(block(x), block(x))


def test_dropout_averages_to_the_block_without_it():
    spec = BlockSpec(16, 24, 2, residual_dropout=0.3)
    block = make_block(spec)
    x, _ = make_input(spec, seq_len=8)
    with torch.no_grad():
        exact = block.eval()(x) - x
        attn = attention(x, dict(block.named_parameters()), spec)
        block.train()
        weights = dict(block.named_parameters())
        samples = torch.stack([attention(x, weights, spec, training=True) for _ in range(2000)])
    assert (samples.mean(0) - attn).abs().max() < 0.15 * exact.abs().max()


def test_a_weight_changed_in_between_is_noticed():
    block = make_block(FAMILIES["llama"], "full")
    x, grad = make_input(block.spec)
    y = block(x)
    with torch.no_grad():
        block.mlp.up_proj.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


def test_double_backward_names_the_alternative():
    block = make_block(FAMILIES["llama"])
    x, _ = make_input(block.spec)
    with pytest.raises(ValueError, match=r"create_graph is True.*torch\.utils\.checkpoint"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)


def test_deepcopy_pickle_and_repr():
    block = make_block(FAMILIES["gemma2"], "lean")
    x, grad = make_input(block.spec)
    expected = results(block, x, grad)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.policy == Policy.parse("lean")
        assert same_bits(results(other, x, grad), expected)
    assert "Policy(lean: keep x, attn_out; recompute qkv, mid, preact)" in repr(block)


def test_positions_are_computed_where_none_are_given():
    spec = BlockSpec(32, 48, 4, rope_theta=500.0, rope="interleaved", rotary_dim=4)
    block = make_block(spec)
    x, grad = make_input(spec)
    angles = rope_cos_sin(torch.arange(70)[None], 4, 500.0, layout="interleaved")
    assert same_bits(results(block, x, grad), results(block, x, grad, position_embeddings=angles))
    cu_seqlens = torch.tensor([0, 20, 70], dtype=torch.int32)
    x, grad = make_input(spec, batch_size=1)
    positions = torch.cat((torch.arange(20), torch.arange(50)))[None]
    angles = rope_cos_sin(positions, 4, 500.0, layout="interleaved")
    assert same_bits(
        results(block, x, grad, cu_seqlens=cu_seqlens),
        results(block, x, grad, cu_seqlens=cu_seqlens, position_embeddings=angles),
    )


def test_cosines_of_each_sequence():
    spec = FAMILIES["llama"]
    block = make_block(spec)
    x, grad = make_input(spec)
    positions = torch.stack((torch.arange(70), torch.arange(70) + 11))
    cos, sin = rope_cos_sin(positions, spec.head_dim)
    whole = block(x, position_embeddings=(cos, sin))
    for i in range(2):
        alone = block(x[i : i + 1], position_embeddings=(cos[i : i + 1], sin[i : i + 1]))
        torch.testing.assert_close(whole[i : i + 1], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_agrees_with_cpu(family, dtype):
    spec = FAMILIES[family]
    block = make_block(spec, dtype=dtype).eval()
    x, grad = make_input(spec, dtype=dtype)
    exact = results(
        make_block(spec, dtype=torch.float64).eval(),
        x.detach().double().requires_grad_(),
        grad.double(),
    )
    cpu = results(block, x, grad)
    block = block.cuda()
    x, grad = x.detach().cuda().requires_grad_(), grad.cuda()
    for policy in NAMED:
        block.policy = policy
        for name, ours, there, right in zip(
            ("y", "dx", *dict(block.named_parameters())),
            results(block, x, grad),
            cpu,
            exact,
            strict=True,
        ):
            bound = (
                2 * (there.double() - right).abs().max()
                + 4 * torch.finfo(dtype).eps * right.abs().max()
            )
            assert (ours.cpu().double() - right).abs().max() <= bound, name


def test_parameters_start_as_a_residual_identity_would():
    block = TransformerBlock(FAMILIES["gemma2"])
    assert all((p == 0).all() for n, p in block.named_parameters() if "norm" in n)  # offset 1
    block = TransformerBlock(FAMILIES["gpt2"])
    assert all((p == 1).all() for n, p in block.named_parameters() if n.endswith("norm.weight"))
    assert all((p == 0).all() for n, p in block.named_parameters() if n.endswith("bias"))
    assert abs(block.mlp.up_proj.weight.std().item() - 0.02) < 0.002


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_scratch_does_not_grow_with_the_tokens(policy):
    """Of the FFN's width: one chunk of it, in either pass."""
    from backfuse.bench.measure import allocator_trace

    spec = BlockSpec(16, 1024, 2)
    weights = {n: p.detach() for n, p in make_block(spec).named_parameters()}

    def transient(tokens):
        x = torch.randn(1, tokens, 16, requires_grad=True)
        narrow = 8 * tokens * 16 * 4  # a few tensors of the residual stream
        trace = allocator_trace(
            lambda: ffn(x, weights, spec, policy, chunk_size=64).sum().backward()
        )
        return trace.peak_bytes - narrow

    chunk = 64 * 2 * 1024 * 4  # gate and up of one chunk
    assert transient(4096) < 6 * chunk < 4096 * 1024 * 4


@pytest.mark.gpu
def test_all_policies_give_the_same_bits_on_cuda(monkeypatch):
    """PyTorch's own attention backward is deterministic only where that is asked for."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    spec = BlockSpec(256, 704, 4, 2)
    x, grad = make_input(spec, seq_len=300, dtype=torch.bfloat16)
    x, grad = x.detach().cuda().requires_grad_(), grad.cuda()
    block = make_block(spec, dtype=torch.bfloat16).cuda()
    torch.use_deterministic_algorithms(True)
    try:
        expected = results(block, x, grad)
        for policy in POLICIES:
            block.policy = policy
            assert same_bits(results(block, x, grad), expected), policy
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "geglu-layernorm-post"])
def test_any_single_parameter_may_be_the_only_trainable_one(family):
    spec = FAMILIES[family]
    x, grad = make_input(spec, seq_len=20)
    everything = results(make_block(spec), x, grad)
    x, grad = make_input(spec, seq_len=20, requires_grad=False)
    for policy in NAMED:
        block = make_block(spec, policy)
        for i, chosen in enumerate(block.parameters()):
            for parameter in block.parameters():
                parameter.requires_grad_(parameter is chosen)
            got = results(block, x, grad)
            assert torch.equal(got[2 + i], everything[2 + i])


def test_the_output_may_be_changed_in_place():
    block = make_block(FAMILIES["llama"])
    x, grad = make_input(block.spec)
    expected = results(block, x, grad)
    x.grad = None
    block.zero_grad()
    y = block(x)
    y += 1
    y.backward(grad)
    got = [y.detach() - 1, x.grad, *(p.grad for p in block.parameters())]
    torch.testing.assert_close(got[0], expected[0])
    assert same_bits(got[1:], expected[1:])


def test_reset_parameters_resets_norms_too():
    block = TransformerBlock(FAMILIES["gpt2"], device="meta").to_empty(device="cpu")
    for parameter in block.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    block.reset_parameters()
    assert all(p.isfinite().all() for p in block.parameters())
    assert (block.input_layernorm.weight == 1).all() and (block.input_layernorm.bias == 0).all()


def test_an_adapter_is_refused_and_not_dropped():
    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        @property
        def weight(self):
            return self.base_layer.weight

    block = make_block(FAMILIES["llama"])
    x, _ = make_input(block.spec)
    block.self_attn.q_proj = Adapter(block.self_attn.q_proj)
    with pytest.raises(TypeError, match="self_attn.q_proj is a Adapter, expected a plain"):
        block(x)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_weights_of_any_stride(family):
    """Biases and norm weights as columns of something, projections transposed: the same numbers."""
    spec = FAMILIES[family].replace(up_bias=True, down_bias=True, qkv_bias=True)
    block = make_block(spec).eval()
    x, grad = make_input(spec, seq_len=20)
    weights = {name: p.detach() for name, p in block.named_parameters()}
    strided = {
        name: torch.stack([w, w + 1], -1)[:, 0] if w.dim() == 1 else w.T.contiguous().T
        for name, w in weights.items()
    }
    for half, names in ((ffn, spec.ffn_parameters()), (attention, spec.attention_parameters())):
        outputs = []
        for given in (weights, strided):
            leaves = {name: given[name].detach().requires_grad_() for name in names}
            y = half(x, leaves, spec, "full")
            outputs.append([y, *torch.autograd.grad(y, list(leaves.values()), grad)])
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_angles_in_fp64():
    spec = FAMILIES["llama"]
    block = make_block(spec)
    x, grad = make_input(spec, seq_len=20)
    angles = rope_cos_sin(torch.arange(20)[None], spec.rotary_dim, dtype=torch.float64)
    single = tuple(t.float() for t in angles)
    expected = results(block, x, grad, position_embeddings=single)
    assert same_bits(results(block, x, grad, position_embeddings=angles), expected)
