"""What changes a store passes a gate, so that it is closed, and left to another server, only when nothing does."""

import contextlib
import threading
from collections.abc import Iterator

from geni_violin.core.errors import Conflict


class Gate:
    """Open until it is closed. No operation that passes may begin another one that does."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """While something is changed.

        :raise Conflict: the gate is closed.
        """
        with self._changed:
            if self._closed:
                raise Conflict("the store is being closed", "ask again when the snapshot server runs")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let nothing pass any more; when this returns, all that did is done."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._inside)
