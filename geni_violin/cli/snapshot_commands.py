"""``snapshot …`` and ``restore``."""

import contextlib
import errno
from pathlib import Path
from typing import Annotated

import typer

from geni_violin.cli.client import SLOW_S, Coordinator, connect, path, understood
from geni_violin.cli.following import follow_to_the_end
from geni_violin.cli.printing import (
    Json,
    line,
    note,
    print_channels,
    print_json,
    print_slice,
    print_snapshot,
    print_table,
    snapshots_table,
)
from geni_violin.cli.slice_commands import SliceName
from geni_violin.core.errors import InvalidInput, MachineFault, NoSpace, NotFound
from geni_violin.core.messages import (
    COORDINATIONS,
    NETWORK_POLICIES,
    STRATEGIES,
    RestoreRequest,
    SliceView,
    SnapshotRequest,
    SnapshotView,
    TransactionView,
)
from geni_violin.runtime.processes import write_atomically
from geni_violin.runtime.wire import encode

SnapshotName = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="The snapshot's name or id.")]
_LATER = {"--coordination": ("barrier",)}
_FULL = (errno.ENOSPC, errno.EDQUOT)

snapshot_app = typer.Typer(help="Take, list, show and delete snapshots; see their frames.", no_args_is_help=True)


def check_choice(option: str, value: str, known: tuple[str, ...]) -> str:
    """The value, if the option can have it.

    :raise InvalidInput: it cannot, in this release or at all.
    """
    if value in known:
        return value
    expected = f"expected {' or '.join(known)}"
    if value in _LATER.get(option, ()):
        raise InvalidInput(f"{option} {value} comes in a later release", expected)
    raise InvalidInput(f"{option} cannot be {value!r}", expected)


@snapshot_app.command("take")
def take(
    slice_name: SliceName,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The snapshot's name; else one is made.")] = "",
    strategy: Annotated[str, typer.Option(metavar="|".join(STRATEGIES), help="How a VM is cut.")] = "background",
    network: Annotated[
        str, typer.Option(metavar="|".join(NETWORK_POLICIES), help="What becomes of frames from the future.")
    ] = "hold",
    coordination: Annotated[
        str, typer.Option(metavar="|".join(COORDINATIONS), help="none: NOT consistent; shows what goes wrong.")
    ] = "color",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the transaction's id and return at once.")] = False,
    as_json: Json = False,
) -> None:
    """Take one consistent snapshot of a running slice."""
    request = SnapshotRequest(
        name=name,
        strategy=check_choice("--strategy", strategy, STRATEGIES),
        network=check_choice("--network", network, NETWORK_POLICIES),
        coordination=check_choice("--coordination", coordination, COORDINATIONS),
    )
    if coordination == "none":
        note("WARNING: --coordination none takes a snapshot that is NOT CONSISTENT: frames from the future of the cut")
        note("WARNING: enter VMs before their own cut. It exists to show that; never restore it for work.")
    coordinator = connect()
    begun = begin_snapshot(coordinator, slice_name, request)
    if no_wait:
        print_json(begun) if as_json else line(begun.id)
        return
    view = follow_to_the_end(coordinator, begun, quiet=as_json)
    print_json(view) if as_json else print_snapshot(view)


def begin_snapshot(coordinator: Coordinator, slice_name: str, request: SnapshotRequest) -> TransactionView:
    """Ask for a snapshot; it is under way when this returns."""
    answer = coordinator.request("POST", path("slices", slice_name, "snapshots"), encode(request))
    return understood(TransactionView, answer)


@snapshot_app.command("list")
def list_snapshots(
    slice_name: Annotated[str, typer.Argument(metavar="[SLICE]", help="Only this slice's.")] = "", as_json: Json = False
) -> None:
    """List the committed snapshots."""
    views = connect().snapshots(slice_name)
    if as_json:
        print_json(views)
    elif views:
        print_table(snapshots_table(views))
    else:
        line("no snapshots")


@snapshot_app.command("show")
def show_snapshot(name: SnapshotName, as_json: Json = False) -> None:
    """Show a snapshot: what its cut was like, and its images."""
    view = understood(SnapshotView, connect().request("GET", path("snapshots", name)))
    print_json(view) if as_json else print_snapshot(view)


@snapshot_app.command("delete")
def delete_snapshot(name: SnapshotName, as_json: Json = False) -> None:
    """Delete a snapshot and its images."""
    connect().request("DELETE", path("snapshots", name), timeout_s=SLOW_S)
    print_json({"deleted": name}) if as_json else line(f"snapshot {name} is deleted")


@snapshot_app.command("frames")
def show_frames(
    name: SnapshotName,
    pcap: Annotated[
        Path | None, typer.Option("--pcap", metavar="FILE", help="Write the frames into a file for Wireshark.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was in transit to each VM at the cut, and what a restore replays to it."""
    coordinator = connect()
    channels = coordinator.channels(name)
    if pcap is not None:
        if not channels:
            raise NotFound(f"snapshot {name} has no frames to write", "frames in transit are kept by --network hold")
        write_capture(pcap, coordinator.download(path("snapshots", name, "frames")))
    if as_json:
        print_json(channels)
    else:
        print_channels(name, channels)
        if pcap is not None:
            line(f"written to {pcap}")


def write_capture(file: Path, data: bytes) -> None:
    """Write a file whole or not at all; one that is there is replaced. What is no file, such as a pipe, is written to.

    :raise NoSpace: the disk is full.
    :raise MachineFault: it cannot be written.
    """
    target = file.resolve()
    try:
        if file.exists() and not file.is_file():
            file.write_bytes(data)
        else:
            write_atomically(target, data)
    except OSError as error:
        with contextlib.suppress(OSError):
            target.with_name(f"{target.name}.partial").unlink(missing_ok=True)
        kind = NoSpace if error.errno in _FULL else MachineFault
        raise kind(f"cannot write {file}: {error.strerror}", "choose another FILE") from error


def restore(
    name: SnapshotName,
    as_slice: Annotated[str, typer.Option("--as", metavar="NEWSLICE", help="A copy beside the original.")] = "",
    paused: Annotated[bool, typer.Option("--paused", help="Leave the VMs paused.")] = False,
    as_json: Json = False,
) -> None:
    """Put a slice back to a snapshot; returns when it runs again."""
    view = restore_snapshot(connect(), name, RestoreRequest(as_slice, paused))
    print_json(view) if as_json else print_slice(view)


def restore_snapshot(coordinator: Coordinator, name: str, request: RestoreRequest) -> SliceView:
    """Have a snapshot restored; the slice runs when this returns."""
    answer = coordinator.request("POST", path("snapshots", name, "restore"), encode(request), timeout_s=SLOW_S)
    return understood(SliceView, answer)
