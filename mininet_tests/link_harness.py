"""Two sites joined by one link with a delay or a loss: real switches, controller and link processes, and no VM.

Theory of operation. Each site is a host with a bridge and one port, whose TAP device this process has opened: what a
VM's QEMU would write and read, the test does. The ends of the link are made as the coordinator has them made.
"""

import asyncio
import contextlib
import os
import select
import statistics
import struct
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from geni_violin.core.model import EdgePort, NetworkSlice, SwitchLink
from geni_violin.hostagent import names, ovs, ports
from geni_violin.hostagent.cleanup import clean_up, ledger_of
from geni_violin.hostagent.link_child import LinkEnd
from geni_violin.hostagent.link_counters import Counters
from geni_violin.hostagent.link_ends import LinkEnds
from geni_violin.hostagent.ovs import OpenVSwitch
from geni_violin.runtime.openvswitch import forget_cached_flows
from geni_violin.runtime.settings import Settings

from .fabric_harness import ControllerProcess, wait_until
from .raw_frames import ETHERTYPE, octets

LOOPBACK = "127.0.0.1"
_STAMP = struct.Struct("!QQ")
MAX_FRAME_BYTES = 20_000


@dataclass(frozen=True)
class Arrival:
    """A numbered frame that came: when it was sent and when it came, on the monotonic clock."""

    number: int
    sent_ns: int
    came_ns: int

    @property
    def took_ms(self) -> float:
        return (self.came_ns - self.sent_ns) / 1e6


class Site:
    """A host with one switch and the port of one VM, which is this test."""

    def __init__(self, settings: Settings, index: int) -> None:
        own = settings.installation_id
        self.settings, self.host, self.switch = settings, f"h{index}", f"s{index}"
        self.vm, self.mac = f"v{index}", f"52:54:00:00:00:{index:02x}"
        self.bridge = names.bridge_name(own, self.host, self.switch)
        self.dpid = names.datapath_id(own, self.host, self.switch)
        self.tap = names.tap_name(own, "wan", self.vm)
        self.switches = OpenVSwitch(own)
        self.ends = self.new_agent()
        self.port_no = self.link_port_no = self.descriptor = 0

    def new_agent(self) -> LinkEnds:
        """The ends of this host, as an agent that starts has them."""
        return LinkEnds(self.settings, self.host, LOOPBACK, self.switches, ledger_of(self.settings))

    async def build(self, openflow: str) -> None:
        """The switch and the VM's port."""
        await self.switches.ensure_switch(self.bridge, self.dpid, openflow)
        self.port_no = (await ports.plug(self.switches, self.bridge, self.tap)).port_no
        self.descriptor = ports.open_tap(self.tap)

    def end(self, far: "Site", delay_ms: float, loss: float, peer_address: str = "") -> LinkEnd:
        """This site's end of the link, as the agent would ask for it."""
        own = self.settings.installation_id
        tap = names.link_tap_name(own, self.bridge, far.bridge, 0, delay_ms, loss)
        return LinkEnd(
            self.host, self.switch, self.bridge, far.switch, 0, delay_ms, loss, tap, peer_address=peer_address
        )

    def counters(self) -> Counters:
        """What the one end of this host shows."""
        ((_, counters),) = self.ends.counters()
        return counters

    def pid(self) -> int:
        """The process of the one end of this host."""
        ((end, _),) = self.ends.counters()
        record = ledger_of(self.settings).get(end.record_name)
        assert record is not None
        return record.pid

    def send(self, far: "Site", payload: bytes, tags: bytes = b"") -> None:
        """Send one frame, as the VM."""
        header = octets(far.mac) + octets(self.mac) + tags + ETHERTYPE.to_bytes(2, "big")
        os.write(self.descriptor, (header + payload).ljust(60, b"\0"))

    def receive(self, timeout_s: float) -> bytes | None:
        """The next frame of a test that the VM gets, if one comes in time."""
        deadline = time.monotonic() + timeout_s
        while select.select([self.descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            frame = os.read(self.descriptor, MAX_FRAME_BYTES)
            if ETHERTYPE.to_bytes(2, "big") in (frame[12:14], frame[16:18], frame[20:22]):
                return frame
        return None


class Wan:
    """Both sites, and the slice over them."""

    def __init__(self, settings: Settings, controller: ControllerProcess, delay_ms: float, loss: float) -> None:
        self.settings, self.controller = settings, controller
        self.delay_ms, self.loss = delay_ms, loss
        self.a, self.b = Site(settings, 1), Site(settings, 2)

    async def build(self) -> None:
        """Everything, up to a slice that works."""
        for site in (self.a, self.b):
            await site.build(f"tcp:{LOOPBACK}:{self.controller.openflow_port}")
        await self.put_link()
        dpids = {self.a.dpid, self.b.dpid}
        await asyncio.to_thread(wait_until, "both connect", lambda: self.controller.switches() == dpids)
        await self.put_slice(vlan_id=101)

    async def put_link(self) -> None:
        """Ask for the ends in the coordinator's order."""
        manner = (self.delay_ms, self.loss)
        _, address = await self.a.ends.put(self.a.end(self.b, *manner))
        self.b.link_port_no, far = await self.b.ends.put(self.b.end(self.a, *manner, address))
        self.a.link_port_no, _ = await self.a.ends.put(self.a.end(self.b, *manner, far))

    async def put_slice(self, vlan_id: int) -> None:
        """Install the slice; under another VLAN ID it is another life of it."""
        edges = tuple(EdgePort(site.vm, site.dpid, site.port_no, site.mac, 0) for site in (self.a, self.b))
        link = SwitchLink(self.a.dpid, self.a.link_port_no, self.b.dpid, self.b.link_port_no)
        network = NetworkSlice("wan", vlan_id, edges, (link,))
        await asyncio.to_thread(self.controller.request, "PUT", "/v1/slices/wan", network)
        await forget_cached_flows(timeout_s=20)

    async def stream(self, frames: int, rate: float, size: int = 64) -> list[Arrival]:
        """Send numbered frames from a to b, ``rate`` a second; those that came, in the order that they did."""
        arrivals: list[Arrival] = []
        receiver = threading.Thread(target=self._collect, args=(arrivals,))
        receiver.start()
        await asyncio.to_thread(self._send_numbered, frames, rate, size)
        await asyncio.to_thread(receiver.join)
        return arrivals

    def _send_numbered(self, frames: int, rate: float, size: int) -> None:
        start = time.monotonic()
        for number in range(frames):
            while (early_s := start + number / rate - time.monotonic()) > 0:
                time.sleep(early_s)
            self.a.send(self.b, _STAMP.pack(number, time.monotonic_ns()).ljust(size, b"\0"))

    def _collect(self, arrivals: list[Arrival]) -> None:
        quiet_s = 1.0 + self.delay_ms / 1e3
        while (frame := self.b.receive(quiet_s)) is not None:
            number, sent_ns = _STAMP.unpack_from(frame, 14)
            arrivals.append(Arrival(number, sent_ns, time.monotonic_ns()))

    async def is_open(self) -> bool:
        """Whether a frame from a reaches b."""
        self.a.send(self.b, b"is anybody there?")
        return await asyncio.to_thread(self.b.receive, 0.2 + self.delay_ms / 1e3) is not None

    async def opens(self, patience_s: float = 20.0) -> bool:
        """Whether a frame gets through before patience ends."""
        deadline = time.monotonic() + patience_s
        while not await self.is_open():
            if time.monotonic() > deadline:
                return False
        return True


def median_ms(arrivals: list[Arrival]) -> float:
    """How long frames took."""
    return statistics.median(arrival.took_ms for arrival in arrivals)


@contextlib.asynccontextmanager
async def running_wan(
    folder: Path, controller: ControllerProcess, delay_ms: float, loss: float = 0.0
) -> AsyncIterator[Wan]:
    """Two sites that are joined, and nothing of them afterwards."""
    settings = Settings(state_dir=folder, link_seed=9)
    await ovs.ensure_running()
    wan = Wan(settings, controller, delay_ms, loss)
    try:
        await wan.build()
        yield wan
    finally:
        for site in (wan.a, wan.b):
            site.ends.detach()
            if site.descriptor:
                os.close(site.descriptor)
        await asyncio.to_thread(controller.request, "DELETE", "/v1/slices/wan")
        await clean_up(settings)
