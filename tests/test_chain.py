"""Chains of unlike layers, selective and manual plans, and plans of unlike layers."""

import itertools

import pytest
import torch
from families import FAMILIES, held_bytes, make_input
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import LAYERS, SIZES, make_plan

import backfuse
from backfuse import BlockSpec, BlockStack, Plan, TransformerBlock, rope_cos_sin
from backfuse.blocks.costs import block_costs
from backfuse.blocks.planner.chain import UNITS, chain
from backfuse.blocks.planner.choices import Choice
from backfuse.blocks.planner.optimal import BudgetError
from backfuse.blocks.policy import ACTIVATION_NAMES, KEEP, NAMED_POLICIES

LLAMA = FAMILIES["llama"]
SLIDING = BlockSpec(32, 96, 4, 2, sliding_window=5)


def choice(kept, transient, seconds):
    return Choice(KEEP, kept, 0, transient, seconds, 0.0, 0.0)


ONE = st.builds(choice, st.integers(0, 20), st.integers(0, 20), st.integers(1, 30).map(float))


@st.composite
def chains(draw):
    layers = draw(st.integers(1, 10))
    ways = {
        (i, i + 1): draw(st.lists(ONE, min_size=1, max_size=2 if layers > 6 else 3))
        for i in range(layers)
    }
    for start in draw(st.lists(st.integers(0, layers - 1), max_size=3)):
        stop = draw(st.integers(start + 1, layers))
        ways.setdefault((start, stop), []).append(draw(ONE))
    limit = st.none() | st.integers(0, 25 * layers)
    return ways, layers, draw(limit), draw(limit)


def brute_force(ways, layers, budget, peak_budget):
    """Least seconds, kept bytes and peak of every way there is, each in its own right."""
    found = []

    def go(start, kept, peak, seconds):
        if start == layers:
            found.append((kept, peak, seconds))
            return
        for (first, stop), choices in ways.items():
            if first == start:
                for one in choices:
                    high = max(peak, kept + one.kept + one.transient)
                    go(stop, kept + one.kept, high, seconds + one.seconds)

    go(0, 0, 0, 0.0)
    low = [f for f in found if peak_budget is None or f[1] <= peak_budget]
    fits = [f for f in low if budget is None or f[0] <= budget]
    if fits:
        return "seconds", min(f[2] for f in fits)
    return ("budget", min(f[0] for f in low)) if low else ("peak", min(f[1] for f in found))


@given(chains())
@settings(max_examples=150, deadline=None)
def test_a_chain_is_the_best_there_is(case):
    ways, layers, budget, peak_budget = case
    what, expected = brute_force(*case)
    try:
        found = chain(ways, layers, budget=budget, peak_budget=peak_budget)
    except BudgetError as error:
        assert what == ("peak" if error.of_peak else "budget") and error.least == expected
        return
    kept = list(itertools.accumulate(one.kept for _, one in found))
    peaks = [before + one.transient for before, (_, one) in zip(kept, found, strict=True)]
    assert what == "seconds" and sum(one.seconds for _, one in found) == expected
    assert budget is None or kept[-1] <= budget
    assert peak_budget is None or max(peaks) <= peak_budget
    assert sum(count for count, _ in found) == layers


def test_rounded_bytes_never_break_a_budget():
    ways = {(i, i + 1): [choice(99_991 + i, 0, 1.0), choice(10_007, 3, 2.0)] for i in range(8)}
    for budget in range(8 * 10_007, 8 * 99_991, 7 * UNITS):
        assert sum(one.kept for _, one in chain(ways, 8, budget=budget)) <= budget
    assert len(chain(ways, 8, budget=8 * 10_007)) == 8  # in whole units nothing fits


# Plans


@pytest.mark.parametrize("strategy", ["chain", "selective"])
def test_budgets_are_met_and_more_never_costs_more(strategy):
    free = make_plan(strategy=strategy)
    assert set(free.policies) == {KEEP} and free.overhead == pytest.approx(0)
    last = float("inf")
    for part in range(2, 10):
        plan = make_plan(strategy=strategy, share=part / 9)
        assert plan.kept_bytes <= plan.budget and plan.overhead <= last
        assert (
            plan.overhead >= make_plan(share=part / 9).overhead - 1e-3 or plan.segments != (1,) * 6
        )
        last = plan.overhead
    for name in ("budget", "peak_budget"):
        with pytest.raises(BudgetError) as error:
            make_plan(strategy=strategy, **{name: 1})
        least = make_plan(strategy=strategy, **{name: error.value.least})
        assert error.value.least in (least.kept_bytes, least.peak_bytes)


def test_chain_takes_segments_where_a_layer_cannot_do_it():
    lean = make_plan(strategy="chain", share=0.05)
    assert lean.segments != (1,) * LAYERS and lean.kept_bytes <= lean.budget
    uniform = make_plan(strategy="uniform", share=0.05)
    assert lean.seconds <= uniform.seconds


def test_selective_gives_up_the_most_bytes_a_second_first():
    plan = make_plan(strategy="selective", budget=make_plan().kept_bytes - 1)
    given_up = [n for p in plan.policies for n in ACTIVATION_NAMES if getattr(p, n) != "keep"]
    costs = {}
    for name in ("qkv", "attn_out", "mid", "preact"):
        one = block_costs(LLAMA, KEEP, **SIZES)
        other = block_costs(LLAMA, {name: "recompute"}, **SIZES)
        costs[name] = (one.kept_bytes - other.kept_bytes) / (other.recompute - one.recompute)
    assert given_up == [max(costs, key=costs.get)]


def test_manual_rules():
    rules = {-1: "keep", "layers.[0-2]": "lean", "layers.*": "full"}
    plan = make_plan(strategy="manual", policies=rules)
    lean, full = NAMED_POLICIES["lean"], NAMED_POLICIES["full"]
    assert plan.policies == (lean, lean, lean, full, full, KEEP)
    listed = make_plan(
        strategy="manual", policies=["full", "lean", full, full.with_x("recompute"), *[KEEP] * 2]
    )
    assert listed.policies[3] == full and listed.segments == (1, 1, 2, 1, 1)
    with pytest.raises(BudgetError):
        make_plan(strategy="manual", policies=rules, budget=10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"policies": {"layer.*": "lean"}}, ValueError, "rule 'layer.*', expected one that names"),
        ({"policies": {6: "lean"}}, ValueError, "the rule 6, expected one that names a layer"),
        ({"policies": {1.5: "lean"}}, TypeError, "rule 1.5, expected an index"),
        ({"policies": ["lean"]}, ValueError, "policies holds 1, expected one for each layer"),
        ({"policies": "lean"}, TypeError, "policies is 'lean', expected one a layer"),
        ({"policies": {0: "leen"}}, ValueError, "leen"),
        ({}, ValueError, "policies is None with the strategy 'manual'"),
        ({"strategy": "optimal", "policies": ["lean"]}, ValueError, "expected them together"),
    ],
)  # fmt: skip
def test_bad_rules(options, error, message):
    with pytest.raises(error, match=message):
        make_plan(**{"strategy": "manual", **options})


# Unlike layers

UNLIKE = [LLAMA, SLIDING, LLAMA, SLIDING, SLIDING]
NAMES = [False, ["self_attn.q_proj.weight"], True, True, True]


@pytest.mark.parametrize("strategy", ["optimal", "chain", "selective"])
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_unlike_layers_keep_what_is_promised(strategy, share):
    options = {"strategy": strategy, "requires_grad": NAMES, "allow": ("recompute",), **SIZES}
    free = backfuse.plan(UNLIKE, **options)
    plan = backfuse.plan(UNLIKE, budget=int(share * free.kept_bytes), **options)
    assert 0 < plan.kept_bytes <= plan.budget and plan.overhead > 0
    layers = [
        TransformerBlock(spec, policy, chunk_size=64)
        for spec, policy in zip(UNLIKE, plan.policies, strict=True)
    ]
    for layer, wanted in zip(layers, NAMES, strict=True):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(wanted is True or (bool(wanted) and name in wanted))
    x, _ = make_input(LLAMA, seq_len=33)
    angles = rope_cos_sin(torch.arange(33)[None], LLAMA.rotary_dim)

    def forward():
        y = x.detach()
        for layer in layers:
            y = layer(y, position_embeddings=angles)
        return y

    exclude = [p for layer in layers for p in layer.parameters()]
    held, _ = held_bytes(forward, exclude=[*exclude, *angles])
    assert plan.segments == (1,) * 5 and held == plan.kept_bytes
    assert "like layer 2" in plan.explain()


def test_unlike_layers_in_files_and_mistakes(tmp_path):
    plan = backfuse.plan(UNLIKE, requires_grad=NAMES, **SIZES)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    with pytest.raises(ValueError, match="sliding_window is 5, expected the stack's: None|interme"):
        backfuse.apply(BlockStack(LLAMA, 5), plan)
    for options, message in (
        ({"strategy": "sqrt"}, "the layers are unlike, expected 'optimal'"),
        ({"num_layers": 4}, "num_layers is 4, expected 5: so many"),
        ({"requires_grad": [True, False]}, r"requires_grad holds 2, expected one a layer \(5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            backfuse.plan(UNLIKE, **SIZES, **options)
    with pytest.raises(ValueError, match="several hidden sizes"):
        backfuse.plan([LLAMA, BlockSpec(64, 96, 4)], **SIZES)
    with pytest.raises(BudgetError, match="^peak_budget is 1 bytes") as error:
        backfuse.plan(UNLIKE, peak_budget=1, **SIZES)
    again = backfuse.plan(UNLIKE, peak_budget=error.value.least, **SIZES)
    assert again.peak_bytes <= error.value.least


# The other question


@pytest.mark.parametrize("strategy", ["optimal", "sqrt"])
def test_how_long_and_how_many(strategy, monkeypatch):
    plan = make_plan(strategy=strategy, allow=("recompute",))
    budget = 100_000
    for name, most in (
        ("seq_len", plan.max_seq_len(budget)),
        ("batch_size", plan.max_batch_size(budget=budget)),
    ):
        options = {"strategy": strategy, "allow": ("recompute",), "budget": budget}
        assert make_plan(**options, **{name: most}).kept_bytes <= budget
        with pytest.raises(BudgetError):
            make_plan(**options, **{name: most + 1})
    monkeypatch.setattr("backfuse.blocks.planner.plan.MOST", 8)
    assert plan.max_batch_size(budget=10 * budget) == 8
    with pytest.raises(ValueError, match="expected one of them"):
        plan.max_seq_len()
    with pytest.raises(BudgetError):
        plan.max_batch_size(budget=10)


def test_auto_takes_what_is_free():
    plan = backfuse.plan(
        LLAMA, num_layers=2, batch_size=1, seq_len=32, device="h200", budget="auto"
    )
    assert plan.budget == int(0.9 * 141e9)
    with pytest.raises(ValueError, match="host_budget is 'auto'"):
        make_plan(host_budget="auto")
