"""What a caller may hand to a block, and the errors for the rest: all before any work."""

import pytest
import torch
from families import make_block

from backfuse import BlockSpec, attention, ffn, rope_cos_sin
from backfuse.blocks.inputs import prepare

SPEC = BlockSpec(32, 48, 4, 2)


def angles(tokens=10, dim=8):
    return rope_cos_sin(torch.arange(tokens)[None], dim)


X = torch.zeros(2, 10, 32)
ONE = torch.zeros(1, 10, 32)
BAD = {
    "not a tensor": ({"hidden_states": [1.0]}, TypeError, "hidden_states is"),
    "integers": ({"hidden_states": X.long()}, TypeError, "hidden_states is int64"),
    "width": ({"hidden_states": X[..., :31]}, ValueError, r"hidden_states is .*\[2, 10, 31\].*32"),
    "dims": ({"hidden_states": X[0]}, ValueError, r"\[10, 32\].*expected \[batch, seq_len, 32\]"),
    "no tokens": ({"hidden_states": X[:, :0]}, ValueError, "none of them 0"),
    "dtype": (
        {"hidden_states": X.bfloat16()},
        TypeError,
        "q_proj.weight is torch.float32.*bfloat16",
    ),
    "device": (
        {"hidden_states": X.to("meta")},
        ValueError,
        "on cpu, expected the device of hidden",
    ),
    "angles kind": ({"position_embeddings": angles()[0]}, TypeError, r"a Tensor, expected a pair"),
    "angles dim": (
        {"position_embeddings": angles(dim=6)},
        ValueError,
        r"cos.*\[1, 10, 6\].*\[2 or 1, 10, 8\]",
    ),
    "angles tokens": ({"position_embeddings": angles(9)}, ValueError, r"cos.*\[1, 9, 8\]"),
    "angles 2-D": ({"position_embeddings": tuple(a[0] for a in angles())}, ValueError, "cos of"),
    "angles grad": (
        {"position_embeddings": tuple(a.requires_grad_() for a in angles())},
        ValueError,
        "gradient",
    ),
    "mask kind": (
        {"attention_mask": torch.ones(2, 10).long()},
        TypeError,
        "attention_mask is int64",
    ),
    "mask shape": (
        {"attention_mask": torch.ones(2, 10)},
        ValueError,
        r"attention_mask is .*\[2 or 1, 4 or 1, 10, 10\]",
    ),
    "mask heads": ({"attention_mask": torch.ones(2, 2, 10, 10)}, ValueError, "attention_mask is"),
    "mask and packed": (
        {"attention_mask": torch.ones(1, 1, 10, 10), "cu_seqlens": torch.tensor([0, 10])},
        ValueError,
        "both given",
    ),
    "offsets kind": ({"hidden_states": ONE, "cu_seqlens": [0, 10]}, TypeError, "cu_seqlens is"),
    "offsets dtype": (
        {"hidden_states": ONE, "cu_seqlens": torch.tensor([0.0, 10])},
        TypeError,
        "cu_seqlens is float32",
    ),
    "offsets end": (
        {"hidden_states": ONE, "cu_seqlens": torch.tensor([0, 9])},
        ValueError,
        r"\[0, 9\].*number of tokens \(10\)",
    ),
    "offsets start": (
        {"hidden_states": ONE, "cu_seqlens": torch.tensor([1, 10])},
        ValueError,
        r"\[1, 10\]",
    ),
    "offsets fall": (
        {"hidden_states": ONE, "cu_seqlens": torch.tensor([0, 7, 3, 10])},
        ValueError,
        "rise from 0",
    ),
    "offsets none": (
        {"hidden_states": ONE, "cu_seqlens": torch.tensor([], dtype=torch.int32)},
        ValueError,
        r"\[\]",
    ),
    "longest alone": ({"max_seqlen": 10}, ValueError, "max_seqlen is 10.*together with cu_seqlens"),
    "longest low": (
        {"hidden_states": ONE, "cu_seqlens": torch.tensor([0, 3, 10]), "max_seqlen": 6},
        ValueError,
        r"max_seqlen is 6, expected at least the longest sequence \(7\)",
    ),
    "longest kind": (
        {"hidden_states": ONE, "cu_seqlens": torch.tensor([0, 10]), "max_seqlen": -3},
        ValueError,
        "max_seqlen is -3",
    ),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 10])}, ValueError, "batch of 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name, monkeypatch):
    arguments, error, message = BAD[name]
    block = make_block(SPEC)
    # nothing may have been computed when the error comes
    monkeypatch.setattr("backfuse.blocks.run.RunJob.forward", None)
    with pytest.raises(error, match=message):
        block(**{"hidden_states": X, **arguments})


@pytest.mark.parametrize("chunk_size", [0, -64, 100, 64.0, "64"])
def test_bad_chunk_size(chunk_size):
    with pytest.raises(ValueError, match="chunk_size is"):
        make_block(SPEC, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="chunk_size is"):
        ffn(X, dict(make_block(SPEC).named_parameters()), SPEC, chunk_size=chunk_size)


@pytest.mark.parametrize("half", [ffn, attention])
def test_bad_weights_of_a_half(half):
    weights = dict(make_block(SPEC).named_parameters())
    name = "mlp.up_proj.weight" if half is ffn else "self_attn.k_proj.weight"
    without = {n: w for n, w in weights.items() if n != name}
    with pytest.raises(ValueError, match=f"weights lack '{name}'"):
        half(X, without, SPEC)
    with pytest.raises(ValueError, match=f"{name} is .*expected the shape"):
        half(X, {**weights, name: weights[name][:-1]}, SPEC)
    with pytest.raises(TypeError, match=f"{name} is torch.float64"):
        half(X, {**weights, name: weights[name].double()}, SPEC)
    with pytest.raises(ValueError, match="did you mean 'full'"):
        half(X, weights, SPEC, "fulll")


@pytest.mark.parametrize("half", [ffn, attention])
def test_weights_that_are_no_mapping(half):
    with pytest.raises(TypeError, match="weights is None, expected a mapping"):
        half(X, None, SPEC)


def test_a_spec_that_is_none():
    with pytest.raises(TypeError, match="spec is None, expected a BlockSpec"):
        prepare(None, X)


def test_any_dtype_under_autocast():
    block = make_block(SPEC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(X.bfloat16()).dtype == torch.bfloat16
        assert block(X).dtype == torch.float32
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert make_block(SPEC, dtype=dtype)(X).dtype == torch.float32


NORM, PROJECTION = "post_attention_layernorm.weight", "mlp.up_proj.weight"
BAD_DTYPES = [
    # hidden_states, autocast, which weight, its dtype, what was expected
    (torch.float32, False, NORM, torch.int64, "torch.float32, with"),
    (torch.float32, False, NORM, torch.float64, "torch.float32, with"),
    (torch.float32, False, NORM, torch.bfloat16, "torch.float32, with"),
    (torch.bfloat16, False, NORM, torch.float16, "torch.bfloat16 or torch.float32, with"),
    (torch.bfloat16, False, NORM, torch.float64, "torch.bfloat16 or torch.float32, with"),
    (torch.float64, False, NORM, torch.bfloat16, "torch.float64 or torch.float32, with"),
    (torch.float32, False, PROJECTION, torch.int64, "torch.float32, the dtype of hidden_states"),
    (torch.float64, False, PROJECTION, torch.float32, "torch.float64, the dtype of hidden_states"),
    (torch.float32, True, NORM, torch.int64, ".*torch.float16, under autocast"),
    (torch.float32, True, NORM, torch.float64, ".*torch.float16, under autocast"),
    (torch.float32, True, PROJECTION, torch.int64, ".*torch.float16, under autocast"),
    (torch.bfloat16, True, PROJECTION, torch.float64, ".*torch.float16, under autocast"),
    (torch.float64, True, PROJECTION, torch.float32, "torch.float64, the dtype of hidden_states"),
]


@pytest.mark.parametrize("dtype, autocast, name, wrong, expected", BAD_DTYPES)
def test_dtypes_of_weights(dtype, autocast, name, wrong, expected):
    weights = {n: w.detach() for n, w in make_block(SPEC, dtype=dtype).named_parameters()}
    weights[name] = weights[name].to(wrong)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with pytest.raises(TypeError, match=f"^{name} is {wrong}, expected {expected}"):
            ffn(X.to(dtype), weights, SPEC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_norms_may_stay_in_fp32(dtype):
    weights = dict(make_block(SPEC, dtype=dtype).named_parameters())
    norms = {n: w.detach().float() for n, w in weights.items() if "norm" in n}
    assert ffn(X.to(dtype), {**weights, **norms}, SPEC).dtype == dtype
