"""Probes of ``doctor`` that try the real thing: boot a guest, write-protect memory, make a bridge.

A file that exists proves nothing (a /dev/kvm may be there and every guest hang on it), so each probe does what the
system will do, within a time limit, and leaves nothing behind.
"""

import ctypes
import fcntl
import mmap
import os
import platform
import selectors
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from geni_violin.cli.machine import QEMU

GREETING = b"GENI-VIOLIN GUEST BOOTS"

# linux/userfaultfd.h; the ioctl numbers are those of architectures with the generic encoding (x86-64, arm64)
_USERFAULTFD_CALL = {"x86_64": 323, "aarch64": 282}
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA06
_UFFD_API, _UFFD_FEATURE_PAGEFAULT_FLAG_WP = 0xAA, 1
_REGISTER_MODE_WP, _WRITEPROTECT_MODE_WP = 2, 1


@dataclass(frozen=True)
class Tried:
    """What a probe found."""

    works: bool
    detail: str


def boot_sector() -> bytes:
    """The smallest guest: 512 bytes that the BIOS loads at 0x7c00, and that greet on the first serial port."""
    code = _assemble()
    return (code + b"\r\n" + GREETING + b"\r\n\0").ljust(510, b"\0") + b"\x55\xaa"


def _assemble() -> bytes:
    """16-bit x86: print the text after the code, character by character, then halt."""
    head = bytes.fromhex("31c0 8ed8 fc")  # xor ax,ax; mov ds,ax; cld
    loop = bytes.fromhex("ac 84c0 7412 88c4 bafd03 ec a820 74fb 88e0 baf803 ee ebe9")
    halt = bytes.fromhex("f4 ebfd")  # hlt; jmp hlt
    text_at = 0x7C00 + len(head) + 3 + len(loop) + len(halt)
    return head + b"\xbe" + struct.pack("<H", text_at) + loop + halt


def try_boot(accelerator: str, guest: tuple[Path, Path] | None, limit_s: float) -> Tried:
    """Boot a guest and wait for its first words on the serial port: ``guest`` (kernel, initrd), or a boot sector."""
    with tempfile.TemporaryDirectory(prefix="geni-violin-doctor-") as folder:
        disk = Path(folder) / "boot.img"
        disk.write_bytes(boot_sector().ljust(1 << 20, b"\0"))
        what = "a boot sector" if guest is None else "a Linux guest"
        boot = ["-drive", f"file={disk},format=raw,if=ide"]
        if guest is not None:
            kernel, initrd = guest
            boot = ["-kernel", str(kernel), "-initrd", str(initrd), "-append", "console=ttyS0 panic=-1"]
        command = [QEMU, "-accel", accelerator, "-machine", "pc", "-m", "128", "-nodefaults", "-no-user-config"]
        command += ["-display", "none", "-no-reboot", "-serial", "stdio", "-monitor", "none", *boot]
        return _first_words(command, GREETING if guest is None else b"Linux version", what, limit_s)


def _first_words(command: list[str], expected: bytes, what: str, limit_s: float) -> Tried:
    begun = time.monotonic()
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        return Tried(False, f"{command[0]}: {error.strerror}")
    with process:
        try:
            seen = _read_until(process, expected, begun + limit_s)
        finally:
            process.kill()
        errors = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
    took = time.monotonic() - begun
    if expected in seen:
        return Tried(True, f"{what} boots: first words after {took:.1f} s")
    failures = [line for line in errors.splitlines() if "warning:" not in line]
    if failures:
        return Tried(False, f"QEMU: {failures[-1]}")
    return Tried(False, f"{what} does not boot: nothing expected on its serial port within {took:.0f} s")


def _read_until(process: subprocess.Popen[bytes], expected: bytes, deadline: float) -> bytes:
    assert process.stdout is not None
    seen = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while expected not in seen and (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    break
                seen += data
    return seen


def try_write_protection() -> Tried:
    """Register a page with userfaultfd for write protection, and protect it; what background-snapshot needs."""
    number = _USERFAULTFD_CALL.get(platform.machine())
    if number is None:
        return Tried(False, f"not known how to try on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        return Tried(False, f"userfaultfd: {os.strerror(ctypes.get_errno())}")
    try:
        return _protect_a_page(descriptor)
    except OSError as error:
        return Tried(False, f"the kernel refuses write protection by userfaultfd: {error.strerror}")
    finally:
        os.close(descriptor)


def _protect_a_page(descriptor: int) -> Tried:
    fcntl.ioctl(descriptor, _UFFDIO_API, bytearray(struct.pack("QQQ", _UFFD_API, _UFFD_FEATURE_PAGEFAULT_FLAG_WP, 0)))
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[0] = 1  # resident
        view = ctypes.c_char.from_buffer(page)
        try:
            start = ctypes.addressof(view)
            request = bytearray(struct.pack("QQQQ", start, mmap.PAGESIZE, _REGISTER_MODE_WP, 0))
            fcntl.ioctl(descriptor, _UFFDIO_REGISTER, request)
            protect = bytearray(struct.pack("QQQ", start, mmap.PAGESIZE, _WRITEPROTECT_MODE_WP))
            fcntl.ioctl(descriptor, _UFFDIO_WRITEPROTECT, protect)
        finally:
            del view
    return Tried(True, f"userfaultfd write protection works (Linux {platform.release()})")


def try_bridge(limit_s: float) -> Tried:
    """Make a bridge with the userspace datapath, and delete it."""
    name = f"gvd{os.getpid()}"
    limit = f"--timeout={limit_s:.0f}"
    make = ["ovs-vsctl", limit, "add-br", name, "--", "set", "bridge", name, "datapath_type=netdev"]
    try:
        made = subprocess.run(make, capture_output=True, text=True, timeout=limit_s + 5, check=False)
        error = subprocess.run(
            ["ovs-vsctl", limit, "get", "interface", name, "error"],
            capture_output=True,
            text=True,
            timeout=limit_s + 5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return Tried(False, f"ovs-vsctl: {problem}")
    finally:
        _delete_bridge(name, limit, limit_s)
    if made.returncode:
        said = made.stderr.strip().splitlines() or ["ovs-vsctl said nothing"]
        return Tried(False, f"no bridge can be made: {said[-1]}")
    if error.stdout.strip() not in ("[]", ""):
        return Tried(False, f"a bridge of the userspace datapath has an error: {error.stdout.strip()}")
    return Tried(True, "a bridge of the userspace datapath was made and deleted")


def _delete_bridge(name: str, limit: str, limit_s: float) -> None:
    try:
        subprocess.run(
            ["ovs-vsctl", limit, "--if-exists", "del-br", name], capture_output=True, timeout=limit_s + 5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return  # the probe has failed already, and says so
