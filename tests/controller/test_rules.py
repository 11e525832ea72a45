"""The rules on a software switch: coloring, the three cases, flooding, isolation."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geni_violin.controller.meters import by_color
from geni_violin.controller.pipeline import (
    COLOR,
    FORWARD,
    LEAVE,
    Match,
    Output,
    PopVlan,
    Rule,
    SetVlanPcp,
    checked,
    slice_cookie,
    vlan_id_of_cookie,
)
from geni_violin.controller.rules import color_rules, default_rules, foreign_rule, refuse_rule, slice_rules
from geni_violin.core.errors import ConsistencyViolation
from geni_violin.core.model import EdgePort, NetworkSlice

from .slices import BROADCAST, built, frame_from, mac, make_slice, send, slices_on_one_tree, with_armed, with_hold_ports
from .software_switch import Frame, SoftwareSwitch, Tag, edge_of

TREES = {"one switch": [], "two": [1], "line of three": [1, 2], "star of four": [1, 1, 1], "tree of five": [1, 1, 3, 3]}


def arrivals(networks: list[NetworkSlice], sender: str, destination: str, of: int = 0) -> dict[tuple[int, int], int]:
    """How many copies of a frame arrive at each edge port; every one must be as it was sent, and an armed port gets it
    with the tag that it had on its way."""
    network = networks[of]
    frame = frame_from(network, sender, destination)
    color = next(port.epoch for port in network.ports if port.vm == sender) % 3
    armed = {(port.dpid, port.armed_port_no) for port in network.ports if port.armed}
    arrived = built(networks).send_from(*edge_of(network, sender), frame)
    for port, got in arrived:
        assert got == (replace(frame, tags=(Tag(network.vlan_id, color),)) if port in armed else frame)
    ports = [port for port, _frame in arrived]
    return {port: ports.count(port) for port in ports}


@pytest.mark.parametrize("parents", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize(
    ("sender_epoch", "receiver_epoch", "is_delivered"),
    [(0, 0, True), (0, 1, True), (1, 0, False), (1, 1, True), (1, 2, True), (2, 1, False), (3, 2, False), (2, 3, True)],
)
def test_three_cases(parents: list[int], sender_epoch: int, receiver_epoch: int, is_delivered: bool) -> None:
    """The three cases: same and in transit are delivered, future is dropped; near and far, unicast and flooded."""
    far = len(parents) + 1
    network = make_slice("a", 7, [1, 1, far], [sender_epoch, receiver_epoch, receiver_epoch], parents)
    for vm, index in (("v1", 1), ("v2", 2)):
        assert arrivals([network], "v0", mac(index)) == ({edge_of(network, vm): 1} if is_delivered else {})
    everyone = {edge_of(network, "v1"): 1, edge_of(network, "v2"): 1}
    assert arrivals([network], "v0", BROADCAST) == (everyone if is_delivered else {})


def test_frame_two_epochs_old_is_refused() -> None:
    """Three colors: what left before the last cut but one looks like the future and is never delivered."""
    network = make_slice("a", 7, [1, 1], [2, 2], [])
    switch = SoftwareSwitch(slice_rules(network, 1))
    stale = Frame(mac(1), tags=(Tag(7, 0),))
    assert switch.receive(99, stale) == [], "99 is no port of the slice"
    linked = make_slice("a", 7, [1, 2], [2, 2], [1])
    assert SoftwareSwitch(slice_rules(linked, 2)).receive(1001, stale) == []


@pytest.mark.parametrize("epoch", range(5))
def test_link_carries_slice_and_color(epoch: int) -> None:
    network = make_slice("a", 7, [1, 2], [epoch, epoch], [1])
    fabric = built([network])
    send(fabric, network, "v0", mac(1))
    assert [crossing.frame.tags for crossing in fabric.crossings] == [(Tag(7, epoch % 3),)]


def test_unknown_destination_goes_nowhere() -> None:
    network = make_slice("a", 7, [1, 2], [0, 0], [1])
    fabric = built([network])
    assert send(fabric, network, "v0", mac(77)) == []
    assert fabric.crossings == []


def test_guest_tag_stays_inside_and_cannot_choose_a_slice() -> None:
    one = make_slice("a", 7, [1, 2], [1, 1], [1])
    two = make_slice("b", 8, [1, 2], [1, 1], [1], first_port=11)
    tagged = replace(frame_from(one, "v0", mac(1)), tags=(Tag(8, 1),))
    assert built([one, two]).send_from(*edge_of(one, "v0"), tagged) == [(edge_of(one, "v1"), tagged)]


def test_untagged_and_foreign_frames_on_a_link_are_dropped() -> None:
    switch = SoftwareSwitch([*default_rules(), *slice_rules(make_slice("a", 7, [1, 2], [0, 0], [1]), 1)])
    for tags in ((), (Tag(8, 0),)):
        for destination in (mac(0), BROADCAST):
            assert switch.receive(1002, Frame(destination, tags=tags)) == []


def test_flood_does_not_return_to_its_sender_or_its_link() -> None:
    network = make_slice("a", 7, [1, 1, 2, 3], [0, 0, 0, 0], [1, 2])
    fabric = built([network])
    assert send(fabric, network, "v2", BROADCAST) == sorted(edge_of(network, vm) for vm in ("v0", "v1", "v3"))
    assert len(fabric.crossings) == 2, "each link is crossed once"


def test_refused_frames_are_counted() -> None:
    network = make_slice("a", 7, [1, 1], [1, 0], [])
    fabric = built([network])
    for _ in range(3):
        send(fabric, network, "v0", mac(1))
    assert fabric.switches[1].packets[refuse_rule(7, network.ports[1]).key] == 3


def _is_delivered(sender_epoch: int, port: EdgePort) -> bool:
    if port.armed:
        return port.armed - sender_epoch in (0, 1)
    return port.epoch - sender_epoch in (0, 1)


# --- armed ports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parents", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("armed", range(1, 5))
@pytest.mark.parametrize("behind", [0, 1])
def test_armed_port_gets_both_colors_tagged_before_and_after_its_own_recolor(
    parents: list[int], armed: int, behind: int
) -> None:
    """Near and far, unicast and flooded; a port beside it that is not armed goes on without tags."""
    far = len(parents) + 1
    for sender_epoch in (armed - 1, armed):
        network = make_slice("a", 7, [1, 1, far, far], [sender_epoch, *[armed - behind] * 3], parents)
        network = with_armed(network, armed, "v1", "v2")
        delivered = {edge_of(network, vm): 1 for vm in ("v1", "v2")}
        assert arrivals([network], "v0", mac(1)) == {edge_of(network, "v1"): 1}
        assert arrivals([network], "v0", mac(2)) == {edge_of(network, "v2"): 1}
        if sender_epoch <= armed - behind:
            delivered[edge_of(network, "v3")] = 1
        assert arrivals([network], "v0", BROADCAST) == delivered


def test_armed_port_refuses_the_third_color() -> None:
    network = with_armed(make_slice("a", 7, [1, 2], [2, 2], [1]), 3, "v0")
    switch = SoftwareSwitch(slice_rules(network, 1))
    for color, is_delivered in ((0, True), (1, False), (2, True)):
        assert bool(switch.receive(1002, Frame(mac(0), tags=(Tag(7, color),)))) == is_delivered
    assert switch.packets[refuse_rule(7, network.ports[0]).key] == 1


# --- hold ports -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parents", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("color", [1, 2])
def test_an_armed_hold_port_gets_the_frames_of_both_colors_and_gives_them_back(parents: list[int], color: int) -> None:
    """Near and far, unicast and flooded: tagged to the hold port, never to the VM; and from there to the VM alone."""
    far = len(parents) + 1
    network = with_hold_ports(make_slice("a", 7, [1, 1, far, far], [color, *[1] * 3], parents), "v1", "v2")
    network = with_armed(network, 2, "v1", "v2")
    fabric = built([network])
    for index in (1, 2):
        port = network.ports[index]
        for destination in (port.mac, BROADCAST):
            tagged = replace(frame_from(network, "v0", destination), tags=(Tag(7, color),))
            arrived = fabric.send_from(*edge_of(network, "v0"), frame_from(network, "v0", destination))
            assert ((port.dpid, port.hold_port_no), tagged) in arrived
            assert (port.dpid, port.port_no) not in [place for place, _frame in arrived]
        for inner in ((), (Tag(9, 3),)):
            back = Frame(port.mac, tags=inner, eth_src=mac(0))
            assert fabric.send_from(port.dpid, port.hold_port_no, back) == [((port.dpid, port.port_no), back)]
    sums = by_color(7, (switch.meters for switch in fabric.switches.values()))
    assert [counted.alive for counted in sums] == [0, 0, 0]


def test_an_idle_hold_port_gets_nothing() -> None:
    plain = make_slice("a", 7, [1, 1], [1, 1], [])
    network = with_hold_ports(plain)
    for destination in (mac(1), BROADCAST):
        assert arrivals([network], "v0", destination) == arrivals([plain], "v0", destination)


# --- who may send -----------------------------------------------------------------------------------------------------


def test_foreign_source_is_dropped_and_counted_unless_it_is_allowed() -> None:
    network = make_slice("a", 7, [1, 1], [0, 0], [])
    free = replace(network, ports=(replace(network.ports[0], any_source=True), network.ports[1]))
    foreign = Frame(mac(1), eth_src=mac(9))
    for definition, copies in ((network, 0), (free, 1)):
        fabric = built([definition])
        assert len(fabric.send_from(*edge_of(definition, "v0"), foreign)) == copies
        assert send(fabric, definition, "v0", mac(1)) == [edge_of(definition, "v1")]
        assert fabric.switches[1].packets[foreign_rule(7, definition.ports[0]).key] == 1 - copies


# --- the end of a color -----------------------------------------------------------------------------------------------


@given(slices_on_one_tree(), st.data())
def test_frames_that_a_link_lost_and_only_they_are_alive(networks: list[NetworkSlice], data: st.DataObject) -> None:
    """Of any frames, to a VM, to all or to nobody, on any tree: what went over a link that lost it, each copy once."""
    fabric = built(networks)
    network = data.draw(st.sampled_from(networks))
    fabric.lost = set(data.draw(st.lists(st.sampled_from(network.links), max_size=2)) if network.links else [])
    destinations = [mac(77), BROADCAST, *(port.mac for port in network.ports)]
    sent = [0, 0, 0]
    for _ in range(data.draw(st.integers(1, 5))):
        sender = data.draw(st.sampled_from(network.ports))
        sent[sender.epoch % 3] += 1
        send(fabric, network, sender.vm, data.draw(st.sampled_from(destinations)))
    lost = [0, 0, 0]
    for crossing in fabric.crossings:
        lost[crossing.frame.tags[0].pcp] += crossing.link in fabric.lost
    sums = by_color(network.vlan_id, (switch.meters for switch in fabric.switches.values()))
    assert [color.alive for color in sums] == lost
    assert all(color.entered >= frames for color, frames in zip(sums, sent, strict=True))


def test_a_flooded_frame_counts_once_for_each_switch() -> None:
    network = make_slice("a", 7, [1, 2, 3, 4], [0] * 4, [1, 1, 2])
    fabric = built([network])
    for port in network.ports:
        send(fabric, network, port.vm, BROADCAST)
    sums = by_color(7, (switch.meters for switch in fabric.switches.values()))
    assert (sums[0].entered, sums[0].alive) == (16, 0)


def _comes_back(port: EdgePort, sender: EdgePort) -> bool:
    return port.vm != sender.vm or bool(port.armed and port.hold_port_no)


@given(slices_on_one_tree(), st.data())
def test_delivered_to_exactly_whom_the_colors_admit(networks: list[NetworkSlice], data: st.DataObject) -> None:
    """On any tree, with any mix of two adjacent epochs: never lost, doubled, too early, or in another slice.

    What is right is told from the epochs here, not from core.color: at most one behind, never ahead; to an armed port
    whatever is alive. A VM's hold port takes the place of an armed port; to it comes the VM's own broadcast as well.
    """
    network = data.draw(st.sampled_from(networks))
    of = networks.index(network)
    sender = data.draw(st.sampled_from(network.ports))
    admitting = {
        port.vm: (port.dpid, port.armed_port_no if port.armed else port.port_no)
        for port in network.ports
        if _comes_back(port, sender) and _is_delivered(sender.epoch, port)
    }
    assert arrivals(networks, sender.vm, BROADCAST, of) == dict.fromkeys(admitting.values(), 1)
    receiver = data.draw(st.sampled_from(network.ports))
    expected = {admitting[receiver.vm]: 1} if receiver.vm in admitting else {}
    assert arrivals(networks, sender.vm, receiver.mac, of) == expected


@given(st.integers(1, 60), st.integers(0, 5))
def test_color_rules_of_a_port_are_constant_in_number(ports: int, epoch: int) -> None:
    network = make_slice("a", 7, [1] * ports, [epoch] * ports, [])
    assert len(color_rules(network, 1, network.ports[:1])) <= 6
    linked = make_slice("a", 7, [1] * ports + [2], [epoch] * (ports + 1), [1])
    assert len(color_rules(linked, 1, linked.ports[:1])) <= 9, "frames from links are flooded by other rules"


@given(slices_on_one_tree())
def test_every_rule_fits_its_table_and_carries_its_slice(networks: list[NetworkSlice]) -> None:
    for network in networks:
        for dpid in {port.dpid for port in network.ports}:
            for rule in slice_rules(network, dpid):
                assert checked(rule) is rule
                assert vlan_id_of_cookie(rule.cookie) == network.vlan_id
                assert rule.cookie & slice_cookie(0xFFFF) == slice_cookie(network.vlan_id)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(9, 1, Match(), 7),
        Rule(COLOR.table_id, 1, Match(eth_dst=mac(1)), 7),
        Rule(COLOR.table_id, 1, Match(in_port=1), 7, (Output(2),)),
        Rule(FORWARD.table_id, 1, Match(eth_dst=mac(1)), 7, goto=0),
        Rule(LEAVE.table_id, 1, Match(metadata=1), 7, (PopVlan(), SetVlanPcp(1))),
        Rule(LEAVE.table_id, 1, Match(), 7, metadata=3),
    ],
)
def test_rule_that_its_table_does_not_declare_is_refused(rule: Rule) -> None:
    with pytest.raises(ConsistencyViolation):
        checked(rule)


def test_foreign_cookie_is_not_ours() -> None:
    assert vlan_id_of_cookie(0) is None
    assert vlan_id_of_cookie(7 << 32) is None
