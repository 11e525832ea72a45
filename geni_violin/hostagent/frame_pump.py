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
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from geni_violin.hostagent.inbound_queue import InboundQueue

_READ_BYTES = 256 << 10
_MOST_OUT_BYTES = 256 << 20
_LENGTH = struct.Struct("!I")
_RETRY_S = 0.001

Watched = dict[int, int]
"""Descriptors that may be ready, and for which events (epoll(7))."""


class Channel(Protocol):
    """One interface's diversion, which the thread works on."""

    lock: threading.Lock

    def watched(self) -> Watched:
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
        self._buffer = bytearray(_READ_BYTES)  # once: getting so much memory for each read takes longer than the read
        self._outgoing = bytearray()
        for end in (divert, inject):
            end.setblocking(False)

    def watched(self) -> Watched:
        writes = {self.inject.fileno(): select.EPOLLOUT} if self._outgoing else {}
        return {self.divert.fileno(): select.EPOLLIN, **writes}

    @property
    def is_backed_up(self) -> bool:
        return False  # a socket that QEMU reads from tells when it has room

    def turn(self) -> bool:
        with self.lock:
            count = _read(self.divert, self._buffer)
            if count:
                self._incoming += memoryview(self._buffer)[:count]
                self._put(self.queue.take(_frames(self._incoming), time.time_ns() // 1000))
            self._flush()
            seen = self.queue.future_frame_seen
        if seen and self._on_future is not None:
            on_future, self._on_future = self._on_future, None
            on_future()
        return count is not None

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


def _read(source: socket.socket, buffer: bytearray) -> int | None:
    """Read what there is, up to the buffer's size; how much it was, in bytes, or None at the end."""
    try:
        return source.recv_into(buffer) or None
    except BlockingIOError:
        return 0
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
    """The thread. It starts with the first channel, and costs nothing while there is none.

    What is waited for stays registered from one turn to the next: during a snapshot this is done for each single frame.
    """

    def __init__(self) -> None:
        self._channels: dict[Channel, Watched] = {}
        """What is registered for each channel: descriptors, and for which events."""
        self._owners: dict[int, Channel] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._epoll = select.epoll()
        self._epoll.register(self._wake_read, select.EPOLLIN)

    def add(self, channel: Channel) -> None:
        """Work on a channel from now on."""
        with self._lock:
            self._channels[channel] = {}
            self._register(channel)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="frame-pump", daemon=True)
                self._thread.start()

    def remove(self, channel: Channel) -> None:
        """Work on it no more, and close it."""
        with self._lock:
            self._forget(channel)
        with channel.lock:
            channel.close()

    def put(self, channel: Channel, frames: Iterable[bytes]) -> None:
        """Pass frames on to a VM, after all that were passed on before. Under the channel's lock."""
        channel.put(frames)
        os.write(self._wake_write, b"x")

    def _run(self) -> None:
        while True:
            for channel in self._ready():
                try:
                    is_there = channel.turn()
                except ValueError:  # removed, and closed, meanwhile
                    continue
                with self._lock:
                    if is_there:
                        self._register(channel)
                    else:
                        self._forget(channel)

    def _ready(self) -> set[Channel]:
        """Wait until there is something to do; the channels that it is at. All are looked at if somebody has put."""
        with self._lock:
            behind = {channel for channel in self._channels if channel.is_backed_up}
        descriptors = [descriptor for descriptor, _events in self._epoll.poll(_RETRY_S if behind else None)]
        with self._lock:
            if self._wake_read in descriptors:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                return set(self._channels)
            return behind | {self._owners[number] for number in descriptors if number in self._owners}

    def _register(self, channel: Channel) -> None:
        """Wait for what the channel's next turn waits for, and for nothing else of it. Under the lock."""
        registered = self._channels.get(channel)
        if registered is None:  # removed meanwhile
            return
        wanted = channel.watched()
        if wanted == registered:
            return
        for number in registered.keys() - wanted.keys():
            self._epoll.unregister(number)
            del self._owners[number]
        for number, events in wanted.items():
            if number not in registered:
                self._epoll.register(number, events)
                self._owners[number] = channel
            elif events != registered[number]:
                self._epoll.modify(number, events)
        self._channels[channel] = wanted

    def _forget(self, channel: Channel) -> None:
        """Under the lock, and before the channel is closed: its descriptors may be others' then."""
        for number in self._channels.pop(channel, {}):
            self._epoll.unregister(number)
            del self._owners[number]
