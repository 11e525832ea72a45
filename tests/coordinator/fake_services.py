"""The parts around the coordinator: served for real on loopback, scripted to fail.

Theory of operation. :class:`Service` serves an application by uvicorn in this event loop, and can vanish (as behind a
cut cable) and come back at the same address. :class:`Faults` stands before an application: a fault is told which
requests it concerns and what happens before they are handled, or after it and before they are answered.
:class:`FakeController` keeps slices as docs/protocol.md says and refuses what the real one refuses.
"""

import asyncio
import contextlib
import json
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import uvicorn
from fastapi import FastAPI

from geni_violin.core.color import COLORS, color_of
from geni_violin.core.errors import Conflict, GeniViolinError, InvalidInput, NotFound
from geni_violin.core.messages import ArmRequest, ColorCounters, DisarmRequest, PortCounters, Recolored, RecolorRequest
from geni_violin.core.model import MAX_VLAN_ID, EdgePort, NetworkSlice
from geni_violin.runtime.http import SERVER_IDLE_S, bind, service_app
from geni_violin.runtime.problems import PROBLEM_MEDIA_TYPE, problem_document

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Happening = Callable[[], Awaitable[None]]


@dataclass(eq=False)
class Fault:
    """What happens to some requests; ``times`` is None for all of them. ``seen`` and ``done`` are set when the
    first one has come, and when it has been handled."""

    method: str
    path: re.Pattern[str]
    happening: Happening
    after: bool
    times: int | None
    body: str
    seen: asyncio.Event
    done: asyncio.Event

    def concerns(self, scope: Message, body: bytes) -> bool:
        """Whether it happens to this request."""
        fits = scope["method"] == self.method and self.path.fullmatch(scope["path"]) is not None
        return fits and self.times != 0 and self.body.encode() in body


class Faults:
    """An application with scripted faults before it."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._faults: list[Fault] = []

    def add(
        self,
        request: str,
        happening: Happening,
        *,
        after: bool = False,
        times: int | None = 1,
        body: str = "",
    ) -> Fault:
        """Have something happen to requests.

        :param request: method and pattern of the path, as ``"POST /v1/slices/.*/recolor"``.
        :param happening: a GeniViolinError that it raises is the answer.
        :param after: it happens when the request has been handled, and before it is answered.
        :param body: the request's body contains this.
        """
        method, path = request.split(" ", 1)
        fault = Fault(method, re.compile(path), happening, after, times, body, asyncio.Event(), asyncio.Event())
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Nothing happens any more to requests that come from now on."""
        self._faults.clear()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._faults:
            await self.app(scope, receive, send)
            return
        body = await _body(receive)
        fault = next((fault for fault in self._faults if fault.concerns(scope, body)), None)
        if fault is None:
            await self.app(scope, _replay(body, receive), send)
            return
        if fault.times is not None:
            fault.times -= 1
        await self._with_fault(fault, scope, _replay(body, receive), send)

    async def _with_fault(self, fault: Fault, scope: Message, receive: Receive, send: Send) -> None:
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        try:
            if fault.after:
                await self.app(scope, receive, keep)
            fault.seen.set()
            await fault.happening()
        except GeniViolinError as error:
            await _send_problem(error, send)
            return
        if not fault.after:
            await self.app(scope, receive, send)
        fault.done.set()
        for message in answer:
            await send(message)


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


async def _send_problem(error: GeniViolinError, send: Send) -> None:
    document = problem_document(error)
    headers = [(b"content-type", PROBLEM_MEDIA_TYPE.encode())]
    await send({"type": "http.response.start", "status": document["status"], "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(document).encode()})


def raises(error: GeniViolinError) -> Happening:
    """A happening: the request is answered by this error."""

    async def happening() -> None:
        raise error

    return happening


class Service:
    """An application served on loopback."""

    def __init__(self, app: Any, port: int = 0) -> None:
        self.app = app
        listener = bind("127.0.0.1", port)
        self.port: int = listener.getsockname()[1]
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_level="critical", access_log=False, lifespan="on", timeout_keep_alive=SERVER_IDLE_S)
        )

        self.reachable = False
        self.was_away = False
        """Whether it could not be reached, at some time."""

    @property
    def url(self) -> str:
        """Its address; stays the same."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Serve."""
        self._server.config.load()
        self._server.lifespan = self._server.config.lifespan_class(self._server.config)
        await self._server.startup(sockets=[self._listener])
        self.reachable = True

    async def vanish(self) -> None:
        """Be reachable no more: connections break, new ones are refused. What is being handled goes on."""
        self.reachable, self.was_away = False, True
        for server in self._server.servers:
            server.close()
        for connection in list(self._server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()

    async def come_back(self) -> None:
        """Be reachable again, at the same address."""
        self.reachable = True
        self._listener = bind("127.0.0.1", self.port)
        loop = asyncio.get_running_loop()
        config, state = self._server.config, self._server

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=state.server_state, app_state=state.lifespan.state
            )
            return made

        self._server.servers = [await loop.create_server(protocol, sock=self._listener)]

    async def kill(self) -> None:
        """Vanish, and drop what is being handled."""
        await self.vanish()
        tasks = list(self._server.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Come to the end."""
        await self.kill()
        await self._server.lifespan.shutdown()


@contextlib.asynccontextmanager
async def _no_lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield


class FakeController:
    """The controller's REST side over slices in memory.

    What the switches have outlives a restart: a port that is further than the coordinator says stays there. Frames are
    counted as Open vSwitch does it: those of the color that a recolor ends are attributed to the counters only when
    each of the ``hosts`` has purged its flow caches.
    """

    def __init__(self) -> None:
        self.slices: dict[str, NetworkSlice] = {}
        self.switches: set[int] = set()
        self.hosts: set[str] = set()
        self.edge_is_armed: Callable[[str, str], bool] = lambda _slice, _vm: True
        self.instance = secrets.token_hex(4)
        self.log: list[str] = []
        self.violations: list[str] = []
        """What nobody should have asked for."""
        self.lost_frames = 0
        """How many frames of each color a link has lost, so that its counters never balance."""
        self._on_switches: dict[str, NetworkSlice] = {}
        self._not_purged: set[str] = set()
        self.app = Faults(self._make_app())

    def forget(self) -> None:
        """What a restart does."""
        self._on_switches |= self.slices
        self.slices.clear()
        self.instance = secrets.token_hex(4)
        self.log.append("forgot")

    def purged(self, host: str) -> None:
        """The switches of a host have forgotten their cached flows."""
        self._not_purged.discard(host)

    def armed(self, name: str) -> set[str]:
        """Which VMs' ports give tagged frames."""
        network = self.slices.get(name) or self._on_switches.get(name)
        return {port.vm for port in network.ports if port.armed} if network is not None else set()

    def epochs(self, name: str) -> set[int]:
        """In which epochs the slice's ports are."""
        return {port.epoch for port in self.slices[name].ports}

    def put(self, network: NetworkSlice) -> None:
        """Install a slice; colors only advance under one VLAN ID. What is armed stays so, and what is not."""
        if not 1 <= network.vlan_id <= MAX_VLAN_ID:
            raise InvalidInput(f"VLAN ID {network.vlan_id} cannot name a slice")
        if any(other.vlan_id == network.vlan_id for other in self.slices.values() if other.name != network.name):
            raise Conflict(f"VLAN ID {network.vlan_id} belongs to another slice")
        old = self.slices.get(network.name)
        if old is not None and old.vlan_id == network.vlan_id:
            before = {port.vm: port.epoch for port in old.ports}
            if any(port.epoch < before.get(port.vm, 0) for port in network.ports):
                raise Conflict(f"a port of {network.name} would go back")
            armed = {port.vm: port.armed for port in old.ports}
            network = replace(network, ports=tuple(replace(p, armed=armed.get(p.vm, 0)) for p in network.ports))
        found = self._on_switches.pop(network.name, None)
        if found is not None and found.vlan_id == network.vlan_id:
            network = _adopted(network, found)
        self.slices[network.name] = network
        self.log.append(f"put {network.name} {sorted({port.epoch for port in network.ports})}")

    def put_all(self, networks: Iterable[NetworkSlice]) -> int:
        """These slices and no others."""
        wanted = {network.name: network for network in networks}
        for network in wanted.values():
            self.put(network)
        self.slices = {name: self.slices[name] for name in wanted}
        self._on_switches.clear()
        return len(wanted)

    def get(self, name: str) -> NetworkSlice:
        """A slice."""
        if name not in self.slices:
            raise NotFound(f"no slice {name!r} is installed")
        return self.slices[name]

    def recolor(self, name: str, request: RecolorRequest) -> None:
        """Move ports on: each is in that epoch already, or in the one before."""
        network = self.get(name)
        moving = [port for port in network.ports if request.vms is None or port.vm in request.vms]
        for port in moving:
            if port.epoch not in (request.epoch, request.epoch - 1):
                raise Conflict(f"VM {port.vm} is in epoch {port.epoch} and cannot be recolored to {request.epoch}")
            if port.armed and request.epoch not in (port.epoch, port.armed):
                raise Conflict(f"VM {port.vm} is armed for {port.armed} and cannot be recolored to {request.epoch}")
        if any(port.epoch != request.epoch for port in moving):
            self._not_purged = set(self.hosts)
        names = {port.vm for port in moving}
        ports = tuple(replace(p, epoch=request.epoch) if p.vm in names else p for p in network.ports)
        self.slices[name] = replace(network, ports=ports)
        self.log.append(f"recolor {','.join(sorted(names))} {request.epoch}")

    def arm(self, name: str, request: ArmRequest) -> None:
        """Give ports both colors of a cut. One that is through it already cannot be armed for it any more."""
        network = self.get(name)
        moving = {port.vm: port for port in network.ports if port.vm in request.vms}
        if unknown := set(request.vms) - moving.keys():
            raise NotFound(f"slice {name} has no VM {unknown}")
        for vm, port in moving.items():
            if port.armed != request.epoch and port.epoch != request.epoch - 1:
                raise Conflict(f"VM {vm} is in epoch {port.epoch} and cannot be armed for {request.epoch}")
            if not self.edge_is_armed(name, vm):
                self.violations.append(f"the port of {vm} was armed before its edge")
        ports = tuple(replace(p, armed=request.epoch) if p.vm in moving else p for p in network.ports)
        self.slices[name] = replace(network, ports=ports)
        self.log.append(f"arm {','.join(sorted(moving))} {request.epoch}")

    def disarm(self, name: str, request: DisarmRequest) -> None:
        """Give all ports frames without a tag again; all of them are in that epoch."""
        network = self.get(name)
        if any(port.epoch != request.epoch or port.armed > request.epoch for port in network.ports):
            raise Conflict(f"not every port of {name} is in epoch {request.epoch}")
        self.slices[name] = replace(network, ports=tuple(replace(port, armed=0) for port in network.ports))
        self.log.append(f"disarm {request.epoch}")

    def colors(self, name: str) -> list[ColorCounters]:
        """Mattern's counters."""
        current = {color_of(port.epoch) for port in self.get(name).ports}
        alive = {c: 0 if c in current else self.lost_frames + len(self._not_purged) for c in range(COLORS)}
        return [ColorCounters(color, 100, 100 - alive[color], alive[color]) for color in range(COLORS)]

    def _make_app(self) -> FastAPI:
        app = service_app("scripted controller", _no_lifespan)

        @app.get("/healthz")
        async def healthz() -> dict[str, Any]:
            return {"healthy": True, "instance": self.instance, "switches": sorted(self.switches)}

        @app.put("/v1/slices")
        async def put_slices(networks: list[NetworkSlice]) -> dict[str, int]:
            return {"installed": self.put_all(networks)}

        @app.put("/v1/slices/{name}")
        async def put_slice(name: str, network: NetworkSlice) -> Recolored:
            self.put(network)
            return Recolored(0.1)

        @app.get("/v1/slices/{name}")
        async def get_slice(name: str) -> NetworkSlice:
            return self.get(name)

        @app.delete("/v1/slices/{name}")
        async def delete_slice(name: str) -> Recolored:
            self.get(name)
            del self.slices[name]
            return Recolored(0.1)

        @app.post("/v1/slices/{name}/recolor")
        async def recolor(name: str, request: RecolorRequest) -> Recolored:
            self.recolor(name, request)
            return Recolored(0.1)

        @app.post("/v1/slices/{name}/arm")
        async def arm(name: str, request: ArmRequest) -> Recolored:
            self.arm(name, request)
            return Recolored(0.1)

        @app.post("/v1/slices/{name}/disarm")
        async def disarm(name: str, request: DisarmRequest) -> Recolored:
            self.disarm(name, request)
            return Recolored(0.1)

        @app.get("/v1/slices/{name}/colors")
        async def colors(name: str) -> list[ColorCounters]:
            return self.colors(name)

        @app.get("/v1/slices/{name}/counters")
        async def counters(name: str) -> list[PortCounters]:
            return [PortCounters(port.vm, port.epoch % 3, 10, 2 * port.epoch) for port in self.get(name).ports]

        return app


def _adopted(network: NetworkSlice, found: NetworkSlice) -> NetworkSlice:
    """A slice as it is told, but no port less far than the switches have it."""
    ahead = {port.vm: port for port in found.ports}

    def adopted(port: EdgePort) -> EdgePort:
        there = ahead.get(port.vm, port)
        return replace(port, epoch=max(port.epoch, there.epoch), armed=max(port.armed, there.armed))

    return replace(network, ports=tuple(adopted(port) for port in network.ports))
