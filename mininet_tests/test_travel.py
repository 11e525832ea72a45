"""Snapshots that are checked, leave in files and come back: real guests, all over the command line.

One slice of two guests that send numbered datagrams to one another; a receiver that sees a number twice would tell. One
snapshot of it is taken at the beginning.
"""

import contextlib
import json
import os
import re
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geni_violin.hostagent.hypervisor import Nic, VmDefinition
from geni_violin.hostagent.qemu_command import command_line, netdev_name
from mininet_tests.libvirt_harness import libvirt_in, missing_programs
from mininet_tests.slice_harness import PAIR, Installation, Slice, installation, wait_for, write_pair_topology

NAME = "here"
MEMORY_MIB = 96
REPORT = b"GV-STAT"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation with the slice "pair" running, and one snapshot of it."""
    with installation("travel") as made:
        made.ok("up", str(write_pair_topology(tmp_path_factory.mktemp("topology"))))
        with made.client() as client:
            Slice(client, "pair", PAIR).wait_until_established()
        taken = made.ok("snapshot", "take", "pair", "--name", NAME)
        assert (taken["state"], taken["network"], taken["notes"]) == ("committed", "hold", [])
        yield made


def _pids(machine: Installation) -> dict[str, int]:
    return {vm["name"]: vm["pid"] for vm in machine.ok("slice", "show", "pair")["vms"]}


def _assert_goes_on(running: Slice, since: dict[str, int]) -> None:
    """Its guests hear one another; none has lost anything, or got anything twice."""
    first = running.wait_for_reports(since, 1)
    last = running.wait_for_reports(running.offsets(), 2)
    for vm in PAIR:
        assert last[vm]["udp_received"] > first[vm]["udp_received"], f"{vm} hears nothing"
        for key in ("udp_duplicates", "udp_foreign", "udp_lost", "tcp_dead", "tcp_violations"):
            assert last[vm][key] == 0, f"{vm} {key} = {last[vm][key]}"


def _restore_after_a_failure(machine: Installation) -> None:
    """All VMs are killed, the snapshot is restored, and its guests go on where they were."""
    with machine.client() as client:
        running = Slice(client, "pair", PAIR)
        machine.ok("slice", "fail", "pair")
        since = running.offsets()
        assert machine.ok("restore", NAME)["state"] == "running"
        _assert_goes_on(running, since)


def test_a_snapshot_is_whole_and_the_store_tells_what_it_takes(machine: Installation) -> None:
    verified = machine.ok("snapshot", "verify", NAME)
    assert (verified["name"], verified["state"]) == (NAME, "committed")
    figures = machine.ok("store", "stats")
    assert [(one["name"], one["slice"]) for one in figures["snapshots"]] == [(NAME, "pair")]
    assert figures["packs"] > 0
    received = sum(vm["received_bytes"] for vm in verified["vms"])
    assert 0 < figures["stored_bytes"] < figures["logical_bytes"] < received
    assert figures["rubbish_bytes"] < 0.01 * figures["stored_bytes"]
    on_disk = sum(path.stat().st_size for path in (machine.state_dir / "store/objects/packs").iterdir())
    assert figures["stored_bytes"] == on_disk
    assert machine.run("snapshot", "verify", "nothing-of-that-name").code == 3


def test_out_in_a_file_and_in_again(machine: Installation, tmp_path: Path) -> None:
    file = tmp_path / "here.gva"
    before = machine.ok("snapshot", "show", NAME)
    written = machine.ok("snapshot", "export", NAME, str(file))
    assert written["bytes"] == file.stat().st_size
    machine.ok("snapshot", "delete", NAME)
    empty = machine.ok("store", "stats")
    assert (empty["snapshots"], empty["packs"], empty["stored_bytes"]) == ([], 0, 0)
    assert machine.run("restore", NAME).code == 3, "it is in the file only"
    _assert_a_changed_file_is_refused(machine, file)
    machine.ok("snapshot", "import", str(file))
    after = machine.ok("snapshot", "show", NAME)
    sizes = ("received_bytes", "stored_bytes")
    assert _without(after, sizes) == _without(before, sizes)
    again = machine.run("snapshot", "import", str(file))
    assert (again.code, NAME in again.err) == (4, True), again.err
    machine.ok("snapshot", "verify", NAME)
    _restore_after_a_failure(machine)


def _without(snapshot: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """A snapshot without what its new store says of its VMs in another way."""
    vms = [{key: value for key, value in vm.items() if key not in keys} for vm in snapshot["vms"]]
    return {**snapshot, "vms": vms}


def _assert_a_changed_file_is_refused(machine: Installation, file: Path) -> None:
    with _one_bit_flipped(file, file.stat().st_size // 3):
        refused = machine.run("snapshot", "import", str(file))
    assert refused.code == 2, refused.err
    assert machine.ok("snapshot", "list") == []
    assert machine.ok("store", "stats")["packs"] == 0


@contextlib.contextmanager
def _one_bit_flipped(path: Path, at: int) -> Iterator[None]:
    """One bit of a file is the other way round, until the block ends."""

    def flip() -> None:
        with path.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 0x10]), at)

    flip()
    try:
        yield
    finally:
        flip()


def test_one_bit_is_found_and_no_vm_is_touched(machine: Installation) -> None:
    pack = max((machine.state_dir / "store/objects/packs").iterdir(), key=lambda path: path.stat().st_size)
    pids = _pids(machine)
    with machine.client() as client, _one_bit_flipped(pack, pack.stat().st_size // 2):
        running = Slice(client, "pair", PAIR)
        since = running.offsets()
        told = machine.run("snapshot", "verify", NAME)
        assert told.code == 6, told.err
        assert f"packs/{pack.name}" in told.err
        assert re.search(r"VM [ab]: pages? \d+.* of block pc\.ram", told.err), told.err
        for arguments in (("restore", NAME), ("restore", NAME, "--as", "twin")):
            refused = machine.run(*arguments)
            assert refused.code != 0
            assert f"packs/{pack.name}" in refused.err, refused.err
        assert [found["name"] for found in machine.ok("slice", "list")] == ["pair"]
        assert _pids(machine) == pids
        _assert_goes_on(running, since)
    machine.ok("snapshot", "verify", NAME)  # it was that bit, and nothing else


# --- other programs ---------------------------------------------------------------------------------------------------


def _plain_command(machine: Installation, vm: str, file: Path) -> list[str]:
    """QEMU with the devices that the host agent gives a VM, and nothing else of it: no tap, no filters, no control."""
    view = next(one for one in machine.ok("slice", "show", "pair")["vms"] if one["name"] == vm)
    running = Path(f"/proc/{view['pid']}/cmdline").read_bytes().decode().split("\0")
    kernel, initrd, append, accel = (
        running[running.index(word) + 1] for word in ("-kernel", "-initrd", "-append", "-accel")
    )
    device = next(word for word in running if word.startswith("virtio-net-pci,"))
    mac = device.partition("mac=")[2][:17]
    definition = VmDefinition(
        "pair", vm, "h1", kernel, initrd, append, MEMORY_MIB, 1, (Nic("none", mac),), accel=accel, incoming=True
    )
    words = iter(command_line(definition))
    plain: list[str] = []
    for word in words:
        if word == "-S":
            continue
        if word == "-object":
            next(words)
        elif word == "-netdev":
            next(words)
            plain += [word, f"user,id={netdev_name(0)},restrict=on"]
        elif word == "-incoming":
            next(words)
            plain += [word, f"exec:cat {file}"]
        else:
            plain.append(word)
    return plain


def _status_of(monitor: Path) -> str:
    """What a QEMU says of itself, over its monitor; empty while it cannot be asked."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(monitor))
        with connection.makefile("rw") as lines:
            lines.readline()
            for command in ("qmp_capabilities", "query-status"):
                lines.write(json.dumps({"execute": command}) + "\n")
                lines.flush()
                answer: dict[str, Any] = {}
                while "return" not in answer:
                    answer = json.loads(lines.readline() or '{"return": {}}')
            return str(answer["return"].get("status", ""))
    return ""


def test_a_plain_qemu_runs_what_was_exported(machine: Installation, tmp_path: Path) -> None:
    file = tmp_path / "a.stream"
    assert machine.run("snapshot", "export", NAME, str(file), "--format", "qemu").code == 2, "which VM?"
    machine.ok("snapshot", "export", NAME, str(file), "--format", "qemu", "--vm", "a")
    assert file.read_bytes()[:4] == b"QEVM"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, (tmp_path / "words").open("wb") as words:
        command = _plain_command(machine, "a", file)
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=words, stderr=words)
        try:

            def is_running() -> bool:
                assert process.poll() is None, (tmp_path / "words").read_text()
                return _status_of(Path(folder, "qmp.sock")) == "running"

            wait_for(is_running, 60, "QEMU to run the VM")
            console = Path(folder, "console.log")
            wait_for(lambda: REPORT in console.read_bytes(), 30, "the guest's next report")
            assert b"Linux version" not in console.read_bytes(), "it must go on, not boot"
        finally:
            process.kill()
            process.wait()


def test_libvirt_runs_what_was_exported(machine: Installation, tmp_path: Path) -> None:
    if missing := missing_programs():
        pytest.skip(
            f"{', '.join(missing)} not installed; scripts/bootstrap installs libvirt-daemon and libvirt-clients"
        )
    file = tmp_path / "b.save"
    machine.ok("snapshot", "export", NAME, str(file), "--format", "libvirt", "--vm", "b")
    with tempfile.TemporaryDirectory(prefix="gvl-", dir="/tmp") as folder, libvirt_in(Path(folder)) as libvirt:
        libvirt.virsh("restore", str(file), "--paused")
        assert libvirt.virsh("list", "--name", "--all").split() == ["pair-b"]
        assert libvirt.virsh("domstate", "pair-b") == "paused"
        console = libvirt.virsh("ttyconsole", "pair-b")
        libvirt.virsh("resume", "pair-b")
        assert libvirt.virsh("domstate", "pair-b") == "running"
        assert REPORT in _read_console(console, REPORT, 60)
        assert libvirt.virsh("domstate", "pair-b") == "running"
        libvirt.virsh("destroy", "pair-b")


def _read_console(device: str, until: bytes, patience_s: float) -> bytes:
    """What comes out of a pseudo-terminal, up to some words or the end of the time."""
    said = b""
    deadline = time.monotonic() + patience_s
    descriptor = os.open(device, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        while until not in said and time.monotonic() < deadline:
            if select.select([descriptor], [], [], 0.5)[0]:
                with contextlib.suppress(BlockingIOError):
                    said += os.read(descriptor, 4096)
    finally:
        os.close(descriptor)
    return said
