"""blocks/offload.py: what is put comes back, from wherever it is; nothing stays too long."""

import contextlib
import errno
import gc
import os

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from backfuse.blocks.offload import IN_FLIGHT, Line

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64]


class Owner:
    pass


@pytest.fixture(params=["host", "files"])
def line(request, tmp_path):
    return Line(torch.device(DEVICE), tmp_path if request.param == "files" else None)


def tensors(number):
    """What call `number` keeps: several shapes and dtypes."""
    generator = torch.Generator().manual_seed(number)
    made = [torch.randn(3 + number, 5, generator=generator).mul(9).to(dtype) for dtype in DTYPES]
    return {str(x.dtype): x.to(DEVICE) for x in made}


def same(given, number):
    wanted = tensors(number)
    assert given.keys() == wanted.keys()
    for name, x in wanted.items():
        assert given[name].device == x.device and given[name].dtype == x.dtype
        assert torch.equal(given[name].view(torch.uint8), x.view(torch.uint8))


def put(line, count, first=0):
    owners = [Owner() for _ in range(count)]
    numbers = range(first, first + count)
    return owners, [
        line.put(f"layers.{n}", tensors(n), o) for n, o in zip(numbers, owners, strict=True)
    ]


def on_device(line):
    return [parcel.label for parcel in line.parcels if parcel.here is not None]


def test_a_forward_and_a_backward(line):
    count = 7
    owners, parcels = put(line, count)
    assert on_device(line) == [f"layers.{n}" for n in range(count - 1 - IN_FLIGHT, count)]
    for number in reversed(range(count)):
        same(line.get(parcels[number]), number)
        # the next one's turn is next: it is here already, and no other one of those that left
        if number:
            assert parcels[number - 1].here is not None
        assert len(on_device(line)) <= IN_FLIGHT + 2
        owners.pop()  # autograd frees what a node saved once it has run
        gc.collect()
    assert not parcels[-1].buffers  # its turn came at once: it never travelled
    assert parcels[0].gone and not line.parcels and not line.leaving and line.waiting is None


def test_again_with_a_retained_graph(line):
    owners, parcels = put(line, 5)
    for _ in range(2):
        for number in reversed(range(5)):
            same(line.get(parcels[number]), number)
    assert len(on_device(line)) <= IN_FLIGHT + 2


def test_several_forwards_before_a_backward(line):
    """Two micro-batches in flight, differentiated in the order of a pipeline."""
    owners, parcels = put(line, 8)
    for number in (3, 2, 1, 0, 7, 6, 5, 4):
        same(line.get(parcels[number]), number)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["put", "get", "drop"]), st.integers(0, 9)), max_size=40))
def test_any_order(steps):
    line, alive = Line(torch.device(DEVICE)), {}
    for number, (step, choice) in enumerate(steps):
        if step == "put":
            [owner], [parcel] = put(line, 1, first=number)
            alive[number] = owner, parcel
            del owner
        elif alive:
            chosen = list(alive)[choice % len(alive)]
            if step == "get":
                same(line.get(alive[chosen][1]), chosen)
            else:
                del alive[chosen]
        assert len(line.parcels) == len(alive)
        assert len(on_device(line)) <= IN_FLIGHT + 2
    alive.clear()
    assert not line.parcels and not line.leaving and line.waiting is None


def test_what_has_gone_says_so(line):
    owners, parcels = put(line, 3)
    owners.clear()
    with pytest.raises(RuntimeError, match=r"layers\.1: what it kept elsewhere has been released"):
        line.get(parcels[1])
    assert all(parcel.here is None and not parcel.buffers for parcel in parcels)


def test_files_go_with_their_parcels(tmp_path):
    def files():
        return [name for name in os.listdir("/proc/self/fd") if _points_into(name, tmp_path)]

    line = Line(torch.device(DEVICE), tmp_path)
    owners, parcels = put(line, 6)
    assert len(files()) == 5  # one for each that has left
    assert not list(tmp_path.iterdir())  # they have no names: not even a crash leaves them behind
    owners.clear()
    assert not files()


def _points_into(name, folder):
    try:
        return os.readlink(f"/proc/self/fd/{name}").startswith(str(folder))
    except OSError:
        return False


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    line = Line(torch.device(DEVICE), tmp_path)
    owners, parcels = put(line, 3)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(RuntimeError, match=r"layers\.2: .* MiB could not be offloaded.*space"):
            line.put("layers.3", tensors(3), Owner())
    for number in reversed(range(3)):
        same(line.get(parcels[number]), number)
    owners.append(Owner())  # and when there is room again, it goes on
    parcels.append(line.put("layers.3", tensors(3), owners[-1]))
    for number in reversed(range(4)):
        same(line.get(parcels[number]), number)


def test_files_do_not_fill_memory(tmp_path):
    """What is on its way is a few parcels, whatever the number of calls."""
    line = Line(torch.device(DEVICE), tmp_path)
    owners = [Owner() for _ in range(12)]
    for owner in owners:
        line.put("x", {"x": torch.zeros(1000, device=DEVICE)}, owner)
        assert _count(1000) <= IN_FLIGHT + 1


def _count(size):
    """Tensors of that size that are somewhere."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == (size,)]
    return sum(x.device.type != "meta" for x in found)


@pytest.mark.parametrize("asked_before", [True, False])
@pytest.mark.parametrize("after", [0, 1, IN_FLIGHT])
def test_a_change_in_place_is_seen(line, after, asked_before):
    """While it waits, and while it leaves."""
    kept, owners = tensors(0), [Owner()]
    parcel = line.put("layers.0", kept, owners[0])
    owners += put(line, after, first=1)[0]
    kept["torch.float32"].add_(1)
    if asked_before:
        with pytest.raises(RuntimeError, match=r"layers\.0: torch\.float32, .* in place"):
            line.get(parcel)
    owners += put(line, IN_FLIGHT + 1, first=5)[0]
    with pytest.raises(RuntimeError, match="in place"):
        line.get(parcel)


def test_a_change_of_what_has_left_is_harmless(line):
    kept, owner = tensors(0), Owner()
    parcel = line.put("layers.0", kept, owner)
    owners, _ = put(line, IN_FLIGHT + 1, first=1)
    kept["torch.float32"].add_(1)
    same(line.get(parcel), 0)


def test_owners_that_go_in_the_middle(line, monkeypatch):
    """A garbage collection can come at any allocation, and with it the end of any owner."""
    owners, parcels = put(line, 3)
    buffers = line._buffers

    def collecting(tensors):
        owners.clear()
        return buffers(tensors)

    monkeypatch.setattr(line, "_buffers", collecting)
    owner = Owner()
    parcel = line.put("layers.3", tensors(3), owner)
    same(line.get(parcel), 3)
    assert line.parcels == [parcel] and all(p.gone for p in parcels)


class Stream:
    """Stands in for a stream, and notes what it is told to wait for."""

    def __init__(self, name, log):
        self.name, self.log, self.count = name, log, 0

    def record_event(self):
        self.count += 1
        return f"{self.name} {self.count}"

    def wait_event(self, event):
        self.log.append(f"{self.name} after {event}")


def test_copies_wait_for_the_stream_that_made_the_tensors(monkeypatch):
    """And the memory for the copies; whichever stream is current by then."""
    log, line = [], Line(torch.device("cpu"))
    a, b = Stream("a", log), Stream("b", log)
    line.out, line.back = Stream("out", log), Stream("back", log)
    current = [a]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    owners = [Owner() for _ in range(5)]
    first = line.put("first", {"x": torch.zeros(3)}, owners[0])
    current[0] = b
    line.put("second", {"x": torch.zeros(3)}, owners[1])
    assert log == ["out after a 1"]  # what a made leaves once a has made it
    for owner in owners[2:]:
        line.put("more", {"x": torch.zeros(3)}, owner)
    assert first.here is None and "a after out 1" in log  # a's memory waits for the copy
    log.clear()
    line.get(first)
    made = f"b {b.count}"
    assert log[:3] == [f"back after {made}", "back after out 1", "b after back 1"]
