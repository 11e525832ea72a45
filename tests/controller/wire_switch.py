"""A switch at the other end of the wire: takes OpenFlow bytes, keeps the rules, answers. Stands for Ryu's datapath."""

import itertools
import struct
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from ryu.lib import hub
from ryu.ofproto import ofproto_parser
from ryu.ofproto import ofproto_v1_3 as ofp

from geni_violin.controller import of13
from geni_violin.controller.diff import InstallRule
from geni_violin.controller.meters import HIGHEST_METER
from geni_violin.controller.operations import Operations
from geni_violin.controller.pipeline import Key, Rule

BARRIER, FLOW_MOD, METER_MOD, STATS = "barrier", "flow-mod", "meter-mod", "stats"


def split(data: bytes | bytearray) -> list[tuple[str, int, Any]]:
    """The messages in a string of bytes: kind, transaction id and, of a flow-mod, what the wire library reads."""
    kinds = {
        ofp.OFPT_FLOW_MOD: FLOW_MOD,
        ofp.OFPT_METER_MOD: METER_MOD,
        ofp.OFPT_BARRIER_REQUEST: BARRIER,
        ofp.OFPT_MULTIPART_REQUEST: STATS,
    }
    messages, rest = [], bytearray(data)
    while rest:
        version, number, length, xid = ofproto_parser.header(rest)
        kind = kinds[number]
        head = bytes(rest[:length])
        body = ofproto_parser.msg(of13.PROTOCOL, version, number, length, xid, head) if kind == FLOW_MOD else head
        messages.append((kind, xid, body))
        rest = rest[length:]
    return messages


class WireSwitch:
    """``answers`` False makes it silent, ``refuses`` True makes it answer the next flow-mod with an error.
    ``is_congested`` True makes the next message wait; one that answers ``late`` does so after that many seconds.
    ``has_meters`` False makes it refuse whatever is about meters."""

    def __init__(self, dpid: int, operations: Operations, port_nos: Iterable[int] = range(1, 2000)) -> None:
        self.id = dpid
        self.operations = operations
        self.rules: dict[Key, Rule] = {}
        self.packets: Counter[Key] = Counter()
        self.meters: dict[int, int] = {}
        self.ports = {number: SimpleNamespace(config=0, state=0) for number in port_nos}
        self.received: list[str] = []
        self.late_s = 0.0
        self.has_meters = True
        self.answers, self.refuses, self.is_congested, self.is_closed = True, False, False, False
        self._xids = itertools.count(1)

    def connect(self) -> None:
        """Connect, as after Ryu's handshake, and be synchronized."""
        self.is_closed = False
        self.operations.synchronize(self.operations.switch_arrived(self))

    def restart_empty(self) -> None:
        """Lose everything, and connect again."""
        self.rules, self.meters = {}, {}
        self.operations.switch_left(self)
        self.connect()

    def set_port(self, port_no: int, is_up: bool) -> None:
        """A port goes up or down; Ryu has changed its list of ports, and then tells."""
        self.ports[port_no] = SimpleNamespace(config=0, state=0 if is_up else ofp.OFPPS_LINK_DOWN)
        self.operations.port_changed(self)
        hub.spawn(self.operations.reroute)

    # --- what the controller calls ---

    def set_xid(self, message: Any) -> int:
        """Give a message its transaction id."""
        message.set_xid(next(self._xids))
        return int(message.xid)

    def send(self, data: bytes | bytearray) -> bool:
        """Take messages, after a wait if the queue is full; the answers come later, from another green thread."""
        if self.is_congested:
            self.is_congested = False
            hub.sleep(0.02)
        for kind, xid, body in split(data):
            self.received.append(kind)
            if self.answers:
                hub.spawn_after(self.late_s, self._handle, kind, xid, body)
        hub.sleep(0)
        return True

    def close(self) -> None:
        """The controller gives up."""
        self.is_closed = True

    # --- what it does ---

    def _handle(self, kind: str, xid: int, body: Any) -> None:
        message = SimpleNamespace(datapath=self, xid=xid, flags=0)
        if kind == BARRIER:
            self.operations.barrier_replied(message)
        elif kind == STATS:
            self._report(message, int.from_bytes(body[8:10], "big"))
        elif kind == METER_MOD:
            self._change_meter(message, body)
        elif self.refuses:
            self.refuses = False
            self._refuse(message, body.buf, ofp.OFPET_FLOW_MOD_FAILED, ofp.OFPFMFC_TABLE_FULL)
        elif body.command == ofp.OFPFC_ADD:
            rule = of13.rule_of(body)
            assert rule.meter is None or rule.meter in self.meters
            self.rules[rule.key] = rule
        else:
            body.instructions = []
            del self.rules[of13.rule_of(body).key]

    def _refuse(self, message: Any, refused: bytes, kind: int, code: int) -> None:
        message.type, message.code, message.data = kind, code, bytes(refused[:64])
        self.operations.refused(message)

    def _change_meter(self, message: Any, body: bytes) -> None:
        command, _flags, meter = struct.unpack_from("!HHI", body, 8)
        if command == ofp.OFPMC_DELETE:
            self.meters.pop(meter, None)
        elif meter in self.meters:
            self._refuse(message, body, ofp.OFPET_METER_MOD_FAILED, ofp.OFPMMFC_METER_EXISTS)
        else:
            self.meters[meter] = 0

    def _report(self, message: Any, kind: int) -> None:
        if kind == ofp.OFPMP_FLOW:
            self._report_rules(message)
        elif not self.has_meters:
            self._refuse(message, b"", ofp.OFPET_BAD_REQUEST, ofp.OFPBRC_BAD_MULTIPART)
        elif kind == ofp.OFPMP_METER_FEATURES:
            message.body = [SimpleNamespace(max_meter=HIGHEST_METER)]
            self.operations.meter_features_reported(message)
        elif kind == ofp.OFPMP_METER:
            message.body = [SimpleNamespace(meter_id=m, packet_in_count=n) for m, n in self.meters.items()]
            self.operations.meters_reported(message)

    def _report_rules(self, message: Any) -> None:
        """In two parts, as long answers come."""
        for part, flags in (([0], ofp.OFPMPF_REPLY_MORE), ([1], 0)):
            rules = [rule for index, rule in enumerate(self.rules.values()) if [index % 2] == part]
            message.body, message.flags = [self._entry(rule) for rule in rules], flags
            self.operations.flows_reported(message)

    def _entry(self, rule: Rule) -> Any:
        entry = of13.message_of(InstallRule(rule))
        entry.packet_count = self.packets[rule.key]
        return entry
