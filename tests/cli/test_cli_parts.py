"""Starting and stopping parts with real processes: the ledger, ports, health, what a part says when it cannot start."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from geni_violin.cli import machine, parts, teardown
from geni_violin.cli.client import services_ledger
from geni_violin.cli.machine import free_port, installations, remember_installation
from geni_violin.cli.parts import Parts, exclusive, health_of, remembered_ledger
from geni_violin.cli.teardown import TakenDown, take_down
from geni_violin.coordinator.journal import Journal, SliceRecord
from geni_violin.core.errors import Conflict, MachineFault
from geni_violin.core.model import Image, NetworkSlice, SliceSpec, SwitchSpec, VmSpec
from geni_violin.runtime.processes import ProcessRecord, is_alive, record_of
from geni_violin.runtime.settings import Settings

SLEEPER = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """An installation of this test's own."""
    monkeypatch.setenv("GENI_VIOLIN_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(machine, "INSTALLATIONS", tmp_path / "installations")
    return Settings(coordinator_port=0)


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts processes that are gone at the end of the test."""
    children: list[subprocess.Popen[str]] = []

    def start(*command: str) -> subprocess.Popen[str]:
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


def wait_for_record(settings: Settings, name: str, limit_s: float = 60.0) -> ProcessRecord:
    """The record of a part that tells its address."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        record = services_ledger(settings).get(name)
        if record is not None and record.address:
            return record
        time.sleep(0.05)
    raise AssertionError(f"{name} wrote no record")


def silent(_text: str) -> None:
    """Says nothing."""


# --- one part in the foreground ---------------------------------------------------------------------------------------


def test_a_part_records_itself_and_takes_that_back_at_a_clean_end(settings: Settings, spawn: Spawn) -> None:
    child = spawn(sys.executable, "-m", "geni_violin.cli", "snapshot-server")
    record = wait_for_record(settings, "snapshot-server")
    assert (record.pid, is_alive(record)) == (child.pid, True)
    assert health_of(record).healthy
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == 0
    assert services_ledger(settings).get("snapshot-server") is None
    remembered = remembered_ledger(settings).get("snapshot-server")
    assert remembered is not None
    assert remembered.address == record.address


def test_a_killed_part_leaves_a_record_that_is_known_to_be_dead(settings: Settings, spawn: Spawn) -> None:
    child = spawn(sys.executable, "-m", "geni_violin.cli", "snapshot-server")
    record = wait_for_record(settings, "snapshot-server")
    child.kill()
    child.wait()
    health = health_of(record)
    assert (health.healthy, health.note) == (False, "the process is gone")


def test_a_coordinator_whose_parts_are_gone_is_not_healthy(settings: Settings, spawn: Spawn) -> None:
    spawn(
        sys.executable, "-m", "geni_violin.cli", "coordinator", "--port", "0",
        "--controller-url", "http://127.0.0.1:1", "--snapshot-server-url", "http://127.0.0.1:1",
    )  # fmt: skip
    health = health_of(wait_for_record(settings, "coordinator"))
    assert not health.healthy
    assert "controller: the controller at http://127.0.0.1:1 does not answer" in health.note


def test_the_controller_keeps_its_process_when_it_becomes_ryu(settings: Settings, spawn: Spawn) -> None:
    child = spawn(sys.executable, "-m", "geni_violin.cli", "controller")
    record = wait_for_record(settings, "controller")
    deadline = time.monotonic() + 60
    while not (health := health_of(record)).healthy and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (health.pid, health.healthy) == (child.pid, True)
    assert "ryu-manager" in Path(f"/proc/{child.pid}/cmdline").read_text()
    with socket.create_connection(("127.0.0.1", int(record.openflow.rpartition(":")[2])), timeout=5):
        pass


@pytest.mark.parametrize("part", ["snapshot-server", "coordinator", "hostagent", "controller"])
def test_a_port_in_use_is_one_line(settings: Settings, part: str) -> None:
    urls = ["--controller-url", "http://127.0.0.1:1"]
    more = {
        "coordinator": [*urls, "--snapshot-server-url", "http://127.0.0.1:1"],
        "hostagent": ["h1", *urls, "--openflow", "tcp:127.0.0.1:1"],
    }
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "geni_violin.cli", part, *more.get(part, []), "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 6
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert str(port) in done.stderr
    assert services_ledger(settings).all() == []


def test_status(settings: Settings, spawn: Spawn) -> None:
    sleeper = spawn(sys.executable, "-c", SLEEPER)
    services_ledger(settings).add(record_of("controller", sleeper.pid, f"http://127.0.0.1:{free_port()}"))
    done = subprocess.run(
        [sys.executable, "-m", "geni_violin.cli", "status", "--json"], capture_output=True, text=True, check=True
    )
    (service,) = json.loads(done.stdout)["services"]
    assert service.keys() >= {"name", "pid", "address", "healthy"}
    assert (service["name"], service["pid"], service["healthy"]) == ("controller", sleeper.pid, False)


# --- all parts --------------------------------------------------------------------------------------------------------


def test_stop_ends_the_parts_in_reverse_order(settings: Settings, spawn: Spawn) -> None:
    names = ("controller", "snapshot-server", "hostagent-h1", "hostagent-h2", "coordinator")
    ledger = services_ledger(settings)
    for name in names:
        ledger.add(record_of(name, spawn(sys.executable, "-c", SLEEPER).pid))
    records, said = ledger.all(), list[str]()
    Parts(settings, said.append).stop()
    assert [text.removeprefix("stopping the ") for text in said] == [
        "coordinator", "hostagent-h1", "hostagent-h2", "snapshot-server", "controller",
    ]  # fmt: skip
    assert not any(map(is_alive, records))
    assert ledger.all() == []


def test_stop_kills_a_part_that_does_not_listen(settings: Settings, spawn: Spawn) -> None:
    child = spawn(sys.executable, "-c", DEAF)
    assert child.stdout is not None
    child.stdout.readline()
    record = record_of("coordinator", child.pid)
    services_ledger(settings).add(record)
    Parts(settings, silent).stop()
    assert not is_alive(record)


def test_stop_spares_a_process_that_got_a_dead_parts_id(settings: Settings, spawn: Spawn) -> None:
    child = spawn(sys.executable, "-c", SLEEPER)
    truth = record_of("coordinator", child.pid)
    services_ledger(settings).add(ProcessRecord("coordinator", child.pid, truth.start_ticks - 1))
    Parts(settings, silent).stop()
    assert is_alive(truth)
    assert services_ledger(settings).all() == []


@pytest.fixture
def no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting parts does not look at Open vSwitch."""
    monkeypatch.setattr(parts, "start_openvswitch", lambda: None)


@pytest.fixture
def broken_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parts end as soon as they are started."""
    program = tmp_path / "broken-python"
    program.write_text("#!/bin/sh\necho '  File x.py, line 1'\necho 'error: the moon is in the wrong place'\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(parts, "PYTHON", str(program))


def test_a_part_that_does_not_start_is_quoted(settings: Settings, no_switch: None, broken_python: None) -> None:
    with pytest.raises(MachineFault, match="did not start: the moon is in the wrong place") as caught:
        Parts(settings, silent).start(("h1",))
    assert caught.value.hint.startswith(f"see {settings.log_dir}")


def test_a_part_that_is_gone_before_it_is_recorded_is_quoted(
    settings: Settings, no_switch: None, broken_python: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_nothing(name: str, pid: int) -> ProcessRecord:
        while "the moon" not in (settings.log_dir / f"{name}.log").read_text():
            time.sleep(0.01)
        raise ProcessLookupError(pid)

    monkeypatch.setattr(parts, "record_of", find_nothing)
    with pytest.raises(MachineFault, match="did not start: the moon is in the wrong place"):
        Parts(settings, silent).start(("h1",))


def test_a_coordinator_port_in_use_is_told_before_anything_starts(settings: Settings, no_switch: None) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        busy = settings.model_copy(update={"coordinator_port": port})
        with pytest.raises(MachineFault, match=f"port {port}, where the coordinator would listen, is in use") as caught:
            Parts(busy, silent).start(("h1",))
    assert "GENI_VIOLIN_COORDINATOR_PORT" in caught.value.hint
    assert services_ledger(settings).all() == []


def test_start_again_starts_only_what_died_and_at_its_old_address(settings: Settings, no_switch: None) -> None:
    first = list[str]()
    try:
        url = Parts(settings, first.append).start(("h1",))
        before = {record.name: record for record in services_ledger(settings).all()}
        assert set(before) == {"controller", "snapshot-server", "hostagent-h1", "coordinator"}
        for name in ("controller", "snapshot-server"):
            os.kill(before[name].pid, signal.SIGKILL)
            while is_alive(before[name]):
                time.sleep(0.01)
        again = list[str]()
        assert Parts(settings, again.append).start(("h1",)) == url
        after = {record.name: record for record in services_ledger(settings).all()}
    finally:
        Parts(settings, silent).stop()
    assert again == ["starting the controller", "starting the snapshot-server"]
    assert after["coordinator"] == before["coordinator"]
    for name in ("controller", "snapshot-server"):
        assert after[name].pid != before[name].pid
        assert (after[name].address, after[name].openflow) == (before[name].address, before[name].openflow)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url}/healthz")


def test_one_up_or_down_at_a_time(settings: Settings) -> None:
    with (
        exclusive(settings),
        pytest.raises(Conflict, match="another up or down works on"),
        exclusive(settings),
    ):
        pass


# --- down -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a real machine: root is not asked for, bridges and taps are not looked at."""
    monkeypatch.setattr(teardown, "require_root", lambda _what: None)
    monkeypatch.setattr(teardown, "_remove_leftovers", lambda settings: TakenDown(str(settings.state_dir)))


def test_down_of_nothing_makes_nothing(settings: Settings) -> None:
    assert take_down(settings, silent) == TakenDown(str(settings.state_dir))
    assert not settings.state_dir.exists()


def test_down_after_a_crash(settings: Settings, no_machine: None, spawn: Spawn) -> None:
    """The coordinator was killed: an agent still runs, the database still has the slice."""
    vm = VmSpec("n1", 1, "h1", "s1", "10.0.0.1/8", "52:54:00:00:00:01", Image("/k", "/i"))
    spec = SliceSpec("net", ("h1",), (SwitchSpec("s1", "h1"),), (), (vm,))
    settings.run_dir.mkdir(parents=True)
    journal = Journal(settings.state_dir / teardown.DATABASE)
    journal.add_slice(SliceRecord(spec, NetworkSlice("net", 1, ()), 0))
    journal.close()
    agent = record_of("hostagent-h1", spawn(sys.executable, "-c", SLEEPER).pid)
    services_ledger(settings).add(agent)
    services_ledger(settings).add(ProcessRecord("coordinator", 1 << 22, 1, "http://127.0.0.1:1"))
    remember_installation(settings)

    take_down(settings, silent)
    take_down(settings, silent)

    assert not is_alive(agent)
    journal = Journal(settings.state_dir / teardown.DATABASE)
    assert journal.slices() == []
    journal.close()
    assert list(installations()) == []


def test_installations_are_known_until_they_are_down(settings: Settings, no_machine: None) -> None:
    settings.run_dir.mkdir(parents=True)
    remember_installation(settings)
    assert list(installations()) == [settings.state_dir]
    take_down(settings, silent)
    assert list(installations()) == []
