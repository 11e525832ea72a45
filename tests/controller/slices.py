"""Slices for tests: drawn at random, or made by hand. VMs of all slices share their MAC addresses."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from geni_violin.controller.rules import default_rules, slice_rules
from geni_violin.core.model import EdgePort, NetworkSlice, SwitchLink

from .software_switch import Frame, SoftwareNetwork, SoftwareSwitch, edge_of

BROADCAST = "ff:ff:ff:ff:ff:ff"
LINK_PORT = 1000
"""Link ports count from here, VMs' ports from 1."""


def mac(index: int) -> str:
    """The MAC address of a slice's VM of that index."""
    return f"52:54:00:00:00:{index:02x}"


def tree_links(parents: Sequence[int]) -> tuple[SwitchLink, ...]:
    """Links of a tree: switch i + 2 hangs on switch ``parents[i]``, which is smaller."""
    return tuple(
        SwitchLink(parent, LINK_PORT + child, child, LINK_PORT + parent) for child, parent in enumerate(parents, 2)
    )


def make_slice(
    name: str, vlan_id: int, homes: Sequence[int], epochs: Sequence[int], parents: Sequence[int], first_port: int = 1
) -> NetworkSlice:
    """A slice whose VM i is on switch ``homes[i]`` in ``epochs[i]``."""
    ports = tuple(
        EdgePort(f"v{index}", home, first_port + index, mac(index), epoch)
        for index, (home, epoch) in enumerate(zip(homes, epochs, strict=True))
    )
    return NetworkSlice(name, vlan_id, ports, tree_links(parents))


def with_epochs(network: NetworkSlice, epochs: Sequence[int]) -> NetworkSlice:
    """The same slice in other epochs."""
    ports = (replace(port, epoch=epoch) for port, epoch in zip(network.ports, epochs, strict=True))
    return replace(network, ports=tuple(ports))


def with_armed(network: NetworkSlice, armed: int, *vms: str) -> NetworkSlice:
    """The same slice with some VMs' ports, or all, armed for an epoch."""
    ports = (replace(port, armed=armed) if port.vm in vms or not vms else port for port in network.ports)
    return replace(network, ports=tuple(ports))


def with_hold_ports(network: NetworkSlice, *vms: str) -> NetworkSlice:
    """The same slice with hold ports for some VMs, or all, that count from 500."""
    ports = (
        replace(port, hold_port_no=500 + port.port_no) if port.vm in vms or not vms else port for port in network.ports
    )
    return replace(network, ports=tuple(ports))


@st.composite
def slices_on_one_tree(draw: st.DrawFn) -> list[NetworkSlice]:
    """One to three slices on the same random tree of switches, each in epochs within one of each other. Any port may be
    armed for the newer of them, or for the next if all are in one; any VM may have a hold port."""
    switches = draw(st.integers(1, 6))
    parents = [draw(st.integers(1, child - 1)) for child in range(2, switches + 1)]
    networks = []
    for index in range(draw(st.integers(1, 3))):
        homes = draw(st.lists(st.integers(1, switches), min_size=1, max_size=5))
        oldest = draw(st.integers(0, 7))
        epochs = [oldest + draw(st.integers(0, 1)) for _ in homes]
        network = make_slice(f"slice{index}", 10 + index, homes, epochs, parents, first_port=1 + 10 * index)
        networks.append(draw(_armed_here_and_there(network)))
    return networks


@st.composite
def _armed_here_and_there(draw: st.DrawFn, network: NetworkSlice) -> NetworkSlice:
    epochs = {port.epoch for port in network.ports}
    armed = max(epochs) if len(epochs) == 2 else max(epochs) + 1
    vms = [port.vm for port in network.ports if draw(st.booleans())]
    held = [port.vm for port in network.ports if draw(st.booleans())]
    network = with_hold_ports(network, *held) if held else network
    return with_armed(network, armed, *vms) if vms else network


def frame_from(network: NetworkSlice, vm: str, destination: str, payload: str = "hello") -> Frame:
    """A frame as a VM sends it."""
    return Frame(destination, payload, eth_src=next(port.mac for port in network.ports if port.vm == vm))


def send(fabric: SoftwareNetwork, network: NetworkSlice, vm: str, destination: str) -> list[tuple[int, int]]:
    """Let a VM send; gives back the edge ports that a copy arrives at, in order."""
    arrived = fabric.send_from(*edge_of(network, vm), frame_from(network, vm, destination))
    return sorted(port for port, _frame in arrived)


def built(networks: Sequence[NetworkSlice]) -> SoftwareNetwork:
    """Switches that have the rules of some slices."""
    links = {link for network in networks for link in network.links}
    dpids = {dpid for link in links for dpid in (link.a_dpid, link.b_dpid)}
    dpids |= {port.dpid for network in networks for port in network.ports}
    fabric = SoftwareNetwork(links)
    for dpid in dpids:
        rules = [rule for network in networks for rule in slice_rules(network, dpid)]
        fabric.switches[dpid] = SoftwareSwitch([*default_rules(), *rules])
    return fabric
