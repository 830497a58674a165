"""kernels/tuning.py and bench/tune*.py: what is measured is kept, checked, and used."""

import itertools
import json

import pytest
import torch
from conftest import DEVICE
from stand_ins import CORES, forget, install

from backfuse.bench import tune as module
from backfuse.bench import tune_attention
from backfuse.bench.shapes import SHAPES
from backfuse.bench.tune import frame, run, tune, tune_cores
from backfuse.cli import main
from backfuse.kernels import ffn_recompute, tuning
from backfuse.kernels.configs import CONFIGS, Config, architecture, choose
from backfuse.kernels.cores.prototypes import FA3, FA4
from backfuse.kernels.tuning import (
    Shape,
    Tuning,
    attention_times,
    cache_file,
    config_for,
    save,
    strategy_for,
)

PLACE = torch.device(DEVICE)
SHAPE = Shape(64, 128, True, torch.float32)
X = torch.zeros(4, 64, device=DEVICE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKFUSE_CACHE", str(tmp_path / "cache"))
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


def some(kernel, index=-2):
    return CONFIGS[kernel]["gfx942"][index]


def test_defaults_need_no_file(cache):
    assert strategy_for(X, 128, True) == "split"
    assert config_for("ffn_up", X, 128, True) == choose("ffn_up", architecture(PLACE), 4, True)
    assert not cache.exists()


def test_a_record_is_used_for_its_shape_only():
    best = Tuning("fused", {"ffn_up": some("ffn_up")})
    save(SHAPE, PLACE, best)
    other = Shape(64, 256, True, torch.float32)
    save(other, PLACE, Tuning())
    assert strategy_for(X, 128, True) == "fused" and strategy_for(X, 256, True) == "split"
    assert strategy_for(X, 128, False) == "split" and strategy_for(X.half(), 128, True) == "split"
    assert config_for("ffn_up", X, 128, True) == some("ffn_up")
    assert config_for("ffn_dact", X, 128, True) == choose("ffn_dact", architecture(PLACE), 4)
    # an eight-bit pre-activation needs 128 columns a tile, which this one has not
    assert some("ffn_up").block_n != 128
    assert config_for("ffn_up", X, 128, True, 128).block_n == 128


def test_the_strategy_that_was_measured_runs(monkeypatch):
    calls = []
    monkeypatch.setattr(ffn_recompute, "ffn_up", lambda *a, **k: calls.append("split"))
    monkeypatch.setattr(ffn_recompute, "ffn_dact", lambda *a, **k: (None, None))
    weights = [torch.zeros(128, 64, device=DEVICE)] * 2
    out = torch.empty(4, 256, device=DEVICE)
    arguments = (X, weights, [None, None], "silu", True, X, weights[0].T.contiguous(), out)
    ffn_recompute.ffn_recompute_dact(*arguments)
    assert calls == ["split"]
    save(SHAPE, PLACE, Tuning("fused"))
    ffn_recompute.ffn_recompute_dact(*arguments)
    assert calls == ["split"] and (out == 0).all()


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{'a': 1}", '"x"'],
)
def test_a_broken_file_is_ignored_with_a_warning_and_written_anew(cache, text):
    cache.mkdir()
    cache_file().write_text(text)
    with pytest.warns(UserWarning, match=r"tuning.json is ignored.*`backfuse tune` writes it anew"):
        assert strategy_for(X, 128, True) == "split"
    with pytest.warns(UserWarning):
        save(SHAPE, PLACE, Tuning("fused"))
    assert strategy_for(X, 128, True) == "fused"


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"strategy": "both", "configs": {}},
        {"strategy": "fused", "configs": {"ffn_up": {"block_m": 7}}},
        {"strategy": "fused", "configs": {"ffn_up": Config(7, 7, 7, 7, 7).__dict__}},
        {"strategy": "fused", "configs": {"nothing": some("ffn_up").__dict__}},
        {"strategy": "fused", "configs": {"ffn_up": {**some("ffn_up").__dict__, "block_m": [64]}}},
        {"strategy": "fused", "configs": {"ffn_up": {**some("ffn_up").__dict__, "block_m": 64.0}}},
        None,
    ],
)
def test_a_broken_record_is_ignored_with_a_warning(cache, record):
    cache.mkdir()
    cache_file().write_text(json.dumps({SHAPE.key(PLACE): record or 1}))
    with pytest.warns(UserWarning, match="a record in .* is ignored"):
        assert strategy_for(X, 128, True) == "split"


def test_a_failed_write_leaves_the_old_file(monkeypatch):
    save(SHAPE, PLACE, Tuning("fused"))
    before = cache_file().read_text()

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError):
        save(SHAPE, PLACE, Tuning("split"))
    assert cache_file().read_text() == before
    assert [p.name for p in cache_file().parent.iterdir()] == ["tuning.json"]


def timer(times):
    """Gives these milliseconds, one after another, and runs what is timed."""
    iterator = iter(times)

    def measure(call):
        call()
        return next(iterator)

    return measure


SMALL = {
    "ffn_up": (Config(64, 128, 64, 4, 1), Config(64, 64, 64, 4, 1)),
    "ffn_dact": (Config(64, 128, 64, 4, 1),),
    "ffn_recompute": (Config(64, 64, 64, 4, 1, split=2), Config(32, 128, 64, 4, 1)),
}


@pytest.fixture
def small(monkeypatch):
    for kernel, configs in SMALL.items():
        monkeypatch.setitem(CONFIGS[kernel], "interpreter", configs)
        monkeypatch.setitem(CONFIGS[kernel], "sm_80", configs)



@pytest.mark.parametrize("fused_ms, strategy", [(2.9, "fused"), (3.5, "split")])
def test_the_fastest_wins(small, monkeypatch, fused_ms, strategy):
    # Under the interpreter tiles of other shapes give other bits: here that is not the question.
    monkeypatch.setattr(module.torch, "equal", lambda a, b: True)
    best, rows = tune(SHAPE, PLACE, tokens=70, timer=timer([2.0, 1.0, 1.5, 4.0, fused_ms, 3.0]))
    assert best.strategy == strategy
    assert best.configs == {
        "ffn_up": SMALL["ffn_up"][1],
        "ffn_dact": SMALL["ffn_dact"][0],
        "ffn_recompute": SMALL["ffn_recompute"][1],
    }
    table = frame(rows)
    kernels = ["ffn_up"] * 2 + ["ffn_dact"] + ["ffn_recompute"] * 2 + ["split"]
    assert list(table["kernel"]) == kernels
    assert list(table[""]) == ["", "best", "best", "", "best", ""]


def test_other_bits_never_win(small, monkeypatch):
    monkeypatch.setattr(module.torch, "equal", lambda a, b: False)
    best, rows = tune(SHAPE, PLACE, tokens=70, timer=timer(itertools.repeat(1.0)))
    assert best.strategy == "split" and "ffn_recompute" not in best.configs
    assert [row.note for row in rows[3:5]] == ["other bits than split"] * 2


def test_what_fails_is_passed_over(small, monkeypatch):
    real = module.Operands.up

    def up(self, config):
        if config == SMALL["ffn_up"][0]:
            raise RuntimeError("out of resources: shared memory\nand more")
        real(self, config)

    monkeypatch.setattr(module.Operands, "up", up)
    best, rows = tune(SHAPE, PLACE, tokens=10, timer=timer(itertools.repeat(1.0)))
    assert best.configs["ffn_up"] == SMALL["ffn_up"][1]
    assert rows[0].note == "out of resources: shared memory"
    monkeypatch.setattr(module.Operands, "up", lambda self, config: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a failure of our own is no configuration's
        tune(SHAPE, PLACE, tokens=10, timer=timer(itertools.repeat(1.0)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shape": "llama-3-9b"}, "shape is 'llama-3-9b'.*did you mean 'llama-3-"),
        ({"hidden_size": 0}, "hidden_size is 0, expected at least 1"),
        ({"tokens": -1}, "tokens is -1, expected at least 1"),
        ({"dtype": "bf17"}, "dtype is 'bf17'.*did you mean 'bf16'"),
        ({"dtype": "fp64"}, "dtype is 'fp64', expected one of fp32, bf16, fp16"),
        ({"device": "cpu"}, "device is 'cpu', expected 'cuda'"),
        ({"parts": ["ffm"]}, "parts is 'ffm', expected one of ffn, attention; did you mean 'ffn'"),
        ({"seq_lens": [8, 0]}, "seq_lens is 0, expected at least 1"),
        ({"window": 0}, "window is 0, expected at least 1"),
    ],
)
def test_bad_input(change, message, cache):
    with pytest.raises(ValueError, match=message):
        run(**{"device": DEVICE, **change})
    assert not cache.exists()


def attention_request(length=32, **options):
    spec = SHAPES["llama-3-8b"].replace(head_dim=16)
    return tune_attention.request_of(spec, torch.float16, PLACE, length, **options)


@pytest.fixture
def cores(monkeypatch):
    """Every attention core, its library's kernel replaced; few tokens."""
    monkeypatch.setattr(tune_attention, "TOKENS", 64)
    install(monkeypatch, *CORES)
    yield
    forget()


TIMES = [5.0, 1.0, 4.0, 0.5, 2.0, 3.0]  # as `NAMES` has them


@pytest.mark.parametrize("packed", [False, True])
def test_attention_cores_are_measured_and_remembered(cores, packed, capsys):
    request = attention_request(packed=packed)
    expected = dict(zip(tune_attention.NAMES, TIMES, strict=True))
    if packed:
        del expected["cudnn"]
    tune_cores([request], 2, 1, timer=timer(expected.values()))
    assert attention_times(request) == expected
    printed = capsys.readouterr().out
    assert "cuDNN kernel has no packed sequences" in printed or not packed
    assert [line.split()[-1] for line in printed.splitlines() if "fa3" in line] == ["auto"]
    assert "wrote " in printed and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_core_that_gives_other_bits_is_not_remembered(cores, monkeypatch, capsys):
    plain = FA3.attention_backward

    def unsteady(*args, **kwargs):
        dq, *others = plain(*args, **kwargs)
        return dq + torch.rand_like(dq), *others

    monkeypatch.setattr(FA3, "attention_backward", unsteady)
    request = attention_request()
    tune_cores([request], 2, 1, timer=timer(TIMES))
    assert attention_times(request).keys() == tune_attention.NAMES.keys() - {"fa3"}
    assert "other bits each time" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("no engine\nand more"), AssertionError()])
def test_a_core_that_fails_is_passed_over(cores, monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(FA4, "attention_forward", fail)
    request = attention_request()
    tune_cores([request], 2, 1, timer=timer(TIMES))
    assert attention_times(request).keys() == tune_attention.NAMES.keys() - {"fa4"}
    assert (str(error).split("\n")[0] or "AssertionError()") in capsys.readouterr().out


def test_what_is_done_when_it_is_interrupted_is_kept(cores, capsys):
    def interrupted():
        yield from TIMES
        raise KeyboardInterrupt

    short, long = attention_request(16), attention_request(32)
    with pytest.raises(KeyboardInterrupt):
        tune_cores([short, long], 2, 1, timer=timer(interrupted()))
    assert attention_times(short) and not attention_times(long)
    assert "wrote " in capsys.readouterr().out


def test_only_what_can_do_it_is_measured(cores):
    request = attention_request(window=9)
    tune_cores([request], 2, 1, timer=timer([5.0, 1.0, 4.0, 2.0, 3.0]))
    assert "cudnn" not in attention_times(request)
    assert attention_times(attention_request()) == {}


def test_lengths_that_are_no_integers(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--seq-lens", "1024,4k"])
    assert "'1024,4k', expected integers such as 1024,4096" in capsys.readouterr().err


def test_the_command_measures_both_parts(monkeypatch, capsys):
    monkeypatch.setattr(module, "tune", lambda *a, **k: (Tuning(), []))
    asked = []
    monkeypatch.setattr(module, "tune_cores", lambda requests, *a, **k: asked.extend(requests))
    monkeypatch.setattr(module, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert run(parts=("ffn",)) == 0 and not asked
    assert run(parts=("attention",), seq_lens=(10, 20), window=5, packed=True) == 0
    assert [r.longest for r in asked] == [10, 20]
    assert all(r.packed and r.mask.window == 5 and r.tokens % r.longest == 0 for r in asked)
