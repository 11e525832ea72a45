"""What people see of slices, snapshots and transactions, made from what the coordinator knows. Pure functions."""

from collections.abc import Mapping
from dataclasses import fields

from geni_violin.coordinator.journal import SliceRecord, TransactionRecord
from geni_violin.core.color import color_of
from geni_violin.core.messages import (
    Manifest,
    SliceView,
    SnapshotView,
    TransactionView,
    VmImage,
    VmSnapshotView,
    VmStatus,
    VmView,
)
from geni_violin.core.model import VmSpec
from geni_violin.core.transaction import Phase, TransactionState

IN_TRANSIT_NOTE = "frames in transit at the cut were delivered but not recorded; a restore loses them"
UNCOORDINATED_NOTE = "NOT CONSISTENT: taken without coordination of the network"
UNCOUNTED_NOTE = "dropped frames could not be counted"
LIFETIME_NOTE = "the counters did not tell when the last frame from before the cut was gone; its longest lifetime did"


def slice_view(record: SliceRecord, statuses: Mapping[str, VmStatus], epochs: Mapping[str, int]) -> SliceView:
    """A slice.

    :param statuses: by VM name, from the agents; a VM that is missing has no process.
    :param epochs: by VM name, from the controller; the slice's own epoch stands in.
    """
    vms = tuple(_vm_view(vm, statuses.get(vm.name), epochs.get(vm.name, record.epoch)) for vm in record.spec.vms)
    return SliceView(record.name, _slice_state({vm.state for vm in vms}), record.epoch, record.network.vlan_id, vms)


def _vm_view(vm: VmSpec, status: VmStatus | None, epoch: int) -> VmView:
    state, pid = (status.state, status.pid) if status is not None else ("stopped", 0)
    return VmView(vm.name, vm.host, state, pid, color_of(epoch), vm.address)


def _slice_state(vm_states: set[str]) -> str:
    """Running if all run, suspended if all are paused, stopped if none has a process; anything else has failed."""
    alike = {"running": "running", "paused": "suspended", "stopped": "stopped"}
    return alike.get(vm_states.pop(), "failed") if len(vm_states) == 1 else "failed"


def notes_of(state: TransactionState) -> tuple[str, ...]:
    """What a person should know about a snapshot that its figures do not say."""
    notes = [f"{vm}: {promise.fallback_reason}" for vm, promise in state.promises.items() if promise.fallback_reason]
    notes += [f"{vm}: {image.note}" for vm, image in state.images.items() if image.note]
    if not state.options.colored:
        return (UNCOORDINATED_NOTE, *notes)
    return (*notes, *_policy_notes(state), *_edge_notes(state), *_counter_notes(state))


def _policy_notes(state: TransactionState) -> list[str]:
    """Which VMs' frames were not held, and what that means for a restore."""
    reasons = [f"{vm}: {promise.network_reason}" for vm, promise in state.promises.items() if promise.network_reason]
    if not state.holding:
        return [*reasons, IN_TRANSIT_NOTE] if state.promises or state.options.network == "drop" else []
    dropping = [vm for vm, promise in state.promises.items() if promise.network == "drop"]
    return [*reasons, *(f"{vm}: {IN_TRANSIT_NOTE}" for vm in dropping)]


def _edge_notes(state: TransactionState) -> list[str]:
    """What edges had no room for, what was overtaken, and what the snapshot server could not tell."""
    overflows = [
        f"{vm}: {edge.frames_overflowed} frames found no room at its edge and were dropped"
        for vm, edge in state.edges.items()
        if edge.frames_overflowed
    ]
    unrecorded = [
        f"{vm}: {edge.frames_unrecorded} frames in transit found no room to be recorded; a restore loses them"
        for vm, edge in state.edges.items()
        if edge.frames_unrecorded
    ]
    reordered = [
        f"{vm}: {edge.frames_reordered} frames may have been overtaken when its hold port was left"
        for vm, edge in state.edges.items()
        if edge.frames_reordered
    ]
    return overflows + unrecorded + reordered + [channel.note for channel in state.channels.values() if channel.note]


def _counter_notes(state: TransactionState) -> list[str]:
    notes = [LIFETIME_NOTE] if state.retired is not None and not state.retired.by_counters else []
    return [*notes, UNCOUNTED_NOTE] if state.counted and state.dropped_after is None else notes


def effective_strategy(state: TransactionState) -> str:
    """The strategy that all VMs were cut with, "mixed" if they differ."""
    strategies = {promise.strategy for promise in state.promises.values()} or {state.options.strategy}
    return strategies.pop() if len(strategies) == 1 else "mixed"


def effective_network(state: TransactionState) -> str:
    """The policy that all VMs' edges kept to, "mixed" if they differ; "none" where the network took no part."""
    if not state.options.colored:
        return "none"
    policies = {promise.network for promise in state.promises.values()} or {state.options.network}
    return policies.pop() if len(policies) == 1 else "mixed"


def manifest_of(record: TransactionRecord) -> Manifest:
    """The manifest that commits a transaction; the same one however often it is asked for."""
    state = record.state
    return Manifest(
        id=record.id,
        name=record.name,
        slice=record.slice,
        created_at=record.created_at,
        epoch=state.options.epoch,
        strategy=effective_strategy(state),
        network=effective_network(state),
        coordination=record.request.coordination,
        skew_ms=round(state.skew_ms, 3),
        total_ms=round(state.total_ms, 3),
        frames_held=state.frames_held,
        frames_dropped=state.frames_dropped,
        frames_in_transit=state.frames_in_transit,
        notes=notes_of(state),
        vms=tuple(_vm_image(vm, state) for vm in record.slice.vms),
    )


def _vm_image(vm: VmSpec, state: TransactionState) -> VmImage:
    promise, cut, stored = state.promises[vm.name], state.cuts[vm.name], state.images[vm.name]
    edge, channel = state.edges.get(vm.name), state.channels.get(vm.name)
    return VmImage(
        name=vm.name,
        host=vm.host,
        cut_at=cut.cut_at,
        downtime_ms=round(state.streams[vm.name].downtime_ms, 3),
        strategy=promise.strategy,
        received_bytes=stored.received_bytes,
        stored_bytes=stored.stored_bytes,
        memory_bytes=promise.memory_bytes,
        blake3=stored.blake3,
        frames_in_transit=channel.frames if channel else 0,
        network=promise.network,
        frames_held=edge.frames_held if edge else 0,
        frames_overflowed=edge.frames_overflowed if edge else 0,
        hold_ms=round(cut.hold_ms, 3),
        trigger=cut.trigger,
        frames_reordered=edge.frames_reordered if edge else 0,
    )


def snapshot_view(manifest: Manifest) -> SnapshotView:
    """A committed snapshot."""
    names = [field.name for field in fields(VmSnapshotView)]
    vms = tuple(VmSnapshotView(**{name: getattr(vm, name) for name in names}) for vm in manifest.vms)
    return SnapshotView(
        name=manifest.name,
        id=manifest.id,
        slice=manifest.slice.name,
        state=Phase.COMMITTED.value,
        created_at=manifest.created_at,
        strategy=manifest.strategy,
        network=manifest.network,
        coordination=manifest.coordination,
        epoch=manifest.epoch,
        skew_ms=manifest.skew_ms,
        total_ms=manifest.total_ms,
        frames_held=manifest.frames_held,
        frames_dropped=manifest.frames_dropped,
        frames_in_transit=manifest.frames_in_transit,
        notes=manifest.notes,
        vms=vms,
    )


def transaction_view(record: TransactionRecord, received_bytes: Mapping[str, int]) -> TransactionView:
    """A snapshot on its way, or at its end."""
    state = record.state
    snapshot = SnapshotView(
        name=record.name,
        id=record.id,
        slice=record.slice.name,
        state=state.phase.value,
        created_at=record.created_at,
        strategy=effective_strategy(state),
        network=effective_network(state),
        coordination=record.request.coordination,
        epoch=state.options.epoch,
        skew_ms=round(state.skew_ms, 3),
        total_ms=round(state.total_ms, 3),
        frames_held=state.frames_held,
        frames_dropped=state.frames_dropped,
        frames_in_transit=state.frames_in_transit,
        notes=notes_of(state),
        vms=tuple(_vm_so_far(vm, state, received_bytes.get(vm.name, 0)) for vm in record.slice.vms),
    )
    return TransactionView(record.id, record.slice.name, state.phase.value, state.failure, snapshot)


def _vm_so_far(vm: VmSpec, state: TransactionState, received_bytes: int) -> VmSnapshotView:
    promise, cut = state.promises.get(vm.name), state.cuts.get(vm.name)
    stream, stored = state.streams.get(vm.name), state.images.get(vm.name)
    edge, channel = state.edges.get(vm.name), state.channels.get(vm.name)
    downtime_ms = stream.downtime_ms if stream else cut.downtime_ms if cut else 0.0
    return VmSnapshotView(
        name=vm.name,
        host=vm.host,
        cut_at=cut.cut_at if cut else 0.0,
        downtime_ms=round(downtime_ms, 3),
        received_bytes=stored.received_bytes if stored else received_bytes,
        stored_bytes=stored.stored_bytes if stored else 0,
        memory_bytes=promise.memory_bytes if promise else 0,
        strategy=promise.strategy if promise else state.options.strategy,
        network=promise.network if promise else state.options.network,
        hold_ms=round(cut.hold_ms, 3) if cut else 0.0,
        trigger=cut.trigger if cut else "",
        frames_held=edge.frames_held if edge else 0,
        frames_overflowed=edge.frames_overflowed if edge else 0,
        frames_in_transit=channel.frames if channel else 0,
        frames_reordered=edge.frames_reordered if edge else 0,
    )
