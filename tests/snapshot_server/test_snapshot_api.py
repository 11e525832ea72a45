"""The REST side: statuses, problem documents, idempotency."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from snapshot_harness import (
    IN_TRANSIT,
    MACS,
    RECEIVED,
    SENT,
    InProcess,
    in_folder,
    manifest_of,
    own_process,
    put,
    request_of,
    stopped_stream,
    stream_of,
    take,
    take_sealed,
    words_of,
)

from geni_violin.core.errors import InvalidInput, NotFound
from geni_violin.core.messages import ChannelSummary, Manifest, SealChannels
from geni_violin.runtime import pcap
from geni_violin.runtime.http import Peer
from geni_violin.runtime.wire import decode, encode
from geni_violin.snapshot_server import api
from geni_violin.snapshot_server.names import MAX_RECORD_BYTES
from geni_violin.snapshot_server.pages.page_store import open_folder
from geni_violin.snapshot_server.store import StoredImage


def _taken(folder: Path) -> Manifest:
    store = open_folder(folder)
    manifest = take(store, request_of())
    store.close()
    return manifest


def _is_problem(response: httpx.Response, status: int, slug: str, words: str = "") -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"].endswith(f":{slug}")
    assert words in document["detail"]


def test_snapshots_by_id_and_by_name(tmp_path: Path) -> None:
    manifest = _taken(tmp_path)

    async def scenario() -> None:
        async with in_folder(tmp_path) as server:
            listed = (await server.http.get("/v1/snapshots")).json()
            assert [decode(Manifest, one) for one in listed] == [manifest]
            for word in ("id-1", "first"):
                assert decode(Manifest, (await server.http.get(f"/v1/snapshots/{word}")).json()) == manifest
                assert (await server.http.post(f"/v1/snapshots/{word}/verify")).status_code == 200
            assert (await server.http.delete("/v1/snapshots/first")).json() == {}
            _is_problem(await server.http.get("/v1/snapshots/first"), 404, "not-found", "first")
            _is_problem(await server.http.delete("/v1/snapshots/first"), 404, "not-found")
            assert (await server.http.get("/v1/snapshots")).json() == []

    asyncio.run(scenario())


def test_refusals_are_problem_documents(tmp_path: Path) -> None:
    manifest = _taken(tmp_path)

    async def scenario() -> None:
        async with in_folder(tmp_path) as server:
            post = server.http.post
            taken = encode(request_of("id-2", "first"))
            _is_problem(await post("/v1/stagings", json=taken), 409, "already-exists", "'first' exists")
            huge = encode(request_of("id-2", "second", expected_bytes=1 << 60))
            _is_problem(await post("/v1/stagings", json=huge), 507, "no-space", "bytes")
            _is_problem(await post("/v1/stagings", json={"name": 1}), 422, "invalid-input")
            bad = encode(request_of("../x", "second"))
            _is_problem(await post("/v1/stagings", json=bad), 422, "invalid-input", "'../x'")
            other = encode(replace(manifest, epoch=9))
            _is_problem(await post("/v1/stagings/id-1/publish", json=other), 409, "conflict")
            _is_problem(await post("/v1/stagings/id-9/publish", json=other), 422, "invalid-input")
            _is_problem(await server.http.delete("/v1/stagings/id-1"), 409, "conflict", "published")
            _is_problem(await server.http.get("/v1/stagings/id-9/images/n1"), 404, "not-found")
            (tmp_path / "objects/images/id-1/n1").write_bytes(b"")
            _is_problem(await post("/v1/snapshots/first/verify"), 503, "machine-fault", "images/id-1/n1")

    asyncio.run(scenario())


def test_every_request_can_be_repeated(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with in_folder(tmp_path) as server:
            tokens = await server.stage(request_of())
            assert await server.stage(request_of()) == tokens
            await asyncio.to_thread(put, server.address, tokens["n1"], stream_of(5000))
            status = await server.status()
            assert await server.stage(request_of()) == tokens
            stored = StoredImage("n1", status["received_bytes"], status["stored_bytes"], status["blake3"])
            manifest = encode(manifest_of(request_of(), [stored]))
            for _ in range(2):
                answer = await server.http.post("/v1/stagings/id-1/publish", json=manifest)
                assert (answer.status_code, answer.json()) == (200, manifest)
                assert (await server.http.delete("/v1/stagings/id-9")).status_code == 200

    asyncio.run(scenario())


def test_nothing_is_published_before_it_is_durable(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with in_folder(tmp_path) as server:
            await server.stage(request_of())
            early = encode(manifest_of(request_of(), [StoredImage("n1", 9, 9, "0" * 64)]))
            answer = await server.http.post("/v1/stagings/id-1/publish", json=early)
            _is_problem(answer, 409, "conflict", "n1 is not durable")
            assert (await server.http.get("/v1/snapshots")).json() == []

    asyncio.run(scenario())


async def _seconds_of_poll(server: InProcess, wait_ms: int) -> tuple[float, str]:
    started = time.monotonic()
    state = (await server.status(wait_ms=wait_ms))["state"]
    return time.monotonic() - started, state


def test_a_long_poll_ends_when_the_image_is_durable_or_the_wait_is_over(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with in_folder(tmp_path) as server:
            token = (await server.stage(request_of()))["n1"]
            elapsed_s, state = await _seconds_of_poll(server, 200)
            assert (elapsed_s >= 0.2, state) == (True, "waiting")
            polling = asyncio.create_task(_seconds_of_poll(server, 50_000))
            await asyncio.sleep(0.2)
            assert not polling.done()
            await server.put(token, stream_of(5000))
            elapsed_s, state = await polling
            assert (elapsed_s < 20, state) == (True, "durable")
            answer = await server.http.get("/v1/stagings/id-1/images/n1?wait_ms=-1")
            _is_problem(answer, 422, "invalid-input", "wait_ms")

    asyncio.run(scenario())


def test_health_tells_where_images_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with in_folder(tmp_path) as server:
            health = (await server.http.get("/healthz")).json()
            assert health["healthy"] is True
            assert health["free_bytes"] > 0
            assert (health["ingest_host"], health["ingest_port"]) == server.address

    asyncio.run(scenario())


# --- channel states ---------------------------------------------------------------------------------------------------


async def _put_records(server: InProcess) -> None:
    for vm in MACS:
        for kind, records in (("received", RECEIVED), ("sent", SENT)):
            answer = await server.http.put(f"/v1/stagings/id-1/vms/{vm}/{kind}", content=pcap.encode(records[vm]))
            assert (answer.status_code, answer.json()) == (200, {})


async def _words(server: InProcess, path: str) -> list[str]:
    answer = (await server.http.get(path)).raise_for_status()
    assert answer.headers["content-type"] == "application/vnd.tcpdump.pcap"
    return words_of(answer.content)


def test_channel_states_from_the_edges_to_a_restore(tmp_path: Path) -> None:
    request = request_of(vms=tuple(MACS))

    async def scenario() -> None:
        async with in_folder(tmp_path) as server:
            tokens = await server.stage(request)
            stored = []
            for vm in MACS:
                await server.put(tokens[vm], stopped_stream())
                status = await server.status(vm=vm)
                stored.append(StoredImage(vm, status["received_bytes"], status["stored_bytes"], status["blake3"]))
            for _ in range(2):
                await _put_records(server)
            for _ in range(2):
                answer = await server.http.post("/v1/stagings/id-1/channels", json=encode(SealChannels(MACS)))
                sealed = [decode(ChannelSummary, one) for one in answer.raise_for_status().json()]
                assert [one.frames for one in sealed] == [1, 3, 1]
            _is_problem(await server.http.get("/v1/snapshots/first/channels"), 404, "not-found")
            manifest = manifest_of(request, stored, sealed)
            (await server.http.post("/v1/stagings/id-1/publish", json=encode(manifest))).raise_for_status()
            assert (await server.http.get("/v1/snapshots/first/channels")).json() == answer.json()
            for vm, words in IN_TRANSIT.items():
                assert await _words(server, f"/v1/snapshots/id-1/vms/{vm}/channel") == words
            every = [words for vm in MACS for words in IN_TRANSIT[vm]]
            assert await _words(server, "/v1/snapshots/first/frames") == every

    asyncio.run(scenario())


def test_a_snapshot_without_channel_states_gives_no_frames(tmp_path: Path) -> None:
    _taken(tmp_path)

    async def scenario() -> None:
        async with in_folder(tmp_path) as server:
            assert (await server.http.get("/v1/snapshots/first/channels")).json() == []
            assert await _words(server, "/v1/snapshots/first/vms/n1/channel") == []
            assert await _words(server, "/v1/snapshots/first/frames") == []

    asyncio.run(scenario())


def test_refusals_of_channel_states(tmp_path: Path) -> None:
    store = open_folder(tmp_path)
    take_sealed(store)
    store.close()
    good = pcap.encode(RECEIVED["n1"])

    async def scenario() -> None:
        async with in_folder(tmp_path) as server:
            put_bytes, post, get = server.http.put, server.http.post, server.http.get
            await server.stage(request_of("id-2", "second"))
            staged = "/v1/stagings/id-2"
            _is_problem(await put_bytes("/v1/stagings/id-9/vms/n1/sent", content=good), 404, "not-found", "id-9")
            _is_problem(await put_bytes("/v1/stagings/id-1/vms/n1/sent", content=good), 404, "not-found", "id-1")
            _is_problem(await put_bytes(f"{staged}/vms/n2/sent", content=good), 404, "not-found", "n2")
            _is_problem(await put_bytes(f"{staged}/vms/n1/lost", content=good), 422, "invalid-input", "'lost'")
            _is_problem(await put_bytes(f"{staged}/vms/n1/sent", content=b"no"), 422, "invalid-input", "pcap")
            macs = encode(SealChannels({"n1": MACS["n1"]}))
            _is_problem(await post(f"{staged}/channels", json=macs), 409, "conflict", "n1 is not durable")
            _is_problem(await post(f"{staged}/channels", json={}), 422, "invalid-input", "macs")
            _is_problem(await post("/v1/stagings/id-9/channels", json=macs), 404, "not-found")
            _is_problem(await get("/v1/snapshots/first/vms/n9/channel"), 404, "not-found", "n9")
            _is_problem(await get("/v1/snapshots/none/frames"), 404, "not-found", "none")
            (tmp_path / "objects/channels/id-1/n2.channel").write_bytes(b"")
            _is_problem(await get("/v1/snapshots/first/vms/n2/channel"), 503, "machine-fault", "n2.channel")
            _is_problem(await post("/v1/snapshots/first/verify"), 503, "machine-fault", "n2.channel")

    asyncio.run(scenario())


def test_a_record_of_any_size_over_a_real_connection(tmp_path: Path) -> None:
    """As an agent brings it; one that is too long is refused with words, and nothing of it is kept."""
    frames = [pcap.Frame(number, bytes(60_000)) for number in range(200)]
    whole = pcap.encode(frames)
    assert len(whole) < MAX_RECORD_BYTES

    async def bring(url: str) -> None:
        server = Peer("the snapshot server", url)
        path = "/v1/stagings/id-1/vms/n1/received"
        assert await server.send_bytes("PUT", path, whole) == {}
        with pytest.raises(InvalidInput, match=f"longer than {MAX_RECORD_BYTES} bytes"):
            await server.send_bytes("PUT", path, bytes(MAX_RECORD_BYTES + 1))
        with pytest.raises(NotFound):
            await server.send_bytes("PUT", "/v1/stagings/id-2/vms/n1/received", whole)
        await server.close()

    with own_process(tmp_path) as server:
        server.stage(request_of())
        asyncio.run(bring(str(server.http.base_url)))
    assert (tmp_path / "state/records/id-1/n1.received").read_bytes() == whole


def test_a_record_that_breaks_off_is_not_kept(tmp_path: Path) -> None:
    data = pcap.encode(RECEIVED["n1"])
    with own_process(tmp_path) as server:
        server.stage(request_of())
        with socket.create_connection((server.http.base_url.host, server.http.base_url.port or 0)) as connection:
            head = (
                f"PUT /v1/stagings/id-1/vms/n1/received HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data) + 9}\r\n\r\n"
            )
            connection.sendall(head.encode() + data)
        assert server.http.put("/v1/stagings/id-1/vms/n1/sent", content=data).json() == {}
    assert [path.name for path in (tmp_path / "state/records/id-1").iterdir()] == ["n1.sent"]


def test_a_record_that_does_not_come_makes_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "UPLOAD_DEADLINE_S", 0.3)

    async def never() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    async def scenario() -> None:
        async with in_folder(tmp_path) as server:
            await server.stage(request_of())
            path = "/v1/stagings/id-1/vms/n1/received"
            hanging = [asyncio.create_task(server.http.put(path, content=never())) for _ in range(api.MAX_UPLOADS)]
            await asyncio.sleep(0.05)
            good = await asyncio.wait_for(server.http.put(path, content=pcap.encode([])), 20)
            assert good.json() == {}
            for task in hanging:
                _is_problem(await asyncio.wait_for(task, 20), 502, "peer-fault", "did not come within")

    asyncio.run(scenario())
