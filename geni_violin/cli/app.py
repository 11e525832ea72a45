"""The commands, put together."""

from typing import Annotated

import typer

from geni_violin import __version__
from geni_violin.cli import (
    part_commands,
    service_commands,
    slice_commands,
    snapshot_commands,
    store_commands,
    travel_commands,
)
from geni_violin.cli.demo import demo
from geni_violin.cli.doctor import doctor
from geni_violin.cli.printing import line

app = typer.Typer(
    name="geni-violin",
    help="One consistent snapshot of a whole running network of virtual machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        line(f"geni-violin {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One consistent snapshot of a whole running network of virtual machines."""


_RUN = "Run one part"
app.command()(doctor)
app.command()(demo)
app.command()(part_commands.up)
app.command()(part_commands.down)
app.command()(part_commands.status)
app.add_typer(slice_commands.slice_app, name="slice")
app.add_typer(snapshot_commands.snapshot_app, name="snapshot")
snapshot_commands.snapshot_app.command("export")(travel_commands.export_snapshot)
snapshot_commands.snapshot_app.command("import")(travel_commands.import_snapshot)
snapshot_commands.snapshot_app.command("verify")(travel_commands.verify_snapshot)
app.command()(snapshot_commands.restore)
app.add_typer(store_commands.store_app, name="store")
app.command()(slice_commands.console)
app.command(rich_help_panel=_RUN)(service_commands.coordinator)
app.command(rich_help_panel=_RUN)(service_commands.hostagent)
app.command("snapshot-server", rich_help_panel=_RUN)(service_commands.snapshot_server)
app.command(rich_help_panel=_RUN)(service_commands.controller)
