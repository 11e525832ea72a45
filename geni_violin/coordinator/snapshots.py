"""The snapshot transactions that are under way, one a slice at most, and those of the past.

One cut at a time per slice is what the three colors rest on, so it is decided here, in one place and without awaiting
in between: a slice is *claimed* before anything is asked of anyone, and let go when its transaction is over.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Mapping

import structlog

from geni_violin.coordinator.driver import TransactionDriver
from geni_violin.coordinator.journal import Journal, SliceRecord, TransactionRecord
from geni_violin.coordinator.peers import Peers
from geni_violin.coordinator.views import transaction_view
from geni_violin.core.errors import AlreadyExists, Conflict, InvalidInput, NotFound
from geni_violin.core.messages import COORDINATIONS, NETWORK_POLICIES, STRATEGIES, SnapshotRequest, TransactionView
from geni_violin.core.model import NetworkSlice
from geni_violin.core.transaction import Options, begin
from geni_violin.core.transaction_events import (
    CancelRequested,
    Command,
    CoordinatorRestarted,
    Event,
    NetworkAdvanced,
)
from geni_violin.runtime.clock import monotonic_ms, wall_s
from geni_violin.runtime.settings import Settings

NAME_EXPECTED = "expected 1 to 63 small letters, digits, '.', '_' or '-', the first a letter or a digit"
"""As the snapshot server sees it; told before anything is begun."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

log = structlog.get_logger()


class Snapshots:
    """Takes snapshots and answers for them."""

    def __init__(self, settings: Settings, journal: Journal, peers: Peers) -> None:
        self._settings = settings
        self._journal = journal
        self._peers = peers
        self._drivers: dict[str, TransactionDriver] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._claimed: set[str] = set()

    def busy(self, slice_name: str) -> bool:
        """Whether a snapshot of the slice is under way."""
        return slice_name in self._claimed

    @property
    def any_under_way(self) -> bool:
        """Whether a snapshot of any slice is under way."""
        return bool(self._claimed)

    def claim(self, slice_name: str) -> None:
        """Keep snapshots away from a slice until :meth:`let_go`.

        :raise Conflict: one is under way.
        """
        if slice_name in self._claimed:
            raise Conflict(
                f"a snapshot or another change of slice {slice_name!r} is under way",
                "wait for it to end; geni-violin slice show tells the slice's state",
            )
        self._claimed.add(slice_name)

    def let_go(self, slice_name: str) -> None:
        """The end of a claim."""
        self._claimed.discard(slice_name)

    async def take(self, record: SliceRecord, request: SnapshotRequest) -> TransactionView:
        """Begin a snapshot.

        :raise Conflict: one is under way.
        :raise AlreadyExists: a snapshot has that name.
        :raise InvalidInput: there is no such strategy, policy, coordination or VM.
        """
        _check(record, request)
        self.claim(record.name)
        try:
            name = await self._free_name(record.name, request.name)
            driver = self._driver(record, request, name)
            await self._write_down(driver)
        except BaseException:
            self.let_go(record.name)
            raise
        self._launch(driver)
        return transaction_view(driver.record, {})

    async def _write_down(self, driver: TransactionDriver) -> None:
        """A transaction is in the journal before anybody hears of it; its name is taken while that is under way."""
        self._drivers[driver.record.id] = driver
        try:
            await asyncio.to_thread(self._journal.save_transaction, driver.record)
        except BaseException:
            del self._drivers[driver.record.id]
            raise

    def _driver(self, record: SliceRecord, request: SnapshotRequest, name: str) -> TransactionDriver:
        options = self._options(record, request)
        state, commands = begin(options, monotonic_ms())
        transaction = TransactionRecord(
            uuid.uuid4().hex[:16], name, record.spec, request, created_at=wall_s(), state=state
        )
        return self._made(transaction, record, commands)

    def _made(
        self, transaction: TransactionRecord, record: SliceRecord | None, commands: tuple[Command, ...] = ()
    ) -> TransactionDriver:
        """A driver. A frame takes each link once at most, so the delays of all bound how long it is under way."""
        links = record.spec.links if record is not None else ()
        lifetime_ms = self._settings.max_frame_lifetime_ms + sum(link.delay_ms for link in links)
        return TransactionDriver(transaction, record, self._journal, self._peers, lifetime_ms, commands)

    def _options(self, record: SliceRecord, request: SnapshotRequest) -> Options:
        settings = self._settings
        return Options(
            vms=tuple(vm.name for vm in record.spec.vms),
            epoch=record.epoch + (1 if request.coordination == "color" else 0),
            coordination=request.coordination,
            strategy=request.strategy,
            network=request.network,
            delays_ms=request.delays_ms,
            prepare_deadline_ms=settings.prepare_deadline_ms,
            cut_deadline_ms=settings.cut_deadline_ms,
            stream_deadline_ms=settings.stream_deadline_ms,
        )

    async def _free_name(self, slice_name: str, wanted: str) -> str:
        taken = {manifest.name for manifest in await self._peers.snapshot_server.snapshots()}
        taken |= {driver.record.name for driver in self._drivers.values() if not driver.over}
        if wanted in taken:
            raise AlreadyExists(f"there is a snapshot named {wanted!r} already", "choose another name")
        if wanted:
            return wanted
        return next(name for number in range(1, 10**9) if (name := f"{slice_name}-{number}") not in taken)

    def recover(self) -> None:
        """Take up every transaction that a crash left unfinished."""
        for record in self._journal.unfinished():
            try:
                slice_record = self._journal.slice(record.slice.name)
            except NotFound:
                slice_record = None
            driver = self._made(record, slice_record)
            driver.post(CoordinatorRestarted())
            self._claimed.add(record.slice.name)
            self._launch(driver)

    def _launch(self, driver: TransactionDriver) -> None:
        self._drivers[driver.record.id] = driver
        self._tasks[driver.record.id] = asyncio.create_task(self._run(driver))

    async def _run(self, driver: TransactionDriver) -> None:
        """Run a transaction; its slice is free again only when it is over."""
        name = driver.record.slice.name
        try:
            await driver.run()
        except Exception:
            log.exception("a transaction stands still until the coordinator restarts", id=driver.record.id, slice=name)
            return
        self.let_go(name)
        del self._tasks[driver.record.id], self._drivers[driver.record.id]

    def network(self, record: SliceRecord) -> NetworkSlice:
        """A slice as the controller should have it now, also in the middle of a snapshot."""
        for driver in self._drivers.values():
            if driver.record.slice.name == record.name:
                return driver.network()
        return record.network_at(record.epoch)

    def view(self, transaction_id: str) -> TransactionView:
        """A transaction, under way or past.

        :raise NotFound: there is none of that id.
        """
        driver = self._drivers.get(transaction_id)
        if driver is not None:
            return transaction_view(driver.record, driver.received_bytes)
        return transaction_view(self._journal.transaction(transaction_id), {})

    async def follow(self, transaction_id: str) -> AsyncIterator[TransactionView]:
        """A transaction whenever something is new, up to its end."""
        driver = self._drivers.get(transaction_id)
        if driver is None:
            yield self.view(transaction_id)
            return
        async for _ in driver.changes():
            yield transaction_view(driver.record, driver.received_bytes)

    async def cancel(self, slice_name: str, reason: str, patience_s: float) -> bool:
        """Abandon the snapshot of a slice, if one is under way; whether it has ended in time."""
        return await self._tell(slice_name, CancelRequested(reason), patience_s)

    async def give_up(self, slice_name: str, patience_s: float) -> None:
        """End an abort that waits for the network, once the slice has no VM any more: no port of it has a color.

        :raise Conflict: it has not ended in time.
        """
        if not await self._tell(slice_name, NetworkAdvanced(), patience_s):
            raise Conflict(
                f"a snapshot of slice {slice_name!r} is still being aborted",
                "it ends when the snapshot server answers again",
            )

    async def _tell(self, slice_name: str, event: Event, patience_s: float) -> bool:
        """Post an event to the slice's transaction under way; whether none is under way after a while."""
        drivers = [driver for driver in self._drivers.values() if driver.record.slice.name == slice_name]
        tasks = {self._tasks[driver.record.id] for driver in drivers if driver.record.id in self._tasks}
        for driver in drivers:
            driver.post(event)
        return not tasks or not (await asyncio.wait(tasks, timeout=patience_s))[1]

    async def close(self) -> None:
        """Stop driving; what is unfinished is taken up by the next start."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


def _check(record: SliceRecord, request: SnapshotRequest) -> None:
    choices: Mapping[str, tuple[str, tuple[str, ...]]] = {
        "strategy": (request.strategy, STRATEGIES),
        "network policy": (request.network, NETWORK_POLICIES),
        "coordination": (request.coordination, COORDINATIONS),
    }
    for what, (value, known) in choices.items():
        if value not in known:
            raise InvalidInput(f"there is no {what} {value!r}", f"choose from {', '.join(known)}")
    if request.name and not _NAME.fullmatch(request.name):
        raise InvalidInput(f"{request.name!r} cannot be a snapshot's name", NAME_EXPECTED)
    unknown = request.delays_ms.keys() - {vm.name for vm in record.spec.vms}
    if unknown:
        raise InvalidInput(f"slice {record.name!r} has no VM {', '.join(sorted(unknown))}")
    if any(not 0 <= delay <= 60_000 for delay in request.delays_ms.values()):
        raise InvalidInput("a delay is out of range", "expected 0 to 60000 ms")
