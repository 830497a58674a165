"""kernels/cores: every attention core against fp64, and blocks through each of them.

The libraries' kernels need a GPU. Without one stand-ins check how they are called (`stand_ins.py`),
so that blocks run through each core; with one the same tests run on the kernels themselves.
"""

from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from families import FAMILIES, POLICIES, held_bytes, make_block, make_input, results, same_bits
from stand_ins import CORES, bind, forget, install
from test_attention import check

from backfuse import kept_bytes
from backfuse.bench.tune_attention import determinism
from backfuse.kernels import fused
from backfuse.kernels.cores import abilities
from backfuse.kernels.cores.abilities import ABILITIES, obstacle
from backfuse.kernels.cores.abilities import same_bits as gives_same_bits
from backfuse.kernels.cores.choose import PYTORCHS, load
from backfuse.kernels.cores.prototypes import FA3, FA4
from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.explicit_attention import AttentionMask, explicit_forward

CUDA = torch.device("cuda")
ASKED = AttentionRequest(AttentionMask(), torch.bfloat16, CUDA, 1024, 128)

MASKS = {
    "causal": AttentionMask(scale=0.3),
    "full": AttentionMask(causal=False, scale=0.3),
    "window": AttentionMask(window=9, scale=0.3),
    "window-full": AttentionMask(window=9, causal=False, scale=0.3),
}
BOUNDS = [0, 5, 5, 39, 40, 53]


@pytest.fixture
def stand_in(monkeypatch):
    """Installs stand-ins for the cores it is called with."""
    yield lambda *cores: install(monkeypatch, *cores)
    forget()


def heads(batch, tokens, q_heads, kv_heads, dim, dtype, device="cpu"):
    """q, k and v side by side in one buffer, as a block has them."""
    qkv = torch.randn(batch, tokens, q_heads + 2 * kv_heads, dim).to(dtype).to(device)
    return qkv.split([q_heads, kv_heads, kv_heads], 2)


#: Every core that stands for a library with every mask it can do, packed or not.
CASES = [
    (core, name, packed)
    for core in CORES
    for name, mask in MASKS.items()
    for packed in (False, True)
    if replace(ASKED, mask=mask, packed=packed).extras().keys() <= ABILITIES[core].extras
]


@pytest.mark.parametrize("core, name, packed", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_called_as_its_library_takes_it(core, name, packed, dtype, stand_in, poisoned_empty):
    """Within the rule for a kernel, though a stand-in computes: O, LSE and gradients land right."""
    stand_in(core)
    q, k, v = heads(1 if packed else 2, 53, 6, 2, 8, dtype)
    kernel = load(core)
    asked = AttentionRequest(MASKS[name], dtype, q.device, 53, 8, packed=packed)
    assert not kernel.needs_delta(asked)
    before = [x.clone() for x in (q, k, v)]
    options = {} if not packed else {"cu_seqlens": torch.tensor(BOUNDS)}  # int64
    out, lse = kernel.attention_forward(q, k, v, MASKS[name], **options)
    expected = explicit_forward(q, k, v, MASKS[name], **options)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert out.is_contiguous() and lse.shape == (q.shape[0], 6, 53) and lse.dtype == torch.float32
    *grads, dsinks = kernel.attention_backward(out, q, k, v, out, lse, MASKS[name], **options)
    assert dsinks is None and [g.shape for g in grads] == [x.shape for x in (q, k, v)]
    assert all(g.is_contiguous() for g in grads)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))
    check(
        q, k, v, MASKS[name], bounds=BOUNDS if packed else None,
        forward=kernel.attention_forward, backward=kernel.attention_backward,
    )  # fmt: skip


def test_the_caller_may_know_the_longest_sequence(stand_in, monkeypatch):
    stand_in("flash", "fa3", "fa4")
    q, k, v = heads(1, 53, 2, 1, 8, torch.bfloat16)
    mask = replace(MASKS["causal"], max_seqlen=34)
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    for core in ("flash", "fa3", "fa4"):
        kernel = load(core)
        expected = explicit_forward(q, k, v, mask, cu_seqlens=cu_seqlens)
        out, lse = kernel.attention_forward(q, k, v, mask, cu_seqlens=cu_seqlens)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_offsets_of_any_stride(stand_in):
    stand_in("flash", "fa3", "fa4")
    q, k, v = heads(1, 60, 2, 1, 8, torch.bfloat16)
    bounds = torch.tensor([0, 7, 20, 7, 60, 7], dtype=torch.int32)[::2]
    for core in ("flash", "fa3", "fa4"):
        out, _ = load(core).attention_forward(q, k, v, AttentionMask(), cu_seqlens=bounds)
        expected, _ = explicit_forward(q, k, v, AttentionMask(), cu_seqlens=bounds)
        assert torch.equal(out, expected)


def test_the_check_of_a_schema_sees_mistakes():
    operator = torch.ops.aten._flash_attention_forward
    x = torch.zeros(1)
    good = (x, x, x, None, None, 1, 1, 0.0, True, False)
    assert bind(operator, good, {"scale": 1.0}).max_q == 1
    for args, kwargs in (
        (good[:-1], {}),
        ((*good, False), {}),
        ((*good[:8], 1, False), {}),
        ((*good[:5], 1.0, *good[6:]), {}),
        (good, {"window": 3}),
        (good, {"max_q": 1}),
    ):
        with pytest.raises(AssertionError):
            bind(operator, args, kwargs)


#: How a block is asked for each core, and what has to be out of the way.
IMPLS = {"flash": "sdpa", "cudnn": "sdpa", "fa3": "fa3", "fa4": "fa4"}


def block_through(core, monkeypatch, spec=FAMILIES["llama"], **options):
    if core == "cudnn":
        monkeypatch.setitem(
            abilities.LIMITS, "flash", lambda request, found: "is put aside for this test"
        )
    block = make_block(spec, dtype=torch.bfloat16, **options).to(DEVICE)
    block.impl = IMPLS[core]
    monkeypatch.setitem(PYTORCHS, "cpu", PYTORCHS["cuda"])  # as on a GPU
    return block


def to_device(*tensors):
    return [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize(
    "core, packed", [(core, packed) for core, name, packed in CASES if name == "causal"]
)
def test_blocks_through_every_core(core, packed, stand_in, monkeypatch, poisoned_empty):
    """As good as our own kernels, the same bits and the same bytes under every policy."""
    stand_in(core)
    spec = FAMILIES["llama"].replace(head_dim=8)
    x, grad = to_device(*make_input(spec, batch_size=1, seq_len=20, dtype=torch.bfloat16))
    inputs = {}
    if packed:
        inputs["cu_seqlens"] = torch.tensor([0, 7, 7, 20], dtype=torch.int32, device=DEVICE)
    block = block_through(core, monkeypatch, spec)
    for name in ("attention_forward", "attention_backward"):  # ours are not called
        monkeypatch.setattr(fused, name, None)
    ours = results(block, x, grad, **inputs)
    exact = results(make_block(spec, dtype=torch.bfloat16).double().to(DEVICE),
                    x.detach().double().requires_grad_(), grad.double(), **inputs)  # fmt: skip
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).norm() <= 8 * torch.finfo(torch.bfloat16).eps * b.norm()
    for policy in ({"qkv": "recompute"}, "lean", "full"):
        block.policy = policy
        assert same_bits(results(block, x, grad, **inputs), ours), policy
        held, _ = held_bytes(lambda: block(x, **inputs), exclude=[*block.parameters()])
        predicted = kept_bytes(spec, policy, batch_size=1, seq_len=20, dtype=torch.bfloat16)
        side = inputs["cu_seqlens"].numel() * 4 if packed else 0
        assert held == sum(predicted.values()) + side, policy


def test_nothing_is_registered(stand_in):
    stand_in("fa3", "fa4")
    assert FA3.missing is None and FA4.missing is None
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    assert current() is None


def test_prototypes_that_changed_or_cannot_be_loaded(stand_in, monkeypatch):
    stand_in("fa3", "fa4")
    monkeypatch.setattr("torch.nn.attention._fa3._fa3_run_backward", lambda grad_out: None)
    forget()
    assert "takes no cu_seq_k, cu_seq_q, deterministic" in FA3.missing
    monkeypatch.setattr("torch.nn.attention._fa4._fa4_run_forward", lambda **given: None)
    asked = replace(ASKED, device=torch.device(DEVICE))
    assert "FlashAttention 4 takes no cu_seq_k" in obstacle("fa4", asked)
    forget()
    monkeypatch.delattr("torch.nn.attention._fa3._fa3_run_backward")
    assert "FlashAttention 3 cannot be loaded: module 'torch" in obstacle("fa3", asked)
    with pytest.raises(RuntimeError, match="fa3 cannot be loaded"):
        FA3.attention_forward(*heads(1, 4, 2, 1, 8, torch.bfloat16), AttentionMask())


def test_a_version_without_windows_is_not_asked_for_them(stand_in, monkeypatch):
    stand_in("fa4")
    plain = torch.nn.attention._fa4._fa4_run_backward

    def older(
        grad_out, query, key, value, out, logsumexp, cu_seq_q, cu_seq_k, scale, is_causal,
        deterministic=False,
    ):  # fmt: skip
        return plain(
            grad_out, query, key, value, out, logsumexp, cu_seq_q, cu_seq_k, scale, is_causal,
            None, None, deterministic,
        )  # fmt: skip

    def without_conversion(query, key, value, cu_seq_q, cu_seq_k, scale, is_causal, seqused_k,
                           window_size_left, window_size_right):  # fmt: skip
        assert window_size_left is window_size_right is None  # -1 would go on to the kernel
        return explicit_forward(query, key, value, AttentionMask(causal=is_causal, scale=scale))

    monkeypatch.setattr("torch.nn.attention._fa4._fa4_run_backward", older)
    monkeypatch.setattr("torch.nn.attention._fa4._fa4_run_forward", without_conversion)
    asked = replace(ASKED, device=torch.device(DEVICE))
    assert obstacle("fa4", asked) is None
    assert "no sliding window in this PyTorch" in obstacle(
        "fa4", replace(asked, mask=MASKS["window"])
    )
    q, k, v = heads(1, 20, 2, 1, 8, torch.bfloat16)
    check(q, k, v, MASKS["causal"], forward=FA4.attention_forward, backward=FA4.attention_backward)


def here(core):
    """The core's obstacle on this machine's GPU, whatever the mask; None without one."""
    if not torch.cuda.is_available():
        return None
    return obstacle(core, replace(ASKED, device=torch.device("cuda", torch.cuda.current_device())))


@pytest.mark.gpu
@pytest.mark.parametrize("core, name, packed", [case for case in CASES if here(case[0]) is None])
@pytest.mark.parametrize("dim", [64, 128])
def test_as_good_as_pytorch_on_a_gpu(core, name, packed, dim):
    q, k, v = heads(1 if packed else 2, 333, 6, 2, dim, torch.bfloat16, "cuda")
    bounds = [0, 5, 5, 139, 140, 333] if packed else None
    kernel, mask = load(core), replace(MASKS[name], scale=dim**-0.5)
    with torch.device("cuda"):  # where `check` makes its masks
        check(
            q, k, v, mask, bounds=bounds,
            forward=kernel.attention_forward, backward=kernel.attention_backward,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("core", [core for core in CORES if here(core) is None])
def test_policies_on_a_gpu(core, monkeypatch):
    """The same bits wherever the core gives the same bits."""
    spec = FAMILIES["llama"].replace(head_dim=64)
    x, grad = to_device(*make_input(spec, batch_size=2, seq_len=300, dtype=torch.bfloat16))
    block = block_through(core, monkeypatch, spec)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with determinism(core == "flash"):
        expected = results(block, x, grad)
        for policy in [*POLICIES[1::4], "full"]:
            block.policy = policy
            ours = results(block, x, grad)
            assert torch.equal(ours[0], expected[0]), policy
            assert not gives_same_bits(core) or same_bits(ours, expected), policy
