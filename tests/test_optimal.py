"""The best mix of policies: against brute force, against the linear bound, within its budgets."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from backfuse import BlockSpec, kept_bytes
from backfuse.bench.shapes import SHAPES
from backfuse.blocks.costs import activation_costs, block_costs
from backfuse.blocks.planner.choices import Choice, layer_choices
from backfuse.blocks.planner.optimal import GAP, SHIPPING, BudgetError, optimal
from backfuse.blocks.policy import KEEP, NAMED_POLICIES, Policy

LLAMA = SHAPES["llama-3-8b"]
SIZES = {"batch_size": 1, "seq_len": 8192, "device": "h200"}


@pytest.fixture(scope="module")
def llama():
    return layer_choices(LLAMA, **SIZES)


# Choices


def test_keeping_everything_comes_first_and_nothing_useless_follows(llama):
    assert llama[0].policy == KEEP and llama[0].transient == 0
    assert all(choice.policy.x != "recompute" for choice in llama)
    for one, other in itertools.permutations(llama[1:], 2):
        costs = [(c.kept, c.host, c.transient, c.seconds) for c in (one, other)]
        assert not all(a <= b for a, b in zip(*costs, strict=True)), (one, other)


def test_a_choice_is_what_its_policy_costs(llama):
    by_policy = {choice.policy: choice for choice in llama}
    lean = by_policy[NAMED_POLICIES["lean"]]
    costs = block_costs(LLAMA, "lean", **SIZES)
    sizes = kept_bytes(LLAMA, "keep", batch_size=1, seq_len=8192, dtype=torch.bfloat16)
    assert lean.kept == costs.kept_bytes and lean.seconds == pytest.approx(costs.step)
    assert lean.transient == sizes["qkv"] + sizes["mid"] and lean.host == 0
    offload = by_policy[NAMED_POLICIES["offload"]]
    assert offload.host == sizes["x"] + sizes["attn_out"]
    assert offload.transient == lean.transient + 2 * offload.host


@pytest.mark.parametrize("allow", [(), ("recompute",), ("offload",), ("recompute", "fp8")])
def test_only_what_is_allowed_is_considered(allow):
    found = layer_choices(LLAMA, **SIZES, allow=allow)
    actions = {getattr(c.policy, n) for c in found for n in ("x", "qkv", "preact")}
    assert actions == {"keep", *allow}


def test_frozen_layers_have_nothing_to_choose():
    (only,) = layer_choices(LLAMA, **SIZES, requires_grad=False)
    assert only.policy == KEEP and only.kept == 0


# The best mix


def brute_force(choices, layers, budget, peak_budget, host_budget):
    """The least seconds over every order of every mix; None if none is within the budgets."""
    best = None
    for stack in itertools.product(choices, repeat=layers):
        kept = list(itertools.accumulate(c.kept for c in stack))
        peak = max(before + c.transient for before, c in zip(kept, stack, strict=True))
        host, link = sum(c.host for c in stack), sum(c.link for c in stack)
        over = (kept[-1], budget), (peak, peak_budget), (host, host_budget)
        if any(limit is not None and value > limit for value, limit in over):
            continue
        passes = sum(c.forward for c in stack), sum(c.backward for c in stack)
        took = sum(max(seconds, link) for seconds in passes)
        best = took if best is None else min(best, took)
    return best


whole = st.integers(0, 9)


@st.composite
def problems(draw):
    choices = [Choice(KEEP, 9, 0, 0, 1.0, 2.0, 0.0)]
    for _ in range(draw(st.integers(1, 3))):
        kept, host, transient, extra, link = (draw(whole) for _ in range(5))
        choices.append(
            Choice(Policy(qkv="recompute"), kept, host, transient, 1.0, 2 + extra / 4, link / 3)
        )
    limits = [draw(st.none() | st.integers(0, 40)) for _ in range(3)]
    return choices, draw(st.integers(1, 4)), limits


@settings(max_examples=150, deadline=None)
@given(problems())
def test_it_is_the_best_of_all(problem):
    choices, layers, (budget, peak, host) = problem
    best = brute_force(choices, layers, budget, peak, host)
    limits = {"budget": budget, "peak_budget": peak, "host_budget": host}
    if best is None:
        with pytest.raises(BudgetError) as error:
            optimal(choices, layers, **limits)
        name = str(error.value).partition(" ")[0]
        least = error.value.least
        assert least > limits[name]
        others = {"peak_budget": None, "budget": None} if name == "peak_budget" else limits
        again = {**limits, **others, name: least}
        assert brute_force(choices, layers, *again.values()) is not None
        assert brute_force(choices, layers, *{**again, name: least - 1}.values()) is None
        return
    mix = optimal(choices, layers, **limits)
    ships = SHIPPING * layers * max(choice.link for choice in choices)
    assert best - 1e-9 <= mix.seconds <= (best + ships) * (1 + GAP)
    assert sum(mix.counts) == layers == len(mix.policies)
    assert mix.kept_bytes <= (mix.kept_bytes if budget is None else budget)
    assert mix.peak_bytes <= (mix.peak_bytes if peak is None else peak)
    assert mix.host_bytes <= (mix.host_bytes if host is None else host)


def linear_bound(spec, sizes, kib):
    """Extra time of the best plan of one layer, as a fraction of its step, tensor by tensor.

    Another linear program than the planner's: each activation is rebuilt in part and shipped in
    part, at the cost of `activation_costs`; no policies, no layers.
    """
    each = activation_costs(spec, **sizes)
    keep = block_costs(spec, "keep", **sizes)
    again = [0.0 if name == "x" else cost.recompute for name, cost in each.items()]
    ship = [cost.offload for cost in each.values()]
    size = [cost.bytes for cost in each.values()]
    n = len(size)
    # columns: rebuilt and shipped parts, waits of both passes
    rows = [
        [*(-b for b in size), *(-b for b in size), 0, 0],
        [*(n * [0]), *ship, -1, 0],
        [*(-cost for cost in again), *ship, 0, -1],
        *([*(float(i == j) for j in range(n)), *(float(i == j) for j in range(n)), 0, 0]
          for i in range(n)),
    ]  # fmt: skip
    limits = [kib * 1024 * sizes["seq_len"] - keep.kept_bytes, keep.forward, keep.backward]
    found = optimize.linprog(
        [*again, *(n * [0]), 1, 1], A_ub=rows, b_ub=[*limits, *(n * [1])],
        bounds=[(0, 0), *(2 * n + 1) * [(0, None)]],  # x is not rebuilt
    )  # fmt: skip
    return found.fun / keep.step


@pytest.mark.parametrize(
    ("name", "seq_len", "layers"), [("llama-3-8b", 8192, 32), ("llama-3-70b", 32768, 80)]
)
def test_it_is_within_two_percent_of_the_linear_bound(name, seq_len, layers):
    sizes = {"batch_size": 1, "seq_len": seq_len, "device": "h200"}
    choices = layer_choices(SHAPES[name], **sizes)
    for kib in (64, 32, 12, 4, 1):
        budget = kib * 1024 * seq_len * layers
        mix = optimal(choices, layers, budget=budget)
        bound = optimal(choices, layers, budget=budget, relaxed=True)
        assert bound.seconds <= mix.seconds * (1 + 1e-6) and mix.kept_bytes <= budget
        assert mix.overhead - bound.overhead < 0.001  # of a step
        other = linear_bound(SHAPES[name], sizes, kib)
        assert abs(bound.overhead - other) < 0.002 and mix.overhead - other < 0.02


def test_more_budget_never_costs_more(llama):
    """Over 50 budgets, up to the gap that the solver may leave."""
    last = 1.0
    for part in range(1, 51):
        budget = part * 128 * llama[0].kept // 50
        mix = optimal(llama, 128, budget=budget)
        assert mix.overhead <= last * (1 + GAP) + GAP and mix.kept_bytes <= budget
        last = mix.overhead
    assert last == 0 and mix.host_bytes == 0


def test_the_frontier_of_the_design():
    """8B at 8k on 32 KiB a token at 6 %, 4 KiB at 14 %; 70B at 32k on 4 KiB at 1 %.

    With a link of 50 GB/s and 650 TFLOP/s, bytes of memory not counted.
    """
    from dataclasses import replace

    from backfuse.blocks.devices import DEVICES

    h200 = replace(DEVICES["h200"], matmul_flops=650e12, matmul_share=1.0, memory_bandwidth=1e18)
    found = []
    for name, seq_len, kib in (
        ("llama-3-8b", 8192, 32), ("llama-3-8b", 8192, 4), ("llama-3-70b", 32768, 4),
    ):  # fmt: skip
        choices = layer_choices(SHAPES[name], batch_size=1, seq_len=seq_len, device=h200)
        mix = optimal(choices, 1, budget=kib * 1024 * seq_len, relaxed=True)
        found.append(round(100 * mix.overhead))
    assert found == [6, 14, 1]


def test_nothing_is_shipped_for_nothing():
    keep, ship = (Choice(KEEP, 9, host, 0, 1.0, 2.0, host / 9) for host in (0, 9))
    assert optimal([keep, ship], 8, budget=72).host_bytes == 0


# Peaks


def test_large_transients_stand_first(llama):
    budget = int(0.3 * 32 * llama[0].kept)
    mix = optimal(llama, 32, peak_budget=budget)
    transients = [choice.transient for choice in mix.choices]
    assert transients == sorted(transients, reverse=True) and len(transients) > 1
    assert mix.kept_bytes <= mix.peak_bytes <= budget
    # the same mix the other way round needs more
    before, worst = 0, 0
    for choice, count in reversed(list(zip(mix.choices, mix.counts, strict=True))):
        before += count * choice.kept
        worst = max(worst, before + choice.transient)
    assert worst >= mix.peak_bytes


# Bad input


def test_a_budget_that_cannot_be_met_says_the_least_that_can(llama):
    least = r"^budget is 1,000 bytes, expected at least 2,097,152 \(2MiB\):"
    with pytest.raises(BudgetError, match=least):
        optimal(llama, 32, budget=1000)  # two statistics of 4 bytes a token
    with pytest.raises(BudgetError, match=r"^peak_budget is 1,000 bytes, expected at least"):
        optimal(llama, 32, peak_budget=1000)
    mix = optimal(llama, 32, budget=32 * 2 * 4 * 8192)
    assert {choice.policy.x for choice in mix.choices} == {"offload"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"budget": -1}, "budget is -1"),
        ({"host_budget": -5}, "host_budget is -5, expected at least 0 bytes"),
    ],
)
def test_bad_arguments(options, message, llama):
    with pytest.raises(ValueError, match=message):
        optimal(llama, **{"num_layers": 2, **options})


def test_an_unknown_action_is_named():
    with pytest.raises(ValueError, match="allow names 'ofload'.*did you mean 'offload'"):
        layer_choices(BlockSpec(8, 16, 2), **SIZES, allow=("ofload",))
