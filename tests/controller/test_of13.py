"""Rules to OpenFlow bytes and back."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from ryu.ofproto import ofproto_v1_3 as ofp
from ryu.ofproto import ofproto_v1_3_parser as parser

from geni_violin.controller import of13
from geni_violin.controller.diff import AddMeter, InstallRule, RemoveMeter, RemoveRule
from geni_violin.controller.pipeline import Match, Output, Rule
from geni_violin.controller.rules import default_rules, slice_rules
from geni_violin.core.model import NetworkSlice

from .slices import make_slice, slices_on_one_tree
from .wire_switch import BARRIER, FLOW_MOD, split


class Numbering:
    """Gives transaction ids as a datapath does."""

    def __init__(self) -> None:
        self._next = itertools.count(100)

    def set_xid(self, message: Any) -> int:
        message.set_xid(next(self._next))
        return int(message.xid)


@given(slices_on_one_tree())
def test_every_rule_survives_the_wire(networks: list[NetworkSlice]) -> None:
    rules = [*default_rules(), *(rule for network in networks for rule in slice_rules(network, 1))]
    encoded = of13.encode([tuple(map(InstallRule, rules))], Numbering().set_xid)
    *flow_mods, barrier = split(encoded.data)
    assert [of13.rule_of(message) for _kind, _xid, message in flow_mods] == rules
    assert [message.cookie for _kind, _xid, message in flow_mods] == [rule.cookie for rule in rules]
    assert barrier[:2] == (BARRIER, encoded.barrier_xid)


def test_each_batch_ends_with_a_barrier() -> None:
    first, second, *_ = slice_rules(make_slice("a", 7, [1], [0], []), 1)
    encoded = of13.encode([(InstallRule(first),), (RemoveRule(second),)], Numbering().set_xid)
    kinds = [kind for kind, _xid, _body in split(encoded.data)]
    assert kinds == [FLOW_MOD, BARRIER, FLOW_MOD, BARRIER]
    assert encoded.xids == {100, 101, 102, 103}
    assert encoded.barrier_xid == 103


def test_no_batches_are_still_confirmed() -> None:
    encoded = of13.encode([], Numbering().set_xid)
    assert [kind for kind, _xid, _body in split(encoded.data)] == [BARRIER]


def test_replacing_a_rule_keeps_its_counters() -> None:
    message = of13.message_of(InstallRule(default_rules()[0]))
    assert message.command == ofp.OFPFC_ADD
    assert not message.flags & ofp.OFPFF_RESET_COUNTS


def test_meters_come_and_go() -> None:
    added, removed = of13.message_of(AddMeter(448)), of13.message_of(RemoveMeter(448))
    assert (added.command, added.meter_id, len(added.bands)) == (ofp.OFPMC_ADD, 448, 1)
    assert added.flags == ofp.OFPMF_PKTPS | ofp.OFPMF_STATS, "it counts"
    assert added.bands[0].rate == 0xFFFFFFFF, "and limits nothing"
    assert (removed.command, removed.meter_id) == (ofp.OFPMC_DELETE, 448)


@pytest.mark.parametrize(
    "message",
    [
        parser.OFPFlowMod(of13.PROTOCOL, cookie=1, match=parser.OFPMatch()),
        parser.OFPFlowMod(of13.PROTOCOL, cookie=0x6776 << 48, match=parser.OFPMatch(eth_type=0x800)),
        parser.OFPFlowMod(
            of13.PROTOCOL,
            cookie=0x6776 << 48,
            match=parser.OFPMatch(),
            instructions=[parser.OFPInstructionWriteMetadata(1, 1)],
        ),
    ],
)
def test_what_is_not_ours_is_not_taken_for_a_rule(message: Any) -> None:
    with pytest.raises(ValueError):
        of13.rule_of(message)


def test_refusal_names_the_message_that_was_refused() -> None:
    numbering = Numbering()
    flow_mod = of13.message_of(InstallRule(Rule(1, 1, Match(vlan_vid=7), 7, (Output(1),))))
    xid = numbering.set_xid(flow_mod)
    flow_mod.serialize()
    error = parser.OFPErrorMsg(
        of13.PROTOCOL,
        type_=ofp.OFPET_FLOW_MOD_FAILED,
        code=ofp.OFPFMFC_TABLE_FULL,
        data=bytes(flow_mod.buf[:64]),
    )
    error.set_xid(xid)
    assert of13.refusal(error)[0] == xid
    assert "OFPFMFC_TABLE_FULL" in of13.refusal(error)[1]
