"""A VM without QEMU: it behaves as docs/qemu-migration-notes.md says that QEMU does, and can be told to misbehave.

Theory of operation. :class:`FakeQemu` is the process: it has a run state, a hold state and at most one migration, which
writes a real stream into the socket that it is given. :class:`FakeVm` is an agent's handle on it, behind the contract
of ``hostagent.hypervisor``; when an agent "crashes" its handles are cut off and the process goes on.

What goes wrong is scripted by *troubles*: a trouble is put at a named point and happens once, when that point is next
reached. Points of commands: arm, hold, release, return path, pause, start, continue, resume, cancel. Points of the
migration: stopped (by the migration, not resumed yet), middle (half of the stream is out), pre-switchover, end (before
completed).
"""

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from blake3 import blake3

from geni_violin.core.errors import Conflict, MachineFault
from geni_violin.core.model import IN_HYPERVISOR, IN_SWITCH
from geni_violin.hostagent.edge import EdgeRecord
from geni_violin.hostagent.hypervisor import FAILED, PAUSED, RUNNING, MigrationProgress, VmDefinition
from geni_violin.hostagent.vm_events import (
    FINAL_MIGRATION_STATUSES,
    Died,
    EventFeed,
    MigrationStatus,
    Resumed,
    Stopped,
    Watch,
)
from geni_violin.runtime import pcap
from geni_violin.runtime.clock import wall_s

STREAM_BYTES = 192 * 1024
PIECE_BYTES = 32 * 1024
HEADER = b"QEVM\x00\x00\x00\x03"
UNKNOWN_SECTION = b"\xff"
"""No section of a stream begins with it, so the store keeps what follows as it is, whatever it looks like."""

Trouble = Callable[[], Awaitable[None]]
"""What happens at a point; a MachineFault that it raises is the failure of what the point belongs to."""

_pids = itertools.count(1_000_001)  # above any real process id


def fails(words: str = "scripted failure") -> Trouble:
    """A trouble: the command or the migration fails with these words."""

    async def trouble() -> None:
        raise MachineFault(words)

    return trouble


def breaks(error: Exception) -> Trouble:
    """A trouble: an adapter with a defect raises something that no contract names."""

    async def trouble() -> None:
        raise error

    return trouble


def takes(seconds: float) -> Trouble:
    """A trouble: it takes that long."""

    async def trouble() -> None:
        await asyncio.sleep(seconds)

    return trouble


async def hangs() -> None:
    """A trouble: it never goes on by itself."""
    await asyncio.Event().wait()


class FakeQemu:
    """One process."""

    def __init__(self, definition: VmDefinition, folder: Path) -> None:
        self.definition = definition
        self.pid = next(_pids)
        self.folder = folder
        self.run_state = "inmigrate" if definition.incoming else "paused"
        self.dead = False
        self.holding = False
        self.diverted = False
        self.replayed: list[bytes] = []
        self.received: list[pcap.Frame] = []
        """What the edge will have recorded of the old color."""
        self.frames_held = 0
        self.frames_overflowed = 0
        self.future_frame_seen: Callable[[], None] = lambda: None
        """Call it for a future frame at the edge."""
        self.status = "none"
        self.error = ""
        self.sent_bytes = 0
        self.loaded = b""
        self.trace: list[str] = []
        self.refusals: dict[str, str] = {}
        self.troubles: dict[str, list[Trouble]] = {}
        self.feed = EventFeed()
        self._seed = os.urandom(16)
        self._continued = asyncio.Event()
        self._migration: asyncio.Task[None] | None = None

    def trouble(self, point: str, *troubles: Trouble) -> None:
        """These happen at the next times that ``point`` is reached."""
        self.troubles.setdefault(point, []).extend(troubles)

    async def reach(self, point: str) -> None:
        """Be at a point: what is scripted for it happens."""
        self.trace.append(point)
        waiting = self.troubles.get(point)
        if waiting:
            await waiting.pop(0)()
        if self.dead:
            raise Conflict(f"QEMU of VM {self.definition.name} is gone")

    @property
    def migrating(self) -> bool:
        """Whether a migration is under way."""
        return self._migration is not None and not self._migration.done()

    async def die(self) -> None:
        """SIGKILL. Usable as a trouble; the kernel closes the process's sockets."""
        if self.dead:
            return
        self.dead = True
        self.trace.append("died")
        if self._migration is not None and self._migration is not asyncio.current_task():
            self._migration.cancel()
            await asyncio.wait({self._migration})
        self.feed.publish(Died(wall_s(), "killed"))

    def stop(self) -> None:
        """The processors stand still from now on."""
        if self.run_state == "running":
            self.run_state = "paused"
            self.trace.append("STOP")
            self.feed.publish(Stopped(wall_s()))

    def resume(self) -> None:
        """The processors run from now on."""
        if self.run_state != "running":
            self.run_state = "running"
            self.trace.append("RESUME")
            self.feed.publish(Resumed(wall_s()))

    def _set_status(self, status: str) -> None:
        self.status = status
        self.trace.append(status)
        self.feed.publish(MigrationStatus(status, wall_s()))

    # the outgoing migration

    def migrate(self, connection: socket.socket, strategy: str) -> None:
        """Start to send the image."""
        self.error, self.sent_bytes = "", 0
        self._continued.clear()
        self._set_status("setup")
        self._migration = asyncio.create_task(self._migrate(connection, strategy))

    async def _migrate(self, connection: socket.socket, strategy: str) -> None:
        ran = self.run_state == "running"
        with connection:
            try:
                self._set_status("active")
                await {"background": self._background, "precopy": self._precopy, "stop": self._stop}[strategy](
                    connection
                )
                await self.reach("end")
            except (OSError, MachineFault) as error:
                self._end_badly("failed", str(error), ran)
                return
            except (asyncio.CancelledError, Conflict):
                if not self.dead:
                    self._set_status("cancelling")
                    self._end_badly("cancelled", "", ran)
                return
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._set_status("completed")

    def _end_badly(self, status: str, error: str, ran: bool) -> None:
        """QEMU lets a VM run again that ran before a migration that came to nothing."""
        self.error = error
        if ran:
            self.resume()
        self._set_status(status)

    async def _background(self, connection: socket.socket) -> None:
        self.stop()
        await self.reach("stopped")
        self.resume()
        await self._send_all(connection)

    async def _precopy(self, connection: socket.socket) -> None:
        image = self._image()
        await self._send(connection, image[: STREAM_BYTES // 2])
        await self.reach("middle")
        self.stop()
        await self.reach("stopped")
        self._set_status("pre-switchover")
        await self.reach("pre-switchover")
        await self._continued.wait()
        self._set_status("device")
        await self._send(connection, image[STREAM_BYTES // 2 :])

    async def _stop(self, connection: socket.socket) -> None:
        await self._send_all(connection)

    async def _send_all(self, connection: socket.socket) -> None:
        image = self._image()
        await self._send(connection, image[: STREAM_BYTES // 2])
        await self.reach("middle")
        await self._send(connection, image[STREAM_BYTES // 2 :])

    def _image(self) -> bytes:
        begin = HEADER + UNKNOWN_SECTION
        return begin + blake3(self._seed).digest(length=STREAM_BYTES - len(begin))

    async def _send(self, connection: socket.socket, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            await asyncio.get_running_loop().sock_sendall(connection, piece)
            self.sent_bytes += len(piece)
            await asyncio.sleep(0)

    def let_continue(self) -> None:
        """migrate-continue."""
        if self.status != "pre-switchover":
            raise MachineFault(f"migration is {self.status}, not at pre-switchover")
        self._continued.set()

    async def cancel(self) -> str:
        """migrate_cancel, and its end."""
        if self._migration is not None and self.migrating:
            self._migration.cancel()
            await asyncio.wait({self._migration})
        return self.status


class FakeEdge:
    """A VM's edge; see ``hostagent.edge`` for the contract."""

    def __init__(self, vm: "FakeVm") -> None:
        self._vm = vm

    @property
    def place(self) -> str:
        return IN_SWITCH if any(nic.hold_tap for nic in self._vm.definition.nics) else IN_HYPERVISOR

    async def until_sent_is_colored(self) -> None:
        if self.place == IN_SWITCH:
            self._vm.qemu.trace.append("all is colored")

    async def arm(self, vlan_id: int, epoch: int, on_future: Callable[[], None]) -> None:
        qemu = await self._vm.command("arm")
        qemu.diverted, qemu.future_frame_seen = True, on_future

    async def hold(self) -> None:
        (await self._vm.command("hold")).holding = True

    async def release(self) -> None:
        (await self._vm.command("release")).holding = False

    async def return_path(self) -> EdgeRecord:
        qemu = await self._vm.command("return path")
        qemu.diverted = False
        return EdgeRecord(qemu.frames_held, qemu.frames_overflowed, received=qemu.received)

    async def replay_held(self, frames: Sequence[bytes]) -> None:
        (await self._vm.command("replay held")).holding = True

    async def replay(self, frames: Sequence[bytes]) -> None:
        qemu = await self._vm.command("replay")
        qemu.replayed += frames
        qemu.holding = False

    async def resume_after_restart(self) -> None:
        await self._vm.command("resume edge")


class FakeVm:
    """An agent's handle on a process; see ``hostagent.hypervisor.Vm`` for the contract."""

    def __init__(self, qemu: FakeQemu) -> None:
        self.qemu = qemu
        self.edge = FakeEdge(self)
        self.cut_off = False
        """The agent has crashed: nothing that it still does reaches the process."""
        self._nothing = EventFeed()

    @property
    def definition(self) -> VmDefinition:
        return self.qemu.definition

    @property
    def pid(self) -> int:
        return self.qemu.pid

    @property
    def console_path(self) -> Path:
        return self.qemu.folder / "console.log"

    def watch(self) -> AbstractContextManager[Watch]:
        return (self._nothing if self.cut_off else self.qemu.feed).watch()

    async def command(self, point: str) -> FakeQemu:
        """The process, once it has done what ``point`` names."""
        if self.cut_off:
            await hangs()
        if self.qemu.dead:
            raise Conflict(f"QEMU of VM {self.definition.name} is gone", "delete or restore the VM")
        await self.qemu.reach(point)
        if self.cut_off:
            await hangs()
        return self.qemu

    async def status(self) -> str:
        if self.qemu.dead:
            return FAILED
        return RUNNING if self.qemu.run_state == "running" else PAUSED

    async def run(self) -> None:
        qemu = await self.command("run")
        if qemu.run_state == "inmigrate":
            raise Conflict("the VM waits for an image")
        qemu.resume()

    async def pause(self) -> float:
        qemu = await self.command("pause")
        if qemu.run_state != "running":
            raise Conflict("the VM is not running")
        qemu.stop()
        return wall_s()

    async def ensure_running(self) -> bool:
        qemu = await self.command("resume")
        if qemu.run_state == "running":
            return False
        if qemu.status not in FINAL_MIGRATION_STATUSES:
            await qemu.cancel()
        qemu.resume()
        return True

    async def kill(self) -> None:
        await self.qemu.die()

    async def delete(self, keep_console: bool = False) -> None:
        await self.kill()
        if not keep_console:
            self.console_path.unlink(missing_ok=True)

    async def detach(self) -> None:
        self.cut_off = True

    async def refusal(self, strategy: str) -> str:
        qemu = await self.command("refusal")
        return qemu.refusals.get(strategy, "")

    async def prepare_migration(self, fd: int, strategy: str) -> None:
        """A fake has nothing to prepare."""

    async def start_migration(self, fd: int, strategy: str) -> None:
        qemu = await self.command("start")
        if strategy == "stop" and qemu.run_state == "running":
            raise MachineFault("strategy stop wants a paused VM")
        connection = socket.socket(fileno=os.dup(fd))
        connection.setblocking(False)
        qemu.migrate(connection, strategy)

    async def continue_migration(self) -> None:
        (await self.command("continue")).let_continue()

    async def cancel_migration(self, timeout_s: float = 10.0) -> str:
        qemu = await self.command("cancel")
        return await qemu.cancel()

    async def migration_progress(self) -> MigrationProgress:
        qemu = await self.command("progress")
        return MigrationProgress(qemu.status, qemu.sent_bytes, STREAM_BYTES, qemu.error)

    async def load(self, fd: int, timeout_s: float = 600.0) -> None:
        qemu = await self.command("load")
        connection = socket.socket(fileno=os.dup(fd))
        connection.setblocking(False)
        loop, parts = asyncio.get_running_loop(), []
        with connection:
            while part := await loop.sock_recv(connection, 1 << 20):
                parts.append(part)
        qemu.loaded = b"".join(parts)
        if not qemu.loaded.startswith(HEADER):
            await qemu.die()
            raise MachineFault(f"VM {self.definition.name} could not load its image")
        qemu.run_state = "paused"
