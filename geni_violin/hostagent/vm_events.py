"""What happened to a VM, in the order in which it happened.

Theory of operation. A hypervisor adapter publishes events into one :class:`EventFeed` a VM. Whoever wants to follow
opens a watch *before* it starts what it wants to see the end of; from then on no event is lost to it, and several
watches never take events from each other. Publishing is synchronous: an event is in every watch's queue before the
answer to a command that caused it reaches the caller.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Stopped:
    """The VM's processors stopped. ``at`` is the hypervisor's own time stamp, in seconds since 1970."""

    at: float


@dataclass(frozen=True)
class Resumed:
    """The VM's processors run again. ``at`` as in :class:`Stopped`."""

    at: float


@dataclass(frozen=True)
class MigrationStatus:
    """A migration, outgoing or incoming, moved on. ``status`` is one of QEMU's own words (QMP's type of that name)."""

    status: str
    at: float


@dataclass(frozen=True)
class Died:
    """The VM's process is gone. ``reason`` is the last line that it wrote to stderr, or empty."""

    at: float
    reason: str


VmEvent = Stopped | Resumed | MigrationStatus | Died

FINAL_MIGRATION_STATUSES = frozenset({"none", "completed", "failed", "cancelled"})
"""A migration with such a status is over: its thread has ended and changes the VM's state no more."""


class Watch:
    """One follower's queue of events."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[VmEvent] = asyncio.Queue()

    def put(self, event: VmEvent) -> None:
        """Add an event; only :class:`EventFeed` calls this."""
        self._queue.put_nowait(event)

    async def next(self) -> VmEvent:
        """The next event, when there is one."""
        return await self._queue.get()

    async def until(self, wanted: Callable[[VmEvent], bool], timeout_s: float) -> VmEvent:
        """The first event that is ``wanted``; events before it are consumed.

        :raise TimeoutError: none came in time.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                event = await self.next()
                if wanted(event):
                    return event

    def pending(self) -> list[VmEvent]:
        """All events that are there by now, consumed."""
        events = []
        while not self._queue.empty():
            events.append(self._queue.get_nowait())
        return events

    async def __aiter__(self) -> AsyncIterator[VmEvent]:
        while True:
            yield await self.next()


class EventFeed:
    """Gives every event to every watch that is open."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []

    def publish(self, event: VmEvent) -> None:
        """Put an event into every watch."""
        for watch in self._watches:
            watch.put(event)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        """A watch that sees every event from the beginning of the block to its end."""
        watch = Watch()
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)
