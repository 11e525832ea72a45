"""From a slice, its tree of links and the colors of its ports to the rules of each switch. Pure functions.

Theory of operation. ``network.links`` must be a tree here, or several (:mod:`.tree`). What depends on the color of one
port is small and is kept apart (:func:`color_rules`): the rule that colors what its VM sends, the rules that admit what
its VM gets, and the flood rules, one a color and origin, which the slice has on that switch. An armed port admits the
same before and after its recolor, so that changes the first of these only. A recolor therefore touches a constant
number of rules, however many ports there are.

A hold port's rules depend on no color: only those that deliver to an armed port name it or the VM's own.

Which colors a port admits is not decided here but in :mod:`geni_violin.core.color`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from geni_violin.controller.meters import Counting, meter_of
from geni_violin.controller.pipeline import (
    BACK,
    COLOR,
    FORWARD,
    FROM_LINK,
    FROM_VM,
    LEAVE,
    MULTICAST,
    NO_SLICE,
    TABLES,
    Action,
    Match,
    Output,
    PopVlan,
    PushVlan,
    Rule,
    SetVlanPcp,
    SetVlanVid,
    checked,
)
from geni_violin.controller.tree import switches_of
from geni_violin.core.color import COLORS, admitted_colors, color_of
from geni_violin.core.model import EdgePort, NetworkSlice

PRIORITY = 100
FLOOD_PRIORITY = 90
REFUSE_PRIORITY = 50
MISS_PRIORITY = 0


@dataclass(frozen=True)
class LinkEnd:
    """One switch's end of a link."""

    port_no: int
    peer_dpid: int


def link_ends(network: NetworkSlice) -> dict[int, list[LinkEnd]]:
    """By datapath id, where the slice's links end."""
    ends: dict[int, list[LinkEnd]] = {dpid: [] for dpid in switches_of(network)}
    for link in network.links:
        ends[link.a_dpid].append(LinkEnd(link.a_port_no, link.b_dpid))
        ends[link.b_dpid].append(LinkEnd(link.b_port_no, link.a_dpid))
    return ends


def first_hops(network: NetworkSlice, dpid: int) -> dict[int, int]:
    """By every other switch that can be reached, the port of switch ``dpid`` that leads there."""
    ends = link_ends(network)
    hops: dict[int, int] = {}
    pending = [(end.peer_dpid, end.port_no, dpid) for end in ends[dpid]]
    while pending:
        here, port_no, came_from = pending.pop()
        hops[here] = port_no
        pending += [(end.peer_dpid, port_no, here) for end in ends[here] if end.peer_dpid != came_from]
    return hops


def default_rules() -> list[Rule]:
    """What no rule of a slice takes is dropped, in every table."""
    return [checked(Rule(table_id, MISS_PRIORITY, Match(), NO_SLICE)) for table_id in TABLES]


# --- what enters ------------------------------------------------------------------------------------------------------


def ingress_rule(vlan_id: int, port: EdgePort) -> Rule:
    """Color what a VM sends from its own address. A tag that the guest put there stays inside."""
    color = color_of(port.epoch)
    actions: tuple[Action, ...] = (PushVlan(), SetVlanVid(vlan_id), SetVlanPcp(color))
    match = Match(in_port=port.port_no, eth_src=None if port.any_source else port.mac.lower())
    meter = meter_of(vlan_id, Counting.ENTERED, color)
    return checked(Rule(COLOR.table_id, PRIORITY, match, vlan_id, actions, goto=FORWARD.table_id, meter=meter))


def foreign_rule(vlan_id: int, port: EdgePort) -> Rule:
    """Drop, and count, what a VM sends from an address that is not its own."""
    return checked(Rule(COLOR.table_id, REFUSE_PRIORITY, Match(in_port=port.port_no), vlan_id))


def link_rules(vlan_id: int, port_no: int) -> list[Rule]:
    """Take frames of this slice, and of no other, from a link that the slice uses."""
    return [_link_rule(vlan_id, port_no, color) for color in range(COLORS)]


def _link_rule(vlan_id: int, port_no: int, color: int) -> Rule:
    match = Match(in_port=port_no, vlan_vid=vlan_id, vlan_pcp=color)
    meter = meter_of(vlan_id, Counting.RECEIVED, color)
    return checked(
        Rule(COLOR.table_id, PRIORITY, match, vlan_id, metadata=FROM_LINK, goto=FORWARD.table_id, meter=meter)
    )


# --- where it goes ----------------------------------------------------------------------------------------------------


def forward_rule(vlan_id: int, port: EdgePort, out_port_no: int) -> Rule:
    """Decide by which port a frame for a VM leaves the switch, whatever its color: the VM's, or a link's."""
    match = Match(vlan_vid=vlan_id, eth_dst=port.mac.lower())
    return checked(Rule(FORWARD.table_id, PRIORITY, match, vlan_id, metadata=out_port_no, goto=LEAVE.table_id))


def local_rule(vlan_id: int, port: EdgePort) -> Rule:
    """Pass a frame for a VM on this switch to its port's admission. Counts all that reached the port."""
    return forward_rule(vlan_id, port, port.port_no)


def flood_rules(network: NetworkSlice, dpid: int) -> list[Rule]:
    """Broadcast and multicast: one rule a color and origin; to the other links and the local ports that admit it."""
    link_ports = sorted(end.port_no for end in link_ends(network)[dpid])
    local_ports = sorted((port for port in network.ports if port.dpid == dpid), key=lambda port: port.port_no)
    origins = {FROM_VM: len(link_ports)} | ({FROM_LINK: len(link_ports) - 1} if link_ports else {})
    rules = []
    for color in range(COLORS):
        actions = _flood_actions(color, link_ports, local_ports)
        for origin, copies in origins.items():
            match = Match(vlan_vid=network.vlan_id, vlan_pcp=color, eth_dst=MULTICAST, metadata=origin)
            meter = meter_of(network.vlan_id, Counting.FLOODED, color, copies)
            rules.append(checked(Rule(FORWARD.table_id, FLOOD_PRIORITY, match, network.vlan_id, actions, meter=meter)))
    return rules


def _flood_actions(color: int, link_ports: list[int], local_ports: list[EdgePort]) -> tuple[Action, ...]:
    """Links and armed ports get the tag as well, so they come before it is popped."""
    admitting = [port for port in local_ports if color in admitted_colors(port.armed or port.epoch)]
    tagged = [*link_ports, *(port.armed_port_no for port in admitting if port.armed)]
    untagged = [port.port_no for port in admitting if not port.armed]
    actions: tuple[Action, ...] = tuple(map(Output, tagged))
    return (*actions, PopVlan(), *map(Output, untagged)) if untagged else actions


# --- what leaves ------------------------------------------------------------------------------------------------------


def admit_rules(vlan_id: int, port: EdgePort) -> list[Rule]:
    """Deliver the colors that the port's epoch admits; if it is armed, those of both epochs of the cut, tagged."""
    deliver: tuple[Action, ...] = (Output(port.armed_port_no),) if port.armed else (PopVlan(), Output(port.port_no))
    colors = admitted_colors(port.armed or port.epoch)
    matches = (Match(metadata=port.port_no, vlan_vid=vlan_id, vlan_pcp=color) for color in colors)
    return [checked(Rule(LEAVE.table_id, PRIORITY, match, vlan_id, deliver)) for match in matches]


def refuse_rule(vlan_id: int, port: EdgePort) -> Rule:
    """Drop, and count, all other colors. No recolor replaces this rule, so its count is the port's lifetime's."""
    return checked(Rule(LEAVE.table_id, REFUSE_PRIORITY, Match(metadata=port.port_no, vlan_vid=vlan_id), vlan_id))


def hold_port_rules(vlan_id: int, port: EdgePort) -> list[Rule]:
    """Give a VM what comes out of its hold port, as it is. Nothing is counted: the frame came to its end before."""
    back = BACK | port.port_no
    match = Match(in_port=port.hold_port_no)
    comes = Rule(COLOR.table_id, PRIORITY, match, vlan_id, metadata=back, goto=LEAVE.table_id)
    leaves = Rule(LEAVE.table_id, PRIORITY, Match(metadata=back), vlan_id, (Output(port.port_no),))
    return [checked(comes), checked(leaves)]


def cross_rules(vlan_id: int, port_no: int) -> list[Rule]:
    """Put frames on a link, as they are."""
    return [_cross_rule(vlan_id, port_no, color) for color in range(COLORS)]


def _cross_rule(vlan_id: int, port_no: int, color: int) -> Rule:
    match = Match(metadata=port_no, vlan_vid=vlan_id, vlan_pcp=color)
    meter = meter_of(vlan_id, Counting.CROSSED, color)
    return checked(Rule(LEAVE.table_id, PRIORITY, match, vlan_id, (Output(port_no),), meter=meter))


# --- together ---------------------------------------------------------------------------------------------------------


def color_rules(network: NetworkSlice, dpid: int, ports: Iterable[EdgePort]) -> list[Rule]:
    """All rules of a switch that depend on the color of ``ports``, which are ports of that switch."""
    return [*flood_rules(network, dpid), *port_rules(network.vlan_id, ports)]


def port_rules(vlan_id: int, ports: Iterable[EdgePort]) -> list[Rule]:
    """Those of them that belong to one port each. The others have the same keys, whatever the colors."""
    return [rule for port in ports for rule in (ingress_rule(vlan_id, port), *admit_rules(vlan_id, port))]


def slice_rules(network: NetworkSlice, dpid: int) -> list[Rule]:
    """All rules that a slice needs on a switch; none if it does not use that switch."""
    ends = link_ends(network)
    if dpid not in ends:
        return []
    vlan_id, hops = network.vlan_id, first_hops(network, dpid)
    local = [port for port in network.ports if port.dpid == dpid]
    rules = color_rules(network, dpid, local)
    for end in ends[dpid]:
        rules += [*link_rules(vlan_id, end.port_no), *cross_rules(vlan_id, end.port_no)]
    for port in local:
        rules += [local_rule(vlan_id, port), refuse_rule(vlan_id, port)]
    rules += [rule for port in local if port.hold_port_no for rule in hold_port_rules(vlan_id, port)]
    rules += [foreign_rule(vlan_id, port) for port in local if not port.any_source]
    remote = (port for port in network.ports if port.dpid != dpid and port.dpid in hops)
    rules += [forward_rule(vlan_id, port, hops[port.dpid]) for port in remote]
    return rules


def slice_meters(network: NetworkSlice, dpid: int) -> set[int]:
    """The meters that a slice needs on a switch, besides those of its rules: a recolor must not have to add one."""
    if not any(port.dpid == dpid for port in network.ports):
        return set()
    entered = (meter_of(network.vlan_id, Counting.ENTERED, color) for color in range(COLORS))
    return {meter for meter in entered if meter is not None}
