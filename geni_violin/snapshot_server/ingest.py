"""The TCP side of the snapshot server: images come and go over connections of their own.

Theory of operation. A connection opens with one line of JSON and is answered by one (docs/protocol.md). That is the
event loop's work. For a *put*, all that follows, to the connection's end, is the image; a *get* is answered with one.
Images are moved by threads, one each, which read from the socket, hash and hand on, or the other way round: measured,
handing each buffer over from the event loop to a thread took a tenth of the time of all. A stream has one buffer in
memory, and when the disk is slower than the network the kernel's socket buffer fills and the sender waits.

An image's connection that ends before its image does is *reset*, not closed, so that QEMU's migration fails at once
instead of believing that it arrived. One that moves an image is ended from outside (its snapshot is discarded, the
server stops) by having its thread see that: its reading side is shut down, which the peer does not notice and which
wakes who reads, and who writes looks at it now and then. Its task then ends by itself, after the thread. Any other
connection's task is canceled.
"""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import structlog

from geni_violin.core.errors import Conflict, GeniViolinError, InvalidInput, MachineFault, PeerFault
from geni_violin.snapshot_server.desk import Desk, Reception
from geni_violin.snapshot_server.store import ImageReader, ImageStore, ImageWriter, StoredImage
from geni_violin.snapshot_server.stream_guard import StreamGuard

BUFFER_BYTES = 1 << 20
"""What is read, written and hashed at a time."""
MAX_CONNECTIONS = 256
MAX_OPENING_BYTES = 4096
OPENING_DEADLINE_S = 10.0
_WORKERS = 32
_GOODBYE_S = 10.0
_LOOK_S = 0.2
"""How often a thread that cannot send looks whether it is to end."""
_HEAD_START_S = 1.0
"""How long an image's connection stays after the image was refused: whoever asks for its status (the coordinator) hears
why before the other end tells it that the connection broke. What comes meanwhile is read and thrown away, so that no
guest waits for it."""

_log = structlog.get_logger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Put:
    """The opening of a connection that brings an image."""

    token: str


@dataclass(frozen=True)
class Get:
    """The opening of a connection that wants an image."""

    snapshot_id: str
    vm: str


def parse_opening(line: bytes) -> Put | Get:
    """The first line of a connection.

    :raise InvalidInput: it is neither a put nor a get.
    """
    with contextlib.suppress(ValueError):
        match json.loads(line):
            case {"put": str(token)}:
                return Put(token)
            case {"get": str(snapshot_id), "vm": str(vm)}:
                return Get(snapshot_id, vm)
    raise InvalidInput("the first line cannot be understood", 'expected {"put": TOKEN} or {"get": ID, "vm": NAME}')


@dataclass(eq=False)
class _Connection:
    """One connection: whether it moves an image and, if it brings one, which. ``cut_off`` is why it was ended from
    outside.
    """

    socket: socket.socket
    peer: str
    moves_image: bool = False
    reception: Reception | None = None
    cut_off: str = ""

    def end(self, reason: str) -> None:
        self.cut_off = reason
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RD)

    def refuse_if_cut_off(self) -> None:
        if self.cut_off:
            raise Conflict(self.cut_off)


class Ingest:
    """Serves connections on a bound, listening socket between :meth:`start` and :meth:`stop`."""

    def __init__(self, store: ImageStore, desk: Desk, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._store = store
        self._desk = desk
        self._listener = listener
        self._workers = ThreadPoolExecutor(_WORKERS, "ingest")
        self._movers = ThreadPoolExecutor(MAX_CONNECTIONS, "image")
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._accepting: asyncio.Task[None] | None = None
        self.host: str = listener.getsockname()[0]
        self.port: int = listener.getsockname()[1]

    def start(self) -> None:
        """Accept connections; needs a running event loop."""
        self._accepting = asyncio.create_task(self._accept())

    async def stop(self) -> None:
        """Accept no more, end what goes on, and wait for the threads that write."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        self._listener.close()
        await self._end(list(self._connections), "the snapshot server stops")
        self._workers.shutdown(wait=False)
        self._movers.shutdown(wait=False)

    async def withdraw(self, snapshot_id: str) -> None:
        """Await nothing more of a snapshot and end its streams.

        When this returns, none of its images is being written.

        :raise MachineFault: a write takes too long, as on a disk that hangs.
        """
        tasks = [task for task, connection in self._connections.items() if _brings(connection, snapshot_id)]
        self._desk.close(snapshot_id)
        await self._end(tasks, "the snapshot was discarded")

    async def _end(self, tasks: list[asyncio.Task[None]], reason: str) -> None:
        for task in tasks:
            if self._connections[task].moves_image:
                self._connections[task].end(reason)
            else:
                task.cancel()
        if tasks:
            _done, pending = await asyncio.wait(tasks, timeout=_GOODBYE_S)
            if pending:
                raise MachineFault(f"{len(pending)} images are still being written after {_GOODBYE_S:.0f} s")

    # --- one connection -----------------------------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(self._listener)
            except OSError as error:  # such as too many open files: those that are open will end
                _log.warning("connection_not_accepted", reason=str(error))
                await asyncio.sleep(0.1)
                continue
            connection = _Connection(accepted, f"{address[0]}:{address[1]}")
            task = loop.create_task(self._serve(connection))
            self._connections[task] = connection
            task.add_done_callback(self._connections.pop)

    async def _serve(self, connection: _Connection) -> None:
        with connection.socket:
            _prepare(connection.socket)
            try:
                if len(self._connections) > MAX_CONNECTIONS:
                    raise Conflict(f"there are {MAX_CONNECTIONS} connections already", "try again later")
                opening, rest = await _read_opening(connection.socket)
                connection.moves_image = True
                if isinstance(opening, Put):
                    await self._put(connection, opening, rest)
                else:
                    await self._get(connection, opening)
            except GeniViolinError as error:
                _log.warning("connection_refused", peer=connection.peer, reason=str(error))
                with contextlib.suppress(OSError):
                    await _send_line(connection.socket, {"error": str(error)})
            except OSError as error:
                _log.warning("connection_broken", peer=connection.peer, reason=str(error))
            except Exception:
                _log.exception("connection_given_up", peer=connection.peer)

    async def _get(self, connection: _Connection, opening: Get) -> None:
        reader = await self._in_thread(self._store.open_image, opening.snapshot_id, opening.vm)
        try:
            await _send_line(connection.socket, {"ok": True})
            _reset_on_close(connection.socket, True)
            await self._move(_send, connection, reader)
        except GeniViolinError as error:  # words would be taken for part of the image; the reset is not
            _log.error("image_not_sent", snapshot=opening.snapshot_id, vm=opening.vm, reason=str(error))
        else:
            _reset_on_close(connection.socket, False)
            _log.info("image_sent", snapshot=opening.snapshot_id, vm=opening.vm)
        finally:
            await asyncio.shield(self._in_thread(reader.close))

    async def _put(self, connection: _Connection, opening: Put, rest: bytes) -> None:
        reception = connection.reception = self._desk.claim(opening.token)
        try:
            writer = await self._in_thread(self._store.open_writer, reception.snapshot_id, reception.vm)
        except GeniViolinError as error:
            reception.fail(str(error))
            raise
        try:
            await _send_line(connection.socket, {"ok": True})
            stored = await self._move(_receive, connection, reception, writer, rest)
        except BaseException as error:
            _reset_on_close(connection.socket, True)
            await self._in_thread(writer.abort)
            reception.fail(str(_failure(reception, error)))
            _log.warning("image_failed", snapshot=reception.snapshot_id, vm=reception.vm, reason=reception.reason)
            if not isinstance(error, GeniViolinError | OSError):
                raise
            if not (isinstance(error, OSError) or connection.cut_off):
                await _drain(connection.socket, _HEAD_START_S)
        else:
            reception.complete(stored)
            _log.info("image_durable", snapshot=reception.snapshot_id, vm=reception.vm, bytes=stored.received_bytes)

    async def _move(
        self,
        function: Callable[Concatenate[_Connection, P], T],
        connection: _Connection,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Have a thread of its own move an image through a connection."""
        moving = asyncio.wrap_future(self._movers.submit(function, connection, *args, **kwargs))
        try:
            return await asyncio.shield(moving)
        except asyncio.CancelledError:
            connection.end("the snapshot server stops")
            raise
        finally:
            # What the thread uses must not be ended under it.
            await asyncio.wait([moving])
            connection.socket.setblocking(False)

    def _submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        return asyncio.wrap_future(self._workers.submit(function, *args, **kwargs))

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._submit(function, *args, **kwargs)


def _receive(connection: _Connection, reception: Reception, writer: ImageWriter, rest: bytes) -> StoredImage:
    """Take an image in, to its stream's end. Blocks."""
    connection.socket.setblocking(True)
    guard = StreamGuard(reception.expected_bytes)
    buffer = memoryview(bytearray(BUFFER_BYTES))
    data = memoryview(rest)
    while True:
        guard.accept(data)
        reception.received_bytes = guard.received_bytes
        writer.write(data)
        data = buffer[: _filled(connection.socket, buffer)]
        connection.refuse_if_cut_off()
        if not data:
            break
    guard.end()
    return writer.finish()


def _filled(connected: socket.socket, buffer: memoryview) -> int:
    """Wait for what comes next, and take what is there by then, as far as there is room; 0 is the stream's end."""
    filled = count = connected.recv_into(buffer)
    with contextlib.suppress(BlockingIOError):
        while count and filled < len(buffer):
            count = connected.recv_into(buffer[filled:], 0, socket.MSG_DONTWAIT)
            filled += count
    return filled


def _send(connection: _Connection, reader: ImageReader) -> None:
    """Send an image. Blocks."""
    connection.socket.settimeout(_LOOK_S)
    for chunk in reader.chunks():
        rest = memoryview(chunk)
        while rest:
            connection.refuse_if_cut_off()
            try:
                rest = rest[connection.socket.send(rest) :]
            except TimeoutError as late:
                if late.errno:  # the kernel's: the other machine is gone
                    raise


def _brings(connection: _Connection, snapshot_id: str) -> bool:
    return connection.reception is not None and connection.reception.snapshot_id == snapshot_id


def _failure(reception: Reception, error: BaseException) -> BaseException:
    """What is told of an image that failed."""
    if isinstance(error, GeniViolinError):
        return error
    if not isinstance(error, OSError):
        return MachineFault(f"the image could not be taken in: {type(error).__name__}: {error}", "see the server's log")
    where = f"after {reception.received_bytes} bytes of VM {reception.vm}'s image"
    return PeerFault(f"the connection broke {where}: {error.strerror or error}", "see the log of the VM's host agent")


def _prepare(connected: socket.socket) -> None:
    """Never block, and notice within a minute that the other machine is gone."""
    connected.setblocking(False)
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        connected.setsockopt(level, option, value)


def _reset_on_close(connected: socket.socket, wanted: bool) -> None:
    """Whether close() sends a reset (socket(7), SO_LINGER with no time)."""
    with contextlib.suppress(OSError):
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", int(wanted), 0))


async def _drain(connected: socket.socket, duration_s: float) -> None:
    """Throw away what comes, for so long."""
    loop, buffer = asyncio.get_running_loop(), bytearray(BUFFER_BYTES)
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(duration_s):
            while await loop.sock_recv_into(connected, buffer):
                pass


async def _read_opening(connected: socket.socket) -> tuple[Put | Get, bytes]:
    """The opening, and what came after its line."""
    loop, received = asyncio.get_running_loop(), b""
    try:
        async with asyncio.timeout(OPENING_DEADLINE_S):
            while b"\n" not in received and len(received) < MAX_OPENING_BYTES:
                if not (data := await loop.sock_recv(connected, MAX_OPENING_BYTES)):
                    break
                received += data
    except TimeoutError as error:
        raise InvalidInput(f"no first line came within {OPENING_DEADLINE_S:.0f} s", "see docs/protocol.md") from error
    line, _newline, rest = received.partition(b"\n")
    return parse_opening(line), rest


async def _send_line(connected: socket.socket, message: dict[str, object]) -> None:
    await asyncio.get_running_loop().sock_sendall(connected, json.dumps(message).encode() + b"\n")
