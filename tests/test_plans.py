"""`backfuse bench plans`: what counts meets its budget, and plans with equal bytes are the same."""

import pandas as pd
import pytest

from backfuse import cli


def test_everything_that_is_timed_meets_its_budget(tmp_path, capsys, monkeypatch):
    sizes = ["--layers", "3", "--seq-len", "32", "--budgets", "3", "--rounds", "1"]
    from backfuse.bench import plans
    from backfuse.bench.shapes import SMALL_SHAPES

    monkeypatch.setitem(plans.ALL_SHAPES, "tiny", type(SMALL_SHAPES["small-512"])(64, 96, 4))
    assert cli.main(["bench", "plans", "--shape", "tiny", *sizes, "--out", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "plans.csv")
    assert rows["budget"].nunique() == 3 and (rows["kept_bytes"] <= rows["budget"]).all()
    most = rows[rows["budget"] == rows["budget"].max()].set_index("contender")["kept_bytes"]
    least = rows[rows["budget"] == rows["budget"].min()].set_index("contender")["kept_bytes"]
    assert most["optimal"] == rows["budget"].max() and least["optimal"] == rows["budget"].min()
    assert {"checkpoint", "uniform", "sqrt", "chain"} <= set(least.index)
    assert most.filter(like="checkpoint").iloc[0] > least["checkpoint"]
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")
    assert ": optimal takes " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "small-51"], "did you mean 'small-512'"),
        (["--layers", "0"], "layers is 0"),
        (["--budgets", "-1"], "budgets is -1"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_mistakes_in_one_line(args, message, capsys):
    assert cli.main(["bench", "plans", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
