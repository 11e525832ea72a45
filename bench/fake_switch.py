"""A switch that speaks OpenFlow 1.3 and forwards nothing: it keeps the rules that it is sent, and counts.

Theory of operation. Bytes in, bytes out (:meth:`FakeSwitch.receive`), no sockets. A rule is kept as the bytes that it
came in, under its table, priority and match, so that taking it costs microseconds and a flow statistics reply gives
back exactly what was sent. What a message of this kind means is in the OpenFlow Switch Specification 1.3, chapter 7;
what this switch does not know is refused with an error message, as a real one would, and counted.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

VERSION = 4


class Kind(IntEnum):
    """Message types (A.1)."""

    HELLO = 0
    ERROR = 1
    ECHO_REQUEST = 2
    ECHO_REPLY = 3
    FEATURES_REQUEST = 5
    FEATURES_REPLY = 6
    GET_CONFIG_REQUEST = 7
    GET_CONFIG_REPLY = 8
    SET_CONFIG = 9
    FLOW_MOD = 14
    MULTIPART_REQUEST = 18
    MULTIPART_REPLY = 19
    BARRIER_REQUEST = 20
    BARRIER_REPLY = 21
    ROLE_REQUEST = 24
    ROLE_REPLY = 25
    METER_MOD = 29


class Command(IntEnum):
    """What a flow-mod wants."""

    ADD = 0
    DELETE = 3
    DELETE_STRICT = 4


class MeterCommand(IntEnum):
    """What a meter-mod wants."""

    ADD = 0
    DELETE = 2


class Report(IntEnum):
    """Types of multipart messages."""

    FLOW = 1
    METER = 9
    METER_FEATURES = 11
    PORT_DESC = 13


ANY = 0xFFFFFFFF
ALL_TABLES = 0xFF
MORE = 1
BAD_REQUEST, BAD_TYPE, BAD_MULTIPART = 1, 1, 2
FLOW_MOD_FAILED, BAD_COMMAND = 5, 6
METER_MOD_FAILED, METER_EXISTS, INVALID_METER, METER_BAD_COMMAND = 12, 1, 2, 4
METER_INSTRUCTION = 6
ALL_METERS = 0xFFFFFFFF
MAX_METER = (1 << 18) - 1
BAND_BYTES = 16
TABLES = 254
MAX_BODY_BYTES = 60_000

_HEADER = struct.Struct("!BBHI")
_FLOW_MOD = struct.Struct("!QQBBHHHIIIH2x")
_FLOW_STATS_REQUEST = struct.Struct("!B3xII4xQQ")
_FLOW_STATS = struct.Struct("!HBxIIHHHH4xQQQ")
_MULTIPART = struct.Struct("!HH4x")
_FEATURES = struct.Struct("!QIBB2xII")
_PORT = struct.Struct("!I4x6s2x16sIIIIIIII")
_METER_MOD = struct.Struct("!HHI")
_METER_STATS = struct.Struct("!IH6xIQQII")
_METER_FEATURES = struct.Struct("!IIIBB2x")
_EMPTY_MATCH = struct.pack("!HH4x", 1, 4)

RuleKey = tuple[int, int, bytes]
"""Table, priority and match (with its padding)."""


@dataclass(frozen=True, slots=True)
class KeptRule:
    """The rest of a rule: its cookie, its instructions as they came, and the meter that is among them."""

    cookie: int
    instructions: bytes
    meter: int | None


@dataclass
class Counts:
    """What a switch was sent since it was made."""

    flow_mods: int = 0
    flow_mod_bytes: int = 0
    meter_mods: int = 0
    barriers: int = 0
    refused: int = 0


class FakeSwitch:
    """One switch, from one connection to its end."""

    def __init__(self, dpid: int, port_nos: tuple[int, ...]) -> None:
        self.dpid, self.port_nos = dpid, port_nos
        self.rules: dict[RuleKey, KeptRule] = {}
        self.meters: dict[int, int] = {}
        """By number, how many bands a meter has."""
        self.counts = Counts()
        self._unread = b""

    def greeting(self) -> bytes:
        """What it says first."""
        return _message(Kind.HELLO, 0)

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the controller, whatever their borders; gives back the answers.

        :raise ValueError: this is not OpenFlow 1.3.
        """
        self._unread += data
        answers: list[bytes] = []
        start = 0
        while len(self._unread) - start >= _HEADER.size:
            version, kind, length, xid = _HEADER.unpack_from(self._unread, start)
            if length < _HEADER.size or (version != VERSION and kind != Kind.HELLO):
                raise ValueError(f"version {version}, length {length}: this is not OpenFlow 1.3")
            if len(self._unread) - start < length:
                break
            answers += self._take(kind, xid, self._unread[start : start + length])
            start += length
        self._unread = self._unread[start:]
        return b"".join(answers)

    def _take(self, kind: int, xid: int, message: bytes) -> Iterator[bytes]:
        body = message[_HEADER.size :]
        match kind:
            case Kind.FLOW_MOD:
                yield from self._change(xid, message)
            case Kind.METER_MOD:
                yield from self._change_meter(xid, message)
            case Kind.BARRIER_REQUEST:
                self.counts.barriers += 1
                yield _message(Kind.BARRIER_REPLY, xid)
            case Kind.ECHO_REQUEST:
                yield _message(Kind.ECHO_REPLY, xid, body)
            case Kind.FEATURES_REQUEST:
                yield _message(Kind.FEATURES_REPLY, xid, _FEATURES.pack(self.dpid, 0, TABLES, 0, 1, 0))
            case Kind.GET_CONFIG_REQUEST:
                yield _message(Kind.GET_CONFIG_REPLY, xid, struct.pack("!HH", 0, 128))
            case Kind.ROLE_REQUEST:
                yield _message(Kind.ROLE_REPLY, xid, body)
            case Kind.MULTIPART_REQUEST:
                yield from self._report(xid, message)
            case Kind.HELLO | Kind.ERROR | Kind.ECHO_REPLY | Kind.SET_CONFIG:
                pass
            case _:
                yield self._refuse(xid, message, BAD_REQUEST, BAD_TYPE)

    def _refuse(self, xid: int, message: bytes, kind: int, code: int) -> bytes:
        self.counts.refused += 1
        return _message(Kind.ERROR, xid, struct.pack("!HH", kind, code) + message[:64])

    # --- rules ---

    def _change(self, xid: int, message: bytes) -> Iterator[bytes]:
        self.counts.flow_mods += 1
        self.counts.flow_mod_bytes += len(message)
        cookie, mask, table, command, _idle, _hard, priority, _buffer, out_port, out_group, _flags = (
            _FLOW_MOD.unpack_from(message, _HEADER.size)
        )
        wire_match, instructions = _split_match(message[_HEADER.size + _FLOW_MOD.size :])
        key = (table, priority, wire_match)
        if command == Command.ADD:
            rule = KeptRule(cookie, instructions, _meter_in(instructions))
            if rule.meter is not None and rule.meter not in self.meters:
                yield self._refuse(xid, message, METER_MOD_FAILED, INVALID_METER)
            else:
                self.rules[key] = rule
        elif command == Command.DELETE_STRICT and out_port == out_group == ANY:
            if key in self.rules and not (self.rules[key].cookie ^ cookie) & mask:
                del self.rules[key]
        elif command == Command.DELETE and wire_match == _EMPTY_MATCH and out_port == out_group == ANY:
            for found in [*self._find(table, cookie, mask)]:
                del self.rules[found]
        else:
            yield self._refuse(xid, message, FLOW_MOD_FAILED, BAD_COMMAND)

    def _change_meter(self, xid: int, message: bytes) -> Iterator[bytes]:
        """Rules that use a meter go with it (6.5)."""
        self.counts.meter_mods += 1
        command, _flags, meter = _METER_MOD.unpack_from(message, _HEADER.size)
        if command == MeterCommand.ADD and meter in self.meters:
            yield self._refuse(xid, message, METER_MOD_FAILED, METER_EXISTS)
        elif command == MeterCommand.ADD and not 0 < meter <= MAX_METER:
            yield self._refuse(xid, message, METER_MOD_FAILED, INVALID_METER)
        elif command == MeterCommand.ADD:
            self.meters[meter] = (len(message) - _HEADER.size - _METER_MOD.size) // BAND_BYTES
        elif command == MeterCommand.DELETE:
            gone = self.meters.keys() & ({*self.meters} if meter == ALL_METERS else {meter})
            self.meters = {number: bands for number, bands in self.meters.items() if number not in gone}
            self.rules = {key: rule for key, rule in self.rules.items() if rule.meter not in gone}
        else:
            yield self._refuse(xid, message, METER_MOD_FAILED, METER_BAD_COMMAND)

    def _find(self, table: int, cookie: int, mask: int) -> Iterator[RuleKey]:
        for key, rule in self.rules.items():
            if table in (ALL_TABLES, key[0]) and not (rule.cookie ^ cookie) & mask:
                yield key

    # --- reports ---

    def _report(self, xid: int, message: bytes) -> Iterator[bytes]:
        kind, _flags = _MULTIPART.unpack_from(message, _HEADER.size)
        body = message[_HEADER.size + _MULTIPART.size :]
        if kind == Report.PORT_DESC:
            yield from _multipart(xid, kind, [_port_description(self.dpid, number) for number in self.port_nos])
        elif kind == Report.FLOW and body[_FLOW_STATS_REQUEST.size :] == _EMPTY_MATCH:
            table, _port, _group, cookie, mask = _FLOW_STATS_REQUEST.unpack_from(body)
            yield from _multipart(xid, kind, [self._flow_entry(key) for key in self._find(table, cookie, mask)])
        elif kind == Report.METER and int.from_bytes(body[:4], "big") == ALL_METERS:
            yield from _multipart(xid, kind, [self._meter_entry(meter) for meter in self.meters])
        elif kind == Report.METER_FEATURES:
            yield from _multipart(xid, kind, [_METER_FEATURES.pack(MAX_METER, 1 << 1, 0xF, 1, 0)])
        else:
            yield self._refuse(xid, message, BAD_REQUEST, BAD_MULTIPART)

    def _meter_entry(self, meter: int) -> bytes:
        bands = self.meters[meter]
        users = sum(rule.meter == meter for rule in self.rules.values())
        head = _METER_STATS.pack(meter, _METER_STATS.size + bands * BAND_BYTES, users, 0, 0, 0, 0)
        return head + bytes(bands * BAND_BYTES)

    def _flow_entry(self, key: RuleKey) -> bytes:
        table, priority, wire_match = key
        rule = self.rules[key]
        length = _FLOW_STATS.size + len(wire_match) + len(rule.instructions)
        head = _FLOW_STATS.pack(length, table, 0, 0, priority, 0, 0, 0, rule.cookie, 0, 0)
        return head + wire_match + rule.instructions


def _message(kind: int, xid: int, body: bytes = b"") -> bytes:
    return _HEADER.pack(VERSION, kind, _HEADER.size + len(body), xid) + body


def _split_match(data: bytes) -> tuple[bytes, bytes]:
    """A match is padded to a multiple of 8 bytes; its length does not tell of that (7.2.3.1)."""
    padded = (int.from_bytes(data[2:4], "big") + 7) // 8 * 8
    return data[:padded], data[padded:]


def _meter_in(instructions: bytes) -> int | None:
    """The meter that a rule's instructions name; None if there is none."""
    start = 0
    while start + 8 <= len(instructions):
        kind, length = struct.unpack_from("!HH", instructions, start)
        if kind == METER_INSTRUCTION:
            return int.from_bytes(instructions[start + 4 : start + 8], "big")
        start += max(8, length)
    return None


def _multipart(xid: int, kind: int, entries: list[bytes]) -> Iterator[bytes]:
    """A message can have no more than 64 KiB, so long answers come in parts, all but the last with a flag."""
    body = b""
    for entry in entries:
        if len(body) + len(entry) > MAX_BODY_BYTES:
            yield _message(Kind.MULTIPART_REPLY, xid, _MULTIPART.pack(kind, MORE) + body)
            body = b""
        body += entry
    yield _message(Kind.MULTIPART_REPLY, xid, _MULTIPART.pack(kind, 0) + body)


def _port_description(dpid: int, number: int) -> bytes:
    address = b"\x02" + (dpid & 0xFF).to_bytes(1, "big") + number.to_bytes(4, "big")
    return _PORT.pack(number, address, f"port{number}".encode(), *[0] * 8)
