"""examples/pretrain_data.py: what is read is what was written, and damage is noticed."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import pretrain_data

    return pretrain_data


def draw(tokens, split="train", count=200, seq_len=5):
    return tokens.pieces(split, count, seq_len, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_shards(data, tmp_path, dtype):
    """Every window of every shard is drawn, none crosses shards, the last is kept apart."""
    parts = [np.arange(0, 30), np.arange(100, 106), np.arange(200, 204), np.arange(300, 330)]
    for index, part in enumerate(parts):
        part.astype(dtype).tofile(tmp_path / f"{index}.bin")
    tokens = data.load(str(tmp_path), 5, vocabulary=1000, token_dtype=dtype)
    pieces = draw(tokens, count=500)
    assert pieces.shape == (500, 6) and pieces.dtype == torch.int64
    assert (pieces.diff() == 1).all()
    assert set(pieces[:, 0].tolist()) == {*range(25), 100}
    assert set(draw(tokens, "validation", 500)[:, 0].tolist()) == set(range(300, 325))
    assert torch.equal(pieces, draw(tokens, count=500))
    assert isinstance(tokens.train[0], np.memmap)


def test_one_shard_and_its_fingerprint(data, tmp_path):
    ids = np.arange(400, dtype="<u2")
    ids.tofile(tmp_path / "a.bin")
    tokens = data.load(str(tmp_path), 5, vocabulary=400)
    assert len(tokens.train[0]) == 380 and len(tokens.validation[0]) == 20
    alone = data.load(str(tmp_path / "a.bin"), 5, vocabulary=400)
    assert alone.fingerprint == tokens.fingerprint and torch.equal(draw(alone), draw(tokens))
    with pytest.raises(ValueError, match="b.bin, which cannot be read: No such file"):
        data.load(str(tmp_path / "b.bin"), 5, vocabulary=400)
    ids[0] += 1
    ids.tofile(tmp_path / "a.bin")
    assert data.load(str(tmp_path), 5, vocabulary=400).fingerprint != tokens.fingerprint


def test_the_fingerprint_sees_the_middle(data, tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        ids = np.zeros(30_000, dtype="<u2")
        ids[5_000:25_000] = np.random.default_rng(seed).integers(0, 400, 20_000)
        (tmp_path / name).mkdir()
        ids.tofile(tmp_path / name / "a.bin")
    one, other = (data.load(str(tmp_path / n), 5, vocabulary=400) for n in ("one", "other"))
    assert one.fingerprint != other.fingerprint


def with_header(ids, count=None, version=1, magic=20240520, dtype="<u2"):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + ids.astype(dtype).tobytes()


@pytest.mark.parametrize(
    "kind", [{}, {"magic": 20240801, "version": 7, "dtype": "<u4"}], ids=["gpt-2", "llama-3"]
)
def test_header(data, tmp_path, kind):
    ids = np.arange(100)
    (tmp_path / "a.bin").write_bytes(with_header(ids, **kind))
    tokens = data.load(str(tmp_path), 5, vocabulary=70000)
    assert np.array_equal(np.concatenate([tokens.train[0], tokens.validation[0]]), ids)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "a.bin is 0 bytes, expected a positive multiple of 2"),
        (b"abc", {}, "a.bin is 3 bytes, expected a positive multiple of 2.*truncated"),
        (b"ab" * 33, {"token_dtype": "uint32"}, "66 bytes, expected a positive multiple of 4"),
        (with_header(np.arange(100))[:-2], {}, "1222 bytes .* expected 1224 .*truncated"),
        (with_header(np.arange(100), version=9), {}, "version 9"),
        (with_header(np.arange(100), count=-5), {}, "expected 1014"),
        (with_header(np.arange(100))[:700], {}, "700 bytes .* expected 1224"),
        (with_header(np.arange(100), magic=20240801), {}, "expected 1424 .version 7"),
        (with_header(np.arange(100), magic=20240521), {}, "begins with 20240521 and zeros"),
        (with_header(np.arange(100), magic=0), {}, "begins with 0 and zeros.*: damaged"),
        (np.arange(8, dtype="<u2").tobytes(), {}, "shard to train on has 2 tokens, expected at"),
        (b"ab" * 50, {"vocabulary": 65537}, "65537, .* uint16 can.*expected --token-dtype uint32"),
        (b"ab" * 50, {"vocabulary": 0}, "vocabulary is 0, expected the number of ids"),
        (b"ab" * 50, {"token_dtype": "int8"}, "token_dtype is 'int8'"),
    ],
)
def test_damaged_shards(data, tmp_path, content, options, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path), 5, **{"vocabulary": 65536, **options})


def test_ids_outside_the_vocabulary(data, tmp_path):
    np.arange(400, dtype="<u2").tofile(tmp_path / "a.bin")
    tokens = data.load(str(tmp_path), 5, vocabulary=10)
    with pytest.raises(ValueError, match=r"holds the token \d+, expected ids below .* \(10\)"):
        draw(tokens)


def test_a_folder_without_shards(data, tmp_path):
    with pytest.raises(ValueError, match="holds no .bin files"):
        data.load(str(tmp_path), 5, vocabulary=10)


class Rows(dict):
    column_names = ["text"]


def test_dataset(data, monkeypatch):
    """A stand-in for the package: its texts' bytes, and a 0 after each."""
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return Rows(text=["one", "zwölf"] * 20)

    stand_in = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    tokens = data.load("hf:some/texts", 5)
    assert asked == [("some/texts", "train")] and tokens.vocabulary == 256
    assert bytes(tokens.train[0][:11]) == b"one\0" + "zwölf".encode() + b"\0"
    with pytest.raises(ValueError, match=r"expected a column body among \['text'\]"):
        data.load("hf:some/texts:body", 5)
    with pytest.raises(ValueError, match="expected 402"):
        data.load("hf:some/texts", 200)
