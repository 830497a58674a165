"""bench/overhead.py: the stubs count what a pass launches, and leave everything as it was."""

import pandas as pd
import pytest
import torch
from conftest import DEVICE

from backfuse.bench import overhead
from backfuse.cli import main
from backfuse.kernels import ffn_up, norm
from backfuse.kernels.weight_grad import library_accumulates


def test_counts_of_the_ffn_half():
    table = overhead.measure(torch.device(DEVICE), 3).set_index("pass")
    library = library_accumulates(torch.empty(0, device=DEVICE))
    # weight gradients of gate, up and down: the library's GEMMs on CUDA, else kernels
    kernels, gemms = (0, 3) if library else (3, 0)
    keep, selective = table.loc["ffn keep"], table.loc["ffn selective"]
    assert (keep.forward_kernels, keep.forward_gemms) == (2, 1)  # norm, gate and up; down
    assert (keep.backward_kernels, keep.backward_gemms) == (2 + kernels, 2 + gemms)
    assert selective.backward_kernels == keep.backward_kernels + 1  # the norm again
    assert (table.loc[["empty function", "tensors of ffn"], "forward_kernels":] == 0).all(axis=None)
    # a whole block launches what its halves do
    parts = [c for c in table if c.endswith(("kernels", "gemms"))]
    halves = table.loc["ffn keep", parts] + table.loc["attention keep", parts]
    assert (table.loc["block keep", parts] == halves).all()


def test_everything_is_put_back():
    before = ffn_up.ffn_up_kernel, norm.norm_forward_kernel, torch.mm, torch.addmm
    with pytest.raises(RuntimeError, match="on purpose"), overhead.launches_stubbed():
        assert torch.mm is not before[2]
        raise RuntimeError("on purpose")
    assert before == (ffn_up.ffn_up_kernel, norm.norm_forward_kernel, torch.mm, torch.addmm)


def test_command(tmp_path, capsys):
    path = tmp_path / "new" / "overhead.csv"
    command = ["bench", "overhead", "--device", DEVICE]
    assert main([*command, "--repeats", "5", "--csv", str(path)]) == 0
    table = pd.read_csv(path)
    assert (table.forward_us > 0).all() and "ffn selective" in capsys.readouterr().out
    assert main([*command, "--repeats", "0"]) == 2
    assert "repeats is 0, expected at least 1" in capsys.readouterr().err
