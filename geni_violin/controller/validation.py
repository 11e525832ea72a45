"""What the controller accepts. Everything here is checked before anything is changed. Pure functions.

A request that could never be right is :class:`InvalidInput`; one that is not right now is :class:`Conflict`.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable

from geni_violin.controller.tree import parts_of
from geni_violin.core.errors import Conflict, InvalidInput
from geni_violin.core.model import MAX_VLAN_ID, EdgePort, NetworkSlice, SwitchLink

MAX_PORT_NO = 0xFFFFFF00
"""OFPP_MAX: the numbers above it are reserved (OpenFlow 1.3, 7.2.1)."""
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.IGNORECASE)

PortId = tuple[int, int]
"""A port of a switch: datapath id and port number."""


def check_slice(network: NetworkSlice) -> None:
    """Check all that can be told from a slice alone.

    :raise InvalidInput: something is out of range, named twice, or its links do not connect its switches.
    """
    if not network.name:
        raise InvalidInput("the slice has no name")
    if not 1 <= network.vlan_id <= MAX_VLAN_ID:
        raise InvalidInput(f"VLAN ID {network.vlan_id} cannot name a slice", f"expected 1 to {MAX_VLAN_ID}")
    for port in network.ports:
        _check_edge_port(port)
    for port_id in (*edge_ports(network), *link_ports(network)):
        _check_port_id(port_id)
    _check_unique("VM", (port.vm for port in network.ports))
    _check_unique("MAC address", (port.mac.lower() for port in network.ports))
    _check_unique("port (switch, number)", (*edge_ports(network), *link_ports(network)))
    _check_adjacent_epochs(network.ports)
    _check_armed(network.ports)
    _check_connected(network)


def edge_ports(network: NetworkSlice) -> list[PortId]:
    """Where the slice's VMs are, and their hold ports."""
    held = ((port.dpid, port.hold_port_no) for port in network.ports if port.hold_port_no)
    return [*((port.dpid, port.port_no) for port in network.ports), *held]


def link_ports(network: NetworkSlice) -> list[PortId]:
    """Both ends of all links of the slice."""
    return [end for link in network.links for end in link_end_ids(link)]


def link_end_ids(link: SwitchLink) -> tuple[PortId, PortId]:
    """Both ends of a link."""
    return (link.a_dpid, link.a_port_no), (link.b_dpid, link.b_port_no)


def _check_edge_port(port: EdgePort) -> None:
    if port.epoch < 0:
        raise InvalidInput(f"VM {port.vm} cannot be in epoch {port.epoch}", "an epoch counts cuts, from 0")
    if not _MAC.fullmatch(port.mac):
        raise InvalidInput(f"VM {port.vm}: {port.mac!r} is not a MAC address", "expected the form 52:54:00:00:00:01")
    if int(port.mac[:2], 16) & 1 or int(port.mac.replace(":", ""), 16) == 0:
        raise InvalidInput(f"VM {port.vm}: {port.mac} cannot be the address of an interface", "expected a unicast one")
    if port.hold_port_no and port.any_source:
        words = f"VM {port.vm} cannot have a hold port: it may use any source address"
        raise InvalidInput(words, "its own broadcasts would come back to it")


def _check_port_id(port_id: PortId) -> None:
    dpid, port_no = port_id
    if not 0 < dpid < 1 << 64:
        raise InvalidInput(f"{dpid} is not a datapath id", "expected 1 to 2^64 - 1")
    if not 0 < port_no < MAX_PORT_NO:
        raise InvalidInput(f"{port_no} is not an OpenFlow port number", f"expected 1 to {MAX_PORT_NO - 1:#x}")


def _check_unique(what: str, values: Iterable[Hashable]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise InvalidInput(f"{what} {twice[0]} is named twice in the slice")


def _check_adjacent_epochs(ports: Iterable[EdgePort]) -> None:
    epochs = {port.epoch for port in ports}
    if epochs and max(epochs) - min(epochs) > 1:
        raise InvalidInput(
            f"ports are in epochs {min(epochs)} to {max(epochs)}", "at most two adjacent epochs can be alive at a time"
        )


def _check_armed(ports: Iterable[EdgePort]) -> None:
    for port in ports:
        if port.armed and port.armed - port.epoch not in (0, 1):
            raise InvalidInput(
                f"VM {port.vm} is in epoch {port.epoch} and cannot be armed for {port.armed}",
                "a port is armed for the epoch that its VM is in, or for the next",
            )
    if len({port.armed for port in ports} - {0}) > 1:
        raise InvalidInput("ports are armed for different epochs", "one cut at a time")


def _check_connected(network: NetworkSlice) -> None:
    for link in network.links:
        if link.a_dpid == link.b_dpid:
            raise InvalidInput(f"a link joins switch {link.a_dpid:#x} to itself", "a link joins two switches")
    parts = parts_of(network, network.links)
    if len(parts) > 1:
        apart = " and ".join(f"{part[0]:#x}" for part in parts[:2])
        raise InvalidInput(f"no links of the slice join switches {apart}", "the links must connect all its switches")


def check_beside(network: NetworkSlice, others: Iterable[NetworkSlice]) -> None:
    """Check that a slice takes nothing that another one has. Links may be shared, as long as they are the same.

    :raise Conflict: it does; the message names the other slice.
    """
    mine, my_links = set(edge_ports(network)), set(link_ports(network))
    my_wires = {frozenset(link_end_ids(link)) for link in network.links}
    for other in others:
        if other.vlan_id == network.vlan_id:
            raise Conflict(f"VLAN ID {network.vlan_id} belongs to slice {other.name}", "choose another")
        taken = mine & {*edge_ports(other), *link_ports(other)} | my_links & set(edge_ports(other))
        if taken:
            raise Conflict(f"{_port_text(min(taken))} belongs to slice {other.name}")
        for wire in {frozenset(link_end_ids(link)) for link in other.links} - my_wires:
            if wire & my_links:
                raise Conflict(f"{_port_text(min(wire & my_links))} leads elsewhere in slice {other.name}")


def _port_text(port_id: PortId) -> str:
    return f"port {port_id[1]} of switch {port_id[0]:#x}"


def check_colors_advance(old: NetworkSlice, new: NetworkSlice) -> None:
    """Check that a new definition of a slice under its old VLAN ID moves no port back, and none two epochs on.

    :raise Conflict: it does. Frames of the old colors may still be alive, and would be taken for others.
    """
    if old.vlan_id != new.vlan_id or not old.ports or not new.ports:
        return
    before = {port.vm: port.epoch for port in old.ports}
    oldest, newest = min(before.values()), max(port.epoch for port in new.ports)
    for port in new.ports:
        least = before.get(port.vm, oldest)
        if port.epoch < least:
            raise Conflict(
                f"VM {port.vm} cannot be in epoch {port.epoch}, the slice has it in {least}",
                "colors only advance; an earlier life of a slice needs a new VLAN ID",
            )
    if newest - oldest > 1:
        raise Conflict(f"slice {old.name} has a port in epoch {oldest}, so none can be in {newest} yet")


def check_recolor(network: NetworkSlice, ports: Iterable[EdgePort], epoch: int) -> None:
    """Check that ``ports`` may move to ``epoch``: each is there already or one before, and no other is left behind.

    An armed port moves only to the epoch that it is armed for.

    :raise Conflict: one may not; the message names it.
    """
    moving = set()
    for port in ports:
        if port.epoch not in (epoch, epoch - 1):
            raise Conflict(
                f"VM {port.vm} is in epoch {port.epoch} and cannot be recolored to {epoch}",
                f"expected {port.epoch} (to confirm it) or {port.epoch + 1}",
            )
        if port.epoch != epoch:
            if port.armed not in (0, epoch):
                raise Conflict(
                    f"VM {port.vm} is armed for epoch {port.armed}, not for {epoch}", "disarm the slice first"
                )
            moving.add(port.vm)
    behind = [port for port in network.ports if moving and port.vm not in moving and port.epoch < epoch - 1]
    if behind:
        raise Conflict(
            f"VM {behind[0].vm} is still in epoch {behind[0].epoch}, so no port can move to {epoch}",
            f"recolor every port to {epoch - 1} first",
        )


def check_arm(network: NetworkSlice, ports: Iterable[EdgePort], epoch: int) -> None:
    """Check that ``ports`` may be armed for ``epoch``: the whole slice is in that epoch or in the one before.

    A port that was left armed for the epoch before, and is in it, may be armed for the next.

    :raise Conflict: they may not; the message names a VM.
    """
    for port in network.ports:
        if port.epoch not in (epoch - 1, epoch):
            raise Conflict(
                f"VM {port.vm} is in epoch {port.epoch}, so no port can be armed for {epoch}",
                f"expected {port.epoch + 1}",
            )
    armed = {port.vm for port in ports}
    for port in network.ports:
        left_over = port.vm in armed and port.armed == port.epoch == epoch - 1
        if port.armed not in (0, epoch) and not left_over:
            raise Conflict(f"VM {port.vm} is armed for epoch {port.armed}, not for {epoch}", "disarm the slice first")
        if port.vm in armed and port.epoch == epoch != port.armed:  # its edge has stepped aside: this request is late
            raise Conflict(f"VM {port.vm} is through the cut into {epoch} already", "arm a port before its VM's cut")


def check_disarm(network: NetworkSlice, epoch: int) -> None:
    """Check that a slice may be disarmed: all its ports have reached ``epoch``.

    :raise Conflict: one has not, so frames of ``epoch`` are in its future and must be kept for it; or it is beyond.
    """
    for port in network.ports:
        if port.epoch != epoch:
            raise Conflict(
                f"VM {port.vm} is in epoch {port.epoch}, so the slice cannot be disarmed for {epoch}",
                "recolor every port first",
            )
        if port.armed > epoch:
            raise Conflict(f"VM {port.vm} is armed for epoch {port.armed}", "this request is of an earlier cut")
