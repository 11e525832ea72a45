"""Armed ports, exact counts, redundant links and whatever guests may send, on real Open vSwitch switches."""

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from geni_violin.core.model import NetworkSlice

from .fabric_harness import (
    PATCHED,
    RING,
    SLICES,
    TOPOLOGIES,
    Host,
    TestNetwork,
    Topology,
    everyone_but,
    mac_of,
    run,
    running_network,
    wait_until,
)
from .raw_frames import BROADCAST, ETHERTYPE, LinkCapture, octets

LINEAR = TOPOLOGIES[1]
MULTICAST = "01:00:5e:00:00:07"
JUMBO_BYTES = 9000


@pytest.fixture(scope="module", params=[LINEAR, PATCHED], ids=["veth", "patch"])
def fabric(request: pytest.FixtureRequest) -> Iterator[TestNetwork]:
    topology: Topology = request.param
    with running_network(topology) as network:
        yield network


@pytest.fixture
def network(fabric: TestNetwork) -> Iterator[TestNetwork]:
    """v1 and v2 on the first switch, v3 on the second, v4 on the third; both slices fresh."""
    for name in SLICES:
        fabric.controller.put(fabric.network(name))
    yield fabric
    fabric.controller.request("PUT", "/v1/slices", ())


@contextlib.contextmanager
def captures(network: TestNetwork, name: str) -> Iterator[dict[str, LinkCapture]]:
    """What each host of a slice gets."""
    seeing = {vm: network.host(name, vm).capture() for vm in network.vms}
    try:
        yield seeing
    finally:
        for capture in seeing.values():
            capture.close()


def vlan_id(network: TestNetwork, name: str) -> int:
    return int(network.controller.request("GET", f"/v1/slices/{name}")["vlan_id"])


# --- armed ports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_armed_ports_get_both_colors_tagged_and_the_others_go_on(network: TestNetwork, epoch: int) -> None:
    """Unicast, broadcast and multicast; near and far; before and after each port's own recolor. v4 is not armed."""
    for step in range(1, epoch):
        network.controller.recolor("red", step)
    network.controller.arm("red", epoch, "v1", "v2", "v3")
    cut: set[str] = set()
    with captures(network, "red") as seeing:
        for vm in ("v1", "v3", "v2", "v4"):
            network.controller.recolor("red", epoch, vm)
            cut.add(vm)
            for sender in network.vms:
                color = (epoch if sender in cut else epoch - 1) % 3
                tags = dict.fromkeys(("v1", "v2", "v3"), (vlan_id(network, "red"), color))
                if sender not in cut or "v4" in cut:
                    tags["v4"] = (0, 0)
                tags.pop(sender, None)
                for destination in (BROADCAST, MULTICAST):
                    assert _tags_seen(network, seeing, sender, destination) == tags
                for receiver in tags:
                    seen = _tags_seen(network, seeing, sender, mac_of(receiver))
                    assert seen == {receiver: tags[receiver]}
        network.controller.disarm("red", epoch)
        untagged = dict.fromkeys(("v2", "v3", "v4"), (0, 0))
        assert _tags_seen(network, seeing, "v1", BROADCAST) == untagged
    blue = network.deliveries(network.host("blue", "v1"), BROADCAST)
    assert blue == dict.fromkeys(everyone_but(network, "blue", ["v1"]), 3), "the other slice takes no part"


def _tags_seen(
    network: TestNetwork, seeing: dict[str, LinkCapture], sender: str, destination: str
) -> dict[str, tuple[int, int]]:
    """Who gets a frame, and with which tag. Broadcast and unicast in turn; each frame comes within milliseconds."""
    network.host("red", sender).send(destination, b"armed")
    deadline = time.monotonic() + 0.02
    seen: dict[str, tuple[int, int]] = {}
    while time.monotonic() < deadline:
        for vm, capture in seeing.items():
            for frame in capture.take(0.002):
                assert vm not in seen, f"{vm} got it twice"
                seen[vm] = (frame.vlan_id, frame.color)
                deadline = time.monotonic() + 0.02
    return seen


def test_controller_is_killed_in_the_middle_of_a_cut(network: TestNetwork) -> None:
    """Told the slice as of before the cut, the new one finds it armed and half recolored, changes no rule, goes on."""
    controller = network.controller
    before = controller.request("GET", "/v1/slices")
    controller.arm("red", 1, *network.vms)
    controller.recolor("red", 1, "v1")
    there, rules = controller.request("GET", "/v1/slices"), network.rules()
    controller.stop()
    try:
        with captures(network, "red") as seeing:
            assert _tags_seen(network, seeing, "v1", mac_of("v4")) == {"v4": (vlan_id_of(there), 1)}
    finally:
        controller.start()
        wait_until("all switches connect again", network.is_connected)
    assert controller.request("PUT", "/v1/slices", before) == {"installed": 2}
    assert network.rules() == rules
    assert controller.request("GET", "/v1/slices") == there
    controller.recolor("red", 1)
    controller.disarm("red", 1)
    assert network.deliveries(network.host("red", "v1"), mac_of("v4")) == {("red", "v4"): 3}


def vlan_id_of(slices: list[dict[str, Any]]) -> int:
    return next(int(entry["vlan_id"]) for entry in slices if entry["name"] == "red")


# --- counts -----------------------------------------------------------------------------------------------------------


def test_counts_are_exact_at_once(network: TestNetwork) -> None:
    """Without a purge or a pause: to a VM near and far, to nobody, to all. A flooded frame counts on each switch."""
    host = network.host("red", "v1")
    frames = {mac_of("v2"): 11, mac_of("v4"): 13, "52:54:77:00:00:00": 17, BROADCAST: 19}
    started = network.controller.colors("red")[0][0]
    for destination, copies in frames.items():
        for _ in range(copies):
            host.send(destination, b"count")
    entered = started + 11 + 13 + 17 + 3 * 19

    def is_counted() -> bool:
        return network.controller.colors("red")[0] == (entered, entered, 0)

    wait_until("the frames are forwarded", is_counted, patience_s=1.0)


def _send_without_end(host: Host, destinations: list[str]) -> None:
    """Some 5,000 frames a second."""
    frames = [octets(d) + octets(mac_of(host.vm)) + ETHERTYPE.to_bytes(2, "big") + bytes(50) for d in destinations]
    while True:
        for frame in frames * 2:
            with contextlib.suppress(BlockingIOError):
                host.socket.send(frame)
        time.sleep(0.001)


@contextlib.contextmanager
def sending(host: Host, destinations: list[str]) -> Iterator[None]:
    """A process that sends all the time."""
    process = multiprocessing.get_context("fork").Process(target=_send_without_end, args=(host, destinations))
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def test_counts_are_exact_while_ports_are_recolored(network: TestNetwork, capsys: pytest.CaptureFixture[str]) -> None:
    """Under load every frame is counted with the color that it really had, where it enters and on every link.

    The receivers' ports are armed all the time, so the tags on what they get tell the colors. By Open vSwitch's rule
    statistics thousands were counted wrong: that is why meters count (controller/meters.py).
    """
    controller, seen = network.controller, [0, 0, 0]
    before = [entered for entered, _ended, _alive in controller.colors("red")]
    receivers = ["v2", "v3", "v4"]
    with captures(network, "red") as seeing:

        def look(quiet_s: float = 0.0) -> None:
            for vm in receivers:
                for frame in seeing[vm].take(quiet_s):
                    assert frame.vlan_id, "an armed port gets its frames tagged"
                    seen[frame.color] += 1

        controller.arm("red", 1, *network.vms)
        with sending(network.host("red", "v1"), [mac_of(vm) for vm in receivers]):
            for epoch in range(1, 9):
                controller.arm("red", epoch, *network.vms)
                for vm in network.vms:
                    for _ in range(10):
                        look()
                        time.sleep(0.002)
                    controller.recolor("red", epoch, vm)
        look(0.1)
        assert [seeing[vm].overlooked() for vm in receivers] == [0, 0, 0]
    colors = controller.colors("red")
    assert [alive for _entered, _ended, alive in colors] == [0, 0, 0]
    assert [entered - was for (entered, _ended, _alive), was in zip(colors, before, strict=True)] == seen
    assert min(seen) > 100, "not enough was sent"
    with capsys.disabled():
        sys.stdout.write(f"\nframes in 8 cuts under load, by color: {seen}, all counted")


def test_foreign_source_is_counted_and_dropped_unless_allowed(network: TestNetwork) -> None:
    host = network.host("red", "v1")
    with captures(network, "red") as seeing:
        for _ in range(5):
            host.send(mac_of("v2"), b"foreign", source="52:54:66:00:00:01")
        assert seeing["v2"].take(0.1) == []
        wait_until("Open vSwitch has counted", lambda: network.controller.counters("red")["v1"]["frames_foreign"] == 5)
        assert network.controller.counters("red")["v2"]["frames_foreign"] == 0
        red = network.network("red")
        free = tuple(replace(port, any_source=port.vm == "v1") for port in red.ports)
        network.controller.put(replace(red, ports=free))
        host.send(mac_of("v2"), b"foreign", source="52:54:66:00:00:01")
        assert len(seeing["v2"].take(0.1)) == 1


# --- what guests may send ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_tags", [1, 2])
@pytest.mark.parametrize("destination", ["v2", "v4", "all"])
def test_tags_of_the_guests_own_arrive_as_they_were(network: TestNetwork, own_tags: int, destination: str) -> None:
    """802.1Q in 802.1Q, also with the VLAN ID and the color of the other slice in it."""
    tag = b"\x81\x00" + (2 << 13 | vlan_id(network, "blue")).to_bytes(2, "big")
    target = BROADCAST if destination == "all" else mac_of(destination)
    network.controller.recolor("blue", 1)
    with captures(network, "red") as red, captures(network, "blue") as blue:
        network.host("red", "v1").send(target, b"tagged", tags=tag * own_tags)
        receivers = [vm for vm in ("v2", "v3", "v4") if destination in (vm, "all")]
        for vm in network.vms:
            seen = red[vm].take(0.03)
            assert [(f.vlan_id, f.color) for f in seen] == [(vlan_id(network, "blue"), 2)] * (vm in receivers)
            inner = tag[2:] * (own_tags - 1) + ETHERTYPE.to_bytes(2, "big") * (own_tags > 1)
            assert all(b"tagged" in f.payload and f.payload.startswith(inner[:2]) for f in seen)
            assert blue[vm].take(0.0) == []


def test_jumbo_frames(network: TestNetwork) -> None:
    """9,000 bytes and a tag of the guest's own, over two links."""
    _set_mtu(network, JUMBO_BYTES + 8)
    payload = bytes(range(256)) * (JUMBO_BYTES // 256)
    tag = b"\x81\x00\x00\x05"
    with captures(network, "red") as seeing:
        network.host("red", "v1").send(mac_of("v4"), payload.ljust(JUMBO_BYTES, b"x"), tags=tag)
        seen = seeing["v4"].take(0.1)
    assert [(f.vlan_id, f.payload) for f in seen] == [(5, payload.ljust(JUMBO_BYTES, b"x"))]


def _set_mtu(network: TestNetwork, mtu_bytes: int) -> None:
    """Of hosts and switch ports. A patch port is no interface of the machine, and carries any frame."""
    for host in network.hosts.values():
        host.node.cmd(f"ip link set dev {host.node.defaultIntf()} mtu {mtu_bytes}")
    here = {interface.name for interface in Path("/sys/class/net").iterdir()}
    for number in network.topology.switches:
        for interface in here & set(network.switch(number).intfNames()) - {"lo"}:
            run("ip", "link", "set", "dev", interface, "mtu", str(mtu_bytes))


# --- redundant links --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ring() -> Iterator[TestNetwork]:
    with running_network(RING) as network:
        yield network


def tree_of(network: TestNetwork) -> list[dict[str, int]]:
    tree: list[dict[str, int]] = network.controller.request("GET", "/v1/slices/red")["tree"]
    return tree


def _set_link(network: TestNetwork, a: int, b: int, state: str) -> None:
    run("ip", "link", "set", "dev", network.link_interface(a, b), state)


def _floods_arrive(network: TestNetwork) -> bool:
    for vm in network.vms:
        if network.deliveries(network.host("red", vm), BROADCAST) != dict.fromkeys(
            everyone_but(network, "red", [vm]), 3
        ):
            return False
    return True


def test_a_ring_makes_no_loop_and_goes_round_what_is_down(ring: TestNetwork) -> None:
    ring.controller.put(ring.network("red"))
    assert len(tree_of(ring)) == 2
    assert _floods_arrive(ring)
    for a, b in RING.links:
        _set_link(ring, a, b, "down")
        wait_until(f"the tree goes round {a}-{b}", lambda: _floods_arrive(ring), patience_s=5.0)
        assert len(tree_of(ring)) == 2
        _set_link(ring, a, b, "up")


def test_traffic_goes_on_inside_the_parts_and_joins_again(ring: TestNetwork) -> None:
    red: NetworkSlice = ring.network("red")
    ring.controller.put(red)
    for a, b in ((1, 3), (2, 3)):
        _set_link(ring, a, b, "down")

    def parts() -> list[list[int]]:
        answer: list[list[int]] = ring.controller.request("GET", "/v1/slices/red")["parts"]
        return answer

    wait_until("it is told", lambda: parts() == [[ring.dpid(1), ring.dpid(2)], [ring.dpid(3)]], patience_s=5.0)
    assert ring.deliveries(ring.host("red", "v1"), BROADCAST) == {("red", "v2"): 3}
    ring.controller.put(red)
    assert len(parts()) == 2, "to be told the slice again changes nothing"
    for a, b in ((1, 3), (2, 3)):
        _set_link(ring, a, b, "up")
    wait_until("they are joined", lambda: len(parts()) == 1 and _floods_arrive(ring), patience_s=5.0)


def test_port_that_is_deleted_and_one_that_never_was(ring: TestNetwork) -> None:
    red = ring.network("red")
    ring.controller.put(red)
    bad = replace(red, ports=(replace(red.ports[0], port_no=99), *red.ports[1:]))
    problem = ring.controller.request("PUT", "/v1/slices/red", bad, status=404)
    assert "has no port 99" in problem["detail"]
    interface = ring.link_interface(1, 2)
    run("ovs-vsctl", "del-port", interface)
    wait_until("the tree goes round it", lambda: _floods_arrive(ring), patience_s=5.0)
    ring.controller.put(red)
