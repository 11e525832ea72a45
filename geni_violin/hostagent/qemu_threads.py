"""The niceness of QEMU's threads: who goes first at a cut, when all of them want the processors.

Theory of operation. QEMU's main loop carries out the monitor's commands and handles the guest's frames, and the
monitor has a thread of its own, which reads the commands: while one of them waits for a processor a cut waits. So all
threads are as urgent as the agent but those of the guest's own processors. A migration is streamed by a thread of its
own, which QEMU makes when it begins: it is the one that was not there before, and as urgent as the main loop that made
it, until the VM runs again. From then on it is as urgent as the guest. No more, because others of the slice may still
be in their cuts, with frames waiting for each millisecond: measured, streams that stay urgent until the frames are let
go make all of them wait longer. And no less, because the guest, and the main loop with it, waits for the stream where
it writes to memory that has not left yet: measured, a stream that stepped back further let TCP in the guests time out.

All this counts among the threads of one session (sched(7)), which the agent and its VMs share. Nothing happens without
the right to be less nice.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_URGENT_NICENESS = -10
_GUEST_NICENESS = 0


class QemuThreads:
    """The threads of one process.

    :param pid: the process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._others: frozenset[int] | None = None

    def hurry_all_but(self, processors: Iterable[int]) -> None:
        """Have the threads that are there be urgent, but those of the guest's processors stay as they are."""
        for thread in self._threads() - frozenset(processors):
            _set_niceness(thread, _URGENT_NICENESS)

    def about_to_stream(self) -> None:
        """A migration is about to begin: no thread that is there streams."""
        self._others = self._threads()

    def stream_steps_back(self) -> None:
        """The VM runs again. Nothing happens without a migration."""
        others, self._others = self._others, None
        for thread in self._threads() - others if others is not None else ():
            _set_niceness(thread, _GUEST_NICENESS)

    def _threads(self) -> frozenset[int]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return frozenset(int(entry.name) for entry in Path(f"/proc/{self._pid}/task").iterdir())
        return frozenset()


def _set_niceness(thread: int, niceness: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
