"""The fake switch at the other end of the controller's own wire module and of Ryu's parser."""

import itertools
from collections.abc import Container
from typing import Any

import pytest
from ryu.ofproto import ofproto_parser
from ryu.ofproto import ofproto_v1_3 as ofp
from ryu.ofproto import ofproto_v1_3_parser as parser

from bench.fake_switch import MAX_METER, FakeSwitch
from geni_violin.controller import of13
from geni_violin.controller.diff import AddMeter, Batch, InstallRule, RemoveMeter, RemoveRule
from geni_violin.controller.pipeline import COOKIE_MAGIC, COOKIE_MAGIC_MASK, SLICE_COOKIE_MASK, Rule, slice_cookie
from geni_violin.controller.rules import default_rules, slice_rules
from geni_violin.core.model import EdgePort, NetworkSlice, SwitchLink

DPID = 0x51
_xids = itertools.count(1)


def set_xid(message: Any) -> int:
    """Give a message its transaction id, as a datapath does."""
    message.set_xid(next(_xids))
    return int(message.xid)


def ask(switch: FakeSwitch, message: Any) -> list[Any]:
    """Send one message; the answers, as Ryu reads them."""
    set_xid(message)
    message.serialize()
    return answers(switch.receive(bytes(message.buf)))


def answers(data: bytes) -> list[Any]:
    """Messages as Ryu reads them."""
    found = []
    while data:
        version, kind, length, xid = ofproto_parser.header(data)
        found.append(ofproto_parser.msg(of13.PROTOCOL, version, kind, length, xid, data[:length]))
        data = data[length:]
    return found


def rules_of_a_slice(ports: int = 3, vlan_id: int = 7) -> list[Rule]:
    """What a slice of some ports has on this switch."""
    edge = tuple(EdgePort(f"v{i}", DPID + i % 2, 10 + i, f"52:54:00:00:00:{i:02x}", 0) for i in range(ports))
    return slice_rules(NetworkSlice("x", vlan_id, edge, (SwitchLink(DPID, 1, DPID + 1, 1),)), DPID)


def message_bytes(rules: list[Rule], meters: Container[int] = ()) -> bytes:
    """What installs rules on a switch that has some meters already."""
    new = {rule.meter for rule in rules if rule.meter is not None and rule.meter not in meters}
    batches: list[Batch] = [tuple(map(AddMeter, sorted(new))), tuple(map(InstallRule, rules))]
    return bytes(of13.encode([batch for batch in batches if batch], set_xid).data)


def installed(switch: FakeSwitch, rules: list[Rule]) -> None:
    """Send rules, after the meters that they need, in one string of bytes."""
    switch.receive(message_bytes(rules, switch.meters))


def reported(switch: FakeSwitch, cookie: int = COOKIE_MAGIC << 48, mask: int = COOKIE_MAGIC_MASK) -> list[Rule | None]:
    """The rules that the switch reports, read with the controller's own reader."""
    data, _ = of13.flow_stats_request(cookie, mask, set_xid)
    replies = answers(switch.receive(data))
    assert [of13.has_more(reply) for reply in replies] == [True] * (len(replies) - 1) + [False]
    return [entry.rule for reply in replies for entry in of13.flow_entries(reply)]


def test_the_handshake() -> None:
    switch = FakeSwitch(DPID, (1, 10))
    assert isinstance(answers(switch.greeting())[0], parser.OFPHello)
    [features] = ask(switch, parser.OFPFeaturesRequest(of13.PROTOCOL))
    assert (features.datapath_id, features.n_tables) == (DPID, 254)
    [ports] = ask(switch, parser.OFPPortDescStatsRequest(of13.PROTOCOL, 0))
    assert [(port.port_no, port.name) for port in ports.body] == [(1, b"port1"), (10, b"port10")]
    assert ask(switch, parser.OFPSetConfig(of13.PROTOCOL, 0, 128)) == []
    [echo] = ask(switch, parser.OFPEchoRequest(of13.PROTOCOL, b"still there?"))
    assert echo.data == b"still there?"
    assert switch.counts.refused == 0


def test_what_is_installed_is_reported_and_counted() -> None:
    switch, rules = FakeSwitch(DPID, ()), [*default_rules(), *rules_of_a_slice()]
    installed(switch, rules)
    assert set(reported(switch)) == set(rules)
    assert (switch.counts.flow_mods, switch.counts.barriers, len(switch.rules)) == (len(rules), 2, len(rules))
    installed(switch, rules)
    assert (switch.counts.flow_mods, len(switch.rules)) == (2 * len(rules), len(rules))


def test_only_the_rule_that_is_named_is_removed() -> None:
    switch, rules = FakeSwitch(DPID, ()), rules_of_a_slice()
    installed(switch, rules)
    switch.receive(bytes(of13.encode([(RemoveRule(rules[0]), RemoveRule(rules[3]))], set_xid).data))
    assert set(reported(switch)) == {rule for rule in rules if rule not in (rules[0], rules[3])}


def test_rules_are_reported_by_cookie() -> None:
    switch = FakeSwitch(DPID, ())
    installed(switch, [*rules_of_a_slice(vlan_id=7), *rules_of_a_slice(vlan_id=8)])
    assert set(reported(switch, slice_cookie(8), SLICE_COOKIE_MASK)) == set(rules_of_a_slice(vlan_id=8))


def test_a_long_report_comes_in_parts() -> None:
    switch, rules = FakeSwitch(DPID, ()), rules_of_a_slice(ports=256)
    installed(switch, rules)
    data, _ = of13.flow_stats_request(COOKIE_MAGIC << 48, COOKIE_MAGIC_MASK, set_xid)
    assert len(answers(switch.receive(data))) > 1
    assert set(reported(switch)) == set(rules)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_messages_may_come_in_pieces(size: int) -> None:
    switch, rules = FakeSwitch(DPID, ()), rules_of_a_slice()
    data = message_bytes(rules)
    replies = b"".join(switch.receive(data[start : start + size]) for start in range(0, len(data), size))
    assert {type(reply) for reply in answers(replies)} == {parser.OFPBarrierReply}
    assert len(switch.rules) == len(rules)


def test_all_rules_of_a_cookie_can_be_removed_at_once() -> None:
    switch = FakeSwitch(DPID, ())
    installed(switch, [*rules_of_a_slice(vlan_id=7), *rules_of_a_slice(vlan_id=8)])
    remove = parser.OFPFlowMod(
        of13.PROTOCOL,
        cookie=slice_cookie(7),
        cookie_mask=SLICE_COOKIE_MASK,
        table_id=ofp.OFPTT_ALL,
        command=ofp.OFPFC_DELETE,
        out_port=ofp.OFPP_ANY,
        out_group=ofp.OFPG_ANY,
    )
    assert ask(switch, remove) == []
    assert set(reported(switch)) == set(rules_of_a_slice(vlan_id=8))


def test_meters_are_kept_and_reported() -> None:
    switch = FakeSwitch(DPID, ())
    for meter in (5, 7):
        assert ask(switch, of13.message_of(AddMeter(meter))) == []
    [error] = ask(switch, of13.message_of(AddMeter(5)))
    assert (error.type, error.code) == (ofp.OFPET_METER_MOD_FAILED, ofp.OFPMMFC_METER_EXISTS)
    data, _ = of13.meter_stats_request(set_xid)
    assert [of13.meter_counts(reply) for reply in answers(switch.receive(data))] == [{5: 0, 7: 0}]
    data, _ = of13.meter_features_request(set_xid)
    assert [of13.highest_meter(reply) for reply in answers(switch.receive(data))] == [MAX_METER]
    ask(switch, of13.message_of(RemoveMeter(5)))
    assert [*switch.meters] == [7]
    ask(switch, parser.OFPMeterMod(of13.PROTOCOL, ofp.OFPMC_DELETE, 0, ofp.OFPM_ALL))
    assert not switch.meters


def test_a_rule_needs_its_meter_and_goes_with_it() -> None:
    switch = FakeSwitch(DPID, ())
    rule = next(rule for rule in rules_of_a_slice() if rule.meter is not None)
    assert rule.meter is not None
    [error] = ask(switch, of13.message_of(InstallRule(rule)))
    assert (error.type, error.code) == (ofp.OFPET_METER_MOD_FAILED, ofp.OFPMMFC_INVALID_METER)
    ask(switch, of13.message_of(AddMeter(rule.meter)))
    assert ask(switch, of13.message_of(InstallRule(rule))) == []
    assert reported(switch) == [rule]
    ask(switch, of13.message_of(RemoveMeter(rule.meter)))
    assert reported(switch) == []


def test_what_it_does_not_know_is_refused_and_counted() -> None:
    switch = FakeSwitch(DPID, ())
    [error] = ask(switch, parser.OFPGroupStatsRequest(of13.PROTOCOL, 0, ofp.OFPG_ALL))
    assert (error.type, error.code) == (ofp.OFPET_BAD_REQUEST, ofp.OFPBRC_BAD_MULTIPART)
    [error] = ask(switch, parser.OFPGetAsyncRequest(of13.PROTOCOL))
    assert (error.type, error.code) == (ofp.OFPET_BAD_REQUEST, ofp.OFPBRC_BAD_TYPE)
    modify = parser.OFPFlowMod(of13.PROTOCOL, command=ofp.OFPFC_MODIFY)
    [error] = ask(switch, modify)
    assert (error.type, error.code) == (ofp.OFPET_FLOW_MOD_FAILED, ofp.OFPFMFC_BAD_COMMAND)
    assert of13.refusal(error)[0] == modify.xid
    assert switch.counts.refused == 3


def test_another_protocol_is_no_conversation() -> None:
    with pytest.raises(ValueError, match="not OpenFlow"):
        FakeSwitch(DPID, ()).receive(b"GET / HTTP/1.1\r\n")
