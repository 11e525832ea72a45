"""The parts of one machine: starting them, stopping them, and what a crash left.

Theory of operation. Each part is a process of its own, ``geni-violin PART …``, that appends to LOG_DIR/NAME.log; those
that are started together share a session (:mod:`geni_violin.runtime.session` says why). The ledger in RUN_DIR/services
has one record a part: written when it is spawned, again by the part itself once it listens (then with its address),
removed at a clean exit. So after any crash the ledger names what may still run. A second ledger, RUN_DIR/remembered,
keeps the last address of each part: a part that died comes back at the address that the others know. Starting is
idempotent and in the order of need: controller and snapshot server, host agents, coordinator; stopping is the reverse.
One ``up`` or ``down`` at a time works on an installation (a file lock).
"""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from geni_violin.cli.client import SLOW_S, Coordinator, path, services_ledger
from geni_violin.cli.machine import free_port, port_is_free, remember_installation, start_openvswitch
from geni_violin.core.errors import Conflict, GeniViolinError, MachineFault
from geni_violin.runtime.processes import (
    Ledger,
    ProcessRecord,
    is_alive,
    record_of,
    stop,
)
from geni_violin.runtime.scheduling import with_niceness
from geni_violin.runtime.session import NewSession
from geni_violin.runtime.settings import Settings

PYTHON = sys.executable
LOOPBACK = "127.0.0.1"
START_PATIENCE_S = 90.0
DELETE_PATIENCE_S = 60.0
PORT_PATIENCE_S = 1.0
CONTROLLER, SNAPSHOT_SERVER, COORDINATOR, HOST_AGENT = "controller", "snapshot-server", "coordinator", "hostagent"
NICENESS = {CONTROLLER: -10, HOST_AGENT: -10, COORDINATOR: -10, SNAPSHOT_SERVER: 5}
"""On one machine all parts and guests share its processors. At a cut frames wait for the first three, for milliseconds;
nobody waits for the snapshot server."""
Say = Callable[[str], None]


def agent_part(host: str) -> str:
    """The name of a host's agent among the parts."""
    return f"hostagent-{host}"


def remembered_ledger(settings: Settings) -> Ledger:
    """The last address of each part, whether it runs or not."""
    return Ledger(settings.run_dir / "remembered")


@dataclass(frozen=True)
class Health:
    """A part of this installation, as ``status`` shows it."""

    name: str
    pid: int
    address: str
    healthy: bool
    note: str


def health_of(record: ProcessRecord) -> Health:
    """Ask a part how it is; at most two seconds."""
    if not is_alive(record):
        return Health(record.name, record.pid, record.address, False, "the process is gone")
    if not record.address:
        return Health(record.name, record.pid, "", False, "it is starting")
    try:
        answer = httpx.get(f"{record.address}/healthz", timeout=2.0, trust_env=False)
        data = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        return Health(record.name, record.pid, record.address, False, f"no answer: {error or type(error).__name__}")
    healthy = answer.is_success and isinstance(data, dict) and bool(data.get("healthy"))
    sick = data.get("parts", {}).items() if isinstance(data, dict) and not healthy else ()
    note = "; ".join(f"{name}: {text}" for name, text in sick if text != "healthy")
    return Health(record.name, record.pid, record.address, healthy, note)


@contextlib.contextmanager
def exclusive(settings: Settings) -> Iterator[None]:
    """Nobody else starts or stops parts of this installation meanwhile.

    :raise Conflict: somebody does.
    :raise MachineFault: the state directory cannot be written.
    """
    try:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        lock = (settings.run_dir / "parts.lock").open("w")
    except OSError as error:
        raise MachineFault(
            f"cannot write to {settings.state_dir}: {error.strerror}", "set GENI_VIOLIN_STATE_DIR, or run as root"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"another up or down works on {settings.state_dir} right now", "try again when it has ended"
            ) from None
        yield


class Parts:
    """The parts of one installation on this machine. ``say`` is told what is being done."""

    def __init__(self, settings: Settings, say: Say) -> None:
        self._settings, self._say = settings, say
        self._ledger = services_ledger(settings)
        self._remembered = remembered_ledger(settings)
        self._chosen: set[int] = set()

    # --- starting -----------------------------------------------------------------------------------------------------

    def start(self, hosts: tuple[str, ...]) -> str:
        """Start what does not run, with an agent for each of ``hosts``; gives back the coordinator's address.

        :raise MachineFault: a part does not come up; its last words are in the message. What came up stays.
        """
        with exclusive(self._settings), NewSession() as session:
            remember_installation(self._settings)
            coordinator_port = self._coordinator_port()
            start_openvswitch()
            first = {CONTROLLER: self._controller(), SNAPSHOT_SERVER: ("--port", self._port(SNAPSHOT_SERVER))}
            self._start_wave(session, first)
            controller = self._running(CONTROLLER)
            addresses = ("--controller-url", controller.address)
            agents = {
                agent_part(host): (host, "--port", self._port(agent_part(host)), *addresses, "--openflow")
                for host in hosts
            }
            self._start_wave(session, {name: (*arguments, controller.openflow) for name, arguments in agents.items()})
            store = ("--snapshot-server-url", self._running(SNAPSHOT_SERVER).address)
            self._start_wave(session, {COORDINATOR: ("--port", str(coordinator_port), *addresses, *store)})
        return self._running(COORDINATOR).address

    def agents(self, hosts: tuple[str, ...]) -> dict[str, str]:
        """The address of each host's agent."""
        return {host: self._running(agent_part(host)).address for host in hosts}

    def _alive(self, name: str) -> ProcessRecord | None:
        record = self._ledger.get(name)
        return record if record is not None and is_alive(record) else None

    def _running(self, name: str) -> ProcessRecord:
        record = self._alive(name)
        if record is None or not record.address:
            raise MachineFault(f"the {name} is gone again", f"see {self._settings.log_dir / name}.log")
        return record

    def _port(self, name: str) -> str:
        """The port that a part had before; a free one if it had none, or it is taken and nobody relies on it."""
        before = self._remembered.get(name)
        port = urlsplit(before.address).port if before else None
        return str(self._usable(name, port or 0))

    def _usable(self, name: str, port: int) -> int:
        if port == 0:
            return self._fresh_port()
        if self._alive(name) or _free_soon(port):
            return port
        if any(map(is_alive, self._ledger.all())):
            raise MachineFault(
                f"port {port}, where the other parts expect the {name}, is in use", "free it, or geni-violin down first"
            )
        return self._fresh_port()

    def _fresh_port(self) -> int:
        """A free port that no other part is about to take either."""
        port = next(port for port in iter(free_port, 0) if port not in self._chosen)
        self._chosen.add(port)
        return port

    def _coordinator_port(self) -> int:
        port = self._settings.coordinator_port
        if port == 0:
            return int(self._port(COORDINATOR))
        if not self._alive(COORDINATOR) and not _free_soon(port):
            raise MachineFault(
                f"port {port}, where the coordinator would listen, is in use",
                "free it, or set GENI_VIOLIN_COORDINATOR_PORT to another (0 for any)",
            )
        return port

    def _controller(self) -> tuple[str, ...]:
        """Ryu cannot tell which port it got, so both ports are chosen here."""
        before = self._remembered.get(CONTROLLER)
        openflow = int(before.openflow.rpartition(":")[2]) if before and before.openflow else 0
        return ("--port", self._port(CONTROLLER), "--openflow-port", str(self._usable(CONTROLLER, openflow)))

    def _start_wave(self, session: NewSession, wave: dict[str, tuple[str, ...]]) -> None:
        """Start parts that do not need one another, and wait for all of them."""
        offsets = {}
        for name, arguments in wave.items():
            if self._alive(name) is None:
                self._say(f"starting the {name}")
                offsets[name] = self._spawn(session, name, arguments)
        for name, offset in offsets.items():
            self._wait_ready(name, offset, is_new=True)
        for name in wave.keys() - offsets.keys():
            self._wait_ready(name, self._log_size(name), is_new=False)

    def _log_size(self, name: str) -> int:
        path_ = self._settings.log_dir / f"{name}.log"
        return path_.stat().st_size if path_.exists() else 0

    def _spawn(self, session: NewSession, name: str, arguments: tuple[str, ...]) -> int:
        """Start one process; gives back where in the log its words begin.

        :raise MachineFault: it has ended already.
        """
        self._settings.log_dir.mkdir(parents=True, exist_ok=True)
        offset = self._log_size(name)
        command = HOST_AGENT if name.startswith("hostagent-") else name
        words = with_niceness(NICENESS[command], [PYTHON, "-m", "geni_violin.cli", command, *arguments])
        environment = {**os.environ, "GENI_VIOLIN_STATE_DIR": str(self._settings.state_dir.resolve())}
        log = self._settings.log_dir / f"{name}.log"
        try:
            session.spawn(words, log, environment, lambda pid: self._ledger.add(record_of(name, pid)))
        except ProcessLookupError:
            raise self._did_not_start(name, offset) from None
        return offset

    def _wait_ready(self, name: str, offset: int, is_new: bool) -> None:
        """Wait until a part answers; a new one that does not is stopped.

        :raise MachineFault: it ends, or does not answer in time.
        """
        deadline, record = time.monotonic() + START_PATIENCE_S, None
        while time.monotonic() < deadline:
            record = self._ledger.get(name)
            if record is None or not is_alive(record):
                raise self._did_not_start(name, offset)
            if record.address and _answers(record.address):
                return
            time.sleep(0.05)
        if is_new and record is not None:
            stop(record)
            self._ledger.remove(name)
        raise MachineFault(f"the {name} does not answer within {START_PATIENCE_S:.0f} s", self._see_log(name))

    def _did_not_start(self, name: str, offset: int) -> MachineFault:
        return MachineFault(f"the {name} did not start: {self._last_words(name, offset)}", self._see_log(name))

    def _see_log(self, name: str) -> str:
        return f"see {self._settings.log_dir / name}.log"

    def _last_words(self, name: str, offset: int) -> str:
        """The line of the log that says best why a part ended: an "error: …" if there is one, else the last."""
        with (self._settings.log_dir / f"{name}.log").open(errors="replace") as log:
            log.seek(offset)
            lines = [line.strip() for line in log if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1]

    # --- stopping -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop the parts, those first that need others. A part that does not end on SIGTERM is killed."""
        order = (COORDINATOR, "hostagent-", SNAPSHOT_SERVER, CONTROLLER)
        records = self._ledger.all()
        for prefix in order:
            for record in [record for record in records if record.name.startswith(prefix)]:
                if is_alive(record):
                    self._say(f"stopping the {record.name}")
                    stop(record)
                self._ledger.remove(record.name)

    def delete_slices(self) -> bool:
        """Delete every slice through the coordinator, if it lives; whether it did so."""
        record = self._alive(COORDINATOR)
        if record is None or not record.address:
            return False
        coordinator = Coordinator(record.address)
        try:
            for found in coordinator.slices():
                self._say(f"deleting the slice {found.name}")
                coordinator.request("DELETE", path("slices", found.name), timeout_s=DELETE_PATIENCE_S)
        except GeniViolinError as error:
            self._say(f"the coordinator could not do it ({error}); removing what is left without it")
            return False
        finally:
            coordinator.close()
        return True


def _free_soon(port: int) -> bool:
    """Whether a port is free, now or in a moment: the threads of a killed part may hold it for a while."""
    deadline = time.monotonic() + PORT_PATIENCE_S
    while not (free := port_is_free(port)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return free


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz", timeout=5.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def create_slice(coordinator: Coordinator, agents: dict[str, str], body: object) -> object:
    """Make the hosts known to the coordinator, then have it create the slice: the answer, a slice view.

    :raise GeniViolinError: what the coordinator says; on failure it leaves nothing of the slice.
    """
    for host, url in agents.items():
        coordinator.request("PUT", path("hosts", host), {"url": url})
    return coordinator.request("POST", path("slices"), body, timeout_s=SLOW_S)
