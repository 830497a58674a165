"""Costs by profile: what is timed, what is made of the times, what is remembered, what refused."""

import dataclasses
import json
import types

import pytest
import torch
from families import FAMILIES, POLICIES

import backfuse
from backfuse import Plan, TransformerBlock, cli
from backfuse.blocks import devices
from backfuse.blocks.costs import block_costs
from backfuse.blocks.devices import Device
from backfuse.blocks.planner import profile
from backfuse.blocks.planner.optimal import BudgetError
from backfuse.blocks.policy import KEEP, Policy
from backfuse.blocks.profiled import REBUILT, Factors, ProfiledDevice

LLAMA = FAMILIES["llama"]
CPU = Device("cpu", "interpreter", 1e9, 1.0, 1e10, 2e7, 10**9, 0, 1, 0, (torch.float32,))
SIZES = {"batch_size": 2, "seq_len": 33, "dtype": torch.float32}

#: Seconds of a step under `keep` and of what rebuilding one activation adds.
KEPT, FORWARD = 1.0, 0.25
ADDED = {"qkv": 0.5, "attn_out": 0.125, "mid": 0.0625, "preact": 0.25}


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """A machine that takes the seconds in `timed.added`; `timed.policies` is what has run."""
    monkeypatch.setenv("BACKFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(devices, "measure_cpu", lambda dtype: dataclasses.replace(CPU))
    state = types.SimpleNamespace(added=dict(ADDED), policies=[], shapes=set())

    def step_seconds(block, x, grad, angles):
        state.policies.append(block.policy)
        state.shapes.add(tuple(x.shape[:2]))
        rebuilt = [name for name in REBUILT if not block.policy.keeps(name)]
        return FORWARD, KEPT + sum(state.added[name] for name in rebuilt)

    monkeypatch.setattr(profile, "step_seconds", step_seconds)
    return state


def make(spec=LLAMA, layers=4, **options):
    return backfuse.plan(spec, num_layers=layers, profile=True, **{**SIZES, **options})


def costs(device, policy, spec=LLAMA, **sizes):
    return block_costs(spec, policy, device=device, **{**SIZES, **sizes})


@pytest.mark.parametrize("family", FAMILIES)
def test_arithmetic_then_says_what_was_timed(family, timed):
    spec = FAMILIES[family]
    device = make(spec).device
    assert set(timed.policies) <= {KEEP, *(Policy(**{name: "recompute"}) for name in REBUILT)}
    for policy in set(timed.policies):
        found = costs(device, policy, spec)
        added = sum(ADDED[name] for name in REBUILT if not policy.keeps(name))
        assert found.step == pytest.approx(KEPT + added)
        assert policy != KEEP or found.forward == pytest.approx(FORWARD)


def test_prices_add_up_and_grow_with_what_is_asked(timed):
    device = make().device
    lean = costs(device, "full").step
    assert lean == pytest.approx(KEPT + sum(ADDED.values()), rel=0.02)
    half = costs(device, "full", batch_size=1).step
    assert half < lean < costs(device, "full", seq_len=66).step
    frozen = costs(device, "full", requires_grad=["hidden_states"])
    assert frozen.step < lean and frozen.forward == pytest.approx(FORWARD)
    # what was faster than keep costs nothing: no price is negative
    timed.added = dict.fromkeys(ADDED, -0.5)
    again = make(seq_len=32).device
    assert costs(again, "full", seq_len=32).step == pytest.approx(KEPT, rel=0.02)


@pytest.mark.parametrize("dear", REBUILT)
def test_a_plan_avoids_what_is_dear(dear, timed):
    """Half of it must go: never that which takes a hundred times as long as the others."""
    timed.added = {name: 10.0 if name == dear else 0.1 for name in REBUILT}
    kept = make(allow=("recompute",))
    least = make(allow=("recompute",), strategy="manual", policies=[{
        name: "recompute" for name in REBUILT if name != dear
    }] * 4)  # fmt: skip
    plan = make(allow=("recompute",), budget=least.kept_bytes)
    assert kept.overhead == pytest.approx(0)
    assert plan.kept_bytes <= least.kept_bytes and all(p.keeps(dear) for p in plan.policies)
    assert any(not policy.keeps(name) for policy in plan.policies for name in REBUILT)


def test_it_is_timed_once(timed, monkeypatch):
    first = make([LLAMA, FAMILIES["qwen3"], LLAMA], layers=None)
    rounds = 2 + profile.LEAST
    assert len(timed.policies) == 2 * rounds * 5  # two kinds of layers, five policies
    timed.policies.clear()
    timed.added["qkv"] = 9.0
    second = make([FAMILIES["qwen3"], LLAMA], layers=None)
    assert not timed.policies
    assert dict(second.device.blocks) == dict(first.device.blocks)
    assert first.within(budget=first.kept_bytes - 1).device is first.device and not timed.policies
    for change in ({"seq_len": 34}, {"batch_size": 1}, {"spec": FAMILIES["gpt2"]}):
        make(**change)
        assert timed.policies
        timed.policies.clear()
    version = profile.importlib.metadata.version
    monkeypatch.setattr(
        profile.importlib.metadata, "version",
        lambda name: "9" if name == "torch" else version(name),
    )  # fmt: skip
    make()
    assert timed.policies


@pytest.mark.parametrize("damage", [
    "", "[]", "null", '{"key": 1}', "{", "[" * 100000,
    lambda record: record.update(key="other"),
    lambda record: record["value"]["steps"].update(mid=-1.0),
    lambda record: record["value"]["steps"].update(other=1.0),
    lambda record: record["value"]["steps"].pop("keep"),
    lambda record: record["value"].update(forward="1"),
    lambda record: record["value"].update(forward=float("nan")),
    lambda record: record["value"].update(forward=2 * KEPT),
    lambda record: record["value"].update(batch_size=0),
    lambda record: record["value"].update(more=1),
    lambda record: record.update(value=[1, 2, 3, 4]),
])  # fmt: skip
def test_a_damaged_record_is_measured_anew(damage, timed, tmp_path):
    before = make().device
    (path,) = (tmp_path / "cache" / "profiles").iterdir()
    text = damage
    if callable(damage):
        record = json.loads(path.read_text())
        damage(record)
        text = json.dumps(record)
    path.write_text(text)
    timed.policies.clear()
    with pytest.warns(UserWarning, match=f"{path.name} is ignored"):
        assert make().device == before
    assert timed.policies
    timed.policies.clear()
    assert make().device == before and not timed.policies


def test_a_plan_is_made_where_nothing_can_be_kept(timed, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="what was measured is not kept|is ignored"):
        assert isinstance(make().device, ProfiledDevice)


def test_bad_input_is_refused_before_anything_runs(timed):
    wrong = [
        ({"device": "h200"}, "device is 'h200' with profile=True, expected what is here"),
        ({"device": CPU.__class__("mine", "x", 1, 1, 1, 1, 1, 1, 1, 1)}, "device is 'mine'"),
        ({"device": "h2000"}, "did you mean 'h200'"),
        ({"batch_size": 0}, "batch_size is 0"), ({"seq_len": -1}, "seq_len is -1"),
        ({"strategy": "chains"}, "strategy is 'chains'"), ({"allow": ["offlod"]}, "offlod"),
        ({"strategy": "sqrt", "allow": ["offload"]}, "expected 'recompute' among it"),
        ({"profile": False}, "device is None, expected its name"),
    ]  # fmt: skip
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            backfuse.plan(LLAMA, num_layers=2, **{"profile": True, **SIZES, **options})
    with pytest.raises(BudgetError):
        make(budget=1, allow=("recompute",))
    with pytest.raises(TypeError, match="dtype is 'fp32'"):
        make(dtype="fp32")
    assert not timed.policies


def test_the_plan_remembers_it(timed, tmp_path):
    plan = make(budget=60_000)
    plan.save(tmp_path / "plan.json")
    timed.policies.clear()
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and isinstance(loaded.device, ProfiledDevice)
    said = "By a profile of these layers (timed with 2 x 33 tokens) a step takes"
    assert said in loaded.explain() == plan.explain() and not timed.policies
    assert "By arithmetic" in backfuse.plan(LLAMA, num_layers=4, device=CPU, **SIZES).explain()
    content = json.loads((tmp_path / "plan.json").read_text())
    content["device"]["blocks"][0]["factors"]["mid"] = -1
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is a damaged plan: the factor mid is -1"):
        Plan.load(tmp_path / "plan.json")


def test_a_profile_knows_its_blocks_only(timed):
    device = make().device
    with pytest.raises(ValueError, match="a profile of cpu without a block like"):
        costs(device, "keep", FAMILIES["qwen3"])
    other = backfuse.plan(LLAMA, num_layers=2, device=device, **SIZES)  # and can be given again
    assert other.device is device
    with pytest.raises(ValueError, match="the factor qkv is nan"):
        Factors(1, 1, qkv=float("nan"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_has_its_factor(family):
    """Factors of 2: whatever is kept, rebuilt, frozen or adapted takes twice as long."""
    spec = FAMILIES[family]
    twice = Factors(1, 1, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    device = ProfiledDevice(**vars(CPU), blocks=((spec, twice),))
    names = [name.removesuffix(".weight") for name in spec.parameters() if "proj.w" in name]
    adapters = {name: backfuse.LoRA(4) for name in names}
    for policy in POLICIES:
        for options in ({}, {"requires_grad": ["hidden_states"]}, {"adapters": adapters}):
            measured = costs(device, policy, spec, **options)
            plain = costs(CPU, policy, spec, **options)
            assert measured.step == pytest.approx(2 * plain.step)
            assert measured.recompute == pytest.approx(2 * plain.recompute)


def test_large_sizes_are_timed_smaller_and_scaled(timed, monkeypatch):
    whole = costs(CPU, "keep", batch_size=8, seq_len=64).step
    monkeypatch.setattr(profile, "LIMIT", whole / 7)
    device = make(batch_size=8, seq_len=64).device
    assert timed.shapes == {(1, 64)}
    factors = device.factors(LLAMA)
    assert (factors.batch_size, factors.seq_len) == (1, 64)
    assert costs(device, "keep", batch_size=1, seq_len=64).step == pytest.approx(KEPT)
    grown = costs(device, "keep", batch_size=8, seq_len=64).step / KEPT
    assert grown == pytest.approx(whole / costs(CPU, "keep", batch_size=1, seq_len=64).step, 0.02)
    timed.shapes.clear()
    monkeypatch.setattr(profile, "free_bytes", lambda where: 4 * 16 * 1024)
    make(batch_size=8, seq_len=128)
    ((batch, tokens),) = timed.shapes
    assert batch == 1 and costs(CPU, "keep", batch_size=1, seq_len=tokens).kept_bytes <= 16 * 1024
    assert costs(CPU, "keep", batch_size=1, seq_len=2 * tokens).kept_bytes > 16 * 1024


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2", "neox"])
def test_real_blocks_run_and_leave_nothing_behind(family, tmp_path, monkeypatch):
    monkeypatch.setenv("BACKFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(profile, "SECONDS", 0.0)
    state = torch.get_rng_state()
    runs = []
    forward = TransformerBlock.forward
    monkeypatch.setattr(
        TransformerBlock, "forward",
        lambda self, *args, **options: runs.append(self.policy) or forward(self, *args, **options),
    )  # fmt: skip
    with torch.no_grad():
        plan = make(FAMILIES[family], device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(runs)) == (4 if family == "neox" else 5)  # side by side, there is no mid
    assert len(runs) == (2 + profile.LEAST) * len(set(runs))
    factors = plan.device.factors(FAMILIES[family])
    assert factors.forward > 0 and factors.backward > 0 and plan.seconds > 0
    record = json.loads(next((tmp_path / "profiles").iterdir()).read_text())["value"]
    policies = {"keep": KEEP} | {name: Policy(**{name: "recompute"}) for name in REBUILT}
    for name, seconds in record["steps"].items():
        step = costs(plan.device, policies[name], FAMILIES[family]).step
        assert step == pytest.approx(max(seconds, record["steps"]["keep"]))


@pytest.mark.gpu
def test_the_link_of_a_gpu_is_timed():
    assert 1e8 < profile._link() < 1e12


def test_the_command(timed, capsys, tmp_path):
    sizes = ["--hidden-size", "32", "--intermediate-size", "48", "--num-attention-heads", "4"]
    command = ["plan", "--layers", "4", "--seq-len", "33", *sizes]
    assert cli.main([*command, "--profile", "--device", "cpu", "--budget", "40KiB"]) == 0
    assert "By a profile of these layers (timed with 1 x 33 tokens)" in capsys.readouterr().out
    assert timed.policies
    assert cli.main(command) == 2
    assert "device is None" in capsys.readouterr().err
