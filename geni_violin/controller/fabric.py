"""The bookkeeping: which slices are wanted, which switches are connected, what is installed on each.

Theory of operation. Every request becomes a *plan*: by datapath id, the batches to send. Making a plan validates the
whole request first, then updates the books in the same step, as if the switches had done it already. That is true
in the end because a connection is a queue: whoever sends plans to a switch in the order in which they were made, and
confirms each with a barrier, keeps the books right, also for requests that overlap. What a switch does not confirm
as expected is never repaired from memory: its connection is given up, and a new one begins with :meth:`Fabric.connect`,
which reads what is there.

A restarted controller knows no slice, but the switches still forward. Rules of slices that it does not know are kept
until :meth:`Fabric.replace_all` says what the whole truth is. A slice that it is told then may be further on the
switches than whoever tells it knows; that is adopted (:mod:`.adoption`), because colors only advance.

When a link goes or comes, trees change in two plans (:meth:`Fabric.take_away`, :meth:`Fabric.add`); when every switch
has confirmed the first, every tree in use is a part of the old one and of the new one, so at no moment is there a loop.
Nothing here does any input or output.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace

from geni_violin.controller.adoption import adopted, links_found
from geni_violin.controller.diff import Batch, Installed, by_key, diff, meters_of
from geni_violin.controller.meters import MAX_COPIES, Tally, vlan_id_of_meter
from geni_violin.controller.pipeline import NO_SLICE, Key, Rule
from geni_violin.controller.rules import (
    color_rules,
    default_rules,
    foreign_rule,
    ingress_rule,
    link_ends,
    local_rule,
    port_rules,
    refuse_rule,
    slice_meters,
    slice_rules,
)
from geni_violin.controller.tree import Tree, parts_of, spanning_tree, switches_of
from geni_violin.controller.validation import (
    PortId,
    check_arm,
    check_beside,
    check_colors_advance,
    check_disarm,
    check_recolor,
    check_slice,
    edge_ports,
    link_end_ids,
    link_ports,
)
from geni_violin.core.color import color_of
from geni_violin.core.errors import InvalidInput, NotFound, PeerFault
from geni_violin.core.messages import ArmRequest, DisarmRequest, PortCounters, RecolorRequest
from geni_violin.core.model import EdgePort, NetworkSlice, SwitchLink

Plan = dict[int, tuple[Batch, ...]]
"""By datapath id what to send; a switch with no batches still has to confirm that it is up to date."""


@dataclass(frozen=True)
class Found:
    """What a switch that has just connected has: rules and meters of ours, and its ports, each up or down."""

    rules: Iterable[Rule] = ()
    meters: Iterable[int] = ()
    ports: Mapping[int, bool] = field(default_factory=dict)
    has_meters: bool = True


@dataclass(frozen=True)
class CounterPlace:
    """Where one port's frames are counted: ``received`` counts what reached it, ``refused`` what it dropped of that,
    ``foreign`` what its VM sent from an address that is not its own."""

    port: EdgePort
    received: Key
    refused: Key
    foreign: Key


@dataclass
class _Switch(Installed):
    """A connected switch. One without meters gets the rules without them."""

    has_meters: bool = True

    def fitting(self, rules: Iterable[Rule]) -> list[Rule]:
        return [*rules] if self.has_meters else [replace(rule, meter=None) for rule in rules]

    def lacking(self, rules: Iterable[Rule], meters: Set[int]) -> set[int]:
        return (meters_of(rules) | meters) - self.meters if self.has_meters else set()


@dataclass
class _Slice:
    """A slice as it is wanted, the tree of links that it uses, and what is known of its counts."""

    wanted: NetworkSlice
    tree: Tree
    tally: Tally

    @property
    def routed(self) -> NetworkSlice:
        """The slice with the links that it uses only."""
        return replace(self.wanted, links=self.tree)


class Fabric:
    """All slices and all switches."""

    def __init__(self) -> None:
        self._slices: dict[str, _Slice] = {}
        self._switches: dict[int, _Switch] = {}
        self._ports: dict[int, dict[int, bool]] = {}
        """By switch that was ever connected: its ports, each up or down, as last heard."""
        self._last_meters: dict[int, frozenset[int]] = {}
        """By switch that is away: the meters that it had."""
        self._deleted_vlan_ids: set[int] = set()
        self._knows_all = False

    # --- switches ---

    def connected(self) -> list[int]:
        """The datapath ids of the switches that are connected and whose rules are known."""
        return sorted(self._switches)

    def connect(self, dpid: int, found: Found) -> tuple[Batch, ...]:
        """A switch is there; what to send so that it has what it should have."""
        has_meters = found.has_meters
        switch = self._switches[dpid] = _Switch(by_key(found.rules), set(found.meters), has_meters)
        self._ports[dpid] = dict(found.ports)
        self._lose_counts(self._last_meters.pop(dpid, frozenset()) - switch.meters)
        kept = [] if self._knows_all else [rule for rule in switch.rules.values() if self._is_unknown(rule.vlan_id)]
        wanted = {**by_key(kept), **by_key(switch.fitting([*default_rules(), *self._wanted(dpid)]))}.values()
        lacking = switch.lacking(wanted, self._wanted_meters(dpid))
        batches = diff(switch.rules, wanted, lacking, self._idle_meters(dpid))
        switch.apply(batches)
        return batches

    def disconnect(self, dpid: int) -> None:
        """A switch is gone, and with it all that was known of its rules."""
        switch = self._switches.pop(dpid, None)
        if switch is not None:
            self._last_meters[dpid] = frozenset(switch.meters)

    def installed(self, dpid: int) -> Installed:
        """What a connected switch has, once all that was planned has reached it."""
        return self._switches[dpid]

    def port_changed(self, dpid: int, ports: Mapping[int, bool]) -> None:
        """A connected switch has these ports now; :meth:`take_away` and :meth:`add` are next."""
        if dpid in self._switches:
            self._ports[dpid] = dict(ports)

    # --- slices ---

    def slices(self) -> list[NetworkSlice]:
        """All slices, by name."""
        return [self._slices[name].wanted for name in sorted(self._slices)]

    def slice(self, name: str) -> NetworkSlice:
        """The slice of that name, with the epochs that its ports have been moved to.

        :raise NotFound: there is none.
        """
        return self._known(name).wanted

    def tree(self, name: str) -> Tree:
        """The links that a slice uses.

        :raise NotFound: there is no such slice.
        """
        return self._known(name).tree

    def parts(self, name: str) -> list[list[int]]:
        """The switches of a slice that its links that are up join, part by part; one part if nothing is wrong.

        :raise NotFound: there is no such slice.
        """
        return parts_of(self.slice(name), self.tree(name))

    def unknown_ports(self, network: NetworkSlice) -> list[PortId]:
        """The ports of a definition that are not on their switches; those that the slice has already do not count."""
        old = self._slices.get(network.name)
        kept = {*edge_ports(old.wanted), *link_ports(old.wanted)} if old else set()
        new = {*edge_ports(network), *link_ports(network)} - kept
        return sorted((dpid, no) for dpid, no in new if dpid in self._ports and no not in self._ports[dpid])

    def put(self, network: NetworkSlice) -> Plan:
        """Install a slice, or change it to a new definition. Its ports stay armed, or not, as they are.

        Of a slice whose links change, :meth:`add` brings the new ones into use.

        :raise InvalidInput: the definition makes no sense.
        :raise NotFound: a switch has no such port.
        :raise Conflict: it takes what belongs to another slice, or moves a color other than forward.
        :raise PeerFault: one of its switches is not connected.
        """
        old = self._slices.get(network.name)
        network = self._reconciled(network)
        self._check(network, [other.wanted for name, other in self._slices.items() if name != network.name])
        self._require(switches_of(network))
        unknown = self.unknown_ports(network)
        if unknown:
            raise NotFound(f"switch {unknown[0][0]:#x} has no port {unknown[0][1]}", "see ovs-ofctl show on its host")
        self._slices[network.name] = self._begun(network, old)
        vlan_ids = {network.vlan_id} | ({old.wanted.vlan_id} if old else set())
        self._deleted_vlan_ids = (self._deleted_vlan_ids | vlan_ids) - {network.vlan_id}
        return self._plan(vlan_ids, switches_of(network))

    def replace_all(self, networks: Iterable[NetworkSlice]) -> Plan:
        """Make ``networks`` the whole truth. Switches that are not connected get their rules when they are.

        :raise InvalidInput: a definition makes no sense.
        :raise Conflict: two take the same, or a color would not move forward.
        """
        target: dict[str, NetworkSlice] = {}
        for network in map(self._reconciled, networks):
            if network.name in target:
                raise InvalidInput(f"slice {network.name} is named twice in the list")
            self._check(network, target.values())
            target[network.name] = network
        self._slices = {name: self._begun(network, self._slices.get(name)) for name, network in target.items()}
        self._knows_all = True
        self._deleted_vlan_ids.clear()
        plan = {dpid: self._update_all(dpid) for dpid in self.connected()}
        return {dpid: batches for dpid, batches in plan.items() if batches or self._wanted(dpid)}

    def is_reachable(self, network: NetworkSlice) -> bool:
        """Whether all switches of a slice are connected."""
        return switches_of(network) <= self._switches.keys()

    def delete(self, name: str) -> Plan:
        """Remove a slice from all connected switches, and from the others when they connect.

        :raise NotFound: there is none of that name.
        """
        network = self.slice(name)
        del self._slices[name]
        self._deleted_vlan_ids.add(network.vlan_id)
        return self._plan({network.vlan_id}, switches_of(network) & self._switches.keys())

    # --- colors ---

    def recolor(self, name: str, request: RecolorRequest) -> Plan:
        """Move ports on to an epoch. A constant number of rules a port, whatever the size of the slice.

        :raise InvalidInput: there is no such epoch.
        :raise NotFound: there is no such slice, or no such VM in it.
        :raise Conflict: a port is neither in that epoch nor in the one before, or armed for another, or another port
            would be left behind.
        :raise PeerFault: a switch concerned is not connected.
        """
        network = self.slice(name)
        if request.epoch < 0:
            raise InvalidInput(f"there is no epoch {request.epoch}", "an epoch counts cuts, from 0")
        selected = _select(network, request.vms)
        check_recolor(network, selected, request.epoch)
        dpids = {port.dpid for port in selected}
        self._require(dpids)
        return self._change_ports(name, selected, lambda port: replace(port, epoch=request.epoch), dpids)

    def arm(self, name: str, request: ArmRequest) -> Plan:
        """Give ports the frames of two epochs, tagged. Every switch of the slice is asked to confirm.

        :raise InvalidInput: there is no cut into that epoch.
        :raise NotFound: there is no such slice, or no such VM in it.
        :raise Conflict: the slice is not in that epoch or the one before, or is armed for another.
        :raise PeerFault: a switch of the slice is not connected.
        """
        network = self.slice(name)
        if request.epoch < 1:
            raise InvalidInput(f"there is no cut into epoch {request.epoch}", "the first cut is into epoch 1")
        selected = _select(network, request.vms)
        check_arm(network, selected, request.epoch)
        self._require(switches_of(network))
        return self._change_ports(name, selected, lambda port: replace(port, armed=request.epoch), switches_of(network))

    def disarm(self, name: str, request: DisarmRequest) -> Plan:
        """Give all ports of a slice their frames without a tag again. Every switch of it is asked to confirm.

        :raise NotFound: there is no such slice.
        :raise Conflict: a port is not in that epoch.
        :raise PeerFault: a switch of the slice is not connected.
        """
        network = self.slice(name)
        check_disarm(network, request.epoch)
        self._require(switches_of(network))
        return self._change_ports(name, network.ports, lambda port: replace(port, armed=0), switches_of(network))

    def tally(self, name: str) -> Tally:
        """What is known of a slice's counts.

        :raise NotFound: there is no such slice.
        :raise PeerFault: a switch of it cannot count.
        """
        known = self._known(name)
        self._require(switches_of(known.wanted))
        for dpid, ends in link_ends(known.routed).items():
            if not self._switches[dpid].has_meters or len(ends) > MAX_COPIES:
                raise PeerFault(
                    f"switch {dpid:#x} cannot count the frames of slice {name}", "its frames' end is not told"
                )
        return known.tally

    def counter_places(self, name: str) -> list[CounterPlace]:
        """Where the frames of each port of a slice are counted.

        :raise NotFound: there is no such slice.
        :raise PeerFault: one of its switches is not connected.
        """
        network = self.slice(name)
        self._require({port.dpid for port in network.ports})
        vlan_id = network.vlan_id
        return [
            CounterPlace(p, local_rule(vlan_id, p).key, refuse_rule(vlan_id, p).key, foreign_rule(vlan_id, p).key)
            for p in network.ports
        ]

    # --- links ---

    def take_away(self) -> Plan:
        """Take out of use the links that no slice's tree should have any more.

        Every switch of a slice whose tree is to change is asked to confirm, whether it has to change anything or not.
        A link between two switches that are both away stays: nobody could be told.
        """
        return self._reroute(lambda known, target: tuple(link for link in known.tree if link in target))

    def add(self) -> Plan:
        """Bring into use the links that trees lack, once all switches have confirmed :meth:`take_away`."""
        return self._reroute(lambda _known, target: target)

    def has_stale_trees(self) -> bool:
        """Whether :meth:`take_away` or :meth:`add` has anything to do."""
        return any(known.tree != self._target_tree(known) for known in self._slices.values())

    def _reroute(self, tree_of: Callable[[_Slice, Tree], Tree]) -> Plan:
        vlan_ids: set[int] = set()
        dpids: set[int] = set()
        for known in self._slices.values():
            target = self._target_tree(known)
            if known.tree != target:
                known.tree = tree_of(known, target)
                vlan_ids.add(known.wanted.vlan_id)
                dpids |= switches_of(known.wanted)
        return self._plan(vlan_ids, dpids)

    def _target_tree(self, known: _Slice) -> Tree:
        def is_usable(link: SwitchLink) -> bool:
            return self._is_up(link) or (link in known.tree and not self._is_reached(link))

        return spanning_tree(known.wanted, is_usable, known.tree)

    def _is_up(self, link: SwitchLink) -> bool:
        """As last heard; a switch that was never connected is believed to have it."""
        return all(
            dpid not in self._ports or self._ports[dpid].get(port_no, False) for dpid, port_no in link_end_ids(link)
        )

    def _is_reached(self, link: SwitchLink) -> bool:
        return link.a_dpid in self._switches or link.b_dpid in self._switches

    # --- inside ---

    def _known(self, name: str) -> _Slice:
        try:
            return self._slices[name]
        except KeyError:
            raise NotFound(f"the controller knows no slice {name!r}") from None

    def _reconciled(self, network: NetworkSlice) -> NetworkSlice:
        """A definition with what it cannot know: which ports are armed, and which are further than it says."""
        old = self._slices.get(network.name)
        if old is None or old.wanted.vlan_id != network.vlan_id:
            return adopted(network, self._rules_by_switch())
        armed = {port.vm: port.armed for port in old.wanted.ports}
        return replace(network, ports=tuple(replace(port, armed=armed.get(port.vm, 0)) for port in network.ports))

    def _begun(self, network: NetworkSlice, old: _Slice | None) -> _Slice:
        """A slice as it is to be installed now. One that is in use keeps those of its links that it still has."""
        if old is not None and old.wanted.vlan_id == network.vlan_id:
            is_same = switches_of(old.wanted) == switches_of(network)
            links = tuple(link for link in old.tree if link in network.links)
            return _Slice(network, links, old.tally if is_same else Tally())
        found = links_found(network, self._rules_by_switch())
        dpids = switches_of(network)
        is_new = self.is_reachable(network) and not any(self._meters_of(dpid, network.vlan_id) for dpid in dpids)
        return _Slice(network, spanning_tree(network, self._is_up, found), Tally.from_zero() if is_new else Tally())

    def _rules_by_switch(self) -> dict[int, dict[Key, Rule]]:
        return {dpid: switch.rules for dpid, switch in self._switches.items()}

    def _meters_of(self, dpid: int, vlan_id: int) -> set[int]:
        return {meter for meter in self._switches[dpid].meters if vlan_id_of_meter(meter) == vlan_id}

    def _lose_counts(self, meters: Iterable[int]) -> None:
        lost = {vlan_id_of_meter(meter) for meter in meters}
        for known in self._slices.values():
            if known.wanted.vlan_id in lost:
                known.tally.lose()

    def _check(self, network: NetworkSlice, others: Iterable[NetworkSlice]) -> None:
        check_slice(network)
        check_beside(network, others)
        old = self._slices.get(network.name)
        if old is not None:
            check_colors_advance(old.wanted, network)

    def _require(self, dpids: Iterable[int]) -> None:
        missing = sorted(set(dpids) - self._switches.keys())
        if missing:
            names = ", ".join(f"{dpid:#x}" for dpid in missing)
            raise PeerFault(f"switch {names} is not connected to the controller", "see that Open vSwitch runs there")

    def _is_unknown(self, vlan_id: int) -> bool:
        known = {known.wanted.vlan_id for known in self._slices.values()} | self._deleted_vlan_ids | {NO_SLICE}
        return vlan_id not in known

    def _wanted(self, dpid: int) -> list[Rule]:
        return [rule for known in self._slices.values() for rule in slice_rules(known.routed, dpid)]

    def _wanted_meters(self, dpid: int) -> set[int]:
        return {meter for known in self._slices.values() for meter in slice_meters(known.wanted, dpid)}

    def _idle_meters(self, dpid: int) -> set[int]:
        """The meters of a switch that belong to no slice that is on it, nor to one that may be."""
        here = {known.wanted.vlan_id for known in self._slices.values() if dpid in switches_of(known.wanted)}
        vlan_ids = {vlan_id_of_meter(meter) for meter in self._switches[dpid].meters}
        idle = {v for v in vlan_ids - here if self._knows_all or not self._is_unknown(v)}
        return {meter for meter in self._switches[dpid].meters if vlan_id_of_meter(meter) in idle}

    def _plan(self, vlan_ids: Set[int], confirm: Iterable[int]) -> Plan:
        """Bring the rules of some slices up to date, on every switch; ``confirm`` are in the plan in any case."""
        plan: Plan = {}
        routed = [known.routed for known in self._slices.values() if known.wanted.vlan_id in vlan_ids]
        for dpid, switch in self._switches.items():
            wanted = [rule for network in routed for rule in slice_rules(network, dpid)]
            scope = {key: rule for key, rule in switch.rules.items() if rule.vlan_id in vlan_ids}
            scope |= {rule.key: switch.rules[rule.key] for rule in wanted if rule.key in switch.rules}
            retired = {meter for meter in self._idle_meters(dpid) if vlan_id_of_meter(meter) in vlan_ids}
            meters = {meter for network in routed for meter in slice_meters(network, dpid)}
            batches = self._update(dpid, scope, wanted, meters, retired)
            if batches or dpid in confirm:
                plan[dpid] = batches
        return plan

    def _change_ports(
        self, name: str, ports: Iterable[EdgePort], change: Callable[[EdgePort], EdgePort], confirm: Iterable[int]
    ) -> Plan:
        """Give ports another color or another arm, without looking at any rule that neither is in."""
        known = self._slices[name]
        old = known.routed
        moved = {port.vm: change(port) for port in ports}
        known.wanted = replace(known.wanted, ports=tuple(moved.get(port.vm, port) for port in old.ports))
        pairs: dict[int, list[tuple[EdgePort, EdgePort]]] = {dpid: [] for dpid in confirm}
        for before in old.ports:
            if moved.get(before.vm, before) != before:
                pairs[before.dpid].append((before, moved[before.vm]))
        new = known.routed
        return {dpid: self._change_switch(old, new, dpid, pairs[dpid]) for dpid in sorted(pairs)}

    def _change_switch(
        self, old: NetworkSlice, new: NetworkSlice, dpid: int, pairs: list[tuple[EdgePort, EdgePort]]
    ) -> tuple[Batch, ...]:
        if not pairs:
            return ()
        before, after = zip(*pairs, strict=True)
        if all(_admits(a) == _admits(b) for a, b in pairs):
            leaving = [ingress_rule(old.vlan_id, port) for port in before]
            wanted = [ingress_rule(new.vlan_id, port) for port in after]
        else:
            leaving, wanted = port_rules(old.vlan_id, before), color_rules(new, dpid, after)
        rules = self._switches[dpid].rules
        keys = {rule.key for rule in (*leaving, *wanted)}
        return self._update(dpid, {key: rules[key] for key in keys if key in rules}, wanted)

    def _update_all(self, dpid: int) -> tuple[Batch, ...]:
        idle = self._idle_meters(dpid)
        return self._update(dpid, self._switches[dpid].rules, self._wanted(dpid), self._wanted_meters(dpid), idle)

    def _update(
        self,
        dpid: int,
        scope: Mapping[Key, Rule],
        wanted: Iterable[Rule],
        meters: Set[int] = frozenset(),
        retired_meters: Set[int] = frozenset(),
    ) -> tuple[Batch, ...]:
        switch = self._switches[dpid]
        ours = {key: rule for key, rule in scope.items() if rule.vlan_id != NO_SLICE}
        fitting = switch.fitting(wanted)
        batches = diff(ours, fitting, switch.lacking(fitting, meters), retired_meters)
        switch.apply(batches)
        return batches


def _admits(port: EdgePort) -> tuple[int, bool]:
    """What decides which frames a port is given, and how."""
    return port.armed or port.epoch, bool(port.armed)


def _select(network: NetworkSlice, vms: tuple[str, ...] | None) -> list[EdgePort]:
    if vms is None:
        return list(network.ports)
    unknown = set(vms) - {port.vm for port in network.ports}
    if unknown:
        raise NotFound(f"slice {network.name} has no VM {min(unknown)!r}")
    return [port for port in network.ports if port.vm in vms]


def port_counters(place: CounterPlace, packets: Mapping[Key, int]) -> PortCounters:
    """One port's counters, from the packet counts of its switch's rules.

    Only frames to the VM's own address are counted: OpenFlow has no counter for one port's share of a flood rule.
    Open vSwitch counts what its cache has forwarded every half second or so, and by the rules of that moment: what was
    dropped shortly before the port was recolored may count as delivered (:mod:`.meters` tells more).
    """
    received, dropped = packets.get(place.received, 0), packets.get(place.refused, 0)
    return PortCounters(
        vm=place.port.vm,
        color=color_of(place.port.epoch),
        frames_delivered=max(0, received - dropped),
        frames_dropped=dropped,
        frames_foreign=packets.get(place.foreign, 0),
    )
