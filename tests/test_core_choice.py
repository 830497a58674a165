"""kernels/cores: what each attention core can do, and which one runs."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from families import FAMILIES
from stand_ins import forget

from backfuse import TransformerBlock
from backfuse.kernels import dispatch, fused, reference, tuning
from backfuse.kernels.cores import abilities
from backfuse.kernels.cores.abilities import ABILITIES, obstacle
from backfuse.kernels.cores.abilities import same_bits as gives_same_bits
from backfuse.kernels.cores.choose import choose, load
from backfuse.kernels.cores.prototypes import FA3, FA4
from backfuse.kernels.reference.attention_request import EXTRAS, AttentionRequest
from backfuse.kernels.reference.explicit_attention import AttentionMask
from backfuse.kernels.tuning import Shape, Tuning, attention_times, save, save_attention

CUDA = torch.device("cuda")
ASKED = AttentionRequest(AttentionMask(), torch.bfloat16, CUDA, 1024, 128)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKFUSE_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


def with_mask(**changes):
    return replace(ASKED, mask=AttentionMask(**changes))


#: Core, what is asked, capability of the GPU, and what is in the way.
TABLE = [
    ("triton", replace(ASKED, sinks=True, v_head_dim=64, unlike=True), (9, 0), None),
    ("fa4", replace(ASKED, unlike=True), (9, 0), "FlashAttention 4 has no other numbers of keys"),
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
        sinks=True, unlike=True,
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
