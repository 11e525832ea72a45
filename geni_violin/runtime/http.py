"""HTTP between the parts: one client, one service shell, problem documents both ways."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from geni_violin.core.errors import GeniViolinError, InvalidInput, MachineFault, NotFound, PeerFault
from geni_violin.runtime.problems import PROBLEM_MEDIA_TYPE, error_from_problem, problem_document

STREAM_TIMEOUT_S = 900.0
"""How long the other part may be silent while a large body is on its way, or is being worked on."""
CLIENT_IDLE_S = 60
SERVER_IDLE_S = 600
"""How long an idle connection stays open: the side that asks lets go first, so that it never asks into a closed one."""


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


class Peer:
    """Another part, reached over connections that stay open.

    :param name: what people call it in messages, such as "the controller".
    :param base_url: its address, ``http://host:port``.
    """

    def __init__(self, name: str, base_url: str, timeout_s: float = 30.0) -> None:
        self.name = name
        self.base_url = base_url
        limits = httpx.Limits(max_keepalive_connections=32, keepalive_expiry=CLIENT_IDLE_S)
        # Reading the machine's certificates takes 20 ms, for nothing where the connection is not encrypted.
        verify = base_url.startswith("https:")
        if not _is_address(base_url):
            raise InvalidInput(f"{base_url!r} is no address of {name}", "expected http://host:port")
        self._client = httpx.AsyncClient(
            base_url=base_url, timeout=timeout_s, limits=limits, trust_env=False, verify=verify
        )

    async def request(self, method: str, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        """Send a request and give back the decoded JSON answer (None for an empty one).

        :raise PeerFault: no answer in time, or one that cannot be understood.
        :raise GeniViolinError: the error that the part answered with.
        """
        return _answer(self.name, await self._exchange(method, path, timeout_s, json=body))

    async def send_bytes(self, method: str, path: str, body: bytes, timeout_s: float | None = None) -> Any:
        """As :meth:`request`, with a body that is not JSON."""
        return _answer(self.name, await self._exchange(method, path, timeout_s, content=body))

    async def get_bytes(self, path: str, timeout_s: float | None = None) -> bytes:
        """Get what is not JSON.

        :raise PeerFault: no answer in time.
        :raise GeniViolinError: the error that the part answered with.
        """
        response = await self._exchange("GET", path, timeout_s)
        if not response.is_success:
            _answer(self.name, response)
        return response.content

    async def stream(self, path: str) -> AsyncIterator[bytes]:
        """Get what is too large for memory, piece by piece. It is on its way when this returns.

        :raise PeerFault: no answer in time; the iterator raises it too, if the answer breaks off.
        :raise GeniViolinError: the error that the part answered with.
        """
        request = self._client.build_request("GET", path, timeout=STREAM_TIMEOUT_S)
        try:
            response = await self._client.send(request, stream=True)
            if not response.is_success:
                await response.aread()
        except httpx.HTTPError as error:
            raise self._silent(error) from error
        if not response.is_success:
            _answer(self.name, response)
        return self._pieces(response)

    async def _pieces(self, response: httpx.Response) -> AsyncIterator[bytes]:
        try:
            async for piece in response.aiter_raw():
                yield piece
        except httpx.HTTPError as error:
            raise PeerFault(f"{self.name}'s answer broke off", "see its log") from error
        finally:
            await response.aclose()

    async def send_stream(self, path: str, body: AsyncIterator[bytes], length: str | None) -> Any:
        """As :meth:`request`, with a body too large for memory.

        :param length: how many bytes it has, if that is known.
        """
        headers = {"content-length": length} if length is not None else {}
        return _answer(self.name, await self._exchange("POST", path, STREAM_TIMEOUT_S, content=body, headers=headers))

    async def _exchange(self, method: str, path: str, timeout_s: float | None, **content: Any) -> httpx.Response:
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s
        try:
            return await self._client.request(method, path, timeout=timeout, **content)
        except httpx.HTTPError as error:
            raise self._silent(error) from error

    def _silent(self, error: httpx.HTTPError) -> PeerFault:
        reason = str(error) or type(error).__name__
        return PeerFault(f"{self.name} at {self.base_url} does not answer: {reason}")

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


def _answer(name: str, response: httpx.Response) -> Any:
    try:
        data = response.json() if response.content else None
    except json.JSONDecodeError as error:
        raise PeerFault(f"{name} answered HTTP {response.status_code} with a body that is not JSON") from error
    if response.is_success:
        return data
    raise error_from_problem(data if isinstance(data, dict) else {}, response.status_code)


def service_app(title: str, lifespan: Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]) -> FastAPI:
    """A FastAPI application whose every error is a problem document."""
    app = FastAPI(title=title, lifespan=lifespan)

    @app.exception_handler(GeniViolinError)
    async def on_known_error(_request: Request, error: GeniViolinError) -> JSONResponse:
        return _problem(error)

    @app.exception_handler(RequestValidationError)
    async def on_bad_request(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return _problem(InvalidInput(f"{place}: {first['msg']}", "the request is described in /docs"))

    @app.exception_handler(HTTPException)
    async def on_no_route(_request: Request, error: HTTPException) -> JSONResponse:
        known: GeniViolinError = InvalidInput(str(error.detail), "the requests are described in /docs")
        if error.status_code == 404:
            known = NotFound("there is nothing at this address", known.hint)
        return _problem(known)

    @app.exception_handler(Exception)
    async def on_defect(_request: Request, error: Exception) -> JSONResponse:
        return _problem(GeniViolinError(f"{type(error).__name__}: {error}", "this is a defect; see the service's log"))

    return app


def _problem(error: GeniViolinError) -> JSONResponse:
    document = problem_document(error)
    return JSONResponse(document, status_code=document["status"], media_type=PROBLEM_MEDIA_TYPE)


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any free one.

    :raise MachineFault: the port is in use or may not be used.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Its connections inherit it. Without it half of an answer waits up to 40 ms for the other side to acknowledge the
    # first half (asyncio sets it by itself only on sockets that name their protocol).
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise MachineFault(f"cannot listen on {host}:{port}: {error.strerror}", "choose another port") from error
    listener.listen(128)
    return listener


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Run a service on a bound socket until SIGTERM or SIGINT."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=2,
        timeout_keep_alive=SERVER_IDLE_S,
        lifespan="on",
    )
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
