"""What edges recorded, on its way to the snapshot server, and channel state on its way back.

Theory of operation. A record is two files of frames in the pcap format: what the edge *received* of the old color after
the VM's cut, and what the VM *sent* while its edge held that (``docs/architecture.md``). The snapshot server makes the
channel state out of all VMs' records. A restored VM's channel state is kept in the VM's folder until it is replayed, so
that a VM which waits paused loses nothing when its agent is restarted.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from geni_violin.core.errors import MachineFault
from geni_violin.core.messages import EdgeReport, LoadRequest
from geni_violin.hostagent.edge import EdgeRecord
from geni_violin.hostagent.hypervisor import Vm
from geni_violin.runtime import pcap
from geni_violin.runtime.http import Peer
from geni_violin.runtime.processes import write_atomically

_REPLAY = "replay.pcap"
_TIMEOUT_S = 60.0


def report_of(vm: Vm, record: EdgeRecord) -> EdgeReport:
    """A record's figures."""
    return EdgeReport(
        vm=vm.definition.name,
        frames_held=record.frames_held,
        frames_overflowed=record.frames_overflowed,
        frames_in_transit=len(record.received),
        frames_sent_held=len(record.sent),
        frames_unrecorded=record.frames_unrecorded,
        frames_reordered=record.frames_reordered,
    )


async def bring(server: Peer, snapshot_id: str, vm: Vm, record: EdgeRecord) -> None:
    """Give a VM's record to the snapshot server.

    :raise PeerFault: it does not answer.
    :raise GeniViolinError: it refuses, with its words.
    """
    for kind, frames in (("received", record.received), ("sent", record.sent)):
        path = f"/v1/stagings/{snapshot_id}/vms/{vm.definition.name}/{kind}"
        body = await asyncio.to_thread(pcap.encode, frames)
        await server.send_bytes("PUT", path, body, timeout_s=_TIMEOUT_S)


async def fetch(server: Peer, vm: Vm, request: LoadRequest) -> None:
    """Get a VM's channel state from the snapshot server and keep it until :func:`take`.

    :raise PeerFault: the server does not answer.
    :raise MachineFault: what came is not what the manifest says, or it cannot be written.
    """
    path = f"/v1/snapshots/{request.snapshot_id}/vms/{vm.definition.name}/channel"
    data = await server.get_bytes(path, timeout_s=_TIMEOUT_S)
    frames = await asyncio.to_thread(pcap.decode, data)
    if len(frames) != request.channel_frames:
        raise MachineFault(
            f"the channel state of VM {vm.definition.name} has {len(frames)} frames, not {request.channel_frames}",
            "geni-violin snapshot verify",
        )
    try:
        await asyncio.to_thread(write_atomically, _replay_path(vm), data)
    except OSError as error:
        raise MachineFault(f"the channel state of VM {vm.definition.name} cannot be kept: {error}") from error


async def take(vm: Vm) -> Sequence[bytes]:
    """The frames that wait to be replayed to a VM; none if there is no channel state, or it was replayed."""
    path = _replay_path(vm)
    if not path.exists():
        return ()
    return [frame.data for frame in pcap.decode(await asyncio.to_thread(path.read_bytes))]


def replayed(vm: Vm) -> None:
    """The VM has its channel state."""
    _replay_path(vm).unlink(missing_ok=True)


def _replay_path(vm: Vm) -> Path:
    return vm.console_path.parent / _REPLAY
