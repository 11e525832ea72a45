"""The server as a process of its own: SIGKILL, restart, one folder for one server, a disk that is really full."""

import itertools
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


def _packs(folder: Path) -> frozenset[str]:
    return frozenset(name for name in files_below(folder) if name.startswith("objects/packs/"))


def _wait_for_a_pack(folder: Path, known: frozenset[str] = frozenset()) -> None:
    """Until there is one beside those that are known."""
    for _ in range(2000):
        if _packs(folder) > known:
            return
        time.sleep(0.01)
    raise TimeoutError("no pack was put within 20 s")


def _wait_until_packs_are(folder: Path, wanted: frozenset[str]) -> None:
    for _ in range(2000):
        if _packs(folder) == wanted:
            return
        time.sleep(0.01)
    raise TimeoutError(f"after 20 s the packs are {sorted(_packs(folder))}, expected {sorted(wanted)}")


def _put_durably(server: OwnProcess, token: str, data: bytes, snapshot_id: str = "id-1") -> StoredImage:
    put(server.ingest_address(), token, data)
    status = server.status(snapshot_id)
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


def test_packs_that_a_kill_left_are_freed_at_the_next_start(tmp_path: Path) -> None:
    """Killed between a pack and the manifest. What is published stays, and what is durable and can be published yet."""
    with own_process(tmp_path) as server:
        published = request_of("id-2", "second")
        stored = _put_durably(server, server.stage(published)["n1"], stream_of(2 * MIB, seed=2), "id-2")
        manifest = encode(manifest_of(published, [stored]))
        server.http.post("/v1/stagings/id-2/publish", json=manifest).raise_for_status()
        durable = request_of("id-3", "third")
        stored = _put_durably(server, server.stage(durable)["n1"], stream_of(2 * MIB, seed=3), "id-3")
        needed = _packs(tmp_path)
        connection, _answer = open_ingest(server.ingest_address(), {"put": server.stage(REQUEST)["n1"]})
        connection.sendall(stream_of(40 * MIB))
        server.wait_until_received(40 * MIB)
        _wait_for_a_pack(tmp_path, needed)
        server.kill()
        connection.close()
    assert _packs(tmp_path) > needed
    with own_process(tmp_path) as server:
        _wait_until_packs_are(tmp_path, needed)
        server.http.post("/v1/stagings/id-3/publish", json=encode(manifest_of(durable, [stored]))).raise_for_status()
        for snapshot_id, seed in (("id-2", 2), ("id-3", 3)):
            assert server.http.post(f"/v1/snapshots/{snapshot_id}/verify").status_code == 200
            assert get(server.ingest_address(), snapshot_id, "n1") == stream_of(2 * MIB, seed=seed)


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
    deadline, portions = time.monotonic() + 20.0, [stream_of(MIB, seed) for seed in range(256)]
    for portion in itertools.cycle(portions):
        connection.sendall(portion)
        assert time.monotonic() < deadline, "a stream goes on and on to a disk of 96 MiB"


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
