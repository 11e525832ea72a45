"""One QEMU process: started so that it outlives the agent, found again afterwards, and seen when it dies.

Theory of operation. A VM has a folder, ``<run_dir>/vms/<slice>/<vm>/``: its definition (durable before the process
starts), QEMU's monitor socket, its console log, what QEMU writes to stderr, and its pid file. QEMU runs in the agent's
session (:mod:`geni_violin.runtime.session` says why) with that folder as its working directory. The ledger names the
process. Should the agent die between the start of the process and its record in the ledger, the pid file names it, and
the working directory proves that the process is that VM's and no other.

QEMU is in the agent's process group too, unless the agent has a terminal, whose signals go to that group. In a group of
its own it would get SIGHUP, and end, if it happened to be stopped (SIGSTOP) when the agent ends: the kernel sends that
to a stopped group that its session is about to lose sight of (setpgid(2), "orphaned").

Death is seen by a pidfd (pidfd_open(2)), at once and without polling, also for a process that is no child of ours.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from geni_violin.core.errors import MachineFault
from geni_violin.hostagent import qemu_command
from geni_violin.hostagent.hypervisor import VmDefinition
from geni_violin.runtime import processes, wire
from geni_violin.runtime.processes import Ledger, ProcessRecord, write_atomically
from geni_violin.runtime.scheduling import with_niceness

RECORD_PREFIX = "vm:"
_DEFINITION = "definition.json"
_GONE_PATIENCE_S = 10.0
_POLL_S = 0.005


class VmFolder:
    """What is on disk about one VM."""

    def __init__(self, run_dir: Path, slice_name: str, vm_name: str) -> None:
        self.path = run_dir.resolve() / "vms" / slice_name / vm_name
        self.record_name = f"{RECORD_PREFIX}{slice_name}:{vm_name}"

    @property
    def console(self) -> Path:
        """The guest's serial console log."""
        return self.path / qemu_command.CONSOLE_LOG

    def write(self, definition: VmDefinition) -> None:
        """Make the folder and write the definition, durably.

        :raise OSError: the disk is full, or the folder cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            (self.path / qemu_command.PROCESS_LOG).unlink()
        write_atomically(self.path / _DEFINITION, json.dumps(wire.encode(definition)).encode())

    def read(self) -> VmDefinition | None:
        """The definition, if there is one."""
        try:
            text = (self.path / _DEFINITION).read_bytes()
        except OSError:
            return None
        return wire.decode(VmDefinition, json.loads(text))

    def remove(self, keep_console: bool) -> None:
        """Remove the folder; with ``keep_console`` the console log stays in it."""
        if not keep_console:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.path.is_dir():
            for entry in self.path.iterdir():
                if entry != self.console:
                    entry.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    def last_error_line(self) -> str:
        """The last line that QEMU wrote to stderr, without its own name in front; empty if there is none."""
        try:
            lines = (self.path / qemu_command.PROCESS_LOG).read_text(errors="replace").splitlines()
        except OSError:
            return ""
        last = next((line for line in reversed(lines) if line.strip()), "")
        return last.removeprefix(f"{qemu_command.QEMU}: ").strip()

    def find_process(self, ledger: Ledger) -> ProcessRecord | None:
        """The VM's process if it is alive: by the ledger, else by its pid file and working directory."""
        record = ledger.get(self.record_name)
        if record is not None and processes.is_alive(record):
            return record
        return self._unrecorded_process()

    def _unrecorded_process(self) -> ProcessRecord | None:
        try:
            pid = int((self.path / qemu_command.PID_FILE).read_text())
            if Path(f"/proc/{pid}/cwd").readlink() == self.path:
                return processes.record_of(self.record_name, pid)
        except (OSError, ValueError):
            pass
        return None


def folders(run_dir: Path) -> list[VmFolder]:
    """The folders of all VMs, by slice and name."""
    paths = sorted(path.parent for path in (run_dir / "vms").glob(f"*/*/{_DEFINITION}"))
    return [VmFolder(run_dir, path.parent.name, path.name) for path in paths]


def check_files(definition: VmDefinition) -> None:
    """See that QEMU and what the VM boots from are there.

    :raise MachineFault: one is not; the message has its path.
    """
    if shutil.which(qemu_command.QEMU) is None:
        raise MachineFault(f"{qemu_command.QEMU} is not installed", "apt install qemu-system-x86")
    for kind, path in (("kernel", definition.kernel), ("initrd", definition.initrd)):
        if not os.access(path, os.R_OK) or not Path(path).is_file():
            raise MachineFault(
                f"VM {definition.name}'s {kind} {path} is missing or cannot be read", "check image.* paths"
            )


class QemuProcess:
    """A process, our child or not, whose death is reported once.

    :param on_death: called in the event loop when the process is gone.
    """

    def __init__(self, record: ProcessRecord, child: subprocess.Popen[bytes] | None) -> None:
        self.record = record
        self._child = child
        self._gone = asyncio.Event()
        self._pidfd: int | None = None

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended."""
        return self._gone.is_set()

    def observe(self, on_death: Callable[[], None]) -> None:
        """Call ``on_death`` once, as soon as the process is gone; at once if it is already."""
        try:
            self._pidfd = os.pidfd_open(self.record.pid)
        except ProcessLookupError:
            self._died(on_death)
            return
        if not processes.is_alive(self.record):
            self._died(on_death)
            return
        asyncio.get_running_loop().add_reader(self._pidfd, self._died, on_death)

    def _died(self, on_death: Callable[[], None]) -> None:
        self.forget()
        if self._child is not None:
            self._child.poll()
        self._gone.set()
        on_death()

    def forget(self) -> None:
        """Observe no more."""
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    async def kill(self) -> None:
        """SIGKILL, and wait until the process is gone; also when it is not observed any more.

        :raise MachineFault: it does not go.
        """
        with contextlib.suppress(ProcessLookupError):
            self._send_kill()
        observed = self._pidfd is not None
        if not await (self.gone_within(_GONE_PATIENCE_S) if observed else self._dead_within(_GONE_PATIENCE_S)):
            raise MachineFault(f"process {self.record.pid} does not go away after SIGKILL", "see ps and dmesg")

    def _send_kill(self) -> None:
        """The descriptor names one process for ever, so that no other that got its id meanwhile is killed."""
        descriptor = os.pidfd_open(self.record.pid)
        try:
            if processes.is_alive(self.record):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)

    async def _dead_within(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while processes.is_alive(self.record):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def gone_within(self, timeout_s: float) -> bool:
        """Whether the process is gone, now or before the time is over."""
        try:
            await asyncio.wait_for(self._gone.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


def start(definition: VmDefinition, folder: VmFolder, ledger: Ledger) -> QemuProcess:
    """Start QEMU and record it.

    :raise MachineFault: QEMU cannot be started.
    """
    log_path = folder.path / qemu_command.PROCESS_LOG
    try:
        with log_path.open("ab") as log:
            child = subprocess.Popen(
                with_niceness(0, qemu_command.command_line(definition)),
                cwd=folder.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0 if _has_terminal() else None,
            )
    except OSError as error:
        raise MachineFault(f"cannot start {qemu_command.QEMU}: {error.strerror}", "see geni-violin doctor") from error
    try:
        record = processes.record_of(folder.record_name, child.pid)
        ledger.add(record)
    except BaseException:
        child.kill()
        child.wait()
        raise
    return QemuProcess(record, child)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
