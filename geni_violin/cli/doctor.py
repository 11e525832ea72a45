"""``doctor``: what this machine can do, found out by trying, and what is missing, with what to install.

A check is needed (without it ``up`` cannot work, and doctor's exit code says so) or useful. Each is limited in time.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import geni_violin
from geni_violin.cli import probes
from geni_violin.cli.client import load_settings
from geni_violin.cli.machine import QEMU, openvswitch_runs
from geni_violin.cli.printing import Json, line, print_json, print_table, table
from geni_violin.cli.probes import Tried
from geni_violin.cli.service_commands import ryu_manager
from geni_violin.core.errors import MachineFault
from geni_violin.runtime.settings import Settings
from geni_violin.runtime.wire import encode

PROJECT = Path(geni_violin.__file__).resolve().parents[1]
IMAGES = PROJECT / ".cache" / "images"
BOOT_LIMIT_S, KVM_LIMIT_S, COMMAND_LIMIT_S = 30.0, 10.0, 10.0
OLDEST_QEMU = (6, 0)
"""background-snapshot is there since QEMU 6.0."""
FREE_BYTES_WANTED = 2 << 30
_TOOLS = {  # program: (Debian package, what for)
    "busybox": ("busybox-static", "the examples' guests"),
    "dropbear": ("dropbear-bin", "the examples' guests"),
    "mpicc": ("libmpich-dev", "the demonstration"),
    "mpiexec": ("mpich", "the demonstration"),
    "gcc": ("gcc", "the examples' guests"),
    "mnexec": ("mininet", "the tests"),
    "tcpdump": ("tcpdump", "the tests"),
}


@dataclass(frozen=True)
class Check:
    """One thing that was tried. ``remedy`` says what to install or do, if it does not work."""

    name: str
    works: bool
    needed: bool
    detail: str
    remedy: str = ""


def doctor(
    kvm: Annotated[bool, typer.Option("--kvm/--no-kvm", help="Try to boot a guest under KVM.")] = True,
    as_json: Json = False,
) -> None:
    """Find out what this machine can do, and what is missing."""
    checks = list(examine(load_settings(), kvm))
    ready = all(check.works for check in checks if check.needed)
    if as_json:
        print_json({"ready": ready, "checks": [encode(check) for check in checks]})
    else:
        _show(checks)
    if not ready:
        missing = ", ".join(check.name for check in checks if check.needed and not check.works)
        raise MachineFault(f"this machine cannot run a slice yet: {missing}", "the remedies are in doctor's table")


def _show(checks: list[Check]) -> None:
    rows = [(c.name, _verdict(c), c.detail, "" if c.works else c.remedy) for c in checks]
    print_table(table(("what", "works", "found", "remedy"), rows))
    if all(check.works for check in checks if check.needed):
        line("this machine can run slices")


def _verdict(check: Check) -> str:
    if check.works:
        return "yes"
    return "NO" if check.needed else "no (not needed)"


def examine(settings: Settings, kvm: bool) -> Iterator[Check]:
    """All checks, one after another."""
    yield _root()
    yield _python()
    yield _ryu()
    yield _qemu()
    yield _boot("guest under TCG", "tcg", needed=True)
    if kvm:
        yield _boot("guest under KVM", "kvm", needed=False)
    yield from _openvswitch()
    yield _device()
    yield _tried("write protection", False, probes.try_write_protection(), "run as root, on Linux 5.7 or newer")
    yield _disk(settings)
    yield _images()
    for program, (package, purpose) in _TOOLS.items():
        yield _tool(program, package, purpose)


def _tried(name: str, needed: bool, tried: Tried, remedy: str) -> Check:
    return Check(name, tried.works, needed, tried.detail, remedy)


def _root() -> Check:
    root = os.geteuid() == 0
    return Check("root", root, True, "yes" if root else f"user id {os.geteuid()}", "run as root, or by sudo")


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", sys.version_info >= (3, 11), True, found, "install Python 3.11 or newer")


def _ryu() -> Check:
    try:
        program = ryu_manager()
        found = _version_line([program, "--version"])
    except MachineFault as error:
        return Check("controller", False, True, error.message, error.hint)
    return Check(
        "controller",
        bool(found),
        True,
        found or f"{program} gave no answer",
        "make bootstrap; a machine under load may just be slow",
    )


def _version_line(command: list[str]) -> str:
    """The first line that a command prints, or nothing if it does not work."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else ""


def _qemu() -> Check:
    found = _version_line([QEMU, "--version"])
    match = re.search(r"version (\d+)\.(\d+)", found)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    return Check(
        "QEMU", version >= OLDEST_QEMU, True, found or "not found", "apt-get install qemu-system-x86 (6.0 or newer)"
    )


def _boot(name: str, accelerator: str, needed: bool) -> Check:
    remedy = "needs a working QEMU" if needed else "slices run under TCG; it is only slower"
    if accelerator == "kvm" and not Path("/dev/kvm").exists():
        return Check(name, False, needed, "there is no /dev/kvm", remedy)
    limit_s = KVM_LIMIT_S if accelerator == "kvm" else BOOT_LIMIT_S
    return _tried(name, needed, probes.try_boot(accelerator, _guest(), limit_s), remedy)


def _guest() -> tuple[Path, Path] | None:
    kernel, initrd = IMAGES / "vmlinuz", IMAGES / "causality.initrd"
    return (kernel, initrd) if kernel.exists() and initrd.exists() else None


def _openvswitch() -> Iterator[Check]:
    install = "apt-get install openvswitch-switch"
    found = _version_line(["ovs-vsctl", "--version"])
    yield Check("Open vSwitch", bool(found), True, found or "ovs-vsctl not found", install)
    if found and not openvswitch_runs():
        yield Check("Open vSwitch runs", False, False, "it does not answer", "geni-violin up starts it")
    elif found:
        yield _tried("Open vSwitch bridge", True, probes.try_bridge(COMMAND_LIMIT_S), "see /var/log/openvswitch")


def _device() -> Check:
    remedy = "load the kernel's tun module, or allow the container to use it"
    try:
        with Path("/dev/net/tun").open("rb+", buffering=0):
            return Check("TAP device", True, True, "/dev/net/tun opens")
    except OSError as error:
        return Check("TAP device", False, True, f"/dev/net/tun: {error.strerror}", remedy)


def _disk(settings: Settings) -> Check:
    folder = next(
        path for path in (settings.state_dir.resolve(), *settings.state_dir.resolve().parents) if path.is_dir()
    )
    free = shutil.disk_usage(folder).free
    detail = f"{free / (1 << 30):.1f} GiB free at {folder}"
    return Check("disk", free >= FREE_BYTES_WANTED, True, detail, "free 2 GiB, or set GENI_VIOLIN_STATE_DIR")


def _images() -> Check:
    there = _guest() is not None
    detail = str(IMAGES) if there else f"none in {IMAGES}"
    return Check("example guests", there, False, detail, f"{PROJECT / 'topologies' / 'build-images'}")


def _tool(program: str, package: str, purpose: str) -> Check:
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    return Check(program, found is not None, False, found or f"not found; for {purpose}", f"apt-get install {package}")
