"""A small real network for benchmarks: Open vSwitch bridges under the real controller, a namespace for each VM's place.

Theory of operation. A *station* is what stands in a VM's place: a network namespace with one end of a veth pair, whose
other end is a port of a bridge. All bridges have the userspace datapath, as the slices' have, and are joined to a chain
by patch ports. Programs run in a station by ``ip netns exec``. What a station sent and got is read from its interface
at the bridge, without entering the namespace. Every name begins with ``gvb``, by which leftovers are found.
"""

import asyncio
import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from geni_violin.cli.machine import start_openvswitch
from geni_violin.core.model import EdgePort, NetworkSlice, SwitchLink
from geni_violin.runtime.openvswitch import forget_cached_flows
from mininet_tests.fabric_harness import ControllerProcess, wait_until

PREFIX = "gvb"
INNER_INTERFACE = "eth0"
FIRST_DPID = 0x67766200
TOWARDS_FIRST, TOWARDS_LAST = 1, 2
FIRST_STATION_PORT = 10
READY = "ready"
"""What a program in a station prints first, once it listens or sends."""
LOCK = Path("/run/geni-violin-bench.lock")
_NAMES = re.compile(rf"{PREFIX}[0-9]+(-[0-9]+)?$")


@dataclass(frozen=True)
class Station:
    """What stands in the place of VM ``number`` (from 1), at bridge ``home`` (from 0)."""

    number: int
    home: int

    @property
    def vm(self) -> str:
        """The VM's name."""
        return f"v{self.number}"

    @property
    def name(self) -> str:
        """The name of its namespace, and of its interface at the bridge."""
        return f"{PREFIX}{self.number}"

    @property
    def address(self) -> str:
        """Its IP address."""
        return f"10.98.0.{self.number}"

    @property
    def mac(self) -> str:
        """Its MAC address."""
        return f"52:54:00:98:00:{self.number:02x}"

    @property
    def port_no(self) -> int:
        """Its OpenFlow port."""
        return FIRST_STATION_PORT + self.number

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs a program in the namespace."""
        return ["ip", "netns", "exec", self.name, *arguments]

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A Python module of this project that runs in the namespace until the block ends, from when it says so.

        :raise SystemExit: it ends instead; what it said is on stderr.
        """
        program = self.command(sys.executable, "-u", "-m", *arguments)
        process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            if process.stdout.readline() != READY + "\n":
                raise SystemExit(f"{' '.join(arguments)} did not start in {self.name}")
            yield process
        finally:
            process.terminate()
            process.communicate()

    def counted(self, what: str) -> int:
        """One of the interface's statistics at the bridge: rx_* is what the station sent, tx_* what it got."""
        return int(Path(f"/sys/class/net/{self.name}/statistics/{what}").read_text())

    def segments_sent_again(self) -> int:
        """What its TCP has sent a second time, so far (RetransSegs, RFC 4022)."""
        lines = run(*self.command("cat", "/proc/net/snmp")).splitlines()
        names, values = (line.split() for line in lines if line.startswith("Tcp:"))
        return int(dict(zip(names, values, strict=True))["RetransSegs"])


class Lab:
    """The network, once it is built, and its controller."""

    def __init__(self, controller: ControllerProcess, homes: Sequence[int]) -> None:
        self.controller = controller
        self.bridges = max(homes) + 1
        self.stations = tuple(Station(number, home) for number, home in enumerate(homes, 1))

    def build(self) -> None:
        """Make everything and wait until the switches are connected."""
        for number in range(self.bridges):
            self._add_bridge(number)
        for near in range(self.bridges - 1):
            _add_patch(near, TOWARDS_LAST, near + 1, TOWARDS_FIRST)
        for station in self.stations:
            _add_station(station)
            for peer in self.stations:
                if peer is not station:
                    neighbor = ["ip", "neigh", "replace", peer.address, "lladdr", peer.mac, "dev", INNER_INTERFACE]
                    run(*station.command(*neighbor))
        wait_until("the switches connect", lambda: len(self.controller.switches()) == self.bridges)

    def network(self, vlan_id: int) -> NetworkSlice:
        """A slice of all stations, in epoch 0."""
        ports = tuple(EdgePort(one.vm, FIRST_DPID + one.home, one.port_no, one.mac, 0) for one in self.stations)
        links = tuple(
            SwitchLink(FIRST_DPID + near, TOWARDS_LAST, FIRST_DPID + near + 1, TOWARDS_FIRST)
            for near in range(self.bridges - 1)
        )
        return NetworkSlice("bench", vlan_id, ports, links)

    def _add_bridge(self, number: int) -> None:
        bridge = bridge_name(number)
        settings = [f"other-config:datapath-id={FIRST_DPID + number:016x}", "datapath_type=netdev", "fail_mode=secure"]
        target = f"tcp:127.0.0.1:{self.controller.openflow_port}"
        make = ["add-br", bridge, "--", "set", "bridge", bridge, *settings, "protocols=OpenFlow13"]
        run("ovs-vsctl", *make, "--", "set-controller", bridge, target)


def bridge_name(number: int) -> str:
    """The name of a bridge. (Stations have numbers below 100.)"""
    return f"{PREFIX}{100 + number}"


def _add_patch(near: int, near_port: int, far: int, far_port: int) -> None:
    ends = ((near, near_port, far), (far, far_port, near))
    for here, port_no, there in ends:
        name, peer = f"{bridge_name(here)}-{there}", f"{bridge_name(there)}-{here}"
        settings = ["type=patch", f"options:peer={peer}", f"ofport_request={port_no}"]
        run("ovs-vsctl", "add-port", bridge_name(here), name, "--", "set", "interface", name, *settings)


def _add_station(station: Station) -> None:
    """Without checksum offload on either side: the userspace datapath would hand on checksums that nobody filled in."""
    outer, bridge = station.name, bridge_name(station.home)
    run("ip", "netns", "add", station.name)
    inner = ["peer", "name", INNER_INTERFACE, "address", station.mac, "netns", station.name]
    run("ip", "link", "add", outer, "type", "veth", *inner)
    run("ethtool", "-K", outer, "tx", "off")
    run(*station.command("ethtool", "-K", INNER_INTERFACE, "tx", "off"))
    run("ip", "link", "set", outer, "up")
    run(*station.command("ip", "address", "add", f"{station.address}/24", "dev", INNER_INTERFACE))
    run(*station.command("ip", "link", "set", INNER_INTERFACE, "up"))
    request = f"ofport_request={station.port_no}"
    run("ovs-vsctl", "add-port", bridge, outer, "--", "set", "interface", outer, request)


def run(*arguments: str) -> str:
    """Run a program that must succeed; gives back what it printed.

    :raise SystemExit: it fails; with what it said.
    """
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def forget_flows() -> None:
    """Have Open vSwitch forget its cached flows, as a host agent does after a recolor."""
    asyncio.run(forget_cached_flows(timeout_s=20))


def remove_leftovers() -> None:
    """Delete bridges, interfaces and namespaces of this or an earlier run."""
    for bridge in run("ovs-vsctl", "list-br").split():
        if _NAMES.match(bridge):
            run("ovs-vsctl", "--if-exists", "del-br", bridge)
    for interface in [path.name for path in Path("/sys/class/net").iterdir()]:
        if _NAMES.match(interface):
            subprocess.run(["ip", "link", "delete", interface], check=False, capture_output=True)
    for namespace in json.loads(run("ip", "-json", "netns", "list") or "[]"):
        if _NAMES.match(namespace["name"]):
            run("ip", "netns", "delete", namespace["name"])


@contextmanager
def running_lab(homes: Sequence[int]) -> Iterator[Lab]:
    """A network with a station at each of these bridges, and nothing of it afterwards. Needs root.

    :raise SystemExit: another benchmark has one.
    """
    with _only_one():
        start_openvswitch()
        remove_leftovers()
        controller = ControllerProcess()
        try:
            controller.start()
            lab = Lab(controller, homes)
            lab.build()
            yield lab
        finally:
            controller.stop()
            controller.client.close()
            controller.log.close()
            remove_leftovers()


@contextmanager
def _only_one() -> Iterator[None]:
    """Two at a time would remove each other's bridges, and measure one another."""
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit("another benchmark of the network runs on this machine; wait for its end") from None
        yield
