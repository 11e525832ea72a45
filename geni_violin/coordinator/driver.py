"""Drives one snapshot transaction: the interpreter of ``core.transaction``'s commands.

The order of effects, which everything rests on: an event comes in; ``step`` gives the next state and its commands; the
state is written to the journal, durable; only then do the commands leave. A crash between the two leaves a state whose
commands were never sent, which the recovery treats like commands whose answers were lost. Events that wait already and
ask for nothing are written down together with the one that does: the last answer of many is not behind all the others'
writes, while frames are held.

Commands run side by side, each in a task of its own that ends in one or more events. What they come to for the network,
the VMs and the images is in a module each.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any

import structlog

from geni_violin.coordinator.image_part import ImagePart
from geni_violin.coordinator.journal import Journal, SliceRecord, TransactionRecord
from geni_violin.coordinator.network_part import NetworkPart
from geni_violin.coordinator.ongoing import Ongoing
from geni_violin.coordinator.peers import Peers
from geni_violin.coordinator.vm_part import VmPart
from geni_violin.core.errors import GeniViolinError, MachineFault
from geni_violin.core.model import NetworkSlice
from geni_violin.core.transaction import FINAL, TransactionState, step
from geni_violin.core.transaction_events import (
    NETWORK,
    STORE,
    AdvanceNetwork,
    ArmNetwork,
    ArmVm,
    CancelVm,
    Command,
    CountFrames,
    CutVm,
    DisarmNetwork,
    DiscardImages,
    Event,
    PrepareNetwork,
    PrepareVm,
    PublishManifest,
    Refused,
    RetireColor,
    SealChannels,
    SetTimer,
    SettleVm,
    StageImages,
    TimerFired,
)
from geni_violin.runtime.clock import monotonic_ms

JOURNAL_PAUSE_S = 0.5

log = structlog.get_logger()


class TransactionDriver:
    """One transaction from its first command to its end.

    :param slice_record: the slice as it was when the transaction began.
    :param max_frame_lifetime_ms: how long a frame may be alive that no counter tells of.
    :param commands: what ``core.transaction.begin`` asked for; empty for one that is taken up again after a crash.
    """

    def __init__(
        self,
        record: TransactionRecord,
        slice_record: SliceRecord | None,
        journal: Journal,
        peers: Peers,
        max_frame_lifetime_ms: float,
        commands: tuple[Command, ...] = (),
    ) -> None:
        self._ongoing = Ongoing(record, slice_record)
        self._journal = journal
        self._first_commands = commands
        self._network = NetworkPart(self._ongoing, peers, max_frame_lifetime_ms)
        self._vms = VmPart(self._ongoing, peers)
        self._images = ImagePart(self._ongoing, peers.snapshot_server)
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = log.bind(transaction=record.id, slice=record.slice.name)

    @property
    def record(self) -> TransactionRecord:
        """The transaction, as last written."""
        return self._ongoing.record

    @property
    def over(self) -> bool:
        """Whether the transaction has come to its end."""
        return self._ongoing.over

    @property
    def received_bytes(self) -> dict[str, int]:
        """How much of each VM's image has arrived."""
        return self._ongoing.received_bytes

    def network(self) -> NetworkSlice:
        """The slice as the controller should have it now.

        :raise NotFound: the slice is gone.
        """
        return self._network.network()

    def post(self, event: Event) -> None:
        """Let the transaction know that something happened."""
        self._ongoing.post(event)

    def changes(self) -> AsyncIterator[None]:
        """Yield now and whenever there is something new to see, the last time when there will be nothing more."""
        return self._ongoing.changes()

    async def run(self) -> None:
        """Carry the transaction, whose present state is in the journal, to its end."""
        try:
            self._start(self._first_commands)
            while not self.over:
                await self._take(await self._ongoing.next_event())
        finally:
            for task in self._tasks:
                task.cancel()
            await self._ongoing.end()
        state = self.record.state
        self._log.info("transaction over", phase=state.phase.value, failure=state.failure)

    async def _take(self, event: Event | None) -> None:
        """Take this event and those that wait behind it, up to one that has something done; write once."""
        state, commands = self.record.state, tuple[Command, ...]()
        while event is not None:
            state, commands = step(state, event, monotonic_ms())
            self._log.debug("stepped", happened=type(event).__name__, phase=state.phase.value)
            event = None if commands or state.phase in FINAL else self._ongoing.waiting_event()
        if state != self.record.state:
            await self._save(state)
        self._start(commands)

    async def _save(self, state: TransactionState) -> None:
        """Write the state, however long that takes: nothing may leave before. The agents have their own deadlines."""
        record = replace(self.record, state=state)
        while True:
            try:
                await asyncio.to_thread(self._journal.save_transaction, record)
                break
            except MachineFault as error:
                self._log.error("the journal cannot be written; will try again", reason=str(error))
                await asyncio.sleep(JOURNAL_PAUSE_S)
        self._ongoing.record = record
        await self._ongoing.has_changed()

    def _start(self, commands: tuple[Command, ...]) -> None:
        for command in commands:
            task = asyncio.create_task(self._carry_out(command))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, command: Command) -> None:
        """Run a command; what goes wrong is a refusal by the party concerned."""
        party = _party(command)
        try:
            await self._interpret(command)
        except GeniViolinError as error:
            self._log.warning("refused", party=party, reason=str(error))
            self.post(Refused(party, str(error)))
        except Exception as error:
            self._log.exception("a command failed unexpectedly", command=type(command).__name__)
            self.post(Refused(party, f"{type(error).__name__}: {error}"))

    def _interpret(self, command: Command) -> Coroutine[Any, Any, None]:
        """What carries out a command.

        :raise TypeError: nobody does.
        """
        match command:
            case PrepareNetwork() | ArmNetwork() | RetireColor() | DisarmNetwork() | AdvanceNetwork() | CountFrames():
                return self._in_network(command)
            case PrepareVm():
                return self._vms.prepare(command)
            case ArmVm():
                return self._vms.arm(command)
            case CutVm():
                return self._vms.cut(command)
            case SettleVm():
                return self._vms.settle(command)
            case CancelVm():
                return self._vms.cancel(command)
            case StageImages():
                return self._images.stage(command)
            case SealChannels():
                return self._images.seal()
            case PublishManifest():
                return self._images.publish()
            case DiscardImages():
                return self._images.discard()
            case SetTimer():
                return self._set_timer(command)
        raise TypeError(f"no interpreter for {command!r}")

    def _in_network(self, command: Command) -> Coroutine[Any, Any, None]:
        match command:
            case PrepareNetwork():
                return self._network.prepare()
            case ArmNetwork():
                return self._network.arm(command)
            case RetireColor():
                return self._network.retire(command)
            case DisarmNetwork():
                return self._network.disarm(command)
            case AdvanceNetwork():
                return self._network.advance(command)
            case CountFrames():
                return self._network.count()
        raise TypeError(f"no interpreter for {command!r}")

    async def _set_timer(self, timer: SetTimer) -> None:
        await asyncio.sleep(max(0.0, timer.at_ms - monotonic_ms()) / 1000.0)
        self.post(TimerFired(timer.name))


def _party(command: Command) -> str:
    """Who a command is for."""
    match command:
        case PrepareVm() | ArmVm() | CutVm() | SettleVm() | CancelVm():
            return command.vm
        case StageImages() | SealChannels() | PublishManifest() | DiscardImages():
            return STORE
    return NETWORK
