"""How large a world is explored, what is looked for in it, and what belongs to no single VM of it."""

from dataclasses import dataclass
from typing import NamedTuple

IDLE, ALIVE, DEAD = "idle", "alive", "dead"
ANY = -1
ORPHANS, COLORS, RULES = "orphans", "lying colors", "broken rules"


class Globals(NamedTuple):
    """What belongs to no VM. ``epoch`` is what the present or last snapshot cuts into; ``kept`` the last committed."""

    epoch: int
    mode: str
    left: int
    life: int = 1
    kept: int = -1
    verdict: str = ""


@dataclass(frozen=True)
class Bounds:
    """How large a world is explored, and what is looked for.

    ``strategies`` has one entry for each VM; ``frames`` may be on their way at once.
    """

    strategies: tuple[str, ...]
    cuts: int
    frames: int
    first_epoch: int = 0
    aborts: bool = False
    restores: bool = False
    judges: frozenset[str] = frozenset({ORPHANS, COLORS, RULES})


QUIET, ARMING, NETWORK_ARMING, CUTTING, DISARMING, SETTLING = range(6)
"""How far a snapshot is that holds frames; QUIET: none is under way."""

CONTROLLER_RESTART, EMPTY_SWITCH, DEAD_AGENT = "the controller restarts", "a switch restarts empty", "an agent dies"


class Progress(NamedTuple):
    """What belongs to no VM in a world that loses nothing. ``epoch`` is what the present or last snapshot cuts into.

    ``dead``: it will never be committed. ``doomed``: nor will it, because an agent has lost its record. ``whole``: all
    ports that are to be armed have been. ``advances``: should it die, it drives the ports on to the new color.
    ``lossy``: a fault may have cost frames. ``faults`` may still come.
    """

    epoch: int
    phase: int = QUIET
    dead: bool = False
    doomed: bool = False
    whole: bool = False
    advances: bool = True
    lossy: bool = False
    faults: tuple[str, ...] = ()
    verdict: str = ""

    @property
    def judged(self) -> bool:
        """Whether a snapshot is under way that may be committed."""
        return self.phase != QUIET and not (self.dead or self.doomed)


@dataclass(frozen=True)
class LosslessBounds:
    """How large a world that loses nothing is explored.

    ``vms`` has a strategy and a network policy for each VM; ``frames`` may be on their way at once; each of ``faults``
    may come once in a run. With ``strict`` R1 and R2 are looked for themselves.
    """

    vms: tuple[tuple[str, str], ...]
    cuts: int
    frames: int
    first_epoch: int = 0
    aborts: bool = False
    faults: tuple[str, ...] = ()
    strict: bool = True
