"""VMs run by QEMU itself, over its monitor. The adapter behind :mod:`geni_violin.hostagent.hypervisor`.

Theory of operation. A handle (:class:`QemuVm`) is a process that is observed, a monitor connection and a feed of
events; all state that matters is in QEMU and in the VM's folder, so a handle can be dropped and made again at any time,
by another agent process too. ``docs/qemu-migration-notes.md`` has the order of events of each strategy, and the state
that each way of failing leaves a VM in; the methods here rest on it.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog

from geni_violin.core.errors import AlreadyExists, Conflict, GeniViolinError, MachineFault, NotFound
from geni_violin.hostagent import hypervisor, qemu_process
from geni_violin.hostagent.frame_pump import FramePump
from geni_violin.hostagent.hold_port_edge import HoldPortEdge
from geni_violin.hostagent.hypervisor import MigrationProgress, VmDefinition
from geni_violin.hostagent.qemu_edge import QemuEdge
from geni_violin.hostagent.qemu_monitor import CommandRefused, NoAnswer, QemuMonitor
from geni_violin.hostagent.qemu_process import QemuProcess, VmFolder
from geni_violin.hostagent.qemu_threads import QemuThreads
from geni_violin.hostagent.qemu_tracking import MemoryTracking
from geni_violin.hostagent.qemu_userfault import has_userfaultfd, undo_refusal
from geni_violin.hostagent.vm_events import (
    FINAL_MIGRATION_STATUSES,
    Died,
    EventFeed,
    MigrationStatus,
    Resumed,
    Stopped,
    VmEvent,
    Watch,
)
from geni_violin.runtime import clock
from geni_violin.runtime.processes import Ledger

log = structlog.get_logger()

_DESCRIPTOR = "image"
_GONE = "gone"
_BANDWIDTH_BYTES_PER_S = 1 << 40
"""No limit: QEMU's own default of 128 MiB/s would make every stream last."""
_PRECOPY_DOWNTIME_LIMIT_MS = 1_000
_EVENT_PATIENCE_S = 10.0
_DEATH_PATIENCE_S = 0.5
_CANCEL_ANSWER_S = 1.0
_HEALING_PATIENCE_S = 60.0
_REATTACH_ANSWER_S = 2.0
_CAPABILITIES = {
    "background": {"background-snapshot": True, "pause-before-switchover": False},
    "precopy": {"background-snapshot": False, "pause-before-switchover": True},
    "stop": {"background-snapshot": False, "pause-before-switchover": False},
}
_NOT_FINALIZED = "not finalized"
"""Of QEMU's words for a VM whose migration is not quite done (``qmp_cont``)."""
_FINALIZING_PATIENCE_S, _FINALIZING_LOOK_S = 1.0, 0.001


async def resume(execute: Callable[[str], Awaitable[Any]]) -> None:
    """Have a VM run that is paused.

    QEMU tells that a migration has completed a moment before it is done with it, and till then refuses.

    :raise CommandRefused: it refuses for another reason, or the moment is too long.
    """
    deadline = asyncio.get_running_loop().time() + _FINALIZING_PATIENCE_S
    while True:
        try:
            await execute("cont")
            return
        except CommandRefused as refused:
            if _NOT_FINALIZED not in refused.words or asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(_FINALIZING_LOOK_S)


class QemuVm:
    """A handle on one VM; see :class:`~geni_violin.hostagent.hypervisor.Vm` for every public method's contract."""

    def __init__(
        self,
        definition: VmDefinition,
        folder: VmFolder,
        ledger: Ledger,
        process: QemuProcess | None,
        pump: FramePump,
    ) -> None:
        self.definition = definition
        self._folder = folder
        self._ledger = ledger
        self._process = process
        self._feed = EventFeed()
        self._tracking = MemoryTracking(definition.name, self.pid)
        self._threads = QemuThreads(self.pid)
        self._monitor = QemuMonitor(definition.name, self._publish)
        self.edge = self._made_edge(pump)
        self._prepared_strategy = ""
        self._given_fd: int | None = None

    def _made_edge(self, pump: FramePump) -> QemuEdge | HoldPortEdge:
        """In QEMU's filters, or in the switch. With vhost QEMU knows nothing of what the guest has not taken."""
        definition, folder = self.definition, self._folder.path
        taps = [nic.tap for nic in definition.nics]
        in_qemu = QemuEdge(self._execute, self._monitor.pass_descriptor, folder, taps, pump)
        if not any(nic.hold_tap for nic in definition.nics):
            return in_qemu
        until_consumed = _nothing_to_wait_for if definition.vhost else in_qemu.until_rings_have_room
        return HoldPortEdge(definition.nics, folder, lambda: self.pid, pump, until_consumed)

    @property
    def pid(self) -> int:
        return self._process.record.pid if self._process else 0

    @property
    def console_path(self) -> Path:
        return self._folder.console

    @property
    def _is_gone(self) -> bool:
        return self._process is None or self._process.is_gone

    async def open(self) -> None:
        """Observe the process, which was just started, and connect to its monitor. Called once, by the hypervisor.

        :raise MachineFault: QEMU ended, with its own last words, or does not open its monitor.
        """
        assert self._process is not None
        self._process.observe(self._publish_death)
        try:
            await self._connect()
            await self._hurry()
            await self._set_capabilities({"events": True})
        except GeniViolinError as error:
            if await self._process.gone_within(_DEATH_PATIENCE_S):
                words = self._folder.last_error_line() or "it says nothing"
                raise MachineFault(f"QEMU of VM {self.definition.name} did not start: {words}") from error
            raise

    async def reopen(self) -> None:
        """As :meth:`open`, for a VM that was started earlier; a dead one is fine.

        An earlier agent may have died in the middle of a snapshot, so the VM may hang as ``qemu_userfault`` tells.
        """
        if self._process is None:
            return
        self._process.observe(self._publish_death)
        if self._process.is_gone:
            return
        try:
            await self._connect(_REATTACH_ANSWER_S)
        except NoAnswer:
            self._tracking.abandon()
            await self._connect()
        self._tracking.begin(in_background=True)
        self._tracking.stale = has_userfaultfd(self.pid)
        if (await self.migration_progress()).status in ("failed", "cancelled"):
            self._tracking.finish()
            await self._tracking.settled()
        await self._hurry()

    async def _connect(self, timeout_s: float = 15.0) -> None:
        await self._monitor.connect(self._folder.path, lambda: self._is_gone, timeout_s)

    async def _hurry(self) -> None:
        """Have QEMU's own threads go before the guest's processors, all of which are there by now."""
        processors = await self._execute("query-cpus-fast")
        self._threads.hurry_all_but(int(processor["thread-id"]) for processor in processors)

    def _publish(self, event: VmEvent) -> None:
        self._tracking.observe(event)
        if isinstance(event, Resumed):
            self._threads.stream_steps_back()
        self._feed.publish(event)

    def _publish_death(self) -> None:
        self._publish(Died(clock.wall_s(), self._folder.last_error_line()))

    def watch(self) -> contextlib.AbstractContextManager[Watch]:
        return self._feed.watch()

    async def status(self) -> str:
        if self._is_gone:
            return hypervisor.FAILED
        try:
            run_state = await self._run_state()
        except Conflict:
            return hypervisor.FAILED
        return hypervisor.RUNNING if run_state == "running" else hypervisor.PAUSED

    async def run(self) -> None:
        run_state = await self._run_state()
        if run_state == "inmigrate":
            raise Conflict(f"VM {self.definition.name} waits for an image", "load one first")
        if run_state != "running":
            await resume(self._execute)

    async def pause(self) -> float:
        if await self._run_state() != "running":
            raise Conflict(f"VM {self.definition.name} is not running")
        with self.watch() as events:
            await self._execute("stop")
            try:
                stopped = await events.until(lambda event: isinstance(event, Stopped | Died), _EVENT_PATIENCE_S)
            except TimeoutError as error:
                raise MachineFault(f"QEMU of VM {self.definition.name} reported no STOP event") from error
        if isinstance(stopped, Died):
            raise self._gone_error()
        return stopped.at

    async def ensure_running(self) -> bool:
        await self._tracking.settled()
        if await self._run_state() == "running":
            return False
        if (await self.migration_progress()).status not in FINAL_MIGRATION_STATUSES:
            await self.cancel_migration()
        if await self._run_state() != "running":
            await resume(self._execute)
        return True

    async def kill(self) -> None:
        if self._process is not None and not self._process.is_gone:
            await self._process.kill()

    async def delete(self, keep_console: bool = False) -> None:
        await self.kill()
        await self.detach()
        self._folder.remove(keep_console)
        self._ledger.remove(self._folder.record_name)

    async def detach(self) -> None:
        await self.edge.close()
        await self._tracking.close()
        if self._process is not None:
            self._process.forget()
        await self._monitor.close()

    async def refusal(self, strategy: str) -> str:
        if strategy == "background" and (reason := undo_refusal(self.pid)):
            return reason
        if strategy != "background" and self._tracking.stale and not await self._complete_in_background():
            return "an earlier background snapshot failed, and QEMU cannot get over it"
        blocked = (await self._execute("query-migrate")).get("blocked-reasons", [])
        if blocked:
            return str(blocked[0])
        self._prepared_strategy = ""
        try:
            await self._prepare(strategy)
        except CommandRefused as refused:
            return refused.words
        return ""

    async def _prepare(self, strategy: str) -> None:
        """Set the strategy's capabilities and parameters: before frames are held, for QEMU looks through the memory."""
        if self._prepared_strategy != strategy:
            await self._set_capabilities(_CAPABILITIES[strategy])
            await self._execute(
                "migrate-set-parameters",
                max_bandwidth=_BANDWIDTH_BYTES_PER_S,
                downtime_limit=_PRECOPY_DOWNTIME_LIMIT_MS,
            )
            self._prepared_strategy = strategy

    async def _complete_in_background(self) -> bool:
        """Let a background snapshot complete into nothing, which removes the traces of one that failed."""
        sink = os.open(os.devnull, os.O_WRONLY)
        try:
            with self.watch() as events:
                await self.start_migration(sink, "background")
                return await self._final_status(events, _HEALING_PATIENCE_S) == "completed"
        except GeniViolinError:
            return False
        finally:
            os.close(sink)

    async def prepare_migration(self, fd: int, strategy: str) -> None:
        await self._tracking.settled()
        await self._prepare(strategy)
        await self._monitor.pass_descriptor(_DESCRIPTOR, fd)
        self._given_fd = fd

    async def start_migration(self, fd: int, strategy: str) -> None:
        if self._given_fd != fd:
            await self.prepare_migration(fd, strategy)
        self._tracking.begin(strategy == "background")
        self._threads.about_to_stream()
        try:
            await self._execute("migrate", uri=f"fd:{_DESCRIPTOR}")
        except CommandRefused:
            await self._take_descriptor_back()
            raise
        self._given_fd = None

    async def _take_descriptor_back(self) -> None:
        """Have QEMU close a stream that it was given, and that no migration uses."""
        if self._given_fd is not None:
            self._given_fd = None
            with contextlib.suppress(GeniViolinError):
                await self._execute("closefd", fdname=_DESCRIPTOR)

    async def continue_migration(self) -> None:
        await self._execute("migrate-continue", state="pre-switchover")

    async def cancel_migration(self, timeout_s: float = 10.0) -> str:
        await self._take_descriptor_back()
        with self.watch() as events:
            try:
                await self._execute("migrate_cancel", timeout_s=_CANCEL_ANSWER_S)
            except NoAnswer:
                self._tracking.abandon()
            status = (await self.migration_progress()).status
            if status not in FINAL_MIGRATION_STATUSES:
                status = await self._final_status(events, timeout_s)
        await self._tracking.settled()
        if status == _GONE:
            raise self._gone_error()
        return status

    async def migration_progress(self) -> MigrationProgress:
        answer = await self._execute("query-migrate")
        memory = answer.get("ram", {})
        return MigrationProgress(
            status=str(answer.get("status", "none")),
            transferred_bytes=int(memory.get("transferred", 0)),
            total_bytes=int(memory.get("total", 0)),
            error=str(answer.get("error-desc", "")),
        )

    async def load(self, fd: int, timeout_s: float = 600.0) -> None:
        with self.watch() as events:
            await self._execute("migrate-set-parameters", announce_rounds=0)
            await self._monitor.pass_descriptor(_DESCRIPTOR, fd)
            await self._execute("migrate-incoming", uri=f"fd:{_DESCRIPTOR}")
            status = await self._final_status(events, timeout_s)
        if status != "completed":
            assert self._process is not None
            await self._process.gone_within(_EVENT_PATIENCE_S)  # QEMU ends itself then, after its last words
            words = self._folder.last_error_line() or status
            raise MachineFault(
                f"VM {self.definition.name} could not load its image: {words}", "geni-violin snapshot verify"
            )

    async def _final_status(self, events: Watch, timeout_s: float) -> str:
        """The status that the migration under way ends with; :data:`_GONE` if the VM ends first."""
        try:
            event = await events.until(_ends_migration, timeout_s)
        except TimeoutError as error:
            raise MachineFault(
                f"the migration of VM {self.definition.name} did not end within {timeout_s:g} s"
            ) from error
        return event.status if isinstance(event, MigrationStatus) else _GONE

    def _gone_error(self) -> Conflict:
        words = self._folder.last_error_line() or "no message"
        return Conflict(f"QEMU of VM {self.definition.name} is gone: {words}", "delete or restore the VM")

    async def _run_state(self) -> str:
        return str((await self._execute("query-status"))["status"])

    async def _execute(self, command: str, **arguments: Any) -> Any:
        if self._is_gone:
            raise self._gone_error()
        return await self._monitor.execute(command, **arguments)

    async def _set_capabilities(self, states: dict[str, bool]) -> None:
        wanted = [{"capability": name, "state": state} for name, state in states.items()]
        await self._execute("migrate-set-capabilities", capabilities=wanted)


async def _nothing_to_wait_for() -> None:
    """The kernel gives a guest its frames straight out of the TAP device."""


def _ends_migration(event: VmEvent) -> bool:
    if isinstance(event, MigrationStatus):
        return event.status in FINAL_MIGRATION_STATUSES
    return isinstance(event, Died)


class QemuHypervisor:
    """Makes and finds VMs; see :class:`~geni_violin.hostagent.hypervisor.Hypervisor` for the contract.

    :param run_dir: the installation's run folder (``Settings.run_dir``).
    :param ledger: where processes are recorded.
    :param host: this host's name; VMs of other hosts that share the folder are left alone.
    """

    def __init__(self, run_dir: Path, ledger: Ledger, host: str) -> None:
        self._run_dir = run_dir
        self._ledger = ledger
        self._host = host
        self._pump = FramePump()

    async def create(self, definition: VmDefinition) -> QemuVm:
        qemu_process.check_files(definition)
        folder = VmFolder(self._run_dir, definition.slice, definition.name)
        if folder.read() is not None:
            raise AlreadyExists(f"VM {definition.slice}/{definition.name} is there already", "delete it first")
        folder.write(definition)
        try:
            process = qemu_process.start(definition, folder, self._ledger)
        except BaseException:
            folder.remove(keep_console=False)
            raise
        vm = QemuVm(definition, folder, self._ledger, process, self._pump)
        try:
            await vm.open()
        except BaseException:
            await vm.delete()
            raise
        return vm

    async def attach(self, slice_name: str, vm_name: str) -> QemuVm:
        return await self._attach(VmFolder(self._run_dir, slice_name, vm_name))

    async def attach_all(self) -> list[QemuVm]:
        vms = []
        for folder in qemu_process.folders(self._run_dir):
            definition = folder.read()
            if definition is not None and definition.host == self._host:
                vms.append(self._handle(folder))
        outcomes = await asyncio.gather(*(vm.reopen() for vm in vms), return_exceptions=True)
        for vm, outcome in zip(vms, outcomes, strict=True):
            if isinstance(outcome, GeniViolinError):  # one that hangs must not keep the others from being taken over
                log.warning("a VM does not answer", vm=vm.definition.name, reason=str(outcome))
            elif isinstance(outcome, BaseException):
                raise outcome
        return vms

    async def _attach(self, folder: VmFolder) -> QemuVm:
        vm = self._handle(folder)
        await vm.reopen()
        return vm

    def _handle(self, folder: VmFolder) -> QemuVm:
        definition = folder.read()
        if definition is None:
            raise NotFound(f"there is no VM {folder.path.parent.name}/{folder.path.name} on host {self._host}")
        record = folder.find_process(self._ledger)
        process = None
        if record is not None:
            self._ledger.add(record)
            process = QemuProcess(record, None)
        return QemuVm(definition, folder, self._ledger, process, self._pump)
