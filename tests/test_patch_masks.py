"""Models whose attention is FlashAttention or flex_attention: in other words, what is seen.

Neither kernel runs on a CPU. The models' own numbers come from plain PyTorch under FlashAttention's
name, one sequence at a time; those of flex_attention from the same model with sdpa.
"""

import pytest
import torch
from tiny_models import HALF, batch, make_model, step
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from backfuse import patch
from backfuse.blocks.adapters import patched

FLASH = ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2")


def flash(module, q, k, v, attention_mask, scaling=None, sliding_window=None, softcap=None,
          is_causal=None, position_ids=None, cu_seq_lens_q=None, dropout=0.0, **_):  # fmt: skip
    """FlashAttention as transformers calls it: of each sequence, tokens that are no padding."""
    causal = module.is_causal if is_causal is None else is_causal
    if attention_mask is not None:
        rows = [(b, mask.nonzero().flatten()) for b, mask in enumerate(attention_mask)]
    elif cu_seq_lens_q is not None or (len(q) == 1 and position_ids is not None):
        starts = cu_seq_lens_q
        if starts is None:
            first = (position_ids[0] == position_ids.min()).nonzero().flatten().tolist()
            starts = torch.tensor([*first, q.shape[2]])
        pairs = zip(starts.tolist(), starts[1:].tolist(), strict=False)
        rows = [(0, torch.arange(a, b)) for a, b in pairs]
    else:
        rows = [(b, torch.arange(q.shape[2])) for b in range(len(q))]
    out = torch.zeros(len(q), q.shape[2], q.shape[1], v.shape[-1])
    for b, index in rows:
        heads = (t[b, :, index].double() for t in (q, k, v))
        one, keys, values = heads
        keys, values = (t.repeat_interleave(len(one) // len(t), 0) for t in (keys, values))
        scores = one @ keys.mT * scaling
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        i = torch.arange(len(index))
        far = (i[:, None] - i).abs() >= (sliding_window or 10**9)
        off = (far | (i[:, None] < i)) if causal else far
        shares = scores.masked_fill(off, float("-inf")).softmax(-1)
        out = out.index_put((torch.tensor(b), index), (shares @ values).transpose(0, 1).float())
    return out, None


@pytest.fixture
def plain_flash(monkeypatch):
    for name in FLASH:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash)
        known = ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, known)


@pytest.fixture(autouse=True)
def never_own(monkeypatch):
    def refuse(layer, original, state, reason, args, kwargs):
        raise AssertionError(f"{state.name} runs its own forward: {reason}")

    monkeypatch.setattr(patched, "_own_forward", refuse)


def padded(inputs, side):
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, slice(-9, None) if side == "right" else slice(9)] = 0
    return {**inputs, "attention_mask": mask}


def packed(inputs, lengths=(5, 1, 19, 15)):
    """One row of sequences that begin where positions begin again."""
    ids = inputs["input_ids"][:1]
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


def offsets(inputs, lengths=(5, 1, 19, 15)):
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    told = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
    longest = dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return {**packed(inputs, lengths), **told, **longest, "seq_idx": index[None]}


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    scale = max(value.abs().max() for name, value in theirs.items() if name != "logits")
    for name, value in theirs.items():
        size = value.abs().max() if name in ("logits", "loss") else scale
        assert (ours[name] - value).abs().max() <= 1e-5 * size, name


@pytest.mark.parametrize(
    ("family", "used", "change"),
    [
        ("llama", FLASH[0], dict),
        ("llama", FLASH[1], lambda inputs: padded(inputs, "left")),
        ("llama", FLASH[2], lambda inputs: padded(inputs, "right")),
        ("llama", FLASH[0], packed),
        ("llama", FLASH[0], offsets),
        ("llama", FLASH[0], lambda inputs: {"input_ids": inputs["input_ids"][:1]}),
        ("mistral", FLASH[0], dict),  # its window is in no attribute of the layer
        ("mistral", FLASH[0], offsets),
        ("gemma2", FLASH[0], lambda inputs: padded(inputs, "left")),
        ("mixtral", FLASH[0], packed),
        ("bert", FLASH[0], lambda inputs: padded(inputs, "right")),
        ("vit", FLASH[0], dict),
    ],
    ids=range(12),
)
def test_a_step_with_flash_attention(family, used, change, plain_flash):
    inputs = change(batch(family))
    model = make_model(family)
    model.config._attn_implementation = used
    expected = step(model, inputs)
    report = patch(model, "lean")
    assert not report.skipped and {row.reason for row in report} == {None}
    assert bool(report.half) == (family in HALF)
    assert ALL_ATTENTION_FUNCTIONS[used] is flash
    close(step(model, inputs), expected)


@pytest.mark.parametrize("padding", [None, "left"])
def test_a_step_with_flex_attention(padding, monkeypatch):
    made = masking_utils.create_block_mask  # compiled, it takes half a minute
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda **given: made(**{**given, "_compile": False})
    )
    inputs = batch("gemma3_text")
    inputs = inputs if padding is None else padded(inputs, padding)
    model = make_model("gemma3_text")
    expected = step(model, inputs)
    model.config._attn_implementation = "flex_attention"
    patch(model, "selective")
    found = step(model, inputs)
    if padding:  # a token that is padding is no one's concern
        for result in (found, expected):
            result["logits"] = result["logits"][inputs["attention_mask"].bool()]
    close(found, expected)


def test_positions_of_a_batch_of_one_are_read_once(plain_flash, monkeypatch):
    model = make_model("llama")
    model.config._attn_implementation = FLASH[0]
    patch(model)
    inputs = packed(batch("llama"))
    calls = []
    minimum = torch.Tensor.min
    monkeypatch.setattr(torch.Tensor, "min", lambda *a, **k: calls.append(1) or minimum(*a, **k))
    model(**inputs)
    assert len(calls) == 1
    inputs["position_ids"] += 1  # in place: the same sequences
    model(**inputs)
    assert len(calls) == 2
    version, notes = inputs["position_ids"]._backfuse_packed  # of the tensor as it is, alone
    assert version == inputs["position_ids"]._version and len(notes) == 1


@pytest.mark.parametrize(
    ("family", "used", "change"),
    [
        ("mistral", "sdpa", lambda inputs: padded(inputs, "left")),
        ("mistral", "eager", dict),
        ("llama", FLASH[0], lambda inputs: padded(inputs, "left")),
        ("llama", FLASH[0], packed),
        ("bert", "sdpa", lambda inputs: padded(inputs, "right")),
    ],
)
def test_inference_mode(family, used, change, plain_flash):
    """Whose tensors do not say whether they changed."""
    inputs = change(batch(family))
    if family != "bert":
        inputs["use_cache"] = False
    model = make_model(family).eval()
    model.config._attn_implementation = used
    with torch.inference_mode():
        expected = model(**inputs)[0]
        patch(model, "lean")
        found = model(**inputs)[0]
    valid = inputs.get("attention_mask", torch.ones(found.shape[:2])).bool()
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", ["sdpa", "eager"])
def test_a_boolean_mask_of_all_tokens(used, monkeypatch):
    """transformers' eager attention adds it to the scores."""
    model = make_model("llama")
    model.config._attn_implementation = used
    seen = torch.ones(40, 40, dtype=torch.bool).tril()
    seen[:, :4] = True
    inputs = {**batch("llama"), "attention_mask": seen[None, None]}
    expected = step(model, inputs)
    patch(model)
    if used == "eager":
        with pytest.raises(AssertionError, match="boolean, which eager attention adds"):
            model(**inputs)
    else:
        close(step(model, inputs), expected)


def test_offsets_that_are_nonsense_are_refused(plain_flash):
    model = make_model("llama")
    model.config._attn_implementation = FLASH[0]
    patch(model)
    inputs = offsets(batch("llama"))
    for change, error in (
        ({"cu_seq_lens_k": torch.tensor([0, 40], dtype=torch.int32)}, "cu_seq_lens_k unlike"),
        ({"input_ids": batch("llama")["input_ids"]}, "no packed one"),
        ({"position_ids": torch.arange(40, 0, -1)[None], "cu_seq_lens_q": None}, "no packed seq"),
    ):
        with pytest.raises(AssertionError, match=f"runs its own forward: .*{error}"):
            model(**{**inputs, **change})


def test_an_attention_that_nobody_knows_is_left_alone():
    model = make_model("llama")
    model.config._attn_implementation = "somebodys/attention"
    with pytest.raises(ValueError, match="its attention is 'somebodys/attention', expected 'sdpa'"):
        patch(model)
