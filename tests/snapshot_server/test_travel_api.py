"""Archives over REST: piece by piece, told at once when they are no archives, nothing left when they break off."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from snapshot_harness import in_process, request_of
from test_travel_archive import archive_of, image_in, spec_of, take_in

from geni_violin.snapshot_server import store_api
from geni_violin.snapshot_server.pages.page_store import open_folder
from geni_violin.snapshot_server.travel.archive_format import MAGIC


def test_out_of_one_server_and_into_another(tmp_path: Path) -> None:
    async def run() -> None:
        here, there = open_folder(tmp_path / "here"), open_folder(tmp_path / "there")
        take_in(here)
        wanted = {vm: image_in(here, "first", vm) for vm in ("n1", "n2", "n3")}
        async with in_process(here) as source, in_process(there) as target:
            async with source.http.stream("GET", "/v1/snapshots/first/export") as response:
                assert response.headers["content-type"] == store_api.ARCHIVE_TYPE
                archive = await response.aread()
            answer = await target.http.post("/v1/snapshots", content=archive)
            assert answer.status_code == 201, answer.text
            assert answer.json()["name"] == "first"
            assert (await target.http.post("/v1/snapshots/first/verify")).status_code == 200
            for vm, stream in wanted.items():
                assert image_in(there, "first", vm) == stream
            again = await target.http.post("/v1/snapshots", content=archive)
            assert (again.status_code, again.json()["title"]) == (409, "already exists")
            bare = await source.http.get("/v1/snapshots/first/export", params={"format": "qemu", "vm": "n2"})
            assert bare.content == wanted["n2"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("query", "status"),
    [({"format": "zip"}, 422), ({"format": "qemu"}, 422), ({"format": "qemu", "vm": "n9"}, 404), ({"vm": "n1"}, 422)],
)
def test_what_cannot_be_exported_is_refused(tmp_path: Path, query: dict[str, str], status: int) -> None:
    async def run() -> None:
        store = open_folder(tmp_path / "here")
        take_in(store)
        async with in_process(store) as server:
            assert (await server.http.get("/v1/snapshots/first/export", params=query)).status_code == status
            assert (await server.http.get("/v1/snapshots/none/export")).status_code == 404

    asyncio.run(run())


def test_what_is_no_archive_is_refused_at_its_first_bytes(tmp_path: Path) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(10_000):
            taken += 1
            yield b"x" * 65536

    async def run() -> None:
        async with in_process(open_folder(tmp_path / "there")) as server:
            answer = await server.http.post("/v1/snapshots", content=endless())
            assert answer.status_code == 422
            assert "no archive" in answer.json()["detail"]

    asyncio.run(run())
    assert taken < 10


def test_an_archive_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        store = open_folder(tmp_path / "there")
        async with in_process(store) as server:
            answer = await server.http.post("/v1/snapshots", content=MAGIC + bytes(3))
            assert (answer.status_code, answer.json()["title"]) == (422, "invalid input")
            assert (await server.http.get("/v1/snapshots")).json() == []

    asyncio.run(run())


def test_an_archive_longer_than_the_disk_is_refused_before_it_comes(tmp_path: Path) -> None:
    asked = []

    async def nothing() -> AsyncIterator[bytes]:
        asked.append("its first byte")
        yield b""

    async def run() -> None:
        async with in_process(open_folder(tmp_path / "there")) as server:
            answer = await server.http.post(
                "/v1/snapshots", content=nothing(), headers={"content-length": str(1 << 60)}
            )
            assert (answer.status_code, answer.json()["title"]) == (507, "no space")
            assert asked == []

    asyncio.run(run())


def test_stats_rubbish_and_quotas(tmp_path: Path) -> None:
    async def run() -> None:
        store = open_folder(tmp_path / "here")
        take_in(store)
        async with in_process(store) as server:
            figures: dict[str, Any] = (await server.http.get("/v1/store")).json()
            assert [one["name"] for one in figures["snapshots"]] == ["first"]
            plan = (await server.http.get("/v1/store/collection")).json()
            done = await server.http.post("/v1/store/collection", json=plan)
            assert done.status_code == 200
            put = await server.http.put("/v1/store/quotas/mandelbrot", json={"slice": "mandelbrot", "limit_bytes": 7})
            assert [(one["slice"], one["limit_bytes"]) for one in put.json()] == [("mandelbrot", 7)]
            other = await server.http.put("/v1/store/quotas/a", json={"slice": "b", "limit_bytes": 7})
            assert other.status_code == 422
            assert (await server.http.delete("/v1/store/quotas/mandelbrot")).json() == []

    asyncio.run(run())


def test_spec_and_staging_agree() -> None:
    """What these tests make of a snapshot has the VMs that its slice has, as a real one."""
    names = ("n1", "n2", "n3")
    assert [vm.name for vm in spec_of(names).vms] == [image.vm for image in request_of(vms=names).images]


def test_damage_in_the_middle_breaks_the_answer_off(tmp_path: Path) -> None:
    """An HTTP client is told by the missing end; it never gets a whole archive with a damaged page."""

    async def run() -> None:
        store = open_folder(tmp_path / "here")
        take_in(store)
        pack = next((tmp_path / "here" / "objects" / "packs").iterdir())
        data = bytearray(pack.read_bytes())
        data[100] ^= 1
        pack.write_bytes(data)
        async with in_process(store) as server:
            try:
                answer = await server.http.get("/v1/snapshots/first/export")
            except Exception:
                return  # broken off
            assert answer.status_code == 503, "an export of a damaged snapshot ended well"

    asyncio.run(run())
    assert not list(tmp_path.glob("**/export-*"))


def test_the_archive_is_the_same_over_rest(tmp_path: Path) -> None:
    """Same kinds and number of objects; packs have random names."""

    async def run() -> tuple[int, int]:
        store = open_folder(tmp_path / "here")
        take_in(store)
        direct = archive_of(store, "first", tmp_path / "scratch")
        async with in_process(store) as server:
            return len(direct), len((await server.http.get("/v1/snapshots/first/export")).content)

    direct, over_rest = asyncio.run(run())
    assert direct == over_rest


def test_exports_that_nobody_takes_are_ended(tmp_path: Path) -> None:
    """A client that is gone before the first piece: no export stays, and the next one goes out."""

    async def run() -> None:
        store = open_folder(tmp_path / "here")
        take_in(store)
        async with in_process(store) as server:
            for _ in range(store_api.MAX_EXPORTS + 1):
                await _ask_and_leave(server.app)
            answer = await asyncio.wait_for(server.http.get("/v1/snapshots/first/export"), 30)
            assert answer.status_code == 200

    asyncio.run(run())
    assert not list(tmp_path.glob("**/export-*"))


async def _ask_and_leave(app: Any) -> None:
    """Ask for an export as a client that hangs up at once."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/v1/snapshots/first/export",
        "raw_path": b"/v1/snapshots/first/export",
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        del message

    await asyncio.wait_for(app(scope, receive, send), 30)
