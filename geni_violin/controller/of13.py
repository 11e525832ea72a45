"""Rules to OpenFlow 1.3 messages and back. The one module that knows the wire library.

Theory of operation. A message needs a datapath only to know the protocol's version, so :data:`PROTOCOL` stands for it
and messages can be made, and read, without a switch. All messages of a plan become one string of bytes, which is
queued, and sent, as one: nothing of another plan can get in between.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ryu.ofproto import ofproto_parser, ofproto_protocol
from ryu.ofproto import ofproto_v1_3 as ofp
from ryu.ofproto import ofproto_v1_3_parser as parser

from geni_violin.controller.diff import AddMeter, Batch, Change, InstallRule, RemoveMeter
from geni_violin.controller.pipeline import (
    MULTICAST,
    Action,
    Match,
    Output,
    PopVlan,
    PushVlan,
    Rule,
    SetVlanPcp,
    SetVlanVid,
    vlan_id_of_cookie,
)

VERSION = ofp.OFP_VERSION
PROTOCOL: Any = ofproto_protocol.ProtocolDesc(VERSION)
_ETHERTYPE_8021Q = 0x8100
_ALL_BITS = (1 << 64) - 1
_NO_LIMIT_PER_S = 0xFFFFFFFF
_XID_OFFSET = 4
_BARRIER = struct.pack("!BBHI", VERSION, ofp.OFPT_BARRIER_REQUEST, ofp.OFP_HEADER_SIZE, 0)

SetXid = Callable[[Any], int]
"""Gives a message its transaction id, and says which; ``set_xid`` of a Ryu datapath."""


class _Number:
    """Takes a transaction id as a message does."""

    xid = 0

    def set_xid(self, xid: int) -> None:
        self.xid = xid


@dataclass
class Encoded:
    """Messages ready to be sent. ``barrier_xid`` is the transaction id of the last one, a barrier request."""

    data: bytearray = field(default_factory=bytearray)
    xids: set[int] = field(default_factory=set)
    barrier_xid: int = 0

    def append(self, message: bytes, set_xid: SetXid) -> int:
        """Add one more message (the id in it is not looked at), and give back its transaction id."""
        xid = set_xid(_Number())
        self.data += message[:_XID_OFFSET]
        self.data += xid.to_bytes(4, "big")
        self.data += message[_XID_OFFSET + 4 :]
        self.xids.add(xid)
        return xid


@dataclass(frozen=True)
class FlowEntry:
    """A rule of ours that a switch reports. ``rule`` is None if this version would not have made it."""

    rule: Rule | None
    packet_count: int
    text: str


def encode(batches: Iterable[Batch], set_xid: SetXid) -> Encoded:
    """All messages of a plan for one switch: each batch and a barrier; one barrier if there are no batches."""
    encoded = Encoded()
    for batch in tuple(batches) or ((),):
        for change in batch:
            encoded.append(_bytes_of_change(change), set_xid)
        encoded.barrier_xid = encoded.append(_BARRIER, set_xid)
    return encoded


@lru_cache(maxsize=32_768)
def _bytes_of_change(change: Change) -> bytes:
    """A recolor is urgent, and making a message is slow. Colors come round, so most are the same as three cuts ago."""
    return _bytes_of(message_of(change))


def _bytes_of(message: Any) -> bytes:
    message.set_xid(0)
    message.serialize()
    return bytes(message.buf)


def message_of(change: Change) -> Any:
    """The message that makes a change."""
    match change:
        case AddMeter(meter):
            return meter_mod(ofp.OFPMC_ADD, meter)
        case RemoveMeter(meter):
            return meter_mod(ofp.OFPMC_DELETE, meter)
        case _:
            return flow_mod(change.rule, is_install=isinstance(change, InstallRule))


def meter_mod(command: int, meter: int) -> Any:
    """A meter that counts frames and lets all of them pass; Open vSwitch wants a band, so it has one out of reach."""
    flags = ofp.OFPMF_PKTPS | ofp.OFPMF_STATS
    bands = [parser.OFPMeterBandDrop(_NO_LIMIT_PER_S, 0)] if command == ofp.OFPMC_ADD else []
    return parser.OFPMeterMod(PROTOCOL, command, flags, meter, bands)


def flow_mod(rule: Rule, is_install: bool) -> Any:
    """The flow-mod of a rule. Replacing a rule keeps its counters: OFPFF_RESET_COUNTS is not set."""
    return parser.OFPFlowMod(
        PROTOCOL,
        cookie=rule.cookie,
        table_id=rule.table,
        command=ofp.OFPFC_ADD if is_install else ofp.OFPFC_DELETE_STRICT,
        priority=rule.priority,
        out_port=ofp.OFPP_ANY,
        out_group=ofp.OFPG_ANY,
        match=_match(rule.match),
        instructions=_instructions(rule) if is_install else [],
    )


def flow_stats_request(cookie: int, cookie_mask: int, set_xid: SetXid) -> tuple[bytes, int]:
    """A request for the flow entries of all tables whose cookie fits, and its transaction id."""
    message = parser.OFPFlowStatsRequest(
        PROTOCOL, 0, ofp.OFPTT_ALL, ofp.OFPP_ANY, ofp.OFPG_ANY, cookie, cookie_mask, parser.OFPMatch()
    )
    return _request(message, set_xid)


def meter_features_request(set_xid: SetXid) -> tuple[bytes, int]:
    """A request for what meters the switch can have, and its transaction id."""
    return _request(parser.OFPMeterFeaturesStatsRequest(PROTOCOL, 0), set_xid)


def meter_stats_request(set_xid: SetXid) -> tuple[bytes, int]:
    """A request for the counts of all meters, and its transaction id."""
    return _request(parser.OFPMeterStatsRequest(PROTOCOL, 0, ofp.OFPM_ALL), set_xid)


def _request(message: Any, set_xid: SetXid) -> tuple[bytes, int]:
    encoded = Encoded()
    xid = encoded.append(_bytes_of(message), set_xid)
    return bytes(encoded.data), xid


@lru_cache(maxsize=16_384)
def _match(match: Match) -> Any:
    """A match as the wire library has it; making one is slow, and all switches of a slice have many in common."""
    values: dict[str, Any] = {name: getattr(match, name) for name in match.used()}
    if "vlan_vid" in values:
        values["vlan_vid"] |= ofp.OFPVID_PRESENT
    if values.get("eth_dst") == MULTICAST:
        values["eth_dst"] = (MULTICAST, MULTICAST)
    return parser.OFPMatch(**values)


def _instructions(rule: Rule) -> list[Any]:
    instructions: list[Any] = []
    if rule.meter is not None:
        instructions.append(parser.OFPInstructionMeter(rule.meter))
    if rule.actions:
        actions = [_action(action) for action in rule.actions]
        instructions.append(parser.OFPInstructionActions(ofp.OFPIT_APPLY_ACTIONS, actions))
    if rule.metadata is not None:
        instructions.append(parser.OFPInstructionWriteMetadata(rule.metadata, _ALL_BITS))
    if rule.goto is not None:
        instructions.append(parser.OFPInstructionGotoTable(rule.goto))
    return instructions


def _action(action: Action) -> Any:
    match action:
        case PushVlan():
            return parser.OFPActionPushVlan(_ETHERTYPE_8021Q)
        case SetVlanVid(vlan_vid):
            return parser.OFPActionSetField(vlan_vid=vlan_vid | ofp.OFPVID_PRESENT)
        case SetVlanPcp(vlan_pcp):
            return parser.OFPActionSetField(vlan_pcp=vlan_pcp)
        case PopVlan():
            return parser.OFPActionPopVlan()
        case Output(port_no):
            return parser.OFPActionOutput(port_no)


# --- what switches say ------------------------------------------------------------------------------------------------


def flow_entries(reply: Any) -> list[FlowEntry]:
    """The entries of one flow statistics reply that are ours."""
    ours = [entry for entry in reply.body if vlan_id_of_cookie(entry.cookie) is not None]
    return [FlowEntry(_rule_or_none(entry), entry.packet_count, str(entry)) for entry in ours]


def meter_counts(reply: Any) -> dict[int, int]:
    """Frames by meter, of one meter statistics reply."""
    return {entry.meter_id: entry.packet_in_count for entry in reply.body}


def highest_meter(reply: Any) -> int:
    """The highest number that a meter can have, of a meter features reply; 0 if there are no meters."""
    return max((entry.max_meter for entry in reply.body), default=0)


def ports_of(datapath: Any) -> dict[int, bool]:
    """The ports of a Ryu datapath, which Ryu keeps up to date: by number, whether frames can pass."""
    return {number: _is_up(port) for number, port in datapath.ports.items()}


def _is_up(port: Any) -> bool:
    return not (port.config & ofp.OFPPC_PORT_DOWN or port.state & ofp.OFPPS_LINK_DOWN)


def has_more(reply: Any) -> bool:
    """Whether another part of this multipart reply follows."""
    return bool(reply.flags & ofp.OFPMPF_REPLY_MORE)


def refusal(error: Any) -> tuple[int, str]:
    """Of an error message: the transaction id of the message that was refused, and what the switch said."""
    xid = error.xid
    if error.data and len(error.data) >= ofp.OFP_HEADER_SIZE:
        xid = ofproto_parser.header(error.data)[3]
    kind, code = ofp.ofp_error_type_to_str(error.type), ofp.ofp_error_code_to_str(error.type, error.code)
    return xid, f"{kind}, {code}"


def rule_of(entry: Any) -> Rule:
    """The rule that a flow entry (or a flow-mod) of ours is.

    :raise ValueError: it has something that no rule of this version has.
    """
    vlan_id = vlan_id_of_cookie(entry.cookie)
    if vlan_id is None:
        raise ValueError("its cookie is not ours")
    actions: list[Action] = []
    metadata = goto = meter = None
    for instruction in entry.instructions:
        match instruction:
            case parser.OFPInstructionMeter():
                meter = instruction.meter_id
            case parser.OFPInstructionActions(type=ofp.OFPIT_APPLY_ACTIONS):
                actions += _actions_of(instruction.actions)
            case parser.OFPInstructionWriteMetadata(metadata_mask=mask) if mask == _ALL_BITS:
                metadata = instruction.metadata
            case parser.OFPInstructionGotoTable():
                goto = instruction.table_id
            case _:
                raise ValueError(f"instruction {instruction}")
    match_ = _match_of(entry.match)
    return Rule(entry.table_id, entry.priority, match_, vlan_id, tuple(actions), metadata, goto, meter)


def _rule_or_none(entry: Any) -> Rule | None:
    try:
        return rule_of(entry)
    except ValueError:
        return None


def _match_of(wire_match: Any) -> Match:
    values = dict(wire_match.items())
    if "vlan_vid" in values:
        values["vlan_vid"] = _without_present_bit(values["vlan_vid"])
    if values.get("eth_dst") == (MULTICAST, MULTICAST):
        values["eth_dst"] = MULTICAST
    if any(isinstance(value, tuple) for value in values.values()):
        raise ValueError(f"mask in {values}")
    try:
        return Match(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _without_present_bit(value: Any) -> int:
    if not isinstance(value, int) or not value & ofp.OFPVID_PRESENT:
        raise ValueError(f"VLAN match {value}")
    return value ^ int(ofp.OFPVID_PRESENT)


def _actions_of(wire_actions: Iterable[Any]) -> Iterator[Action]:
    for action in wire_actions:
        match action:
            case parser.OFPActionPushVlan(ethertype=ethertype) if ethertype == _ETHERTYPE_8021Q:
                yield PushVlan()
            case parser.OFPActionSetField(key="vlan_vid"):
                yield SetVlanVid(_without_present_bit(action.value))
            case parser.OFPActionSetField(key="vlan_pcp"):
                yield SetVlanPcp(action.value)
            case parser.OFPActionPopVlan():
                yield PopVlan()
            case parser.OFPActionOutput():
                yield Output(action.port)
            case _:
                raise ValueError(f"action {action}")
