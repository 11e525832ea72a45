"""The life of slices: created, looked at, failed on purpose, restored, deleted.

A slice comes into being in this order: its record (so that a crash leaves nothing that cannot be named and deleted),
switches and links, VMs (paused), rules, and then the VMs run. Whatever fails on the way, all that was made is taken
away again. A restore is the same way with images loaded instead of kernels booted, and under a VLAN ID that the slice
did not have before, whose rules are in before any VM runs (R3).
"""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Iterable
from dataclasses import replace
from typing import TypeVar

import structlog

from geni_violin.coordinator.journal import Journal, SliceRecord
from geni_violin.coordinator.peers import Peers
from geni_violin.coordinator.snapshots import Snapshots
from geni_violin.coordinator.views import slice_view
from geni_violin.core.errors import AlreadyExists, Conflict, GeniViolinError, InvalidInput, NotFound, PeerFault
from geni_violin.core.messages import (
    LinkReady,
    LinkRequest,
    LoadRequest,
    Manifest,
    RestoreRequest,
    SliceView,
    VmRequest,
    VmStatus,
)
from geni_violin.core.model import EdgePort, LinkSpec, NetworkSlice, SliceSpec, SwitchLink, SwitchSpec, VmSpec
from geni_violin.runtime.clock import monotonic_ms

SWITCH_CONNECT_MS = 15_000
"""How long a new switch may take to connect to the controller."""
CANCEL_PATIENCE_S = 15.0
_SLICE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")

log = structlog.get_logger()
T = TypeVar("T")


class Slices:
    """Creates, restores and deletes slices."""

    def __init__(self, journal: Journal, peers: Peers, snapshots: Snapshots) -> None:
        self._journal = journal
        self._peers = peers
        self._snapshots = snapshots
        self._restoring: list[str] = []

    # looking

    async def view(self, name: str) -> SliceView:
        """One slice, as it is now.

        :raise NotFound: there is none of that name.
        """
        return await self._view(self._journal.slice(name))

    async def views(self) -> list[SliceView]:
        """All slices."""
        return [await self._view(record) for record in self._journal.slices()]

    async def _view(self, record: SliceRecord) -> SliceView:
        statuses, epochs = await asyncio.gather(self._statuses(record), self._epochs(record))
        return slice_view(record, statuses, epochs)

    async def _statuses(self, record: SliceRecord) -> dict[str, VmStatus]:
        """The VMs by name, as their agents see them; an agent that does not answer has lost them."""
        statuses: dict[str, VmStatus] = {}
        for host in sorted({vm.host for vm in record.spec.vms}):
            try:
                found = await self._peers.agent(host).vms()
            except (PeerFault, NotFound) as error:
                log.warning("a host agent does not answer", host=host, reason=str(error))
                lost = [vm.name for vm in record.spec.vms if vm.host == host]
                statuses |= {vm: VmStatus(record.name, vm, "failed", 0, 0, 0) for vm in lost}
                continue
            statuses |= {vm.name: vm for vm in found if vm.slice == record.name}
        return statuses

    async def _epochs(self, record: SliceRecord) -> dict[str, int]:
        try:
            network = await self._peers.controller.slice(record.name)
        except GeniViolinError:
            return {}
        return {port.vm: port.epoch for port in network.ports}

    # creating

    async def create(self, spec: SliceSpec) -> SliceView:
        """Create a slice and boot it.

        :raise AlreadyExists: the name is taken.
        :raise NotFound: a host of it has no agent.
        :raise GeniViolinError: a part could not do its share; nothing is left of the slice then.
        """
        self._check_agents(spec)
        self._snapshots.claim(spec.name)
        try:
            await self._check_vhost(spec)
            await asyncio.to_thread(self._journal.add_slice, _unbuilt(spec))
            await self._build_and_run(spec, epoch=0, image=None, run=True)
        finally:
            self._snapshots.let_go(spec.name)
        return await self.view(spec.name)

    def _check_agents(self, spec: SliceSpec) -> None:
        for host in {vm.host for vm in spec.vms} | {switch.host for switch in spec.switches}:
            self._peers.agent(host)

    async def _check_vhost(self, spec: SliceSpec) -> None:
        """See that the hosts can have the VMs that ask for what not every host has.

        :raise MachineFault: one cannot.
        """
        vms = [vm for vm in spec.vms if vm.vhost]
        await _all(self._peers.agent(vm.host).check_vm(spec.name, VmRequest(vm)) for vm in vms)

    async def _build_and_run(self, spec: SliceSpec, epoch: int, image: Manifest | None, run: bool) -> None:
        """Build a slice whose record is there; without success neither the slice nor its record is left."""
        try:
            await self._build(spec, epoch, image)
            if run:
                await _all(self._peers.agent(vm.host).run_vm(spec.name, vm.name) for vm in spec.vms)
        except BaseException:
            await asyncio.shield(self._forget(spec))
            raise

    async def _forget(self, spec: SliceSpec) -> None:
        await self._take_away(spec)
        await asyncio.to_thread(self._journal.delete_slice, spec.name)

    async def _build(self, spec: SliceSpec, epoch: int, image: Manifest | None) -> None:
        """Make all of a slice but let no VM run."""
        dpids = await self._put_switches(spec)
        links = await self._put_links(spec)
        statuses = await _all(self._put_vm(spec, vm, image is not None) for vm in spec.vms)
        if image is not None:
            await self._load_all(spec, image)
        ports = tuple(
            EdgePort(
                *(vm.name, status.dpid, status.port_no, vm.mac, epoch),
                any_source=vm.any_source,
                hold_port_no=status.hold_port_no,
            )
            for vm, status in zip(spec.vms, statuses, strict=True)
        )
        vlan_id = await asyncio.to_thread(self._journal.next_vlan_id)
        network = NetworkSlice(spec.name, vlan_id, ports, links)
        await self._switches_connected(dpids)
        async with self._peers.controller.gate.shared():
            await self._peers.controller.put_slice(network)
            await asyncio.to_thread(self._journal.save_slice, SliceRecord(spec, network, epoch))

    async def _put_switches(self, spec: SliceSpec) -> set[int]:
        ready = await _all(self._peers.agent(switch.host).put_switch(switch.name) for switch in spec.switches)
        return {switch.dpid for switch in ready}

    async def _put_links(self, spec: SliceSpec) -> tuple[SwitchLink, ...]:
        host_of = {switch.name: switch.host for switch in spec.switches}
        numbers: Counter[frozenset[str]] = Counter()
        links = []
        for link in spec.links:
            between = frozenset((link.a, link.b))
            links.append(await self._put_link(link, numbers[between], host_of))
            numbers[between] += 1
        return tuple(links)

    async def _put_link(self, link: LinkSpec, number: int, host_of: dict[str, str]) -> SwitchLink:
        """Both ends. One that a tunnel begins at is asked for again when the other's address is known."""

        async def put(switch: str, far: str, far_address: str = "") -> LinkReady:
            request = LinkRequest(host_of[far], far, link.delay_ms, link.loss, number, far_address)
            return await self._peers.agent(host_of[switch]).put_link(switch, request)

        a_end = await put(link.a, link.b)
        b_end = await put(link.b, link.a, a_end.address)
        if b_end.address:
            a_end = await put(link.a, link.b, b_end.address)
        return SwitchLink(a_end.dpid, a_end.port_no, b_end.dpid, b_end.port_no)

    def _put_vm(self, spec: SliceSpec, vm: VmSpec, incoming: bool) -> Awaitable[VmStatus]:
        return self._peers.agent(vm.host).put_vm(spec.name, VmRequest(vm, incoming))

    async def _load_all(self, spec: SliceSpec, image: Manifest) -> None:
        server = self._peers.snapshot_server
        host, port = await server.ingest_address()
        frames = {vm.name: vm.frames_in_transit for vm in image.vms}

        def load(vm: VmSpec) -> Awaitable[VmStatus]:
            request = LoadRequest(host, port, image.id, server.peer.base_url, frames[vm.name])
            return self._peers.agent(vm.host).load_vm(spec.name, vm.name, request)

        await _all(load(vm) for vm in spec.vms)

    async def _switches_connected(self, dpids: set[int]) -> None:
        deadline_ms = monotonic_ms() + SWITCH_CONNECT_MS
        while missing := dpids - set((await self._peers.controller.health())["switches"]):
            if monotonic_ms() > deadline_ms:
                names = ", ".join(f"{dpid:016x}" for dpid in sorted(missing))
                raise PeerFault(f"no connection from switch {names} to the controller", "is Open vSwitch running?")
            await asyncio.sleep(0.05)

    # failing, restoring, deleting

    async def fail(self, name: str, vm: str) -> SliceView:
        """Kill one VM, or all if ``vm`` is empty, with SIGKILL.

        :raise NotFound: there is no such slice or VM.
        """
        record = self._journal.slice(name)
        wanted = [spec for spec in record.spec.vms if vm in ("", spec.name)]
        if not wanted:
            raise NotFound(f"slice {name!r} has no VM {vm!r}")
        await _all(self._peers.agent(spec.host).fail_vm(name, spec.name) for spec in wanted)
        return await self.view(name)

    async def resume(self, name: str) -> SliceView:
        """Let every VM of a slice run, as after a restore that left them paused.

        :raise NotFound: there is no such slice.
        :raise Conflict: another change of it is under way, or a VM's process is gone.
        """
        record = self._journal.slice(name)
        self._snapshots.claim(name)
        try:
            await _all(self._peers.agent(vm.host).run_vm(name, vm.name) for vm in record.spec.vms)
        finally:
            self._snapshots.let_go(name)
        return await self.view(name)

    async def restore(self, snapshot: str, request: RestoreRequest) -> SliceView:
        """Put a snapshot back in place, or make a copy of it beside the original.

        The images are read back and compared with their checksums before anything is touched.

        :raise NotFound: there is no such snapshot.
        :raise AlreadyExists: a copy is wanted under a name that is taken.
        :raise InvalidInput: a copy is wanted under a name that is none.
        :raise PeerFault: a part that is needed does not answer.
        :raise MachineFault: an image is damaged.
        """
        if request.as_slice and not _SLICE_NAME.fullmatch(request.as_slice):
            raise InvalidInput(f"{request.as_slice!r} cannot name a slice", "use lower-case letters, digits and dashes")
        manifest = await self._peers.snapshot_server.snapshot(snapshot)
        spec = replace(manifest.slice, name=request.as_slice or manifest.slice.name)
        self._snapshots.claim(spec.name)
        try:
            replaced = [record for record in self._journal.slices() if record.name == spec.name]
            if replaced and request.as_slice:
                raise AlreadyExists(f"there is a slice named {spec.name!r} already", "choose another name")
            self._restoring.append(manifest.id)
            await self._check_restorable(spec, manifest)
            for record in replaced:
                await self._delete_vms(record.spec)
            await asyncio.to_thread(self._journal.save_slice, _unbuilt(spec))
            await self._build_and_run(spec, manifest.epoch, manifest, not request.paused)
        finally:
            if manifest.id in self._restoring:
                self._restoring.remove(manifest.id)
            self._snapshots.let_go(spec.name)
        return await self.view(spec.name)

    async def _check_restorable(self, spec: SliceSpec, manifest: Manifest) -> None:
        """See that every part that is needed answers, and that no image is damaged: before anything is touched."""
        self._check_agents(spec)
        hosts = sorted({vm.host for vm in spec.vms} | {switch.host for switch in spec.switches})
        await _all(self._peers.agent(host).vms() for host in hosts)
        await self._check_vhost(spec)
        await self._peers.controller.health()
        await self._peers.snapshot_server.verify(manifest.id)

    async def delete_snapshot(self, snapshot: str) -> None:
        """Delete a committed snapshot.

        :raise NotFound: there is no such snapshot.
        :raise Conflict: it is being restored.
        """
        manifest = await self._peers.snapshot_server.snapshot(snapshot)
        if manifest.id in self._restoring:
            raise Conflict(f"snapshot {manifest.name!r} is being restored", "delete it when that is done")
        await self._peers.snapshot_server.delete(manifest.id)

    async def delete(self, name: str) -> None:
        """Remove a slice: its snapshot under way is abandoned; its VMs, ports and rules go. Its snapshots stay.

        :raise NotFound: there is no such slice.
        :raise Conflict: another change of it is under way.
        """
        record = self._journal.slice(name)
        if not await self._snapshots.cancel(name, "the slice is deleted", CANCEL_PATIENCE_S):
            # A switch that is gone for good would keep the abort waiting; without VMs its colors mean nothing.
            await self._delete_vms(record.spec)
            await self._snapshots.give_up(name, CANCEL_PATIENCE_S)
        self._snapshots.claim(name)
        try:
            await self._take_away(record.spec)
            await asyncio.to_thread(self._journal.delete_slice, name)
        finally:
            self._snapshots.let_go(name)

    async def _delete_vms(self, spec: SliceSpec) -> None:
        await _all(self._peers.agent(vm.host).delete_vm(spec.name, vm.name, keep_console=True) for vm in spec.vms)

    async def _take_away(self, spec: SliceSpec) -> None:
        """Remove all that can be reached; what cannot is logged and left to ``geni-violin down``."""

        async def delete_vm(vm: VmSpec) -> None:
            await self._peers.agent(vm.host).delete_vm(spec.name, vm.name)

        async def delete_switch(switch: SwitchSpec) -> None:
            await self._peers.agent(switch.host).delete_switch(switch.name)

        await self._tolerate([delete_vm(vm) for vm in spec.vms], "a VM could not be removed")
        await self._tolerate([self._delete_rules(spec)], "the rules could not be removed")
        needed = {
            (switch.host, switch.name)
            for record in self._journal.slices()
            if record.name != spec.name
            for switch in record.spec.switches
        }
        unneeded = [switch for switch in spec.switches if (switch.host, switch.name) not in needed]
        await self._tolerate([delete_switch(switch) for switch in unneeded], "a switch stays")

    async def _delete_rules(self, spec: SliceSpec) -> None:
        """Remove a slice from the network; nobody tells the controller of it again."""
        async with self._peers.controller.gate.shared():
            await asyncio.to_thread(self._journal.save_slice, _unbuilt(spec))
            await self._peers.controller.delete_slice(spec.name)

    async def _tolerate(self, steps: Iterable[Awaitable[object]], what: str) -> None:
        for outcome in await asyncio.gather(*steps, return_exceptions=True):
            if isinstance(outcome, Conflict):
                continue  # a switch that another slice still uses
            if isinstance(outcome, GeniViolinError):
                log.warning(what, reason=str(outcome))
            elif isinstance(outcome, BaseException):
                raise outcome


def _unbuilt(spec: SliceSpec) -> SliceRecord:
    """The record of a slice that has nothing yet: no VLAN ID, no ports."""
    return SliceRecord(spec, NetworkSlice(spec.name, 0, ()), 0)


async def _all(steps: Iterable[Awaitable[T]]) -> list[T]:
    """All results, in order. Every step comes to its end before the first error is raised: none goes on alone."""
    outcomes = await asyncio.gather(*steps, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
