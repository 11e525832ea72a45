"""Real Open vSwitch and TAP devices: made, found, cleaned up, and nothing left when a step fails. Needs root."""

import asyncio
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from geni_violin.core.errors import MachineFault
from geni_violin.hostagent import names, ovs, ports
from geni_violin.hostagent.cleanup import clean_up
from geni_violin.hostagent.ovs import OpenVSwitch
from geni_violin.runtime.settings import Settings

CONTROLLER = "tcp:127.0.0.1:1"  # nobody listens there
Scenario = Callable[[OpenVSwitch, str], Awaitable[None]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path)


@pytest.fixture
def play(settings: Settings) -> Iterator[Callable[[Scenario], None]]:
    """Plays a scenario with the switches of an installation of its own, which is cleaned up afterwards."""

    async def on_own(scenario: Scenario) -> None:
        await ovs.ensure_running()
        try:
            await scenario(OpenVSwitch(settings.installation_id), settings.installation_id)
        finally:
            await clean_up(settings)

    yield lambda scenario: asyncio.run(on_own(scenario))


def column(table: str, record: str, name: str) -> str:
    """One value in Open vSwitch's database."""
    command = ["ovs-vsctl", "--timeout=5", "get", table, record, name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().strip('"')


def has_ipv6(interface: str) -> bool:
    """Whether the host may send IPv6 frames of its own out of an interface."""
    switch = Path(f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6")
    return switch.exists() and switch.read_text().strip() != "1"


def mtu_of(interface: str) -> int:
    """What the kernel says."""
    return int(Path(f"/sys/class/net/{interface}/mtu").read_text())


def test_a_switch_is_what_the_controller_needs(play: Callable[[Scenario], None]) -> None:
    async def scenario(switches: OpenVSwitch, own: str) -> None:
        bridge, dpid = names.bridge_name(own, "h1", "s1"), names.datapath_id(own, "h1", "s1")
        for _ in range(2):
            await switches.ensure_switch(bridge, dpid, CONTROLLER)
            assert column("Bridge", bridge, "datapath_id") == f"{dpid:016x}"
            assert column("Bridge", bridge, "fail_mode") == "secure"
            assert column("Bridge", bridge, "protocols") == "[OpenFlow13]"
            assert column("Bridge", bridge, "datapath_type") == "netdev"
            assert column("Controller", bridge, "target") == CONTROLLER
        assert await switches.switches() == [bridge]
        await switches.delete_switch(bridge)
        await switches.delete_switch(bridge)
        assert await switches.switches() == []

    play(scenario)


def test_a_port_is_plugged_and_unplugged(play: Callable[[Scenario], None]) -> None:
    async def scenario(switches: OpenVSwitch, own: str) -> None:
        bridge, tap = names.bridge_name(own, "h1", "s1"), names.tap_name(own, "a", "n1")
        await switches.ensure_switch(bridge, 1 << 48, CONTROLLER)
        port = await ports.plug(switches, bridge, tap)
        assert port.port_no > 0
        assert await ports.plug(switches, bridge, tap) == port
        assert await switches.ports(bridge) == [tap]
        assert not has_ipv6(tap)
        assert ports.taps_of(own) == [tap]
        for _ in range(2):
            await ports.unplug(switches, bridge, tap)
            assert (await switches.ports(bridge), ports.taps_of(own)) == ([], [])

    play(scenario)


def test_a_step_that_fails_leaves_nothing(play: Callable[[Scenario], None]) -> None:
    async def scenario(switches: OpenVSwitch, own: str) -> None:
        bridge = names.bridge_name(own, "h1", "s1")
        with pytest.raises(MachineFault, match=f"no bridge named {bridge}"):
            await ports.plug(switches, bridge, names.tap_name(own, "a", "n1"))
        assert ports.taps_of(own) == []
        await switches.ensure_switch(bridge, 1 << 48, CONTROLLER)
        with pytest.raises(MachineFault, match=r"cannot use nosuchdevice .*No such device"):
            await switches.add_port(bridge, "nosuchdevice")
        assert await switches.ports(bridge) == []

    play(scenario)


def test_each_end_of_a_link_is_made_by_itself(play: Callable[[Scenario], None]) -> None:
    async def scenario(switches: OpenVSwitch, own: str) -> None:
        one, other = (names.bridge_name(own, "h1", switch) for switch in ("s1", "s2"))
        await switches.ensure_switch(one, 1 << 48, CONTROLLER)
        number = await switches.ensure_link(one, other)
        await switches.ensure_switch(other, 2 << 48, CONTROLLER)
        await switches.ensure_link(other, one)
        assert await switches.ensure_link(one, other) == number
        for bridge in (one, other):
            (port,) = await switches.ports(bridge)
            assert column("Interface", port, "error") == "[]"
        await switches.delete_link(one, other)
        await switches.delete_link(one, other)
        assert (await switches.ports(one), len(await switches.ports(other))) == ([], 1)

    play(scenario)


def test_two_links_between_the_same_switches_are_two(play: Callable[[Scenario], None]) -> None:
    async def scenario(switches: OpenVSwitch, own: str) -> None:
        one, other = (names.bridge_name(own, "h1", switch) for switch in ("s1", "s2"))
        for bridge, dpid in ((one, 1 << 48), (other, 2 << 48)):
            await switches.ensure_switch(bridge, dpid, CONTROLLER)
        numbers = [await switches.ensure_link(one, other, number) for number in (0, 1)]
        for number in (0, 1):
            await switches.ensure_link(other, one, number)
        assert len(set(numbers)) == 2
        ends = {end: column("Interface", end, "options:peer") for end in await switches.ports(one)}
        assert set(ends.values()) == set(await switches.ports(other))
        assert all(column("Interface", far, "options:peer") == end for end, far in ends.items())
        await switches.delete_link(one, other, 0)
        assert await switches.ports(one) == [names.patch_name(own, one, other, 1)]

    play(scenario)


def test_ports_carry_jumbo_frames_also_after_the_switch_took_them(play: Callable[[Scenario], None]) -> None:
    async def scenario(switches: OpenVSwitch, own: str) -> None:
        bridge, tap = names.bridge_name(own, "h1", "s1"), names.tap_name(own, "a", "n1")
        await switches.ensure_switch(bridge, 1 << 48, CONTROLLER)
        await ports.plug(switches, bridge, tap)
        for mtu in (mtu_of(tap), int(column("Interface", tap, "mtu"))):
            assert mtu >= ports.JUMBO_BYTES + 8, "the slice's tag and one of the guest's own"

    play(scenario)


def test_clean_up_takes_its_own_and_nothing_else(play: Callable[[Scenario], None], tmp_path: Path) -> None:
    async def scenario(switches: OpenVSwitch, own: str) -> None:
        foreign = Settings(state_dir=tmp_path / "foreign")
        others = OpenVSwitch(foreign.installation_id)
        try:
            for installation, control in ((own, switches), (foreign.installation_id, others)):
                bridge, tap = names.bridge_name(installation, "h1", "s1"), names.tap_name(installation, "a", "n1")
                await control.ensure_switch(bridge, 1 << 48, CONTROLLER)
                await ports.plug(control, bridge, tap)
            done = await clean_up(foreign)
            assert (len(done.bridges), len(done.taps)) == (1, 1)
            assert (await others.switches(), ports.taps_of(foreign.installation_id)) == ([], [])
            assert (len(await switches.switches()), len(ports.taps_of(own))) == (1, 1)
        finally:
            await clean_up(foreign)

    play(scenario)
