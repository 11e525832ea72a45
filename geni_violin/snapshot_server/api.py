"""The REST side of the snapshot server: a thin shim over store, desk and ingest (docs/protocol.md lists the requests).

What touches the disk runs in a thread. Order of effects, where it matters: a staging is in the store before its tokens
leave; a snapshot's streams have ended before its images are discarded. What a crash left of images is freed while
requests are answered already.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from starlette.requests import ClientDisconnect

from geni_violin.core.errors import InvalidInput, NotFound, PeerFault
from geni_violin.core.messages import ChannelSummary, ImageStatus, Manifest, SealChannels, Staged, StageRequest
from geni_violin.runtime import pcap
from geni_violin.runtime.http import service_app
from geni_violin.snapshot_server.desk import FAILED, Desk, durable_status
from geni_violin.snapshot_server.ingest import Ingest
from geni_violin.snapshot_server.names import check_record_size
from geni_violin.snapshot_server.store import ImageStore
from geni_violin.snapshot_server.store_api import KeptStore, StoreApi

MAX_WAIT_MS = 60_000
"""The longest that a long poll waits."""

MAX_UPLOADS = 2
"""How many records of edges are in memory at a time; more wait."""
UPLOAD_DEADLINE_S = 60.0
"""A record that has not come by then makes room for others."""

_ANY_ADDRESS = "0.0.0.0"
_SCRATCH = Path("/var/tmp")
_PCAP = "application/vnd.tcpdump.pcap"
_GIVES_PCAP: dict[str, Any] = {
    "response_class": Response,
    "responses": {200: {"content": {_PCAP: {}}, "description": "frames in the pcap format"}},
}
_TAKES_PCAP: dict[str, Any] = {"openapi_extra": {"requestBody": {"content": {_PCAP: {}}, "required": True}}}


@dataclass(frozen=True)
class Health:
    """The answer to /healthz: room in the store (null: nobody knows), and where images go and come from."""

    healthy: bool
    free_bytes: int | None
    ingest_host: str
    ingest_port: int


class Api:
    """The requests, each a method."""

    def __init__(self, store: ImageStore, desk: Desk, ingest: Ingest) -> None:
        self._store = store
        self._desk = desk
        self._ingest = ingest
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)

    async def health(self, request: Request) -> Health:
        """Whether the store can be used, and how much room it has."""
        free = await asyncio.to_thread(self._store.free_bytes)
        return Health(True, free, self._ingest_host(request), self._ingest.port)

    async def stage(self, body: StageRequest, request: Request) -> Staged:
        """Make room for a snapshot's images."""
        await asyncio.to_thread(self._store.stage, body)
        stored = {
            image.vm: await asyncio.to_thread(self._store.stored_image, body.snapshot_id, image.vm)
            for image in body.images
        }
        return Staged(self._ingest_host(request), self._ingest.port, self._desk.open(body, stored.get))

    async def image_status(
        self, snapshot_id: str, vm: str, wait_ms: Annotated[int, Query(ge=0, le=MAX_WAIT_MS)] = 0
    ) -> ImageStatus:
        """How far an image is; waits until it is durable or failed, at most ``wait_ms``."""
        reception = self._desk.find(snapshot_id, vm)
        if reception is None:
            return await asyncio.to_thread(self._status_on_disk, snapshot_id, vm)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reception.settled.wait(), wait_ms / 1000)
        return reception.status()

    def _status_on_disk(self, snapshot_id: str, vm: str) -> ImageStatus:
        stored = self._store.stored_image(snapshot_id, vm)
        if stored is not None:
            return durable_status(stored)
        if vm not in {image.vm for image in self._store.staging(snapshot_id).images}:
            raise NotFound(f"no image of VM {vm} is expected in snapshot {snapshot_id}")
        return ImageStatus(vm, FAILED, reason="the snapshot server restarted before this image was durable")

    async def publish(self, snapshot_id: str, body: Manifest) -> Manifest:
        """The commit point: from here on the snapshot exists."""
        if body.id != snapshot_id:
            raise InvalidInput(f"the manifest is that of snapshot {body.id!r}", f"expected {snapshot_id!r}")
        published = await asyncio.to_thread(self._store.publish, body)
        self._desk.close(snapshot_id)
        return published

    async def put_record(self, snapshot_id: str, vm: str, kind: str, request: Request) -> dict[str, str]:
        """Keep what a VM's edge recorded, until the channel states are sealed."""
        async with self._uploads:
            data = await _bounded_body(request)
            await asyncio.to_thread(self._store.put_record, snapshot_id, vm, kind, data)
        return {}

    async def seal_channels(self, snapshot_id: str, body: SealChannels) -> list[ChannelSummary]:
        """Put the channel states together; they become part of the snapshot when it is published."""
        return await asyncio.to_thread(self._store.seal_channels, snapshot_id, body)

    async def channels(self, id_or_name: str) -> list[ChannelSummary]:
        """What the channel states of a snapshot are; none if it has none."""
        return await asyncio.to_thread(self._store.channels, id_or_name)

    async def channel(self, id_or_name: str, vm: str) -> Response:
        """The frames that a restore replays to a VM."""
        return Response(await asyncio.to_thread(self._store.channel, id_or_name, vm), media_type=_PCAP)

    async def frames(self, id_or_name: str) -> Response:
        """The channel states of all VMs, one after the other."""
        return Response(await asyncio.to_thread(self._all_channels, id_or_name), media_type=_PCAP)

    def _all_channels(self, id_or_name: str) -> bytes:
        manifest = self._store.snapshot(id_or_name)
        channels = (self._store.channel(manifest.id, vm.name) for vm in manifest.vms)
        return pcap.encode([frame for data in channels for frame in pcap.decode(data)])

    async def discard(self, snapshot_id: str) -> dict[str, str]:
        """Forget a staging and its images."""
        await self._ingest.withdraw(snapshot_id)
        await asyncio.to_thread(self._store.discard, snapshot_id)
        return {}

    async def snapshots(self) -> list[Manifest]:
        """All snapshots, the oldest first."""
        return await asyncio.to_thread(self._store.snapshots)

    async def snapshot(self, id_or_name: str) -> Manifest:
        """One snapshot."""
        return await asyncio.to_thread(self._store.snapshot, id_or_name)

    async def verify(self, id_or_name: str) -> Manifest:
        """Read a snapshot back and compare it with its manifest."""
        return await asyncio.to_thread(self._store.verify, id_or_name)

    async def delete(self, id_or_name: str) -> dict[str, str]:
        """Delete a snapshot."""
        await asyncio.to_thread(self._store.delete, id_or_name)
        return {}

    def _ingest_host(self, request: Request) -> str:
        """Where this client reaches the ingest port: if it listens on every address, at the one in use."""
        return str(request.scope["server"][0]) if self._ingest.host == _ANY_ADDRESS else self._ingest.host

    def router(self) -> APIRouter:
        """The routes of all requests."""
        router = APIRouter()
        for method, path, endpoint, *more in (
            ("GET", "/healthz", self.health),
            ("POST", "/v1/stagings", self.stage),
            ("GET", "/v1/stagings/{snapshot_id}/images/{vm}", self.image_status),
            ("PUT", "/v1/stagings/{snapshot_id}/vms/{vm}/{kind}", self.put_record, _TAKES_PCAP),
            ("POST", "/v1/stagings/{snapshot_id}/channels", self.seal_channels),
            ("POST", "/v1/stagings/{snapshot_id}/publish", self.publish),
            ("DELETE", "/v1/stagings/{snapshot_id}", self.discard),
            ("GET", "/v1/snapshots", self.snapshots),
            ("GET", "/v1/snapshots/{id_or_name}", self.snapshot),
            ("GET", "/v1/snapshots/{id_or_name}/channels", self.channels),
            ("GET", "/v1/snapshots/{id_or_name}/frames", self.frames, _GIVES_PCAP),
            ("GET", "/v1/snapshots/{id_or_name}/vms/{vm}/channel", self.channel, _GIVES_PCAP),
            ("POST", "/v1/snapshots/{id_or_name}/verify", self.verify),
            ("DELETE", "/v1/snapshots/{id_or_name}", self.delete),
        ):
            router.add_api_route(path, endpoint, methods=[method], **(more[0] if more else {}))
        return router


async def _bounded_body(request: Request) -> bytes:
    """A request's body.

    :raise InvalidInput: it is longer than any record of an edge; no more of it than that was kept.
    :raise PeerFault: it does not come to its end.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_DEADLINE_S):
            async for data in request.stream():
                check_record_size(len(body) + len(data))
                body += data
    except TimeoutError as error:
        raise PeerFault(f"the record did not come within {UPLOAD_DEADLINE_S:.0f} s", "see the agent's log") from error
    except ClientDisconnect as error:
        raise PeerFault(f"the record broke off after {len(body)} bytes", "see the agent's log") from error
    return bytes(body)


def create_app(
    store: KeptStore, ingest_listener: socket.socket, on_started: Callable[[], None], scratch: Path = _SCRATCH
) -> FastAPI:
    """The service. While it runs it serves ``ingest_listener`` too; at its end it closes that and the store.

    :param on_started: called when images are accepted.
    :param scratch: a folder for archives that come in.
    """
    desk = Desk()
    ingest = Ingest(store, desk, ingest_listener)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        ingest.start()
        on_started()
        freeing = asyncio.create_task(asyncio.to_thread(store.free_leftovers))
        try:
            yield
        finally:
            try:
                await ingest.stop()
            finally:
                await asyncio.to_thread(store.close)
                await freeing

    app = service_app("GENI-VIOLIN snapshot server", lifespan)
    app.include_router(Api(store, desk, ingest).router())
    app.include_router(StoreApi(store, scratch).router())
    return app
