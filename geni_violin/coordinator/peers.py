"""The other parts as the coordinator sees them: one class a part, one method a request of ``docs/protocol.md``."""

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote, urlencode

from geni_violin.coordinator.gate import Gate
from geni_violin.core.errors import NotFound
from geni_violin.core.messages import (
    ArmRequest,
    ChannelSummary,
    CollectionPlan,
    ColorCounters,
    CutProgress,
    CutPromise,
    CutRequest,
    DisarmRequest,
    EdgeReport,
    ImageStatus,
    LinkReady,
    LinkRequest,
    LoadRequest,
    Manifest,
    PortCounters,
    PrepareCut,
    Quota,
    Recolored,
    RecolorRequest,
    SealChannels,
    SettleRequest,
    Staged,
    StageRequest,
    StoreStats,
    SwitchReady,
    VmRequest,
    VmStatus,
)
from geni_violin.core.model import NetworkSlice
from geni_violin.runtime.http import STREAM_TIMEOUT_S, Peer
from geni_violin.runtime.wire import decode, encode

POLL_MS = 500
"""How long a long poll waits before it answers with the progress so far."""


class Controller:
    """The OpenFlow controller. Whoever changes something there passes its ``gate``."""

    def __init__(self, url: str) -> None:
        self.peer = Peer("the controller", url, timeout_s=10.0)
        self.gate = Gate()

    async def health(self) -> dict[str, Any]:
        """``healthy``, ``instance`` and the connected ``switches``."""
        answer: dict[str, Any] = await self.peer.request("GET", "/healthz", timeout_s=2.0)
        return answer

    async def put_slice(self, network: NetworkSlice) -> None:
        """Install a slice; every switch has confirmed when this returns."""
        await self.peer.request("PUT", f"/v1/slices/{network.name}", encode(network))

    async def put_slices(self, networks: list[NetworkSlice]) -> None:
        """These slices and no others."""
        await self.peer.request("PUT", "/v1/slices", [encode(network) for network in networks])

    async def slice(self, name: str) -> NetworkSlice:
        """A slice with its ports' epochs."""
        return decode(NetworkSlice, await self.peer.request("GET", f"/v1/slices/{name}"))

    async def recolor(self, name: str, request: RecolorRequest) -> Recolored:
        """Move ports on to an epoch."""
        return decode(Recolored, await self.peer.request("POST", f"/v1/slices/{name}/recolor", encode(request)))

    async def arm(self, name: str, request: ArmRequest) -> Recolored:
        """Give ports the frames of both colors of a cut."""
        return decode(Recolored, await self.peer.request("POST", f"/v1/slices/{name}/arm", encode(request)))

    async def disarm(self, name: str, request: DisarmRequest) -> Recolored:
        """Give all ports frames without a tag again."""
        return decode(Recolored, await self.peer.request("POST", f"/v1/slices/{name}/disarm", encode(request)))

    async def colors(self, name: str) -> list[ColorCounters]:
        """Mattern's counters."""
        return [
            decode(ColorCounters, counter) for counter in await self.peer.request("GET", f"/v1/slices/{name}/colors")
        ]

    async def frames_dropped(self, name: str) -> int:
        """How many frames the slice's ports have dropped since it was installed."""
        counters = await self.peer.request("GET", f"/v1/slices/{name}/counters")
        return sum(decode(PortCounters, counter).frames_dropped for counter in counters)

    async def delete_slice(self, name: str) -> None:
        """Remove a slice's rules; it is fine if there are none."""
        try:
            await self.peer.request("DELETE", f"/v1/slices/{name}")
        except NotFound:
            return


class SnapshotServer:
    """The snapshot server."""

    def __init__(self, url: str) -> None:
        self.peer = Peer("the snapshot server", url)

    async def stage(self, request: StageRequest, timeout_s: float) -> Staged:
        """Make room for a snapshot's images."""
        return decode(Staged, await self.peer.request("POST", "/v1/stagings", encode(request), timeout_s))

    async def image(self, snapshot_id: str, vm: str) -> ImageStatus:
        """How far an image is; waits a little for its end."""
        path = f"/v1/stagings/{snapshot_id}/images/{vm}?wait_ms={POLL_MS}"
        return decode(ImageStatus, await self.peer.request("GET", path))

    async def seal_channels(self, snapshot_id: str, request: SealChannels) -> list[ChannelSummary]:
        """Put the channel state together."""
        summaries = await self.peer.request("POST", f"/v1/stagings/{snapshot_id}/channels", encode(request))
        return [decode(ChannelSummary, summary) for summary in summaries]

    async def publish(self, manifest: Manifest) -> None:
        """Commit."""
        await self.peer.request("POST", f"/v1/stagings/{manifest.id}/publish", encode(manifest))

    async def discard(self, snapshot_id: str) -> None:
        """Throw a staging away."""
        await self.peer.request("DELETE", f"/v1/stagings/{snapshot_id}")

    async def snapshots(self) -> list[Manifest]:
        """Every committed snapshot."""
        return [decode(Manifest, manifest) for manifest in await self.peer.request("GET", "/v1/snapshots")]

    async def snapshot(self, name: str) -> Manifest:
        """A committed snapshot by its id or name."""
        return decode(Manifest, await self.peer.request("GET", f"/v1/snapshots/{quote(name, safe='')}"))

    async def channels(self, name: str) -> list[ChannelSummary]:
        """What was in transit to each VM of a committed snapshot; none if that was not recorded."""
        answer = await self.peer.request("GET", f"/v1/snapshots/{quote(name, safe='')}/channels")
        return [decode(ChannelSummary, channel) for channel in answer]

    async def frames(self, name: str) -> bytes:
        """The frames themselves, of all VMs, in the pcap format."""
        return await self.peer.get_bytes(f"/v1/snapshots/{quote(name, safe='')}/frames", timeout_s=120.0)

    async def verify(self, name: str) -> Manifest:
        """Read a snapshot back; damage is an error."""
        return decode(
            Manifest, await self.peer.request("POST", f"/v1/snapshots/{quote(name, safe='')}/verify", timeout_s=600.0)
        )

    async def ingest_address(self) -> tuple[str, int]:
        """Where images are given back."""
        health = await self.peer.request("GET", "/healthz")
        return health["ingest_host"], health["ingest_port"]

    async def delete(self, name: str) -> None:
        """Delete a committed snapshot."""
        await self.peer.request("DELETE", f"/v1/snapshots/{quote(name, safe='')}")

    async def export(self, name: str, form: str, vm: str) -> AsyncIterator[bytes]:
        """A snapshot in a form that travels."""
        query = urlencode({"format": form, "vm": vm})
        return await self.peer.stream(f"/v1/snapshots/{quote(name, safe='')}/export?{query}")

    async def import_snapshot(self, archive: AsyncIterator[bytes], length: str | None) -> Manifest:
        """Take an archive in."""
        return decode(Manifest, await self.peer.send_stream("/v1/snapshots", archive, length))

    async def store_stats(self) -> StoreStats:
        """What the store and each snapshot take."""
        return decode(StoreStats, await self.peer.request("GET", "/v1/store", timeout_s=STREAM_TIMEOUT_S))

    async def plan_collection(self) -> CollectionPlan:
        """What a collection of rubbish would do."""
        answer = await self.peer.request("GET", "/v1/store/collection", timeout_s=STREAM_TIMEOUT_S)
        return decode(CollectionPlan, answer)

    async def collect(self, plan: CollectionPlan) -> CollectionPlan:
        """Carry out a plan."""
        answer = await self.peer.request("POST", "/v1/store/collection", encode(plan), timeout_s=STREAM_TIMEOUT_S)
        return decode(CollectionPlan, answer)

    async def quotas(self, method: str, slice_name: str = "", quota: Quota | None = None) -> list[Quota]:
        """The quotas of slices, after one was put or deleted."""
        path = "/v1/store/quotas" + (f"/{quote(slice_name, safe='')}" if slice_name else "")
        body = None if quota is None else encode(quota)
        return [decode(Quota, item) for item in await self.peer.request(method, path, body)]


class HostAgent:
    """One host's agent."""

    def __init__(self, host: str, url: str) -> None:
        self.peer = Peer(f"the host agent of {host}", url)

    async def put_switch(self, switch: str) -> SwitchReady:
        """Have a switch exist."""
        return decode(SwitchReady, await self.peer.request("PUT", f"/v1/switches/{switch}"))

    async def put_link(self, switch: str, request: LinkRequest) -> LinkReady:
        """Have this end of a link exist."""
        return decode(LinkReady, await self.peer.request("PUT", f"/v1/switches/{switch}/links", encode(request)))

    async def delete_switch(self, switch: str) -> None:
        """Remove a switch that no VM is on."""
        await self.peer.request("DELETE", f"/v1/switches/{switch}")

    async def purge_switches(self) -> None:
        """Have the host's switches forget their cached flows, and so attribute all statistics."""
        await self.peer.request("POST", "/v1/switches/purge", {})

    async def vms(self) -> list[VmStatus]:
        """Every VM of this host."""
        return [decode(VmStatus, vm) for vm in await self.peer.request("GET", "/v1/vms", timeout_s=5.0)]

    async def check_vm(self, slice_name: str, request: VmRequest) -> None:
        """See that the host can have such a VM."""
        await self.peer.request("POST", f"{_vm_path(slice_name, request.spec.name)}/check", encode(request))

    async def put_vm(self, slice_name: str, request: VmRequest) -> VmStatus:
        """Create a VM, paused."""
        path = _vm_path(slice_name, request.spec.name)
        return decode(VmStatus, await self.peer.request("PUT", path, encode(request)))

    async def run_vm(self, slice_name: str, vm: str) -> VmStatus:
        """Let a VM run."""
        return decode(VmStatus, await self.peer.request("POST", f"{_vm_path(slice_name, vm)}/run"))

    async def load_vm(self, slice_name: str, vm: str, request: LoadRequest) -> VmStatus:
        """Load an image; the VM stays paused."""
        path = f"{_vm_path(slice_name, vm)}/load"
        return decode(VmStatus, await self.peer.request("POST", path, encode(request), timeout_s=600.0))

    async def fail_vm(self, slice_name: str, vm: str) -> None:
        """Kill a VM with SIGKILL."""
        await self.peer.request("POST", f"{_vm_path(slice_name, vm)}/fail")

    async def delete_vm(self, slice_name: str, vm: str, keep_console: bool = False) -> None:
        """Remove a VM; it is fine if there is none. Its console log can stay for a VM that takes its place."""
        try:
            await self.peer.request("DELETE", f"{_vm_path(slice_name, vm)}?keep_console={str(keep_console).lower()}")
        except NotFound:
            return

    async def console(self, slice_name: str, vm: str, offset: int) -> dict[str, Any]:
        """A VM's console log from ``offset`` on."""
        answer: dict[str, Any] = await self.peer.request("GET", f"{_vm_path(slice_name, vm)}/console?offset={offset}")
        return answer

    async def prepare_cut(self, slice_name: str, vm: str, request: PrepareCut) -> CutPromise:
        """Ask for the promise that a VM can be cut."""
        path = f"{_vm_path(slice_name, vm)}/cut/prepare"
        return decode(CutPromise, await self.peer.request("POST", path, encode(request)))

    async def arm(self, slice_name: str, vm: str, request: CutRequest, timeout_s: float) -> CutProgress:
        """Begin a cut that waits for its trigger: the VM's edge keeps every frame of the new color."""
        path = f"{_vm_path(slice_name, vm)}/arm"
        return decode(CutProgress, await self.peer.request("POST", path, encode(request), timeout_s=timeout_s))

    async def cut(self, slice_name: str, vm: str, request: CutRequest, timeout_s: float) -> CutProgress:
        """Cut a VM."""
        path = f"{_vm_path(slice_name, vm)}/cut"
        return decode(CutProgress, await self.peer.request("POST", path, encode(request), timeout_s=timeout_s))

    async def cut_progress(self, slice_name: str, vm: str, transaction_id: str) -> CutProgress:
        """How far a cut is; waits a little for its end."""
        path = f"{_vm_path(slice_name, vm)}/cut/{transaction_id}?wait_ms={POLL_MS}"
        return decode(CutProgress, await self.peer.request("GET", path))

    async def settle(
        self, slice_name: str, vm: str, transaction_id: str, request: SettleRequest, timeout_s: float
    ) -> EdgeReport:
        """Have a VM's edge step aside after a cut."""
        path = f"{_vm_path(slice_name, vm)}/cut/{transaction_id}/settle"
        return decode(EdgeReport, await self.peer.request("POST", path, encode(request), timeout_s=timeout_s))

    async def cancel_cut(self, slice_name: str, vm: str, transaction_id: str, timeout_s: float) -> None:
        """Undo a cut; it is fine if there is none."""
        try:
            await self.peer.request("DELETE", f"{_vm_path(slice_name, vm)}/cut/{transaction_id}", timeout_s=timeout_s)
        except NotFound:
            return


def _vm_path(slice_name: str, vm: str) -> str:
    return f"/v1/slices/{slice_name}/vms/{vm}"


class Peers:
    """All other parts. Agents are known by host name, and may move."""

    def __init__(self, controller_url: str, snapshot_server_url: str, hosts: dict[str, str]) -> None:
        self.controller = Controller(controller_url)
        self.snapshot_server = SnapshotServer(snapshot_server_url)
        self._agents = {host: HostAgent(host, url) for host, url in hosts.items()}

    def agent(self, host: str) -> HostAgent:
        """The agent of that host.

        :raise NotFound: none has been named.
        """
        try:
            return self._agents[host]
        except KeyError:
            raise NotFound(f"no agent of host {host!r} is known", "start one and name it to the coordinator") from None

    def put_agent(self, host: str, url: str) -> None:
        """From now on that host's agent answers at ``url``; an agent that stays keeps its connections."""
        known = self._agents.get(host)
        if known is None or known.peer.base_url != url:
            self._agents[host] = HostAgent(host, url)

    async def close(self) -> None:
        """Close all connections."""
        agents = [agent.peer for agent in self._agents.values()]
        for peer in (self.controller.peer, self.snapshot_server.peer, *agents):
            await peer.close()
