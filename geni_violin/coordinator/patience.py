"""How often something is asked again, and when not any more.

A request that is idempotent may be sent again when its answer did not come. Two kinds of patience: for what must become
known in the end, and for what is worth a few tries because a part may just be starting again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog

from geni_violin.core.errors import Conflict, GeniViolinError, InvalidInput, NoSpace, NotFound, PeerFault
from geni_violin.runtime.clock import monotonic_ms

CERTAIN = (Conflict, InvalidInput, NoSpace, NotFound)
"""Answers that say for certain that it is not done and will not be."""
FIRST_PAUSE_S = 0.02

log = structlog.get_logger()
T = TypeVar("T")


async def until_known(
    what: str,
    attempt: Callable[[], Awaitable[T]],
    give_up_on: tuple[type[GeniViolinError], ...] = (),
    longest_pause_s: float = 5.0,
) -> T:
    """Repeat until it is done, or until an answer is one of ``give_up_on``, which is raised."""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await attempt()
        except give_up_on:
            raise
        except Exception as error:
            # Also what nobody expected says nothing about the outcome.
            log.warning("will try again", what=what, reason=str(error))
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, longest_pause_s)


async def for_a_while(
    what: str,
    attempt: Callable[[], Awaitable[T]],
    patience_ms: float,
    wanted: Callable[[], bool] = lambda: True,
    again_on: tuple[type[Exception], ...] = (PeerFault,),
) -> T:
    """Repeat after errors of ``again_on``, as long as it is ``wanted`` and for ``patience_ms`` at most.

    :raise PeerFault: nobody has answered in that time.
    :raise GeniViolinError: the answer, if it is another error.
    """
    give_up_ms = monotonic_ms() + patience_ms
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await attempt()
        except again_on as error:
            if monotonic_ms() + pause_s * 1000.0 > give_up_ms:
                raise
            await asyncio.sleep(pause_s)
            if not wanted():
                raise
            log.warning("will try again", what=what, reason=str(error))
        pause_s = min(2 * pause_s, 0.5)


async def both(*works: Coroutine[Any, Any, None]) -> None:
    """Do these side by side; the first that fails ends the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
