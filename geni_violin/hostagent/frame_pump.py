"""Moves frames between their diversions and their inbound queues: one thread for all VMs of an agent.

A diversion is QEMU's (:class:`FrameChannel`), or a hold port of the VM's switch
(:mod:`~geni_violin.hostagent.hold_port`).

Theory of operation. QEMU's ``filter-redirector`` writes each frame with its length in front (4 bytes, big-endian) into
one Unix socket, and takes frames of the same form from another. It writes from its main loop and waits while the socket
is full, so a diversion must be read without delay, whatever else the agent does: hence a thread of its own, and no
asyncio in it. What QEMU does not take at once stays in memory, up to a bound; beyond that frames are dropped and
counted.

Whatever is asked of a channel from outside is done under its lock, between two of the thread's turns at it.
"""

import contextlib
import fcntl
import os
import selectors
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from geni_violin.hostagent.inbound_queue import InboundQueue

_READ_BYTES = 1 << 20
_MOST_OUT_BYTES = 256 << 20
_LENGTH = struct.Struct("!I")
_RETRY_S = 0.001

Watched = tuple[int | socket.socket, int]
"""What may be ready, and for what (EVENT_READ, EVENT_WRITE of selectors)."""


class Channel(Protocol):
    """One interface's diversion, which the thread works on."""

    lock: threading.Lock

    def watched(self) -> list[Watched]:
        """What the next turn waits for."""

    @property
    def is_backed_up(self) -> bool:
        """Whether another turn is due soon in any case."""

    def turn(self) -> bool:
        """Read what there is, pass on what is to be passed on; whether the diversion is still there."""

    def put(self, frames: Iterable[bytes]) -> None:
        """Pass frames on to the VM, after all that were passed on before. Under the lock."""

    def close(self) -> None:
        """Let go of the diversion. Under the lock."""


class FrameChannel:
    """One interface's diversion: frames from ``divert`` through a queue into ``inject``, both connected to QEMU.

    :param on_future: called once, from the pump's thread, at the first frame of the new color.
    """

    def __init__(
        self, divert: socket.socket, inject: socket.socket, queue: InboundQueue, on_future: Callable[[], object]
    ) -> None:
        self.divert, self.inject, self.queue = divert, inject, queue
        self.lock = threading.Lock()
        self.frames_overflowed = 0
        """Frames that QEMU did not take, and that memory had no room for."""
        self._on_future: Callable[[], object] | None = on_future
        self._incoming = bytearray()
        self._outgoing = bytearray()
        for end in (divert, inject):
            end.setblocking(False)

    def watched(self) -> list[Watched]:
        writes = [(self.inject, selectors.EVENT_WRITE)] if self._outgoing else []
        return [(self.divert, selectors.EVENT_READ), *writes]

    @property
    def is_backed_up(self) -> bool:
        return False  # a socket that QEMU reads from tells when it has room

    def turn(self) -> bool:
        with self.lock:
            data = _read(self.divert)
            if data:
                self._incoming += data
                self._put(self.queue.take(_frames(self._incoming), time.time_ns() // 1000))
            self._flush()
            seen = self.queue.future_frame_seen
        if seen and self._on_future is not None:
            on_future, self._on_future = self._on_future, None
            on_future()
        return data is not None

    def put(self, frames: Iterable[bytes]) -> None:
        self._put(frames)
        self._flush()

    def _put(self, frames: Iterable[bytes]) -> None:
        parts: list[bytes] = []
        room = _MOST_OUT_BYTES - len(self._outgoing)
        for frame in frames:
            room -= len(frame)
            if room < 0:
                self.frames_overflowed += 1
                continue
            parts += (_LENGTH.pack(len(frame)), frame)
        self._outgoing += b"".join(parts)

    def _flush(self) -> None:
        while self._outgoing:
            try:
                sent = self.inject.send(self._outgoing[:_READ_BYTES])
            except BlockingIOError:
                return
            except OSError:  # QEMU is gone
                self._outgoing.clear()
                return
            del self._outgoing[:sent]

    def close(self) -> None:
        self.divert.close()
        self.inject.close()

    def all_taken(self) -> bool:
        """Whether the queue has taken all that was diverted so far. Under the lock."""
        return not self._incoming and _unread(self.divert) == 0

    def consumed(self) -> bool:
        """Whether QEMU has taken all that was passed on. Under the lock."""
        self._flush()
        return not self._outgoing and _unread_by_peer(self.inject) == 0

    def drained(self) -> bool:
        """Whether nothing diverted is on its way any more. Under the lock."""
        return self.all_taken() and self.consumed()


def _read(source: socket.socket) -> bytes | None:
    """What there is to read; None at the end."""
    try:
        return source.recv(_READ_BYTES) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None


def _frames(data: bytearray) -> list[bytes]:
    """The whole frames at the beginning of ``data``, which are taken off."""
    whole = bytes(data)
    frames, position, end = [], 0, len(whole)
    while position + 4 <= end:
        (length,) = _LENGTH.unpack_from(whole, position)
        if position + 4 + length > end:
            break
        frames.append(whole[position + 4 : position + 4 + length])
        position += 4 + length
    del data[:position]
    return frames


def _queued(end: socket.socket, request: int) -> int:
    try:
        answer = fcntl.ioctl(end.fileno(), request, bytes(4))
    except OSError:  # closed
        return 0
    return int(struct.unpack("i", answer)[0])


def _unread(end: socket.socket) -> int:
    """Bytes that wait to be read here (SIOCINQ, unix(7))."""
    return _queued(end, termios.FIONREAD)


def _unread_by_peer(end: socket.socket) -> int:
    """Bytes sent that the other end has not read (SIOCOUTQ, unix(7)); the kernel counts its own overhead in."""
    return _queued(end, termios.TIOCOUTQ)


class FramePump:
    """The thread. It starts with the first channel, and costs nothing while there is none."""

    def __init__(self) -> None:
        self._channels: set[Channel] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)

    def add(self, channel: Channel) -> None:
        """Work on a channel from now on."""
        with self._lock:
            self._channels.add(channel)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="frame-pump", daemon=True)
                self._thread.start()
        self._wake()

    def remove(self, channel: Channel) -> None:
        """Work on it no more, and close it."""
        with self._lock:
            self._channels.discard(channel)
        self._wake()
        with channel.lock:
            channel.close()

    def put(self, channel: Channel, frames: Iterable[bytes]) -> None:
        """Pass frames on to a VM, after all that were passed on before. Under the channel's lock."""
        channel.put(frames)
        self._wake()

    def _wake(self) -> None:
        os.write(self._wake_write, b"x")

    def _run(self) -> None:
        while True:
            with self._lock:
                channels = list(self._channels)
            for channel in self._ready(channels):
                with contextlib.suppress(ValueError):  # removed, and closed, meanwhile
                    if not channel.turn():
                        with self._lock:
                            self._channels.discard(channel)

    def _ready(self, channels: list[Channel]) -> list[Channel]:
        """Wait until there is something to do; the channels that it is at."""
        with selectors.PollSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            for channel in channels:
                with contextlib.suppress(ValueError, KeyError):
                    for end, events in channel.watched():
                        selector.register(end, events, channel)
            behind = {channel for channel in channels if channel.is_backed_up}
            ready = behind | {key.data for key, _ in selector.select(_RETRY_S if behind else None)}
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        return [channel for channel in ready if channel is not None]
