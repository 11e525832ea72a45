"""The bookkeeping: what is refused, and what a plan does to switches that carry it out."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from geni_violin.controller.diff import by_key
from geni_violin.controller.fabric import Fabric, Found, Plan
from geni_violin.controller.meters import Tally, by_color, vlan_id_of_meter
from geni_violin.controller.pipeline import NO_SLICE
from geni_violin.controller.rules import default_rules, slice_rules
from geni_violin.controller.tree import switches_of
from geni_violin.controller.validation import link_end_ids
from geni_violin.core.errors import Conflict, GeniViolinError, InvalidInput, NotFound, PeerFault
from geni_violin.core.messages import ArmRequest, DisarmRequest, RecolorRequest
from geni_violin.core.model import NetworkSlice, SwitchLink

from .slices import BROADCAST, make_slice, send, with_armed, with_epochs
from .software_switch import SoftwareNetwork, SoftwareSwitch, edge_of

RED = make_slice("red", 7, [1, 1, 2], [0, 0, 0], [1, 2])
BLUE = make_slice("blue", 8, [1, 2, 3], [0, 0, 0], [1, 2], first_port=11)


class Rig:
    """A fabric and software switches that do what it says."""

    has_meters = True

    def __init__(self, *dpids: int) -> None:
        self.fabric = Fabric()
        self.ports = {dpid: dict.fromkeys([*range(1, 60), *range(1001, 1010)], True) for dpid in dpids}
        self.switches = {dpid: SoftwareSwitch() for dpid in dpids}
        for dpid in dpids:
            self.connect(dpid)

    def connect(self, dpid: int) -> Plan:
        switch = self.switches[dpid]
        found = Found([*switch.rules.values()], [*switch.meters], self.ports[dpid], self.has_meters)
        batches = self.fabric.connect(dpid, found)
        switch.send(batches)
        return {dpid: batches} if batches else {}

    def restart_empty(self, dpid: int) -> None:
        self.fabric.disconnect(dpid)
        self.switches[dpid] = SoftwareSwitch()
        self.connect(dpid)

    def restart_controller(self) -> Plan:
        """Every switch connects to a controller that knows nothing; gives back what it changes then."""
        self.fabric = Fabric()
        return {dpid: batches for dpid in self.switches for batches in self.connect(dpid).values()}

    def set_link(self, link: SwitchLink, is_up: bool) -> None:
        for dpid, port_no in link_end_ids(link):
            self.ports[dpid][port_no] = is_up
            self.fabric.port_changed(dpid, self.ports[dpid])

    def reroute(self) -> None:
        self.carry_out(self.fabric.take_away())
        self.carry_out(self.fabric.add())
        assert not self.fabric.has_stale_trees()

    def network(self) -> SoftwareNetwork:
        """The switches as they are, joined by all links, of which those that are down lose every frame."""
        network = SoftwareNetwork({link for wanted in self.fabric.slices() for link in wanted.links})
        network.switches = self.switches
        for wanted in self.fabric.slices():
            ups = ((link, all(self.ports[dpid][no] for dpid, no in link_end_ids(link))) for link in wanted.links)
            network.lost |= {link for link, is_up in ups if not is_up}
        return network

    def carry_out(self, plan: Plan) -> Plan:
        for dpid, batches in plan.items():
            self.switches[dpid].send(batches)
        return plan

    def vlan_ids(self, dpid: int) -> set[int]:
        return {rule.vlan_id for rule in self.switches[dpid].rules.values()} - {NO_SLICE}

    def assert_up_to_date(self) -> None:
        for dpid, switch in self.switches.items():
            if dpid in self.fabric.connected():
                defined = self.fabric.slices()
                networks = [replace(network, links=self.fabric.tree(network.name)) for network in defined]
                wanted = [rule for network in networks for rule in slice_rules(network, dpid)]
                assert switch.rules == by_key([*default_rules(), *wanted]) == self.fabric.installed(dpid).rules
                assert set(switch.meters) == self.fabric.installed(dpid).meters
                here = {network.vlan_id for network in defined if dpid in switches_of(network)}
                assert {vlan_id_of_meter(meter) for meter in switch.meters} <= here, "none is left behind"


@pytest.fixture
def rig() -> Rig:
    rig = Rig(1, 2, 3)
    rig.carry_out(rig.fabric.put(RED))
    return rig


def test_put_and_delete(rig: Rig) -> None:
    assert set(rig.carry_out(rig.fabric.put(BLUE))) == {1, 2, 3}
    rig.assert_up_to_date()
    rig.carry_out(rig.fabric.delete("red"))
    rig.assert_up_to_date()
    assert [rig.vlan_ids(dpid) for dpid in (1, 2, 3)] == [{8}, {8}, {8}]


def test_put_again_changes_nothing_but_is_confirmed_everywhere(rig: Rig) -> None:
    assert rig.fabric.put(RED) == {1: (), 2: (), 3: ()}


def test_changed_definition_is_diffed(rig: Rig) -> None:
    fewer = replace(RED, ports=RED.ports[:2], links=())
    rig.carry_out(rig.fabric.put(fewer))
    rig.assert_up_to_date()
    assert rig.vlan_ids(3) == set()


def test_new_life_under_a_new_vlan_id_may_start_anywhere(rig: Rig) -> None:
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1)))
    rig.carry_out(rig.fabric.put(replace(RED, vlan_id=9)))
    rig.assert_up_to_date()
    assert rig.vlan_ids(1) == {9}


def _with_port(network: NetworkSlice, index: int, **changes: object) -> NetworkSlice:
    ports = list(network.ports)
    ports[index] = replace(ports[index], **changes)  # type: ignore[arg-type]
    return replace(network, ports=tuple(ports))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (replace(BLUE, name=""), "no name"),
        (replace(BLUE, vlan_id=0), "VLAN ID 0"),
        (replace(BLUE, vlan_id=4095), "VLAN ID 4095"),
        (_with_port(BLUE, 0, mac="52:54"), "not a MAC"),
        (_with_port(BLUE, 0, mac="01:00:5e:00:00:01"), "unicast"),
        (_with_port(BLUE, 0, mac=BLUE.ports[1].mac), "MAC address"),
        (_with_port(BLUE, 0, vm="v1"), "VM v1"),
        (_with_port(BLUE, 0, epoch=-1), "epoch -1"),
        (_with_port(BLUE, 0, epoch=2), "epochs 0 to 2"),
        (_with_port(BLUE, 0, port_no=0), "port number"),
        (_with_port(BLUE, 0, port_no=0xFFFFFFFE), "port number"),
        (_with_port(BLUE, 0, dpid=0), "datapath id"),
        (_with_port(BLUE, 0, dpid=2, port_no=BLUE.ports[1].port_no), "named twice"),
        (_with_port(BLUE, 0, port_no=BLUE.links[0].a_port_no), "named twice"),
        (_with_port(BLUE, 0, hold_port_no=BLUE.ports[0].port_no), "named twice"),
        (_with_port(BLUE, 0, hold_port_no=-1), "port number"),
        (_with_port(BLUE, 0, hold_port_no=40, any_source=True), "v0 cannot have a hold port"),
        (replace(BLUE, links=BLUE.links[:1]), "join"),
        (replace(BLUE, links=(*BLUE.links, SwitchLink(1, 50, 1, 51))), "to itself"),
        (_with_port(BLUE, 0, armed=2), "cannot be armed for 2"),
        (_with_port(with_epochs(BLUE, (1, 0, 0)), 0, armed=0, epoch=2), "epochs 0 to 2"),
    ],
)
def test_senseless_definition_is_refused(rig: Rig, bad: NetworkSlice, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        rig.fabric.put(bad)
    with pytest.raises(InvalidInput, match=words):
        rig.fabric.replace_all([RED, bad])
    assert rig.fabric.slices() == [RED]
    rig.assert_up_to_date()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (replace(BLUE, vlan_id=7), "VLAN ID 7 belongs to slice red"),
        (_with_port(BLUE, 0, port_no=1), "port 1 of switch 0x1 belongs to slice red"),
        (_with_port(BLUE, 2, dpid=1, port_no=RED.links[0].a_port_no), "named twice|belongs to slice red"),
        (NetworkSlice("blue", 8, (replace(BLUE.ports[0], port_no=RED.links[0].a_port_no),)), "belongs to slice red"),
        (NetworkSlice("blue", 8, BLUE.ports[:2], (replace(BLUE.links[0], b_port_no=77),)), "leads elsewhere"),
        (NetworkSlice("blue", 8, BLUE.ports[:2], (replace(BLUE.links[0], a_port_no=1),)), "belongs to slice red"),
    ],
)
def test_what_another_slice_has_is_refused(rig: Rig, bad: NetworkSlice, words: str) -> None:
    with pytest.raises((Conflict, InvalidInput), match=words):
        rig.fabric.put(bad)
    with pytest.raises((Conflict, InvalidInput), match=words):
        rig.fabric.replace_all([RED, bad])
    assert rig.fabric.slices() == [RED]
    rig.assert_up_to_date()


def test_switch_that_is_not_connected(rig: Rig) -> None:
    rig.fabric.disconnect(2)
    requests: list[Callable[[], object]] = [
        lambda: rig.fabric.put(BLUE),
        lambda: rig.fabric.recolor("red", RecolorRequest(1)),
        lambda: rig.fabric.counter_places("red"),
    ]
    for request in requests:
        with pytest.raises(PeerFault, match="switch 0x2 is not connected"):
            request()
    assert rig.fabric.slices() == [RED], "a refused request changes nothing"
    assert set(rig.fabric.recolor("red", RecolorRequest(1, ("v0",)))) == {1}, "the others can go on"


def test_recolor_advances_then_confirms(rig: Rig) -> None:
    plan = rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1, ("v0",))))
    assert list(plan) == [1]
    rig.assert_up_to_date()
    assert rig.fabric.recolor("red", RecolorRequest(1, ("v0",))) == {1: ()}
    rest = rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1)))
    assert set(rest) == {1, 2}
    rig.assert_up_to_date()
    assert [port.epoch for port in rig.fabric.slice("red").ports] == [1, 1, 1]


@pytest.mark.parametrize("epoch", [3, 0])
def test_recolor_by_any_other_step_is_refused(rig: Rig, epoch: int) -> None:
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1)))
    with pytest.raises(Conflict, match="cannot be recolored"):
        rig.fabric.recolor("red", RecolorRequest(epoch, ("v1",)))
    rig.assert_up_to_date()


def test_no_port_gets_two_epochs_ahead(rig: Rig) -> None:
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1, ("v0",))))
    with pytest.raises(Conflict, match="VM v1 is still in epoch 0"):
        rig.fabric.recolor("red", RecolorRequest(2, ("v0",)))
    with pytest.raises(Conflict):
        rig.fabric.recolor("red", RecolorRequest(2))


def test_recolor_of_nothing_known(rig: Rig) -> None:
    with pytest.raises(NotFound, match="'green'"):
        rig.fabric.recolor("green", RecolorRequest(1))
    with pytest.raises(NotFound, match="no VM 'v9'"):
        rig.fabric.recolor("red", RecolorRequest(1, ("v0", "v9")))
    with pytest.raises(InvalidInput):
        rig.fabric.recolor("red", RecolorRequest(-1))


@pytest.mark.parametrize("epochs", [(0, 0, 0), (1, 0, 1), (3, 3, 3), (2, 2, 3)])
def test_put_moves_colors_one_on_at_most_and_never_back(rig: Rig, epochs: tuple[int, ...]) -> None:
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1)))
    with pytest.raises(Conflict):
        rig.fabric.put(with_epochs(RED, epochs))
    with pytest.raises(Conflict):
        rig.fabric.replace_all([with_epochs(RED, epochs)])
    rig.carry_out(rig.fabric.put(with_epochs(RED, (1, 2, 1))))
    rig.assert_up_to_date()


def test_restarted_controller_keeps_what_it_does_not_know_until_told(rig: Rig) -> None:
    rig.carry_out(rig.fabric.put(BLUE))
    assert rig.restart_controller() == {}
    assert rig.vlan_ids(1) == {7, 8}
    assert rig.carry_out(rig.fabric.replace_all([RED, BLUE])) == {1: (), 2: (), 3: ()}
    rig.carry_out(rig.fabric.replace_all([BLUE]))
    rig.assert_up_to_date()
    assert rig.vlan_ids(1) == {8}


def test_whole_truth_reaches_switches_that_connect_later(rig: Rig) -> None:
    rig.fabric.disconnect(2)
    rig.carry_out(rig.fabric.replace_all([BLUE]))
    assert not rig.fabric.is_reachable(BLUE)
    rig.connect(2)
    assert rig.fabric.is_reachable(BLUE)
    rig.assert_up_to_date()


def test_slice_deleted_while_a_switch_was_away_goes_when_it_returns(rig: Rig) -> None:
    rig.fabric.disconnect(2)
    rig.carry_out(rig.fabric.delete("red"))
    assert rig.vlan_ids(2) == {7}
    rig.connect(2)
    assert rig.vlan_ids(2) == set()


def test_leftovers_under_a_slices_vlan_id_go_when_it_is_installed() -> None:
    rig = Rig(1, 2, 3)
    rig.switches[3] = SoftwareSwitch(slice_rules(replace(BLUE, vlan_id=7), 3))
    rig.connect(3)
    rig.carry_out(rig.fabric.put(replace(RED, links=RED.links[:1])))
    rig.assert_up_to_date()


# --- armed ports ------------------------------------------------------------------------------------------------------


def changes(plan: Plan) -> int:
    return sum(len(batch) for batches in plan.values() for batch in batches)


def arm(rig: Rig, epoch: int, *vms: str) -> Plan:
    plan = rig.carry_out(rig.fabric.arm("red", ArmRequest(epoch, vms or ("v0", "v1", "v2"))))
    rig.assert_up_to_date()
    return plan


def test_a_cut_under_hold(rig: Rig) -> None:
    """Armed, recolored port by port, disarmed; each step repeated changes nothing and is confirmed all the same."""
    assert set(arm(rig, 1)) == {1, 2, 3}, "every switch of the slice answers, also one without a port"
    assert changes(arm(rig, 1)) == 0
    for vm in ("v0", "v1", "v2"):
        assert changes(rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1, (vm,))))) == 1
        assert changes(arm(rig, 1)) == 0
        rig.assert_up_to_date()
    assert set(rig.carry_out(rig.fabric.disarm("red", DisarmRequest(1)))) == {1, 2, 3}
    rig.assert_up_to_date()
    assert [(port.epoch, port.armed) for port in rig.fabric.slice("red").ports] == [(1, 0)] * 3
    assert changes(rig.fabric.disarm("red", DisarmRequest(1))) == 0


@pytest.mark.parametrize(
    ("request_of", "error", "words"),
    [
        (lambda fabric: fabric.arm("green", ArmRequest(1, ("v0",))), NotFound, "'green'"),
        (lambda fabric: fabric.arm("red", ArmRequest(1, ("v0", "v9"))), NotFound, "no VM 'v9'"),
        (lambda fabric: fabric.arm("red", ArmRequest(0, ("v0",))), InvalidInput, "epoch 0"),
        (lambda fabric: fabric.arm("red", ArmRequest(2, ("v2",))), Conflict, "v1 is in epoch 0, so no port"),
        (lambda fabric: fabric.recolor("red", RecolorRequest(2, ("v0",))), Conflict, "v0 is armed for epoch 1"),
        (lambda fabric: fabric.disarm("green", DisarmRequest(1)), NotFound, "'green'"),
        (lambda fabric: fabric.disarm("red", DisarmRequest(1)), Conflict, "v1 is in epoch 0"),
        (lambda fabric: fabric.disarm("red", DisarmRequest(0)), Conflict, "v0 is in epoch 1"),
    ],
)
def test_what_would_break_a_cut_under_hold_is_refused(
    rig: Rig, request_of: Callable[[Fabric], Plan], error: type[GeniViolinError], words: str
) -> None:
    arm(rig, 1, "v0", "v1")
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1, ("v0",))))
    before = rig.fabric.slices()
    with pytest.raises(error, match=words):
        request_of(rig.fabric)
    assert rig.fabric.slices() == before
    rig.assert_up_to_date()


def test_armed_port_goes_nowhere_but_to_its_epoch(rig: Rig) -> None:
    arm(rig, 1)
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1)))
    with pytest.raises(Conflict, match="is armed for epoch 1, not for 2"):
        rig.fabric.recolor("red", RecolorRequest(2, ("v0",)))
    with pytest.raises(Conflict, match="is armed for epoch 1, not for 2"):
        arm(rig, 2, "v0")
    assert rig.fabric.recolor("red", RecolorRequest(1)) == {1: (), 2: ()}, "where it is can be confirmed"


def test_ports_that_were_left_armed_are_armed_for_the_next_cut(rig: Rig) -> None:
    arm(rig, 1)
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1)))
    arm(rig, 2)
    assert [(port.epoch, port.armed) for port in rig.fabric.slice("red").ports] == [(1, 2)] * 3


def test_requests_that_come_late_are_refused(rig: Rig) -> None:
    """An arm after its cut would tag frames for an edge that is gone; a disarm before the next cut would untag them."""
    arm(rig, 1, "v0")
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1)))
    assert changes(rig.fabric.arm("red", ArmRequest(1, ("v0",)))) == 0
    with pytest.raises(Conflict, match="v1 is through the cut into 1 already"):
        rig.fabric.arm("red", ArmRequest(1, ("v1",)))
    rig.carry_out(rig.fabric.disarm("red", DisarmRequest(1)))
    arm(rig, 2, "v0")
    with pytest.raises(Conflict, match="v0 is armed for epoch 2"):
        rig.fabric.disarm("red", DisarmRequest(1))
    rig.assert_up_to_date()


def test_put_neither_arms_nor_disarms_a_slice_that_is_known(rig: Rig) -> None:
    arm(rig, 1, "v0")
    assert changes(rig.fabric.put(RED)) == 0
    assert changes(rig.fabric.put(with_armed(RED, 1))) == 0
    assert [port.armed for port in rig.fabric.slice("red").ports] == [1, 0, 0]


def test_arming_needs_all_switches(rig: Rig) -> None:
    rig.fabric.disconnect(3)
    with pytest.raises(PeerFault, match="switch 0x3"):
        rig.fabric.arm("red", ArmRequest(1, ("v0",)))
    assert rig.fabric.slice("red") == RED


# --- a new controller finds what the old one did ----------------------------------------------------------------------


@pytest.mark.parametrize("is_whole_truth", [False, True])
@pytest.mark.parametrize("start", range(4))
def test_what_is_further_on_the_switches_is_adopted(start: int, is_whole_truth: bool) -> None:
    """Killed in the middle of a cut: the coordinator does not know yet that v0 has been recolored, nor who is armed."""
    rig = Rig(1, 2, 3)
    told = with_epochs(RED, [start] * 3)
    rig.carry_out(rig.fabric.put(told))
    arm(rig, start + 1, "v0", "v1")
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(start + 1, ("v0",))))
    there = rig.fabric.slice("red")
    assert rig.restart_controller() == {}
    plan = rig.fabric.replace_all([told]) if is_whole_truth else rig.fabric.put(told)
    assert changes(plan) == 0, "nothing is rolled back, or sent again"
    assert rig.fabric.slice("red") == there
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(start + 1)))
    rig.carry_out(rig.fabric.disarm("red", DisarmRequest(start + 1)))
    rig.assert_up_to_date()


def test_what_lags_behind_on_the_switches_advances(rig: Rig) -> None:
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1, ("v0",))))
    rig.restart_controller()
    rig.carry_out(rig.fabric.put(with_epochs(RED, (1, 1, 1))))
    assert [port.epoch for port in rig.fabric.slice("red").ports] == [1, 1, 1]
    rig.assert_up_to_date()


def test_another_life_of_the_slice_on_the_switches_is_not_adopted(rig: Rig) -> None:
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1)))
    rig.restart_controller()
    rig.carry_out(rig.fabric.put(replace(RED, vlan_id=9)))
    assert rig.fabric.slice("red").ports == RED.ports


def test_empty_switch_gets_everything_armed_as_it_was(rig: Rig) -> None:
    arm(rig, 1)
    rig.carry_out(rig.fabric.recolor("red", RecolorRequest(1, ("v0",))))
    rules = dict(rig.switches[1].rules)
    rig.restart_empty(1)
    assert rig.switches[1].rules == rules
    rig.assert_up_to_date()


def test_armed_slice_that_nobody_has_is_armed_as_told() -> None:
    rig = Rig(1, 2, 3)
    rig.carry_out(rig.fabric.put(with_armed(RED, 1)))
    assert [port.armed for port in rig.fabric.slice("red").ports] == [1, 1, 1]
    rig.assert_up_to_date()


# --- ports that are not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [_with_port(BLUE, 0, port_no=99), replace(BLUE, links=(*BLUE.links, SwitchLink(1, 98, 3, 51)))]
)
def test_port_that_the_switch_does_not_have_is_refused(rig: Rig, bad: NetworkSlice) -> None:
    assert len(rig.fabric.unknown_ports(bad)) == 1
    with pytest.raises(NotFound, match="switch 0x1 has no port 9"):
        rig.fabric.put(bad)
    assert rig.fabric.slices() == [RED]
    rig.assert_up_to_date()


def test_port_that_a_slice_has_may_be_gone(rig: Rig) -> None:
    del rig.ports[1][1]
    rig.fabric.port_changed(1, rig.ports[1])
    assert changes(rig.fabric.put(RED)) == 0


# --- links ------------------------------------------------------------------------------------------------------------

RING = replace(BLUE, links=(*BLUE.links, SwitchLink(1, 50, 3, 51)))


@pytest.fixture
def ring() -> Rig:
    rig = Rig(1, 2, 3)
    rig.carry_out(rig.fabric.put(RING))
    return rig


def reached(rig: Rig, sender: str) -> list[tuple[int, int]]:
    return send(rig.network(), rig.fabric.slice("blue"), sender, BROADCAST)


def everyone_but(sender: str) -> list[tuple[int, int]]:
    return sorted(edge_of(RING, port.vm) for port in RING.ports if port.vm != sender)


def test_redundant_links_make_no_loop(ring: Rig) -> None:
    ring.assert_up_to_date()
    assert len(ring.fabric.tree("blue")) == 2
    assert ring.fabric.parts("blue") == [[1, 2, 3]]
    for port in RING.ports:
        assert reached(ring, port.vm) == everyone_but(port.vm)


@pytest.mark.parametrize("index", range(3))
def test_the_tree_goes_round_a_link_that_is_down(ring: Rig, index: int) -> None:
    ring.set_link(RING.links[index], False)
    ring.reroute()
    assert RING.links[index] not in ring.fabric.tree("blue")
    for port in RING.ports:
        assert reached(ring, port.vm) == everyone_but(port.vm)
    after = ring.fabric.tree("blue")
    ring.set_link(RING.links[index], True)
    assert not ring.fabric.has_stale_trees(), "a link that returns disturbs nobody"
    assert ring.fabric.tree("blue") == after


def test_only_the_difference_is_sent_and_what_goes_goes_first(ring: Rig) -> None:
    down = ring.fabric.tree("blue")[0]
    ring.set_link(down, False)
    first = ring.carry_out(ring.fabric.take_away())
    assert {down.a_dpid, down.b_dpid} <= set(first)
    assert ring.fabric.parts("blue") != [[1, 2, 3]], "nothing is added yet"
    second = ring.carry_out(ring.fabric.add())
    assert 0 < changes(first) + changes(second) < 60
    ring.assert_up_to_date()


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
@pytest.mark.parametrize("index", [0, 1])
def test_no_loop_at_any_moment_between_two_trees(ring: Rig, index: int, order: tuple[int, ...]) -> None:
    """The link that goes still carries frames here (an administrator has set one end down), the worst case."""
    going = ring.fabric.tree("blue")[index]
    ring.set_link(going, False)
    for plan in (ring.fabric.take_away(), ring.fabric.add()):
        for dpid in order:
            for batch in plan.get(dpid, ()):
                ring.switches[dpid].send([batch])
                network = ring.network()
                network.lost.clear()
                for port in RING.ports:
                    got = send(network, RING, port.vm, BROADCAST)  # fails if a frame goes round
                    assert len(got) == len(set(got)), "and never twice to the same VM"


def test_traffic_goes_on_inside_the_parts(ring: Rig) -> None:
    for index in (1, 2):
        ring.set_link(RING.links[index], False)
    ring.reroute()
    assert ring.fabric.parts("blue") == [[1, 2], [3]]
    assert reached(ring, "v0") == [edge_of(RING, "v1")]
    assert reached(ring, "v2") == []
    ring.set_link(RING.links[2], True)
    ring.reroute()
    assert ring.fabric.parts("blue") == [[1, 2, 3]]
    assert reached(ring, "v2") == everyone_but("v2")


def test_port_of_a_link_that_is_deleted_is_down(ring: Rig) -> None:
    going = ring.fabric.tree("blue")[0]
    del ring.ports[going.a_dpid][going.a_port_no]
    ring.fabric.port_changed(going.a_dpid, ring.ports[going.a_dpid])
    ring.carry_out(ring.fabric.take_away())
    ring.carry_out(ring.fabric.add())
    assert going not in ring.fabric.tree("blue")
    ring.assert_up_to_date()


def test_link_between_two_switches_that_are_away_stays_in_use(ring: Rig) -> None:
    """Nobody can tell them to leave it, so another way round could close a loop."""
    going = ring.fabric.tree("blue")[0]
    ring.set_link(going, False)
    for dpid in (going.a_dpid, going.b_dpid):
        ring.fabric.disconnect(dpid)
    assert not ring.fabric.has_stale_trees()
    ring.connect(going.a_dpid)
    assert ring.fabric.has_stale_trees()
    ring.reroute()
    assert going not in ring.fabric.tree("blue")


def test_restarted_controller_goes_on_with_the_tree_that_it_finds(ring: Rig) -> None:
    first = ring.fabric.tree("blue")
    ring.set_link(first[0], False)
    ring.reroute()
    ring.set_link(first[0], True)
    found = ring.fabric.tree("blue")
    assert found != first
    ring.restart_controller()
    assert changes(ring.fabric.replace_all([RING])) == 0
    assert ring.fabric.tree("blue") == found


def test_slice_that_gets_another_link_uses_it_when_all_have_let_go(ring: Rig) -> None:
    ring.carry_out(ring.fabric.put(replace(RING, links=RING.links[1:])))
    assert ring.fabric.parts("blue") != [[1, 2, 3]]
    ring.reroute()
    assert ring.fabric.parts("blue") == [[1, 2, 3]]
    ring.assert_up_to_date()


# --- counting ---------------------------------------------------------------------------------------------------------


def counts(rig: Rig) -> list[dict[int, int]]:
    return [dict(switch.meters) for switch in rig.switches.values()]


def told(rig: Rig, vlan_id: int = 8) -> dict[int, tuple[int, int, int]]:
    counters = rig.fabric.tally("blue").counters(vlan_id, counts(rig), counts(rig))
    return {counter.color: (counter.entered, counter.ended, counter.alive) for counter in counters}


def test_counts_survive_a_change_of_trees(ring: Rig) -> None:
    reached(ring, "v0")
    ring.set_link(ring.fabric.tree("blue")[0], False)
    ring.reroute()
    reached(ring, "v0")
    assert told(ring) == {0: (6, 6, 0), 1: (0, 0, 0), 2: (0, 0, 0)}


def test_lost_frames_are_alive_until_they_are_written_off(ring: Rig) -> None:
    network = ring.network()
    network.lost = set(ring.fabric.tree("blue"))
    send(network, RING, "v0", BROADCAST)
    entered, ended, alive = told(ring)[0]
    assert alive > 0 and entered - ended == alive
    ring.fabric.tally("blue").write_off([sums.alive for sums in by_color(8, counts(ring))], current_color=1)
    assert told(ring)[0] == (entered, entered, 0)
    ring.fabric.tally("blue").write_off([1, 0, 0], current_color=1)
    reached(ring, "v0")
    assert told(ring)[0][2] == alive - 1


def test_counts_of_a_switch_that_lost_them_are_not_told(ring: Rig) -> None:
    reached(ring, "v0")
    ring.restart_empty(2)
    assert told(ring) == {}
    ring.fabric.tally("blue").write_off([0, 0, 0], current_color=0)
    assert set(told(ring)) == {1, 2}, "frames of the present color are not known to be none"


def test_counts_of_a_switch_that_only_was_away_are_told(ring: Rig) -> None:
    reached(ring, "v0")
    ring.fabric.disconnect(2)
    with pytest.raises(PeerFault, match="switch 0x2"):
        ring.fabric.tally("blue")
    ring.connect(2)
    assert told(ring)[0] == (3, 3, 0)


def test_new_controller_does_not_tell_what_it_has_not_counted_from_the_start(ring: Rig) -> None:
    ring.restart_controller()
    ring.carry_out(ring.fabric.put(RING))
    assert told(ring) == {}


def test_counts_that_do_not_add_up_are_not_told() -> None:
    tally = Tally.from_zero()
    tally.write_off([3, 3, 3], current_color=2)
    assert [counter.color for counter in tally.counters(8, [], [])] == [2]


def test_switch_without_meters_forwards_and_is_not_counted() -> None:
    class Meterless(Rig):
        has_meters = False

    rig = Meterless(1, 2, 3)
    rig.carry_out(rig.fabric.put(RING))
    assert reached(rig, "v0") == everyone_but("v0")
    assert not any(switch.meters for switch in rig.switches.values())
    with pytest.raises(PeerFault, match="cannot count"):
        rig.fabric.tally("blue")
    rig.carry_out(rig.fabric.recolor("blue", RecolorRequest(1)))
    assert rig.restart_controller() == {}


class AnyHistory(RuleBasedStateMachine):
    """Whatever is asked in whatever order, switches and books agree, and a refused request changes nothing."""

    @initialize()
    def start(self) -> None:
        self.rig = Rig(1, 2, 3)

    def attempt(self, request: Callable[[], Plan]) -> None:
        before = self.rig.fabric.slices()
        try:
            self.rig.carry_out(request())
        except GeniViolinError:
            assert self.rig.fabric.slices() == before

    @rule(network=st.sampled_from([RED, BLUE, RING]), vlan_id=st.integers(7, 9), keep=st.integers(1, 3))
    def put(self, network: NetworkSlice, vlan_id: int, keep: int) -> None:
        wanted = replace(network, vlan_id=vlan_id, ports=network.ports[:keep])
        self.attempt(lambda: self.rig.fabric.put(wanted))

    @rule(name=st.sampled_from(["red", "blue"]))
    def delete(self, name: str) -> None:
        self.attempt(lambda: self.rig.fabric.delete(name))

    @rule(name=st.sampled_from(["red", "blue"]), epoch=st.integers(0, 4), vm=st.sampled_from(["v0", "v1", "v2", None]))
    def recolor(self, name: str, epoch: int, vm: str | None) -> None:
        self.attempt(lambda: self.rig.fabric.recolor(name, RecolorRequest(epoch, (vm and (vm,)) or None)))

    @rule(name=st.sampled_from(["red", "blue"]), epoch=st.integers(0, 4), vm=st.sampled_from(["v0", "v1", "v2"]))
    def arm(self, name: str, epoch: int, vm: str) -> None:
        self.attempt(lambda: self.rig.fabric.arm(name, ArmRequest(epoch, (vm,))))

    @rule(name=st.sampled_from(["red", "blue"]), epoch=st.integers(0, 4))
    def disarm(self, name: str, epoch: int) -> None:
        self.attempt(lambda: self.rig.fabric.disarm(name, DisarmRequest(epoch)))

    @rule(index=st.integers(0, 2), is_up=st.booleans())
    def link(self, index: int, is_up: bool) -> None:
        self.rig.set_link(RING.links[index], is_up)
        self.rig.carry_out(self.rig.fabric.take_away())
        self.rig.carry_out(self.rig.fabric.add())

    @rule(dpid=st.integers(1, 3))
    def disconnect(self, dpid: int) -> None:
        self.rig.fabric.disconnect(dpid)

    @rule(dpid=st.integers(1, 3))
    def connect(self, dpid: int) -> None:
        self.rig.fabric.disconnect(dpid)
        self.rig.connect(dpid)

    @invariant()
    def books_are_right(self) -> None:
        self.rig.assert_up_to_date()

    @invariant()
    def epochs_are_adjacent(self) -> None:
        for network in self.rig.fabric.slices():
            epochs = [port.epoch for port in network.ports]
            armed = {port.armed for port in network.ports} - {0}
            assert max(epochs) - min(epochs) <= 1
            assert len(armed) <= 1
            assert all(port.armed - port.epoch in (0, 1) for port in network.ports if port.armed)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
