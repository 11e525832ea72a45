"""The server as a process of its own: SIGKILL, restart, one folder for one server, a disk that is really full."""

import os
import shutil
import socket
import subprocess
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


def _put_durably(server: OwnProcess, token: str, data: bytes) -> StoredImage:
    put(server.ingest_address(), token, data)
    status = server.status()
    assert status["state"] == "durable", status
    return StoredImage("n1", status["received_bytes"], status["stored_bytes"], status["blake3"])


def test_killed_in_the_middle_of_an_image(tmp_path: Path) -> None:
    with own_process(tmp_path) as server:
        token = server.stage(request_of())["n1"]
        connection, _answer = open_ingest(server.ingest_address(), {"put": token})
        connection.sendall(stream_of(3 * MIB))
        server.wait_until_received(3 * MIB)
        server.kill()
        connection.close()
    assert "images/id-1/n1.stream.partial" in files_below(tmp_path)
    with own_process(tmp_path) as server:
        assert files_below(tmp_path) == {"stagings/id-1.json"}
        assert server.http.get("/v1/snapshots").json() == []
        status = server.status()
        assert (status["state"], "restarted" in status["reason"]) == ("failed", True)
        early = encode(manifest_of(request_of(), [StoredImage("n1", 3 * MIB, 3 * MIB, "0" * 64)]))
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
    assert files_below(tmp_path) == {"stagings/id-1.json"}


# --- a disk that is really full ---------------------------------------------------------------------------------------


def _can_mount_in_a_namespace(folder: Path) -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _stuff(connection: socket.socket, data: bytes) -> None:
    """Send until the server resets the connection; at most 64 times."""
    for _ in range(64):
        connection.sendall(data)
    raise AssertionError("64 MiB went to a disk of 16 MiB")


def test_a_disk_that_fills_up_while_images_come(tmp_path: Path) -> None:
    """The disk is a tmpfs of 16 MiB that only the server sees; somebody else's file takes the promised room."""
    if not _can_mount_in_a_namespace(tmp_path):
        pytest.skip("needs root and unshare to mount a small tmpfs; test_a_full_device_… covers the same path without")
    script = 'mount -t tmpfs -o size=16m none "$0" && exec "$@"'
    prefix = ("unshare", "-m", "sh", "-c", script, str(tmp_path))
    with own_process(tmp_path / "store", prefix) as server:
        disk = Path(f"/proc/{server.process.pid}/root{tmp_path}")
        tokens = server.stage(request_of(vms=("n1", "n2"), expected_bytes=7 * MIB))
        address = server.ingest_address()
        good, _answer = open_ingest(address, {"put": tokens["n2"]})
        good.sendall(stream_of(MIB)[:1000])
        bad, _answer = open_ingest(address, {"put": tokens["n1"]})
        bad.sendall(HEADER)
        free = server.http.get("/healthz").json()["free_bytes"]
        (disk / "somebody-elses").write_bytes(bytes(free - 2 * MIB))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            _stuff(bad, stream_of(MIB))
        bad.close()
        status = server.status()
        assert (status["state"], "disk is full" in status["reason"]) == ("failed", True), status
        assert "store/images/id-1/n1.stream.partial" not in files_below(disk)
        refused = server.http.post("/v1/stagings", json=encode(request_of("id-2", "second", expected_bytes=4 * MIB)))
        assert refused.status_code == 507
        good.sendall(stream_of(MIB)[1000:])
        good.close()
        assert server.status(vm="n2")["state"] == "durable"
        assert server.http.delete("/v1/stagings/id-1").status_code == 200
        (disk / "somebody-elses").unlink()
        _put_durably(server, server.stage(request_of("id-1", "first"))["n1"], stream_of(6 * MIB))
