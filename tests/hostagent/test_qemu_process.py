"""QEMU's process and folder, with small programs in QEMU's place."""

import asyncio
import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest
from test_qemu_command import DEFINITION

from geni_violin.core.errors import AlreadyExists, Conflict, MachineFault, NotFound
from geni_violin.hostagent import qemu_command, qemu_process
from geni_violin.hostagent.hypervisor import FAILED, Hypervisor, VmDefinition
from geni_violin.hostagent.qemu import QemuHypervisor
from geni_violin.hostagent.qemu_process import QemuProcess, VmFolder
from geni_violin.runtime import processes
from geni_violin.runtime.processes import Ledger


@pytest.fixture
def definition(tmp_path: Path) -> VmDefinition:
    """A VM whose kernel and initrd are there."""
    for name in ("vmlinuz", "guest.initrd"):
        (tmp_path / name).write_bytes(b"x")
    return dataclasses.replace(DEFINITION, kernel=str(tmp_path / "vmlinuz"), initrd=str(tmp_path / "guest.initrd"))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "processes")


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a shell script in QEMU's place."""
    path = tmp_path / "pretended-qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(qemu_command, "QEMU", str(path))


@pytest.mark.parametrize("missing", ["kernel", "initrd"])
def test_a_missing_file_is_named_before_anything_is_made(
    tmp_path: Path, definition: VmDefinition, ledger: Ledger, missing: str
) -> None:
    absent = str(tmp_path / "absent")
    wrong = dataclasses.replace(definition, kernel=absent)
    if missing == "initrd":
        wrong = dataclasses.replace(definition, initrd=absent)
    with pytest.raises(MachineFault, match=f"{missing} {absent} is missing"):
        asyncio.run(QemuHypervisor(tmp_path / "run", ledger, "h1").create(wrong))
    assert not (tmp_path / "run").exists()
    assert ledger.all() == []


def test_a_program_that_is_not_installed(
    tmp_path: Path, definition: VmDefinition, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_command, "QEMU", "qemu-that-is-nowhere")
    with pytest.raises(MachineFault, match="is not installed"):
        asyncio.run(QemuHypervisor(tmp_path / "run", ledger, "h1").create(definition))


def test_its_last_words_are_the_error_and_nothing_is_left(
    tmp_path: Path, definition: VmDefinition, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, monkeypatch, 'echo warning >&2; echo "could not configure /dev/net/tun: busy" >&2; exit 1')
    hypervisor: Hypervisor = QemuHypervisor(tmp_path / "run", ledger, "h1")
    with pytest.raises(MachineFault, match=r"n1 did not start: could not configure /dev/net/tun: busy"):
        asyncio.run(hypervisor.create(definition))
    assert list((tmp_path / "run" / "vms").rglob("*")) == []
    assert ledger.all() == []


def test_a_definition_survives_on_disk(tmp_path: Path, definition: VmDefinition) -> None:
    folder = VmFolder(tmp_path, definition.slice, definition.name)
    assert folder.read() is None
    folder.write(definition)
    assert VmFolder(tmp_path, definition.slice, definition.name).read() == definition


def test_removal_may_spare_the_console_log(tmp_path: Path, definition: VmDefinition) -> None:
    folder = VmFolder(tmp_path, definition.slice, definition.name)
    folder.write(definition)
    folder.console.write_text("hello")
    folder.remove(keep_console=True)
    assert [path.name for path in folder.path.iterdir()] == ["console.log"]
    folder.remove(keep_console=False)
    assert list((tmp_path / "vms").iterdir()) == []


def test_a_process_is_found_without_a_record_but_never_a_wrong_one(
    tmp_path: Path, definition: VmDefinition, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, monkeypatch, "exec sleep 60")
    folder = VmFolder(tmp_path, definition.slice, definition.name)
    folder.write(definition)

    async def scenario() -> None:
        process = qemu_process.start(definition, folder, ledger)
        process.observe(lambda: None)
        try:
            ledger.remove(folder.record_name)
            (folder.path / qemu_command.PID_FILE).write_text(str(os.getpid()))
            assert folder.find_process(ledger) is None
            (folder.path / qemu_command.PID_FILE).write_text(f"{process.record.pid}\n")
            assert folder.find_process(ledger) == process.record
        finally:
            await process.kill()
        assert folder.find_process(ledger) is None

    asyncio.run(scenario())


def test_a_process_shares_the_session_and_its_death_is_seen_once(
    tmp_path: Path, definition: VmDefinition, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, monkeypatch, "exec sleep 60")
    folder = VmFolder(tmp_path, definition.slice, definition.name)
    folder.write(definition)
    deaths: list[float] = []

    async def scenario() -> None:
        process = qemu_process.start(definition, folder, ledger)
        process.observe(lambda: deaths.append(time.monotonic()))
        assert os.getsid(process.record.pid) == os.getsid(0)
        assert ledger.get(folder.record_name) == process.record
        await process.kill()
        await process.kill()
        assert process.is_gone
        assert not processes.is_alive(process.record)
        late = QemuProcess(process.record, None)
        late.observe(lambda: deaths.append(time.monotonic()))
        assert late.is_gone

    asyncio.run(scenario())
    assert len(deaths) == 2


def test_a_process_that_is_stopped_outlives_its_agent(
    tmp_path: Path, definition: VmDefinition, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel ends (SIGHUP) stopped processes in a group of their own when their session loses its last parent."""
    program(tmp_path, monkeypatch, "exec sleep 60")
    folder = VmFolder(tmp_path, definition.slice, definition.name)
    folder.write(definition)
    agent = os.fork()
    if agent == 0:
        try:
            os.setsid()
            os.kill(qemu_process.start(definition, folder, ledger).record.pid, signal.SIGSTOP)
        finally:
            os._exit(0)
    os.waitpid(agent, 0)
    record = ledger.get(folder.record_name)
    assert record is not None
    time.sleep(0.3)
    assert processes.is_alive(record)
    processes.stop(record, patience_s=0.0)
    assert not processes.is_alive(record)


def test_vms_of_an_earlier_life_are_found_by_host_and_may_be_dead(
    tmp_path: Path, definition: VmDefinition, ledger: Ledger
) -> None:
    for name, host in (("n1", "h1"), ("n2", "h2")):
        VmFolder(tmp_path, definition.slice, name).write(dataclasses.replace(definition, name=name, host=host))

    async def scenario() -> None:
        hypervisor = QemuHypervisor(tmp_path, ledger, "h1")
        (vm,) = await hypervisor.attach_all()
        assert (vm.definition.name, await vm.status(), vm.pid) == ("n1", FAILED, 0)
        with pytest.raises(Conflict, match="is gone"):
            await vm.run()
        with pytest.raises(AlreadyExists):
            await hypervisor.create(definition)
        await vm.delete()
        with pytest.raises(NotFound):
            await hypervisor.attach(definition.slice, "n1")
        assert await hypervisor.attach_all() == []

    asyncio.run(scenario())
