"""Frames in a file, in the classic pcap format (libpcap's pcap-savefile(5)): what Wireshark reads and QEMU's dumps are.

Written: little-endian, microseconds, Ethernet, whole frames. Read: both byte orders, micro- and nanoseconds.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from geni_violin.core.errors import InvalidInput

SNAPLEN_BYTES = 1 << 18
_ETHERNET = 1
_MAGIC_US, _MAGIC_NS = 0xA1B2C3D4, 0xA1B23C4D
_FILE_HEADER = "IHHiIII"
_FRAME_HEADER = "IIII"
_FILE_HEADER_BYTES, _FRAME_HEADER_BYTES = struct.calcsize("<" + _FILE_HEADER), struct.calcsize("<" + _FRAME_HEADER)


@dataclass(frozen=True, slots=True)
class Frame:
    """One Ethernet frame, without its check sequence. ``at_us`` is in microseconds, of a clock that the user knows."""

    at_us: int
    data: bytes


def encode(frames: Iterable[Frame]) -> bytes:
    """A pcap file."""
    parts = [struct.pack("<" + _FILE_HEADER, _MAGIC_US, 2, 4, 0, 0, SNAPLEN_BYTES, _ETHERNET)]
    for frame in frames:
        seconds, microseconds = divmod(frame.at_us, 1_000_000)
        parts.append(struct.pack("<" + _FRAME_HEADER, seconds, microseconds, len(frame.data), len(frame.data)))
        parts.append(frame.data)
    return b"".join(parts)


def decode(data: bytes) -> list[Frame]:
    """The frames of a pcap file; frames that were cut short by the capture are given as they are.

    :raise InvalidInput: it is no pcap file of Ethernet frames, or it ends in the middle of one.
    """
    order, ticks_per_us = _format(data)
    frames, position = [], _FILE_HEADER_BYTES
    while position < len(data):
        start = position + _FRAME_HEADER_BYTES
        if start > len(data):
            raise InvalidInput(f"the pcap file ends in the middle of a frame's header, at byte {position}")
        seconds, fraction, length, _ = struct.unpack_from(order + _FRAME_HEADER, data, position)
        if start + length > len(data):
            raise InvalidInput(f"the pcap file ends in the middle of a frame, at byte {start}")
        frames.append(Frame(seconds * 1_000_000 + fraction // ticks_per_us, data[start : start + length]))
        position = start + length
    return frames


def _format(data: bytes) -> tuple[str, int]:
    """The byte order as ``struct`` names it, and how many ticks of its time stamps a microsecond has."""
    if len(data) < _FILE_HEADER_BYTES:
        raise InvalidInput("the pcap file ends within its header")
    for order in "<>":
        magic, *_, link_type = struct.unpack_from(order + _FILE_HEADER, data)
        if magic in (_MAGIC_US, _MAGIC_NS):
            if link_type & 0xFFFF != _ETHERNET:
                raise InvalidInput(f"the pcap file has frames of link type {link_type}", "expected Ethernet (1)")
            return order, 1 if magic == _MAGIC_US else 1000
    raise InvalidInput("this is no pcap file", "expected the classic format, not pcapng")
