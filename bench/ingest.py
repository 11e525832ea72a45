"""How fast one stream is ingested, beside a plain write and fsync of the same bytes in the same run.

A server process of its own, a client process that sends over loopback; the time is from the first byte to *durable*.
Usage: ``python bench/ingest.py [--folder FOLDER] [--mib 1024] [--rounds 5]``. Prints medians and their ratio.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import httpx

from geni_violin.snapshot_server.server import run_server

CHUNK_BYTES = 1 << 20
HEADER = b"QEVM\x00\x00\x00\x03"


def payload() -> bytes:
    """A megabyte that does not compress."""
    return os.urandom(CHUNK_BYTES)


def plain_write_s(folder: Path, mib: int, chunk: bytes) -> float:
    """Seconds to write and fsync a file, and nothing else."""
    path = folder / "plain"
    started = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(mib):
            file.write(chunk)
        os.fsync(file.fileno())
    elapsed = time.monotonic() - started
    path.unlink()
    return elapsed


def ingest_s(http: httpx.Client, number: int, mib: int, chunk: bytes) -> tuple[float, float]:
    """Seconds until the last byte was sent, and until the image was durable."""
    size = len(HEADER) + mib * CHUNK_BYTES
    body = {
        "snapshot_id": f"bench-{number}",
        "name": f"bench-{number}",
        "images": [{"vm": "n1", "expected_bytes": size}],
    }
    staged = http.post("/v1/stagings", json=body).raise_for_status().json()
    with socket.create_connection((staged["ingest_host"], staged["ingest_port"])) as connection:
        connection.sendall(json.dumps({"put": staged["tokens"]["n1"]}).encode() + b"\n")
        if b"ok" not in connection.recv(100):
            raise RuntimeError("the put was refused")
        started = time.monotonic()
        connection.sendall(HEADER)
        for _ in range(mib):
            connection.sendall(chunk)
    sent = time.monotonic() - started
    path = f"/v1/stagings/bench-{number}/images/n1?wait_ms=60000"
    status = http.get(path, timeout=90).raise_for_status().json()
    durable = time.monotonic() - started
    if (status["state"], status["received_bytes"]) != ("durable", size):
        raise RuntimeError(f"the image is not durable: {status}")
    http.delete(f"/v1/stagings/bench-{number}").raise_for_status()
    return sent, durable


def serve(folder: Path, ready: Connection) -> None:
    """The server process."""
    run_server(host="127.0.0.1", port=0, ingest_host="127.0.0.1", ingest_port=0, store_dir=folder, on_ready=ready.send)


def main() -> None:
    """Alternate plain writes and ingests, print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    chunk = payload()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        here, there = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(Path(folder) / "store", there))
        server.start()
        try:
            with httpx.Client(base_url=here.recv(), trust_env=False) as http:
                rows = [
                    (plain_write_s(Path(folder), arguments.mib, chunk), *ingest_s(http, number, arguments.mib, chunk))
                    for number in range(arguments.rounds)
                ]
        finally:
            server.terminate()
            server.join()
    plain, sent, durable = (statistics.median(column) for column in zip(*rows, strict=True))
    lines = (
        f"{arguments.mib} MiB, median of {arguments.rounds}:",
        f"  plain write and fsync  {arguments.mib / plain:7.0f} MiB/s",
        f"  ingest, last byte in   {arguments.mib / sent:7.0f} MiB/s",
        f"  ingest, durable        {arguments.mib / durable:7.0f} MiB/s",
        f"  ratio durable to plain {plain / durable:7.2f}",
    )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
