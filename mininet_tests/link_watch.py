"""Looks at what a link with a delay does to frames that others send: both of its TAP devices at once, with the
kernel's time stamps."""

import select
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass
from types import TracebackType

from .raw_frames import raw_socket

_ALL_PROTOCOLS = 3
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_IGNORE_OUTGOING = 263, 6, 23
_SO_TIMESTAMPNS, _SO_RCVBUFFORCE = 35, 33
_TIMESPEC = struct.Struct("=qq")
_STATISTICS = struct.Struct("=II")
_OUTGOING = 4
_BEGINNING_S = 1.0
"""Longer than a frame is under way, or than it takes until one like it is sent again."""
_FRAME_BYTES = 20_000
_TAG = b"\x81\x00"


@dataclass(frozen=True)
class Seen:
    """A frame at a device: when (seconds since 1970), and its octets without the slice's tag."""

    at_s: float
    octets: bytes


class LinkWatch:
    """Records, while it is entered, what goes into a link's device (``sent``) and what comes out of it (``came``)."""

    def __init__(self, *taps: str) -> None:
        self.sent: dict[str, list[Seen]] = {tap: [] for tap in taps}
        self.came: dict[str, list[Seen]] = {tap: [] for tap in taps}
        self.overlooked = 0
        """How many frames it was too slow for; known afterwards."""
        self._sockets = {_watching(tap): tap for tap in taps}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._record)

    def __enter__(self) -> "LinkWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for watching in self._sockets:
            _packets, dropped = _STATISTICS.unpack(
                watching.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size)
            )
            self.overlooked += dropped
            watching.close()

    def _record(self) -> None:
        while not self._stop.is_set():
            for watching in select.select(list(self._sockets), [], [], 0.2)[0]:
                data, ancillary, _flags, address = watching.recvmsg(_FRAME_BYTES, 256)
                record = self.sent if address[2] == _OUTGOING else self.came
                record[self._sockets[watching]].append(Seen(_stamp(ancillary), _untagged(data)))


def _watching(tap: str) -> socket.socket:
    watching = raw_socket(tap, _ALL_PROTOCOLS)
    watching.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 0)
    watching.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
    watching.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    return watching


def _stamp(ancillary: list[tuple[int, int, bytes]]) -> float:
    for level, kind, value in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
            seconds, nanoseconds = _TIMESPEC.unpack(value)
            return float(seconds + nanoseconds / 1e9)
    raise AssertionError("the kernel gave no time stamp")


def _untagged(data: bytes) -> bytes:
    """The kernel has taken the tag off what comes out of a device, and left it on what is put into one."""
    return data[:12] + data[16:] if data[12:14] == _TAG else data


@dataclass(frozen=True)
class Crossing:
    """One direction of a link over some time: how long the frames took that came, and how many did not."""

    took_ms: tuple[float, ...]
    lost: int


def crossing(sent: list[Seen], came: list[Seen]) -> Crossing:
    """Match what came with what was sent, in order: frames that came out of order, twice or altered are no match.

    The first second is left out, because what came then may have been sent before; so are frames that were sent more
    than once (an acknowledgment may be the same as the one before), because nobody can tell which of them came; and at
    the end what may still be on its way.

    :raise AssertionError: something came that was not sent, or not in this order.
    """
    often, began = Counter(frame.octets for frame in sent), sent[0].at_s + _BEGINNING_S
    judged = [frame for frame in sent if frame.at_s >= began and often[frame.octets] == 1]
    known = {frame.octets for frame in judged}
    took_ms, position = [], 0
    for frame in came:
        assert frame.at_s < began or frame.octets in often, f"a frame came that was not sent: {frame.octets[:40].hex()}"
        if frame.octets not in known:
            continue
        while position < len(judged) and judged[position].octets != frame.octets:
            position += 1
        assert position < len(judged), f"a frame came twice, or too late: {frame.octets[:40].hex()}"
        took_ms.append((frame.at_s - judged[position].at_s) * 1e3)
        position += 1
    return Crossing(tuple(took_ms), position - len(took_ms))
