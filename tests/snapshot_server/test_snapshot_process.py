"""The server as a process of its own: SIGKILL, restart, one folder for one server, a disk that is really full."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from snapshot_harness import (
    HEADER,
    MIB,
    OwnProcess,
    files_below,
    get,
    manifest_of,
    open_ingest,
    own_process,
    put,
    request_of,
    stream_of,
)

from geni_violin.runtime.wire import encode
from geni_violin.snapshot_server.store import StoredImage

REQUEST = request_of(expected_bytes=64 * MIB)


def _wait_for_a_pack(folder: Path) -> None:
    for _ in range(2000):
        if any(name.startswith("objects/packs/") for name in files_below(folder)):
            return
        time.sleep(0.01)
    raise TimeoutError("no pack was put within 20 s")


def _put_durably(server: OwnProcess, token: str, data: bytes) -> StoredImage:
    put(server.ingest_address(), token, data)
    status = server.status()
    assert status["state"] == "durable", status
    return StoredImage("n1", status["received_bytes"], status["stored_bytes"], status["blake3"])


def test_killed_in_the_middle_of_an_image(tmp_path: Path) -> None:
    with own_process(tmp_path) as server:
        token = server.stage(REQUEST)["n1"]
        connection, _answer = open_ingest(server.ingest_address(), {"put": token})
        connection.sendall(stream_of(40 * MIB))
        server.wait_until_received(40 * MIB)
        _wait_for_a_pack(tmp_path)
        server.kill()
        connection.close()
    with own_process(tmp_path) as server:
        assert {name for name in files_below(tmp_path) if "packs" not in name} == {"state/stagings/id-1.json"}
        assert server.http.get("/v1/snapshots").json() == []
        status = server.status()
        assert (status["state"], "restarted" in status["reason"]) == ("failed", True)
        early = encode(manifest_of(REQUEST, [StoredImage("n1", 3 * MIB, 3 * MIB, "0" * 64)]))
        assert server.http.post("/v1/stagings/id-1/publish", json=early).status_code == 409
        assert server.http.delete("/v1/stagings/id-1").status_code == 200
    assert files_below(tmp_path) == set()


def test_killed_between_durable_and_published(tmp_path: Path) -> None:
    data = stream_of(3 * MIB)
    with own_process(tmp_path) as server:
        stored = _put_durably(server, server.stage(request_of())["n1"], data)
        server.kill()
    manifest = encode(manifest_of(request_of(), [stored]))
    with own_process(tmp_path) as server:
        assert server.http.get("/v1/snapshots").json() == []
        assert server.status()["blake3"] == stored.blake3
        server.http.post("/v1/stagings/id-1/publish", json=manifest).raise_for_status()
        server.kill()
    with own_process(tmp_path) as server:
        assert server.http.get("/v1/snapshots").json() == [manifest]
        assert server.http.post("/v1/snapshots/first/verify").status_code == 200
        assert server.http.post("/v1/stagings/id-1/publish", json=manifest).json() == manifest
        assert get(server.ingest_address(), "id-1", "n1") == data


def test_staging_again_after_a_restart_gives_tokens_that_work(tmp_path: Path) -> None:
    with own_process(tmp_path) as server:
        old = server.stage(request_of())["n1"]
        server.kill()
    with own_process(tmp_path) as server:
        with pytest.raises(ConnectionError, match="no image is awaited"):
            put(server.ingest_address(), old, stream_of(5000))
        _put_durably(server, server.stage(request_of())["n1"], stream_of(5000))


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    second = own_process(tmp_path)
    with own_process(tmp_path), pytest.raises(RuntimeError, match="another snapshot server uses"), second:
        pass
    with own_process(tmp_path) as server:
        assert server.http.get("/healthz").json()["healthy"] is True


def test_it_ends_on_sigterm_while_an_image_comes(tmp_path: Path) -> None:
    with own_process(tmp_path) as server:
        connection, _answer = open_ingest(server.ingest_address(), {"put": server.stage(request_of())["n1"]})
        connection.sendall(stream_of(MIB))
        server.wait_until_received(MIB)
        server.process.terminate()
        server.process.wait(timeout=10)
        connection.close()
    assert files_below(tmp_path) == {"state/stagings/id-1.json"}


# --- a disk that is really full ---------------------------------------------------------------------------------------


def _can_mount_in_a_namespace(folder: Path) -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _stuff(connection: socket.socket) -> None:
    """Send what cannot be compressed until the server resets the connection."""
    for seed in range(256):
        connection.sendall(stream_of(MIB, seed))
    raise AssertionError("256 MiB went to a disk of 96 MiB")


def test_a_disk_that_fills_up_while_images_come(tmp_path: Path) -> None:
    """The disk is a tmpfs of 96 MiB that only the server sees; somebody else's file takes the promised room."""
    if not _can_mount_in_a_namespace(tmp_path):
        pytest.skip("needs root and unshare to mount a small tmpfs; test_a_full_device_… covers the same path without")
    script = 'mount -t tmpfs -o size=96m none "$0" && exec "$@"'
    prefix = ("unshare", "-m", "sh", "-c", script, str(tmp_path))
    with own_process(tmp_path / "store", prefix) as server:
        disk = Path(f"/proc/{server.process.pid}/root{tmp_path}")
        tokens = server.stage(request_of(vms=("n1", "n2"), expected_bytes=42 * MIB))
        address = server.ingest_address()
        good, _answer = open_ingest(address, {"put": tokens["n2"]})
        good.sendall(stream_of(MIB)[:1000])
        bad, _answer = open_ingest(address, {"put": tokens["n1"]})
        bad.sendall(HEADER)
        free = server.http.get("/healthz").json()["free_bytes"]
        (disk / "somebody-elses").write_bytes(bytes(free - 2 * MIB))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            _stuff(bad)
        bad.close()
        status = server.status()
        assert (status["state"], "disk is full" in status["reason"]) == ("failed", True), status
        assert not [name for name in files_below(disk) if "packs" in name or ".partial" in name]
        refused = server.http.post("/v1/stagings", json=encode(request_of("id-2", "second", expected_bytes=4 * MIB)))
        assert refused.status_code == 507
        good.sendall(stream_of(MIB)[1000:])
        good.close()
        status = server.status(vm="n2")
        assert status["state"] == "durable", status
        assert server.http.delete("/v1/stagings/id-1").status_code == 200
        (disk / "somebody-elses").unlink()
        _put_durably(server, server.stage(request_of("id-1", "first"))["n1"], stream_of(6 * MIB))
