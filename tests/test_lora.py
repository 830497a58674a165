"""LoRA inside the halves: PEFT's numbers, the same bits under every policy, bytes and FLOPs."""

import copy
import functools
import importlib.util
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import DEVICE
from families import (
    FAMILIES,
    POLICIES,
    assert_as_good_as,
    held_bytes,
    make_block,
    make_input,
    results,
    same_bits,
)
from test_flops import count
from torch import nn

from backfuse import (
    BlockSpec,
    BlockStack,
    LoRA,
    Plan,
    TransformerBlock,
    adapter_parameters,
    attention,
    block_flops,
    ffn,
    kept_bytes,
    patch,
    plan,
    rope_cos_sin,
)
from backfuse.bench.plain import PlainBlock
from backfuse.blocks.adapters.peft import unwrap
from backfuse.blocks.call import SITES
from backfuse.blocks.costs import block_costs
from backfuse.blocks.lora import parse_adapters, projections
from backfuse.kernels.reference.dropout import dropout_mask

NAMED = ["keep", "selective", "lean", "full"]
LLAMA = FAMILIES["llama"]


def several(spec, dropout=0.0):
    """Adapters of every kind on all projections but one, odd ranks."""
    found = {}
    for index, name in enumerate(projections(spec)):
        if index != 1:
            first = LoRA(3 + index, 0.7 + index, dropout, use_bias=index % 2 == 0)
            found[name] = [first, LoRA(2, -1.5, name="other")] if index % 3 == 0 else first
    return found


def with_peft(module, *, other=False, dtype=None, **options):
    """A module with PEFT's adapters around its projections, and everything in them random."""
    config = {
        "target_modules": [name.split(".")[-1] for name in projections(LLAMA)],
        "r": 5, "lora_alpha": 8, "rank_pattern": {"k_proj": 3, "down_proj": 7}, **options,
    }  # fmt: skip
    model = peft.get_peft_model(module, peft.LoraConfig(**config))
    if other:
        model.add_adapter(
            "other", peft.LoraConfig(r=2, use_rslora=True, target_modules=["q_proj", "up_proj"])
        )
        model.base_model.set_adapter(["default", "other"])
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model if dtype is None else model.to(dtype)


def both(dtype, policy="keep", base_dtype=None, **options):
    """The same weights and adapters in a block and in plain PyTorch."""
    block = make_block(LLAMA, policy)
    plain = PlainBlock(LLAMA)
    plain.load_state_dict(block.state_dict())
    found = []
    for module in (block.to(base_dtype or dtype), plain.to(base_dtype or dtype)):
        found.append(with_peft(module, **options))
        if base_dtype is None:
            found[-1].to(dtype)
    return found


def adapters_of(block):
    return block.weights()[1]


def wanted_of(block, x):
    weights, _ = block.weights()
    wanted = {name for name, weight in weights.items() if weight.requires_grad}
    return wanted | ({"hidden_states"} if x.requires_grad else set())


def angles(dtype, tokens=70):
    return rope_cos_sin(torch.arange(tokens)[None], LLAMA.rotary_dim, dtype=dtype)


# What is computed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_with_adapters_is_a_half_with_their_products_added(family):
    """In fp64: output and every gradient, against the plain weights `W + s B A`."""
    spec = FAMILIES[family]
    given = several(spec)
    plain = spec.replace(qkv_bias=True, o_bias=True, up_bias=True, down_bias=True)
    shapes = {**plain.parameters(), **adapter_parameters(spec, given)}
    weights = {
        name: (torch.randn(shape, dtype=torch.float64) * 0.2).requires_grad_()
        for name, shape in shapes.items()
    }
    for name in plain.parameters().keys() - spec.parameters().keys():
        weights[name] = torch.zeros_like(weights[name])
    merged = {name: weights[name] for name in plain.parameters()}
    for name, own in parse_adapters(spec, given):
        for lora in own:
            a, b, bias = lora.parameters(name)
            share = lora.scale * weights[b] @ weights[a]
            share = share.t() if spec.conv1d else share
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + share
            if lora.use_bias:
                merged[f"{name}.bias"] = merged[f"{name}.bias"] + lora.scale * weights[bias]
    x, grad = make_input(spec, dtype=torch.float64, seq_len=20)
    inputs = [x, *(weight for weight in weights.values() if weight.requires_grad)]
    for half, policy in ((attention, "keep"), (attention, "full"), (ffn, "full")):
        found = []
        for tensors, block, own in ((weights, spec, given), (merged, plain, None)):
            z = half(x, tensors, block, policy, adapters=own)
            found.append([z, *torch.autograd.grad(z, inputs, grad, True, allow_unused=True)])
        for ours, theirs in zip(*found, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"other": True},
        {"target_modules": ["v_proj", "up_proj"]},
        {"lora_bias": True, "bias": "lora_only"},
        {"modules_to_save": ["input_layernorm", "o_proj"], "target_modules": ["q_proj"]},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pefts_numbers(options, dtype):
    """In bf16 PEFT's adapters stay in fp32, and ours do not."""
    base = dtype if dtype != torch.float64 else None
    block, plain = both(dtype, base_dtype=base, **options)
    exact = copy.deepcopy(plain).double()
    x, grad = make_input(LLAMA, dtype=dtype)
    rotary = angles(dtype)
    found = []
    for module, to in ((block, dtype), (plain, dtype), (exact, torch.float64)):
        own = x.detach().to(to).requires_grad_()
        placed = tuple(t.to(to) for t in rotary)
        own_names = ["output", "x", *(name for name, _ in module.named_parameters())]
        values = results(module, own, grad.to(to), position_embeddings=placed)
        found.append(dict(zip(own_names, values, strict=True)))
    trained = [name for name, p in block.named_parameters() if p.requires_grad]
    assert trained and all("lora" in n or "modules_to_save" in n for n in trained)
    assert found[0].keys() == found[1].keys()
    for name, ours in found[0].items():
        theirs, right = found[1][name], found[2][name]
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype
            eps = torch.finfo(dtype).eps if base else 1e-10
            assert_as_good_as(name, ours, theirs, right, eps)


def test_peft_switches_adapters():
    """Disabled, one of two, both, merged, unmerged: what PEFT's own modules give."""
    block, plain = both(torch.float64, other=True)
    x, _ = make_input(LLAMA, dtype=torch.float64)
    run = {"position_embeddings": angles(torch.float64)}
    seen = []

    def check():
        ours, theirs = block(x, **run), plain(x, **run)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        assert all((ours - other).abs().max() > 1e-3 for other in seen)
        seen.append(ours)

    check()
    for model in (block, plain):
        model.set_adapter("other")
    check()
    with block.disable_adapter(), plain.disable_adapter():
        check()
    for model in (block, plain):
        model.base_model.set_adapter(["default", "other"])
    with_both = seen.pop(0)
    for model in (block, plain):
        model.merge_adapter()
    assert adapters_of(block.base_model.model) == ()
    torch.testing.assert_close(block(x, **run), with_both, rtol=1e-9, atol=1e-11)
    disabled = seen[-1]
    with block.disable_adapter():  # which unmerges, as PEFT's own forward does
        torch.testing.assert_close(block(x, **run), disabled, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(block(x, **run), with_both, rtol=1e-9, atol=1e-11)
    bare = block.merge_and_unload()
    assert type(bare) is TransformerBlock and type(bare.mlp.up_proj) is nn.Linear
    torch.testing.assert_close(bare(x, **run), with_both, rtol=1e-9, atol=1e-11)


# Policies


@pytest.mark.parametrize(
    "kind", ["fp32", "bf16", "autocast", "dropout", "stacked", "post-norm", "second-backward"]
)
def test_all_policies_give_the_same_bits(kind, poisoned_empty):
    family = {"stacked": "phi3", "post-norm": "gemma2"}.get(kind, "llama")
    spec = FAMILIES[family]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    options = {"target_modules": [name.split(".")[-1] for name in projections(spec)]}
    block = make_block(spec, dtype=dtype)
    model = with_peft(block, lora_dropout=0.3 if kind == "dropout" else 0.0, **options)
    x, grad = make_input(spec, dtype=dtype)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
            if kind != "second-backward":
                return results(model, x, grad)
            y = model(x)
            inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
            first = torch.autograd.grad(y, inputs, grad, retain_graph=True)
            again = torch.autograd.grad(y, inputs, grad)
            assert same_bits(first, again)
            return first

    expected = run()
    assert all(t is None or t.isfinite().all() for t in expected)
    assert sum(t is not None for t in expected) > len(projections(spec))
    for policy in POLICIES[1::2]:
        block.policy = policy
        assert same_bits(run(), expected), policy


def test_a_frozen_adapter_changes_no_other_gradient():
    block = make_block(LLAMA)
    model = with_peft(block)
    x, grad = make_input(LLAMA)
    everything = results(model, x, grad)
    for frozen in ("lora_A", "lora_B", "q_proj", "down_proj"):
        for policy in ("keep", "full"):
            block.policy = policy
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.requires_grad_(frozen not in name)
            pairs = zip(results(model, x, grad), everything, strict=True)
            assert all(value is None or torch.equal(value, full) for value, full in pairs)


def test_stack_with_adapters_in_some_layers(poisoned_empty):
    torch.manual_seed(0)
    stack = BlockStack(LLAMA, 4, "keep", chunk_size=64)
    model = with_peft(stack, layers_to_transform=[1, 3], layers_pattern="layers", lora_dropout=0.2)
    x, grad = make_input(LLAMA)
    expected = results(model, x, grad)
    trained = [p.grad is not None for p in model.parameters()]
    assert trained == [p.requires_grad for p in model.parameters()] and any(trained)
    for policy, segments in (("full", 2), (["lean", "full", "selective", "keep"], None)):
        stack.set_policy(policy, segments)
        assert same_bits(results(model, x, grad), expected)
    x.requires_grad_(False)  # the first layer then keeps nothing
    for value, full in zip(results(model, x, grad), expected, strict=True):
        assert value is None or torch.equal(value, full)


@pytest.mark.filterwarnings("error:.*lru_cache.*:UserWarning")
def test_compiled_in_one_graph():
    model = with_peft(make_block(LLAMA, "lean"), lora_dropout=0.2)
    x, grad = make_input(LLAMA)
    expected = results(model, x, grad)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    x.grad = None
    torch.manual_seed(2)
    y = compiled(x)
    y.backward(grad)
    assert same_bits([y.detach(), x.grad, *(p.grad for p in model.parameters())], expected)


# Dropout


@pytest.mark.parametrize("half", [attention, ffn])
def test_gradcheck_with_dropout(half):
    """Each adapter drops out on its own, and the same in both passes."""
    spec = FAMILIES["odd-sizes"]
    given = several(spec, 0.4)
    shapes = {**spec.parameters(), **adapter_parameters(spec, given)}
    part = spec.attention_parameters() if half is attention else spec.ffn_parameters()
    names = [n for n in shapes if n in part or f"{n.split('.lora_')[0]}.weight" in part]
    x, _ = make_input(spec, seq_len=5, dtype=torch.float64)
    tensors = [(torch.randn(shapes[n], dtype=torch.float64) * 0.2).requires_grad_() for n in names]

    def run(x, *tensors):
        torch.manual_seed(2)
        weights = dict(zip(names, tensors, strict=True))
        return half(x, weights, spec, "full", adapters=given, training=True)

    assert torch.autograd.gradcheck(run, (x, *tensors), fast_mode=True)


def test_dropout_is_what_its_counter_says():
    """Through q alone, whose A reads the identity: every hole is seen in the output."""
    p, tokens, h = 0.3, 400, 16
    spec = BlockSpec(h, h, 1, norm_position="post", rope=None, gated=False, hidden_act="relu")
    given = {"mlp.up_proj": [LoRA(h, 2.0, p), LoRA(h, 1.0, p, name="b")]}
    weights = {
        name: torch.zeros(shape)
        for name, shape in {**spec.parameters(), **adapter_parameters(spec, given)}.items()
    }
    weights["mlp.down_proj.weight"] = torch.eye(h)
    weights["post_feedforward_layernorm.weight"] = torch.ones(h)
    x = torch.rand(1, tokens, h) + 1.0
    shares, masks = [], []
    for index, lora in enumerate(given["mlp.up_proj"]):
        a, b, _ = lora.parameters("mlp.up_proj")
        own = weights | {a: torch.eye(h), b: torch.eye(h)}
        torch.manual_seed(5)
        z = ffn(x, own, spec, adapters=given, training=True)
        torch.manual_seed(5)
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
        site = 8 * (1 + index) + projections(spec)["mlp.up_proj"]
        assert site not in SITES.values()
        rows, columns = torch.arange(tokens), torch.arange(h)
        mask = dropout_mask(seed, p, rows, columns, columns[:1] * 0, site)
        assert torch.equal((z - x)[0] != 0, mask[0])
        masks.append(mask)
        shares.append(mask.float().mean().item())
    assert all(abs(share - (1 - p)) < 4 * (p * (1 - p) / (tokens * h)) ** 0.5 for share in shares)
    assert 0.5 < (masks[0] == masks[1]).float().mean() < 0.66  # p^2 + (1 - p)^2 = 0.58
    assert torch.equal(ffn(x, weights, spec, adapters=given), ffn(x, weights, spec))


def test_dropout_is_on_while_pefts_modules_train():
    block = make_block(LLAMA)
    model = with_peft(block, lora_dropout=0.5)
    x, _ = make_input(LLAMA)
    assert {lora.dropout for _, own in adapters_of(block) for lora in own} == {0.5}
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert {lora.dropout for _, own in adapters_of(block) for lora in own} == {0.0}
    assert torch.equal(model(x), model(x))


# Memory and FLOPs

TRAINED = {
    "lora": lambda name: "lora" in name,
    "lora-and-norms": lambda name: "lora" in name or "norm" in name,
    "everything": lambda name: True,
    "b-of-q": lambda name: "q_proj.lora_B" in name,
    "a-of-down": lambda name: "down_proj.lora_A" in name,
    "o": lambda name: "o_proj.lora" in name,
    "biases": lambda name: name.endswith("lora_B.default.bias"),
    "b-and-layer-scale": lambda name: "lora_B" in name or "layer_scale" in name,
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "neox", "shared-norm-and-layer-scale"])
@pytest.mark.parametrize("trained", TRAINED)
def test_bytes_and_flops(family, trained):
    spec = FAMILIES[family]
    input_grad = len(family + trained) % 2 == 0
    x, grad = make_input(spec, seq_len=17, requires_grad=input_grad)
    names = [name.split(".")[-1] for name in projections(spec)]
    block = make_block(spec)
    with_peft(block, lora_bias=True, target_modules=names, lora_dropout=0.1 * (trained == "o"))
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(TRAINED[trained](name))
    rotary = rope_cos_sin(torch.arange(17)[None], spec.rotary_dim, dtype=x.dtype)
    sizes = {
        "batch_size": 2, "seq_len": 17, "requires_grad": wanted_of(block, x),
        "adapters": adapters_of(block),
    }  # fmt: skip
    for policy in POLICIES[:: 3 if trained == "lora" else 7]:
        block.policy = policy
        kept = kept_bytes(spec, policy, dtype=x.dtype, **sizes)
        run = functools.partial(block, x, position_embeddings=rotary)
        held, _ = held_bytes(run, exclude=[*block.parameters(), *rotary])
        assert held == sum(kept.values()), (policy, kept)
        predicted = block_flops(spec, policy, dtype=x.dtype, **sizes)
        forward, y = count(run)
        assert forward == predicted.forward
        backward = count(functools.partial(y.backward, grad))[0] if y.requires_grad else 0
        assert backward == predicted.backward + predicted.recompute, policy


def test_nothing_is_kept_for_frozen_weights():
    """With adapters in the attention alone, nothing of the FFN's weights is kept but its way."""
    sizes = {"batch_size": 1, "seq_len": 64, "dtype": torch.bfloat16}
    given = {name: LoRA(4) for name in projections(LLAMA) if name.startswith("self_attn")}
    trained = [*adapter_parameters(LLAMA, given), "hidden_states"]
    kept = kept_bytes(LLAMA, "keep", adapters=given, requires_grad=trained, **sizes)
    frozen = kept_bytes(LLAMA, "keep", requires_grad=["hidden_states"], **sizes)
    assert kept == frozen  # a norm's backward reads x and mid in any case
    down = {"mlp.down_proj": LoRA(4)}
    trained = [*adapter_parameters(LLAMA, down)]
    kept = kept_bytes(LLAMA, "keep", adapters=down, requires_grad=trained, **sizes)
    assert set(kept) == {"preact"}


def test_selective_keeps_a_third_of_plain_pytorch():
    """LoRA on all projections: what PEFT's modules hold is more than three times as much."""
    spec = BlockSpec(128, 352, 4, 2)
    x, _ = make_input(spec, seq_len=64)
    block, plain = TransformerBlock(spec, "selective"), PlainBlock(spec)
    rotary = rope_cos_sin(torch.arange(64)[None], spec.rotary_dim, dtype=x.dtype)
    held = []
    for module in (block, plain):
        model = with_peft(module, r=8)
        run = functools.partial(model, x, position_embeddings=rotary)
        held.append(held_bytes(run, exclude=[*model.parameters(), *rotary])[0])
    assert held[0] <= 0.3 * held[1]


# The kernels


@pytest.mark.parametrize(
    "family, dtype",
    [
        ("llama", torch.bfloat16),
        ("phi3", torch.float32),
        ("neox", torch.bfloat16),
        ("odd-sizes", torch.float32),
    ],
)
def test_kernels(family, dtype, poisoned_empty):
    """As good as the reference, and the same bits under every policy and strategy."""
    spec = FAMILIES[family]
    names = [name.split(".")[-1] for name in projections(spec)]
    block = make_block(spec, dtype=dtype)
    exact = with_peft(make_block(spec).double(), target_modules=names, lora_bias=True).double()
    model = with_peft(block, target_modules=names, lora_bias=True).to(DEVICE)
    block.eval(), exact.eval()
    x, grad = make_input(spec, dtype=dtype, seq_len=24)
    right = results(exact, x.detach().double().requires_grad_(), grad.double())
    x, grad = x.detach().to(DEVICE).requires_grad_(), grad.to(DEVICE)
    theirs = results(model, x, grad)
    block.impl = "triton"
    ours = results(model, x, grad)
    eps = torch.finfo(dtype).eps
    for name, a, b, c in zip(["output", "x", *dict(model.named_parameters())], ours, theirs, right,
                             strict=True):  # fmt: skip
        assert (a is None) == (b is None) == (c is None)
        if a is not None:
            assert_as_good_as(name, a.cpu(), b.cpu(), c, eps, 4 * c.abs().max().item())
    for policy, strategy in (("selective", "split"), ("full", "fused")):
        block.policy, block.ffn_strategy = policy, strategy
        assert same_bits(results(model, x, grad), ours), policy


def test_kernels_with_dropout_and_adapters_on_some_projections(poisoned_empty):
    x, grad = make_input(LLAMA, seq_len=20)
    x, grad = x.detach().to(DEVICE).requires_grad_(), grad.to(DEVICE)
    for names in (["up_proj", "o_proj"], ["gate_proj", "down_proj"]):
        block = make_block(LLAMA)
        model = with_peft(block, target_modules=names, lora_dropout=0.3).to(DEVICE)
        theirs = results(model, x, grad)
        block.impl = "triton"
        ours = results(model, x, grad)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= 1e-5 * b.norm()
        block.policy, block.ffn_strategy = "full", "fused"
        assert same_bits(results(model, x, grad), ours)


# What is refused


def test_other_adapters_are_refused_by_name():
    x, _ = make_input(LLAMA)
    for config, message in (
        (
            peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
            "'default' is a DoraLinearVariant",
        ),
        (peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]), "ia3.* more than LoRA"),
    ):
        block = make_block(LLAMA)
        model = peft.get_peft_model(block, config)
        with pytest.raises(TypeError, match=f"self_attn.[qv]_proj is a Linear, exp.*{message}"):
            model(x)
    block = make_block(LLAMA)
    model = with_peft(block)
    block.self_attn.q_proj.lora_A["default"] = nn.Sequential(nn.Linear(32, 5, bias=False))
    with pytest.raises(TypeError, match="made of Sequential and Linear"):
        model(x)
    block.self_attn.q_proj.base_layer = nn.Sequential(nn.Linear(32, 32))
    block.self_attn.q_proj.lora_A["default"] = nn.Linear(32, 5, bias=False)
    with pytest.raises(TypeError, match="q_proj is a Sequential, expected a plain torch.nn.Linear"):
        model(x)


def test_modules_that_are_not_pefts_pass_through():
    module = nn.Linear(2, 2)
    assert unwrap(module) == (module, (), ())


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"self_attn.q_prj": LoRA(2)}, ValueError, "names 'self_attn.q_prj'.*did you mean"),
        ({"self_attn.q_proj": 3}, TypeError, r"adapters\['self_attn.q_proj'\] is 3, expected a Lo"),
        ({"self_attn.q_proj": [LoRA(2), LoRA(3)]}, ValueError, "'default', 'default'"),
    ],
)
def test_bad_adapters(given, error, message):
    sizes = {"batch_size": 1, "seq_len": 4}
    with pytest.raises(error, match=message):
        kept_bytes(LLAMA, "full", adapters=given, **sizes)
    with pytest.raises(error, match=message):
        block_flops(LLAMA, "full", adapters=given, **sizes)
    with pytest.raises(error, match=message):
        attention(torch.zeros(1, 4, 32), {}, LLAMA, adapters=given)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rank": 0}, "rank is 0, expected a positive integer"),
        ({"rank": 2, "dropout": 1.0}, "dropout is 1.0, expected 0 <= p < 1"),
        ({"rank": 2, "scale": "1"}, "scale is '1', expected a finite number"),
        ({"rank": 2, "scale": float("inf")}, "scale is inf, expected a finite number"),
        ({"rank": 2, "use_bias": 1}, "use_bias is 1, expected True or False"),
        ({"rank": 2, "name": 'a"b'}, "expected no quotation marks"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**values)


def test_bad_tensors():
    given = {"self_attn.q_proj": LoRA(2)}
    shapes = {**LLAMA.attention_parameters(), **adapter_parameters(LLAMA, given)}
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    x, (a, b) = torch.zeros(1, 4, 32), adapter_parameters(LLAMA, given)
    with pytest.raises(ValueError, match=f"{a} is float32 .*, expected the shape \\[2, 32\\]"):
        attention(x, weights | {a: torch.zeros(3, 32)}, LLAMA, adapters=given)
    with pytest.raises(ValueError, match=f"weights lack '{b}'"):
        attention(x, {n: w for n, w in weights.items() if n != b}, LLAMA, adapters=given)
    with pytest.raises(TypeError, match=f"{a} is torch.float64, expected .*as adapters may be"):
        attention(x, weights | {a: torch.zeros(2, 32).double()}, LLAMA, adapters=given)


# The planner


def test_a_plan_counts_the_adapters(tmp_path):
    """Frozen weights free what only their gradients read; costs and file know the adapters."""
    spec = BlockSpec(4096, 14336, 32, 8)
    given = {name: LoRA(16, 2.0) for name in projections(spec)}
    sizes = {"num_layers": 4, "batch_size": 1, "seq_len": 4096, "device": "h200"}
    trained = [*adapter_parameters(spec, given), "hidden_states"]
    found = plan(spec, **sizes, budget="1GiB", adapters=given, requires_grad=trained)
    assert found.kept_bytes <= 1 << 30
    found.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == found
    costs = {"batch_size": 1, "seq_len": 4096, "device": "h200"}
    with_them = block_costs(spec, "keep", **costs, adapters=given, requires_grad=trained)
    without = block_costs(spec, "keep", **costs, requires_grad=["hidden_states"])
    everything = block_costs(spec, "keep", **costs)
    assert without.step < with_them.step < everything.step
    names = [part.name for part in with_them.parts]
    assert "down_lora_a" in names and not any(name.endswith("_proj.weight") for name in names)


# Patched models


def patched_model(kind, base_first):
    """A tiny model with adapters, patched before or after them; and the same one as it was."""
    sizes = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"hidden_size": 32, "bos_token_id": None, "eos_token_id": None}
    if kind != "gpt2":  # whose FFN is of four times the width
        sizes["intermediate_size"] = 48
    else:
        sizes |= {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = copy.deepcopy(plain)
    options = {"target_modules": "all-linear", "rank_pattern": {}, "lora_bias": True}
    if base_first:
        patch(model, policy="selective")
    found = [with_peft(one, **options).train() for one in (model, plain)]
    if not base_first:
        patch(found[0], policy="selective")
    return found


@pytest.mark.parametrize("base_first", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_patched_models(kind, base_first, recwarn):
    ids = torch.randint(0, 61, (2, 11))
    found = []
    for model in patched_model(kind, base_first):
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        with model.disable_adapter():
            bare = model(input_ids=ids, use_cache=False).logits
        found.append({"logits": out.logits, "bare": bare, **grads})
    assert not [w for w in recwarn if "runs its own forward" in str(w.message)]
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, ours in found[0].items():
        theirs = found[1][name]
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_a_patched_layer_with_another_adapter_runs_as_it_was():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    plain = transformers.LlamaForCausalLM(config)
    model = copy.deepcopy(plain)
    dora = peft.LoraConfig(
        target_modules=["q_proj"], use_dora=True, layers_to_transform=[1],
        init_lora_weights=False,
    )  # fmt: skip
    ids = torch.randint(0, 61, (2, 11))
    torch.manual_seed(1)
    right = peft.get_peft_model(plain, dora)(input_ids=ids, use_cache=False).logits
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, dora)
    report = patch(wrapped, policy="full")
    assert "layers.1" in str(report) and "'default' is a DoraLinearVariant" in str(report)
    with pytest.warns(UserWarning, match="layers.1 .* runs its own forward.*DoraLinearVariant"):
        ours = wrapped(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_the_example():
    """As it is and patched: the same losses, and a third of the bytes."""
    path = Path(__file__).resolve().parents[1] / "examples" / "finetune_lora.py"
    spec = importlib.util.spec_from_file_location("finetune_lora_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain, patched = module.main(["--steps", "2", "--base-steps", "1", "--rank", "2"])
    assert [plain[0], patched[0]] == ["as it is", "patched"]
    assert patched[1] == pytest.approx(plain[1], rel=1e-4)
    assert patched[2] <= 0.3 * plain[2] and patched[3] <= 0.6 * plain[3]
