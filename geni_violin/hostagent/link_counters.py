"""The counters of a link's end, shared between the process that carries its frames and its host agent.

Theory of operation. The process is a tight loop that is never asked anything, so it writes its counters to a small file
that it has mapped into memory: one 64-bit word each, in the machine's byte order. The file outlives a process that
died; the next one goes on counting where it stopped.
"""

import mmap
import struct
from pathlib import Path
from typing import NamedTuple


class Counters(NamedTuple):
    """As in ``core.messages.LinkCounters``. All but ``waiting`` only grow."""

    entered: int = 0
    lost: int = 0
    overflowed: int = 0
    waiting: int = 0
    arrived: int = 0
    missed: int = 0
    refused: int = 0


_LAYOUT = struct.Struct(f"={len(Counters._fields)}Q")


class CounterFile:
    """A counter file that is open for writing; made if it is not there.

    :raise OSError: it cannot be.
    """

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(_LAYOUT.size)
            self._words = mmap.mmap(file.fileno(), _LAYOUT.size)
        self.before = Counters(*_LAYOUT.unpack_from(self._words))
        """What was in it when it was opened."""

    def write(self, counters: Counters) -> None:
        """Show these."""
        _LAYOUT.pack_into(self._words, 0, *counters)


def read_counters(path: Path) -> Counters:
    """What a counter file shows now; zeros if there is none yet."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Counters()
    return Counters(*_LAYOUT.unpack(data)) if len(data) == _LAYOUT.size else Counters()
