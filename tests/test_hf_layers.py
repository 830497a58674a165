"""Blocks with a Hugging Face layer's weights do what that layer does, in every precision."""

from contextlib import nullcontext

import pytest
import torch
from conftest import DEVICE
from families import assert_as_good_as, error
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.gpt_oss import modeling_gpt_oss

from backfuse import BlockSpec, TransformerBlock, attention, rope_cos_sin

NOTHING = nullcontext()
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
TOKENS = {"vit": 37, "dinov2": 37, "deit": 38}  # 36 patches and one or two
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPECIAL = {
    "bert": NO_DROPOUT,
    "roberta": NO_DROPOUT,
    "vit": {"image_size": 48, "patch_size": 8},
    "dinov2": {"image_size": 48, "patch_size": 8, "mlp_ratio": 2},
    "deit": {"image_size": 48, "patch_size": 8},
    "gpt_neox": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "granite": {"residual_multiplier": 0.22, "attention_multiplier": 0.3},
    "gpt2": {
        "n_embd": 48,
        "n_head": 6,
        "n_layer": 2,
        "vocab_size": 64,
        "n_positions": 128,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 20},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3": {"head_dim": 12},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 11, "head_dim": 8},
    "phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"use_bias": True, "sliding_window": 12},
}
FAMILIES = [
    "bert", "dinov2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama",
    "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2", "vit",
]  # fmt: skip
BERT = {
    **{f"attention.self.{name}": f"self_attn.{name[0]}_proj" for name in ("query", "key", "value")},
    "attention.output.dense": "self_attn.o_proj",
    "attention.output.LayerNorm": "post_attention_layernorm",
    "intermediate.dense": "mlp.up_proj", "output.dense": "mlp.down_proj",
    "output.LayerNorm": "post_feedforward_layernorm",
}  # fmt: skip
VIT = {
    **{f"attention.{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"},
    "layernorm_before": "input_layernorm", "layernorm_after": "post_attention_layernorm",
    "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj",
}  # fmt: skip
DINOV2 = {**VIT, "norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
RENAMED = {
    "dinov2": DINOV2,
    "bert": BERT, "roberta": BERT, "vit": VIT, "deit": VIT,
    "gpt_neox": {
        "attention.query_key_value": "self_attn.qkv_proj", "attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    "starcoder2": {"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
    "gpt2": {
        "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
        "attn.c_attn": "self_attn.qkv_proj",
        "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    },
}  # fmt: skip


def make_model(family):
    """A random tiny model in fp32, attention as plain PyTorch operations."""
    torch.manual_seed(0)
    sizes = {} if family == "gpt2" else SIZES
    if family == "dinov2":
        sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    if family in RENAMED and family != "starcoder2":  # as many keys as queries
        sizes = {name: size for name, size in sizes.items() if name != "num_key_value_heads"}
    config = AutoConfig.for_model(family, **{**sizes, **SPECIAL.get(family, {})})
    kind = AutoModel if RENAMED.get(family) in (BERT, VIT, DINOV2) else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_grad(family):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, TOKENS.get(family, 40), 48, generator=generator)


def weights_of(family, layer):
    """The layer's own weights by a block's names: no copies, no views."""
    found = {}
    for name, parameter in layer.named_parameters():
        path, _, kind = name.rpartition(".")
        found[f"{RENAMED.get(family, {}).get(path, path)}.{kind}"] = parameter
    return found


def capture(model, index, dtype):
    """What the model hands to one layer, and the gradient that comes back to its output."""
    model = model.to(dtype)
    seen = {}
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    torch.manual_seed(1)
    given = {"input_ids": torch.randint(0, 64, (2, 40)), "use_cache": False}
    if size := getattr(model.config, "image_size", None):
        given = {"pixel_values": torch.randn(2, 3, size, size, dtype=dtype)}

    def before(module, args, kwargs):
        seen["args"], seen["kwargs"] = args[1:], kwargs
        x = args[0] if args else kwargs["hidden_states"]
        seen["x"] = x.detach().requires_grad_()
        if args:
            return (seen["x"], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": seen["x"]}

    def after(module, args, kwargs, out):
        seen["y"] = out[0] if isinstance(out, tuple) else out

    hooks = [
        layers[index].register_forward_pre_hook(before, with_kwargs=True),
        layers[index].register_forward_hook(after, with_kwargs=True),
    ]
    model(**given)
    for hook in hooks:
        hook.remove()
    return seen, layers[index]


def theirs(family, index, dtype, grad):
    seen, layer = capture(make_model(family), index, dtype)
    layer.zero_grad()
    gradients = torch.autograd.grad(seen["y"], [seen["x"], *layer.parameters()], grad.to(dtype))
    for parameter, gradient in zip(layer.parameters(), gradients[1:], strict=True):
        parameter.grad = gradient
    named = {n: p.grad for n, p in layer.named_parameters()}
    return seen, layer, {"y": seen["y"].detach(), "x": gradients[0], **named}


def exactly(value):
    """The same value in fp64; what masks in a low precision masks in fp64."""
    if isinstance(value, tuple | list):
        return tuple(exactly(part) for part in value)
    if isinstance(value, dict):
        return {key: exactly(part) for key, part in value.items()}
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    masked = value <= torch.finfo(value.dtype).min
    return value.double().masked_fill(masked, torch.finfo(torch.float64).min)


def by_block_name(family, values):
    """Output, gradient of x and the parameters' gradients, by a block's names."""

    class Shell:
        def named_parameters(self):
            return [(n, v) for n, v in values.items() if n not in ("y", "x")]

    return {"y": values["y"], "x": values["x"], **weights_of(family, Shell())}


def run_layer(family, layer, seen, grad, convert=lambda value: value, context=NOTHING):
    """Hugging Face's layer on what it was handed, in the dtype that `convert` gives.

    Its forward pass runs in `context`.
    """
    x = convert(seen["x"].detach()).requires_grad_()
    kwargs = {key: convert(v) for key, v in seen["kwargs"].items() if key != "hidden_states"}
    with context:
        y = layer(x, *convert(seen["args"]), **kwargs)
    y = y[0] if isinstance(y, tuple) else y
    layer.zero_grad()
    y.backward(grad.to(y.dtype))
    gradients = {n: p.grad.clone() for n, p in layer.named_parameters()}
    return by_block_name(family, {"y": y.detach(), "x": x.grad, **gradients})


def run_block(family, layer, seen, grad, spec, policy, context=NOTHING):
    """A block with the layer's weights, in their dtype, on what the layer was handed."""
    x = seen["x"].detach().clone().requires_grad_()
    block = TransformerBlock(spec, policy, dtype=x.dtype, chunk_size=64)
    block.load_state_dict({n: w.detach() for n, w in weights_of(family, layer).items()})
    angles = {"position_embeddings": seen["kwargs"]["position_embeddings"]} if spec.rope else {}
    with context:
        y = block(x, **angles)
    y.backward(grad.to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in block.named_parameters()}}


def assert_close_to(ours, plain, exact, dtype, slack):
    """Each of our results is as good as the layer's own, up to `slack` roundings."""
    assert ours.keys() == plain.keys()
    eps = torch.finfo(dtype).eps
    # the reference is the same computation: its low-precision error is small
    assert error(plain["y"], exact["y"]) <= 40 * eps * exact["y"].abs().max()
    for name, value in ours.items():
        # The gradient of k's bias is exactly 0 without RoPE (softmax does not see a shift): what
        # is left is rounding, of the size of the weight's gradient.
        scale = float(exact[name.replace("bias", "weight")].abs().max())
        assert_as_good_as(name, value, plain[name], exact[name], slack * eps, scale)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", ["keep", "full"])
def test_layer(family, index, dtype, policy):
    grad = make_grad(family)
    # the same input in both precisions: the low one's, exactly
    low, layer, plain = theirs(family, index, dtype, grad)
    spec = BlockSpec.from_config(make_model(family).config, index)
    ours = run_block(family, layer, low, grad, spec, policy)
    # Hugging Face's own layer in fp64, on the same numbers
    exact = run_layer(family, layer.double(), low, grad.to(dtype), exactly)
    assert_close_to(ours, by_block_name(family, plain), exact, dtype, 4)


@pytest.mark.parametrize("family", ["roberta", "deit"])
def test_layers_that_are_built_as_those(family):
    test_layer(family, 0, torch.float32, "lean")


def test_dinov2_with_a_gate(monkeypatch):
    monkeypatch.setitem(SPECIAL, "dinov2", {**SPECIAL["dinov2"], "use_swiglu_ffn": True})
    test_layer("dinov2", 0, torch.float32, "full")


def test_gpt_neox_with_one_half_after_the_other():
    config = make_model("gpt_neox").config
    config.use_parallel_residual = False
    assert BlockSpec.from_config(config) == BlockSpec.from_config(
        make_model("gpt_neox").config
    ).replace(parallel_residual=False)


def test_an_encoder_as_a_decoder_is_causal():
    config = make_model("bert").config
    config.is_decoder = True
    assert BlockSpec.from_config(config).causal
    config.add_cross_attention = True
    with pytest.raises(ValueError, match="add_cross_attention is True"):
        BlockSpec.from_config(config)


@pytest.mark.parametrize("policy", ["keep", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorchs_encoder_layer(policy, dtype):
    """`torch.nn.TransformerEncoderLayer`, its norms after the residual."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        48, 6, 80, dropout=0.0, activation="gelu", batch_first=True, dtype=torch.float64
    )
    names = {
        "self_attn.in_proj_weight": "self_attn.qkv_proj.weight",
        "self_attn.in_proj_bias": "self_attn.qkv_proj.bias",
        "self_attn.out_proj": "self_attn.o_proj", "linear1": "mlp.up_proj",
        "linear2": "mlp.down_proj", "norm1": "post_attention_layernorm",
        "norm2": "post_feedforward_layernorm",
    }  # fmt: skip
    spec = BlockSpec(
        48, 80, 6, norm="layernorm", norm_eps=1e-5, norm_position="after_residual", rope=None,
        hidden_act="gelu", gated=False, causal=False, qkv_bias=True, o_bias=True, up_bias=True,
        down_bias=True, stacked_qkv=True,
    )  # fmt: skip

    def renamed(name):
        path, _, kind = name.rpartition(".")
        return names.get(name) or f"{names[path]}.{kind}"

    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    layer.to(dtype)
    x, grad = torch.randn(2, 2, 40, 48).to(dtype)

    def run(module, dtype):
        module.zero_grad(set_to_none=True)
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = module(leaf)
        y.backward(grad.to(dtype))
        grads = {name: p.grad for name, p in module.named_parameters()}
        return {"y": y.detach(), "x": leaf.grad, **grads}

    block = TransformerBlock(spec, policy, dtype=dtype)
    block.load_state_dict({renamed(n): p for n, p in layer.state_dict().items()})
    ours, plain = run(block, dtype), run(layer, dtype)
    exact = run(layer.double(), torch.float64)
    plain, exact = (
        {n if n in "yx" else renamed(n): v for n, v in found.items()} for found in (plain, exact)
    )
    assert_close_to(ours, plain, exact, dtype, 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", ["keep", "full"])
def test_layer_under_autocast(family, index, autocast, policy):
    """Weights and x in fp32, GEMMs in a low precision; only the forward pass sees autocast."""
    grad = make_grad(family)
    model = make_model(family)
    spec = BlockSpec.from_config(model.config, index)
    seen, layer = capture(model, index, torch.float32)
    context = torch.autocast("cpu", dtype=autocast)
    plain = run_layer(family, layer, seen, grad, context=context)
    ours = run_block(family, layer, seen, grad, spec, policy, context)
    assert all(value.dtype == torch.float32 for value in ours.values())
    exact = run_layer(family, layer.double(), seen, grad, exactly)
    assert_close_to(ours, plain, exact, autocast, 1)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in RENAMED])
def test_state_dict_loads_strictly_and_saves_the_same_keys(family):
    model = make_model(family)
    layer = model.model.layers[1]
    block = TransformerBlock(BlockSpec.from_config(model.config, 1))
    block.load_state_dict(layer.state_dict())
    layer.load_state_dict(block.state_dict())
    assert block.state_dict().keys() == layer.state_dict().keys()


def test_llama_3_rope_must_be_passed():
    config = make_model("llama").config
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    spec = BlockSpec.from_config(config)
    assert spec.rope_theta is None
    with pytest.raises(ValueError, match="position_embeddings is None"):
        TransformerBlock(spec)(torch.randn(1, 4, 48))


def test_unknown_families_and_settings():
    config = make_model("llama").config
    config.model_type = "lama"
    with pytest.raises(ValueError, match="model_type is 'lama'.*did you mean 'llama'"):
        BlockSpec.from_config(config)
    for index in ("0", 1.0, None):
        with pytest.raises(TypeError, match=f"layer_idx is {index!r}, expected an integer"):
            BlockSpec.from_config(make_model("llama").config, index)
    config = make_model("gpt2").config
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx is True"):
        BlockSpec.from_config(config)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_half_of_gpt_oss(impl, window, dtype):
    """Sinks against the column of logits that transformers appends; its FFN is no block's."""
    torch.manual_seed(0)
    tokens, kind = 40, "full_attention" if window is None else "sliding_attention"
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
        sliding_window=window, layer_types=[kind], num_hidden_layers=1, attention_bias=True,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = torch.nn.Module()
    theirs.self_attn = modeling_gpt_oss.GptOssAttention(config, 0)
    theirs.input_layernorm = modeling_gpt_oss.GptOssRMSNorm(48, config.rms_norm_eps)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (2.0 if "sinks" in name else 0.3))
    spec = BlockSpec(
        48, 1, 6, 2, head_dim=8, norm_eps=config.rms_norm_eps, norm_round_first=False,
        qkv_bias=True, o_bias=True, sliding_window=window, attention_sinks=True,
    )  # fmt: skip
    theirs.to(dtype)  # the weights that every run begins with
    x, grad = torch.randn(2, 2, tokens, 48).to(dtype)
    cos, sin = rope_cos_sin(torch.arange(tokens)[None], 8)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (distance >= 0) & (distance < (window or tokens))

    def run(function, dtype, device="cpu"):
        theirs.to(device, dtype).zero_grad(set_to_none=True)
        leaf = x.to(device, dtype, copy=True).requires_grad_()
        y = function(leaf, cos.to(device, dtype), sin.to(device, dtype))
        y.backward(grad.to(device, dtype))
        return [t.clone() for t in (y, leaf.grad, *(p.grad for p in theirs.parameters()))]

    def plain(x, cos, sin):
        mask = torch.zeros(tokens, tokens, dtype=x.dtype).masked_fill(~seen, float("-inf"))
        angles = cos[..., :4], sin[..., :4]  # theirs knows one of each pair
        return x + theirs.self_attn(theirs.input_layernorm(x), angles, mask[None, None])[0]

    def half(x, cos, sin):
        weights = dict(theirs.named_parameters())
        return attention(x, weights, spec, "lean", position_embeddings=(cos, sin), impl=impl)

    exact, expected = run(plain, torch.float64), run(plain, dtype)
    ours = run(half, dtype, DEVICE if impl == "triton" else "cpu")
    names = ["output", "x", *(name for name, _ in theirs.named_parameters())]
    largest = max(e.abs().max().item() for e in exact)
    for name, a, b, c in zip(names, ours, expected, exact, strict=True):
        # a bias of k has no gradient but rounding
        scale = largest if name.endswith("k_proj.bias") else 0.0
        assert_as_good_as(name, a.cpu(), b, c, torch.finfo(dtype).eps, scale)


def test_a_whole_layer_of_gpt_oss_is_refused():
    with pytest.raises(ValueError, match="config.model_type is 'gpt_oss', expected one of"):
        BlockSpec.from_config(AutoConfig.for_model("gpt_oss"))
