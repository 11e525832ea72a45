"""The REST side of the store as a whole: snapshots out and in, space, rubbish, quotas (docs/protocol.md).

Bodies of any size are streamed. An export goes out piece by piece as it is made; if it breaks off, so does the answer,
without its end, which every HTTP client notices. An archive that comes in goes to a scratch file first; one at a time,
so that the room that it was told to have is there.
"""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import structlog
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from geni_violin.core.errors import InvalidInput, NoSpace, PeerFault
from geni_violin.core.messages import CollectionPlan, Manifest, Quota, StoreStats
from geni_violin.snapshot_server.records import disk_faults
from geni_violin.snapshot_server.store import ImageStore
from geni_violin.snapshot_server.travel.archive_format import MAGIC, check_magic
from geni_violin.snapshot_server.travel.exporting import ARCHIVE, Export, export_snapshot
from geni_violin.snapshot_server.travel.importing import import_archive

ARCHIVE_TYPE = "application/vnd.geni-violin.snapshot"
OCTETS = "application/octet-stream"
SILENCE_S = 60.0
"""An archive of which nothing comes for so long is given up."""
MAX_EXPORTS = 4

_log = structlog.get_logger(__name__)
_GIVES_BYTES: dict[str, Any] = {
    "response_class": StreamingResponse,
    "responses": {
        200: {"content": {OCTETS: {}, ARCHIVE_TYPE: {}}, "description": "the snapshot, in the form asked for"}
    },
}
_TAKES_ARCHIVE: dict[str, Any] = {
    "status_code": 201,
    "openapi_extra": {"requestBody": {"content": {ARCHIVE_TYPE: {}}, "required": True}},
}


class KeptStore(ImageStore, Protocol):
    """A store of images that can tell what it takes, and give back what nothing needs."""

    def stats(self) -> StoreStats:
        """What the store and each snapshot take.

        :raise MachineFault: an image cannot be read.
        """

    def plan_collection(self) -> CollectionPlan:
        """What a collection of rubbish would do.

        :raise MachineFault: an image cannot be read.
        """

    def collect(self, plan: CollectionPlan) -> CollectionPlan:
        """Do what was planned, as far as it is still right; gives what was done.

        :raise MachineFault: something cannot be read, written or deleted.
        """

    def quotas(self) -> list[Quota]:
        """The quotas of slices."""

    def set_quota(self, slice_name: str, limit_bytes: int | None) -> None:
        """Set a slice's quota, or take it away.

        :raise InvalidInput: it is negative.
        """


class _Ended(StreamingResponse):
    """A streamed answer after which ``end`` runs, also if nobody was there any more to take its first piece: then the
    pieces are never asked for, and a ``finally`` among them never comes about.
    """

    def __init__(self, pieces: AsyncIterator[bytes], media_type: str, end: Callable[[], Awaitable[None]]) -> None:
        super().__init__(pieces, media_type=media_type)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(self._end())


class StoreApi:
    """The requests, each a method.

    :param scratch: a folder for archives that come in, on a disk with room for them.
    """

    def __init__(self, store: KeptStore, scratch: Path) -> None:
        self._store = store
        self._scratch = scratch
        self._importing = asyncio.Lock()
        self._exports = asyncio.Semaphore(MAX_EXPORTS)

    async def export(
        self, id_or_name: str, form: Annotated[str, Query(alias="format")] = ARCHIVE, vm: str = ""
    ) -> StreamingResponse:
        """A snapshot as an archive, or one VM of it as a stream or as a file of virsh save."""
        await self._exports.acquire()
        try:
            going = await asyncio.to_thread(self._begin_export, id_or_name, form, vm)
            try:
                first = await asyncio.to_thread(going.take)  # what goes wrong at once is said, not only noticed
            except BaseException:
                await asyncio.shield(asyncio.to_thread(going.close))
                raise
        except BaseException:
            self._exports.release()
            raise
        kind = ARCHIVE_TYPE if form == ARCHIVE else OCTETS

        async def end() -> None:
            await asyncio.to_thread(going.close)
            self._exports.release()

        return _Ended(self._pieces(id_or_name, going, first), kind, end)

    def _begin_export(self, id_or_name: str, form: str, vm: str) -> Export:
        self._make_scratch()
        return export_snapshot(self._store, id_or_name, form, vm, self._scratch)

    def _make_scratch(self) -> None:
        with disk_faults("there is no folder for archives", self._scratch):
            self._scratch.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def _pieces(self, id_or_name: str, going: Export, piece: bytes) -> AsyncIterator[bytes]:
        try:
            while piece:
                yield piece
                piece = await asyncio.to_thread(going.take)
        except Exception as error:
            _log.error("export_broke_off", snapshot=id_or_name, reason=str(error))
            raise

    async def import_snapshot(self, request: Request) -> Manifest:
        """Take an archive in; the snapshot exists when this answers."""
        async with self._importing:
            with self._scratch_file() as path:
                await self._receive(request, path)
                manifest = await asyncio.to_thread(import_archive, self._store, path, self._scratch)
        _log.info("snapshot_imported", snapshot=manifest.name)
        return manifest

    @contextlib.contextmanager
    def _scratch_file(self) -> Any:
        self._make_scratch()
        with disk_faults("the archive cannot be kept", self._scratch):
            descriptor, name = tempfile.mkstemp(prefix="archive-", dir=self._scratch)
            os.close(descriptor)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    async def _receive(self, request: Request, path: Path) -> None:
        """Keep a request's body in a file. Where its first bytes are no archive's, no more of it is taken."""
        self._refuse_without_room(request)
        count, pieces = 0, request.stream()
        try:
            with disk_faults("the archive cannot be kept", self._scratch), path.open("wb", buffering=0) as file:
                beginning = b""
                while True:
                    async with asyncio.timeout(SILENCE_S):
                        piece = await anext(pieces, None)
                    if piece is None:
                        break
                    beginning = (beginning + piece)[: len(MAGIC)]
                    if len(beginning) == len(MAGIC) and count < len(MAGIC):
                        check_magic(beginning)
                    await asyncio.to_thread(_write_all, file, piece)
                    count += len(piece)
        except TimeoutError as error:
            raise PeerFault(f"nothing of the archive came for {SILENCE_S:.0f} s", "try again") from error
        except ClientDisconnect as error:
            raise PeerFault(f"the archive broke off after {count} bytes", "try again") from error

    def _refuse_without_room(self, request: Request) -> None:
        text = request.headers.get("content-length", "0")
        if not text.isdecimal():
            raise InvalidInput(f"Content-Length is {text!r}", "expected a number of bytes")
        figures = os.statvfs(self._scratch if self._scratch.exists() else self._scratch.parent)
        free = figures.f_bavail * figures.f_frsize
        if int(text) > free:
            raise NoSpace(f"no room for an archive of {text} bytes: {free} are free", f"free space in {self._scratch}")

    async def stats(self) -> StoreStats:
        """What the store and each snapshot take."""
        return await asyncio.to_thread(self._store.stats)

    async def plan(self) -> CollectionPlan:
        """What a collection of rubbish would do now."""
        return await asyncio.to_thread(self._store.plan_collection)

    async def collect(self, body: CollectionPlan) -> CollectionPlan:
        """Carry out a plan, as far as it is still right."""
        return await asyncio.to_thread(self._store.collect, body)

    async def quotas(self) -> list[Quota]:
        """The quotas of slices."""
        return await asyncio.to_thread(self._store.quotas)

    async def put_quota(self, slice_name: str, body: Quota) -> list[Quota]:
        """Limit what the snapshots of a slice may add to the store."""
        if body.slice != slice_name:
            raise InvalidInput(f"the quota is that of slice {body.slice!r}", f"expected {slice_name!r}")
        await asyncio.to_thread(self._store.set_quota, slice_name, body.limit_bytes)
        return await self.quotas()

    async def delete_quota(self, slice_name: str) -> list[Quota]:
        """Limit a slice no longer."""
        await asyncio.to_thread(self._store.set_quota, slice_name, None)
        return await self.quotas()

    def router(self) -> APIRouter:
        """The routes of all requests."""
        router = APIRouter()
        for method, path, endpoint, *more in (
            ("GET", "/v1/snapshots/{id_or_name}/export", self.export, _GIVES_BYTES),
            ("POST", "/v1/snapshots", self.import_snapshot, _TAKES_ARCHIVE),
            ("GET", "/v1/store", self.stats),
            ("GET", "/v1/store/collection", self.plan),
            ("POST", "/v1/store/collection", self.collect),
            ("GET", "/v1/store/quotas", self.quotas),
            ("PUT", "/v1/store/quotas/{slice_name}", self.put_quota),
            ("DELETE", "/v1/store/quotas/{slice_name}", self.delete_quota),
        ):
            router.add_api_route(path, endpoint, methods=[method], **(more[0] if more else {}))
        return router


def _write_all(file: Any, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
