"""Follows a background snapshot, and undoes QEMU's write protection when it ends in any other way than completed.

Theory of operation. :mod:`geni_violin.hostagent.qemu_userfault` says why. The protection can appear late: a
cancellation that comes before QEMU stopped the VM is only heeded after it protected the memory and resumed, with the
main loop already hanging, so that the final status never comes by itself. Hence a task works from the first sign of a
bad end (``cancelling``, ``failed``, ``cancelled``), again and again until the final status is there, and once more
after it.

One trace of a bad end is inside QEMU, out of reach: it goes on to take the memory for protected (its flag
RAM_UF_WRITEPROTECT stays), and every migration of another kind fails until one in the background has completed.
:attr:`MemoryTracking.stale` tells.
"""

import asyncio

import structlog

from geni_violin.hostagent.qemu_userfault import break_streams, undo_write_protection
from geni_violin.hostagent.vm_events import FINAL_MIGRATION_STATUSES, Died, MigrationStatus, VmEvent

_PERIOD_S = 0.01
_AFTERMATH_S = 0.05
_GIVE_UP_S = 30.0
_BAD_SIGNS = frozenset({"cancelling", "cancelled", "failed"})

_log = structlog.get_logger()


class MemoryTracking:
    """The protection of one VM's memory by background snapshots.

    :param vm: the VM's name, for the log.
    :param pid: its process.
    """

    def __init__(self, vm: str, pid: int) -> None:
        self._vm = vm
        self._pid = pid
        self.stale = False
        """Whether QEMU still takes memory for protected that is not."""
        self._in_background = False
        self._over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self, in_background: bool) -> None:
        """A migration is about to start."""
        self._in_background = in_background
        self._over.clear()

    def observe(self, event: VmEvent) -> None:
        """Take note of an event; starts to undo at a bad sign."""
        if isinstance(event, Died):
            self._over.set()
        elif isinstance(event, MigrationStatus) and self._in_background:
            if event.status in FINAL_MIGRATION_STATUSES:
                self._over.set()
            if event.status == "completed":
                self.stale = False
            if event.status in _BAD_SIGNS:
                self.undo()

    def abandon(self) -> None:
        """End a migration that QEMU cannot be told to cancel, and start to undo."""
        broken = break_streams(self._pid)
        _log.warning("migration_abandoned", vm=self._vm, pid=self._pid, broken_streams=broken)
        self.undo()

    def undo(self) -> None:
        """Start to undo, unless that is under way."""
        self.stale = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._undo())

    def finish(self) -> None:
        """The migration ended badly before this handle was made: undo what it may have left."""
        self._over.set()
        self.undo()

    async def settled(self) -> None:
        """Return when nothing is left to undo."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def close(self) -> None:
        """Stop working; returns when nothing works any more."""
        self._over.set()
        await self.settled()

    async def _undo(self) -> None:
        released = 0
        deadline = asyncio.get_running_loop().time() + _GIVE_UP_S
        try:
            while not self._over.is_set() and asyncio.get_running_loop().time() < deadline:
                released += await self._undo_once()
                await asyncio.sleep(_PERIOD_S)
            released += await self._undo_once()
            await asyncio.sleep(_AFTERMATH_S)
            released += await self._undo_once()
        except OSError as error:
            _log.error("memory_stays_protected", vm=self._vm, pid=self._pid, reason=str(error))
        else:
            _log.info("memory_protection_undone", vm=self._vm, ranges=released)

    async def _undo_once(self) -> int:
        return await asyncio.to_thread(undo_write_protection, self._pid)
