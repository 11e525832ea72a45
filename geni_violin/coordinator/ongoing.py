"""A transaction while it runs: its record, what is said about it, and who follows it.

The driver owns the record and is the only one that changes it. Whoever carries out a command reads it, and posts what
happened; the driver takes the events in the order in which they were posted.
"""

import asyncio
from collections.abc import AsyncIterator

from geni_violin.coordinator.journal import SliceRecord, TransactionRecord
from geni_violin.core.messages import Staged
from geni_violin.core.transaction import FINAL, TransactionState
from geni_violin.core.transaction_events import Event


class Ongoing:
    """One transaction. ``received_bytes`` of the images, by VM, is for people only and is not written down.

    :param slice_record: the slice as it was when the transaction began; None if it is gone.
    """

    def __init__(self, record: TransactionRecord, slice_record: SliceRecord | None) -> None:
        self.record = record
        self.slice_record = slice_record
        self.staged: Staged | None = None
        """Where the images go; None in a coordinator that did not stage them itself."""
        self.received_bytes: dict[str, int] = {}
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._changed = asyncio.Condition()
        self._changes = 0
        self._ended = False

    @property
    def state(self) -> TransactionState:
        """The transaction's state, as last written."""
        return self.record.state

    @property
    def over(self) -> bool:
        """Whether the transaction has come to its end."""
        return self.state.phase in FINAL

    def post(self, event: Event) -> None:
        """Let the transaction know that something happened."""
        self._events.put_nowait(event)

    async def next_event(self) -> Event:
        """What happened next; waits for it."""
        return await self._events.get()

    def waiting_event(self) -> Event | None:
        """What happened next, if it has happened already."""
        return None if self._events.empty() else self._events.get_nowait()

    async def has_changed(self) -> None:
        """There is something new to see."""
        async with self._changed:
            self._changes += 1
            self._changed.notify_all()

    async def end(self) -> None:
        """There will be nothing new any more."""
        self._ended = True
        await self.has_changed()

    async def changes(self) -> AsyncIterator[None]:
        """Yield now and whenever there is something new to see, the last time when there will be nothing more."""
        seen = -1
        while not (self._ended and seen == self._changes):
            async with self._changed:
                while seen == self._changes:
                    await self._changed.wait()
                seen = self._changes
            yield
