"""Captures of TCP streams, made by hand."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from geni_violin.runtime import pcap

SYN, ACK = 0x02, 0x10
SENDER, RECEIVER = (b"\x0a\x09\x00\x01", 5000), (b"\x0a\x09\x00\x02", 6000)
Endpoint = tuple[bytes, int]


@dataclass(frozen=True)
class Sent:
    """A segment: when, its sequence number, how many bytes; ``tags`` are VLAN tags (TCI) on the frame."""

    at: float
    sequence: int
    length: int
    flags: int = ACK
    source: Endpoint = SENDER
    destination: Endpoint = RECEIVER
    tags: tuple[int, ...] = ()
    ipv6: bool = False
    fragment_offset: int = 0


def frame(sent: Sent) -> bytes:
    """The frame of a segment, as long as on the wire."""
    header = struct.pack(
        "!HHIIBBHHH", sent.source[1], sent.destination[1], sent.sequence % 2**32, 0, 5 << 4, sent.flags, 0, 0, 0
    )
    tcp = header + bytes(sent.length)
    if sent.ipv6:
        packet = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + _wide(sent.source) + _wide(sent.destination) + tcp
    else:
        start = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, sent.fragment_offset, 64, 6, 0)
        packet = start + sent.source[0] + sent.destination[0] + tcp
    tags = b"".join(struct.pack("!HH", 0x8100, tag) for tag in sent.tags)
    ethertype = b"\x86\xdd" if sent.ipv6 else b"\x08\x00"
    return (bytes(12) + tags + ethertype + packet).ljust(60, b"\0")


def _wide(endpoint: Endpoint) -> bytes:
    return bytes(12) + endpoint[0]


def capture(sent: Iterable[Sent], snap_bytes: int = 65535) -> bytes:
    """A capture file that keeps so many bytes of each frame."""
    return pcap.encode(pcap.Frame(round(one.at * 1_000_000), frame(one)[:snap_bytes]) for one in sent)
