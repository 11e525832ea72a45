"""A coordinator to test the command line against: it knows one slice, answers by a script, notes what it is asked."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from geni_violin.core.errors import Conflict, MachineFault, NotFound
from geni_violin.core.messages import ChannelSummary, SliceView, SnapshotView, TransactionView, VmSnapshotView, VmView
from geni_violin.runtime import pcap
from geni_violin.runtime.http import bind, service_app
from geni_violin.runtime.wire import encode

MIB = 1 << 20
VMS = tuple(VmView(f"n{i}", "h1", "running", 4000 + i, 1, f"10.9.0.{i}/24") for i in (1, 2))
SLICE = SliceView("net", "running", 1, 7, VMS)
SNAPSHOT = SnapshotView(
    name="half",
    id="0123456789abcdef",
    slice="net",
    state="committed",
    created_at=1795175813.5,
    strategy="background",
    network="hold",
    coordination="color",
    epoch=1,
    skew_ms=12.25,
    total_ms=3456.7,
    frames_held=40,
    frames_dropped=3,
    frames_in_transit=3,
    notes=("the old color was waited for by time",),
    vms=tuple(
        VmSnapshotView(
            name=f"n{i}",
            host="h1",
            cut_at=1795175814.0,
            downtime_ms=2.5,
            received_bytes=90 * MIB,
            stored_bytes=90 * MIB,
            memory_bytes=128 * MIB,
            strategy="background",
            network="hold",
            hold_ms=14.26,
            trigger="coordinator",
            frames_held=20,
            frames_in_transit=i,
        )
        for i in (1, 2)
    ),
)
CHANNELS = (ChannelSummary("n1", 1, 98), ChannelSummary("n2", 2, 140, late_frames=1, note="n2: undecided"))
FRAMES = pcap.encode([pcap.Frame(number, bytes(60)) for number in range(3)])
PHASES = ("preparing", "armed", "cutting", "streaming", "committing")


@dataclass
class Script:
    """How the fake behaves, and what it was asked: pairs of "METHOD path" and body."""

    end: str = "committed"
    failure: str = ""
    events: str = "whole"  # or "broken" (ends in the middle), "refused", "endless"
    busy: bool = False
    damaged: bool = False
    channels: tuple[ChannelSummary, ...] = CHANNELS
    console: str = "GV-READY\nGV-PROGRESS 1 9\n"
    asked: list[tuple[str, Any]] = field(default_factory=list)

    def transaction(self, state: str) -> TransactionView:
        """The transaction in a state."""
        received = 0 if state in PHASES[:3] else 90 * MIB
        vms = tuple(replace(vm, received_bytes=received) for vm in SNAPSHOT.vms)
        failure = self.failure if state == "aborted" else ""
        return TransactionView("t1", "net", state, failure, replace(SNAPSHOT, state=state, vms=vms))


@contextlib.asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield


def fake_app(script: Script) -> FastAPI:
    """The application."""
    app = service_app("fake coordinator", _lifespan)

    @app.middleware("http")
    async def note(request: Request, call_next: Any) -> Any:
        body = await request.body()
        query = f"?{request.url.query}" if request.url.query else ""
        script.asked.append((f"{request.method} {request.url.path}{query}", json.loads(body) if body else None))
        return await call_next(request)

    _slices(app, script)
    _snapshots(app, script)
    _transactions(app, script)
    return app


def _known(name: str, expected: str, kind: str) -> None:
    if name != expected:
        raise NotFound(f"there is no {kind} named {name!r}", f"geni-violin {kind} list shows what there is")


def _slices(app: FastAPI, script: Script) -> None:
    @app.get("/v1/slices")
    async def slices() -> list[SliceView]:
        return [SLICE]

    @app.get("/v1/slices/{name}")
    async def show(name: str) -> SliceView:
        _known(name, "net", "slice")
        return SLICE

    @app.delete("/v1/slices/{name}")
    async def delete(name: str) -> dict[str, Any]:
        _known(name, "net", "slice")
        return {}

    @app.post("/v1/slices/{name}/fail")
    async def fail(name: str) -> SliceView:
        return replace(SLICE, state="failed", vms=tuple(replace(vm, state="failed") for vm in VMS))

    @app.get("/v1/slices/{name}/vms/{vm}/console")
    async def console(name: str, vm: str, offset: int = 0) -> dict[str, Any]:
        text = script.console[offset : offset + 12]
        return {"text": text, "next_offset": offset + len(text)}


def _snapshots(app: FastAPI, script: Script) -> None:
    @app.post("/v1/slices/{name}/snapshots", status_code=202)
    async def take(name: str) -> TransactionView:
        _known(name, "net", "slice")
        if script.busy:
            raise Conflict("a snapshot of 'net' is under way already", "wait for its end")
        return script.transaction("preparing")

    @app.get("/v1/snapshots")
    async def snapshots(slice: str = "") -> list[SnapshotView]:
        return [SNAPSHOT] if slice in ("", "net") else []

    @app.get("/v1/snapshots/{name}")
    async def show(name: str) -> SnapshotView:
        _known(name, "half", "snapshot")
        return SNAPSHOT

    @app.get("/v1/snapshots/{name}/channels")
    async def channels(name: str) -> list[ChannelSummary]:
        _known(name, "half", "snapshot")
        return list(script.channels)

    @app.get("/v1/snapshots/{name}/frames")
    async def frames(name: str) -> Response:
        if script.damaged:
            raise MachineFault("the channel state of VM n2 is damaged")
        return Response(FRAMES, media_type="application/vnd.tcpdump.pcap")

    @app.delete("/v1/snapshots/{name}")
    async def delete(name: str) -> dict[str, Any]:
        _known(name, "half", "snapshot")
        return {}

    @app.post("/v1/snapshots/{name}/restore")
    async def restore(name: str) -> SliceView:
        _known(name, "half", "snapshot")
        return SLICE


def _transactions(app: FastAPI, script: Script) -> None:
    @app.get("/v1/transactions/{transaction}")
    async def show(transaction: str) -> TransactionView:
        return script.transaction(script.end)

    @app.get("/v1/transactions/{transaction}/events")
    async def events(transaction: str) -> StreamingResponse:
        if script.events == "refused":
            raise NotFound("this coordinator pushes nothing")

        async def stream() -> AsyncIterator[str]:
            for state in PHASES[:2] if script.events == "broken" else (*PHASES, script.end):
                yield f"data: {json.dumps(encode(script.transaction(state)))}\n\n"
                if script.events == "endless" and state == "streaming":
                    await asyncio.Event().wait()
            if script.events == "broken":
                yield 'data: {"id": "t1", "sli'

        return StreamingResponse(stream(), media_type="text/event-stream")


@contextlib.contextmanager
def serving(script: Script) -> Iterator[str]:
    """The fake on a real socket of the loopback; gives its address."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(fake_app(script), log_level="error", timeout_graceful_shutdown=1, lifespan="off")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
