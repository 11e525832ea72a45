"""Carries out the cut of one VM: the interpreter of ``core.cut``'s commands.

Theory of operation. What happens to the VM comes from its watch, what the commands bring comes from their outcomes;
both become events of the core's machine, whose answers are carried out in order by one worker, so that no two commands
to a VM overlap. The recolor alone runs beside it, because a controller that hangs must not keep the VM from being
resumed.

Before anything is done to the VM the connection to the snapshot server is open and a mark is on disk. The mark says "a
cut is under way": an agent that starts and finds one undoes the cut, so that a crash leaves no VM paused or held for
longer than the agent is away.

The image of a VM that runs meanwhile leaves slowly at first, until others of its slice have had the time for their cuts
too: streams at full speed take the processors, and QEMU waits for its own wherever it writes to memory that has not
left yet. Slowly is by TCP's pacing, so that the stream's thread sleeps, and looks often what is waited for.

An armed edge outlives a cut that is cancelled: it then passes every frame on, because the network still sends them
tagged, until :class:`~geni_violin.hostagent.cuts.Cuts` is told to settle.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from geni_violin.core.cut import (
    FINAL,
    Action,
    CancelRequested,
    Command,
    CutRequested,
    CutState,
    DeadlinePassed,
    EdgeArmed,
    Event,
    FramesHeld,
    FramesReleased,
    FutureFrameSeen,
    MigrationCompleted,
    MigrationEnded,
    MigrationPaused,
    NetworkDisarmed,
    PathReturned,
    Phase,
    PortsRecolored,
    Report,
    SetDeadline,
    StepFailed,
    VmDied,
    VmResumed,
    VmStopped,
    begin,
    plan_for,
    step,
)
from geni_violin.core.errors import GeniViolinError, MachineFault, NotFound, PeerFault
from geni_violin.core.messages import CutProgress, CutReport, CutRequest, StreamReport
from geni_violin.hostagent.edge import EdgeRecord
from geni_violin.hostagent.hypervisor import FAILED, Vm
from geni_violin.hostagent.vm_events import Died, MigrationStatus, Resumed, Stopped, VmEvent
from geni_violin.runtime.clock import monotonic_ms, wall_s
from geni_violin.runtime.processes import write_atomically
from geni_violin.runtime.sockets import end_pace, enlarge_buffers, pace

CONNECT_PATIENCE_S = 5.0
STALL_LOOK_S = 0.5
"""How often the stream of an image is looked at."""
RECOLOR_PAUSE_S = 0.02
"""Before a recolor that the controller could not confirm is asked for again: it may have been restarted."""
_STREAM_BUFFER_BYTES = 16 << 20
"""What QEMU can send of an image before the snapshot server reads, once it is not paced: the guest waits, where it
writes to memory that has not left yet, and so does QEMU's main loop."""
_PACE_BYTES_PER_S, _PACED_UNSENT_BYTES = 150_000_000, 64 << 10
_PACED_AFTER_CUT_S = 1.0
"""How fast the image of a VM leaves that runs meanwhile, and for how long; small ones have left by then."""
_MARK = "cut-under-way"
_LET_GO = (Action.RESUME_VM, Action.RELEASE_FRAMES)

log = structlog.get_logger()

Recolor = Callable[[], Awaitable[None]]
"""Moves the VM's ports on to the new epoch; returns once every switch has confirmed."""


def mark_of(vm: Vm) -> Path:
    """The file that says that a cut of this VM is under way."""
    return vm.console_path.parent / _MARK


async def undo_interrupted_cut(vm: Vm) -> bool:
    """What an agent does at its start for each VM: end a migration, let the VM run, let its frames go.

    :return: whether there was something to undo.
    """
    if not mark_of(vm).exists():
        return False
    if await vm.status() != FAILED:
        with contextlib.suppress(MachineFault):  # then ensure_running ends what keeps the VM from running
            await vm.cancel_migration()
        await vm.ensure_running()
        await vm.edge.release()
    mark_of(vm).unlink()
    return True


def open_image_stream(host: str, port: int, preface: dict[str, str]) -> socket.socket:
    """A connection to the snapshot server that is ready for an image, in the direction that ``preface`` says. Blocks.

    :raise PeerFault: the snapshot server does not answer, or refuses; with its words.
    """
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_PATIENCE_S)
    except OSError as error:
        raise PeerFault(f"the snapshot server at {host}:{port} takes no connection: {error}") from error
    try:
        connection.sendall(json.dumps(preface).encode() + b"\n")
        answer = json.loads(_read_line(connection))
    except (OSError, ValueError) as error:
        connection.close()
        raise PeerFault(f"the snapshot server at {host}:{port} broke off: {error}") from error
    if not answer.get("ok"):
        connection.close()
        raise PeerFault(f"the snapshot server refuses the image: {answer.get('error', answer)}")
    connection.settimeout(None)
    enlarge_buffers(connection, send_bytes=_STREAM_BUFFER_BYTES)
    return connection


def _read_line(connection: socket.socket) -> bytes:
    """One line, byte by byte: what follows belongs to QEMU."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 4096:
            raise ValueError("no answer line")
        line += byte
    return bytes(line)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, GeniViolinError) else f"{type(error).__name__}: {error}"


class CutRunner:
    """One cut of one VM, from the request to the end of its image's stream."""

    def __init__(self, vm: Vm, request: CutRequest, recolor: Recolor) -> None:
        self.request = request
        self._vm = vm
        self._recolor = recolor
        plan = plan_for(request.strategy, request.network, request.coordination, vm.edge.place)
        self._state = CutState(plan, request.cut_deadline_ms, request.stream_deadline_ms)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._actions: asyncio.Queue[Action] = asyncio.Queue()
        self._reports: set[Report] = set()
        self.record: EdgeRecord | None = None
        """What the edge did, once it has stepped aside."""
        self._changed = asyncio.Condition()
        self._connection: socket.socket | None = None
        self._helpers: list[asyncio.Task[None]] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._task: asyncio.Task[None] | None = None
        self._over = False
        self._log = log.bind(vm=vm.definition.name, slice=vm.definition.slice, transaction=request.transaction)

    @property
    def over(self) -> bool:
        """Whether the cut and its stream have ended, in whatever way, and all is cleaned up."""
        return self._over

    @property
    def _is_paced(self) -> bool:
        """Whether its image leaves slowly at first: only that of a VM that runs meanwhile."""
        return self.request.strategy == "background"

    async def start(self) -> None:
        """Connect to the snapshot server and begin.

        :raise PeerFault: the snapshot server is not ready; nothing has been done to the VM then.
        :raise MachineFault: the mark cannot be written; nothing has been done to the VM then.
        """
        request = self.request
        preface = {"put": request.token}
        address = (request.ingest_host, request.ingest_port)
        self._connection = await asyncio.to_thread(open_image_stream, *address, preface)
        try:
            await asyncio.to_thread(write_atomically, mark_of(self._vm), request.transaction.encode())
        except OSError as error:
            self._close_connection()
            raise MachineFault(f"the cut of VM {self._vm.definition.name} cannot be noted: {error}") from error
        try:
            await self._vm.prepare_migration(self._connection.fileno(), request.strategy)
        except GeniViolinError:
            self._close_connection()
            mark_of(self._vm).unlink(missing_ok=True)
            raise
        self._task = asyncio.create_task(self._run())

    def cancel(self, reason: str) -> None:
        """Undo the cut; nothing happens if it is over."""
        self._events.put_nowait(CancelRequested(reason))

    def request_cut(self) -> None:
        """The coordinator's trigger, with the delay that it asks for."""
        self._events.put_nowait(CutRequested(self.request.delay_ms))

    def network_disarmed(self) -> None:
        """The network gives the VM's ports frames without a tag again."""
        self._events.put_nowait(NetworkDisarmed())

    async def until(self, report: Report) -> None:
        """Return when that is reported, or the cut is over in whatever way."""
        async with self._changed:
            await self._changed.wait_for(lambda: report in self._reports or self._over)

    async def until_over(self, timeout_s: float) -> None:
        """Return when the cut is over, or time is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._over)

    async def progress(self) -> CutProgress:
        """What there is to tell by now."""
        state, name = self._state, self._vm.definition.name
        cut = streamed = None
        if Report.CUT in self._reports:
            cut = CutReport(
                name, state.stopped_at or 0.0, state.downtime_ms, state.recolor_ms, state.hold_ms, state.trigger
            )
        if Report.STREAMED in self._reports and self._over:
            streamed = StreamReport(name, state.downtime_ms, state.sent_bytes)
        return CutProgress(state.phase.value, cut, streamed, state.failure, state.sent_bytes)

    # the machine

    async def _run(self) -> None:
        with self._vm.watch() as watch:
            self._helpers = [asyncio.create_task(self._work()), asyncio.create_task(self._listen(watch.next))]
            try:
                await self._step_through()
            finally:
                await self._wind_up()
                self._over = True
                async with self._changed:
                    self._changed.notify_all()

    async def _step_through(self) -> None:
        state, commands = begin(self._state, monotonic_ms())
        await self._take(state, commands)
        while self._state.phase not in FINAL:
            event = await self._events.get()
            self._log.debug("cut event", happened=type(event).__name__)
            state, commands = step(self._state, event, monotonic_ms())
            await self._take(state, commands)

    async def _take(self, state: CutState, commands: tuple[Command, ...]) -> None:
        """Send the commands first: reports are for people and peers, commands are for the guest that waits."""
        self._state = state
        for command in commands:
            match command:
                case Action.RECOLOR_PORTS:
                    self._helpers.append(asyncio.create_task(self._recolor_ports()))
                case Action():
                    self._actions.put_nowait(command)
                case SetDeadline(name, at_ms):
                    self._set_timer(name, at_ms)
                case Report():
                    self._reports.add(command)
                    if command is Report.CUT and self._is_paced:
                        self._call_later(_PACED_AFTER_CUT_S, self._let_stream_go)
        async with self._changed:
            self._changed.notify_all()

    def _set_timer(self, name: str, at_ms: float) -> None:
        delay_s = max(0.0, at_ms - monotonic_ms()) / 1000.0
        self._call_later(delay_s, self._events.put_nowait, DeadlinePassed(name))

    def _call_later(self, delay_s: float, call: Callable[..., None], *arguments: object) -> None:
        """Unless the cut is over by then."""
        self._timers.append(asyncio.get_running_loop().call_later(delay_s, call, *arguments))

    async def _wind_up(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for helper in self._helpers:
            helper.cancel()
        await asyncio.gather(*self._helpers, return_exceptions=True)
        self._close_connection()
        if self._state.phase in FINAL:  # an agent that is stopped in the middle leaves the mark to the next one
            mark_of(self._vm).unlink(missing_ok=True)
        self._log.info("cut over", phase=self._state.phase.value, failure=self._state.failure)

    # what comes from the VM

    async def _listen(self, next_event: Callable[[], Awaitable[VmEvent]]) -> None:
        while True:
            happened = await next_event()
            try:
                event = await self._translated(happened)
            except Exception as error:  # a listener that stops would miss the VM's end
                event = StepFailed(_words(error))
            if event is not None:
                self._events.put_nowait(event)

    async def _translated(self, event: VmEvent) -> Event | None:
        """What a happening at the VM is to the core's machine; None if it is nothing."""
        match event:
            case Stopped(at):
                return VmStopped(at)
            case Resumed(at):
                return VmResumed(at)
            case Died():
                return VmDied()
            case MigrationStatus("pre-switchover"):
                return MigrationPaused()
            case MigrationStatus("completed"):
                self._close_connection()  # or the receiver would not see the end
                return MigrationCompleted((await self._vm.migration_progress()).transferred_bytes)
            case MigrationStatus("failed" | "cancelled" as status):
                return StepFailed(await self._migration_failure(status))
        return None

    async def _migration_failure(self, status: str) -> str:
        with contextlib.suppress(GeniViolinError):
            words = (await self._vm.migration_progress()).error
            return f"the migration {status}: {words}" if words else f"the migration {status}"
        return f"the migration {status}"

    # what is done to the VM

    async def _work(self) -> None:
        """Carry out actions, one after the other."""
        while True:
            event = await self._outcome(await self._actions.get())
            if event is not None:
                self._events.put_nowait(event)

    async def _outcome(self, action: Action) -> Event | None:
        """What an action comes to. When a cut is undone, what lets the guest go on is tried until it works.

        Whatever an adapter raises, also by a defect, must not leave the guest paused or held: so it is all caught.
        """
        pause_s = 0.05
        while True:
            try:
                return await self._act(action)
            except Exception as error:
                reason = _words(error)
                self._log.warning("an action failed", action=action.value, reason=reason)
            if action is Action.CANCEL_MIGRATION:
                return MigrationEnded()
            if self._state.phase is not Phase.CANCELLING or action not in _LET_GO:
                return StepFailed(reason)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    async def _act(self, action: Action) -> Event | None:
        """Carry out one action; the event that confirms it, or None if the VM's watch brings that."""
        match action:
            case Action.ARM_EDGE:
                await self._vm.edge.arm(self.request.vlan_id, self.request.epoch, self._future_frame_seen)
                return EdgeArmed()
            case Action.HOLD_FRAMES | Action.HOLD_INBOUND:
                await self._vm.edge.hold()
                return FramesHeld()
            case Action.RELEASE_FRAMES:
                await self._vm.edge.release()
                return FramesReleased()
            case Action.RETURN_PATH:
                self.record = await self._vm.edge.return_path()
                return PathReturned()
        return await self._act_on_vm(action)

    def _future_frame_seen(self) -> None:
        if self.request.second_trigger:
            self._events.put_nowait(FutureFrameSeen())

    async def _act_on_vm(self, action: Action) -> Event | None:
        match action:
            case Action.PAUSE_VM:
                await self._vm.pause()
            case Action.START_MIGRATION:
                await self._start_migration()
            case Action.CONTINUE_MIGRATION:
                await self._vm.continue_migration()
            case Action.RESUME_VM:
                return None if await self._vm.ensure_running() else VmResumed(wall_s())
            case Action.CANCEL_MIGRATION:
                await self._vm.cancel_migration()
                return MigrationEnded()
        return None

    async def _start_migration(self) -> None:
        if self._connection is None:
            raise PeerFault("the connection to the snapshot server is closed")
        if self._is_paced:
            pace(self._connection, _PACE_BYTES_PER_S, _PACED_UNSENT_BYTES)
        await self._vm.start_migration(self._connection.fileno(), self.request.strategy)
        if not self._is_paced:
            self._close_connection()
        self._helpers.append(asyncio.create_task(self._watch_stream()))

    async def _watch_stream(self) -> None:
        """Give up on a stream that does not move: a stalled receiver stops the guest's writes without any event.

        When the stream has ended the cut need not be over: its edge may have to wait for the network.
        """
        sent_bytes, moved_ms = -1, monotonic_ms()
        while MigrationCompleted not in self._state.seen:
            if monotonic_ms() - moved_ms > self.request.cut_deadline_ms:
                words = "the image's stream does not move; the snapshot server may be stalled"
                self._events.put_nowait(StepFailed(words))
                return
            with contextlib.suppress(Exception):  # no answer is no movement
                async with asyncio.timeout(STALL_LOOK_S):
                    progress = await self._vm.migration_progress()
                if progress.transferred_bytes != sent_bytes:
                    sent_bytes, moved_ms = progress.transferred_bytes, monotonic_ms()
            await asyncio.sleep(STALL_LOOK_S)

    def _let_stream_go(self) -> None:
        """Have the rest of the image leave as fast as it can."""
        if self._connection is not None:
            end_pace(self._connection)
            self._close_connection()

    def _close_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _recolor_ports(self) -> None:
        """Recolor, as often as it takes: a controller may come back before the cut's deadline."""
        began_ms = monotonic_ms()
        while True:
            try:
                await self._vm.edge.until_sent_is_colored()
                await self._recolor()
                break
            except (PeerFault, NotFound) as error:
                self._log.warning("the recolor was not confirmed; will try again", reason=_words(error))
                await asyncio.sleep(RECOLOR_PAUSE_S)
            except Exception as error:
                self._events.put_nowait(StepFailed(f"the recolor was not confirmed: {_words(error)}"))
                return
        self._events.put_nowait(PortsRecolored(monotonic_ms() - began_ms))
