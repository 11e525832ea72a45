"""The ledger of processes: what this installation started, so that it can be found and stopped after any crash.

A process id alone may have been given to another process meanwhile; with its start time (``/proc/PID/stat``, field 22,
proc(5)) it names one process for ever. A record is written before anything depends on the process, one JSON file each.
"""

import contextlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_START_TIME_FIELD = 19  # counted from the field after the parenthesised command name
_STATE_FIELD = 0


@dataclass(frozen=True)
class ProcessRecord:
    """One process that was started. ``start_ticks`` is its start time in clock ticks since boot.

    ``address`` is where it answers HTTP; ``openflow`` where the controller waits for switches.
    """

    name: str
    pid: int
    start_ticks: int
    address: str = ""
    openflow: str = ""


def _stat_fields(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def record_of(name: str, pid: int, address: str = "", openflow: str = "") -> ProcessRecord:
    """The record of a running process.

    :raise ProcessLookupError: there is none of that id.
    """
    fields = _stat_fields(pid)
    if fields is None:
        raise ProcessLookupError(f"no process {pid}")
    return ProcessRecord(name, pid, int(fields[_START_TIME_FIELD]), address, openflow)


def is_alive(record: ProcessRecord) -> bool:
    """Whether that very process still runs (a zombie does not)."""
    fields = _stat_fields(record.pid)
    if fields is None or fields[_STATE_FIELD] in ("Z", "X"):
        return False
    return int(fields[_START_TIME_FIELD]) == record.start_ticks


def stop(record: ProcessRecord, patience_s: float = 5.0) -> None:
    """End that very process: SIGTERM, and SIGKILL when patience ends. Returns when it is gone."""
    for number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 5.0)):
        if not is_alive(record):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, number)
        deadline = time.monotonic() + wait_s
        while is_alive(record) and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(record.pid, os.WNOHANG)
            time.sleep(0.01)


class Ledger:
    """The records of one installation, one file a process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, record: ProcessRecord) -> None:
        """Write a record; one of the same name is replaced."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / f"{record.name}.json", json.dumps(asdict(record)).encode())

    def remove(self, name: str) -> None:
        """Forget a process."""
        (self._folder / f"{name}.json").unlink(missing_ok=True)

    def get(self, name: str) -> ProcessRecord | None:
        """The record of that name, if there is one that can be read."""
        try:
            return ProcessRecord(**json.loads((self._folder / f"{name}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def all(self) -> list[ProcessRecord]:
        """Every record, by name."""
        names = sorted(path.stem for path in self._folder.glob("*.json"))
        return [record for record in map(self.get, names) if record is not None]


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, whole or not at all, and durable when this returns."""
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
