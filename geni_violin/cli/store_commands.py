"""``store …``: what the snapshots take, and getting back what nothing needs any more."""

import sys
from typing import Annotated

import typer

from geni_violin.cli.client import SLOW_S, connect, path, understood
from geni_violin.cli.printing import Json, line, note, print_json, print_table, size, table
from geni_violin.core.errors import InvalidInput, PeerFault
from geni_violin.core.messages import CollectionPlan, Quota, StoreStats
from geni_violin.runtime.wire import encode

store_app = typer.Typer(help="See what snapshots take, limit it, free what nothing needs.", no_args_is_help=True)
_MIB = 1 << 20


@store_app.command("stats")
def stats(as_json: Json = False) -> None:
    """Show what the store and each snapshot take."""
    figures = understood(StoreStats, connect().request("GET", path("store"), timeout_s=SLOW_S))
    print_json(figures) if as_json else print_stats(figures)


def print_stats(figures: StoreStats) -> None:
    """The figures of all snapshots, then those of each."""
    free = "unknown" if figures.free_bytes is None else size(figures.free_bytes)
    count = len(figures.snapshots)
    line(
        f"{count} snapshot{'s' if count != 1 else ''}: logical {size(figures.logical_bytes)}, stored "
        f"{size(figures.stored_bytes + figures.map_bytes)} in {figures.packs} packs and their maps"
    )
    line(f"shared by several {size(figures.shared_bytes)}, rubbish {size(figures.rubbish_bytes)}, free {free}")
    rows = [
        (
            *(one.name, one.slice, size(one.logical_bytes), size(one.stored_bytes)),
            *(size(one.needed_bytes), size(one.shared_bytes)),
        )
        for one in figures.snapshots
    ]
    sizes = ("logical", "added", "needed", "shared")
    if rows:
        print_table(table(("snapshot", "slice", *sizes), rows, sizes))


@store_app.command("gc")
def collect(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Free what no snapshot needs: plan, show the plan, ask, do it. Snapshots may be taken meanwhile."""
    if dry_run and yes:
        raise InvalidInput("--dry-run and --yes contradict each other", "say one of them")
    coordinator = connect()
    plan = understood(CollectionPlan, coordinator.request("GET", path("store", "collection"), timeout_s=SLOW_S))
    if dry_run or not (plan.delete or plan.rewrite):
        print_json(plan) if as_json else line(described(plan))
        return
    if not yes:
        note(described(plan))
        if not sys.stdin.isatty():
            raise InvalidInput("nothing was deleted, because nobody can be asked", "say --yes, or --dry-run")
        typer.confirm("Do it?", abort=True, err=True)
    answer = coordinator.request("POST", path("store", "collection"), encode(plan), timeout_s=SLOW_S)
    done = understood(CollectionPlan, answer)
    print_json(done) if as_json else line(f"done: {described(done)}")


def described(plan: CollectionPlan) -> str:
    """A plan, or what was done, in words."""
    if not (plan.delete or plan.rewrite):
        return "nothing to free"
    words = f"{len(plan.delete)} packs to delete, {len(plan.rewrite)} to rewrite"
    return f"{words}: frees {size(plan.freed_bytes)}, for which {size(plan.moved_bytes)} are written anew"


@store_app.command("quota")
def quota(
    slice_name: Annotated[str, typer.Argument(metavar="[SLICE]", help="Set this slice's.")] = "",
    limit_mib: Annotated[
        int | None, typer.Option("--limit-mib", min=0, metavar="N", help="What its snapshots may add to the store.")
    ] = None,
    no_limit: Annotated[bool, typer.Option("--no-limit", help="Take its quota away.")] = False,
    as_json: Json = False,
) -> None:
    """Show the quotas of slices, or set one."""
    coordinator = connect()
    if bool(slice_name) != (limit_mib is not None or no_limit) or (limit_mib is not None and no_limit):
        raise InvalidInput(
            "a quota needs a SLICE, and one of --limit-mib and --no-limit", "or none of them, to show all"
        )
    if limit_mib is not None:
        body = encode(Quota(slice_name, limit_mib * _MIB))
        answer = coordinator.request("PUT", path("store", "quotas", slice_name), body)
    elif no_limit:
        answer = coordinator.request("DELETE", path("store", "quotas", slice_name))
    else:
        answer = coordinator.request("GET", path("store", "quotas"))
    if not isinstance(answer, list):
        raise PeerFault("the coordinator answered something that is no list")
    quotas = [understood(Quota, item) for item in answer]
    if as_json:
        print_json(quotas)
    elif quotas:
        rows = [(one.slice, size(one.limit_bytes), size(one.used_bytes)) for one in quotas]
        print_table(table(("slice", "limit", "used"), rows, ("limit", "used")))
    else:
        line("no quotas")
