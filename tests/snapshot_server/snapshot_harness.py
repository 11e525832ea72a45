"""What the snapshot server's tests share: streams, manifests, a server in this process and one of its own."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from blake3 import blake3
from fastapi import FastAPI

from geni_violin.core.messages import ChannelSummary, ExpectedImage, Manifest, SealChannels, StageRequest, VmImage
from geni_violin.core.model import LinkSpec, SliceSpec
from geni_violin.runtime import pcap
from geni_violin.runtime.http import bind
from geni_violin.runtime.wire import encode
from geni_violin.snapshot_server.api import create_app
from geni_violin.snapshot_server.pages.page_store import open_folder
from geni_violin.snapshot_server.store import ImageStore, StoredImage
from geni_violin.snapshot_server.store_api import KeptStore

HEADER = b"QEVM\x00\x00\x00\x03"
MACS = {f"n{number}": f"52:54:00:00:00:0{number}" for number in (1, 2, 3)}
BROADCAST = "ff:ff:ff:ff:ff:ff"
CLOCK_NS = 5_000_000_999
CLOCK_US = 5_000_000
MIB = 1 << 20


def stream_of(size: int, seed: int = 1) -> bytes:
    """A stream of ``size`` bytes that begins as QEMU's and goes on with bytes that differ by place and seed."""
    return HEADER + blake3(bytes([seed])).digest(length=size - len(HEADER))


def timer_section(clock_ns: int, section_id: int = 0) -> bytes:
    """The section of a stream that holds the guest's clock; the same bytes as QEMU 7.2's, but for the two numbers."""
    header = b"\x04" + section_id.to_bytes(4, "big") + b"\x05timer" + bytes(4) + (2).to_bytes(4, "big")
    body = (6_451_921_632).to_bytes(8, "big") + bytes(8) + clock_ns.to_bytes(8, "big", signed=True)
    return header + body + b"\x7e" + section_id.to_bytes(4, "big")


def stopped_stream(clock_ns: int = CLOCK_NS, size: int = 5000, seed: int = 1) -> bytes:
    """A stream that tells its guest's clock, with other device state before and after that."""
    return stream_of(size, seed) + timer_section(clock_ns) + b"\x04\0\0\0\x04\x0acpu_common" + bytes(300)


def frame_to(mac: str, words: str, at_us: int = 0) -> pcap.Frame:
    """A frame to an address, from nowhere, that carries words."""
    return pcap.Frame(at_us, bytes.fromhex(mac.replace(":", "")) + bytes(6) + b"\x88\xb5" + words.encode())


def words_of(data: bytes) -> list[str]:
    """What the frames of a channel state carry, in order."""
    return [frame.data[14:].decode() for frame in pcap.decode(data)]


def request_of(
    snapshot_id: str = "id-1", name: str = "first", vms: tuple[str, ...] = ("n1",), expected_bytes: int = 8 * MIB
) -> StageRequest:
    """A staging."""
    return StageRequest(snapshot_id, name, tuple(ExpectedImage(vm, expected_bytes) for vm in vms))


def manifest_of(request: StageRequest, stored: list[StoredImage], channels: Sequence[ChannelSummary] = ()) -> Manifest:
    """The manifest that fits what was stored and sealed."""
    frames = {channel.vm: channel.frames for channel in channels}
    vms = tuple(
        VmImage(
            *(image.vm, "h1", 1.25, 2.5, "background", image.received_bytes, image.stored_bytes, MIB, image.blake3),
            frames_in_transit=frames.get(image.vm, 0),
        )
        for image in stored
    )
    blank = SliceSpec("mandelbrot", ("h1",), (), (LinkSpec("s1", "s2"),), ())
    fixed: dict[str, Any] = {"created_at": 1e9 + 1 / 3, "epoch": 1, "strategy": "background", "network": "hold"}
    counts: dict[str, Any] = {"frames_held": 0, "frames_dropped": 3, "frames_in_transit": sum(frames.values())}
    times: dict[str, Any] = {"coordination": "color", "skew_ms": 0.1, "total_ms": 7.0, "notes": ("a note",)}
    return Manifest(id=request.snapshot_id, name=request.name, slice=blank, vms=vms, **fixed, **counts, **times)


def store_image(store: ImageStore, snapshot_id: str, vm: str, data: bytes) -> StoredImage:
    """Write an image in two portions."""
    writer = store.open_writer(snapshot_id, vm)
    writer.write(memoryview(data)[:10])
    writer.write(memoryview(data)[10:])
    return writer.finish()


def take(store: ImageStore, request: StageRequest, size: int = 5000) -> Manifest:
    """Stage, store and publish."""
    store.stage(request)
    stored = [
        store_image(store, request.snapshot_id, image.vm, stream_of(size, seed))
        for seed, image in enumerate(request.images)
    ]
    return store.publish(manifest_of(request, stored))


RECEIVED = {"n1": [frame_to(MACS["n1"], "2 to 1", 10)], "n2": [frame_to(BROADCAST, "3 to all", 20)], "n3": []}
SENT = {
    "n1": [
        frame_to(MACS["n2"], "1 to 2", CLOCK_US - 3000),
        frame_to(BROADCAST, "1 to all", CLOCK_US),
        frame_to(MACS["n2"], "new", CLOCK_US + 1),
        frame_to(BROADCAST, "new", CLOCK_US + 2000),
    ],
    "n2": [],
    "n3": [],
}
IN_TRANSIT = {"n1": ["2 to 1"], "n2": ["3 to all", "1 to 2", "1 to all"], "n3": ["1 to all"]}
"""The channel state of each VM that follows from these records, where every clock stopped at :data:`CLOCK_NS`."""


def stage_recorded(store: ImageStore, snapshot_id: str = "id-1", name: str = "first") -> list[StoredImage]:
    """Stage three VMs, store images that tell their clocks, and what their edges recorded; gives the images.

    What is done already is not done again.
    """
    store.stage(request_of(snapshot_id, name, tuple(MACS)))
    stored = []
    for seed, vm in enumerate(MACS, start=1):
        image = store.stored_image(snapshot_id, vm)
        stored.append(image or store_image(store, snapshot_id, vm, stopped_stream(seed=seed)))
        store.put_record(snapshot_id, vm, "received", pcap.encode(RECEIVED[vm]))
        store.put_record(snapshot_id, vm, "sent", pcap.encode(SENT[vm]))
    return stored


def take_sealed(store: ImageStore, snapshot_id: str = "id-1", name: str = "first") -> Manifest:
    """Stage, store, seal and publish what :func:`stage_recorded` makes."""
    stored = stage_recorded(store, snapshot_id, name)
    channels = store.seal_channels(snapshot_id, SealChannels(MACS))
    return store.publish(manifest_of(request_of(snapshot_id, name, tuple(MACS)), stored, channels))


ALWAYS = {"objects/.lock", "objects/store.json", "state/lock", "state/index.bin"}
"""The files of a store without anything in it."""


def files_below(folder: Path) -> set[str]:
    """All files, as paths relative to ``folder``, without those of an empty store."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - ALWAYS


def image_of(store: ImageStore, snapshot_id: str, vm: str) -> bytes:
    """All bytes of an image."""
    with store.open_image(snapshot_id, vm) as reader:
        return b"".join(reader.chunks())


def changed(manifest: Manifest, **changes: Any) -> Manifest:
    """The manifest with its first VM changed."""
    return replace(manifest, vms=(replace(manifest.vms[0], **changes), *manifest.vms[1:]))


# --- sockets ----------------------------------------------------------------------------------------------------------


def open_ingest(address: tuple[str, int], opening: dict[str, str] | bytes) -> tuple[socket.socket, dict[str, Any]]:
    """Connect and say the opening; gives the connection and the server's answer."""
    connection = socket.create_connection(address, timeout=20)
    connection.sendall(opening if isinstance(opening, bytes) else json.dumps(opening).encode() + b"\n")
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)  # no byte of the stream that follows may be eaten
        if not byte:
            raise ConnectionError(f"the server closed the connection after {line!r}")
        line += byte
    return connection, json.loads(line)


def put(address: tuple[str, int], token: str, data: bytes) -> None:
    """Send a whole image."""
    connection, answer = open_ingest(address, {"put": token})
    with connection:
        if answer != {"ok": True}:
            raise ConnectionError(str(answer))
        connection.sendall(data)


def get(address: tuple[str, int], snapshot_id: str, vm: str) -> bytes:
    """Receive a whole image."""
    connection, answer = open_ingest(address, {"get": snapshot_id, "vm": vm})
    with connection:
        if answer != {"ok": True}:
            raise ConnectionError(str(answer))
        return b"".join(iter(lambda: connection.recv(MIB), b""))


def reset(connection: socket.socket) -> None:
    """End a connection as the death of its machine would."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# --- servers ----------------------------------------------------------------------------------------------------------


@dataclass
class InProcess:
    """A server in this event loop: its REST side without a socket, its ingest side with one."""

    http: httpx.AsyncClient
    address: tuple[str, int]
    app: FastAPI

    async def stage(self, request: StageRequest) -> dict[str, str]:
        """Stage; gives the tokens."""
        answer = (await self.http.post("/v1/stagings", json=encode(request))).raise_for_status().json()
        if (answer["ingest_host"], answer["ingest_port"]) != self.address:
            raise AssertionError(f"the staging names {answer} instead of {self.address}")
        tokens: dict[str, str] = answer["tokens"]
        return tokens

    async def put(self, token: str, data: bytes) -> None:
        """Send a whole image."""
        await asyncio.to_thread(put, self.address, token, data)

    async def open(self, opening: dict[str, str] | bytes) -> tuple[socket.socket, dict[str, Any]]:
        """See :func:`open_ingest`."""
        return await asyncio.to_thread(open_ingest, self.address, opening)

    async def status(self, snapshot_id: str = "id-1", vm: str = "n1", wait_ms: int = 20_000) -> dict[str, Any]:
        """An image's status."""
        path = f"/v1/stagings/{snapshot_id}/images/{vm}?wait_ms={wait_ms}"
        answer: dict[str, Any] = (await self.http.get(path)).raise_for_status().json()
        return answer

    async def until_received(self, count: int) -> None:
        """Wait until so many bytes of n1's image have come."""
        for _ in range(2000):
            if (await self.status(wait_ms=0))["received_bytes"] >= count:
                return
            await asyncio.sleep(0.01)
        raise TimeoutError(f"{count} bytes did not come within 20 s")


@contextlib.asynccontextmanager
async def in_process(store: KeptStore) -> AsyncIterator[InProcess]:
    """A running server over ``store``, which is closed at the end."""
    listener = bind("127.0.0.1", 0)
    app = create_app(store, listener, lambda: None)
    address: tuple[str, int] = listener.getsockname()
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://server") as http,
    ):
        yield InProcess(http, address, app)


@contextlib.asynccontextmanager
async def in_folder(folder: Path) -> AsyncIterator[InProcess]:
    """A running server over a store in ``folder``."""
    async with in_process(open_folder(folder)) as server:
        yield server


_RUN = """
import os
import sys
from pathlib import Path
from geni_violin.snapshot_server.backends.opening import open_backend
from geni_violin.snapshot_server.server import run_server
folder, url, endpoint = sys.argv[1:]
run_server(host="127.0.0.1", port=0, ingest_host="127.0.0.1", ingest_port=0, store_dir=Path(folder),
           on_ready=lambda address: print("ready", address, flush=True),
           open_bucket=(lambda: open_backend(url, os.environ, s3_endpoint=endpoint)) if url else None)
"""


@dataclass(frozen=True)
class Bucket:
    """An object store for a server of its own process: where, and the environment variables with its credentials."""

    url: str
    endpoint: str
    environment: Mapping[str, str]


@dataclass
class OwnProcess:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    http: httpx.Client

    def ingest_address(self) -> tuple[str, int]:
        """Where images go."""
        health = self.http.get("/healthz").raise_for_status().json()
        return health["ingest_host"], health["ingest_port"]

    def stage(self, request: StageRequest) -> dict[str, str]:
        """Stage; gives the tokens."""
        tokens: dict[str, str] = (
            self.http.post("/v1/stagings", json=encode(request)).raise_for_status().json()["tokens"]
        )
        return tokens

    def status(self, snapshot_id: str = "id-1", vm: str = "n1", wait_ms: int = 20_000) -> dict[str, Any]:
        """An image's status."""
        path = f"/v1/stagings/{snapshot_id}/images/{vm}?wait_ms={wait_ms}"
        answer: dict[str, Any] = self.http.get(path, timeout=30).raise_for_status().json()
        return answer

    def wait_until_received(self, count: int) -> None:
        """Wait until so many bytes of n1's image have come."""
        for _ in range(2000):
            if self.status(wait_ms=0)["received_bytes"] >= count:
                return
            time.sleep(0.01)
        raise TimeoutError(f"{count} bytes did not come within 20 s")

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def own_process(
    folder: Path, prefix: tuple[str, ...] = (), bucket: Bucket = Bucket("", "", {})
) -> Iterator[OwnProcess]:
    """A server process over ``folder``; ended by SIGTERM if it still runs.

    :param prefix: a command that runs the command that follows it.
    :param bucket: where images are kept instead, if it has an address.
    """
    command = [*prefix, sys.executable, "-c", _RUN, str(folder), bucket.url, bucket.endpoint]
    environment = {**os.environ, **bucket.environment}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("ready "):
                raise RuntimeError(process.communicate()[1])
            with httpx.Client(base_url=line.split()[1], trust_env=False) as http:
                yield OwnProcess(process, http)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            process.communicate()
