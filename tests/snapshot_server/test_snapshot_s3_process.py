"""The server as a process whose images are in a real object store (Swift), killed in the middle of taking one in."""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from backend_harness import CREDENTIALS, s3_backend, with_bucket
from snapshot_harness import (
    MIB,
    Bucket,
    OwnProcess,
    get,
    manifest_of,
    open_ingest,
    own_process,
    put,
    request_of,
    stream_of,
)
from swift_harness import BUCKET, Swift, swift_in

from geni_violin.core.messages import StageRequest
from geni_violin.runtime.wire import encode
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.pages.pack_builder import PACK_BYTES
from geni_violin.snapshot_server.store import StoredImage

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swift]:
    """A Swift for all tests of this module."""
    with swift_in(tmp_path_factory.mktemp("swift")) as running, with_bucket(running) as ready:
        yield ready


def _publish(server: OwnProcess, request: StageRequest, data: bytes) -> None:
    """Take a snapshot of one image that has these bytes."""
    put(server.ingest_address(), server.stage(request)["n1"], data)
    status = server.status(request.snapshot_id)
    assert status["state"] == "durable", status
    stored = StoredImage("n1", status["received_bytes"], status["stored_bytes"], status["blake3"])
    body = encode(manifest_of(request, [stored]))
    server.http.post(f"/v1/stagings/{request.snapshot_id}/publish", json=body, timeout=60).raise_for_status()


def _assert_whole(server: OwnProcess, snapshot_id: str, data: bytes) -> None:
    verified = server.http.post(f"/v1/snapshots/{snapshot_id}/verify", timeout=60)
    assert verified.status_code == 200, verified.text
    assert get(server.ingest_address(), snapshot_id, "n1") == data


def _packs(backend: ObjectBackend) -> frozenset[str]:
    return frozenset(key for key, _size in backend.list("packs/"))


def _wait_until_packs(backend: ObjectBackend, known: frozenset[str], more: bool) -> None:
    """Until there is a pack beside those that are known, or none any more."""
    deadline = time.monotonic() + PATIENCE_S
    while (_packs(backend) > known) != more or not _packs(backend) >= known:
        assert time.monotonic() < deadline, f"after {PATIENCE_S:.0f} s the packs are {sorted(_packs(backend))}"
        time.sleep(0.02)


@pytest.mark.parametrize("moment", ["while a pack is put", "after a pack was put"])
def test_killed_in_the_middle_of_an_image(swift: Swift, tmp_path: Path, moment: str) -> None:
    """No snapshot of it, nothing else harmed, what was put freed, and the next snapshot is fine."""
    prefix = f"tests/{uuid.uuid4().hex}"
    bucket, backend = Bucket(f"s3://{BUCKET}/{prefix}", swift.endpoint, CREDENTIALS), s3_backend(swift, prefix)
    kept, lost = stream_of(2 * MIB, seed=2), stream_of(40 * MIB)
    request = request_of("id-1", "first", expected_bytes=64 * MIB)
    with own_process(tmp_path, bucket=bucket) as server:
        _publish(server, request_of("id-2", "second"), kept)
        known = _packs(backend)
        assert known, "images are kept in the object store"
        connection, _answer = open_ingest(server.ingest_address(), {"put": server.stage(request)["n1"]})
        if moment == "while a pack is put":
            # So much fills a pack, which is on its way to the object store then, or about to be.
            connection.sendall(lost[: PACK_BYTES + 3 * MIB])
            server.wait_until_received(PACK_BYTES + 2 * MIB)
        else:
            connection.sendall(lost)
            _wait_until_packs(backend, known, more=True)
        server.kill()
        connection.close()
    with own_process(tmp_path, bucket=bucket) as server:
        assert [found["id"] for found in server.http.get("/v1/snapshots").json()] == ["id-2"]
        status = server.status("id-1")
        assert (status["state"], "restarted" in status["reason"]) == ("failed", True)
        _assert_whole(server, "id-2", kept)
        _wait_until_packs(backend, known, more=False)
        assert server.http.delete("/v1/stagings/id-1").status_code == 200
        _publish(server, request, lost)
        for snapshot_id, data in (("id-1", lost), ("id-2", kept)):
            _assert_whole(server, snapshot_id, data)
    images = {key for key, _size in backend.list("images/")}
    assert images == {"images/id-1/n1", "images/id-2/n1"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > MIB]
