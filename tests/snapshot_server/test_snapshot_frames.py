"""Channel states on their way to people: a coordinator passes on what a real snapshot server has."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from snapshot_harness import IN_TRANSIT, MACS, own_process, request_of, take, take_sealed, words_of

from geni_violin.coordinator.api import Coordinator, create_app
from geni_violin.core.messages import ChannelSummary
from geni_violin.runtime.settings import Settings
from geni_violin.runtime.wire import decode
from geni_violin.snapshot_server.pages.page_store import open_folder

Play = Callable[[Callable[[httpx.AsyncClient], Awaitable[None]]], None]
CONTROLLER = "http://127.0.0.1:1"  # nobody's


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Plays a scenario on a coordinator whose snapshot server has a sealed snapshot, "first", and one without."""
    store = open_folder(tmp_path / "store")
    take_sealed(store)
    take(store, request_of("id-2", "second"))
    store.close()

    async def on_coordinator(url: str, scenario: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        state_dir = tmp_path / "state"
        state_dir.mkdir()
        app = create_app(Coordinator(Settings(state_dir=state_dir), CONTROLLER, url))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://coordinator") as http,
        ):
            await scenario(http)

    def run(scenario: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        with own_process(tmp_path / "store") as server:
            asyncio.run(on_coordinator(str(server.http.base_url), scenario))

    return run


def test_channels_and_frames_of_a_snapshot(play: Play) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        answer = (await http.get("/v1/snapshots/first/channels")).raise_for_status()
        channels = [decode(ChannelSummary, one) for one in answer.json()]
        assert [(one.vm, one.frames, one.late_frames) for one in channels] == [("n1", 1, 0), ("n2", 3, 2), ("n3", 1, 1)]
        answer = (await http.get("/v1/snapshots/first/frames")).raise_for_status()
        assert answer.headers["content-type"] == "application/vnd.tcpdump.pcap"
        assert words_of(answer.content) == [words for vm in MACS for words in IN_TRANSIT[vm]]

    play(scenario)


def test_a_snapshot_without_and_one_that_is_not_there(play: Play) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        assert (await http.get("/v1/snapshots/second/channels")).json() == []
        assert words_of((await http.get("/v1/snapshots/second/frames")).content) == []
        for path in ("channels", "frames"):
            answer = await http.get(f"/v1/snapshots/none/{path}")
            assert (answer.status_code, answer.json()["title"]) == (404, "not found")

    play(scenario)


def test_the_routes_are_documented(play: Play) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        paths = (await http.get("/openapi.json")).json()["paths"]
        frames = paths["/v1/snapshots/{snapshot}/frames"]["get"]["responses"]["200"]["content"]
        assert list(frames) == ["application/vnd.tcpdump.pcap"]
        channels = paths["/v1/snapshots/{snapshot}/channels"]["get"]["responses"]["200"]["content"]
        assert "ChannelSummary" in str(channels["application/json"])

    play(scenario)
