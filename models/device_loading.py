"""Weights from files straight to a GPU: several threads read, pinned buffers stage, a stream per thread copies.

A tensor is allocated on the device first, whole, fused ones in their final form; its contents come in pieces. Each
thread has two staging buffers: it reads into one while the other one's copy is under way, so that disk, bus and the
other threads' reads overlap, and host memory is bounded by `num_threads * 2 * staging_bytes` whatever the model's size.

Measured on no GPU yet; on a CPU `tests/models/test_device_loading.py` runs it with a stand-in whose copies happen late.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..kernels.cores import usable_cores
from .errors import WeightsError
from .stored_tensors import FileRange

STAGING_BYTES = 32 * 1024**2  # a buffer: long enough for the bus's full rate, short enough for many to fit
_MAX_THREADS = 8  # a disk array or page cache gives no more to more


class Staging(Protocol):
    """One thread's way to the device: two buffers or more in turn."""

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """`[num_bytes]` uint8 on the host that no copy reads any more; waits for the one that does."""
        ...

    def copy(self, piece: Piece, staged: torch.Tensor, ready: object) -> None:
        """Begin to copy what lies in `staged`, from `buffer`, to the piece's place; after `ready` on the device."""
        ...

    def finish(self) -> None:
        """Wait for all copies."""
        ...


class StagingMaker(Protocol):
    """Makes each thread's `Staging`, and marks points in the device's time."""

    def staging(self) -> Staging: ...

    def mark(self) -> object:
        """Now, on the stream that allocates: memory may still be in use by what was launched before."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a tensor on their way.

    Attributes:
        out: where they go, on the device, any dtype.
        dtype: of the source.
        shape, stride: of the source within the bytes that are staged, in elements.
        source: bytes to stage: of a file, or of memory (uint8).
        ready: from `StagingMaker.mark`.
    """

    out: torch.Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    source: FileRange | torch.Tensor
    ready: object

    @property
    def num_bytes(self) -> int:
        return self.source.num_bytes if isinstance(self.source, FileRange) else self.source.numel()

    def view(self, staged: torch.Tensor) -> torch.Tensor:
        """The source's elements in bytes that were staged, on whatever device."""
        return staged.view(self.dtype).as_strided(self.shape, self.stride)


class CudaStaging:
    """Two pinned buffers and a stream of its own."""

    def __init__(self, device: torch.device, staging_bytes: int) -> None:
        self._device = device
        self._staging_bytes = staging_bytes
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no type
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._copied = [_event(), _event()]
        self._turn = 0

    def buffer(self, num_bytes: int) -> torch.Tensor:
        self._turn ^= 1
        self._copied[self._turn].synchronize()  # of an event never recorded: returns at once
        held = self._buffers[self._turn]
        if held is None or held.numel() < num_bytes:
            held = torch.empty(max(num_bytes, self._staging_bytes), dtype=torch.uint8, pin_memory=True)
            self._buffers[self._turn] = held
        return held[:num_bytes]

    def copy(self, piece: Piece, staged: torch.Tensor, ready: object) -> None:
        assert isinstance(ready, torch.cuda.Event)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            view = piece.view(staged)
            if view.is_contiguous() and piece.dtype is piece.out.dtype and piece.out.is_contiguous():
                piece.out.copy_(view, non_blocking=True)
            else:  # cast and picked apart on the device: on the host either would wait, and take a core
                piece.out.copy_(piece.view(staged.to(self._device, non_blocking=True)))
            self._copied[self._turn].record(self._stream)

    def finish(self) -> None:
        self._stream.synchronize()
        self._buffers = [None, None]


class CudaStagingMaker:
    """Args:
    staging_bytes: of a buffer; a single row that is longer gets a longer one.
    """

    def __init__(self, device: torch.device, staging_bytes: int = STAGING_BYTES) -> None:
        self._device = device
        self._staging_bytes = staging_bytes

    def staging(self) -> CudaStaging:
        return CudaStaging(self._device, self._staging_bytes)

    def mark(self) -> torch.cuda.Event:
        event = _event()
        event.record(torch.cuda.current_stream(self._device))
        return event


class DeviceLoader:
    """Places tensors on a device; their contents are there once `finish` has returned.

    Args:
        maker: of the threads' buffers.
        num_threads: that read; None: as many as there are cores, at most 8.
        staging_bytes: longest piece, but for a row that is longer.
    """

    def __init__(
        self, maker: StagingMaker, *, num_threads: int | None = None, staging_bytes: int = STAGING_BYTES
    ) -> None:
        self._maker = maker
        self._num_threads = num_threads or max(1, min(_MAX_THREADS, usable_cores()))
        self._staging_bytes = staging_bytes
        # Bounded: what is decoded on the host before it is placed must not pile up.
        self._pieces: queue.Queue[Piece | None] = queue.Queue(4 * self._num_threads)
        self._threads: list[threading.Thread] = []
        self._files: dict[int, FileRange] = {}  # address of a mapped tensor -> where its bytes are in the file
        self._mapped: list[torch.Tensor] = []  # an address is only good as long as its tensor
        self._failures: list[BaseException] = []

    def note(self, tensor: torch.Tensor, where: FileRange) -> None:
        """Say that a tensor that will be placed, or cut and then placed, is a view of a file that is mapped."""
        if tensor.numel():
            self._files[tensor.data_ptr()] = where
            self._mapped.append(tensor)

    def place(self, parts: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `torch.cat(parts).to(device, dtype)`, without contents until `finish`."""
        rows = sum(part.shape[0] for part in parts)
        out = torch.empty((rows, *parts[0].shape[1:]), dtype=dtype, device=device)
        self._start()
        ready = self._maker.mark()
        begin = 0
        for part in parts:
            for piece in self._pieces_of(part, out[begin : begin + part.shape[0]], ready):
                self._pieces.put(piece)
            begin += part.shape[0]
        return out

    def finish(self) -> None:
        """Wait for everything that was placed. The loader may be used again.

        Raises:
            WeightsError: a file could not be read.
        """
        for _ in self._threads:
            self._pieces.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._files.clear()
        self._mapped.clear()
        if self._failures:
            error = self._failures[0]
            self._failures.clear()
            if isinstance(error, OSError | EOFError):
                raise WeightsError(f"a weight file cannot be read: {error}. Is the download whole?") from error
            raise error

    def _start(self) -> None:
        while len(self._threads) < self._num_threads:
            thread = threading.Thread(target=self._work, name="octavo-weights", daemon=True)
            self._threads.append(thread)
            thread.start()

    @torch.inference_mode()  # of a thread, and weights may have been allocated in it
    def _work(self) -> None:
        staging: Staging | None = None
        piece: Piece | None = None
        try:
            while (piece := self._pieces.get()) is not None:
                if self._failures:
                    continue  # empty the queue: whoever waits is told
                staging = staging or self._maker.staging()
                staged = staging.buffer(piece.num_bytes)
                if isinstance(piece.source, FileRange):
                    _read(piece.source, staged)
                else:
                    staged.copy_(piece.source)
                staging.copy(piece, staged, piece.ready)
            if staging is not None:
                staging.finish()
        except BaseException as error:  # noqa: BLE001,RUF100 - handed to the thread that waits in `finish`
            self._failures.append(error)
            while piece is not None:  # to the end, so that whoever puts or waits goes on
                piece = self._pieces.get()

    def _pieces_of(self, part: torch.Tensor, out: torch.Tensor, ready: object) -> Iterator[Piece]:
        if not part.numel():
            return
        if part.is_contiguous() and out.is_contiguous():  # any cut will do
            part, out = part.view(-1), out.view(-1)
        else:  # cut along what lies farthest apart
            strides = part.stride()
            order = sorted(range(part.dim()), key=lambda axis: -strides[axis])
            part, out = part.permute(order), out.permute(order)
        pitch = part.stride(0) * part.itemsize
        width = _reach(part[0].shape, part[0].stride()) * part.itemsize
        rows_at_once = max(1, (self._staging_bytes - width) // pitch + 1) if pitch else part.shape[0]
        source = self._source_of(part)
        for row in range(0, part.shape[0], rows_at_once):
            count = min(rows_at_once, part.shape[0] - row)
            yield Piece(
                out=out[row : row + count],
                dtype=part.dtype,
                shape=(count, *part.shape[1:]),
                stride=tuple(part.stride()),
                source=source(row * pitch, (count - 1) * pitch + width),
                ready=ready,
            )

    def _source_of(self, part: torch.Tensor) -> Callable[[int, int], FileRange | torch.Tensor]:
        """Gives `num_bytes` of a tensor from an offset on: of the file that it is a view of, or of its memory."""
        address = part.data_ptr()
        for start, where in self._files.items():
            if start <= address < start + where.num_bytes:
                first = where.offset + address - start
                return lambda offset, num_bytes: FileRange(where.fd, first + offset, num_bytes)
        reach = _reach(part.shape, part.stride())
        memory = part.as_strided((reach,), (1,)).view(torch.uint8)
        return lambda offset, num_bytes: memory[offset : offset + num_bytes]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no type for it


def _reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from a view's first to behind its last."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _read(where: FileRange, into: torch.Tensor) -> None:
    memory = memoryview(into.numpy())  # type: ignore[arg-type]  # an array is a buffer, which its type does not say
    done = 0
    while done < where.num_bytes:
        count = os.preadv(where.fd, [memory[done : where.num_bytes]], where.offset + done)
        if count <= 0:
            raise EOFError(f"it ends {where.num_bytes - done} bytes too early")
        done += count
