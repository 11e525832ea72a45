"""A snapshot server with an empty store (``store_server``), and what the parts do with it over TCP and REST."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

_SENT_AT_A_TIME = 1 << 26


@dataclass(frozen=True)
class Ingested:
    """How long it took to take images in, from the first byte to durable: the last of them, and each."""

    durable_s: float
    each_s: tuple[float, ...]


class Server:
    """The server, as an agent and the coordinator see it."""

    def __init__(self, address: str, pid: int, folder: Path) -> None:
        self.pid = pid
        self.folder = folder
        self.http = httpx.Client(base_url=address, trust_env=False, timeout=600)
        self._ingest_address = ingest_address(self.http)

    def ingest(self, snapshot: str, streams: Mapping[str, Path]) -> Ingested:
        """Take a snapshot of these VMs, all at once: the bytes of their images' files, until all are durable.

        :raise RuntimeError: an image was refused or failed.
        """
        images = [{"vm": vm, "expected_bytes": path.stat().st_size} for vm, path in streams.items()]
        body = {"snapshot_id": snapshot, "name": snapshot, "images": images}
        tokens = self.http.post("/v1/stagings", json=body).raise_for_status().json()["tokens"]
        connections = {vm: opened(self._ingest_address, {"put": tokens[vm]}) for vm in streams}

        def send(vm: str) -> float:
            with connections[vm] as connection, streams[vm].open("rb") as file:
                _send(connection, file.fileno())
            path = f"/v1/stagings/{snapshot}/images/{vm}?wait_ms=60000"
            while (status := self.http.get(path).raise_for_status().json())["state"] == "receiving":
                pass
            if (status["state"], status["received_bytes"]) != ("durable", streams[vm].stat().st_size):
                raise RuntimeError(f"the image of {vm} is not durable: {status}")
            return time.monotonic()

        with ThreadPoolExecutor(len(streams)) as pool:
            began = time.monotonic()
            each = tuple(ended - began for ended in pool.map(send, streams))
        return Ingested(max(each), each)

    def publish(self, snapshot: str, vms: Mapping[str, Path]) -> int:
        """Commit a snapshot; the bytes that its images added to the store, as the server says.

        :raise RuntimeError: it was refused.
        """
        statuses = [self.http.get(f"/v1/stagings/{snapshot}/images/{vm}").raise_for_status().json() for vm in vms]
        answer = self.http.post(f"/v1/stagings/{snapshot}/publish", json=_manifest(snapshot, statuses))
        if answer.is_error:
            raise RuntimeError(f"the snapshot was not published: {answer.text}")
        return sum(int(status["stored_bytes"]) for status in statuses)

    @contextmanager
    def image(self, snapshot: str, vm: str) -> Iterator[int]:
        """Ask for an image; the connection that it comes through."""
        with opened(self._ingest_address, {"get": snapshot, "vm": vm}) as connection:
            yield connection.fileno()

    def stored_bytes(self) -> int:
        """The sizes of all files in the store's folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def peak_memory_bytes(self) -> int:
        """The most memory that the process had resident so far (VmHWM, proc(5))."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))

    def processor_s(self) -> float:
        """Processor seconds that the process has used so far, in user space and in the kernel."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def opened(address: tuple[str, int], opening: dict[str, str]) -> socket.socket:
    """A connection to the ingest port that brings or takes an image, once the server has agreed.

    :raise RuntimeError: it refuses.
    """
    connection = socket.create_connection(address)
    connection.sendall(json.dumps(opening).encode() + b"\n")
    answer = b""
    while not answer.endswith(b"\n") and (byte := connection.recv(1)):  # what follows the line is the image's
        answer += byte
    if b"ok" not in answer:
        connection.close()
        raise RuntimeError(f"the server refused {opening}: {answer.decode()}")
    return connection


def ingest_address(http: httpx.Client) -> tuple[str, int]:
    """Where the server at the other end takes and gives images."""
    health = http.get("/healthz").raise_for_status().json()
    return health["ingest_host"], health["ingest_port"]


def _send(connection: socket.socket, file: int) -> None:
    """From the page cache into the socket, without a copy in this process."""
    offset = 0
    while sent := os.sendfile(connection.fileno(), file, offset, _SENT_AT_A_TIME):
        offset += sent
    connection.shutdown(socket.SHUT_WR)


def _manifest(snapshot: str, statuses: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a slice of these VMs that has no network."""
    kept = ("vm", "received_bytes", "stored_bytes", "blake3")
    vms = [
        {
            **{("name" if key == "vm" else key): status[key] for key in kept},
            **{"host": "h1", "cut_at": 0.0, "downtime_ms": 0.0, "strategy": "background", "memory_bytes": 0},
        }
        for status in statuses
    ]
    figures = dict.fromkeys(("created_at", "skew_ms", "total_ms"), 0.0)
    counts = dict.fromkeys(("epoch", "frames_held", "frames_dropped", "frames_in_transit"), 0)
    nothing: dict[str, Any] = {"hosts": [], "switches": [], "links": [], "vms": []}
    how = {"strategy": "background", "network": "drop", "coordination": "none", "notes": []}
    return {
        "id": snapshot,
        "name": snapshot,
        "slice": {"name": "bench", **nothing},
        **figures,
        **counts,
        **how,
        "vms": vms,
    }


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """A server with an empty store in a folder that is not there yet; its log is beside it.

    :raise SystemExit: it does not start; its log says why.
    """
    command = [sys.executable, "-m", "bench.store_server", str(folder)]
    log = folder.with_suffix(".log")
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit(f"the snapshot server did not start: {log.read_text()[-2000:]}")
        server = Server(address, process.pid, folder)
        yield server
        server.http.close()
    finally:
        process.terminate()
        process.communicate()
