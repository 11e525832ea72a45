"""Single frames, sent and seen by raw sockets in any network namespace, with their outer VLAN tag."""

import contextlib
import ctypes
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BROADCAST = "ff:ff:ff:ff:ff:ff"
ETHERTYPE = 0x88B5
"""IEEE 802 local experimental 1: nothing else sends it."""
ETHERTYPE_8021Q = 0x8100
MAX_FRAME_BYTES = 16_384
_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_AUXDATA, _PACKET_IGNORE_OUTGOING = 263, 8, 23
_PACKET_STATISTICS = 6
_TP_STATUS_VLAN_VALID = 0x10
_SO_RCVBUFFORCE, _ROOM_BYTES = 33, 32 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)


def octets(mac: str) -> bytes:
    """A MAC address as it is on the wire."""
    return bytes.fromhex(mac.replace(":", ""))


@dataclass(frozen=True)
class Seen:
    """A frame at an interface: its outer tag (0 and 0 if it has none), and what comes after its addresses and type."""

    vlan_id: int
    color: int
    payload: bytes


@contextlib.contextmanager
def network_namespace(pid: int) -> Iterator[None]:
    """Be in the network namespace of a process, for what is opened in this block."""
    with Path("/proc/thread-self/ns/net").open() as here, Path(f"/proc/{pid}/ns/net").open() as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(here.fileno())


def _enter(descriptor: int) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def raw_socket(interface: str, protocol: int = ETHERTYPE) -> socket.socket:
    """A socket that sends, and sees the received, Ethernet frames of one interface."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
    raw.bind((interface, protocol))
    raw.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    raw.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM_BYTES)
    raw.setblocking(False)
    return raw


class LinkCapture:
    """Sees the test frames that arrive at an interface, with their outer tag."""

    def __init__(self, interface: str) -> None:
        self._socket = raw_socket(interface, _ETH_P_ALL)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)

    def take(self, quiet_s: float = 0.3) -> list[Seen]:
        """All test frames until nothing has come for a while."""
        seen = []
        while select.select([self._socket], [], [], quiet_s)[0]:
            data, ancillary, _flags, _address = self._socket.recvmsg(MAX_FRAME_BYTES, 256)
            frame = _seen(data, ancillary)
            if frame is not None:
                seen.append(frame)
        return seen

    def overlooked(self) -> int:
        """How many frames found no room here since this was last asked: not lost by the network, but by this test."""
        _packets, drops = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        return int(drops)

    def close(self) -> None:
        """Stop seeing."""
        self._socket.close()


def _seen(data: bytes, ancillary: list[tuple[int, int, bytes]]) -> Seen | None:
    """The kernel takes the outer tag off and reports it beside the frame (packet(7), PACKET_AUXDATA)."""
    if int.from_bytes(data[12:14], "big") not in (ETHERTYPE, ETHERTYPE_8021Q):
        return None
    for level, kind, value in ancillary:
        if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA):
            status, _len, _snaplen, _mac, _net, tci, _tpid = struct.unpack("IIIHHHH", value)
            if status & _TP_STATUS_VLAN_VALID:
                return Seen(tci & 0xFFF, tci >> 13, data[14:])
    return Seen(0, 0, data[14:]) if int.from_bytes(data[12:14], "big") == ETHERTYPE else None
