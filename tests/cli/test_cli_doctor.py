"""Doctor's probes, against programs that behave as a sick machine's do."""

import json
import os
import stat
import struct
from pathlib import Path

import pytest

from geni_violin.cli import doctor, probes
from geni_violin.cli.app import app
from geni_violin.cli.machine import QEMU
from geni_violin.cli.outcome import run
from geni_violin.cli.probes import GREETING, boot_sector, try_boot


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def program(folder: Path, name: str, text: str) -> None:
    """A shell script as a program."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_boot_sector_is_one() -> None:
    sector = boot_sector()
    assert (len(sector), sector[-2:]) == (512, b"\x55\xaa")
    text_at = struct.unpack_from("<H", sector, 6)[0] - 0x7C00
    assert sector[5] == 0xBE  # mov si, text
    assert sector[text_at:].startswith(b"\r\n" + GREETING)


def test_a_guest_that_speaks_boots(programs: Path) -> None:
    program(programs, QEMU, f"echo SeaBIOS; echo '{GREETING.decode()}'; exec sleep 60")
    tried = try_boot("tcg", None, 20.0)
    assert tried.works
    assert tried.detail.startswith("a boot sector boots: first words after ")


def test_a_guest_that_hangs_is_ended_in_time(programs: Path, tmp_path: Path) -> None:
    """As stock guests do under a KVM that is not what it seems: the processor is busy and nothing is printed."""
    program(programs, QEMU, f"echo $$ >{tmp_path}/pid; exec sleep 60")
    tried = try_boot("kvm", None, 1.5)
    assert not tried.works
    assert "a boot sector does not boot: nothing expected on its serial port within" in tried.detail
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_a_qemu_that_refuses_is_quoted(programs: Path) -> None:
    program(programs, QEMU, "echo 'qemu: failed to initialize kvm: Permission denied' >&2; exit 1")
    assert try_boot("kvm", None, 20.0).detail == "QEMU: qemu: failed to initialize kvm: Permission denied"


def test_an_old_qemu_is_not_good_enough(programs: Path) -> None:
    program(programs, QEMU, "echo 'QEMU emulator version 5.2.0 (Debian)'")
    check = doctor._qemu()
    assert (check.works, check.needed) == (False, True)
    assert "qemu-system-x86" in check.remedy


def test_a_bridge_that_cannot_be_made(programs: Path) -> None:
    program(programs, "ovs-vsctl", "echo 'ovs-vsctl: no row' >&2; exit 1")
    assert probes.try_bridge(2.0).detail == "no bridge can be made: ovs-vsctl: no row"


def test_a_bridge_with_an_error(programs: Path) -> None:
    program(programs, "ovs-vsctl", 'case "$*" in *get*) echo "could not open network device";; esac')
    assert "has an error: could not open network device" in probes.try_bridge(2.0).detail


def test_what_is_missing_is_named_with_its_package_and_the_exit_code_says_so(
    programs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("GENI_VIOLIN_STATE_DIR", str(tmp_path / "state"))
    code = run(app, ["doctor", "--no-kvm", "--json"])
    said = capsys.readouterr()
    answer = json.loads(said.out)
    checks = {check["name"]: check for check in answer["checks"]}
    assert (code, answer["ready"]) == (6, False)
    assert said.err.startswith("error: this machine cannot run a slice yet: ")
    assert said.err.count("\n") == 1
    assert (checks["QEMU"]["works"], checks["QEMU"]["remedy"][:36]) == (False, "apt-get install qemu-system-x86 (6.0")
    assert checks["Open vSwitch"]["remedy"] == "apt-get install openvswitch-switch"
    assert checks["guest under TCG"]["works"] is False
    assert "guest under KVM" not in checks
    assert checks["Python"]["works"] is True
    assert not (tmp_path / "state").exists()
