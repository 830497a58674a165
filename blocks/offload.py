"""Kept tensors in host memory, or in files, between the forward and the backward pass.

A *parcel* is what one call keeps elsewhere. It stands in a line with those of the calls around it,
in the order of the forward pass:

    put     parcel i waits on the device; parcel i - 1 leaves, on a stream of its own; the one
            `IN_FLIGHT` before that gives its device memory back, once the compute stream waits for
            its copy
    get     what is still on the device is taken from there; what is not is fetched, on another
            stream; the parcel before it, whose turn is next, is fetched ahead

So the last call's tensors, which backward wants at once, never travel; a slow link makes the
compute stream wait, never the host; and no more than a few parcels are on the device at a time.

The stream whose memory a copy used waits for the copy before that memory is freed: the allocator,
which knows that stream's order, may then hand it out again. Host buffers come from PyTorch's
caching allocator of pinned memory, which knows what copies are under way (and rounds sizes up to
powers of two). Weights never travel.
"""

from __future__ import annotations

import functools
import mmap
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

#: Parcels whose copies may be under way at once.
IN_FLIGHT = 2


class Buffer(Protocol):
    """Room for one tensor that is not on the device. Both copies follow the current stream."""

    def write(self, x: Tensor) -> None:
        """Copy x here."""

    def read(self, out: Tensor) -> None:
        """Copy what is here to `out`."""


class HostBuffer:
    """Room in host memory, pinned where a GPU copies to it: the host does not wait for copies."""

    def __init__(self, like: Tensor) -> None:
        self.host = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)

    def write(self, x: Tensor) -> None:
        self.host.copy_(x, non_blocking=True)

    def read(self, out: Tensor) -> None:
        out.copy_(self.host, non_blocking=True)


class FileBuffer:
    """A piece of a file, which is mapped into memory while it is copied; the host waits for copies.

    Args:
        file: the file; it goes with its last buffer.
        start: where the piece begins, a multiple of what a mapping can begin at.
        size: bytes.
    """

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file, self.start, self.size = file, start, size

    def write(self, x: Tensor) -> None:
        self._copy(lambda mapped: mapped.copy_(x.reshape(-1).view(torch.uint8)))

    def read(self, out: Tensor) -> None:
        self._copy(out.view(-1).view(torch.uint8).copy_)

    def _copy(self, copy: Callable[[Tensor], Any]) -> None:
        with mmap.mmap(self.file.fileno(), self.size, offset=self.start) as mapped:
            copy(torch.frombuffer(mapped, dtype=torch.uint8))


def file_buffers(tensors: Mapping[str, Tensor], directory: Path) -> dict[str, Buffer]:
    """Room for several tensors in one file.

    The file has no name: it goes with the process, however that ends. Its blocks are reserved at
    once, so that a full disk is an error here and no crash later.

    Raises:
        OSError: if the directory cannot be written to, or has no room.
    """
    file = tempfile.TemporaryFile(prefix="backfuse-", dir=directory)
    buffers: dict[str, Buffer] = {}
    end = 0
    for name, x in tensors.items():
        size = x.numel() * x.element_size()
        buffers[name] = FileBuffer(file, end, size)
        end += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    reserve = getattr(os, "posix_fallocate", None)  # where there is none, the file is sparse
    if reserve is None:
        file.truncate(end)
    else:
        reserve(file.fileno(), 0, end)
    return buffers


@dataclass(eq=False)
class Parcel:
    """What one call keeps elsewhere.

    Attributes:
        label: whose it is, for messages.
        likes: each tensor's shape and dtype, by name, on the meta device.
        here: the tensors, on the device; None while they are elsewhere only.
        versions: autograd's count of the writes to each, as they were put; none for copies.
        spoiled: the name of one that was written afterwards, before its copy was made.
        buffers: where they are elsewhere, or will be; empty before they leave.
        home: the stream that made them, and may use their memory again; None without streams.
        ready: follows what made them.
        sent: follows the copies out.
        fetched: follows the copies of `here` back.
        gone: whether it has been released.
    """

    label: str
    likes: dict[str, Tensor]
    here: dict[str, Tensor] | None
    versions: dict[str, int]
    spoiled: str | None = None
    buffers: dict[str, Buffer] = field(default_factory=dict)
    home: torch.cuda.Stream | None = None
    ready: torch.cuda.Event | None = None
    sent: torch.cuda.Event | None = None
    fetched: torch.cuda.Event | None = None
    gone: bool = False


class Line:
    """The parcels of one device, in the order of the forward pass.

    Args:
        device: that computes.
        directory: of the files; None: host memory.
    """

    def __init__(self, device: torch.device, directory: Path | None = None) -> None:
        self.device = device
        self.directory = directory
        self.out, self.back = (
            torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2)
        )
        self.parcels: list[Parcel] = []
        self.waiting: Parcel | None = None
        self.leaving: deque[Parcel] = deque()
        self.ahead: Parcel | None = None
        self.lock = threading.Lock()  # backward runs in threads of autograd
        self.gone: deque[Parcel] = deque()  # released, while somebody held the lock

    def put(self, label: str, tensors: Mapping[str, Tensor], owner: object) -> Parcel:
        """Take over what autograd would keep.

        Args:
            label: whose it is, for messages.
            tensors: on the device, by name; nobody may write them any more.
            owner: the parcel is released when this goes.

        Raises:
            RuntimeError: if there is no room elsewhere. Nothing that was kept is lost.
        """
        with self.lock:
            self._bury()
            if self.waiting is not None:
                self._send(self.waiting)
            likes = {name: x.to("meta") for name, x in tensors.items()}
            versions = {name: x._version for name, x in tensors.items()}
            self.waiting = parcel = Parcel(label, likes, dict(tensors), versions)
            if self.out is not None:
                parcel.home = torch.cuda.current_stream(self.device)
                parcel.ready = parcel.home.record_event()
            self.parcels.append(parcel)
        weakref.finalize(owner, self.release, parcel).atexit = False
        return parcel

    def get(self, parcel: Parcel) -> dict[str, Tensor]:
        """The tensors, on the device; more than once if they are asked for again.

        Raises:
            RuntimeError: if the parcel has been released, or a tensor has been changed in place.
        """
        with self.lock:
            self._bury()
            if parcel.gone:
                raise RuntimeError(f"{parcel.label}: what it kept elsewhere has been released")
            self._check_unchanged(parcel)
            if parcel.spoiled:
                raise RuntimeError(
                    f"{parcel.label}: {parcel.spoiled}, which it kept for the backward pass, has "
                    "been changed in place since"
                )
            if parcel.here is None:
                self._fetch(parcel)
            assert parcel.here is not None
            tensors = parcel.here
            if self.out is not None:
                stream = torch.cuda.current_stream(self.device)
                if parcel.fetched is not None:
                    stream.wait_event(parcel.fetched)
                if stream != parcel.home:  # whose memory it is has to wait for this one
                    for x in tensors.values():
                        x.record_stream(stream)
            if parcel.buffers and parcel not in self.leaving:
                self._drop(parcel)
            self._look_ahead(parcel)
            self._bury()
        return tensors

    def release(self, parcel: Parcel) -> None:
        """Forget a parcel: nobody will ask for it.

        An owner may go at any moment, also while this very thread is at work in here: then it is
        the next call that forgets.
        """
        self.gone.append(parcel)
        if self.lock.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self.lock.release()

    def _bury(self) -> None:
        """Forget what has been released."""
        while self.gone:
            parcel = self.gone.popleft()
            self._drop(parcel)
            parcel.gone, parcel.buffers = True, {}
            self.parcels.remove(parcel)
            if parcel in self.leaving:
                self.leaving.remove(parcel)
            if self.waiting is parcel:
                self.waiting = None

    def _send(self, parcel: Parcel) -> None:
        """Start the copies out of the parcel that waits."""
        assert parcel.here is not None
        try:
            buffers = self._buffers(parcel.here)
            with self._on(self.out, parcel.ready):
                for name, x in parcel.here.items():
                    buffers[name].write(x)
        except (OSError, RuntimeError) as error:
            size = sum(x.numel() * x.element_size() for x in parcel.here.values())
            where = self.directory or "host memory"
            raise RuntimeError(
                f"{parcel.label}: {size / 2**20:.1f} MiB could not be offloaded to {where}: {error}"
            ) from error
        parcel.buffers = buffers
        parcel.sent = self.out.record_event() if self.out is not None else None
        self.waiting = None
        self.leaving.append(parcel)
        while len(self.leaving) > IN_FLIGHT:
            last = self.leaving.popleft()
            self._check_unchanged(last)
            self._drop(last)

    def _check_unchanged(self, parcel: Parcel) -> None:
        """Note what was written after it was put: autograd does so for what it keeps itself."""
        for name, version in parcel.versions.items():
            if parcel.here is not None and parcel.here[name]._version != version:
                parcel.spoiled = name

    def _buffers(self, tensors: Mapping[str, Tensor]) -> dict[str, Buffer]:
        if self.directory is not None:
            return file_buffers(tensors, self.directory)
        return {name: HostBuffer(x) for name, x in tensors.items()}

    def _fetch(self, parcel: Parcel) -> None:
        """Start the copies back."""
        here = {
            name: torch.empty(like.shape, dtype=like.dtype, device=self.device)
            for name, like in parcel.likes.items()
        }
        allocated = None
        if self.back is not None:
            parcel.home = torch.cuda.current_stream(self.device)
            allocated = parcel.home.record_event()
        with self._on(self.back, allocated, parcel.sent):
            for name, x in here.items():
                parcel.buffers[name].read(x)
        parcel.here, parcel.versions = here, {}
        parcel.fetched = self.back.record_event() if self.back is not None else None

    def _look_ahead(self, parcel: Parcel) -> None:
        """Fetch the parcel before this one, instead of what was fetched ahead and not asked for."""
        if self.ahead is not None and self.ahead.buffers:
            self._drop(self.ahead)
        self.ahead = None
        index = self.parcels.index(parcel)
        if index and self.parcels[index - 1].here is None:
            with suppress(torch.OutOfMemoryError):  # then it is fetched when its turn comes
                self._fetch(self.parcels[index - 1])
                self.ahead = self.parcels[index - 1]

    def _drop(self, parcel: Parcel) -> None:
        """Give up what is on the device, once the copies that use it are done."""
        if parcel.here is not None and parcel.home is not None:
            for event in (parcel.sent, parcel.fetched):
                if event is not None:
                    parcel.home.wait_event(event)
        parcel.here = parcel.fetched = None

    def _on(
        self, stream: torch.cuda.Stream | None, *after: torch.cuda.Event | None
    ) -> AbstractContextManager[object]:
        """On a stream, after these events."""
        if stream is None:
            return nullcontext()
        for event in after:
            if event is not None:
                stream.wait_event(event)
        return torch.cuda.stream(stream)


@functools.cache
def line(device: torch.device, directory: Path | None) -> Line:
    """The line of a device; one for each directory, and one for host memory."""
    return Line(device, directory)
