"""`backfuse bench long`: everybody computes the same, slopes are what the memory model says."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from backfuse import BlockSpec, cli, kept_bytes
from backfuse.bench import long, operations, registry, rows, shapes
from backfuse.bench.problem import Case, Step

TINY = BlockSpec(32, 96, 2, head_dim=16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, quick_collector):
    monkeypatch.setitem(shapes.ALL_SHAPES, "tiny", TINY)
    monkeypatch.setitem(long.CHUNK_SIZE, "cpu", 64)


def test_everybody_computes_the_same(tmp_path):
    case = Case("long", "tiny", TINY, 4, 1, 160, "fp64", "cpu")
    torch.manual_seed(0)
    step = Step(operations.stack(case))
    eager = registry.OPERATIONS["stack"].providers["eager"].make(step.problem, "")
    expected = step.results(eager, step(eager))
    who = {n: p for n, p in long.providers(tmp_path).items() if not p.missing(case)}
    assert {"checkpoint", "checkpoint-on-cpu", "checkpoint-on-cpu-tiled", "backfuse"} <= set(who)
    for provider in who.values():
        for policy in provider.policies:
            contender = provider.make(step.problem, policy)
            torch.testing.assert_close(step.results(contender, step(contender)), expected)
    assert not list(tmp_path.iterdir())  # the files have no names


def test_what_is_saved_away_is_not_on_the_device(tmp_path):
    case = Case("long", "tiny", TINY, 4, 1, 160, "fp32", "cpu")
    step = Step(operations.stack(case))
    kept = {}
    for name in ("checkpoint", "checkpoint-on-cpu"):
        contender = long.providers(tmp_path)[name].make(step.problem, "")
        step.examine(contender, None)
        kept[name] = contender.kept_bytes
    x = 160 * TINY.hidden_size * 4
    assert kept["checkpoint"] - kept["checkpoint-on-cpu"] == 4 * x


def test_a_tile_of_deepspeeds_and_ligers(monkeypatch, tmp_path):
    """Their functions are called on the shared weights, as their documentation does."""
    case = Case("long", "tiny", TINY, 2, 1, 160, "fp32", "cpu")
    problem = operations.stack(case)
    seen = []

    class TiledMLP:
        @staticmethod
        def apply(call, mlp, x, tiles, parameters):
            seen.append((mlp, tiles, parameters))
            return torch.cat([call(mlp, tile) for tile in x.chunk(tiles, dim=1)], dim=1)

    module = type("module", (), {"TiledMLP": TiledMLP})
    monkeypatch.setattr(long.importlib, "import_module", lambda name: module)
    step = Step(problem)
    contender = long.providers(tmp_path)["deepspeed-tiled"].make(problem, "")
    step(contender)
    mlp, tiles, parameters = seen[0]
    assert mlp is problem.module.layers[0].mlp
    assert tiles == 5 and all(p is q for p, q in zip(parameters, mlp.parameters(), strict=True))


def test_slopes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(long.CHUNK_SIZE, "cpu", 256)
    path = tmp_path / "new" / "long.csv"
    picture = path.with_suffix(".png")
    args = ["bench", "long", "--shape", "tiny", "--tokens", "1024,2048", "--layers", "4,5"]
    args += ["--device", "cpu", "--csv", str(path), "--plot", str(picture)]
    assert cli.main(args) == 0
    said = capsys.readouterr().out
    assert "deepspeed" in said and "liger" in said and "B/token, layer" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = rows.read([path])
    found = long.slopes(table).set_index(["provider", "policy"])
    ours = found.loc["backfuse-reference"]
    sizes = {"batch_size": 1, "seq_len": 1024}
    for policy in long.POLICIES:
        expected = sum(kept_bytes(TINY, policy, **sizes).values()) / 1024
        assert ours.loc[policy, "kept_per_layer"] == pytest.approx(expected, abs=0.01)
    checkpoint = found.loc[("checkpoint", "")]
    for policy in ("full", "lean"):  # the peak is where everything is kept still
        kept = ours.loc[policy, "kept_per_layer"]
        assert ours.loc[policy, "per_layer"] == pytest.approx(kept, abs=0.01)
    assert ours.loc["offload", "per_layer"] < 0.25 * checkpoint["per_layer"]
    at = {name: one["once"] + 5 * one["per_layer"] for name, one in ours.iterrows()}
    assert max(at.values()) < checkpoint["once"] + 5 * checkpoint["per_layer"]
    # all is there: nothing is measured again, and shown all the same
    assert cli.main(args) == 0
    assert said.splitlines()[3:] == capsys.readouterr().out.splitlines()[3:]
    assert len(rows.read([path])) == len(table)


def test_slopes_of_known_numbers():
    grid = [(t, n) for t in (3, 5, 9) for n in (2, 7)]
    table = pd.DataFrame(grid, columns=["tokens", "layers"]).assign(provider="a", policy="")
    table["peak_bytes"] = 11 + 2 * table.layers + 5 * table.tokens + 3 * table.tokens * table.layers
    table["kept_bytes"] = 7 * table.tokens * table.layers
    [one] = long.slopes(table).to_dict("records")
    assert one["once"] == pytest.approx(5) and one["per_layer"] == pytest.approx(3)
    assert one["kept_per_layer"] == pytest.approx(7)
    extra = table.iloc[-1:].assign(tokens=99, peak_bytes=0)  # at one depth only: in no slope
    [again] = long.slopes(pd.concat([table, extra])).to_dict("records")
    assert again == one
    assert long.slopes(table[table["layers"] == 2]).empty  # one number of layers: no slope
    assert "too little" in long.text(table[table["layers"] == 2])
    assert set(long.of_one_depth(table)["layers"]) == {7}  # and where one was not measured
    assert set(long.of_one_depth(table.drop(index=5))["layers"]) == {2}


def test_the_documentation_shows_what_was_measured():
    root = Path(__file__).parents[1]
    table = rows.read([root / "bench" / "results" / "cpu" / "long.csv"])
    assert f"```\n{long.text(table)}\n```" in (root / "docs" / "plan.md").read_text("utf-8")


def test_what_fails_is_a_row(monkeypatch, tmp_path, capsys):
    def fail(problem, policy, **options):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(long.own, "stack", fail)
    args = ["--shape", "tiny", "--tokens", "64,128", "--layers", "1,2", "--device", "cpu"]
    path = tmp_path / "long.csv"
    assert cli.main(["bench", "long", *args, "--provider", "backfuse", "--csv", str(path)]) == 1
    assert set(rows.read([path])["note"]) == {"RuntimeError: on purpose"}
    assert "nothing was measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "small-51"], "did you mean 'small-512'"),
        (["--provider", "chekpoint"], "did you mean 'checkpoint'"),
        (["--dtype", "fp33"], "did you mean 'fp32'"),
        (["--layers", "4"], "layers is 4, expected two different numbers"),
        (["--layers", "0,4"], "layers is 0, expected at least 1"),
        (["--tokens", "4k"], "tokens is 4096, expected two different numbers"),
        (["--tokens", "4x,8k"], "tokens is '4x,8k'"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--plot", "/proc/nowhere/a.png"], "/proc/nowhere"),
    ],
)
def test_mistakes_in_one_line(args, message, capsys):
    assert cli.main(["bench", "long", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
