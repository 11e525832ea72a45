"""Watching a snapshot on its way: a progress bar for each VM and the transaction's state.

On a terminal the bars move on stderr, so that stdout stays clean; elsewhere each new state is one plain line.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from geni_violin.cli.client import Coordinator
from geni_violin.cli.outcome import Interrupted
from geni_violin.cli.printing import note
from geni_violin.core.errors import PeerFault
from geni_violin.core.messages import SnapshotView, TransactionView
from geni_violin.core.transaction import Phase


class Watcher(Protocol):
    """Is shown a transaction whenever it has moved on."""

    def show(self, view: TransactionView) -> None:
        """The transaction as it is now."""


class Silent:
    """Shows nothing."""

    def show(self, view: TransactionView) -> None:
        """Nothing."""


class Lines:
    """A line on stderr for each new state."""

    def __init__(self) -> None:
        self._state = ""

    def show(self, view: TransactionView) -> None:
        """The state, if it is a new one."""
        if view.state != self._state:
            self._state = view.state
            note(f"snapshot {view.snapshot.name or view.id}: {view.state}")


class Bars:
    """A bar for each VM: image bytes received, of its memory; and a line with the state."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def show(self, view: TransactionView) -> None:
        """Move the bars. An image may be smaller than the memory (empty pages): a committed one is full."""
        for vm in view.snapshot.vms:
            if vm.name not in self._tasks:
                self._tasks[vm.name] = self._progress.add_task(vm.name, total=vm.memory_bytes or None, state="")
            done = view.state == Phase.COMMITTED
            total = vm.received_bytes if done else max(vm.memory_bytes, vm.received_bytes) or None
            self._progress.update(self._tasks[vm.name], completed=vm.received_bytes, total=total, state=view.state)


@contextlib.contextmanager
def watcher(quiet: bool = False) -> Iterator[Watcher]:
    """What suits the place that stderr goes to."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        state = TextColumn("{task.fields[state]}")
        console = Console(file=sys.stderr, highlight=False)
        with Progress(*columns, TimeElapsedColumn(), state, console=console) as progress:
            yield Bars(progress)
    else:
        yield Lines()


def follow_to_the_end(coordinator: Coordinator, transaction: TransactionView, quiet: bool) -> SnapshotView:
    """Wait until a snapshot is committed, showing how far it is.

    :raise PeerFault: it was aborted; nothing of it is kept, and the slice goes on.
    :raise Interrupted: Ctrl-C; the snapshot goes on without us.
    """
    last = transaction
    try:
        with watcher(quiet) as watching:
            watching.show(last)
            for last in coordinator.follow(transaction.id):
                watching.show(last)
    except KeyboardInterrupt:
        raise Interrupted(f"the snapshot goes on by itself as transaction {transaction.id}") from None
    if last.state != Phase.COMMITTED:
        raise PeerFault(
            f"the snapshot of {last.slice} was aborted: {last.failure or 'no reason was given'}",
            "nothing of the snapshot is kept; geni-violin slice show tells the slice's state",
        )
    return last.snapshot
