"""From a capture of a TCP stream to its trace: when which byte passed, the longest stall, what was sent again.

Theory of operation. The capture is a pcap file (``geni_violin.runtime.pcap``), made by tcpdump at the receiver's tap,
of Ethernet frames with IPv4 or IPv6 inside; VLAN tags are passed over, as frames to an armed port carry one. Of the
streams in it, the one with the most bytes is taken: one direction of one connection. A point of the trace is a segment
with data: its time, and how far into the stream it ends, counted from the stream's first byte in the capture, across
the wrap of sequence numbers. A *stall* is the time between two advances of the highest number seen so far. A segment
that begins below it was *sent again*: sound as long as the network keeps the order of frames, which it does here.

Usage: ``tcpdump -i TAP -s 128 -w FILE tcp``, then
``python -m bench.tcp_trace FILE --name NAME [--cut-at SECONDS] --json TRACE`` (the cut in seconds since 1970).
"""

import argparse
import itertools
import json
import struct
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geni_violin.core.errors import InvalidInput
from geni_violin.runtime import pcap

_IPV4, _IPV6, _TCP = 0x0800, 0x86DD, 6
_VLAN_TAGS = (0x8100, 0x88A8)
_SYN = 0x02

Stream = tuple[bytes, int, bytes, int]
"""Source address and port, destination address and port."""


@dataclass(frozen=True)
class Segment:
    """A TCP segment. ``sequence`` is of its first byte; ``at`` in seconds since 1970."""

    at: float
    stream: Stream
    sequence: int
    length: int
    is_syn: bool


@dataclass(frozen=True)
class Trace:
    """A stream. ``points`` are (seconds since ``began_at``, bytes into the stream); ``cut_s`` counts from there too."""

    name: str
    began_at: float
    points: tuple[tuple[float, int], ...]
    stream_bytes: int
    longest_stall_s: float
    longest_stall_from_s: float
    segments: int
    segments_sent_again: int
    cut_s: float | None = None


def segment_of(captured: pcap.Frame) -> Segment | None:
    """The TCP segment in a frame; None if there is none. Lengths are those of the headers: frames may be cut short."""
    frame = captured.data
    start, kind = 14, int.from_bytes(frame[12:14], "big")
    while kind in _VLAN_TAGS:
        kind, start = int.from_bytes(frame[start + 2 : start + 4], "big"), start + 4
    packet = frame[start:]
    if kind == _IPV4 and len(packet) >= 20 and packet[9] == _TCP and not int.from_bytes(packet[6:8], "big") & 0x1FFF:
        header = 4 * (packet[0] & 0x0F)
        addresses, total = (packet[12:16], packet[16:20]), int.from_bytes(packet[2:4], "big")
    elif kind == _IPV6 and len(packet) >= 40 and packet[6] == _TCP:
        header = 40
        addresses, total = (packet[8:24], packet[24:40]), 40 + int.from_bytes(packet[4:6], "big")
    else:
        return None
    tcp = packet[header:]
    if len(tcp) < 14:
        return None
    source_port, destination_port, sequence = struct.unpack_from("!HHI", tcp)
    stream = (addresses[0], source_port, addresses[1], destination_port)
    length = total - header - 4 * (tcp[12] >> 4)
    return Segment(captured.at_us / 1e6, stream, sequence, length, bool(tcp[13] & _SYN))


def busiest_stream(segments: Iterable[Segment]) -> list[Segment]:
    """The segments with data, and the SYN, of the stream that carries the most bytes.

    :raise InvalidInput: there is no stream.
    """
    by_stream: dict[Stream, list[Segment]] = defaultdict(list)
    for segment in segments:
        if segment.length > 0 or segment.is_syn:
            by_stream[segment.stream].append(segment)
    found = max(by_stream.values(), key=lambda one: sum(segment.length for segment in one), default=[])
    if not any(segment.length for segment in found):
        raise InvalidInput("there is no TCP segment with data in the capture", "capture where the stream arrives")
    return found


def trace_of(capture: bytes, name: str, cut_at: float | None = None) -> Trace:
    """The trace of a capture's busiest stream; ``cut_at`` in seconds since 1970.

    :raise InvalidInput: there is none, or this is no pcap file.
    """
    segments = busiest_stream(filter(None, map(segment_of, pcap.decode(capture))))
    first = segments[0]
    origin = first.sequence + first.is_syn
    began_at, highest, sent_again = first.at, 0, 0
    points: list[tuple[float, int]] = []
    advances: list[float] = []
    for segment in segments:
        if not segment.length:
            continue
        begin = _unwrapped(segment.sequence + segment.is_syn - origin, highest)
        points.append((round(segment.at - began_at, 9), begin + segment.length))
        sent_again += begin < highest
        if begin + segment.length > highest:
            highest = begin + segment.length
            advances.append(segment.at - began_at)
    stall_s, stall_from_s = max(((b - a, a) for a, b in itertools.pairwise(advances)), default=(0.0, 0.0))
    return Trace(
        name=name,
        began_at=began_at,
        points=tuple(points),
        stream_bytes=highest,
        longest_stall_s=stall_s,
        longest_stall_from_s=stall_from_s,
        segments=len(points),
        segments_sent_again=sent_again,
        cut_s=None if cut_at is None else cut_at - began_at,
    )


def _unwrapped(offset: int, near: int) -> int:
    """The number that is ``offset`` modulo 2^32 and nearest to ``near``."""
    return near + ((offset - near + (1 << 31)) % (1 << 32)) - (1 << 31)


def write_trace(trace: Trace, path: Path) -> None:
    """Save it as JSON."""
    path.write_text(json.dumps(asdict(trace)) + "\n")


def read_trace(path: Path) -> Trace:
    """What :func:`write_trace` saved.

    :raise ValueError: the file is something else.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        return Trace(**{**document, "points": tuple((float(t), int(seq)) for t, seq in document["points"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no trace: {error}; expected what bench.tcp_trace writes") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Read a capture, tell what is in it, write the trace."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("capture", type=Path)
    parser.add_argument("--name", required=True, help="what the figure calls it")
    parser.add_argument("--cut-at", type=float, help="the receiver's cut, in seconds since 1970")
    parser.add_argument("--json", type=Path, required=True, help="write the trace to this file")
    arguments = parser.parse_args(argv)
    try:
        trace = trace_of(arguments.capture.read_bytes(), arguments.name, arguments.cut_at)
    except InvalidInput as error:
        print(f"{arguments.capture}: {error}", file=sys.stderr)
        return 2
    write_trace(trace, arguments.json)
    print(
        f"{trace.name}: {trace.stream_bytes / 1e6:.1f} MB in {trace.points[-1][0]:.1f} s, {trace.segments:,} segments"
    )
    print(f"  longest stall   {1000 * trace.longest_stall_s:.1f} ms, from {trace.longest_stall_from_s:.3f} s on")
    print(f"  sent again      {trace.segments_sent_again:,} segments")
    return 0


if __name__ == "__main__":
    sys.exit(main())
