"""``up``, ``down``, ``status``: all parts of this machine at once."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from geni_violin.cli.client import Coordinator, load_settings, services_ledger, understood
from geni_violin.cli.machine import check_machine, installations
from geni_violin.cli.parts import Parts, Say, create_slice, health_of
from geni_violin.cli.printing import Json, line, note, print_json, print_slice, print_table, table
from geni_violin.cli.teardown import TakenDown, take_down
from geni_violin.core.errors import GeniViolinError
from geni_violin.core.messages import CreateSlice, SliceView
from geni_violin.core.model import SliceSpec
from geni_violin.runtime.settings import Settings
from geni_violin.runtime.wire import encode


def up(
    topology: Annotated[Path, typer.Argument(metavar="TOPOLOGY", help="A topology file.")],
    name: Annotated[str, typer.Option("--name", metavar="SLICE", help="Another name than the file's.")] = "",
    as_json: Json = False,
) -> None:
    """Start what is not running, create the slice, boot it."""
    from geni_violin.topology import read_topology  # noqa: PLC0415
    from geni_violin.topology.yaml_reader import check_name  # noqa: PLC0415

    spec = read_topology(topology)
    spec = replace(spec, name=check_name(name, "--name")) if name else spec
    view = bring_up(load_settings(), spec, say=_quiet if as_json else note)
    print_json(view) if as_json else print_slice(view)


def _quiet(_text: str) -> None:
    """Says nothing."""


def bring_up(settings: Settings, spec: SliceSpec, say: Say) -> SliceView:
    """Start the parts that do not run and have the slice created; its VMs run when this returns.

    :raise GeniViolinError: a part does not come up, or the slice cannot be created; the parts that run stay.
    """
    check_machine()
    parts = Parts(settings, say)
    coordinator = Coordinator(parts.start(spec.hosts))
    try:
        say(f"creating the slice {spec.name} and booting its {len(spec.vms)} VMs")
        body = encode(CreateSlice(spec))
        return understood(SliceView, create_slice(coordinator, parts.agents(spec.hosts), body))
    finally:
        coordinator.close()


def down(
    everything: Annotated[bool, typer.Option("--all", help="Every installation known on this machine.")] = False,
    as_json: Json = False,
) -> None:
    """Delete all slices, stop all parts, and remove what a crash left. Snapshots stay."""
    settings = load_settings()
    targets = {settings.state_dir.resolve(): settings}
    if everything:
        targets |= {path: settings.model_copy(update={"state_dir": path}) for path in installations()}
    done, failed = _take_down_each(list(targets.values()), _quiet if as_json else note)
    if as_json:
        print_json({"down": [encode(item) for item in done]})
    elif done:
        line("nothing runs any more: " + ", ".join(item.state_dir for item in done))
    if failed:
        raise failed[0]


def _take_down_each(targets: list[Settings], say: Say) -> tuple[list[TakenDown], list[GeniViolinError]]:
    """One after the other; one that cannot be taken down does not keep the others up."""
    done: list[TakenDown] = []
    failed: list[GeniViolinError] = []
    for target in targets:
        try:
            done.append(take_down(target, say))
        except GeniViolinError as error:
            say(f"{target.state_dir}: {error}")
            failed.append(error)
    return done, failed


def status(as_json: Json = False) -> None:
    """Show the parts that run here: name, pid, address, health."""
    services = [health_of(record) for record in services_ledger(load_settings()).all()]
    if as_json:
        print_json({"services": [encode(service) for service in services]})
        return
    if not services:
        line("nothing runs here; start it with geni-violin up TOPOLOGY")
        return
    rows = [(s.name, s.pid, s.address or "-", "yes" if s.healthy else "no", s.note) for s in services]
    print_table(table(("part", "pid", "address", "healthy", "note"), rows, ("pid",)))
