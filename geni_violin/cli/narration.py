"""Telling a story on a terminal, with moving bars; or, where there is none, in plain lines without control codes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_TENTHS = 10
_PLAIN_WIDTH = 120
Move = Callable[[int, int], None]
"""Moves a bar: how much is done, of how much."""


class Narrator:
    """Tells what happens."""

    def __init__(self, stream: TextIO) -> None:
        terminal = stream.isatty()
        self._console = Console(file=stream, highlight=False, markup=False, width=None if terminal else _PLAIN_WIDTH)
        self._moving = terminal and self._console.is_terminal

    def heading(self, text: str) -> None:
        """A new chapter."""
        self._print(Text(f"\n{text}", style="bold"))

    def say(self, text: str) -> None:
        """One thing that happens."""
        self._print(Text(f"  {text}"))

    def table(self, table: Table) -> None:
        """A table."""
        self._print(table)

    def _print(self, what: Text | Table) -> None:
        if self._moving:
            self._console.print(what)
            return
        with self._console.capture() as capture:
            self._console.print(what, no_wrap=True, overflow="ignore", crop=False)
        self._console.file.write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))
        self._console.file.flush()

    @contextlib.contextmanager
    def bar(self, what: str) -> Iterator[Move]:
        """A progress bar; without a terminal a line whenever another tenth is done."""
        if not self._moving:
            yield self._tenths(what)
            return
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total or None)

    def _tenths(self, what: str) -> Move:
        told = -1

        def move(done: int, total: int) -> None:
            nonlocal told
            tenth = done * _TENTHS // total if total else 0
            if total and tenth != told:
                told = tenth
                self.say(f"{what}: {done} of {total}")

        return move
