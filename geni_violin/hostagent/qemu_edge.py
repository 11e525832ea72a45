"""The edge of a VM that QEMU runs: its network filters, and the frames that are diverted through the agent.

Theory of operation. The chain of filters is in :mod:`geni_violin.hostagent.qemu_command`. QEMU handles frames and
monitor commands in one thread, one after the other, so each command falls between two frames.

*Inbound.* Armed, all frames are diverted to the agent (:mod:`~geni_violin.hostagent.frame_pump`), which passes on
through ``inject``. The direct path comes back without loss or reordering because ``hold`` stands between the two: hold
on, divert off, then everything that was diverted is injected and consumed, hold off. To hold for a cut it is enough
that the agent passes nothing on, and waits until QEMU has consumed what it was given before. Frames that waited in the
TAP device before the port was armed, or disarmed, are told from later ones by waiting until QEMU has read them.

*Outbound.* What the VM sends waits in ``outer``. For the channel state one has to know which of these frames were sent
before the cut, so they are recorded with the guest's clock on their way into it. The record must begin exactly where
the waiting does: ``inner`` on (from here on frames wait), record on, ``outer`` on, ``inner`` off. Now everything since
the first step has passed, or will pass, the record once, and waits in ``outer``. What left before has the old color
once the switch has read it, which is waited for as well.

The record is added, switched off, when the edge is armed. Its time stamps are ahead of the guest's clock by the whole
seconds of the date at which QEMU made it; they are taken off here.

A frame that QEMU has taken may still wait in front of a guest whose receive ring is full, and QEMU drops what waits
there when the VM stops (net/net.c, net_vm_change_state_handler). So a hold also waits until there is room in the ring.

An edge that is not armed holds inbound frames in ``hold``; nothing is recorded. The sockets are pairs that the agent
makes and gives QEMU one end of: so QEMU's end of a diversion has a buffer for a second of frames, where that of a
listening socket has one for 140, and then QEMU's only thread for all devices would wait for the agent. Both filters
are added anew for each connection, because QEMU 7.2 serves only one in the life of ``inject``.

A file in the VM's folder says how the edge is armed, for an agent that comes after this one. While no agent reads the
diversion QEMU drops what it should divert; it does not wait.
"""

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from geni_violin.core.errors import Conflict, GeniViolinError, InvalidInput, MachineFault
from geni_violin.core.model import IN_HYPERVISOR
from geni_violin.hostagent.edge import EdgeRecord
from geni_violin.hostagent.frame_pump import FrameChannel, FramePump
from geni_violin.hostagent.inbound_queue import MOST_FRAMES, InboundQueue, Mode
from geni_violin.hostagent.qemu_command import device_name, filter_name, netdev_name
from geni_violin.hostagent.qemu_monitor import CommandRefused
from geni_violin.hostagent.switch_end import SwitchEnd
from geni_violin.runtime import pcap
from geni_violin.runtime.processes import write_atomically
from geni_violin.runtime.sockets import enlarge_buffers

_ARMED = "edge-armed.json"
_LOOK_S = 0.0005
_PATIENCE_S = 10.0
_DATE_TRIES = 3
_FRAMES_A_TURN, _MOST_TURNS = 50, 1_000
_RECORD = "sent"
"""The kind of the filter that records what the VM sends."""
_REPLAYED_AT_ONCE = 500
"""Fewer than a receive ring has places: QEMU drops what waits in front of a full one for too long."""
_DIVERT_BUFFER_BYTES = 64 << 20

Execute = Callable[..., Awaitable[Any]]
"""Runs a monitor command."""

PassDescriptor = Callable[[str, int], Awaitable[None]]
"""Gives QEMU a file descriptor under a name."""


@dataclass
class _Cut:
    """What is known of the cut at hand: how the edge was armed, and the channels of the interfaces."""

    vlan_id: int
    epoch: int
    channels: list[FrameChannel] = field(default_factory=list)
    switch_ends: list[SwitchEnd] = field(default_factory=list)


@dataclass(frozen=True)
class _FullRing:
    """A receive ring of virtio in which QEMU knows of no room, so that frames may wait in front of it: how many of the
    places that the guest gave QEMU has used, and how many there are by now (modulo 2**16).
    """

    used: int
    given: int

    @property
    def has_unseen_room(self) -> bool:
        """Whether the guest has made room since QEMU looked."""
        return self.given != self.used


class QemuEdge:
    """One VM's edge; see :class:`~geni_violin.hostagent.edge.Edge` for every public method's contract.

    :param execute: runs a monitor command.
    :param folder: the VM's, which is QEMU's working directory.
    :param taps: the TAP device of each network interface.
    """

    def __init__(
        self, execute: Execute, pass_descriptor: PassDescriptor, folder: Path, taps: Sequence[str], pump: FramePump
    ) -> None:
        self._execute = execute
        self._pass_descriptor = pass_descriptor
        self._folder = folder
        self._taps = taps
        self._indexes = range(len(taps))
        self._pump = pump
        self._cut: _Cut | None = None
        self._record: EdgeRecord | None = None
        self._sent_dates_s: dict[int, int] = {}

    @property
    def place(self) -> str:
        return IN_HYPERVISOR

    async def arm(self, vlan_id: int, epoch: int, on_future: Callable[[], None]) -> None:
        await self.return_path()  # what an earlier cut left armed passes everything on, and would go on so
        self._record = None
        await asyncio.to_thread(write_atomically, self._armed_path, json.dumps([vlan_id, epoch]).encode())
        try:
            await self._open_channels(vlan_id, epoch, on_future)
            for index in self._indexes:
                await self._add_record(index)
            await self._switch("divert", "on")
        except BaseException:  # not armed, so that the next try is none in vain
            await self._give_up_arming()
            raise

    async def _give_up_arming(self) -> None:
        await self.close()
        for index in self._indexes:
            with contextlib.suppress(GeniViolinError):
                await self._remove(filter_name(_RECORD, index))
            with contextlib.suppress(GeniViolinError):
                await self._remove_diversion(index)
        self._armed_path.unlink(missing_ok=True)

    async def hold(self) -> None:
        if self._cut is None:
            await asyncio.gather(self._switch("hold", "on"), self._switch("outer", "on"))
            await self.until_rings_have_room()
            return
        if any(channel.queue.mode is Mode.DELIVER for channel in self._cut.channels):
            words = "the VM's edge has not stepped aside since its last cut"
            raise Conflict(words, "take a snapshot that holds frames: it does so then")
        before = await self._frames_diverted()
        for channel in self._cut.channels:
            with channel.lock:
                channel.queue.hold()
        await asyncio.gather(self._switch("inner", "on"), self._switch(_RECORD, "on"))
        await asyncio.gather(
            self._switch("outer", "on"),
            self._switch("inner", "off"),
            self._until_the_switch_has_read(),
            self._until_all_is_consumed(),
        )
        if not await self._are_taps_read(before, before):
            await self._until_taps_are_read()

    async def _until_all_is_consumed(self) -> None:
        """Wait until the guest has taken every frame that was passed on to it."""
        await self._until(FrameChannel.consumed, "take the frames that were passed on to it")
        await self.until_rings_have_room()

    async def _until_taps_are_read(self) -> None:
        """Wait until QEMU has read, and diverted, every frame that waited in front of it when this was called.

        :raise MachineFault: frames come faster than QEMU reads them.
        """
        first = last = await self._frames_diverted()
        for _ in range(_MOST_TURNS):
            await self._execute("query-status")
            await self._execute("query-status")
            if await self._are_taps_read(first, last):
                return
            last = await self._frames_diverted()
        raise MachineFault("frames come faster than QEMU reads them", "see the machine's load")

    async def _frames_diverted(self) -> list[int]:
        """How many frames QEMU has diverted so far, of each interface; those on their way to the agent are awaited."""
        await self._until(FrameChannel.all_taken, "divert frames")
        return [channel.queue.frames_taken for channel in (self._cut.channels if self._cut else ())]

    async def _are_taps_read(self, first: Sequence[int], last: Sequence[int]) -> bool:
        """Whether QEMU has read every frame that waited in front of it when it had diverted ``first`` frames.

        To be asked when QEMU has answered two commands, one after the other, since it had diverted ``last``. It reads
        at most 50 frames from a TAP device at a turn of its main loop, and carries out a command at a turn. So if fewer
        have come between two commands there was a turn at which none was left (net/tap.c, tap_send). And if as many
        have come as the device can hold, all that it held are among them.
        """
        counts = zip(await self._frames_diverted(), first, last, self._taps, strict=False)
        return all(
            now - at_last < _FRAMES_A_TURN or now - at_first >= _queue_frames(tap)
            for now, at_first, at_last, tap in counts
        )

    async def _until_the_switch_has_read(self) -> None:
        """Wait until the switch has read, and so colored, all that has left the VM.

        :raise MachineFault: it does not in time.
        """
        late = MachineFault("Open vSwitch does not read what the VM sends", "see that ovs-vswitchd runs")
        for end in self._cut.switch_ends if self._cut else ():
            await _wait_until(end.has_read, late)

    async def until_sent_is_colored(self) -> None:
        """Nothing to do: :meth:`hold` has waited for it."""

    async def until_rings_have_room(self) -> None:
        """Wait until nothing is left that QEMU has taken and the guest has not.

        :raise MachineFault: the guest takes nothing in time.
        """
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        for index in self._indexes:
            ring = await self._full_ring(index)
            while ring is not None:
                if asyncio.get_running_loop().time() > deadline:
                    raise MachineFault(f"the guest takes no frames within {_PATIENCE_S:g} s", "see its console")
                await asyncio.sleep(_LOOK_S)
                before, ring = ring, await self._full_ring(index)
                if ring == before and ring.has_unseen_room:  # QEMU had time to use it, and nothing to use it for
                    break

    async def _full_ring(self, index: int) -> "_FullRing | None":
        """An interface's receive ring, if it is full; None if QEMU knows of room in it, or (before 7.2) does not tell.

        A guest that never gave a place takes no frames, so that none wait for it.
        """
        place: dict[str, Any] = {"path": f"/machine/peripheral/{device_name(index)}/virtio-backend", "queue": 0}
        try:
            status = await self._execute("x-query-virtio-queue-status", **place)
            if status["last-avail-idx"] != status["shadow-avail-idx"]:
                return None
            element = await self._execute("x-query-virtio-queue-element", **place)
        except CommandRefused:
            return None
        given = element["avail"]["idx"]
        return _FullRing(status["last-avail-idx"], given) if given else None

    async def _add_record(self, index: int) -> None:
        """Add the record of what the VM sends, switched off, between ``inner`` and ``outer``.

        :raise MachineFault: QEMU refuses, or the date's second ended meanwhile thrice.
        """
        record: dict[str, Any] = {
            "qom-type": "filter-dump",
            "id": filter_name(_RECORD, index),
            "netdev": netdev_name(index),
            "queue": "rx",
            "status": "off",
            "file": _sent_file(index),
            "position": f"id={filter_name('inner', index)}",
            "insert": "before",
        }
        for _ in range(_DATE_TRIES):
            date_s = self._sent_dates_s[index] = _date_s()
            await self._remove(filter_name(_RECORD, index))
            await self._execute("object-add", **record)
            if date_s == _date_s():
                return
        raise MachineFault("the date's seconds pass faster than QEMU begins a record", "see the machine's load")

    async def release(self) -> None:
        await asyncio.gather(self._switch("outer", "off"), self._switch("inner", "off"), self._deliver())
        if self._cut is not None:
            await asyncio.gather(*(self._remove(filter_name(_RECORD, index)) for index in self._indexes))

    async def _deliver(self) -> None:
        for channel in self._cut.channels if self._cut else ():
            with channel.lock:
                self._pump.put(channel, channel.queue.deliver())
        if self._cut is None:
            await self._switch("hold", "off")

    async def return_path(self) -> EdgeRecord:
        if self._cut is not None:
            await self.release()
            await self._until_taps_are_read()
            try:
                await asyncio.gather(self._switch("hold", "on"), self._switch("divert", "off"))
                await self._until(FrameChannel.drained, "take the frames that were diverted")
            finally:  # whatever failed: a guest must not stay deaf
                await self._switch("hold", "off")
            self._record = await self._close_channels()
        return self._record or EdgeRecord()

    async def replay_held(self, frames: Sequence[bytes]) -> None:
        await self._switch("hold", "on")

    async def replay(self, frames: Sequence[bytes]) -> None:
        await self._open_channels(0, 0, lambda: None)
        assert self._cut is not None
        channel = self._cut.channels[0]
        try:
            for first in range(0, len(frames), _REPLAYED_AT_ONCE):
                with channel.lock:
                    self._pump.put(channel, frames[first : first + _REPLAYED_AT_ONCE])
                await self._until(FrameChannel.consumed, "take the frames that are replayed to it")
                await self.until_rings_have_room()
        finally:
            await self._switch("hold", "off")
            await self._close_channels()

    async def resume_after_restart(self) -> None:
        try:
            vlan_id, epoch = json.loads(self._armed_path.read_bytes())
        except FileNotFoundError:
            return
        try:
            await self._open_channels(vlan_id, epoch, lambda: None)
            await self.release()
            await self._switch("divert", "on")
            await self._switch("hold", "off")
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let go of the edge, which stays as it is."""
        if self._cut is not None:
            for channel in self._cut.channels:
                self._pump.remove(channel)
            for end in self._cut.switch_ends:
                end.close()
            self._cut = None

    # inside

    @property
    def _armed_path(self) -> Path:
        return self._folder / _ARMED

    async def _open_channels(self, vlan_id: int, epoch: int, on_future: Callable[[], None]) -> None:
        """Connect to the diversions and injections.

        :raise MachineFault: QEMU takes no connection.
        """
        loop = asyncio.get_running_loop()
        self._cut = _Cut(vlan_id, epoch)
        self._cut.switch_ends = [await asyncio.to_thread(SwitchEnd, tap) for tap in self._taps]
        for index in self._indexes:
            await self._remove_diversion(index)
            divert = await self._add_redirector("divert", index, status="off", outdev=_chardev("divert", index))
            inject = await self._add_redirector("inject", index, indev=_chardev("inject", index))
            queue = InboundQueue(vlan_id, epoch)
            channel = FrameChannel(divert, inject, queue, partial(loop.call_soon_threadsafe, on_future))
            self._cut.channels.append(channel)
            self._pump.add(channel)

    async def _add_redirector(self, kind: str, index: int, **properties: str) -> socket.socket:
        """Add a redirector beside ``hold``, and give the agent's end of its socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            enlarge_buffers(theirs, send_bytes=_DIVERT_BUFFER_BYTES)
            await self._pass_descriptor(_chardev(kind, index), theirs.fileno())
        address = {"type": "fd", "data": {"str": _chardev(kind, index)}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await self._execute("chardev-add", id=_chardev(kind, index), backend=backend)
        redirector = {
            "qom-type": "filter-redirector",
            "id": filter_name(kind, index),
            "netdev": netdev_name(index),
            "queue": "tx",
            "position": f"id={filter_name('hold', index)}",
            "insert": "before" if kind == "divert" else "behind",
        }
        await self._execute("object-add", **redirector, **properties)
        return ours

    async def _remove_diversion(self, index: int) -> None:
        for kind in ("divert", "inject"):
            await self._remove(filter_name(kind, index))
            with contextlib.suppress(CommandRefused):
                await self._execute("chardev-remove", id=_chardev(kind, index))

    async def _close_channels(self) -> EdgeRecord:
        """Disconnect; the record of the cut."""
        assert self._cut is not None
        cut, self._cut = self._cut, None
        for channel in cut.channels:
            self._pump.remove(channel)
        for index in self._indexes:
            await self._remove_diversion(index)
        return await asyncio.to_thread(self._record_of, cut)

    def _record_of(self, cut: _Cut) -> EdgeRecord:
        for end in cut.switch_ends:
            end.close()
        self._armed_path.unlink(missing_ok=True)
        queues = [channel.queue for channel in cut.channels]
        sent = [self._sent_frames(index) for index in self._indexes]
        beyond_outer = sum(max(0, len(frames) - MOST_FRAMES) for frames in sent)  # a filter-buffer drops them
        return EdgeRecord(
            frames_held=sum(queue.frames_held for queue in queues),
            frames_overflowed=beyond_outer + sum(c.frames_overflowed + c.queue.frames_overflowed for c in cut.channels),
            frames_unrecorded=sum(queue.frames_unrecorded for queue in queues),
            received=tuple(frame for queue in queues for frame in queue.received),
            sent=tuple(frame for frames in sent for frame in frames),
        )

    def _sent_frames(self, index: int) -> list[pcap.Frame]:
        path = self._folder / _sent_file(index)
        try:
            ahead_us = self._sent_dates_s.get(index, 0) * 1_000_000
            return [pcap.Frame(frame.at_us - ahead_us, frame.data) for frame in pcap.decode(path.read_bytes())]
        except FileNotFoundError:
            return []
        except InvalidInput as error:
            raise MachineFault(f"QEMU's record of sent frames is damaged: {error}") from error
        finally:
            path.unlink(missing_ok=True)

    async def _until(self, condition: Callable[[FrameChannel], bool], what: str) -> None:
        """Wait until that is true of every channel.

        :raise MachineFault: it is not in time.
        """
        late = MachineFault(f"QEMU does not {what} within {_PATIENCE_S:g} s", "see whether the VM runs")
        for channel in self._cut.channels if self._cut else ():
            await _wait_until(partial(_under_lock, channel, condition), late)

    async def _remove(self, name: str) -> None:
        """Remove a filter that may be there."""
        with contextlib.suppress(CommandRefused):
            await self._execute("object-del", id=name)

    async def _switch(self, kind: str, status: str) -> None:
        await asyncio.gather(*(self._set_status(filter_name(kind, index), status) for index in self._indexes))

    async def _set_status(self, name: str, status: str) -> None:
        await self._execute("qom-set", path=f"/objects/{name}", property="status", value=status)


async def _wait_until(condition: Callable[[], bool], late: MachineFault) -> None:
    """Look often until that is so; raise ``late`` if it is not in time."""
    deadline = asyncio.get_running_loop().time() + _PATIENCE_S
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise late
        await asyncio.sleep(_LOOK_S)


def _under_lock(channel: FrameChannel, condition: Callable[[FrameChannel], bool]) -> bool:
    with channel.lock:
        return condition(channel)


def _queue_frames(tap: str) -> int:
    """How many frames a TAP device can hold; very many if it does not tell."""
    try:
        return int(Path(f"/sys/class/net/{tap}/tx_queue_len").read_text())
    except OSError:
        return sys.maxsize


def _date_s() -> int:
    """The date that QEMU's filter-dump begins its time stamps with: the broken-down UTC time, read as a local one.

    ``gmtime()`` without an argument reads the kernel's coarse clock, which enters a second some milliseconds late: two
    equal readings around QEMU's own would then not prove that it read the same.
    """
    return int(time.mktime(time.gmtime(time.time())))


def _sent_file(index: int) -> str:
    return f"sent{index}.pcap"


def _chardev(kind: str, index: int) -> str:
    """The id of QEMU's end of a diversion's or injection's socket."""
    return f"{kind}-socket{index}"
