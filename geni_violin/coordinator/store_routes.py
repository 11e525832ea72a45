"""The coordinator's requests about the store: passed on to the snapshot server, bodies of any size piece by piece."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import StreamingResponse

from geni_violin.coordinator.peers import SnapshotServer
from geni_violin.coordinator.views import snapshot_view
from geni_violin.core.messages import CollectionPlan, Quota, SnapshotView, StoreStats

OCTETS = "application/octet-stream"
_TAKES_BYTES: dict[str, Any] = {"requestBody": {"content": {OCTETS: {}}, "required": True}}


def add_store_routes(app: FastAPI, server: SnapshotServer) -> None:
    """Add them to the coordinator's application."""

    @app.get(
        "/v1/snapshots/{snapshot}/export",
        response_class=StreamingResponse,
        responses={200: {"content": {OCTETS: {}}, "description": "the snapshot, in the form asked for"}},
    )
    async def export(
        snapshot: str, form: Annotated[str, Query(alias="format")] = "archive", vm: str = ""
    ) -> StreamingResponse:
        return StreamingResponse(await server.export(snapshot, form, vm), media_type=OCTETS)

    @app.post("/v1/snapshots", status_code=201, openapi_extra=_TAKES_BYTES)
    async def import_snapshot(request: Request) -> SnapshotView:
        return snapshot_view(await server.import_snapshot(_pieces(request), request.headers.get("content-length")))

    @app.post("/v1/snapshots/{snapshot}/verify")
    async def verify(snapshot: str) -> SnapshotView:
        return snapshot_view(await server.verify(snapshot))

    @app.get("/v1/store")
    async def store_stats() -> StoreStats:
        return await server.store_stats()

    @app.get("/v1/store/collection")
    async def plan_collection() -> CollectionPlan:
        return await server.plan_collection()

    @app.post("/v1/store/collection")
    async def collect(plan: CollectionPlan) -> CollectionPlan:
        return await server.collect(plan)

    @app.get("/v1/store/quotas")
    async def quotas() -> list[Quota]:
        return await server.quotas("GET")

    @app.put("/v1/store/quotas/{slice_name}")
    async def put_quota(slice_name: str, quota: Quota) -> list[Quota]:
        return await server.quotas("PUT", slice_name, quota)

    @app.delete("/v1/store/quotas/{slice_name}")
    async def delete_quota(slice_name: str) -> list[Quota]:
        return await server.quotas("DELETE", slice_name)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    async for piece in request.stream():
        yield piece
