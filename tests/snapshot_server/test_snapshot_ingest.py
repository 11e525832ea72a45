"""Images over real sockets, against a server in this process."""

import asyncio
import contextlib
import itertools
import json
import resource
import socket
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snapshot_harness import (
    HEADER,
    MIB,
    InProcess,
    files_below,
    get,
    in_folder,
    in_process,
    manifest_of,
    request_of,
    reset,
    stream_of,
    take,
)

from geni_violin.core.errors import InvalidInput
from geni_violin.runtime.wire import encode
from geni_violin.snapshot_server.backends.local import LocalBackend
from geni_violin.snapshot_server.ingest import Get, Put, parse_opening
from geni_violin.snapshot_server.pages.image_writer import PageWriter
from geni_violin.snapshot_server.pages.page_store import PageStore, open_folder
from geni_violin.snapshot_server.records import disk_faults
from geni_violin.snapshot_server.store import StoredImage
from geni_violin.snapshot_server.stream_guard import MIN_STREAM_BYTES, StreamGuard

Scenario = Callable[[InProcess], Coroutine[Any, Any, None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Scenario], None]:
    """Run a scenario against a server over ``tmp_path``, with a limit on its time."""

    async def with_server(scenario: Scenario) -> None:
        async with asyncio.timeout(60), in_folder(tmp_path) as server:
            await scenario(server)

    return lambda scenario: asyncio.run(with_server(scenario))


Run = Callable[[Scenario], None]


async def _fails(server: InProcess, words: str, folder: Path) -> None:
    """The image has failed for this reason and left nothing."""
    status = await server.status()
    assert status["state"] == "failed", status
    assert words in status["reason"]
    assert files_below(folder) == {"state/stagings/id-1.json"}


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("it did not come about within 20 s")


async def _publish(server: InProcess) -> None:
    """The image is durable, and its snapshot is published."""
    status = await server.status()
    assert status["state"] == "durable", status
    stored = StoredImage("n1", status["received_bytes"], status["stored_bytes"], status["blake3"])
    manifest = encode(manifest_of(request_of(), [stored]))
    assert (await server.http.post("/v1/stagings/id-1/publish", json=manifest)).status_code == 200


def _is_reset(connection: socket.socket) -> bool:
    """Whether the server ends the connection by a reset, which QEMU cannot take for success."""
    try:
        while connection.recv(MIB):
            pass
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


def _send_until_refused(connection: socket.socket, data: bytes) -> None:
    """Send for ever; the server must end that."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while True:
            connection.sendall(data)


def _send_all_different(connection: socket.socket) -> None:
    """Send for ever what is not in the store yet; the server must end that."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        for seed in range(256):
            connection.sendall(stream_of(MIB, seed))


def test_an_image_comes_and_goes(run: Run) -> None:
    data = stream_of(5 * MIB + 17)

    async def scenario(server: InProcess) -> None:
        request = request_of()
        token = (await server.stage(request))["n1"]
        assert (await server.status(wait_ms=0))["state"] == "waiting"
        await server.put(token, data)
        status = await server.status()
        assert (status["state"], status["received_bytes"]) == ("durable", len(data))
        assert len(data) < status["stored_bytes"] < len(data) + 4096  # these bytes cannot be compressed
        await _publish(server)
        assert await asyncio.to_thread(get, server.address, "id-1", "n1") == data
        assert (await server.status())["state"] == "durable"

    run(scenario)


def test_many_images_come_at_once(run: Run) -> None:
    vms = tuple(f"n{number}" for number in range(12))

    async def scenario(server: InProcess) -> None:
        tokens = await server.stage(request_of(vms=vms))
        images = {vm: stream_of(2 * MIB + number, number) for number, vm in enumerate(vms)}
        await asyncio.gather(*(server.put(tokens[vm], images[vm]) for vm in vms))
        statuses = [await server.status(vm=vm) for vm in vms]
        assert [status["received_bytes"] for status in statuses] == [len(images[vm]) for vm in vms]
        assert len({status["blake3"] for status in statuses}) == len(vms)

    run(scenario)


def test_a_stream_in_small_portions_with_its_opening(run: Run) -> None:
    """Where TCP cuts the bytes is nobody's choice: the opening and the stream's beginning may come in any portions."""
    data = stream_of(3000)

    def send(address: tuple[str, int], token: str) -> None:
        with socket.create_connection(address) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            whole = f'{{"put": "{token}"}}\n'.encode() + data
            for start in range(0, 60):
                connection.sendall(whole[start : start + 1])
            connection.sendall(whole[60:])
            assert json.loads(connection.makefile().readline()) == {"ok": True}  # an answer to nobody would be reset

    async def scenario(server: InProcess) -> None:
        token = (await server.stage(request_of()))["n1"]
        await asyncio.to_thread(send, server.address, token)
        await _publish(server)
        assert await asyncio.to_thread(get, server.address, "id-1", "n1") == data

    run(scenario)


def test_a_connection_that_breaks_leaves_nothing(run: Run, tmp_path: Path) -> None:
    async def scenario(server: InProcess) -> None:
        request = request_of(expected_bytes=64 * MIB)
        connection, answer = await server.open({"put": (await server.stage(request))["n1"]})
        assert answer == {"ok": True}
        await asyncio.to_thread(connection.sendall, stream_of(40 * MIB))
        await server.until_received(40 * MIB)
        await _until(lambda: any(name.startswith("objects/packs/") for name in files_below(tmp_path)))
        reset(connection)
        await _fails(server, "the connection broke after 41943040 bytes", tmp_path)

    run(scenario)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "the stream begins with b'GET '"),
        (b"Q" + bytes(100), "the stream begins with"),
        (b"QEVM\x00\x00\x00\x02" + bytes(100), "version 3"),
        (stream_of(MIB + 1), "longer than the 1048576 bytes"),
    ],
)
def test_what_is_not_the_expected_stream_is_reset(run: Run, tmp_path: Path, data: bytes, words: str) -> None:
    async def scenario(server: InProcess) -> None:
        connection, _answer = await server.open({"put": (await server.stage(request_of(expected_bytes=MIB)))["n1"]})
        with connection:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                await asyncio.to_thread(connection.sendall, data)
            assert await asyncio.to_thread(_is_reset, connection)
        await _fails(server, words, tmp_path)

    run(scenario)


@pytest.mark.parametrize("data", [b"", b"QEV", HEADER])
def test_a_stream_that_is_too_short_fails(run: Run, tmp_path: Path, data: bytes) -> None:
    async def scenario(server: InProcess) -> None:
        await server.put((await server.stage(request_of()))["n1"], data)
        await _fails(server, f"the stream ended after {len(data)} bytes", tmp_path)

    run(scenario)


def test_a_token_is_good_for_one_connection(run: Run) -> None:
    async def scenario(server: InProcess) -> None:
        token = (await server.stage(request_of()))["n1"]
        first, _answer = await server.open({"put": token})
        second, refusal = await server.open({"put": token})
        assert "n1 is receiving already" in refusal["error"]
        with first, second:
            await asyncio.to_thread(first.sendall, stream_of(5000))
        assert (await server.status())["received_bytes"] == 5000
        third, refusal = await server.open({"put": token})
        third.close()
        assert "n1 is durable already" in refusal["error"]

    run(scenario)


@pytest.mark.parametrize(
    ("opening", "words"),
    [
        ({"put": "0" * 32}, "no image is awaited under this token"),
        ({"get": "id-9", "vm": "n1"}, "there is no snapshot 'id-9'"),
        ({"get": "../../etc", "vm": "passwd"}, "there is no snapshot"),
        ({"get": "id-1", "vm": "../n1"}, "has no VM '../n1'"),
        (b"hello\n", "cannot be understood"),
        (b"x" * 5000, "cannot be understood"),
        (b'{"put": 7}\n', "cannot be understood"),
    ],
)
def test_a_wrong_opening_is_answered(tmp_path: Path, run: Run, opening: dict[str, str] | bytes, words: str) -> None:
    store = open_folder(tmp_path)
    take(store, request_of())
    store.close()

    async def scenario(server: InProcess) -> None:
        connection, answer = await server.open(opening)
        connection.close()
        assert words in answer["error"]

    run(scenario)


def test_discarding_ends_the_streams(run: Run, tmp_path: Path) -> None:
    async def scenario(server: InProcess) -> None:
        token = (await server.stage(request_of(expected_bytes=1 << 30)))["n1"]
        connection, _answer = await server.open({"put": token})
        connection.sendall(HEADER)
        polling = asyncio.create_task(server.status())
        sending = asyncio.create_task(asyncio.to_thread(_send_until_refused, connection, stream_of(MIB)))
        await server.until_received(MIB)
        assert (await server.http.delete("/v1/stagings/id-1")).status_code == 200
        assert files_below(tmp_path) == set()
        await sending
        assert (await polling)["state"] == "failed"
        again, refusal = await server.open({"put": token})
        again.close()
        connection.close()
        assert "no image is awaited" in refusal["error"]
        assert (await server.http.get("/v1/stagings/id-1/images/n1")).status_code == 404

    run(scenario)


def test_stopping_the_server_ends_the_streams(tmp_path: Path) -> None:
    store = open_folder(tmp_path)
    take(store, request_of("id-0", "zeroth", expected_bytes=64 * MIB), size=64 * MIB)
    store.close()

    async def scenario() -> None:
        async with in_folder(tmp_path) as server:
            connection, _answer = await server.open({"put": (await server.stage(request_of()))["n1"]})
            slow, _answer = await server.open({"get": "id-0", "vm": "n1"})
            idle = socket.create_connection(server.address)
            connection.sendall(stream_of(MIB))
            await server.until_received(MIB)
        with connection, idle, slow:
            assert _is_reset(connection)
            assert _is_reset(slow)
        assert {name for name in files_below(tmp_path) if "id-1" in name} == {"state/stagings/id-1.json"}

    asyncio.run(asyncio.wait_for(scenario(), 30))


class _FillableBackend(LocalBackend):
    """A folder on a disk that can be full: then the kernel itself answers ENOSPC, for packs."""

    full = False

    def put(self, key: str, data: bytes | memoryview | Path) -> None:
        if self.full and key.startswith("packs/"):
            with disk_faults(f"object {key} cannot be written", Path("/dev")), Path("/dev/full").open("wb", 0) as file:
                file.write(bytes(1))
        super().put(key, data)


def test_a_full_device_fails_one_stream_and_no_other(tmp_path: Path) -> None:
    backend = _FillableBackend(tmp_path / "objects")
    backend.full = True

    async def scenario() -> None:
        async with in_process(PageStore(backend, tmp_path / "state")) as server:
            tokens = await server.stage(request_of(vms=("full", "n1"), expected_bytes=1 << 30))
            good, _answer = await server.open({"put": tokens["n1"]})
            good.sendall(stream_of(MIB)[:1000])
            bad, _answer = await server.open({"put": tokens["full"]})
            bad.sendall(HEADER)
            await asyncio.to_thread(_send_all_different, bad)
            bad.close()
            status = await server.status(vm="full")
            assert status["state"] == "failed"
            assert "the snapshot server's disk is full" in status["reason"]
            backend.full = False
            await asyncio.to_thread(good.sendall, stream_of(MIB)[1000:])
            good.close()
            assert (await server.status(vm="n1"))["state"] == "durable"
            left = {name for name in files_below(tmp_path) if not name.startswith("objects/packs/")}
            assert left == {"state/stagings/id-1.json", "objects/images/id-1/n1"}
            assert len(files_below(tmp_path)) == 3

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.fixture
def few_files() -> Iterator[None]:
    """Let this process open only a few more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path("/dev/null").open() as lowest_free:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free.fileno() + 40, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_too_many_open_files_do_not_end_the_service(run: Run, few_files: None) -> None:
    async def scenario(server: InProcess) -> None:
        token = (await server.stage(request_of()))["n1"]
        crowd = []
        with contextlib.suppress(OSError):
            for _ in range(60):
                crowd.append(socket.create_connection(server.address))
                await asyncio.sleep(0)
        assert len(crowd) < 60
        await asyncio.sleep(0.3)
        for connection in crowd:
            connection.close()
        await asyncio.sleep(0.5)
        await server.put(token, stream_of(5000))
        assert (await server.status())["state"] == "durable"

    run(scenario)


# --- pure parts -------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=40), st.lists(st.integers(0, 40)), st.integers(1, 40))
def test_the_guard_decides_alike_however_the_bytes_are_cut(tail: bytes, cuts: list[int], limit: int) -> None:
    for data in (tail, HEADER + tail, HEADER[:5] + tail):
        guard, places = StreamGuard(limit), sorted({0, *(min(cut, len(data)) for cut in cuts), len(data)})
        refused = False
        try:
            for start, end in itertools.pairwise(places):
                guard.accept(memoryview(data)[start:end])
            guard.end()
        except InvalidInput:
            refused = True
        good = data.startswith(HEADER) and MIN_STREAM_BYTES <= len(data) <= limit
        assert refused == (not good)


@given(st.binary(max_size=60))
def test_any_line_is_an_opening_or_refused(line: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        assert isinstance(parse_opening(line), Put | Get)


def test_whatever_goes_wrong_in_the_store_fails_the_image(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An image is never left half way: its sender is reset, the coordinator is told, and its staging can go."""

    def out_of_memory(writer: PageWriter, data: memoryview) -> None:
        raise MemoryError("no room for the map")

    monkeypatch.setattr(PageWriter, "write", out_of_memory)

    async def scenario(server: InProcess) -> None:
        token = (await server.stage(request_of()))["n1"]
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            await server.put(token, stream_of(MIB))
        await _fails(server, "MemoryError: no room for the map", tmp_path)
        assert (await server.http.delete("/v1/stagings/id-1")).status_code == 200
        assert files_below(tmp_path) == set()

    run(scenario)
