"""One real guest on one TAP device, and the two ends of its image's way.

Theory of operation. The guest is the project's own kernel and modules with another first process, added as a second
archive behind the initramfs (the kernel unpacks all of them, and what comes later wins). It counts on its console,
dirties memory, and sends numbered pings to an address that the test plays: the test holds a raw socket on the TAP
device, so it sees each frame that the guest sends and sends it what it likes, without a switch between.
"""

import asyncio
import contextlib
import gzip
import os
import re
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from geni_violin.hostagent import names, ports
from geni_violin.hostagent.hypervisor import Nic, Vm, VmDefinition
from geni_violin.hostagent.qemu import QemuHypervisor, QemuVm
from geni_violin.hostagent.vm_events import Died, MigrationStatus, VmEvent, Watch
from geni_violin.runtime.processes import Ledger
from geni_violin.runtime.settings import Settings

IMAGES = Path(__file__).resolve().parent.parent / ".cache" / "images"
BUILDER = Path(__file__).resolve().parent.parent / "topologies" / "build-images"
GUEST_MAC, HOST_MAC = "52:54:00:67:76:01", "02:00:00:67:76:02"
GUEST_ADDRESS, HOST_ADDRESS = "10.77.0.1", "10.77.0.2"
END_STATUSES = ("completed", "failed", "cancelled")
_IPV4, _ETH_P_ALL, _SOL_PACKET, _PACKET_IGNORE_OUTGOING = 0x0800, 3, 263, 23
_ICMP, _ECHO_REQUEST, _ECHO_REPLY = 1, 8, 0
_SO_RCVBUFFORCE = 33  # socket(7): for root, beyond what others may have

INIT = f"""#!/bin/sh
. /lib/gv/common.sh
mount_all
load_modules
ip link set eth0 up
ip addr add {GUEST_ADDRESS}/24 dev eth0
ip neigh add {HOST_ADDRESS} lladdr {HOST_MAC} dev eth0 nud permanent 2>/dev/null || \
    busybox arp -s {HOST_ADDRESS} {HOST_MAC}
echo GUEST-BOOTED
busybox ping -i 0.02 {HOST_ADDRESS} >/dev/null &
while :; do busybox dd if=/dev/urandom of=/tmp/churn bs=64k count=4 2>/dev/null; sleep 0.2; done &
n=0
while :; do n=$((n+1)); echo "TICK $n"; sleep 0.1; done
"""


def guest_initrd(folder: Path) -> Path:
    """The initramfs of the test's guest, made in a folder. Builds the project's images if they are not there."""
    subprocess.run([str(BUILDER)], check=True, stdout=subprocess.DEVNULL)
    path = folder / "test.initrd"
    path.write_bytes((IMAGES / "causality.initrd").read_bytes() + gzip.compress(_archive("init", INIT.encode())))
    return path


def _archive(name: str, data: bytes) -> bytes:
    """A cpio archive (newc) of one program."""
    return _cpio_record(1, name, 0o100755, data) + _cpio_record(0, "TRAILER!!!", 0, b"")


def _cpio_record(inode: int, path: str, mode: int, data: bytes) -> bytes:
    name = path.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in fields) + name
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


@dataclass
class Bench:
    """What one test works on: an installation of its own, and one TAP device."""

    settings: Settings
    initrd: Path
    tap: str
    memory_mib: int = 128

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.settings.run_dir / "processes")

    @property
    def hypervisor(self) -> QemuHypervisor:
        return QemuHypervisor(self.settings.run_dir, self.ledger, "h1")

    def definition(self, name: str = "n1", incoming: bool = False) -> VmDefinition:
        """A VM on the TAP device."""
        return VmDefinition(
            slice="test",
            name=name,
            host="h1",
            kernel=str(IMAGES / "vmlinuz"),
            initrd=str(self.initrd),
            append="console=ttyS0 quiet",
            memory_mib=self.memory_mib,
            vcpus=1,
            nics=(Nic(self.tap, GUEST_MAC),),
            incoming=incoming,
        )

    @contextlib.asynccontextmanager
    async def booted(self) -> AsyncIterator[QemuVm]:
        """A VM that has booted and counts; deleted at the end."""
        vm = await self.hypervisor.create(self.definition())
        try:
            await vm.run()
            await ticks_on(vm, 60.0)
            yield vm
        finally:
            await vm.delete()

    @contextlib.asynccontextmanager
    async def restored(self, image: bytes, name: str = "n1") -> AsyncIterator[QemuVm]:
        """A new VM made from an image, paused; deleted at the end."""
        vm = await self.hypervisor.create(self.definition(name, incoming=True))
        try:
            await load(vm, image)
            yield vm
        finally:
            await vm.delete()


Scenario = Callable[[Bench], Awaitable[None]]
"""What a test does on its bench."""


@contextlib.asynccontextmanager
async def bench(state_dir: Path, initrd: Path) -> AsyncIterator[Bench]:
    """An installation of its own with a TAP device; the device is deleted at the end."""
    settings = Settings(state_dir=state_dir)
    tap = names.tap_name(settings.installation_id, "test", "n1")
    await ports.create_tap(tap)
    try:
        yield Bench(settings, initrd, tap)
    finally:
        await ports.delete_tap(tap)


# --- the guest's console ----------------------------------------------------------------------------------------------


def ticks(vm: Vm) -> list[int]:
    """The numbers on the guest's console."""
    text = vm.console_path.read_text(errors="replace") if vm.console_path.exists() else ""
    return [int(number) for number in re.findall(r"TICK (\d+)\r?\n", text)]


async def ticks_on(vm: Vm, timeout_s: float = 5.0) -> None:
    """Return when the guest has counted on by three.

    :raise AssertionError: it does not in time.
    """
    before = len(ticks(vm))
    deadline = time.monotonic() + timeout_s
    while len(ticks(vm)) < before + 3:
        assert time.monotonic() < deadline, f"the guest stands still at {ticks(vm)[-1:]}"
        await asyncio.sleep(0.05)


# --- images -----------------------------------------------------------------------------------------------------------


class Receiver:
    """The receiving end of an image: keeps the bytes.

    :param close_after: hangs up after so many bytes.
    :param stall_after: reads no more after so many bytes, until :meth:`close`.
    """

    def __init__(self, close_after: int | None = None, stall_after: int | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.sender = socket.create_connection(listener.getsockname())
            self._connection, _ = listener.accept()
        self._close_after, self._stall_after = close_after, stall_after
        self._closed = threading.Event()
        self.image = bytearray()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        with self._connection:
            while self._close_after is None or len(self.image) < self._close_after:
                if self._stall_after is not None and len(self.image) >= self._stall_after:
                    self._closed.wait()
                    return
                try:
                    data = self._connection.recv(1 << 16)
                except OSError:
                    return
                if not data:
                    return
                self.image += data

    def close(self) -> None:
        """Hang up as the socket of a killed process does: by a reset.

        A shutdown before it would send FIN; a sender that waits at a closed window can then wait for seconds.
        """
        with contextlib.suppress(OSError):
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._closed.set()
        self._thread.join(0.5)
        with contextlib.suppress(OSError):  # it still reads: the sender has sent too little for a stall
            self._connection.shutdown(socket.SHUT_RDWR)

    async def whole(self) -> bytes:
        """All that came, once the sender has hung up."""
        await asyncio.to_thread(self._thread.join, 10.0)
        assert not self._thread.is_alive(), "the sender did not hang up"
        return bytes(self.image)


async def start_migration(vm: Vm, strategy: str, receiver: Receiver) -> None:
    """Start to send the VM's image to a receiver."""
    await vm.start_migration(receiver.sender.fileno(), strategy)
    receiver.sender.close()


async def end_of_migration(vm: Vm, watch: Watch, timeout_s: float = 30.0) -> list[VmEvent]:
    """All events up to the migration's end; goes on after pre-switchover."""
    seen: list[VmEvent] = []
    async with asyncio.timeout(timeout_s):
        while True:
            event = await watch.next()
            seen.append(event)
            if isinstance(event, Died) or (isinstance(event, MigrationStatus) and event.status in END_STATUSES):
                return seen
            if isinstance(event, MigrationStatus) and event.status == "pre-switchover":
                await vm.continue_migration()


async def snapshot(vm: Vm, strategy: str) -> tuple[bytes, list[VmEvent]]:
    """A VM's image, and what happened; the VM runs afterwards."""
    receiver = Receiver()
    with vm.watch() as watch:
        if strategy == "stop":
            await vm.pause()
        await start_migration(vm, strategy, receiver)
        seen = await end_of_migration(vm, watch)
        await vm.ensure_running()
        return await receiver.whole(), seen + watch.pending()


async def image_of_paused(vm: Vm, strategy: str) -> bytes:
    """The image of a VM that is paused already; the VM runs afterwards."""
    receiver = Receiver()
    with vm.watch() as watch:
        await start_migration(vm, strategy, receiver)
        await end_of_migration(vm, watch)
        await vm.ensure_running()
        return await receiver.whole()


async def load(vm: Vm, image: bytes) -> None:
    """Load an image into a VM."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        with contextlib.suppress(OSError), ours:
            ours.sendall(image)

    sender = asyncio.create_task(asyncio.to_thread(send))
    try:
        with theirs:
            await vm.load(theirs.fileno(), timeout_s=30.0)
    finally:
        ours.close()
        await sender


# --- frames -----------------------------------------------------------------------------------------------------------


class Wire:
    """The host's end of the guest's cable: sends it frames, sees what it sends."""

    def __init__(self, tap: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
        self._socket.bind((tap, 0))

    def close(self) -> None:
        """Let go of the cable."""
        self._socket.close()

    def ping(self, number: int) -> None:
        """Send the guest an echo request; it answers with the same number."""
        self._socket.send(echo_request(number))

    def send(self, frame: bytes) -> None:
        """Send the guest a frame as it is."""
        self._socket.send(frame)

    def _frames(self) -> Iterator[bytes]:
        while select.select([self._socket], [], [], 0)[0]:
            yield self._socket.recv(65_536)

    def seen(self) -> tuple[list[int], list[int]]:
        """The numbers of the guest's own echo requests and of its replies, in order, since the last call."""
        requests, replies = [], []
        for frame in self._frames():
            kind, number = echo_of(frame)
            if kind == _ECHO_REQUEST:
                requests.append(number)
            elif kind == _ECHO_REPLY:
                replies.append(number)
        return requests, replies

    def ethertypes(self) -> set[int]:
        """The types of all frames that came since the last call."""
        return {struct.unpack_from("!H", frame, 12)[0] for frame in self._frames()}


def echo_of(frame: bytes) -> tuple[int, int]:
    """The type and number of an ICMP echo frame; (-1, 0) for any other."""
    if struct.unpack_from("!H", frame, 12)[0] != _IPV4 or frame[23] != _ICMP:
        return -1, 0
    return frame[34], struct.unpack_from("!H", frame, 40)[0]


def echo_request(number: int) -> bytes:
    """An echo request from the host's address to the guest."""
    icmp = _with_checksum(struct.pack("!BBHHH", _ECHO_REQUEST, 0, 0, os.getpid() & 0xFFFF, number), 2)
    source, target = socket.inet_aton(HOST_ADDRESS), socket.inet_aton(GUEST_ADDRESS)
    length = 20 + len(icmp)
    ip = _with_checksum(struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, 0, 0, 64, _ICMP, 0, source, target), 10)
    macs = b"".join(bytes.fromhex(mac.replace(":", "")) for mac in (GUEST_MAC, HOST_MAC))
    return macs + struct.pack("!H", _IPV4) + ip + icmp


def _with_checksum(header: bytes, place: int) -> bytes:
    """The header with its Internet checksum (RFC 1071) put in."""
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return header[:place] + struct.pack("!H", ~total & 0xFFFF) + header[place + 2 :]
