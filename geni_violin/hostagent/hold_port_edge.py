"""The edge of a VM in the switch: a hold port on its bridge. Works for any guest, also one that vhost-net serves.

Theory of operation. The hold port is a TAP device of the agent's (:mod:`~geni_violin.hostagent.hold_port`). While the
VM's port is armed the switch gives the VM's frames to it; the agent passes on what the VM may have, by way of the
switch. The queue, the color and what is recorded are those of any armed edge. Nothing that the VM sends is held, so its
cut is one in the pause order (``core.cut.SWITCH_PLANS``).

*To hold* the agent passes nothing on any more, and waits until the VM has consumed what was passed on before: until the
switch has read it, has sent it on (one turn of its main loop later), the VM's TAP device is empty, and the hypervisor
has nothing left of it. Whether the device is empty is asked of a duplicate of the VM's descriptor of it: poll(2) says
whether there is a frame to read. A frame that comes to the VM's port directly was there before the port was armed, and
is consumed by then as well.

*What the VM has sent* is old if it was sent before the stop. The recolor waits until the switch has read it: rules and
frames are handled by one thread of Open vSwitch, so what it has read it colors before it hears of the recolor.

*The direct path comes back* when the network is disarmed and the switch has forgotten its cached flows: from then on no
frame comes to the hold port. Those that are there are passed on; a direct one may overtake them, which is counted.

*A restored VM's channel state* is put into its TAP device while the VM stands still and its port has no rules yet: so
it comes before any other frame, and nothing needs to be held.

A file in the VM's folder says how the edge is armed, for an agent that comes after this one. While no agent reads the
hold port the kernel drops what comes to it.
"""

import asyncio
import json
import os
import select
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from geni_violin.core.errors import MachineFault
from geni_violin.core.model import IN_SWITCH
from geni_violin.hostagent.edge import EdgeRecord
from geni_violin.hostagent.frame_pump import FramePump
from geni_violin.hostagent.hold_port import HoldPortChannel, put_on
from geni_violin.hostagent.hypervisor import Nic
from geni_violin.hostagent.inbound_queue import InboundQueue
from geni_violin.hostagent.ports import QUEUE_FRAMES, dropped_frames, has_carrier, open_tap, tap_descriptor_of
from geni_violin.hostagent.switch_end import SwitchEnd
from geni_violin.runtime.openvswitch import await_a_turn
from geni_violin.runtime.processes import write_atomically

_ARMED = "edge-armed.json"
_LOOK_S = 0.0005
_PATIENCE_S = 10.0

log = structlog.get_logger()


@dataclass
class _Port:
    """One interface while it is armed. ``vm_descriptor`` is the duplicate of the VM's of its own TAP device."""

    nic: Nic
    channel: HoldPortChannel
    sent: SwitchEnd
    vm_descriptor: int
    dropped_before: int

    def vm_has_read(self) -> bool:
        """Whether the VM's TAP device is empty."""
        return not select.select([self.vm_descriptor], [], [], 0)[0]

    @property
    def frames_dropped(self) -> int:
        """Frames that found no room in the hold port's or the VM's TAP device since it was armed."""
        return _dropped(self.nic) - self.dropped_before

    def close(self) -> None:
        """Let go; the channel is the pump's."""
        self.sent.close()
        os.close(self.vm_descriptor)


@dataclass
class _Cut:
    ports: list[_Port] = field(default_factory=list)


class HoldPortEdge:
    """One VM's edge; see :class:`~geni_violin.hostagent.edge.Edge` for every public method's contract.

    :param nics: the VM's interfaces, each with a hold port.
    :param folder: the VM's.
    :param pid: the VM's process.
    :param until_consumed: returns when nothing is left that the hypervisor has taken and the guest has not.
    """

    def __init__(
        self,
        nics: Sequence[Nic],
        folder: Path,
        pid: Callable[[], int],
        pump: FramePump,
        until_consumed: Callable[[], Awaitable[None]],
    ) -> None:
        self._nics = nics
        self._armed_path = folder / _ARMED
        self._pid = pid
        self._pump = pump
        self._until_consumed = until_consumed
        self._cut: _Cut | None = None
        self._record: EdgeRecord | None = None

    @property
    def place(self) -> str:
        return IN_SWITCH

    async def arm(self, vlan_id: int, epoch: int, on_future: Callable[[], None]) -> None:
        await self.return_path()
        self._record = None
        await asyncio.to_thread(write_atomically, self._armed_path, json.dumps([vlan_id, epoch]).encode())
        try:
            await self._open(vlan_id, epoch, on_future)
        except BaseException:
            await self.close()
            self._armed_path.unlink(missing_ok=True)
            raise

    async def _open(self, vlan_id: int, epoch: int, on_future: Callable[[], None]) -> None:
        """Read the hold ports, which have a carrier then.

        :raise MachineFault: a device is not there, or is another process's.
        """
        loop = asyncio.get_running_loop()
        self._cut = _Cut()
        for nic in self._nics:
            port = await asyncio.to_thread(self._opened, nic, vlan_id, epoch, loop, on_future)
            self._cut.ports.append(port)
            self._pump.add(port.channel)
            late = MachineFault(f"the hold port {nic.hold_tap} gets no carrier", "ip link show")
            await _wait_until(partial(has_carrier, nic.hold_tap), late)
            port.dropped_before = _dropped(nic)

    def _opened(
        self, nic: Nic, vlan_id: int, epoch: int, loop: asyncio.AbstractEventLoop, on_future: Callable[[], None]
    ) -> _Port:
        vm_descriptor = tap_descriptor_of(self._pid(), nic.tap)
        try:
            descriptor = open_tap(nic.hold_tap)
        except BaseException:
            os.close(vm_descriptor)
            raise
        queue = InboundQueue(vlan_id, epoch)
        mac = bytes.fromhex(nic.mac.replace(":", ""))
        tell = partial(loop.call_soon_threadsafe, on_future)
        channel = HoldPortChannel(descriptor, SwitchEnd(nic.hold_tap), queue, mac, tell)
        return _Port(nic, channel, SwitchEnd(nic.tap), vm_descriptor, dropped_before=0)

    @property
    def _ports(self) -> list[_Port]:
        return self._cut.ports if self._cut is not None else []

    async def hold(self) -> None:
        if self._cut is None:
            raise MachineFault("a hold port that is not armed gets no frames to hold")
        for port in self._ports:
            with port.channel.lock:
                port.channel.queue.hold()
        await self._until(HoldPortChannel.is_written_back)
        await await_a_turn()
        for port in self._ports:
            late = MachineFault(f"the VM does not read its frames within {_PATIENCE_S:g} s", "see whether it runs")
            await _wait_until(port.vm_has_read, late)
        await self._until_consumed()

    async def until_sent_is_colored(self) -> None:
        late = MachineFault("Open vSwitch does not read what the VM sent", "see that ovs-vswitchd runs")
        for port in self._ports:
            await _wait_until(port.sent.has_read, late)

    async def release(self) -> None:
        for port in self._ports:
            with port.channel.lock:
                port.channel.listen(port.nic.tap)
                self._pump.put(port.channel, port.channel.queue.deliver())
        await self._until(HoldPortChannel.is_written_back)

    async def return_path(self) -> EdgeRecord:
        if self._cut is not None:
            await self.release()
            await self._until(HoldPortChannel.drained)
            await await_a_turn()
            self._record = await asyncio.to_thread(self._closed)
        return self._record or EdgeRecord()

    def _closed(self) -> EdgeRecord:
        """Let go of the hold ports, which are empty; the record of the cut."""
        ports, self._cut = self._ports, None
        for port in ports:
            with port.channel.lock:
                port.channel.look()
        record = _record_of(ports)
        for port in ports:
            self._pump.remove(port.channel)
            port.close()
        self._armed_path.unlink(missing_ok=True)
        return record

    async def replay_held(self, frames: Sequence[bytes]) -> None:
        lost = len(frames) - QUEUE_FRAMES
        if lost > 0:
            log.warning("a channel state is too large for a TAP device", tap=self._nics[0].tap, frames_lost=lost)
        await asyncio.to_thread(put_on, self._nics[0].tap, frames[:QUEUE_FRAMES])

    async def replay(self, frames: Sequence[bytes]) -> None:
        """Nothing to do: they are the first in the VM's TAP device."""

    async def resume_after_restart(self) -> None:
        try:
            vlan_id, epoch = json.loads(self._armed_path.read_bytes())
        except FileNotFoundError:
            return
        try:
            await self._open(vlan_id, epoch, lambda: None)
            await self.release()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let go of the edge, which stays as it is."""
        for port in self._ports:
            self._pump.remove(port.channel)
            port.close()
        self._cut = None

    async def _until(self, condition: Callable[[HoldPortChannel], bool]) -> None:
        """Wait until that is true of every hold port.

        :raise MachineFault: it is not in time.
        """
        late = MachineFault(f"a hold port's frames do not move within {_PATIENCE_S:g} s", "see that Open vSwitch runs")
        for port in self._ports:
            await _wait_until(partial(_under_lock, port.channel, condition), late)


def _record_of(ports: Sequence[_Port]) -> EdgeRecord:
    queues = [port.channel.queue for port in ports]
    overflowed = sum(port.channel.frames_overflowed + port.frames_dropped for port in ports)
    return EdgeRecord(
        frames_held=sum(queue.frames_held for queue in queues),
        frames_overflowed=overflowed + sum(queue.frames_overflowed for queue in queues),
        frames_unrecorded=sum(queue.frames_unrecorded for queue in queues),
        received=tuple(frame for queue in queues for frame in queue.received),
        frames_reordered=sum(port.channel.frames_reordered for port in ports),
    )


def _dropped(nic: Nic) -> int:
    return dropped_frames(nic.tap) + dropped_frames(nic.hold_tap)


def _under_lock(channel: HoldPortChannel, condition: Callable[[HoldPortChannel], bool]) -> bool:
    with channel.lock:
        return condition(channel)


async def _wait_until(condition: Callable[[], bool], late: MachineFault) -> None:
    """Look often until that is so; raise ``late`` if it is not in time."""
    deadline = asyncio.get_running_loop().time() + _PATIENCE_S
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise late
        await asyncio.sleep(_LOOK_S)
