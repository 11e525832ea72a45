"""Who may speak to the controller at the same time.

What concerns one slice may go beside what concerns others. The whole truth, all slices at once, goes alone: it is put
together from what is known at one instant, and must neither overtake nor be overtaken by something newer.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Gate:
    """Many at a time, or one alone."""

    def __init__(self) -> None:
        self._inside = 0
        self._closed = False
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Beside others, but not beside one that wants to be alone."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            await self._notify()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """When all who are inside have left, and before anybody else comes."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed)
            self._closed = True
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._inside)
            yield
        finally:
            self._closed = False
            await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
