"""A whole system on loopback for the coordinator's tests: everything real but hypervisor, switches and controller.

Theory of operation. A :class:`World` has a real coordinator and a real snapshot server, both served by uvicorn, two
scripted agents and a scripted controller; one slice, n1 and n2 on h1, n3 on h2. A test scripts what goes wrong, takes a
snapshot, and at the end :meth:`World.assert_sound` states what must hold whatever went wrong:

- a snapshot is whole or absent: transaction, server's list and server's folder say the same;
- no VM that lives is paused, held, migrating, or marked as being cut;
- all ports are in one epoch and none is armed, and the slice's own epoch is that one; nothing was asked for too early;
- every edge has stepped aside, but for one whose agent was away (the next snapshot sees to it).

Every answer of the coordinator is checked against its OpenAPI document on the way.
"""

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from fake_agent import AgentService
from fake_services import FakeController, Faults, Service
from fake_vm import FakeQemu
from openapi_check import OpenApi

from geni_violin.coordinator.api import Coordinator, create_app
from geni_violin.core.errors import NoSpace
from geni_violin.core.messages import NETWORK_POLICIES, Manifest, TransactionView
from geni_violin.core.model import Image, LinkSpec, SliceSpec, SwitchSpec, VmSpec
from geni_violin.runtime.http import bind
from geni_violin.runtime.settings import Settings
from geni_violin.runtime.wire import decode, encode
from geni_violin.snapshot_server.api import create_app as create_server_app
from geni_violin.snapshot_server.backends.local import LocalBackend
from geni_violin.snapshot_server.pages.image_writer import OPAQUE_NOTE
from geni_violin.snapshot_server.pages.page_store import PageStore
from geni_violin.snapshot_server.store import ImageWriter, StoredImage

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
SCENARIO_PATIENCE_S = 300.0
PATIENCE_S = 20.0
VMS = ("n1", "n2", "n3")


def make_settings(folder: Path) -> Settings:
    """Deadlines that a busy machine meets; a test that wants one to pass shortens it."""
    return Settings(
        state_dir=folder / "state",
        prepare_deadline_ms=5000,
        cut_deadline_ms=3000,
        stream_deadline_ms=6000,
        max_frame_lifetime_ms=50,
    )


def make_spec(name: str = "lab") -> SliceSpec:
    """Three VMs on two hosts."""
    image = Image("/kernel", "/initrd", "vm={vm}", memory_mib=1)
    switches = (SwitchSpec("s1", "h1"), SwitchSpec("s2", "h2"))
    vms = tuple(
        VmSpec(vm, index, host, switch, f"10.9.0.{index}/24", f"52:54:00:00:00:0{index}", image)
        for index, (vm, host, switch) in enumerate(
            [("n1", "h1", "s1"), ("n2", "h1", "s1"), ("n3", "h2", "s2")], start=1
        )
    )
    return SliceSpec(name, ("h1", "h2"), switches, (LinkSpec("s1", "s2"),), vms)


async def until(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait for a condition.

    :raise AssertionError: it does not come.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        await asyncio.sleep(0.005)


def notes_of(view: TransactionView) -> tuple[str, ...]:
    """A snapshot's notes, without the one of each VM that its stream, which no QEMU made, was stored whole."""
    return tuple(note for note in view.snapshot.notes if OPAQUE_NOTE not in note)


class _FullWriter:
    """An image writer on a disk that fills."""

    def __init__(self, inner: ImageWriter, room: int) -> None:
        self._inner, self._room = inner, room

    def write(self, data: memoryview) -> None:
        self._room -= len(data)
        if self._room < 0:
            raise NoSpace("the snapshot server's disk is full", "free some space")
        self._inner.write(data)

    def finish(self) -> StoredImage:
        return self._inner.finish()

    def abort(self) -> None:
        self._inner.abort()


class FillableStore(PageStore):
    """A store whose disk can be full: from the start, or ``room_per_image`` bytes into each image."""

    full = False
    room_per_image: int | None = None

    def free_bytes(self) -> int | None:
        return 0 if self.full else super().free_bytes()

    def open_writer(self, snapshot_id: str, vm: str) -> ImageWriter:
        writer = super().open_writer(snapshot_id, vm)
        return writer if self.room_per_image is None else _FullWriter(writer, self.room_per_image)


class World:
    """See the module's theory of operation."""

    def __init__(self, folder: Path, policy: str = "hold") -> None:
        self.folder = folder
        self.policy = policy
        self.spec = make_spec()
        self.settings = make_settings(folder)
        self.controller = FakeController()
        self.controller_service = Service(self.controller.app)
        self.store_dir = folder / "store"
        self.agents = {
            name: AgentService(name, folder / name, self.controller_service.url, self.controller)
            for name in ("h1", "h2")
        }
        self.controller.edge_is_armed = lambda slice_name, vm: self.qemu(vm, slice_name).diverted
        self.committed: set[str] = set()
        self.coordinator: Coordinator
        self.coordinator_service: Service
        self.http = httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False, verify=False)
        self._url = ""

    # life

    async def start(self) -> None:
        """Start all parts, and make the slice."""
        await self.start_server()
        await self.controller_service.start()
        for agent in self.agents.values():
            await agent.service.start()
        await self.start_coordinator()
        for name, agent in self.agents.items():
            (await self.request("PUT", f"/v1/hosts/{name}", {"url": agent.service.url})).raise_for_status()
        await self.create()

    async def start_server(self, port: int = 0) -> None:
        """Start a snapshot server over the folder."""
        self.store = FillableStore(LocalBackend(self.store_dir / "objects"), self.store_dir / "state")
        self.server_faults = Faults(create_server_app(self.store, bind("127.0.0.1", 0), lambda: None))
        self.server_service = Service(self.server_faults, port)
        await self.server_service.start()

    async def restart_server(self) -> None:
        """The snapshot server ends and starts again at its address."""
        await self.server_service.stop()
        await self.start_server(self.server_service.port)

    async def start_coordinator(self) -> None:
        """Start a coordinator over the journal."""
        self.coordinator = Coordinator(self.settings, self.controller_service.url, self.server_service.url)
        self.coordinator_service = Service(create_app(self.coordinator))
        await self.coordinator_service.start()
        self._url = self.coordinator_service.url

    async def stop(self) -> None:
        """Stop all parts."""
        await self.http.aclose()
        services = [self.coordinator_service, self.controller_service, self.server_service]
        for service in (*services, *(agent.service for agent in self.agents.values())):
            await service.stop()

    def use_coordinator_at(self, url: str) -> None:
        """Requests go to another coordinator from now on."""
        self._url = url

    @property
    def coordinator_url(self) -> str:
        """Where requests go."""
        return self._url

    def shorten(self, *, prepare_ms: int = 5000, cut_ms: int = 3000, stream_ms: int = 6000) -> None:
        """Give the next snapshots these deadlines, up to the next that shall succeed."""
        self.settings.prepare_deadline_ms = prepare_ms
        self.settings.cut_deadline_ms = cut_ms
        self.settings.stream_deadline_ms = stream_ms

    async def nothing(self) -> None:
        """A trouble, or what happens to a request, that is none: it counts one time."""

    async def restart_controller(self) -> None:
        """As a trouble, or what happens to a request: the controller is a new one, and knows no slice."""
        self.controller.forget()

    # requests

    async def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """A request to the coordinator; its answer is checked against the OpenAPI document."""
        response = await self.http.request(method, self._url + path, json=body)
        _openapi(self.coordinator).check(method, path.partition("?")[0], response)
        return response

    async def get(self, path: str) -> Any:
        """What the coordinator answers."""
        return (await self.request("GET", path)).raise_for_status().json()

    async def create(self, name: str = "lab") -> None:
        """Create the slice."""
        response = await self.request("POST", "/v1/slices", {"spec": encode(replace(self.spec, name=name))})
        assert response.status_code == 201, response.text

    async def recreate(self) -> None:
        """Delete the slice and create it again."""
        assert (await self.request("DELETE", "/v1/slices/lab")).status_code == 200
        await self.create()

    async def take(self, **request: Any) -> str:
        """Begin a snapshot; gives the transaction's id."""
        response = await self.request("POST", "/v1/slices/lab/snapshots", {"network": self.policy, **request})
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    async def over(self, transaction: str) -> TransactionView:
        """A transaction at its end."""
        deadline = time.monotonic() + 2 * PATIENCE_S
        while True:
            view = decode(TransactionView, await self.get(f"/v1/transactions/{transaction}"))
            if view.state in ("committed", "aborted"):
                return view
            assert time.monotonic() < deadline, f"the transaction is still {view.state}"
            await asyncio.sleep(0.03)

    async def reaches(self, transaction: str, state: str) -> None:
        """Wait until a transaction is in a state."""
        deadline = time.monotonic() + PATIENCE_S
        while (seen := (await self.get(f"/v1/transactions/{transaction}"))["state"]) != state:
            assert time.monotonic() < deadline, f"the transaction is {seen}, not {state}"
            await asyncio.sleep(0.002)

    async def commits(self, **request: Any) -> TransactionView:
        """Take a snapshot that succeeds."""
        self.shorten()
        for agent in self.agents.values():
            agent.service.was_away = False
        view = await self.over(await self.take(**request))
        assert view.state == "committed", view.failure
        await self.assert_sound(view)
        return view

    async def aborts(self, words: str, **request: Any) -> TransactionView:
        """Take a snapshot that comes to nothing; its failure has ``words``."""
        view = await self.over(await self.take(**request))
        await self.is_aborted(view, words)
        return view

    async def is_aborted(self, view: TransactionView, words: str = "") -> None:
        """A transaction has come to nothing, and left nothing."""
        assert view.state == "aborted", view.state
        assert words in view.failure, view.failure
        await self.assert_sound(view)

    # what there is

    def qemu(self, vm: str, slice_name: str = "lab") -> FakeQemu:
        """A VM's process."""
        return next(
            agent.host.qemus[slice_name, vm] for agent in self.agents.values() if (slice_name, vm) in agent.host.qemus
        )

    def qemus(self) -> Iterator[FakeQemu]:
        """All processes."""
        for agent in self.agents.values():
            yield from agent.host.qemus.values()

    def manifests(self) -> list[Manifest]:
        """What the snapshot server's store has."""
        return self.store.snapshots()

    def image(self, snapshot_id: str, vm: str) -> bytes:
        """A stream as it is given back."""
        with self.store.open_image(snapshot_id, vm) as reader:
            return b"".join(reader.chunks())

    # what must hold

    async def assert_sound(self, view: TransactionView) -> None:
        """See the module's theory of operation."""
        if view.state == "committed":
            self.committed.add(view.id)
        for qemu in (self.qemu(vm.name) for vm in self.spec.vms):
            attended = not self.agents[qemu.definition.host].service.was_away
            await until(functools.partial(_is_at_ease, qemu, attended), f"VM {qemu.definition.name} at ease")
        await self._assert_whole_or_absent(view)
        await until(lambda: "lab" in self.controller.slices, "a controller that has restarted is told the slices")
        slice_view = await self.get("/v1/slices/lab")
        assert self.controller.epochs("lab") == {slice_view["epoch"]}, (self.controller.log, slice_view)
        assert len({vm["port_color"] for vm in slice_view["vms"]}) == 1
        assert self.controller.armed("lab") == set(), self.controller.log
        assert self.controller.violations == []

    async def _assert_whole_or_absent(self, view: TransactionView) -> None:
        listed = {snapshot["id"] for snapshot in await self.get("/v1/snapshots")}
        assert listed == self.committed == {manifest.id for manifest in self.manifests()}
        assert (view.id in listed) == (view.state == "committed")
        assert [path for path in self.store_dir.rglob("*") if path.is_file() and ".partial" in str(path)] == []
        assert list((self.store_dir / "state/stagings").iterdir()) == []
        assert {path.parent.name for path in (self.store_dir / "objects/images").rglob("n*")} == listed
        for manifest in self.manifests():
            self.store.verify(manifest.id)

    def assert_cut_in_order(self, strategy: str) -> None:
        """R1 and R2 at every VM, as it happened: cut, then recolored, then frames are let out."""
        let_out = {"background": "release", "precopy": "resume", "stop": "resume"}[strategy]
        for qemu in self.qemus():
            trace = qemu.trace
            assert trace.index("STOP") < trace.index("recolored") < trace.index(let_out), trace
            if strategy == "background":
                assert trace.index("hold") < trace.index("STOP"), trace


_documents: list[OpenApi] = []


def _openapi(coordinator: Coordinator) -> OpenApi:
    """The OpenAPI document of every coordinator; made once, because that takes longer than many a scenario."""
    if not _documents:
        _documents.append(OpenApi(create_app(coordinator).openapi()))
    return _documents[0]


def _is_at_ease(qemu: FakeQemu, attended: bool) -> bool:
    marked = (qemu.folder / "cut-under-way").exists()
    free = not qemu.holding and not (attended and qemu.diverted)
    return qemu.dead or (qemu.run_state == "running" and free and not qemu.migrating and not marked)


@contextlib.asynccontextmanager
async def world(folder: Path, policy: str = "hold") -> AsyncIterator[World]:
    """A world that has started."""
    made = World(folder, policy)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


Scenario = Callable[..., Awaitable[None]]


def scenario(test: Scenario) -> Callable[..., None]:
    """Make a test out of ``async def test(world, …)``: its snapshots have the policy hold, unless they ask for it."""
    return _made(test, [])


def under_a_policy(test: Scenario) -> Callable[..., None]:
    """Make a test out of ``async def test(world, …)`` that is parametrized with the ``policy`` of its snapshots."""
    return _made(test, [inspect.Parameter("policy", inspect.Parameter.POSITIONAL_OR_KEYWORD)])


def under_both_policies(test: Scenario) -> Callable[..., None]:
    """Make two tests out of ``async def test(world, …)``, one a network policy."""
    both: Callable[..., None] = pytest.mark.parametrize("policy", NETWORK_POLICIES)(under_a_policy(test))
    return both


def _made(test: Scenario, more: list[inspect.Parameter]) -> Callable[..., None]:
    async def play(folder: Path, policy: str, parameters: dict[str, Any]) -> None:
        async with asyncio.timeout(SCENARIO_PATIENCE_S), world(folder, policy) as made:
            await test(made, **parameters)

    def run(tmp_path: Path, policy: str = "hold", **parameters: Any) -> None:
        asyncio.run(play(tmp_path, policy, parameters))

    _, *others = inspect.signature(test).parameters.values()
    folder = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wrapped = functools.wraps(test)(run)
    wrapped.__signature__ = inspect.Signature([folder, *more, *others])  # type: ignore[attr-defined]
    return wrapped


# --- a coordinator in a process of its own ----------------------------------------------------------------------------

_RUN = """
import sys
from geni_violin.coordinator import run_coordinator
from geni_violin.runtime.settings import Settings
run_coordinator(Settings(), "127.0.0.1", 0, sys.argv[1], sys.argv[2], lambda url: print("ready", url, flush=True))
"""


class CoordinatorProcess:
    """A coordinator that can be killed for real."""

    def __init__(self, made: World) -> None:
        settings = made.settings.model_dump(mode="json")
        environment = os.environ | {f"GENI_VIOLIN_{name.upper()}": str(value) for name, value in settings.items()}
        arguments = [made.controller_service.url, made.server_service.url]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUN, *arguments], env=environment, stdout=subprocess.PIPE, text=True
        )

    async def url(self) -> str:
        """Its address, when it serves."""
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        url = line.split()[1]
        async with httpx.AsyncClient(trust_env=False) as http:
            for _ in range(1000):
                with contextlib.suppress(httpx.HTTPError):
                    await http.get(f"{url}/v1/hosts")
                    return url
                await asyncio.sleep(0.01)
        raise TimeoutError("the coordinator does not serve")

    async def kill(self) -> None:
        """SIGKILL, and its end."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)
        if self.process.stdout is not None:
            self.process.stdout.close()
