"""Costs by arithmetic: sums, FLOPs and bytes are those of `block_flops` and `kept_bytes`."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, FROZEN, make_block
from hypothesis import given, settings
from hypothesis import strategies as st

from backfuse import BlockSpec, block_flops, kept_bytes
from backfuse.blocks.costs import activation_costs, block_costs, visible_scores
from backfuse.blocks.devices import DEVICES, device, measure_cpu
from backfuse.blocks.policy import ACTIVATION_NAMES, NAMED_POLICIES

LLAMA = BlockSpec(4096, 14336, 32, 8)
SIZES = {"batch_size": 1, "seq_len": 8192}
ATTENTION = ("attn_out", "attn_out_input")


def costs(policy="keep", spec=LLAMA, where="h200", **options):
    return block_costs(spec, policy, device=where, **{**SIZES, **options})


# Against the counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("input_grad", [True, False])
def test_flops_are_those_of_block_flops(family, frozen, input_grad):
    spec = FAMILIES[family]
    wanted = {n for n, p in make_block(spec, frozen=frozen).named_parameters() if p.requires_grad}
    wanted |= {"hidden_states"} if input_grad else set()
    pairs = visible_scores(spec, 41)
    for policy in ("keep", "selective", "lean", "full", {"mid": "recompute"}, {"preact": "fp8"}):
        sizes = {"batch_size": 3, "seq_len": 41, "requires_grad": wanted}
        counted = block_flops(spec, policy, **sizes)
        # the explicit path visits all keys of so short a sequence, and so does PyTorch's formula
        assert block_flops(spec, policy, **sizes, masked=True) == counted
        found = dict.fromkeys(("forward", "backward", "recompute"), 0)
        for part in costs(policy, spec, **sizes).parts:
            scale = 41 * 41 / pairs if part.name in ATTENTION else 1
            found[part.phase] += round(part.flops * scale)
        assert found == vars(counted), policy


@pytest.mark.parametrize("policy", NAMED_POLICIES)
def test_bytes_are_those_of_kept_bytes(policy):
    everywhere = replace(NAMED_POLICIES[policy], x="keep")
    if policy == "offload":
        everywhere = replace(everywhere, attn_out="keep")
    sizes = kept_bytes(LLAMA, everywhere, dtype=torch.bfloat16, **SIZES)
    found = costs(policy)
    assert found.kept | found.shipped == sizes
    assert set(found.shipped) == ({"x", "attn_out"} if policy == "offload" else set())
    assert found.link == found.host_bytes / DEVICES["h200"].link_bandwidth


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 12, 40])
def test_visible_scores_are_counted_one_by_one(causal, window):
    spec = BlockSpec(16, 24, 2, causal=causal, sliding_window=window)
    for tokens in (1, 4, 12):
        rows = range(tokens)
        seen = sum(
            abs(i - j) < (window or tokens) and (j <= i or not causal) for i in rows for j in rows
        )
        assert visible_scores(spec, tokens) == seen


# By hand


def test_llama_3_8b():
    """DESIGN's table: KiB kept per token and extra FLOPs of a step, at 8,192 tokens."""
    base = sum(part.flops for part in costs().parts)
    found = {}
    for policy in ("keep", "selective", "lean", "full"):
        own = costs(policy)
        flops = sum(part.flops for part in own.parts)
        kib = round(own.kept_bytes / 8192 / 1024, 1)
        found[policy] = kib, round(100 * (flops - base) / base, 1)
    assert found == {
        "keep": (92.1, 0.0), "selective": (36.1, 15.2), "lean": (16.1, 20.7), "full": (8.0, 25.0),
    }  # fmt: skip


def test_seconds_by_hand():
    h200 = DEVICES["h200"]
    parts = {(part.phase, part.name): part for part in costs().parts}
    up = parts["forward", "preact"]
    assert up.flops == 2 * 8192 * 4096 * 28672
    assert up.bytes == 2 * (8192 * (4096 + 28672 + 14336) + 4096 * 28672)
    assert up.seconds == up.flops / (989.4e12 * 0.79)
    norm = parts["forward", "ffn_norm"]
    assert norm.bytes == 2 * 2 * 8192 * 4096 and norm.seconds == norm.bytes / 4.8e12
    one = [p for p in costs(seq_len=1).parts if p.name == "preact"]  # bound by its weights
    assert one[0].seconds == one[0].bytes / h200.memory_bandwidth > one[0].flops / h200.matmul_rate


def test_totals_are_sums():
    for policy in NAMED_POLICIES:
        own = costs(policy)
        phases = (own.forward, own.recompute, own.backward)
        assert own.step == pytest.approx(sum(part.seconds for part in own.parts))
        assert own.step == pytest.approx(sum(phases)) and min(own.forward, own.backward) > 0
        assert own.kept_bytes == sum(own.kept.values())
    assert costs("keep").recompute == 0


def test_a_kept_preact_is_a_larger_epilogue_and_a_rebuilt_one_is_a_norm_and_a_gemm():
    kept, rebuilt = costs("keep"), costs("selective")
    assert {part.name for part in rebuilt.parts if part.phase == "recompute"} == {
        "ffn_norm", "preact",
    }  # fmt: skip
    up = [p.bytes for c in (kept, rebuilt) for p in c.parts if p.name == "preact"][:2]
    assert up[0] - up[1] == 2 * 8192 * 28672


# The five activations


def test_actions_add_up_to_policies():
    each = activation_costs(LLAMA, device="h200", **SIZES)
    assert tuple(each) == ACTIVATION_NAMES
    full = costs("full")
    assert sum(each[n].recompute for n in ACTIVATION_NAMES[1:]) == pytest.approx(full.recompute)
    small = (2 * 4 + 4 * 32) * 8192  # the norms' statistics and LSE: they stay on the device
    assert sum(cost.bytes for cost in each.values()) == costs("keep").kept_bytes - small
    assert each["attn_out"].bytes == 8192 * 2 * 4096
    assert each["x"].recompute == full.forward
    for cost in each.values():
        assert cost.offload == cost.bytes / 50e9 and cost.keep == 2 * cost.bytes / 4.8e12


def test_what_nothing_reads_costs_nothing():
    each = activation_costs(LLAMA, device="h200", **SIZES, requires_grad=False)
    assert {(c.bytes, c.keep, c.recompute, c.offload) for c in each.values()} == {(0, 0, 0, 0)}
    lora = activation_costs(LLAMA, device="h200", **SIZES, requires_grad=["hidden_states"])
    assert lora["preact"].recompute > 0 and lora["mid"].bytes > 0
    frozen = costs("full", requires_grad=["hidden_states"])
    assert not any(part.name.endswith(".weight") for part in frozen.parts)


def test_a_post_norm_ships_the_branch_before_it():
    spec = BlockSpec(64, 96, 4, norm_position="both")
    own = costs({"mid": "offload", "preact": "offload"}, spec)
    assert set(own.shipped) == {"attn_branch", "preact", "ffn_branch"}


# Monotone


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 300),
    more=st.integers(1, 300),
    policy=st.sampled_from(list(NAMED_POLICIES)),
    where=st.sampled_from(list(DEVICES)),
    family=st.sampled_from(list(FAMILIES)),
)
def test_more_tokens_cost_more(tokens, more, policy, where, family):
    spec = FAMILIES[family]
    few, many = (
        costs(policy, spec, where, batch_size=2, seq_len=n) for n in (tokens, tokens + more)
    )
    for name in ("forward", "backward", "kept_bytes", "host_bytes", "step"):
        assert getattr(many, name) >= getattr(few, name)
    assert many.recompute >= few.recompute and many.step > few.step


# Devices


def test_the_table_is_sane():
    assert list(DEVICES) == ["h100", "h200", "b200", "a100", "l40s", "rtx-4090", "mi300x"]
    for name, row in DEVICES.items():
        assert row.name == name and device(name) is row
        assert 0.4 < row.matmul_share <= 1 and row.memory > 20e9
        assert row.link_bandwidth < row.memory_bandwidth < row.matmul_rate
    from backfuse.kernels.configs import SHARED_MEMORY

    for row in DEVICES.values():  # of a processor: at least what one program can have
        assert row.shared_memory >= SHARED_MEMORY[row.architecture]


def test_the_cpu_is_measured_once():
    cpu = device("cpu")
    assert cpu is measure_cpu(torch.float32) and cpu.name == "cpu"
    assert cpu.matmul_rate > 1e8 and cpu.memory_bandwidth > 1e8 and cpu.memory > 2**28
    assert cpu.processors == torch.get_num_threads()
    assert costs("full", BlockSpec(64, 96, 4), cpu, dtype=torch.float32).recompute > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "h20"}, "device is 'h20', expected one of h100, .*did you mean 'h200'"),
        ({"dtype": torch.float32}, "dtype is torch.float32, expected torch.bfloat16 or torch.flo"),
        ({"policy": {"qkv": "fp8"}}, "the action of qkv is 'fp8'"),
        ({"policy": "ful"}, "policy is 'ful'.*did you mean 'full'"),
        ({"seq_len": 0}, "seq_len is 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        costs(**options)
