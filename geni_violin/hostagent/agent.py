"""The host agent: the switches, ports and VMs of one host.

Theory of operation. What the agent must know after a crash is where it can be found again: VMs in their folders,
bridges and taps by names that are computed from what they stand for. So a start looks at what is there, takes it over,
and undoes any cut that an earlier agent left half done. A VM's tap and port live exactly as long as its folder.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI

from geni_violin.core.errors import AlreadyExists, Conflict, GeniViolinError, InvalidInput, MachineFault, NotFound
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
from geni_violin.core.model import IN_SWITCH, VmSpec
from geni_violin.hostagent import channel_records, names, ovs, ports
from geni_violin.hostagent.cleanup import ledger_of
from geni_violin.hostagent.cut_runner import open_image_stream, undo_interrupted_cut
from geni_violin.hostagent.cuts import Cuts
from geni_violin.hostagent.hypervisor import FAILED, Nic, Vm, VmDefinition
from geni_violin.hostagent.link_child import LinkEnd
from geni_violin.hostagent.link_ends import LinkEnds, check_manner
from geni_violin.hostagent.ovs import OpenVSwitch
from geni_violin.hostagent.qemu import QemuHypervisor
from geni_violin.runtime.http import Peer
from geni_violin.runtime.openvswitch import forget_cached_flows
from geni_violin.runtime.settings import Settings
from geni_violin.runtime.wire import encode

CONSOLE_PIECE_BYTES = 256 * 1024
RECOLOR_TIMEOUT_S = 5.0
MEETING_PATIENCE_S = 2.0
PLUG_TRIES = 3
VHOST_NET = Path("/dev/vhost-net")
STATUS_PATIENCE_S = 2.0

log = structlog.get_logger()


class HostAgent:
    """One host.

    :param openflow: where the controller waits for switches, ``tcp:host:port``.
    :param tunnel_host: the address of this host that the tunnels of its links are reached at.
    """

    def __init__(
        self, name: str, settings: Settings, controller_url: str, openflow: str, tunnel_host: str = "127.0.0.1"
    ) -> None:
        self.name = name
        self._installation_id = settings.installation_id
        self._openflow = openflow
        self._controller = Peer("the controller", controller_url, timeout_s=RECOLOR_TIMEOUT_S)
        self._hypervisor = QemuHypervisor(settings.run_dir, ledger_of(settings), name)
        self._switches = OpenVSwitch(self._installation_id)
        self._link_ends = LinkEnds(settings, name, tunnel_host, self._switches, ledger_of(settings))
        self._vms: dict[tuple[str, str], Vm] = {}
        self._changing: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._ports: dict[tuple[str, str], tuple[int, ports.VmPort]] = {}
        self.cuts = Cuts(self._recolor)

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Take over what is there at the start; let everything go on at the end."""
        await ovs.ensure_running()
        self._link_ends.take_over()
        await self._take_over()
        await self._meet_controller()
        try:
            yield
        finally:
            self._link_ends.detach()
            for vm in self._vms.values():
                await vm.detach()
            await self._controller.close()

    async def _meet_controller(self) -> None:
        """Open a connection, which loads what that needs (40 ms): not in the first cut. It may come later than this."""
        with contextlib.suppress(GeniViolinError):
            await self._controller.request("GET", "/healthz", timeout_s=MEETING_PATIENCE_S)

    async def _take_over(self) -> None:
        for vm in await self._hypervisor.attach_all():
            key = (vm.definition.slice, vm.definition.name)
            self._vms[key] = vm
            for step in (_resume_edge, undo_interrupted_cut):
                try:
                    if await step(vm):
                        log.warning("an interrupted cut was undone", slice=key[0], vm=key[1])
                except Exception as error:  # one VM must not keep a host without its agent
                    log.warning("a cut could not be undone", slice=key[0], vm=key[1], reason=str(error))
            await self._plug_again(key, vm.definition)

    async def _plug_again(self, key: tuple[str, str], definition: VmDefinition) -> None:
        """Find a VM's port; a switch that is slow to answer is asked a few times."""
        for number in range(PLUG_TRIES):
            try:
                self._ports[key] = await self._plug(key, definition.switch, definition.held_in)
                return
            except GeniViolinError as error:
                log.warning("a VM's port could not be taken over", slice=key[0], vm=key[1], reason=str(error))
                await asyncio.sleep(number)

    async def _recolor(self, slice_name: str, vm: str, epoch: int) -> None:
        """Move a VM's ports on. The switch's barrier reply is not the end: its flow cache must forget the old color."""
        request = RecolorRequest(epoch, (vm,))
        await self._controller.request("POST", f"/v1/slices/{slice_name}/recolor", encode(request))
        await forget_cached_flows()

    # switches and links

    async def put_switch(self, switch: str) -> SwitchReady:
        """Have a switch exist.

        :raise MachineFault: Open vSwitch refused.
        """
        dpid = names.datapath_id(self._installation_id, self.name, switch)
        await self._switches.ensure_switch(self._bridge(self.name, switch), dpid, self._openflow)
        return SwitchReady(dpid)

    async def put_link(self, switch: str, request: LinkRequest) -> LinkReady:
        """Have this end of a link exist: a patch port to a switch on this machine, or with a delay or a loss a tunnel.

        :raise InvalidInput: there can be no such delay or loss.
        :raise MachineFault: Open vSwitch or the kernel refused.
        """
        check_manner(request.delay_ms, request.loss)
        bridge = self._bridge(self.name, switch)
        peer = self._bridge(request.peer_host, request.peer_switch)
        dpid = names.datapath_id(self._installation_id, self.name, switch)
        if not (request.delay_ms or request.loss):
            return LinkReady(dpid, await self._switches.ensure_link(bridge, peer, request.number))
        manner = (request.number, request.delay_ms, request.loss)
        tap = names.link_tap_name(self._installation_id, bridge, peer, *manner)
        end = LinkEnd(
            self.name, switch, bridge, request.peer_switch, *manner, tap=tap, peer_address=request.peer_address
        )
        return LinkReady(dpid, *await self._link_ends.put(end))

    def link_counters(self) -> list[LinkCounters]:
        """The counters of this host's ends of links with a delay or a loss."""
        return [
            LinkCounters(end.switch, end.peer_switch, end.number, *counters)
            for end, counters in self._link_ends.counters()
        ]

    async def delete_switch(self, switch: str) -> None:
        """Remove a switch and its ends of links.

        :raise Conflict: a VM is on it.
        """
        bridge = self._bridge(self.name, switch)
        users = [vm for (_, vm), (_, port) in self._ports.items() if port.bridge == bridge]
        if users:
            raise Conflict(f"switch {switch} of host {self.name} is in use by VM {', '.join(sorted(users))}")
        await self._link_ends.remove_all(bridge)
        await self._switches.delete_switch(bridge)

    async def purge_switches(self) -> None:
        """Have the switches attribute all statistics now: they do it when they forget their cached flows."""
        await forget_cached_flows()

    def _bridge(self, host: str, switch: str) -> str:
        return names.bridge_name(self._installation_id, host, switch)

    async def _plug(self, key: tuple[str, str], switch: str, held_in: str) -> tuple[int, ports.VmPort]:
        """A VM's tap on its switch, with a hold port if its edge is there, and the switch's datapath id."""
        tap = names.tap_name(self._installation_id, *key)
        hold_tap = names.hold_tap_name(self._installation_id, *key) if held_in == IN_SWITCH else ""
        port = await ports.plug_vm(self._switches, self._bridge(self.name, switch), tap, hold_tap)
        return names.datapath_id(self._installation_id, self.name, switch), port

    # VMs

    def vm(self, slice_name: str, vm: str) -> Vm:
        """A VM of this host.

        :raise NotFound: there is none.
        """
        try:
            return self._vms[slice_name, vm]
        except KeyError:
            raise NotFound(f"host {self.name} has no VM {vm!r} of slice {slice_name!r}") from None

    async def statuses(self) -> list[VmStatus]:
        """All VMs of this host."""
        return await asyncio.gather(*(self._status(key) for key in sorted(self._vms)))

    async def _status(self, key: tuple[str, str]) -> VmStatus:
        vm = self._vms[key]
        dpid, port = self._ports.get(key, (0, ports.VmPort("", "", 0)))
        try:
            state = await asyncio.wait_for(vm.status(), STATUS_PATIENCE_S)
        except (TimeoutError, GeniViolinError):  # it hangs, and the others must be seen all the same
            state = FAILED
        return VmStatus(*key, state=state, pid=vm.pid, dpid=dpid, port_no=port.port_no, hold_port_no=port.hold_port_no)

    def check_vm(self, request: VmRequest) -> None:
        """See that this host can have such a VM.

        :raise MachineFault: it cannot; nothing has been done then.
        """
        if request.spec.vhost and not VHOST_NET.exists():
            words = f"host {self.name} cannot run VM {request.spec.name}: it has no {VHOST_NET} (vhost: true)"
            raise MachineFault(words, "load the kernel's vhost_net, or leave vhost out")

    async def put_vm(self, slice_name: str, name: str, request: VmRequest) -> VmStatus:
        """Create a VM: tap, port, process; paused. What fails leaves none of them.

        :raise AlreadyExists: it is there.
        :raise InvalidInput: the request is for another host or VM.
        :raise MachineFault: a file or a device is missing, or QEMU or Open vSwitch refused.
        """
        self.check_vm(request)
        key = (slice_name, name)
        if request.spec.name != name or request.spec.host != self.name:
            raise InvalidInput(f"VM {request.spec.name} of host {request.spec.host} is not {name} of {self.name}")
        async with self._changing[key]:
            if key in self._vms:
                raise AlreadyExists(f"VM {name} of slice {slice_name} exists already", "delete it first")
            dpid, port = await self._plug(key, request.spec.switch, request.spec.held_in)
            try:
                self._vms[key] = await self._hypervisor.create(_definition(slice_name, request, port))
            except BaseException:
                await ports.unplug_vm(self._switches, port)
                raise
            self._ports[key] = (dpid, port)
        return await self._status(key)

    async def run_vm(self, slice_name: str, name: str) -> VmStatus:
        """Let a VM run, after the switch has forgotten what it did for an earlier life of its slice (R3).

        A restored VM gets its channel state before any other frame.
        """
        vm = self.vm(slice_name, name)
        await forget_cached_flows()
        frames = await channel_records.take(vm)
        await vm.run()
        if frames:
            await vm.edge.replay(frames)
            channel_records.replayed(vm)
        return await self._status((slice_name, name))

    async def load_vm(self, slice_name: str, name: str, request: LoadRequest) -> VmStatus:
        """Load an image from the snapshot server, and its channel state; the VM stays paused.

        :raise PeerFault: the snapshot server does not give them.
        :raise MachineFault: QEMU cannot load it, or the channel state is not what it should be.
        """
        vm = self.vm(slice_name, name)
        if request.channel_frames:
            async with self._snapshot_server(request.snapshot_server_url) as server:
                await channel_records.fetch(server, vm, request)
        preface = {"get": request.snapshot_id, "vm": name}
        address = (request.ingest_host, request.ingest_port)
        with await asyncio.to_thread(open_image_stream, *address, preface) as connection:
            await vm.load(connection.fileno())
        if request.channel_frames:
            await vm.edge.replay_held(await channel_records.take(vm))
        return await self._status((slice_name, name))

    async def settle_vm(self, slice_name: str, name: str, transaction: str, request: SettleRequest) -> EdgeReport:
        """After a cut: the VM's edge steps aside, and what it recorded goes to the snapshot server.

        Before that the switch forgets its cached flows: they would go on tagging frames for a while.

        :raise PeerFault: the snapshot server does not take it; the edge has stepped aside all the same.
        """
        vm = self.vm(slice_name, name)
        await forget_cached_flows()
        record = await self.cuts.settle(vm, transaction, request.keep)
        if request.keep:
            async with self._snapshot_server(request.snapshot_server_url) as server:
                await channel_records.bring(server, transaction, vm, record)
        return channel_records.report_of(vm, record)

    @contextlib.asynccontextmanager
    async def _snapshot_server(self, url: str) -> AsyncIterator[Peer]:
        server = Peer("the snapshot server", url)
        try:
            yield server
        finally:
            await server.close()

    async def fail_vm(self, slice_name: str, name: str) -> VmStatus:
        """Kill a VM with SIGKILL; its port stays, as after a real failure."""
        await self.vm(slice_name, name).kill()
        return await self._status((slice_name, name))

    async def delete_vm(self, slice_name: str, name: str, keep_console: bool) -> None:
        """Remove a VM: process, port and tap are gone when this returns.

        :raise NotFound: there is none.
        """
        key = (slice_name, name)
        async with self._changing[key]:  # one that is still being made is there in the end, and is deleted then
            vm = self.vm(*key)
            await self.cuts.forget(*key)
            await vm.delete(keep_console)
            del self._vms[key]
            _, port = self._ports.pop(key, (0, None))
            if port is not None:
                await ports.unplug_vm(self._switches, port)

    async def console(self, slice_name: str, name: str, offset: int) -> dict[str, Any]:
        """A piece of a VM's console log from byte ``offset`` on (counted from the end if negative)."""
        path = self.vm(slice_name, name).console_path
        data, next_offset = await asyncio.to_thread(_read_piece, path, offset)
        return {"text": data.decode(errors="replace"), "next_offset": next_offset}


async def _resume_edge(vm: Vm) -> bool:
    """Have the edge of a VM that lives go on passing frames, if an earlier agent left it armed."""
    if await vm.status() != FAILED:
        await vm.edge.resume_after_restart()
    return False


def _read_piece(path: Path, offset: int) -> tuple[bytes, int]:
    if not path.exists():
        return b"", 0
    with path.open("rb") as file:
        size = file.seek(0, 2)
        start = file.seek(min(size, offset if offset >= 0 else max(0, size + offset)))
        data = file.read(CONSOLE_PIECE_BYTES)
    return data, start + len(data)


def _definition(slice_name: str, request: VmRequest, port: ports.VmPort) -> VmDefinition:
    spec: VmSpec = request.spec
    return VmDefinition(
        slice=slice_name,
        name=spec.name,
        host=spec.host,
        switch=spec.switch,
        kernel=spec.image.kernel,
        initrd=spec.image.initrd,
        append=spec.kernel_command_line(),
        memory_mib=spec.image.memory_mib,
        vcpus=spec.image.vcpus,
        nics=(Nic(port.tap, spec.mac, port.hold_tap),),
        vhost=spec.vhost,
        incoming=request.incoming,
    )
