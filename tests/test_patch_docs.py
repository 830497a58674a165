"""docs/patch.md and examples/vit.py say and do what is true."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import transformers
from tiny_models import FUSED, HALF, make_model

from backfuse import patch

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "patch.md").read_text(encoding="utf-8")


def test_the_table_of_families_is_what_patch_reports():
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (the block|the attention half) \|$", PAGE, re.M)
    found = []
    for family in sorted([*FUSED, *HALF]):
        report = patch(make_model(family))
        kinds = {(row.kind, row.status) for row in report}
        assert len(kinds) == 1
        kind, status = kinds.pop()
        found.append((family, kind, {"fused": "the block", "half": "the attention half"}[status]))
    assert rows == found


def test_the_version_is_the_one_that_is_tested():
    version = re.search(r"Tested families, transformers ([\d.]+),", PAGE)[1]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"transformers=={version}; python_version >= " in pins
    if sys.version_info >= (3, 11):
        assert transformers.__version__ == version


def test_the_vision_transformer_learns_the_same(capsys):
    pytest.importorskip("sklearn")
    place = ROOT / "examples" / "vit.py"
    spec = importlib.util.spec_from_file_location("vit_example", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain, patched = module.main(["--steps", "12", "--policy", "lean"])
    assert patched[-1] < 0.3 * plain[-1]  # held bytes
    assert abs(patched[1] - plain[1]) < 1e-3 * plain[1] < 2.5  # loss
    text = capsys.readouterr().out
    assert "vit.layers.0 to 3  ViTLayer  fused  Policy(lean" in text and "accuracy" in text
    with pytest.raises(ValueError, match="steps is 0"):
        module.main(["--steps", "0"])
