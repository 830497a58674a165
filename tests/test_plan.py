"""Plans: what they promise is what an applied stack holds; files, mistakes, the command."""

import dataclasses
import itertools
import json

import pytest
import torch
from families import FAMILIES, held_bytes, make_input, results, same_bits

import backfuse
from backfuse import BlockSpec, BlockStack, Plan, cli, rope_cos_sin
from backfuse.bench import frontier
from backfuse.bench.shapes import SHAPES
from backfuse.blocks.devices import Device
from backfuse.blocks.offload import line
from backfuse.blocks.planner.byte_sizes import format_bytes, parse_bytes
from backfuse.blocks.planner.choices import layer_choice
from backfuse.blocks.planner.optimal import GAP, BudgetError
from backfuse.blocks.policy import KEEP, NAMED_POLICIES

#: A slow matmul and a slow link: neither recomputing nor offloading is free.
SMALL = Device(
    "small", "interpreter", 1e9, 1.0, 1e10, 2e7, 10**9, 0, 1, 0, (torch.float32, torch.float64)
)
SIZES = {"batch_size": 2, "seq_len": 33, "device": SMALL, "dtype": torch.float32}
LAYERS = 6


def make_plan(family="llama", share=None, **options):
    """A plan of a small stack that may keep a share of what `keep` keeps."""
    spec = FAMILIES[family]
    if share is not None:
        options["budget"] = int(share * LAYERS * layer_choice(spec, KEEP, **SIZES).kept)
    return backfuse.plan(spec, num_layers=LAYERS, **{**SIZES, **options})


def big_plan(**options):
    sizes = {"num_layers": 32, "batch_size": 4, "seq_len": 8192, "device": "h200"}
    return backfuse.plan(SHAPES["llama-3-8b"], **{**sizes, **options})


CASES = [
    {"share": 0.6}, {"share": 0.2}, {"share": 0.4, "allow": ("recompute",)},
    {"share": 0.3, "allow": ("offload",)}, {"strategy": "uniform", "share": 0.06},
    {"strategy": "sqrt"}, {"strategy": "recursive"},
]  # fmt: skip


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_what_it_promises_is_held_with_the_bits_of_keep(family, options):
    spec = FAMILIES[family]
    plan = make_plan(family, **options)
    torch.manual_seed(0)
    stack = BlockStack(spec, LAYERS, "keep", chunk_size=64)
    x, grad = make_input(spec, seq_len=33)
    expected = results(stack, x, grad)
    before = backfuse.apply(stack, plan)
    assert before == ([KEEP] * LAYERS, [1] * LAYERS)
    assert stack.policies == list(plan.policies) and stack.segments == list(plan.segments)
    assert same_bits(results(stack, x, grad), expected)
    angles = None
    if spec.rope is not None:
        angles = rope_cos_sin(torch.arange(33)[None], spec.rotary_dim, layout=spec.rope)
    held, y = held_bytes(
        lambda: stack(x, position_embeddings=angles), exclude=[*stack.parameters(), *(angles or ())]
    )
    parcels = line(torch.device("cpu"), None).parcels
    likes = [like for parcel in parcels for like in parcel.likes.values()]
    assert held == plan.kept_bytes
    assert sum(like.numel() * like.element_size() for like in likes) == plan.host_bytes
    assert (plan.host_bytes > 0) == any(policy.offloads for policy in plan.policies)
    del y, parcels
    assert plan.kept_bytes <= (plan.budget or plan.kept_bytes)
    assert plan.kept_bytes <= plan.peak_bytes
    stack.set_policy(*before)
    assert stack.policies == [KEEP] * LAYERS and stack.segments == [1] * LAYERS


def test_a_segment_keeps_its_input_where_no_block_would():
    spec = FAMILIES["llama"]
    plan = make_plan(strategy="recursive", requires_grad=["mlp.down_proj.weight"])
    stack = BlockStack(spec, LAYERS, chunk_size=64)
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_(name.endswith("down_proj.weight"))
    backfuse.apply(stack, plan)
    x, _ = make_input(spec, seq_len=33)
    angles = rope_cos_sin(torch.arange(33)[None], spec.rotary_dim)
    held, _ = held_bytes(
        lambda: stack(x, position_embeddings=angles), exclude=[*stack.parameters(), *angles]
    )
    assert held == plan.kept_bytes
    frozen = make_plan(strategy="sqrt", requires_grad=False)
    assert frozen.kept_bytes == frozen.host_bytes == 0 and frozen.overhead == 0


def test_segments_take_what_their_passes_take():
    """Two segments of three, by hand: two layers of each run again, two inputs are rebuilt."""
    plan = make_plan(strategy="uniform", allow=("recompute",)).within(
        budget=make_plan(strategy="sqrt").kept_bytes - 1
    )
    full = layer_choice(FAMILIES["llama"], NAMED_POLICIES["full"], **SIZES)
    assert plan.segments == (3, 3)
    assert plan.seconds == pytest.approx(6 * full.seconds + 4 * full.forward)
    x = 2 * 33 * 32 * 4
    assert plan.kept_bytes == 6 * (full.kept - x) + 2 * x
    assert plan.peak_bytes == plan.kept_bytes + full.transient + 2 * x


@pytest.mark.parametrize("strategy", ["optimal", "uniform"])
@pytest.mark.parametrize("name", ["budget", "peak_budget"])
def test_more_budget_never_costs_more(strategy, name):
    last = float("inf")
    for part in range(1, 21):
        limit = part * 5 * 2**30
        plan = big_plan(strategy=strategy, **{name: limit})
        held = plan.kept_bytes if name == "budget" else plan.peak_bytes
        assert held <= limit and plan.overhead <= last * (1 + GAP) + GAP
        last = plan.overhead
    free = big_plan(strategy=strategy).overhead
    assert last == pytest.approx(free) and (strategy == "uniform" or abs(free) < 1e-12)


def test_it_says_what_it_does():
    plan = big_plan(budget="20GiB", host_budget="8 GiB")
    frame = plan.to_frame()
    assert frame["layers"].sum() == 32 == frame["last"].iloc[-1] + 1
    assert (frame["first"].iloc[1:].values == frame["last"].iloc[:-1].values + 1).all()
    assert frame["kept_bytes"].sum() == plan.kept_bytes <= 20 * 2**30
    assert frame["host_bytes"].sum() == plan.host_bytes <= 8 * 2**30
    text = plan.explain()
    for words in ("32 layers on h200", "preact is recomputed in", "next: ", "The copies hide"):
        assert words in text
    assert "Nothing is left" in big_plan(strategy="recursive").explain()
    assert "16 of 32 layers keep x" in big_plan(strategy="uniform", budget="5GiB").explain()


# Files


def test_a_file_holds_it_all(tmp_path):
    for plan in (make_plan(share=0.5), make_plan("gemma2", strategy="recursive")):
        path = tmp_path / "plan.json"
        plan.save(path)
        again = Plan.load(path)
        assert again == plan and again.seconds == plan.seconds
        assert again.spec.given == plan.spec.given and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="gone"):
        plan.save(tmp_path / "gone" / "plan.json")


def damaged(change):
    def damage(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged plan"),
        (lambda text: "", "damaged plan"),
        (lambda text: "[]", "the file holds a list, expected an object"),
        (lambda text: "[" * 100_000, "damaged plan"),
        (damaged(lambda c: c.update(format=1)), "format is 1, expected 2"),
        (damaged(lambda c: c.pop("device")), "'device' is missing"),
        (damaged(lambda c: c["policies"].pop()), "6 specs, 6 requires_grad and 5 policies"),
        (damaged(lambda c: c["policies"][0].update(qkv="drop")), "the action of qkv is 'drop'"),
        (damaged(lambda c: c["kinds"][0]["spec"].update(hidden_size=33)), "hidden_size is 33"),
        (damaged(lambda c: c.update(kept_bytes=c["kept_bytes"] + 1)), "kept_bytes is .* expected"),
        (damaged(lambda c: c.update(seconds="long")), "damaged plan"),
        (damaged(lambda c: c.update(seq_len=34)), "kept_bytes is"),
        (damaged(lambda c: c.update(strategy="best")), "strategy is 'best'"),
        (damaged(lambda c: c.update(budget=-1)), "budget is -1"),
        (damaged(lambda c: c["device"].update(matmul_flops=0)), "damaged plan"),
        (damaged(lambda c: c.update(segments=[3, 3])), "the segment 3 has other policies"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(damage, message, tmp_path):
    path = tmp_path / "plan.json"
    make_plan(share=0.5).save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message) as error:
        Plan.load(path)
    assert str(path) in str(error.value)


# Mistakes


@pytest.mark.parametrize(
    ("spec", "layers", "message"),
    [
        (FAMILIES["llama"], 5, "the plan has 6 layers, expected 5"),
        (FAMILIES["qwen3"], 6, "the plan's head_dim is 8, expected 12, as layers.0 has it"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(spec, layers, message):
    stack = BlockStack(spec, layers, "lean", segments=2)
    before = stack.policies, stack.segments
    with pytest.raises(ValueError, match=message):
        backfuse.apply(stack, make_plan(share=0.5))
    assert (stack.policies, stack.segments) == before
    with pytest.raises(TypeError, match="plan is a str"):
        backfuse.apply(stack, "lean")
    with pytest.raises(TypeError, match="model is a BlockSpec"):
        backfuse.apply(spec, make_plan(share=0.5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "40 gigs"}, ValueError, "budget is '40 gigs', expected bytes such as 40GiB"),
        ({"budget": -1}, ValueError, "budget is -1"),
        ({"peak_budget": "-1GiB"}, ValueError, "peak_budget is '-1GiB'"),
        ({"host_budget": 1.5}, TypeError, "host_budget is 1.5"),
        ({"strategy": "optimum"}, ValueError, "strategy is 'optimum'.*did you mean 'optimal'"),
        ({"allow": ("ofload",)}, ValueError, "did you mean 'offload'"),
        ({"allow": "offload"}, TypeError, "allow is 'offload', expected a collection"),
        ({"strategy": "sqrt", "allow": ()}, ValueError, "expected 'recompute' among it"),
        ({"device": "h20"}, ValueError, "device is 'h20'.*did you mean 'h200'"),
        ({"num_layers": 0}, ValueError, "num_layers is 0"),
        ({"seq_len": 0}, ValueError, "seq_len is 0"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype is torch.bfloat16"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        backfuse.plan(FAMILIES["llama"], **{"num_layers": 2, **SIZES, **options})


def test_what_is_neither_a_model_nor_a_spec():
    with pytest.raises(TypeError, match="model_or_spec is a str, expected a live model"):
        backfuse.plan("llama-3-8b", num_layers=2, **SIZES)


@pytest.mark.parametrize("strategy", ["optimal", "uniform", "sqrt", "recursive"])
@pytest.mark.parametrize("name", ["budget", "peak_budget"])
def test_the_least_budget_is_one_that_can_be_met(strategy, name):
    with pytest.raises(BudgetError, match=f"^{name} is 1 bytes") as error:
        make_plan(strategy=strategy, **{name: 1})
    least = error.value.least
    plan = make_plan(strategy=strategy, **{name: least})
    assert (plan.kept_bytes if name == "budget" else plan.peak_bytes) == least
    with pytest.raises(BudgetError):
        make_plan(strategy=strategy, **{name: least - 1})


def test_bytes_as_people_write_them():
    told = {"40GiB": 40 * 2**30, "40GB": 40 * 10**9, "512 mib": 2**29, "7": 7, "1.5KiB": 1536}
    assert {text: parse_bytes("budget", text) for text in told} == told
    for text in ("", "GiB", "4e9", "inf", "nan", "1,5GiB", "40G", "٤GiB"):
        with pytest.raises(ValueError, match="budget is"):
            parse_bytes("budget", text)
    with pytest.raises(TypeError, match="budget is True"):
        parse_bytes("budget", True)
    assert [format_bytes(n) for n in (0, 1023, 1536)] == ["0 B", "1,023 B", "1.50 KiB"]


def test_a_derived_field_is_derived_again():
    spec = BlockSpec(32, 48, 4, hidden_act="gelu_new")
    assert BlockSpec(**spec.given) == spec and "head_dim" not in spec.given
    assert dataclasses.fields(spec)[0].name in spec.given


# The command

COMMAND = ["plan", "--layers", "8", "--seq-len", "2048", "--device", "h200"]
SHAPE = ["--shape", "llama-3.2-1b"]


def test_the_command_shows_saves_and_draws(tmp_path, capsys, monkeypatch):
    labels = []
    told = frontier.label_points

    def label_points(figure, axes, points, lines):
        told(figure, axes, points, lines)
        figure.canvas.draw()
        frame = axes.get_window_extent()
        texts = [text for text in axes.texts if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        assert all(frame.contains(*corner) for box in boxes for corner in (box.min, box.max))
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        labels.extend(name for text in texts for name in text.get_text().split(", "))

    monkeypatch.setattr(frontier, "label_points", label_points)
    path, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    files = ["--json", str(path), "--plot", str(picture)]
    assert cli.main([*COMMAND, *SHAPE, "--budget", "200MiB", *files]) == 0
    out = capsys.readouterr().out
    plan = Plan.load(path)
    assert plan.budget == 200 * 2**20 and plan.num_layers == 8 and plan.device.name == "h200"
    assert plan.explain() in out and "attn_out" in out.splitlines()[0]
    assert "budget of 100.00 MiB: " in out and "budget of 400.00 MiB: " in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    rivals = {f"checkpoint{every}" for every in ("", " every 2", " every 4")}
    strategies = {"uniform 2", "uniform 4", "sqrt", "recursive", "strategy chain"}
    assert {*NAMED_POLICIES, *rivals, *strategies, "strategy selective", "this plan"} == set(labels)
    assert len(set(labels)) == len(labels) and "-0.00%" not in out


def test_the_command_takes_sizes_and_strategies(capsys):
    sizes = ["--hidden-size", "512", "--intermediate-size", "1408", "--num-attention-heads", "8"]
    peak = ["--strategy", "uniform", "--peak-budget", "24MiB"]
    assert cli.main([*COMMAND, *sizes, *peak]) == 0
    out = capsys.readouterr().out
    assert "segment" in out.splitlines()[0]
    assert "peak_budget of 12.00 MiB: cannot be met: the least is" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "llama-3-8"], "did you mean 'llama-3-8b'"),
        ([], "expected either the name of a shape or hidden_size"),
        ([*SHAPE, "--hidden-size", "8"], "expected either"),
        ([*SHAPE, "--budget", "1KiB"], "budget is 1,024 bytes, expected at least"),
        ([*SHAPE, "--budget", "lots"], "budget is 'lots'"),
        ([*SHAPE, "--strategy", "chains"], "strategy is 'chains', expected one of 'optimal'"),
        ([*SHAPE, "--allow", "offlod"], "did you mean 'offload'"),
        ([*SHAPE, "--dtype", "fp8"], "dtype is 'fp8'"),
        ([*SHAPE, "--json", "/nowhere/plan.json"], "/nowhere/plan.json"),
    ],
)
def test_the_command_says_mistakes_in_one_line(args, message, capsys):
    assert cli.main([*COMMAND, *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


CONFIG = {
    "model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 500,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 8,
    "sliding_window": 64, "tie_word_embeddings": True,
}  # fmt: skip


def test_the_command_takes_a_configuration(tmp_path, capsys):
    pytest.importorskip("transformers")
    config, path, picture = (tmp_path / name for name in ("config.json", "plan.json", "plan.png"))
    config.write_text(json.dumps(CONFIG))
    command = ["plan", "--config", str(config), "--seq-len", "256", "--device", "h200"]
    options = ["--peak-budget", "12MiB", "--optimizer", "sgd", "--json", str(path)]
    assert cli.main([*command, *options, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    plan = Plan.load(path)
    assert plan.num_layers == 8 and len(plan.kinds) == 2 and plan.peak_bytes <= 12 * 2**20
    assert plan.model == backfuse.ModelSpec(500, tied=True, optimizer="sgd")
    assert "Bytes of a step: start" in out and plan.explain() in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        ("{", [], "config.json is no Hugging Face configuration"),
        ("[]", [], "config.json is no Hugging Face configuration"),
        ('{"model_type": "t5"}', [], "expected one of"),
        (json.dumps(CONFIG), SHAPE, "config is given with a shape or sizes"),
        (json.dumps(CONFIG), ["--world-size", "0"], "world_size is 0"),
        (None, [*SHAPE, "--layers", "2", "--tied"], "tied is given without a vocab_size"),
        (None, SHAPE, "layers is None, expected --layers"),
    ],
)
def test_the_command_refuses_configurations_in_one_line(content, args, message, tmp_path, capsys):
    pytest.importorskip("transformers")
    command = ["plan", "--seq-len", "256", "--device", "h200"]
    if content is not None:
        (tmp_path / "config.json").write_text(content)
        command += ["--config", str(tmp_path / "config.json")]
    assert cli.main([*command, *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
