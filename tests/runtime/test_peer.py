"""The parts' client of one another: addresses that people write."""

import asyncio

import pytest

from geni_violin.core.errors import InvalidInput, PeerFault
from geni_violin.runtime.http import Peer


async def _asked_for(ending: str) -> str:
    """The path that a request to "/v1/x" asks for, when the peer's address ends so."""
    asked = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set_result((await reader.readuntil(b"\r\n\r\n")).split()[1].decode())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        peer = Peer("the peer", f"http://127.0.0.1:{port}{ending}")
        try:
            assert await peer.request("GET", "/v1/x") == {}
        finally:
            await peer.close()
    return str(asked.result())


@pytest.mark.parametrize("ending", ["", "/"])
def test_an_address_may_end_with_a_slash(ending: str) -> None:
    assert asyncio.run(_asked_for(ending)) == "/v1/x"


@pytest.mark.parametrize("ending", ["?a=b", "#there"])
def test_an_address_that_no_path_can_follow(ending: str) -> None:
    with pytest.raises(InvalidInput, match="is no address of the peer"):
        Peer("the peer", f"http://127.0.0.1:80{ending}")


def test_a_name_that_no_host_can_have_is_the_peers_fault() -> None:
    async def ask() -> None:
        peer = Peer("the peer", "http://a..b:80")
        try:
            await peer.request("GET", "/v1/x")
        finally:
            await peer.close()

    with pytest.raises(PeerFault, match=r"the peer at http://a\.\.b:80 does not answer"):
        asyncio.run(ask())
