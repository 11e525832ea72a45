"""``slice …`` and ``console``: slices as people see them."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from geni_violin.cli.client import SLOW_S, Coordinator, connect, path, understood
from geni_violin.cli.printing import Json, line, print_json, print_slice, print_table, slices_table
from geni_violin.core.messages import SliceView

SliceName = Annotated[str, typer.Argument(metavar="SLICE", help="The slice's name.")]
_FOLLOW_PAUSE_S = 0.3

slice_app = typer.Typer(help="List, show, delete, resume slices; rehearse a failure.", no_args_is_help=True)


@slice_app.command("list")
def list_slices(as_json: Json = False) -> None:
    """List the slices."""
    views = connect().slices()
    if as_json:
        print_json(views)
    elif views:
        print_table(slices_table(views))
    else:
        line("no slices")


@slice_app.command("show")
def show_slice(name: SliceName, as_json: Json = False) -> None:
    """Show a slice and its VMs."""
    view = connect().slice(name)
    print_json(view) if as_json else print_slice(view)


@slice_app.command("delete")
def delete_slice(name: SliceName, as_json: Json = False) -> None:
    """Delete a slice: its VMs, ports and rules. Its snapshots stay."""
    connect().request("DELETE", path("slices", name), timeout_s=SLOW_S)
    print_json({"deleted": name}) if as_json else line(f"slice {name} is deleted; its snapshots stay")


@slice_app.command("fail")
def fail_slice(
    name: SliceName,
    vm: Annotated[str, typer.Option("--vm", metavar="VM", help="Only this VM; else all.")] = "",
    as_json: Json = False,
) -> None:
    """Kill VMs with SIGKILL, to rehearse a failure."""
    answer = connect().request("POST", path("slices", name, "fail"), {"vm": vm}, timeout_s=SLOW_S)
    view = understood(SliceView, answer)
    print_json(view) if as_json else print_slice(view)


@slice_app.command("resume")
def resume_slice(name: SliceName, as_json: Json = False) -> None:
    """Let a slice's paused VMs run, as after restore --paused."""
    answer = connect().request("POST", path("slices", name, "resume"), {}, timeout_s=SLOW_S)
    view = understood(SliceView, answer)
    print_json(view) if as_json else print_slice(view)


def console(
    name: SliceName,
    vm: Annotated[str, typer.Argument(metavar="VM", help="The VM's name.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows, until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Print the log of a VM's serial console. With --json --follow one JSON object a line."""
    chunks = console_chunks(connect(), name, vm, follow)
    if as_json and not follow:
        texts, offsets = zip(*chunks, strict=True)
        print_json({"text": "".join(texts), "next_offset": offsets[-1]})
        return
    for text, next_offset in chunks:
        if text:
            sys.stdout.write(json.dumps({"text": text, "next_offset": next_offset}) + "\n" if as_json else text)
            sys.stdout.flush()


def console_chunks(coordinator: Coordinator, name: str, vm: str, follow: bool) -> Iterator[tuple[str, int]]:
    """A console from its beginning, as pairs of text and the offset after it; at least one, maybe of no text."""
    offset = 0
    while True:
        text, next_offset = coordinator.console(name, vm, offset)
        yield text, next_offset
        if next_offset == offset:
            if not follow:
                return
            time.sleep(_FOLLOW_PAUSE_S)
        offset = next_offset
