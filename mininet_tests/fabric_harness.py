"""A network of real Open vSwitch switches under the real controller, with hosts that send and see single frames.

Theory of operation. Mininet makes the bridges (userspace datapath), veth pairs and network namespaces. The test
process holds a raw socket in each host's namespace, opened there by entering it for a moment (setns(2)), so that a
frame is sent and seen without starting a program. Every name begins with ``gvt``, by which leftovers are found.
"""

import asyncio
import contextlib
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from mininet.link import OVSLink
from mininet.net import Mininet
from mininet.node import OVSSwitch, RemoteController

from geni_violin.core.messages import ArmRequest, DisarmRequest, RecolorRequest
from geni_violin.core.model import EdgePort, NetworkSlice, SwitchLink
from geni_violin.runtime.openvswitch import forget_cached_flows
from geni_violin.runtime.wire import encode

from .raw_frames import ETHERTYPE, MAX_FRAME_BYTES, LinkCapture, network_namespace, octets, raw_socket

PREFIX = "gvt"
_OVS_CTL = "/usr/share/openvswitch/scripts/ovs-ctl"


@dataclass(frozen=True)
class Topology:
    """Switches by number, the links between them, and at which switch each host of a slice is."""

    name: str
    switches: tuple[int, ...]
    links: tuple[tuple[int, int], ...]
    homes: tuple[int, ...]
    are_patched: bool = False
    """Links are patch ports, within Open vSwitch, instead of veth pairs."""


TOPOLOGIES = (
    Topology("single", (1,), (), (1, 1, 1)),
    Topology("linear", (1, 2, 3), ((1, 2), (2, 3)), (1, 1, 2, 3)),
    Topology("star", (1, 2, 3, 4), ((1, 2), (1, 3), (1, 4)), (2, 2, 3, 4)),
    Topology("tree", (1, 2, 3, 4, 5), ((1, 2), (1, 3), (3, 4), (3, 5)), (1, 2, 4, 5)),
)
RING = Topology("ring", (1, 2, 3), ((1, 2), (2, 3), (1, 3)), (1, 2, 3))
PATCHED = Topology("patched", (1, 2, 3), ((1, 2), (2, 3)), (1, 1, 2, 3), are_patched=True)
SLICES = ("red", "blue")
VMS = ("v1", "v2", "v3", "v4")


def mac_of(vm: str) -> str:
    """The MAC address of a VM: the same in every slice."""
    return f"52:54:00:00:00:{int(vm[1:]):02x}"


def address_of(vm: str) -> str:
    """The IP address of a VM: the same in every slice."""
    return f"10.9.0.{int(vm[1:])}"


# --- programs ---------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> str:
    """Run a program that must succeed; gives back what it printed."""
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60).stdout


def require_open_vswitch() -> None:
    """Start Open vSwitch unless it runs. It is left running."""
    if subprocess.run(["ovs-vsctl", "-t", "3", "show"], capture_output=True, check=False).returncode != 0:
        subprocess.run([_OVS_CTL, "start", "--system-id=random"], check=True, capture_output=True)


def free_port() -> int:
    """A TCP port on loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(what: str, is_true: Any, patience_s: float = 60.0) -> None:
    """Wait for a condition; failing is an assertion that says what did not happen."""
    deadline = time.monotonic() + patience_s
    while not is_true():
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        time.sleep(0.02)


class ControllerProcess:
    """``ryu-manager geni_violin.controller`` on loopback, and a client of its REST interface."""

    def __init__(self) -> None:
        self.openflow_port, self.rest_port = free_port(), free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.rest_port}", timeout=30.0, trust_env=False)
        self.log = tempfile.NamedTemporaryFile(prefix="gvt-controller-", suffix=".log")  # noqa: SIM115 (until stop)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        program = Path(sys.executable).with_name("ryu-manager")
        listen = ["--ofp-listen-host", "127.0.0.1", "--ofp-tcp-listen-port", str(self.openflow_port)]
        listen += ["--wsapi-host", "127.0.0.1", "--wsapi-port", str(self.rest_port)]
        self._process = subprocess.Popen(
            [program, *listen, "geni_violin.controller"], stdout=self.log, stderr=subprocess.STDOUT
        )
        wait_until("the controller answers", self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the controller has ended: {Path(self.log.name).read_text()}"
        try:
            return self.client.get("/healthz").is_success
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def request(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        """Send a request that must be answered with ``status``; gives back the answer's body."""
        response = self.client.request(method, path, json=None if body is None else encode(body))
        assert response.status_code == status, response.text
        return response.json()

    def request_and_forget(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request that changes rules, and have Open vSwitch forget the old ones, as a host agent does."""
        answer = self.request(method, path, body)
        asyncio.run(forget_cached_flows(timeout_s=20))
        return answer

    def put(self, network: NetworkSlice) -> None:
        """Install a slice."""
        self.request_and_forget("PUT", f"/v1/slices/{network.name}", network)

    def recolor(self, name: str, epoch: int, *vms: str, forget: bool = True) -> Any:
        """Move some ports on, or all if none is named."""
        send = self.request_and_forget if forget else self.request
        return send("POST", f"/v1/slices/{name}/recolor", RecolorRequest(epoch, vms or None))

    def arm(self, name: str, epoch: int, *vms: str) -> Any:
        """Arm some ports."""
        return self.request_and_forget("POST", f"/v1/slices/{name}/arm", ArmRequest(epoch, vms))

    def disarm(self, name: str, epoch: int) -> Any:
        """Disarm a slice."""
        return self.request_and_forget("POST", f"/v1/slices/{name}/disarm", DisarmRequest(epoch))

    def colors(self, name: str) -> list[tuple[int, int, int]]:
        """By color: frames that entered, that ended, and that are alive."""
        counters = self.request("GET", f"/v1/slices/{name}/colors")
        assert [counter["color"] for counter in counters] == [0, 1, 2]
        return [(counter["entered"], counter["ended"], counter["alive"]) for counter in counters]

    def counters(self, name: str) -> dict[str, dict[str, int]]:
        """Counters by VM."""
        return {entry["vm"]: entry for entry in self.request("GET", f"/v1/slices/{name}/counters")}

    def switches(self) -> set[int]:
        """The connected switches."""
        return set(self.request("GET", "/healthz")["switches"])


# --- the network ------------------------------------------------------------------------------------------------------


class _OutsideController(RemoteController):  # type: ignore[misc]
    def checkListening(self) -> None:
        """It is known to listen; Mininet would need telnet to find out."""


class Host:
    """A host of a slice: Mininet's node and a raw socket in its namespace."""

    def __init__(self, node: Any, slice_name: str, vm: str) -> None:
        self.node, self.slice_name, self.vm = node, slice_name, vm
        interface = node.defaultIntf()
        node.cmd(f"ethtool -K {interface} tx off")
        # Its own multicasts would be counted with the tests' frames.
        node.cmd("sysctl -w net.ipv6.conf.all.disable_ipv6=1")
        with network_namespace(node.pid):
            self.socket = raw_socket(str(interface))

    def send(self, destination: str, payload: bytes, tags: bytes = b"", source: str = "") -> None:
        """Send one frame. ``tags`` are the guest's own, as on the wire."""
        header = octets(destination) + octets(source or mac_of(self.vm)) + tags + ETHERTYPE.to_bytes(2, "big")
        self.socket.send((header + payload).ljust(60, b"\0"))

    def ping(self, vm: str) -> subprocess.Popen[str]:
        """Three pings in a row, under way; what is printed tells of their fate."""
        command = ["ping", "-n", "-c", "3", "-i", "0.01", "-W", "2", address_of(vm)]
        process: subprocess.Popen[str] = self.node.popen(command, text=True)
        return process

    def capture(self) -> LinkCapture:
        """Sees what the host gets, tags included."""
        with network_namespace(self.node.pid):
            return LinkCapture(str(self.node.defaultIntf()))


def is_answered(ping: subprocess.Popen[str]) -> bool:
    """Whether all pings were answered; waits for their end."""
    return " 0% packet loss" in ping.communicate(timeout=30)[0]


class TestNetwork:
    """Switches, links and the hosts of two slices, all under one controller."""

    __test__ = False
    __markers = iter(range(1, 1 << 60))

    def __init__(self, topology: Topology, controller: ControllerProcess) -> None:
        self.topology, self.controller = topology, controller
        self.vms = VMS[: len(topology.homes)]
        self.hosts: dict[tuple[str, str], Host] = {}
        self._net = Mininet(controller=None, build=False)
        self._vlan_ids = iter(range(101, 4095))

    def start(self) -> None:
        """Build everything and wait until all switches are connected."""
        outside = _OutsideController(f"{PREFIX}c", ip="127.0.0.1", port=self.controller.openflow_port)
        self._net.addController(outside)
        for number in self.topology.switches:
            self._net.addSwitch(
                f"{PREFIX}{number}",
                cls=OVSSwitch,
                dpid=f"{self.dpid(number):016x}",
                datapath="user",
                protocols="OpenFlow13",
                failMode="secure",
            )
        for a, b in self.topology.links:
            kind = {"cls": OVSLink} if self.topology.are_patched else {}
            self._net.addLink(f"{PREFIX}{a}", f"{PREFIX}{b}", **kind)
        nodes = {name: self._add_host(*name) for name in self._host_names()}
        self._net.build()
        self._net.start()
        for switch in self._net.switches:
            for interface in switch.intfNames():
                switch.cmd(f"ethtool -K {interface} tx off")
        self.hosts = {name: Host(node, *name) for name, node in nodes.items()}
        wait_until("all switches connect", self.is_connected)

    def _host_names(self) -> list[tuple[str, str]]:
        return [(slice_name, vm) for slice_name in SLICES for vm in self.vms]

    def _add_host(self, slice_name: str, vm: str) -> Any:
        home = self.topology.homes[self.vms.index(vm)]
        node = self._net.addHost(f"{PREFIX}{slice_name[0]}{vm}", ip=f"{address_of(vm)}/24", mac=mac_of(vm))
        self._net.addLink(f"{PREFIX}{home}", node)
        return node

    def stop(self) -> None:
        """Take everything down."""
        for host in self.hosts.values():
            host.socket.close()
        self._net.stop()

    def forget_neighbors(self) -> None:
        """Let no host ask again, seconds later and in another test, whether an address still answers (ARP)."""
        for host in self.hosts.values():
            host.node.cmd("ip neigh flush all")

    def dpid(self, number: int) -> int:
        """The datapath id of a switch."""
        return 0x67767400 + number

    def is_connected(self) -> bool:
        """Whether the controller has all switches."""
        return self.controller.switches() == {self.dpid(number) for number in self.topology.switches}

    def switch(self, number: int) -> Any:
        """Mininet's switch."""
        return self._net.get(f"{PREFIX}{number}")

    def port_no(self, number: int, peer: str) -> int:
        """The OpenFlow port of a switch that leads to a node."""
        switch, node = self.switch(number), self._net.get(peer)
        return int(switch.ports[switch.connectionsTo(node)[0][0]])

    def link_interface(self, number: int, peer: int) -> str:
        """The name of the interface of a switch that leads to another."""
        return str(self.switch(number).connectionsTo(self.switch(peer))[0][0])

    def network(self, slice_name: str, epochs: dict[str, int] | None = None, vlan_id: int = 0) -> NetworkSlice:
        """A slice over all of the topology, with a VLAN ID that was not used before."""
        ports = tuple(
            EdgePort(
                vm,
                self.dpid(home),
                self.port_no(home, f"{PREFIX}{slice_name[0]}{vm}"),
                mac_of(vm),
                (epochs or {}).get(vm, 0),
            )
            for vm, home in zip(self.vms, self.topology.homes, strict=True)
        )
        links = tuple(
            SwitchLink(self.dpid(a), self.port_no(a, f"{PREFIX}{b}"), self.dpid(b), self.port_no(b, f"{PREFIX}{a}"))
            for a, b in self.topology.links
        )
        return NetworkSlice(slice_name, vlan_id or next(self._vlan_ids), ports, links)

    def host(self, slice_name: str, vm: str) -> Host:
        """A host."""
        return self.hosts[slice_name, vm]

    def deliveries(self, sender: Host, destination: str, copies: int = 3) -> dict[tuple[str, str], int]:
        """Send the same frame some times; how many copies each host gets."""
        marker = next(self.__markers).to_bytes(8, "big")
        for _ in range(copies):
            sender.send(destination, marker)
        return dict(self._collect(marker))

    def deliveries_on_link(self, near: int, far: int, destination: str, tag: bytes) -> dict[tuple[str, str], int]:
        """Put three copies of a tagged frame on a link, towards switch ``far``; how many each host gets."""
        marker = next(self.__markers).to_bytes(8, "big")
        frame = octets(destination) + octets(mac_of("v9")) + tag + ETHERTYPE.to_bytes(2, "big") + marker
        with raw_socket(self.link_interface(near, far)) as raw:
            for _ in range(3):
                raw.send(frame.ljust(64, b"\0"))
            return dict(self._collect(marker))

    def rules(self) -> dict[int, list[str]]:
        """By switch, its rules without their counters, as Open vSwitch's own tool lists them."""
        listed = {}
        for number in self.topology.switches:
            text = run("ovs-ofctl", "-O", "OpenFlow13", "--no-stats", "dump-flows", f"{PREFIX}{number}")
            listed[number] = sorted(line.strip() for line in text.splitlines()[1:])
        return listed

    def _collect(self, marker: bytes, patience_s: float = 0.15, quiet_s: float = 0.06) -> Counter[tuple[str, str]]:
        """All copies until none has come for a while: longer before the first than after it."""
        got: Counter[tuple[str, str]] = Counter()
        by_socket = {host.socket: name for name, host in self.hosts.items()}
        while ready := select.select(list(by_socket), [], [], quiet_s if got else patience_s)[0]:
            for raw in ready:
                if raw.recv(MAX_FRAME_BYTES)[14:22] == marker:
                    got[by_socket[raw]] += 1
        return got


def remove_leftovers() -> None:
    """Delete what an earlier run of these tests may have left."""
    names = re.compile(rf"{PREFIX}(c|[0-9]+|[rb]v[0-9]+)(-eth[0-9]+)?$")
    for bridge in run("ovs-vsctl", "list-br").split():
        if names.match(bridge):
            run("ovs-vsctl", "--if-exists", "del-br", bridge)
    for interface in Path("/sys/class/net").iterdir():
        if names.match(interface.name):
            subprocess.run(["ip", "link", "delete", interface.name], check=False, capture_output=True)


@contextlib.contextmanager
def running_network(topology: Topology) -> Iterator[TestNetwork]:
    """A network and its controller, and nothing of them afterwards."""
    require_open_vswitch()
    remove_leftovers()
    controller = ControllerProcess()
    network = TestNetwork(topology, controller)
    try:
        controller.start()
        network.start()
        yield network
    finally:
        try:
            network.stop()
        finally:
            controller.stop()
            controller.client.close()
            controller.log.close()
            remove_leftovers()


def everyone_but(network: TestNetwork, slice_name: str, vms: Iterable[str]) -> set[tuple[str, str]]:
    """The hosts of a slice except some."""
    return {(slice_name, vm) for vm in network.vms} - {(slice_name, vm) for vm in vms}
