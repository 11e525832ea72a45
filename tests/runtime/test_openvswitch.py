"""Emptying Open vSwitch's flow cache, against a daemon's control socket that is played here."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from geni_violin.core.errors import GeniViolinError, MachineFault, PeerFault
from geni_violin.runtime.openvswitch import forget_cached_flows

PID = 4242


@contextlib.asynccontextmanager
async def daemon(folder: Path, *pieces: bytes) -> AsyncIterator[list[str]]:
    """Answer one request with some bytes, piece by piece, and close; gives the methods that were called."""
    called: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.append(json.loads(await reader.read(4096))["method"])
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()

    (folder / "ovs-vswitchd.pid").write_text(f"{PID}\n")
    server = await asyncio.start_unix_server(serve, folder / f"ovs-vswitchd.{PID}.ctl")
    async with server:
        yield called


async def _call(folder: Path, *pieces: bytes) -> list[str]:
    async with daemon(folder, *pieces) as called:
        await forget_cached_flows(timeout_s=0.5, run_dir=folder)
        return called


@pytest.mark.parametrize(
    "pieces", [(b'{"id":0,"result":"","error":null}',), (b'{"id":0,"result"', b':"","error":null}')]
)
def test_it_returns_when_the_daemon_has_answered(tmp_path: Path, pieces: tuple[bytes, ...]) -> None:
    assert asyncio.run(_call(tmp_path, *pieces)) == ["revalidator/purge"]


@pytest.mark.parametrize(
    ("pieces", "error"),
    [((b'{"id":0,"result":null,"error":"unknown"}',), PeerFault), ((b"{",), MachineFault), ((), MachineFault)],
)
def test_anything_but_success_is_an_error(
    tmp_path: Path, pieces: tuple[bytes, ...], error: type[GeniViolinError]
) -> None:
    with pytest.raises(error):
        asyncio.run(_call(tmp_path, *pieces))


def test_daemon_that_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(MachineFault, match="control socket"):
        asyncio.run(forget_cached_flows(run_dir=tmp_path))


def test_silent_daemon(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "ovs-vswitchd.pid").write_text(str(PID))
        stop = asyncio.Event()

        async def keep(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await stop.wait()
            writer.close()

        async with await asyncio.start_unix_server(keep, tmp_path / f"ovs-vswitchd.{PID}.ctl"):
            with pytest.raises(PeerFault, match=r"within 0\.1 s"):
                await forget_cached_flows(timeout_s=0.1, run_dir=tmp_path)
            stop.set()

    asyncio.run(scenario())
