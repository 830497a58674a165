"""docs/performance.md: its tables are those that the command makes today, and they are right."""

import re
from pathlib import Path

import pytest

from backfuse import cli
from backfuse.bench import performance
from backfuse.bench.frontier import Setting, draw
from backfuse.bench.performance import FUSED, MODELS, SETTINGS, TABLES, UNMEASURED, fill
from backfuse.bench.shapes import SHAPES
from backfuse.blocks.costs import block_costs

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"


def cells(table):
    """Rows of a table, header first."""
    lines = table.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in
            line]  # fmt: skip


def test_the_document_is_not_stale():
    text = DOCUMENT.read_text("utf-8")
    assert fill(text) == text, "backfuse bench performance --write docs/performance.md"


def test_the_picture_is_there():
    names = re.findall(r"!\[[^]]*\]\(([^)]+)\)", DOCUMENT.read_text("utf-8"))
    assert names == ["frontier.png"] and (DOCUMENT.parent / names[0]).exists()


@pytest.mark.parametrize("name", sorted(set(TABLES) - {"cpu"}))
def test_modelled_and_measured_stand_apart(name):
    """Every table that models a GPU ends in a column of measurements, of which there are none."""
    head, *rows = cells(TABLES[name]())
    assert "measured" in head[-1] and {row[-1] for row in rows} == {UNMEASURED}
    assert len({len(row) for row in (head, *rows)}) == 1


def test_shares_add_up_to_the_step():
    _, *rows = cells(TABLES["shares"]())
    for column in (5, 7):
        kept = [float(row[column].strip("%")) for row in rows if row[0] != "recompute"]
        assert sum(kept) == pytest.approx(100, abs=0.6)
    again = [float(row[4]) for row in rows if row[0] == "recompute"]
    full = block_costs(SHAPES["llama-3-8b"], "full", batch_size=1, seq_len=8192, device="h200")
    assert sum(again) == pytest.approx(1e3 * full.recompute, abs=0.005)


def test_what_fusing_spares_by_hand():
    spec = SHAPES["llama-3-8b"]
    assert [count(spec) for count in FUSED.values()] == [
        2 * 28672, 2 * 14336 + 28672, 2 * 28672, 4 * 4096, 6 * 4096,
    ]  # fmt: skip


def test_the_frontier_is_under_the_policies_and_falls_with_bytes():
    for setting in SETTINGS:
        choices = setting.choices(("recompute", "offload"))
        extra = [setting.mix(choices, kib).overhead for kib in (1, 8, 16, 64, 181)]
        assert extra == sorted(extra, reverse=True) and extra[-1] == pytest.approx(0, abs=1e-9)
        for policy in ("selective", "lean", "full", "offload"):
            kib, cost = setting.policy(policy)
            assert setting.mix(choices, kib + 1e-3).overhead <= cost + 1e-9
        assert setting.mix(setting.choices(()), 1) is None


def test_an_offload_that_does_not_hide_is_waited_for():
    setting = Setting("llama-3.2-1b", 2048, "b200")
    own, keep = (
        block_costs(
            SHAPES[setting.shape], policy, batch_size=1, seq_len=2048, device=setting.device
        )
        for policy in ("offload", "keep")
    )
    assert own.forward < own.link < own.backward
    waited = own.link + own.recompute + own.backward
    assert setting.policy("offload")[1] == pytest.approx(waited / keep.step - 1)


def test_the_command_prints_writes_and_draws(tmp_path, monkeypatch, capsys):
    few = {"devices": TABLES["devices"]}
    monkeypatch.setattr(performance, "TABLES", few)
    assert cli.main(["bench", "performance"]) == 0
    assert "| h200 | 989 |" in capsys.readouterr().out
    document = tmp_path / "new.md"
    document.write_text("before\n<!-- devices -->\nold\n<!-- end -->\nafter\n")
    assert cli.main(["bench", "performance", "--write", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- devices -->\n| device |") and "old" not in text
    assert text.endswith("<!-- end -->\nafter\n")
    picture = tmp_path / "frontier.png"
    draw([Setting("llama-3.2-1b", 1024, "a100")], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "the document has the tables none, expected each of devices, floors"),
        ("<!-- devises -->\n<!-- end -->\n", "the document has the tables devises"),
    ],
)
def test_a_document_without_its_markers_is_refused(text, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        fill(text)
    path = tmp_path / "other.md"
    path.write_text(text)
    assert cli.main(["bench", "performance", "--write", str(path)]) == 2
    assert message in capsys.readouterr().err and path.read_text() == text


def test_models_are_shapes():
    assert set(MODELS) <= set(SHAPES) and {setting.shape for setting in SETTINGS} <= set(SHAPES)
