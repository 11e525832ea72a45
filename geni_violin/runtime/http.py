"""HTTP between the parts: one client, one service shell, problem documents both ways."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from yarl import URL

from geni_violin.core.errors import GeniViolinError, InvalidInput, MachineFault, NotFound, PeerFault
from geni_violin.runtime.problems import PROBLEM_MEDIA_TYPE, error_from_problem, problem_document
from geni_violin.runtime.scheduling import forget_garbage

STREAM_TIMEOUT_S = 900.0
"""How long the other part may be silent while a large body is on its way, or is being worked on."""
_STREAM_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=STREAM_TIMEOUT_S)
_FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""What asking can raise; ValueError is that of a host whose name cannot be one."""
CLIENT_IDLE_S = 60
SERVER_IDLE_S = 600
"""How long an idle connection stays open: the side that asks lets go first, so that it never asks into a closed one."""


def _is_address(url: str) -> bool:
    try:
        parsed = urlsplit(url)
        is_whole = not (parsed.query or parsed.fragment)  # a path may follow: that of a proxy
        return parsed.scheme in ("http", "https") and bool(parsed.hostname) and parsed.port != 0 and is_whole
    except ValueError:
        return False


class Peer:
    """Another part, reached over connections that stay open.

    :param name: what people call it in messages, such as "the controller".
    :param base_url: its address, ``http://host:port``.
    """

    def __init__(self, name: str, base_url: str, timeout_s: float = 30.0) -> None:
        self.name = name
        self.base_url = base_url
        if not _is_address(base_url):
            raise InvalidInput(f"{base_url!r} is no address of {name}", "expected http://host:port")
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def request(self, method: str, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        """Send a request and give back the decoded JSON answer (None for an empty one).

        :raise PeerFault: no answer in time, or one that cannot be understood.
        :raise GeniViolinError: the error that the part answered with.
        """
        return _decoded(self.name, *await self._exchange(method, path, timeout_s, json=body))

    async def send_bytes(self, method: str, path: str, body: bytes, timeout_s: float | None = None) -> Any:
        """As :meth:`request`, with a body that is not JSON."""
        return _decoded(self.name, *await self._exchange(method, path, timeout_s, data=body))

    async def get_bytes(self, path: str, timeout_s: float | None = None) -> bytes:
        """Get what is not JSON.

        :raise PeerFault: no answer in time.
        :raise GeniViolinError: the error that the part answered with.
        """
        status, content = await self._exchange("GET", path, timeout_s)
        if not _is_success(status):
            _decoded(self.name, status, content)
        return content

    async def stream(self, path: str) -> AsyncIterator[bytes]:
        """Get what is too large for memory, piece by piece. It is on its way when this returns.

        :raise PeerFault: no answer in time; the iterator raises it too, if the answer breaks off.
        :raise GeniViolinError: the error that the part answered with.
        """
        try:
            response = await self._opened().get(self._url(path), timeout=_STREAM_TIMEOUT)
            content = b"" if _is_success(response.status) else await response.read()
        except _FAILURES as error:
            raise self._silent(error) from error
        if not _is_success(response.status):
            _decoded(self.name, response.status, content)
        return self._pieces(response)

    async def _pieces(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            async for piece in response.content.iter_any():
                yield piece
        except _FAILURES as error:
            raise PeerFault(f"{self.name}'s answer broke off", "see its log") from error
        finally:
            response.close()

    async def send_stream(self, path: str, body: AsyncIterator[bytes], length: str | None) -> Any:
        """As :meth:`request`, with a body too large for memory.

        :param length: how many bytes it has, if that is known.
        """
        headers = {"content-length": length} if length is not None else {}
        return _decoded(self.name, *await self._exchange("POST", path, _STREAM_TIMEOUT, data=body, headers=headers))

    async def _exchange(
        self, method: str, path: str, limit: float | aiohttp.ClientTimeout | None, **body: Any
    ) -> tuple[int, bytes]:
        """Status and content of the answer. A limit that is a number is for all of it, in seconds."""
        if not isinstance(limit, aiohttp.ClientTimeout):
            limit = aiohttp.ClientTimeout(total=self._timeout_s if limit is None else limit)
        try:
            async with self._opened().request(method, self._url(path), timeout=limit, **body) as response:
                return response.status, await response.read()
        except _FAILURES as error:
            raise self._silent(error) from error

    def _url(self, path: str) -> URL:
        return URL(self.base_url.rstrip("/") + path, encoded=True)

    def _silent(self, error: Exception) -> PeerFault:
        reason = str(error) or type(error).__name__
        return PeerFault(f"{self.name} at {self.base_url} does not answer: {reason}")

    def _opened(self) -> aiohttp.ClientSession:
        """The session, which belongs to the event loop that it is first used in."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=CLIENT_IDLE_S)
            self._session = aiohttp.ClientSession(connector=connector, json_serialize=_compact_json)
        return self._session

    async def close(self) -> None:
        """Close all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def _compact_json(body: Any) -> str:
    return json.dumps(body, separators=(",", ":"))


def _is_success(status: int) -> bool:
    return 200 <= status < 300


def _decoded(name: str, status: int, content: bytes) -> Any:
    """What an answer says.

    :raise PeerFault: it is no JSON.
    :raise GeniViolinError: the error that it tells of.
    """
    try:
        data = json.loads(content) if content else None
    except ValueError as error:
        raise PeerFault(f"{name} answered HTTP {status} with a body that is not JSON") from error
    if _is_success(status):
        return data
    raise error_from_problem(data if isinstance(data, dict) else {}, status)


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
    forget_garbage()
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
