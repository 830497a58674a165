"""kernels/cores: every attention core against fp64, what each can do, and which one runs.

The libraries' kernels need a GPU. Without one stand-ins check how they are called (`stand_ins.py`),
so that blocks run through each core; with one the same tests run on the kernels themselves.
"""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from families import FAMILIES, POLICIES, held_bytes, make_block, make_input, results, same_bits
from stand_ins import CORES, bind, forget, install
from test_attention import check

from backfuse import TransformerBlock, kept_bytes
from backfuse.kernels import dispatch, fused, reference, tuning
from backfuse.kernels.cores import abilities
from backfuse.kernels.cores.abilities import ABILITIES, obstacle
from backfuse.kernels.cores.abilities import same_bits as gives_same_bits
from backfuse.kernels.cores.choose import PYTORCHS, choose, load
from backfuse.kernels.cores.prototypes import FA3, FA4
from backfuse.kernels.reference.attention_request import EXTRAS, AttentionRequest
from backfuse.kernels.reference.explicit_attention import AttentionMask, explicit_forward
from backfuse.kernels.tuning import Shape, Tuning, attention_times, save, save_attention

CUDA = torch.device("cuda")
ASKED = AttentionRequest(AttentionMask(), torch.bfloat16, CUDA, 1024, 128)

MASKS = {
    "causal": AttentionMask(scale=0.3),
    "full": AttentionMask(causal=False, scale=0.3),
    "window": AttentionMask(window=9, scale=0.3),
    "window-full": AttentionMask(window=9, causal=False, scale=0.3),
}
BOUNDS = [0, 5, 5, 39, 40, 53]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKFUSE_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


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
    grads = kernel.attention_backward(out, q, k, v, out, lse, MASKS[name], **options)
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]
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


def with_mask(**changes):
    return replace(ASKED, mask=AttentionMask(**changes))


#: Core, what is asked, capability of the GPU, and what is in the way.
TABLE = [
    ("triton", replace(ASKED, sinks=True), (9, 0), "our kernels has no attention sinks (asked"),
    ("triton", replace(ASKED, dtype=torch.float64), (9, 0), "and the dtype is torch.float64"),
    ("triton", replace(ASKED, head_dim=257), (9, 0), "takes heads of at most 256 channels"),
    ("triton", replace(with_mask(window=5, softcap=2.0, dropout=0.1), bias=True), (9, 0), None),
    ("reference", replace(ASKED, dtype=torch.float64, head_dim=999), (0, 0), None),
    ("cpu", ASKED, (0, 0), "PyTorch's CPU kernel runs on cpu, and the tensors are on cuda"),
    ("flash", ASKED, (8, 0), None),
    ("flash", with_mask(window=9), (9, 0), None),
    ("flash", with_mask(softcap=50.0), (9, 0), "flash kernel has no softcap (asked for: 50.0)"),
    ("flash", with_mask(dropout=0.1), (9, 0), "flash kernel has no dropout (asked for: 0.1)"),
    ("flash", replace(ASKED, bias=True), (9, 0), "has no attention mask"),
    ("flash", replace(ASKED, sinks=True), (9, 0), "has no attention sinks"),
    ("flash", replace(ASKED, v_head_dim=64), (9, 0), "has no other head dim of v (asked for: 64)"),
    ("flash", replace(ASKED, v_head_dim=128), (9, 0), None),
    ("flash", replace(ASKED, dtype=torch.float32), (9, 0), "and the dtype is torch.float32"),
    ("flash", replace(ASKED, head_dim=100), (9, 0), "a multiple of 8, and they have 100"),
    ("flash", replace(ASKED, head_dim=264), (9, 0), "at most 256 channels"),
    ("flash", replace(ASKED, head_dim=224), (8, 9), "no backward for heads of 193 to 224"),
    ("flash", replace(ASKED, head_dim=224), (9, 0), None),
    ("flash", ASKED, (7, 5), "needs compute capability 8.0 or higher, and the GPU's is 7.5"),
    ("flash", replace(ASKED, device=torch.device("cpu")), (0, 0), "runs on cuda, and the tens"),
    ("cudnn", ASKED, (9, 0), None),
    ("cudnn", ASKED, (0, 0), "needs compute capability 8.0 or higher, and there is no such GPU"),
    ("cudnn", replace(ASKED, packed=True), (9, 0), "cuDNN kernel has no packed sequences"),
    ("cudnn", with_mask(window=9), (9, 0), "has no sliding window (asked for: 9)"),
    ("cudnn", with_mask(window=1024), (9, 0), None),  # as long as the sequence
    ("cudnn", replace(ASKED, tokens=1), (9, 0), "does not take sequences of one token"),
    ("cudnn", replace(ASKED, head_dim=256), (9, 0), None),
    ("cudnn", replace(ASKED, head_dim=256), (8, 0), "at most 128 channels on this GPU"),
    ("cudnn", replace(ASKED, head_dim=192, v_head_dim=128), (10, 0), None),
    ("cudnn", replace(ASKED, head_dim=192, v_head_dim=64), (10, 0), "at most 128 channels"),
    ("fa3", ASKED, (9, 0), None),
    ("fa3", replace(with_mask(window=9), packed=True), (9, 0), None),
    ("fa3", with_mask(softcap=2.0), (9, 0), "FlashAttention 3 has no softcap"),
    ("fa3", ASKED, (10, 0), "needs compute capability 9, and the GPU's is 10.0"),
    ("fa4", ASKED, (10, 0), None),
    ("fa4", replace(ASKED, head_dim=192), (10, 0), "FlashAttention 4 takes heads of at most 128"),
    ("fa4", with_mask(dropout=0.1), (9, 0), "FlashAttention 4 has no dropout"),
    ("fa4", ASKED, (12, 0), "needs compute capability 9 or 10, and the GPU's is 12.0"),
]


@pytest.mark.parametrize("core, asked, found, expected", TABLE)
def test_obstacles(core, asked, found, expected, monkeypatch):
    monkeypatch.setattr(abilities, "capability", lambda device: found)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(FA3, "missing", None)
    monkeypatch.setattr(FA4, "missing", None)
    said = obstacle(core, asked)
    assert said == expected if expected is None else expected in said


def test_every_extra_is_named():
    everything = replace(
        with_mask(window=5, softcap=2.0, dropout=0.1), v_head_dim=64, bias=True, packed=True,
        sinks=True,
    )  # fmt: skip
    assert everything.extras().keys() == EXTRAS
    assert ASKED.extras() == {}
    assert all(able.extras <= EXTRAS for able in ABILITIES.values())


@pytest.mark.parametrize("version, message", [(None, "has none"), (8907, "has 8907")])
def test_cudnn_that_is_missing_or_old(version, message, monkeypatch):
    monkeypatch.setattr(abilities, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: version is not None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert message in obstacle("cudnn", ASKED)


@pytest.mark.parametrize("core", ["fa3", "fa4"])
def test_packages_that_are_not_installed(core, monkeypatch):
    monkeypatch.setattr(abilities, "capability", lambda device: (9, 0))
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, None)
    forget()
    assert "cannot be loaded: " in obstacle(core, ASKED)
    forget()


@pytest.fixture
def determinism():
    """Sets PyTorch's mode: 0, 1 (warn) or 2 (error)."""
    before = torch.get_deterministic_debug_mode()
    yield torch.set_deterministic_debug_mode
    torch.set_deterministic_debug_mode(before)


def test_only_one_that_gives_the_same_bits(determinism, monkeypatch):
    for mode in (0, 1):
        determinism(mode)
        assert [core for core in ABILITIES if not gives_same_bits(core)] == ["flash", "cudnn"]
    determinism(2)
    assert [core for core in ABILITIES if not gives_same_bits(core)] == ["cudnn"]
    monkeypatch.setattr(abilities, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert "is not deterministic, and torch.use_deterministic" in obstacle("cudnn", ASKED)


@pytest.fixture
def hopper(monkeypatch):
    """Every core can run, as far as anybody can see."""
    monkeypatch.setattr(abilities, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(FA3, "missing", None)
    monkeypatch.setattr(FA4, "missing", None)


def remember(asked=ASKED, **times):
    return save_attention(asked, {name.replace("_", " "): ms for name, ms in times.items()})


def test_auto_takes_what_was_measured_fastest(hopper, determinism):
    assert choose("auto", "triton", ASKED) == "triton"
    remember(triton=3.0, fa3=2.0, fa4=2.5, flash=1.0, cudnn=0.5, flash_deterministic=1.5)
    assert choose("auto", "triton", ASKED) == "fa3"  # the faster ones differ in their last bits
    assert choose("auto", "triton", replace(ASKED, sinks=False, tokens=513)) == "fa3"
    determinism(2)
    assert choose("auto", "triton", ASKED) == "flash"
    determinism(0)
    remember(triton=1.0, fa3=2.0)
    assert choose("auto", "triton", ASKED) == "triton"
    remember(fa3=2.0)  # nothing to compare with
    assert choose("auto", "triton", ASKED) == "triton"


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 1025}, {"tokens": 512}, {"head_dim": 64}, {"dtype": torch.float16},
        {"packed": True}, {"mask": AttentionMask(causal=False)}, {"mask": AttentionMask(window=64)},
        {"v_head_dim": 64},
    ],
)  # fmt: skip
def test_records_are_of_their_class_only(change, hopper):
    remember(triton=3.0, fa3=2.0)
    assert choose("auto", "triton", ASKED) == "fa3"
    other = replace(ASKED, **change)
    if "v_head_dim" not in change:
        assert choose("auto", "triton", other) == "triton"
    remember(other, triton=3.0, fa4=1.0)
    assert attention_times(other) == {"triton": 3.0, "fa4": 1.0}
    assert attention_times(ASKED) == {"triton": 3.0, "fa3": 2.0}


def test_auto_leaves_out_what_cannot_do_it(hopper, monkeypatch):
    for asked in (with_mask(softcap=5.0), replace(ASKED, bias=True), with_mask(dropout=0.1)):
        remember(asked, triton=3.0, fa3=2.0, fa4=1.0)
        assert choose("auto", "triton", asked) == "triton"
    remember(triton=3.0, fa3=2.0, fa4=2.5)
    monkeypatch.setattr(FA3, "missing", "cannot be loaded: gone")
    assert choose("auto", "triton", ASKED) == "fa4"
    cpu = replace(ASKED, device=torch.device("cpu"))
    assert choose("auto", "reference", cpu) == "reference"


def test_nothing_is_loaded_that_was_not_measured(hopper, monkeypatch):
    def fail(*args):
        raise AssertionError("looked for")

    monkeypatch.setattr(type(FA3), "lacks", fail)
    assert choose("auto", "triton", ASKED) == "triton"


def test_sdpa_is_flash_or_cudnn(hopper, determinism):
    assert choose("sdpa", "triton", ASKED) == "flash"
    remember(flash=2.0, cudnn=1.0, flash_deterministic=4.0)
    assert choose("sdpa", "triton", ASKED) == "cudnn"
    determinism(2)
    assert choose("sdpa", "triton", ASKED) == "flash"
    determinism(0)
    assert choose("sdpa", "triton", replace(ASKED, packed=True)) == "flash"
    assert choose("sdpa", "triton", replace(ASKED, head_dim=64, v_head_dim=32)) == "cudnn"
    assert choose("sdpa", "triton", replace(ASKED, device=torch.device("cpu"))) == "cpu"
    with pytest.raises(
        ValueError,
        match="impl is 'sdpa', but PyTorch's flash kernel has no softcap .asked for: 5.0.; "
        "PyTorch's cuDNN kernel has no softcap",
    ):
        choose("sdpa", "triton", with_mask(softcap=5.0))


@pytest.mark.parametrize(
    "text",
    ['{"KEY": 3}', '{"KEY": {"fa3": "fast"}}', '{"KEY": {"fa3": NaN}}', '{"KEY": {"fa3": -1}}',
     '{"KEY": {"fa3": true}}', '{"KEY": null}', '{"KEY": {"fa3": Infinity}}'],
)  # fmt: skip
def test_a_damaged_record_is_ignored_with_a_warning(text, hopper):
    path = remember(triton=3.0, fa3=2.0)
    key = tuning.AttentionClass.of(ASKED).key(CUDA)
    path.write_text(text.replace("KEY", key))
    tuning.forget()
    with pytest.warns(UserWarning, match=r"a record in .*tuning.json is ignored"):
        assert choose("auto", "triton", ASKED) == "triton"
    remember(triton=3.0, fa3=2.0)
    assert choose("auto", "triton", ASKED) == "fa3"


def test_records_stand_beside_those_of_the_ffn(hopper):
    shape, cpu = Shape(64, 128, True, torch.float32), torch.device("cpu")
    save(shape, cpu, Tuning("fused"))
    remember(triton=3.0, fa3=2.0)
    save(replace(shape, gated=False), cpu, Tuning("split"))
    assert (
        tuning.tuning(shape, cpu).strategy == "fused" and choose("auto", "triton", ASKED) == "fa3"
    )


def test_errors_come_before_any_work(monkeypatch):
    block = TransformerBlock(FAMILIES["llama"], impl="fa3", dtype=torch.bfloat16).to(DEVICE)
    monkeypatch.setattr(abilities, "capability", lambda device: (8, 0))
    x = torch.zeros(1, 4, 32, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="impl is 'fa3', but FlashAttention 3 "):
        block(x)
    block.impl = "fa4"
    with pytest.raises(ValueError, match="impl is 'fa4', but FlashAttention 4 "):
        block(x)
    with pytest.raises(ValueError, match="impl is 'fa5', expected one of auto.*did you mean 'fa"):
        TransformerBlock(FAMILIES["llama"], impl="fa5")


def test_the_operations_own_core_is_theirs():
    cpu = replace(ASKED, device=torch.device("cpu"))
    assert dispatch.attention_core("reference", reference, cpu) is reference
    assert dispatch.attention_core("auto", reference, cpu) is reference
    assert dispatch.attention_core("triton", fused, cpu) is fused
    assert load("cpu").__name__ == "backfuse.kernels.reference.cpu_attention"


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
def test_policies_on_a_gpu(core, monkeypatch, determinism):
    """The same bits wherever the core gives the same bits."""
    spec = FAMILIES["llama"].replace(head_dim=64)
    x, grad = to_device(*make_input(spec, batch_size=2, seq_len=300, dtype=torch.bfloat16))
    block = block_through(core, monkeypatch, spec)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    determinism(2 if core == "flash" else 0)
    expected = results(block, x, grad)
    for policy in [*POLICIES[1::4], "full"]:
        block.policy = policy
        ours = results(block, x, grad)
        if gives_same_bits(core):
            assert same_bits(ours, expected), policy
        assert torch.equal(ours[0], expected[0]), policy
