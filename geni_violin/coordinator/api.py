"""The coordinator's REST API: one thin function a request (``docs/protocol.md``, section Coordinator)."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse

from geni_violin.coordinator.journal import Journal
from geni_violin.coordinator.peers import Peers
from geni_violin.coordinator.reconciler import Reconciler
from geni_violin.coordinator.slices import Slices
from geni_violin.coordinator.snapshots import Snapshots
from geni_violin.coordinator.store_routes import add_store_routes
from geni_violin.coordinator.views import snapshot_view
from geni_violin.core.errors import GeniViolinError, NotFound
from geni_violin.core.messages import (
    ChannelSummary,
    CreateSlice,
    FailRequest,
    HostRequest,
    RestoreRequest,
    SliceView,
    SnapshotRequest,
    SnapshotView,
    TransactionView,
)
from geni_violin.runtime.http import bind, serve, service_app
from geni_violin.runtime.settings import Settings
from geni_violin.runtime.wire import encode

PCAP = "application/vnd.tcpdump.pcap"


class Coordinator:
    """The parts of the coordinator, put together."""

    def __init__(self, settings: Settings, controller_url: str, snapshot_server_url: str) -> None:
        self.journal = Journal(settings.state_dir / "coordinator.sqlite")
        self.peers = Peers(controller_url, snapshot_server_url, self.journal.hosts())
        self.snapshots = Snapshots(settings, self.journal, self.peers)
        self.slices = Slices(self.journal, self.peers, self.snapshots)
        self.reconciler = Reconciler(self.journal, self.peers, self.snapshots)

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Recover at the start; leave everything to the next start at the end."""
        self.snapshots.recover()
        reconciler = asyncio.create_task(self.reconciler.run())
        try:
            yield
        finally:
            reconciler.cancel()
            await self.snapshots.close()
            await self.peers.close()
            self.journal.close()

    async def health(self) -> dict[str, Any]:
        """Healthy if every part answers."""
        parts = {"controller": self.peers.controller.peer, "snapshot-server": self.peers.snapshot_server.peer}
        parts |= {f"hostagent-{host}": self.peers.agent(host).peer for host in self.journal.hosts()}
        texts = {}
        for name, peer in parts.items():
            try:
                await peer.request("GET", "/healthz", timeout_s=2.0)
                texts[name] = "healthy"
            except GeniViolinError as error:
                texts[name] = str(error)
        return {"healthy": all(text == "healthy" for text in texts.values()), "parts": texts}


def create_app(coordinator: Coordinator) -> FastAPI:
    """The application; its OpenAPI document is at ``/openapi.json``."""
    app = service_app("GENI-VIOLIN coordinator", coordinator.lifespan)
    _add_slice_routes(app, coordinator)
    _add_snapshot_routes(app, coordinator)
    _add_transaction_routes(app, coordinator)
    add_store_routes(app, coordinator.peers.snapshot_server)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return await coordinator.health()

    @app.put("/v1/hosts/{host}")
    async def put_host(host: str, request: HostRequest) -> dict[str, Any]:
        coordinator.peers.put_agent(host, request.url)  # refuses what is no address
        await asyncio.to_thread(coordinator.journal.put_host, host, request.url)
        return {}

    @app.get("/v1/hosts")
    async def hosts() -> dict[str, str]:
        return coordinator.journal.hosts()

    return app


def _add_slice_routes(app: FastAPI, coordinator: Coordinator) -> None:
    slices = coordinator.slices

    @app.post("/v1/slices", status_code=201)
    async def create_slice(request: CreateSlice) -> SliceView:
        return await slices.create(request.spec)

    @app.get("/v1/slices")
    async def list_slices() -> list[SliceView]:
        return await slices.views()

    @app.get("/v1/slices/{name}")
    async def show_slice(name: str) -> SliceView:
        return await slices.view(name)

    @app.delete("/v1/slices/{name}")
    async def delete_slice(name: str) -> dict[str, Any]:
        await slices.delete(name)
        return {}

    @app.post("/v1/slices/{name}/fail")
    async def fail_slice(name: str, request: FailRequest) -> SliceView:
        return await slices.fail(name, request.vm)

    @app.post("/v1/slices/{name}/resume")
    async def resume_slice(name: str) -> SliceView:
        return await slices.resume(name)

    @app.get("/v1/slices/{name}/vms/{vm}/console")
    async def console(name: str, vm: str, offset: int = 0) -> dict[str, Any]:
        host = _host_of(coordinator, name, vm)
        return await coordinator.peers.agent(host).console(name, vm, offset)

    @app.post("/v1/slices/{name}/snapshots", status_code=202)
    async def take_snapshot(name: str, request: SnapshotRequest) -> TransactionView:
        return await coordinator.snapshots.take(coordinator.journal.slice(name), request)


def _host_of(coordinator: Coordinator, name: str, vm: str) -> str:
    try:
        return coordinator.journal.slice(name).spec.vm(vm).host
    except KeyError:
        raise NotFound(f"slice {name!r} has no VM {vm!r}") from None


def _add_snapshot_routes(app: FastAPI, coordinator: Coordinator) -> None:
    server = coordinator.peers.snapshot_server

    @app.get("/v1/snapshots")
    async def list_snapshots(slice: str = "") -> list[SnapshotView]:
        return [snapshot_view(found) for found in await server.snapshots() if slice in ("", found.slice.name)]

    @app.get("/v1/snapshots/{snapshot}")
    async def show_snapshot(snapshot: str) -> SnapshotView:
        return snapshot_view(await server.snapshot(snapshot))

    @app.get("/v1/snapshots/{snapshot}/channels")
    async def channels(snapshot: str) -> list[ChannelSummary]:
        return await server.channels(snapshot)

    @app.get("/v1/snapshots/{snapshot}/frames", response_class=Response, responses={200: {"content": {PCAP: {}}}})
    async def frames(snapshot: str) -> Response:
        return Response(await server.frames(snapshot), media_type=PCAP)

    @app.delete("/v1/snapshots/{snapshot}")
    async def delete_snapshot(snapshot: str) -> dict[str, Any]:
        await coordinator.slices.delete_snapshot(snapshot)
        return {}

    @app.post("/v1/snapshots/{snapshot}/restore")
    async def restore(snapshot: str, request: RestoreRequest) -> SliceView:
        return await coordinator.slices.restore(snapshot, request)


def _add_transaction_routes(app: FastAPI, coordinator: Coordinator) -> None:
    snapshots = coordinator.snapshots

    @app.get("/v1/transactions/{transaction}")
    async def show_transaction(transaction: str) -> TransactionView:
        return snapshots.view(transaction)

    @app.get("/v1/transactions/{transaction}/events")
    async def follow_transaction(transaction: str) -> StreamingResponse:
        snapshots.view(transaction)

        async def stream() -> AsyncIterator[str]:
            async for view in snapshots.follow(transaction):
                yield f"data: {json.dumps(encode(view))}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")


def run_coordinator(
    settings: Settings,
    host: str,
    port: int,
    controller_url: str,
    snapshot_server_url: str,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT. ``on_ready`` is called once, with the address that is bound.

    :raise MachineFault: the port is in use.
    """
    listener = bind(host, port)
    coordinator = Coordinator(settings, controller_url, snapshot_server_url)
    on_ready(f"http://{host}:{listener.getsockname()[1]}")
    serve(create_app(coordinator), listener)
