"""The switch's end of a TAP device: the packet socket by which Open vSwitch reads what comes out of it.

Theory of operation. That socket's buffer, as the kernel makes it, has room for some 270 small frames; what a guest
sends beyond that before the switch looks again is dropped without a word, and frames that were held come in one burst.
So the buffer is made large. And a frame gets its color when the switch reads it: whether all that left a VM before its
frames were held is read can be seen here (docs/architecture.md, The edge of a VM).

Open vSwitch cannot be asked for either; it is done to a duplicate of its descriptor. A switch that reads the device in
another way (or does not run, as in some tests) has no such socket, and there is nothing to do or to wait for.
"""

import contextlib
import fcntl
import os
import socket
import struct
import termios
from pathlib import Path

from geni_violin.hostagent.descriptors import duplicates

_PID_FILE = Path("/var/run/openvswitch/ovs-vswitchd.pid")
_BUFFER_BYTES = 16 << 20
_SO_MEMINFO = 55  # socket(7) lacks it: what the socket's buffers hold and may hold, in linux/sock_diag.h's order
_SO_RCVBUFFORCE = 33  # socket(7): for root, beyond what others may have


class SwitchEnd:
    """The sockets that read one device now. :meth:`close` lets go of them."""

    def __init__(self, tap: str) -> None:
        self._sockets = _sockets_on(tap)

    def enlarge(self) -> int:
        """Make room for bursts; how many sockets there are."""
        for end in self._sockets:
            end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        return len(self._sockets)

    def has_read(self) -> bool:
        """Whether nothing that came out of the device waits to be read."""
        return not any(_waiting_bytes(end) for end in self._sockets)

    def has_room(self) -> bool:
        """Whether less than half of the room for bursts is in use."""
        return all(_is_half_empty(end) for end in self._sockets)

    def close(self) -> None:
        """Let go; the switch keeps its own."""
        for end in self._sockets:
            end.close()
        self._sockets = []


def _sockets_on(tap: str) -> list[socket.socket]:
    try:
        pid = int(_PID_FILE.read_text())
        descriptors = duplicates(pid, "socket:")
    except (OSError, ValueError):  # it does not run, or may not be looked at
        return []
    found = []
    for descriptor in descriptors:
        end = _packet_socket(descriptor)
        if end is not None and end.getsockname()[0] == tap:
            found.append(end)
        elif end is not None:
            end.close()
    return found


def _packet_socket(descriptor: int) -> socket.socket | None:
    """The socket of a descriptor if it is a packet(7) socket; else the descriptor is closed."""
    with contextlib.suppress(OSError):
        end = socket.socket(fileno=descriptor)
        if end.family == socket.AF_PACKET:
            return end
        end.close()
        return None
    os.close(descriptor)
    return None


def _is_half_empty(end: socket.socket) -> bool:
    held_bytes, most_bytes = struct.unpack_from("@II", end.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 64))
    return bool(2 * held_bytes < most_bytes)


def _waiting_bytes(end: socket.socket) -> int:
    """The size of the next frame to be read, 0 if there is none (FIONREAD)."""
    answer = fcntl.ioctl(end.fileno(), termios.FIONREAD, bytes(4))
    return int(struct.unpack("i", answer)[0])
