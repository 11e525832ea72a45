"""A host agent over VMs without QEMU: the real REST routes and the real cuts, everything below them in memory."""

import asyncio
import contextlib
import json
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from fake_services import FakeController, Faults, Service
from fake_vm import FakeQemu, FakeVm
from fastapi import FastAPI

from geni_violin.core.errors import AlreadyExists, Conflict, MachineFault, NotFound
from geni_violin.core.messages import (
    EdgeReport,
    LinkCounters,
    LinkReady,
    LinkRequest,
    LoadRequest,
    RecolorRequest,
    SettleRequest,
    SwitchReady,
    VmRequest,
    VmStatus,
)
from geni_violin.hostagent import channel_records
from geni_violin.hostagent.agent import HostAgent
from geni_violin.hostagent.api import create_app
from geni_violin.hostagent.cut_runner import mark_of, open_image_stream, undo_interrupted_cut
from geni_violin.hostagent.cuts import Cuts
from geni_violin.hostagent.hypervisor import Nic, VmDefinition
from geni_violin.runtime.http import Peer
from geni_violin.runtime.wire import encode

VmKey = tuple[str, str]


class FakeHost:
    """What outlives an agent: processes, switches, the disk."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.qemus: dict[VmKey, FakeQemu] = {}
        self.dpids: dict[str, int] = {}
        self.links: list[tuple[str, LinkRequest]] = []
        """Each end of a link: its switch, and what was asked for but the far address."""
        self.tunnels: dict[str, str] = {}
        """The far address of each end that has one, by its own."""


class FakeAgent:
    """What ``hostagent.api`` needs of an agent."""

    def __init__(self, host: FakeHost, controller_url: str, network: FakeController) -> None:
        self.name = host.name
        self._host = host
        self._network = network
        self._controller = Peer("the controller", controller_url, timeout_s=5.0)
        self._vms: dict[VmKey, FakeVm] = {}
        self.cuts = Cuts(self._recolor)

    async def _recolor(self, slice_name: str, vm: str, epoch: int) -> None:
        body = encode(RecolorRequest(epoch, (vm,)))
        await self._controller.request("POST", f"/v1/slices/{slice_name}/recolor", body)
        self._host.qemus[slice_name, vm].trace.append("recolored")

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        for key, qemu in self._host.qemus.items():
            self._vms[key] = FakeVm(qemu)
            if not qemu.dead:
                await self._vms[key].edge.resume_after_restart()
            await undo_interrupted_cut(self._vms[key])
        yield
        await self._controller.close()

    def vm(self, slice_name: str, vm: str) -> FakeVm:
        if (slice_name, vm) not in self._vms:
            raise NotFound(f"host {self.name} has no VM {vm!r} of slice {slice_name!r}")
        return self._vms[slice_name, vm]

    async def put_switch(self, switch: str) -> SwitchReady:
        dpid = self._host.dpids.setdefault(switch, zlib.crc32(f"{self.name}/{switch}".encode()) + 1)
        self._network.switches.add(dpid)
        self._network.hosts.add(self.name)
        return SwitchReady(dpid)

    async def put_link(self, switch: str, request: LinkRequest) -> LinkReady:
        link = (switch, replace(request, peer_address=""))
        if link not in self._host.links:
            self._host.links.append(link)
        index = self._host.links.index(link)
        address = f"{self.name}:{4000 + index}" if request.delay_ms or request.loss else ""
        if request.peer_address:
            self._host.tunnels[address] = request.peer_address
        return LinkReady(self._host.dpids[switch], 100 + index, address)

    def link_counters(self) -> list[LinkCounters]:
        return []

    async def delete_switch(self, switch: str) -> None:
        if self._vms:
            raise Conflict(f"switch {switch} is in use")
        self._network.switches.discard(self._host.dpids.pop(switch, 0))

    async def purge_switches(self) -> None:
        self._network.purged(self.name)

    async def statuses(self) -> list[VmStatus]:
        return [await self._status(key) for key in sorted(self._vms)]

    async def _status(self, key: VmKey) -> VmStatus:
        vm = self._vms[key]
        dpid = next(iter(self._host.dpids.values()), 0)
        return VmStatus(*key, await vm.status(), vm.pid, dpid, 1 + vm.pid % 1_000_000)

    def check_vm(self, request: VmRequest) -> None:
        if request.spec.vhost and self.name == "h2":
            raise MachineFault("host h2 has no /dev/vhost-net")

    async def put_vm(self, slice_name: str, name: str, request: VmRequest) -> VmStatus:
        key = (slice_name, name)
        if key in self._vms:
            raise AlreadyExists(f"VM {name} exists already")
        spec, image = request.spec, request.spec.image
        definition = VmDefinition(
            slice=slice_name,
            name=name,
            host=self.name,
            kernel=image.kernel,
            initrd=image.initrd,
            append=spec.kernel_command_line(),
            memory_mib=image.memory_mib,
            vcpus=image.vcpus,
            nics=(Nic(f"tap-{name}", spec.mac),),
            incoming=request.incoming,
        )
        folder = self._host.folder / slice_name / name
        folder.mkdir(parents=True, exist_ok=True)
        self._host.qemus[key] = FakeQemu(definition, folder)
        self._vms[key] = FakeVm(self._host.qemus[key])
        return await self._status(key)

    async def run_vm(self, slice_name: str, name: str) -> VmStatus:
        vm = self.vm(slice_name, name)
        frames = await channel_records.take(vm)
        await vm.run()
        if frames:
            await vm.edge.replay(frames)
            channel_records.replayed(vm)
        return await self._status((slice_name, name))

    async def load_vm(self, slice_name: str, name: str, request: LoadRequest) -> VmStatus:
        vm = self.vm(slice_name, name)
        if request.channel_frames:
            async with _server(request.snapshot_server_url) as server:
                await channel_records.fetch(server, vm, request)
        preface = {"get": request.snapshot_id, "vm": name}
        address = (request.ingest_host, request.ingest_port)
        with await asyncio.to_thread(open_image_stream, *address, preface) as connection:
            await vm.load(connection.fileno())
        if request.channel_frames:
            await vm.edge.replay_held(await channel_records.take(vm))
        return await self._status((slice_name, name))

    async def settle_vm(self, slice_name: str, name: str, transaction: str, request: SettleRequest) -> EdgeReport:
        vm = self.vm(slice_name, name)
        if name in self._network.armed(slice_name):
            self._network.violations.append(f"the edge of {name} was to step aside before its port was disarmed")
            raise Conflict(f"the network still gives VM {name} frames with their tags")
        record = await self.cuts.settle(vm, transaction, request.keep)
        if request.keep:
            async with _server(request.snapshot_server_url) as server:
                await channel_records.bring(server, transaction, vm, record)
        return channel_records.report_of(vm, record)

    async def fail_vm(self, slice_name: str, name: str) -> VmStatus:
        await self.vm(slice_name, name).kill()
        return await self._status((slice_name, name))

    async def delete_vm(self, slice_name: str, name: str, keep_console: bool = False) -> None:
        vm = self.vm(slice_name, name)
        await self.cuts.forget(slice_name, name)
        await vm.delete(keep_console)
        del self._vms[slice_name, name], self._host.qemus[slice_name, name]

    async def console(self, slice_name: str, name: str, offset: int) -> dict[str, Any]:
        text = json.dumps([slice_name, self.vm(slice_name, name).definition.name])
        return {"text": text[offset:], "next_offset": len(text)}

    async def die(self) -> None:
        """What SIGKILL does to an agent: its cuts end where they are, their marks stay, its sockets are closed."""
        runners = list(self.cuts._runners.values())
        marks = {path: path.read_bytes() for path in map(mark_of, self._vms.values()) if path.exists()}
        for vm in self._vms.values():
            vm.cut_off = True
        for runner in runners:
            if runner._task is not None and not runner._task.done():
                runner._task.cancel()
                await asyncio.wait({runner._task})
        for path, data in marks.items():
            path.write_bytes(data)
        await self._controller.close()


@contextlib.asynccontextmanager
async def _server(url: str) -> AsyncIterator[Peer]:
    server = Peer("the snapshot server", url)
    try:
        yield server
    finally:
        await server.close()


class AgentService:
    """A host with its agent, which can vanish, crash and start again at the same address."""

    def __init__(self, name: str, folder: Path, controller_url: str, network: FakeController) -> None:
        self.host = FakeHost(name, folder)
        self._controller_url = controller_url
        self._network = network
        self.agent, self.faults = self._new_agent()
        self.service = Service(self.faults)

    def _new_agent(self) -> tuple[FakeAgent, Faults]:
        agent = FakeAgent(self.host, self._controller_url, self._network)
        return agent, Faults(create_app(cast(HostAgent, agent)))

    async def crash(self) -> None:
        """The agent dies; its VMs go on."""
        await self.service.kill()
        await self.agent.die()

    async def restart(self) -> None:
        """A new agent, which finds the VMs."""
        self.agent, self.faults = self._new_agent()
        port = self.service.port
        self.service = Service(self.faults, port)
        self.service.was_away = True
        await self.service.start()
