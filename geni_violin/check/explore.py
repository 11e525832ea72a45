"""Breadth-first search of a finite model, with the way to whatever it finds.

Theory of operation. A model gives an initial state, the moves out of a state and what is wrong with a state. States
that differ only by the names of VMs are one: the search goes over canonical states. A path of canonical states is not
yet a story, because names may have been swapped at each step, so :func:`retrace` walks it again with the names kept.
Breadth first makes the first counterexample a shortest one. Cuts and transactions only move forward, so "an end can be
reached from everywhere" is the same as "every state that is no end has a move", which :meth:`Model.stuck` tells (or
:meth:`Model.violation`, where something else moves for ever).
"""

import gc
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

State = TypeVar("State", bound=Hashable)


@dataclass(frozen=True)
class Move:
    """What a step of a model does: its ``kind``, which is counted, and a detail."""

    kind: str
    detail: Hashable = None


class Told(NamedTuple, Generic[State]):
    """A step on a path: what the VM at ``place`` (-1: none) did, with regard to ``other``, and what came of it."""

    move: Move
    place: int
    other: int
    after: State


class Model(Protocol[State]):
    """What can be explored."""

    def initial(self) -> State:
        """Where it begins."""

    def moves(self, state: State) -> Iterable[tuple[Move, int, int, State]]:
        """Every step that is possible, as :class:`Told`; VMs keep their places."""

    def canonical(self, state: State) -> State:
        """The one representative of all states that differ by names only."""

    def violation(self, state: State) -> str:
        """What must never be, in words; empty if all is well."""

    def stuck(self, state: State) -> str:
        """What is wrong with a state without a move, in words; empty if it is a good end."""


@dataclass
class Exploration(Generic[State]):
    """What a search saw. ``path`` leads to the violation, if there is one; ``kinds`` counts moves by kind."""

    states: int = 0
    moves: int = 0
    violation: str = ""
    path: list[State] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


class TooManyStates(Exception):
    """The bound on states was reached before the search was complete."""


def explore(model: Model[State], limit: int = 5_000_000) -> Exploration[State]:
    """Visit every state, or stop at the first violation.

    :raise TooManyStates: there are more than ``limit``.
    """
    start = model.canonical(model.initial())
    parents: dict[State, State | None] = {start: None}
    seen = Exploration[State](states=1)
    frontier = [start]
    collecting = gc.isenabled()
    gc.disable()  # millions of live tuples without a cycle: the collector would only walk them again and again
    try:
        while frontier and not seen.violation:
            frontier = _expand_all(model, frontier, parents, seen)
            if len(parents) > limit:
                raise TooManyStates(f"more than {limit} states")
    finally:
        if collecting:
            gc.enable()
    seen.states = len(parents)
    return seen


def _expand_all(
    model: Model[State], frontier: list[State], parents: dict[State, State | None], seen: Exploration[State]
) -> list[State]:
    """The next layer."""
    found: list[State] = []
    for state in frontier:
        before = seen.moves
        for move, _, _, raw in model.moves(state):
            seen.moves += 1
            seen.kinds[move.kind] += 1
            after = model.canonical(raw)
            if after in parents:
                continue
            parents[after] = state
            found.append(after)
            if violation := model.violation(after):
                return _stop(seen, violation, after, parents)
        if seen.moves == before and (violation := model.stuck(state)):
            return _stop(seen, violation, state, parents)
    return found


def _stop(seen: Exploration[State], violation: str, last: State, parents: dict[State, State | None]) -> list[State]:
    """Write down the violation and the way to it; nothing is left to search."""
    seen.violation = violation
    step: State | None = last
    while step is not None:
        seen.path.append(step)
        step = parents[step]
    seen.path.reverse()
    return []


def retrace(model: Model[State], path: list[State]) -> list[Told[State]]:
    """The same path with every VM's place kept: each move and the state that it leads to."""
    here = model.initial()
    story: list[Told[State]] = []
    for wanted in path[1:]:
        for move, place, other, after in model.moves(here):
            if model.canonical(after) == wanted:
                story.append(Told(move, place, other, after))
                here = after
                break
        else:
            raise AssertionError("a canonical path could not be walked again")
    return story
