"""The controller's work: makes plans with the fabric, has the connections carry them out, waits for the switches.

Theory of operation. Between making a plan and enqueueing it no green thread can come in between, so that the order of
the fabric's books is the order on the wire. Waiting comes after. A switch whose reply is late may still do what it
was told; one that refuses something, or goes away, is forgotten, and read again when it connects.

Links that go or come change the trees of slices. One green thread at a time does that (:meth:`Operations.reroute`), as
often as it takes: what has to go first, and only when all switches have confirmed it what comes.
"""

import logging
import secrets
from collections.abc import Iterable
from typing import Any

from ryu.lib import hub

from geni_violin.controller import of13
from geni_violin.controller.connection import Connection, Reply
from geni_violin.controller.fabric import Fabric, Found, Plan, port_counters
from geni_violin.controller.meters import HIGHEST_METER, by_color
from geni_violin.controller.pipeline import COOKIE_MAGIC, COOKIE_MAGIC_MASK, SLICE_COOKIE_MASK, Rule, slice_cookie
from geni_violin.controller.tree import switches_of
from geni_violin.core.color import color_of
from geni_violin.core.errors import GeniViolinError, PeerFault
from geni_violin.core.messages import (
    ArmRequest,
    ColorCounters,
    DisarmRequest,
    PortCounters,
    Recolored,
    RecolorRequest,
)
from geni_violin.core.model import NetworkSlice
from geni_violin.runtime.clock import monotonic_ms

RECOLOR_DEADLINE_MS = 2_000.0
INSTALL_DEADLINE_MS = 10_000.0
READ_DEADLINE_MS = 5_000.0

LOG = logging.getLogger("geni_violin.controller")


class Operations:
    """All that can be asked of the controller, and all that switches tell it."""

    def __init__(self) -> None:
        self.fabric = Fabric()
        self.instance = secrets.token_hex(8)
        """Another one at each start, so that others can tell that the controller has forgotten its slices."""
        self._connections: dict[int, Connection] = {}
        self._is_rerouting = False
        self._rerouted: Any = hub.Event()

    # --- requests ---

    def put(self, network: NetworkSlice) -> Recolored:
        """Install or change a slice; see :meth:`Fabric.put` for the errors."""
        started_ms = monotonic_ms()
        self._hear_of_new_ports(network)
        self._carry_out(self.fabric.put(network), INSTALL_DEADLINE_MS)
        self._await_trees()
        return Recolored(barrier_ms=monotonic_ms() - started_ms)

    def _hear_of_new_ports(self, network: NetworkSlice) -> None:
        """A port that was made a moment ago is announced before any barrier reply that is asked for now."""
        dpids = {dpid for dpid, _port_no in self.fabric.unknown_ports(network)} & self._connections.keys()
        self._await([self._connections[dpid].enqueue(()) for dpid in dpids], READ_DEADLINE_MS)

    def replace_all(self, networks: Iterable[NetworkSlice]) -> int:
        """Make ``networks`` all there is. Gives back how many of them all their switches have confirmed."""
        self._carry_out(self.fabric.replace_all(networks), INSTALL_DEADLINE_MS)
        self._await_trees()
        return sum(self.fabric.is_reachable(network) for network in self.fabric.slices())

    def delete(self, name: str) -> Recolored:
        """Remove a slice; see :meth:`Fabric.delete` for the errors."""
        return self._carry_out(self.fabric.delete(name), INSTALL_DEADLINE_MS)

    def recolor(self, name: str, request: RecolorRequest) -> Recolored:
        """Move ports on; see :meth:`Fabric.recolor` for the errors. Asks nothing of a switch but its barrier reply."""
        return self._carry_out(self.fabric.recolor(name, request), RECOLOR_DEADLINE_MS)

    def arm(self, name: str, request: ArmRequest) -> Recolored:
        """Give ports the frames of both colors of a cut, tagged; see :meth:`Fabric.arm` for the errors."""
        return self._carry_out(self.fabric.arm(name, request), RECOLOR_DEADLINE_MS)

    def disarm(self, name: str, request: DisarmRequest) -> Recolored:
        """Give all ports their frames without a tag; see :meth:`Fabric.disarm` for the errors.

        The old color has come to its end, so what the counters say of it is loss from now on.
        """
        answer = self._carry_out(self.fabric.disarm(name, request), RECOLOR_DEADLINE_MS)
        try:
            alive = [sums.alive for sums in by_color(self.fabric.slice(name).vlan_id, self._read_meters(name))]
            self.fabric.tally(name).write_off(alive, color_of(request.epoch))
        except GeniViolinError as error:
            LOG.warning("slice %s: its lost frames are not told: %s", name, error)
        return answer

    def colors(self, name: str) -> list[ColorCounters]:
        """How many frames of each color are alive, exactly. A color that cannot be told is left out.

        :raise NotFound: there is no such slice.
        :raise PeerFault: a switch is not connected, does not answer, or has no meters.
        """
        first, second = self._read_meters(name), self._read_meters(name)
        return self.fabric.tally(name).counters(self.fabric.slice(name).vlan_id, first, second)

    def _read_meters(self, name: str) -> list[dict[int, int]]:
        self.fabric.tally(name)
        dpids = sorted(switches_of(self.fabric.slice(name)))
        replies = [self._connections[dpid].enqueue_meter_read() for dpid in dpids]
        self._await(replies, READ_DEADLINE_MS)
        return [reply.meters for reply in replies]

    def counters(self, name: str) -> list[PortCounters]:
        """Every port's frames, as the switches report them now; :func:`port_counters` tells how exact that is.

        :raise NotFound: there is no such slice.
        :raise PeerFault: a switch is not connected, or does not answer.
        """
        places = self.fabric.counter_places(name)
        cookie = slice_cookie(self.fabric.slice(name).vlan_id)
        dpids = sorted({place.port.dpid for place in places})
        replies = {dpid: self._connections[dpid].enqueue_read(cookie, SLICE_COOKIE_MASK) for dpid in dpids}
        self._await(replies.values(), READ_DEADLINE_MS)
        packets = {
            dpid: {entry.rule.key: entry.packet_count for entry in reply.entries if entry.rule is not None}
            for dpid, reply in replies.items()
        }
        return [port_counters(place, packets[place.port.dpid]) for place in places]

    def _carry_out(self, plan: Plan, deadline_ms: float) -> Recolored:
        started_ms = monotonic_ms()
        replies = [self._connections[dpid].enqueue(batches) for dpid, batches in plan.items()]
        self._await(replies, deadline_ms)
        return Recolored(barrier_ms=monotonic_ms() - started_ms)

    def _await(self, replies: Iterable[Reply], deadline_ms: float) -> None:
        """Send what is enqueued and wait for all replies; the first that fails is raised, after all had their time."""
        until_ms = monotonic_ms() + deadline_ms
        waiting = list(replies)
        for reply in waiting:
            connection = self._connections.get(reply.dpid)
            if connection is not None:
                connection.flush()
        failures: list[PeerFault] = []
        for reply in waiting:
            try:
                reply.wait(until_ms)
            except PeerFault as failure:
                failures.append(failure)
        if failures:
            raise failures[0]

    # --- switches ---

    def switch_arrived(self, datapath: Any) -> Connection:
        """A switch has connected. Its rules are not known yet: :meth:`synchronize` is next."""
        if datapath.id in self._connections:
            self._give_up(self._connections[datapath.id], "it has connected again")
        connection = self._connections[datapath.id] = Connection(datapath)
        return connection

    def synchronize(self, connection: Connection) -> None:
        """Read a switch's rules, then make them what they should be. Blocks; gives the connection up on failure."""
        try:
            rules = connection.enqueue_read(COOKIE_MAGIC << 48, COOKIE_MAGIC_MASK)
            features, meters = connection.enqueue_meter_features(), connection.enqueue_meter_read()
            self._await([rules, features, meters], READ_DEADLINE_MS)
            if self._connections.get(connection.dpid) is not connection:
                return
            found = Found(
                self._known_rules(connection.dpid, rules),
                meters.meters,
                of13.ports_of(connection.datapath),
                has_meters=features.highest_meter >= HIGHEST_METER,
            )
            batches = self.fabric.connect(connection.dpid, found)
            self._await([connection.enqueue(batches)], INSTALL_DEADLINE_MS)
            LOG.info("switch %#x is connected, %d rules changed", connection.dpid, sum(map(len, batches)))
        except GeniViolinError as error:
            LOG.error("switch %#x cannot be synchronized: %s", connection.dpid, error)
            self._give_up(connection, error.message)
        self.reroute()

    def _known_rules(self, dpid: int, read: Reply) -> list[Rule]:
        for entry in read.entries:
            if entry.rule is None:
                LOG.warning("switch %#x has a rule of another version, left alone: %s", dpid, entry.text)
        return [entry.rule for entry in read.entries if entry.rule is not None]

    def switch_left(self, datapath: Any) -> None:
        """A switch's connection is closed."""
        connection = self._of(datapath)
        if connection is not None:
            self._give_up(connection, "it has disconnected")

    def barrier_replied(self, message: Any) -> None:
        """A switch has sent a barrier reply."""
        connection = self._of(message.datapath)
        if connection is not None:
            connection.barrier_replied(message.xid)

    def flows_reported(self, message: Any) -> None:
        """A switch has sent flow statistics, or a part of them."""
        connection = self._of(message.datapath)
        if connection is not None:
            connection.flows_reported(message)

    def meters_reported(self, message: Any) -> None:
        """A switch has sent meter statistics, or a part of them."""
        connection = self._of(message.datapath)
        if connection is not None:
            connection.meters_reported(message)

    def meter_features_reported(self, message: Any) -> None:
        """A switch has told what meters it can have."""
        connection = self._of(message.datapath)
        if connection is not None:
            connection.meter_features_reported(message)

    def port_changed(self, datapath: Any) -> None:
        """A switch has a port more or less, or one of them went up or down; :meth:`reroute` is next."""
        if self._of(datapath) is not None:
            self.fabric.port_changed(datapath.id, of13.ports_of(datapath))

    def _await_trees(self) -> None:
        """Wait until all trees are what they should be. What cannot be confirmed now goes on being tried.

        :raise PeerFault: a switch did not confirm in time.
        """
        if not self.fabric.has_stale_trees() and not self._is_rerouting:
            return
        self._rerouted.clear()
        hub.spawn(self.reroute)
        if not self._rerouted.wait(timeout=INSTALL_DEADLINE_MS / 1000.0):
            raise PeerFault("a change of links is not confirmed by all switches in time", "it goes on being tried")

    def reroute(self) -> None:
        """Make every slice's tree what its links allow now. Returns at once if another green thread is at it."""
        if self._is_rerouting:
            return
        self._is_rerouting = True
        try:
            while self.fabric.has_stale_trees():
                self._reroute_once()
        finally:
            self._is_rerouting = False
            self._rerouted.set()

    def _reroute_once(self) -> None:
        if self._is_confirmed(self.fabric.take_away()):
            plan = self.fabric.add()
            self._is_confirmed(plan)
            LOG.info("links changed: %d rules", sum(len(batch) for batches in plan.values() for batch in batches))

    def _is_confirmed(self, plan: Plan) -> bool:
        """Carry out a plan; a switch that does not confirm it in time is given up: its links must not be relied on."""
        replies = [self._connections[dpid].enqueue(batches) for dpid, batches in plan.items()]
        try:
            self._await(replies, INSTALL_DEADLINE_MS)
        except PeerFault as error:
            LOG.warning("a change of links is not confirmed: %s", error)
            for reply in replies:
                if not reply.is_answered and reply.dpid in self._connections:
                    self._give_up(self._connections[reply.dpid], "it did not confirm a change of links in time")
            return False
        return True

    def refused(self, message: Any) -> None:
        """A switch has sent an error message. If it is about something of ours, our books are wrong: start anew."""
        connection = self._of(message.datapath)
        xid, text = of13.refusal(message)
        if connection is not None and connection.refused(xid):
            LOG.error("switch %#x refused a message: %s", connection.dpid, text)
            self._give_up(connection, f"it refused a message ({text})")

    def _of(self, datapath: Any) -> Connection | None:
        connection = self._connections.get(datapath.id)
        return connection if connection is not None and connection.datapath is datapath else None

    def _give_up(self, connection: Connection, failure: str) -> None:
        if self._connections.get(connection.dpid) is connection:
            del self._connections[connection.dpid]
            self.fabric.disconnect(connection.dpid)
        connection.give_up(failure)
