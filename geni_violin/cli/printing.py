"""What people see: aligned tables and plain lines; with ``--json`` one JSON value and nothing else on stdout."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from geni_violin.core.messages import ChannelSummary, SliceView, SnapshotView
from geni_violin.runtime.wire import encode

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_PLAIN_WIDTH = 500
_KIB, _MIB = 1 << 10, 1 << 20


def print_json(value: Any) -> None:
    """One JSON value on stdout. Dataclasses (and lists of them) are taken apart."""
    plain = [encode(item) for item in value] if isinstance(value, list) else encode(value)
    sys.stdout.write(json.dumps(plain, indent=2) + "\n")


def line(text: str) -> None:
    """One line on stdout."""
    sys.stdout.write(text + "\n")


def note(text: str) -> None:
    """One line on stderr: what is being done, warnings."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def stdout_console() -> Console:
    """Rich's console; where stdout is no terminal it neither wraps nor colors."""
    return Console(file=sys.stdout, highlight=False, markup=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> Table:
    """A plain table; the columns in ``right`` are aligned to the right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(Text(column.upper()), justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def print_table(made: Table) -> None:
    """A table on stdout, without blanks at the ends of lines where that is no terminal."""
    console = stdout_console()
    if console.is_terminal:
        console.print(made)
        return
    with console.capture() as capture:
        console.print(made)
    sys.stdout.write("".join(text.rstrip() + "\n" for text in capture.get().splitlines()))


def size(count: int) -> str:
    """Bytes for people, in KiB below one MiB, else in MiB."""
    return f"{count / _KIB:.0f} KiB" if count < _MIB else f"{count / _MIB:.1f} MiB"


def instant(seconds: float) -> str:
    """A time since 1970 for people, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else "-"


def slice_table(view: SliceView) -> Table:
    """The VMs of a slice."""
    rows = [(vm.name, vm.host, vm.state, vm.pid or "-", vm.port_color, vm.address) for vm in view.vms]
    return table(("vm", "host", "state", "pid", "port color", "address"), rows, ("pid", "port color"))


def print_slice(view: SliceView) -> None:
    """A slice: a line, then its VMs."""
    line(f"slice {view.name}: {view.state}, epoch {view.epoch}, VLAN {view.vlan_id}")
    print_table(slice_table(view))


def slices_table(views: list[SliceView]) -> Table:
    """One line a slice."""
    rows = [(view.name, view.state, view.epoch, len(view.vms)) for view in views]
    return table(("slice", "state", "epoch", "vms"), rows, ("epoch", "vms"))


def snapshots_table(views: list[SnapshotView]) -> Table:
    """One line a snapshot."""
    rows = [
        (
            *(view.name, view.slice, instant(view.created_at), view.strategy, view.network),
            f"{max((vm.downtime_ms for vm in view.vms), default=0.0):.1f}",
            f"{view.skew_ms:.1f}",
            *(view.frames_held, view.frames_dropped, view.frames_in_transit),
            size(sum(vm.received_bytes for vm in view.vms)),
        )
        for view in views
    ]
    figures = ("max down ms", "skew ms", "held", "dropped", "in transit", "received")
    return table(("snapshot", "slice", "created (utc)", "strategy", "network", *figures), rows, figures)


def snapshot_table(view: SnapshotView) -> Table:
    """The VMs of a snapshot: what the cut cost each, what became of its frames, and how large its image is."""
    rows = [
        (
            *(vm.name, vm.host, vm.strategy, f"{vm.downtime_ms:.1f}", f"{vm.hold_ms:.1f}"),
            *(vm.frames_held, vm.frames_in_transit, size(vm.received_bytes), size(vm.memory_bytes)),
        )
        for vm in view.vms
    ]
    figures = ("down ms", "hold ms", "held", "in transit", "received", "memory")
    return table(("vm", "host", "strategy", *figures), rows, figures)


def snapshot_facts(view: SnapshotView) -> list[str]:
    """What holds for the whole snapshot, a line each."""
    count = sum(vm.frames_reordered for vm in view.vms)
    reordered = f", reordered {count}" if count else ""
    facts = [
        f"snapshot {view.name} ({view.id}) of slice {view.slice}: {view.state}, {instant(view.created_at)} UTC",
        f"strategy {view.strategy}, network {view.network}, coordination {view.coordination}, epoch {view.epoch}",
        f"cut skew {view.skew_ms:.1f} ms, total {view.total_ms:.0f} ms; frames held {view.frames_held}, "
        f"dropped {view.frames_dropped}, in transit {view.frames_in_transit}{reordered}",
    ]
    return facts + [f"note: {text}" for text in view.notes]


def print_channels(snapshot: str, channels: list[ChannelSummary]) -> None:
    """What was in transit to each VM: a line, then the VMs, then what should be known of them."""
    if not channels:
        line(f"snapshot {snapshot} has no record of frames in transit; a restore replays none")
        return
    count, count_bytes = sum(one.frames for one in channels), sum(one.frame_bytes for one in channels)
    line(f"snapshot {snapshot}: {count} frames in transit at the cut, {count_bytes} bytes; a restore replays them")
    rows = [(one.vm, one.frames, one.frame_bytes, one.late_frames) for one in channels]
    figures = ("frames", "bytes", "held at senders")
    print_table(table(("vm", *figures), rows, figures))
    for one in channels:
        if one.note:
            line(f"note: {one.note}")


def print_snapshot(view: SnapshotView) -> None:
    """A snapshot: its facts, then its VMs."""
    for fact in snapshot_facts(view):
        line(fact)
    print_table(snapshot_table(view))
