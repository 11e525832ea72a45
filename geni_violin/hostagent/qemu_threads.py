"""The thread that streams an image, made to yield once its VM runs again.

Theory of operation. After the cut of a VM its image streams at full speed, while other VMs of the slice may still be in
their cuts, with frames waiting for each millisecond. QEMU streams with a thread of its own, which it makes when a
migration begins: it is the one that was not there before. A higher niceness (sched(7)) lets what cuts go first.
"""

import contextlib
import os
from pathlib import Path

_NICENESS = 10


class StreamThread:
    """The streaming thread of one process.

    :param pid: the process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._others: frozenset[int] | None = None

    def about_to_begin(self) -> None:
        """A migration is about to begin: no thread that is there streams."""
        self._others = self._threads()

    def yield_to_others(self) -> None:
        """The VM runs again. Nothing happens without a migration."""
        others, self._others = self._others, None
        for thread in self._threads() - others if others is not None else ():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpriority(os.PRIO_PROCESS, thread, _NICENESS)

    def _threads(self) -> frozenset[int]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return frozenset(int(entry.name) for entry in Path(f"/proc/{self._pid}/task").iterdir())
        return frozenset()
