"""The static report's model: occupancy, operand traffic, roofline; and what counts as worse."""

import pandas as pd
import pytest

from backfuse import BlockSpec, block_flops
from backfuse.bench.shapes import SHAPES
from backfuse.bench.static_case import Dot
from backfuse.bench.static_cases import ARCHITECTURES, MODULES, cases
from backfuse.bench.static_check import COSTS, KEY, read_tables, regressions
from backfuse.bench.static_model import (
    CYCLE,
    PRODUCTS,
    TIMED_ON,
    TIMES,
    TOKENS,
    Work,
    attention_share,
    gemm_share,
    programs_per_processor,
    seconds,
    serves,
    times,
    work,
)
from backfuse.blocks.devices import DEVICES
from backfuse.kernels.configs import SHARED_MEMORY

LLAMA = SHAPES["llama-3-8b"]


def default(kernel, architecture="sm_90"):
    return cases([architecture], [kernel])[0]


def test_programs_that_a_multiprocessor_runs():
    assert programs_per_processor("sm_90", 168, 49_176, 4) == 3  # registers
    assert programs_per_processor("sm_90", 90, 196_640, 8) == 1  # shared memory
    assert programs_per_processor("sm_90", 32, 0, 8) == 8  # warps
    assert programs_per_processor("sm_90", 90, SHARED_MEMORY["sm_90"] + 1, 8) == 0
    assert programs_per_processor("gfx942", 128, 16_384, 8) == 2  # 4 waves on each of 4 SIMDs
    assert programs_per_processor("gfx942", 64, 65_536, 4) == 1


@pytest.mark.parametrize(
    ("dots", "share"),
    [
        ([Dot(128, 256)], 1.0),
        ([Dot(128, 128)], 0.75),
        ([Dot(128, 128), Dot(128, 128, new_rows=False)], 0.89),
        ([Dot(128, 128), Dot(128, 64)], 0.64),
        ([Dot(128, 256), Dot(128, 128)], 0.90),
    ],
)
def test_the_model_gives_the_published_ratios(dots, share):
    # DESIGN, research on Triton, section B; the slower of shared memory and L2
    assert gemm_share(dots, "sm_90", 8) == pytest.approx(share, abs=0.005)


def test_attention_waits_for_its_softmax():
    # a score: 4 * 128 FLOPs at 4096 a cycle, an exponential at 16, four operations at 128
    assert attention_share("attention_forward", 128, "sm_90") == pytest.approx(0.125 / 0.21875)
    shares = [attention_share(kernel, 64, "sm_90") for kernel in PRODUCTS]
    assert shares[0] < shares[2] < shares[1]  # more products for one softmax
    assert attention_share("attention_forward", 128, "gfx942") is None


def test_the_tensor_cores_of_a_cycle_are_those_of_the_device():
    """FLOPs a cycle times multiprocessors times a plausible clock is the data sheet's peak."""
    for name, (tensor, *_) in CYCLE.items():
        device = DEVICES[TIMED_ON[name]]
        assert device.architecture == name
        assert 1.3e9 < device.matmul_flops / (device.processors * tensor) < 2.6e9
    assert TIMED_ON.keys() == set(ARCHITECTURES)


# Work


def test_the_work_of_the_kernels_is_the_work_of_the_block():
    """FLOPs of the kernels against those of the block, whose attention sees half (and n more)."""
    flops = {k: work(default(k), LLAMA, TOKENS).flops for k in MODULES}
    total = block_flops(LLAMA, "selective", batch_size=1, seq_len=TOKENS)
    assert flops["ffn_up"] == total.recompute == flops["weight_grad"]
    assert flops["ffn_recompute"] == flops["ffn_up"] + flops["ffn_dact"]
    assert flops["ffn_dact"] == 2 * TOKENS * 4096 * 14336
    scores = 2 * LLAMA.q_size * TOKENS * (TOKENS + 1) // 2
    attention = [flops[f"attention_{name}"] for name in ("forward", "dkdv", "dq")]
    assert attention == [2 * scores, 4 * scores, 3 * scores]
    assert not any(flops[name] for name in ("activation", "norm_forward", "qk_rope_backward"))


def test_the_bytes_by_hand():
    dact = work(default("ffn_dact"), LLAMA, 100)
    assert dact.bytes == 2 * (100 * (4096 + 2 * 28672 + 14336) + 4096 * 14336)
    assert dact.programs == 1 * 56  # of 128 x 256
    assert work(default("norm_forward"), LLAMA, 100).bytes == 2 * 3 * 100 * 4096


def test_whole_waves():
    h200 = DEVICES["h200"]
    flops = 1e15
    one = flops / h200.matmul_rate
    assert seconds(Work(flops, 0, 132), "sm_90", 1.0, 1) == pytest.approx(one)
    assert seconds(Work(flops, 0, 66), "sm_90", 1.0, 1) == pytest.approx(2 * one)
    assert seconds(Work(flops, 0, 133), "sm_90", 1.0, 1) == pytest.approx(2 * one * 132 / 133)
    assert seconds(Work(flops, 0, 264), "sm_90", 0.5, 2) == pytest.approx(2 * one)
    assert seconds(Work(flops, 4.8e15, 132), "sm_90", 1.0, 1) == pytest.approx(1000)
    assert seconds(Work(0, 4.8e12), "sm_90", None, 1) == 1.0
    assert seconds(Work(flops, 4.8e12), "sm_90", None, 1) is None


def test_a_case_is_timed_for_the_shapes_it_serves():
    gated = default("ffn_up")
    assert serves(gated, LLAMA) and not serves(gated, SHAPES["gpt2-xl"])
    plain = next(c for c in cases(["sm_90"], ["ffn_up"]) if c.variant == "plain")
    assert serves(plain, SHAPES["gpt2-xl"]) and not serves(plain, LLAMA)
    heads = default("attention_forward")
    assert serves(heads, LLAMA) and not serves(heads, SHAPES["vit-l"])
    assert serves(default("attention_delta"), SHAPES["vit-l"])
    assert not serves(default("attention_delta"), LLAMA)
    qk_norm = BlockSpec(4096, 14336, 32, 8, qk_norm="head")
    main, normed = cases(["sm_90"], ["qk_rope_forward"])
    assert serves(main, LLAMA) and not serves(main, qk_norm) and not serves(normed, LLAMA)
    assert set(times(gated, 1.0, 0).values()) == {None}
    found = times(gated, 1.0, 1)
    assert tuple(found) == TIMES and found["us_vit-l"] is None and found["us_llama-3-8b"] > 1000


def test_a_smaller_share_or_a_larger_model_takes_longer():
    case = default("ffn_dact")
    whole, half = times(case, 1.0, 1), times(case, 0.5, 1)
    assert half["us_llama-3-8b"] == pytest.approx(2 * whole["us_llama-3-8b"], rel=1e-3)
    assert whole["us_llama-3-70b"] > whole["us_llama-3-8b"] > whole["us_llama-3.2-1b"]


# Worse than before


def table(**changes):
    line = dict(zip(KEY, ("ffn_up", "sm_90", "bf16", "main", "128x128", 8, 4), strict=True))
    line |= dict(zip(COSTS, (169, 0, None, 1000, False), strict=True)) | {"triton": "3.7.1"}
    return pd.DataFrame([line | changes])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"registers": 168}, None),
        ({"registers": 170}, "registers 169 -> 170"),
        ({"spill_bytes": 8}, "spill_bytes 0 -> 8"),
        ({"shared_bytes": 2000}, "shared_bytes 1000 -> 2000"),
        ({"serialized": True}, "serialized 0 -> 1"),
        ({"loop_spills": 9}, None),  # there was no loop to compare with
        ({"registers": 999, "tile": "64x64"}, None),  # another configuration
        ({"registers": None, "stages": None}, None),  # it failed, which is said elsewhere
    ],
)  # fmt: skip
def test_what_is_worse_is_said(changes, said):
    where = "worse: ffn_up sm_90 bf16 main 128x128: "
    assert regressions(table(**changes), table(), "3.7.1") == ([where + said] if said else [])
    assert regressions(table(**changes), table(), "3.6.0") == []


def test_tables_are_read_and_others_refused(tmp_path):
    table().to_csv(tmp_path / "sm_90.csv", index=False)
    assert list(read_tables(tmp_path, ["sm_90"])["registers"]) == [169]
    (tmp_path / "sm_80.csv").write_text("kernel,arch\n")
    with pytest.raises(ValueError, match="has no column 'dtype', expected a static report"):
        read_tables(tmp_path, ["sm_80"])
    with pytest.raises(OSError, match=r"sm_89\.csv"):
        read_tables(tmp_path, ["sm_89"])
