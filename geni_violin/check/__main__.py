"""``python -m geni_violin.check``: the core explored exhaustively, and each of its rules shown to be needed.

Theory of operation. Two halves: the sound system, in which nothing may be found (``check.suite``), and the relaxed
ones, in each of which something must (``check.relaxations``). Exit 0 if and only if both hold. The explorations are
independent, so they run on as many processors as there are; they are printed in a fixed order.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor

from geni_violin.check.bounds import CONTROLLER_RESTART, DEAD_AGENT, EMPTY_SWITCH
from geni_violin.check.relaxations import RELAXATIONS, Counterexample, counterexample
from geni_violin.check.suite import Outcome, checks, perform

_SHOWN = (
    ("frames received in transit", "a frame in transit is received"),
    ("future frames dropped", "a future frame is dropped"),
    ("frames lost", "a frame is lost"),
    ("sent before the cut, colored after it", "a frame sent before the cut is colored after it"),
    ("future frames held", "a future frame is held"),
    ("recorded at the edge", "a frame passes and is recorded"),
    ("recorded while held", "a frame is held and is recorded"),
    ("cuts cancelled", "cancel"),
    ("controllers restarted", CONTROLLER_RESTART),
    ("switches emptied", EMPTY_SWITCH),
    ("agents that died", DEAD_AGENT),
    ("restores", "the slice is restored"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Explore, print, and return the exit status."""
    options = _parser().parse_args(arguments)
    began = time.monotonic()
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        sound = _print_sound(pool, options.vms, options.cuts, options.frames)
        names = list(RELAXATIONS) if options.relax == "all" else [] if options.relax == "none" else [options.relax]
        harmed = [_print_relaxed(name, found) for name, found in zip(names, pool.map(_relaxed, names), strict=True)]
    good = sound and all(harmed)
    needed = f"{sum(harmed)} of {len(names)} relaxed rules have a counterexample"
    print(f"{'OK' if good else 'FAILED'}: the rules are {'sound' if sound else 'NOT sound'}; {needed}")
    print(f"{time.monotonic() - began:.1f} s")
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m geni_violin.check", description="Explore the core exhaustively.")
    parser.add_argument("--vms", type=_count(2), default=3, help="VMs in the slice (default 3)")
    parser.add_argument("--cuts", type=_count(1), default=2, help="snapshots in a row (default 2)")
    parser.add_argument("--frames", type=_count(1), default=3, help="frames on their way at once (default 3)")
    names = ", ".join(RELAXATIONS)
    choices = ["all", "none", *RELAXATIONS]
    parser.add_argument("--relax", choices=choices, default="all", metavar="NAME", help=f"all, none, or one of {names}")
    return parser


def _count(least: int) -> Callable[[str], int]:
    """An argument type: a whole number that is not too small."""

    def count(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"at least {least} is needed, not {text}")
        return value

    return count


def _perform(name: str, vms: int, cuts: int, frames: int) -> Outcome:
    """Run in a process of its own: checks hold functions, so their names travel."""
    return perform(checks(vms, cuts, frames)[name])


def _relaxed(name: str) -> Counterexample | None:
    return counterexample(RELAXATIONS[name])


def _print_sound(pool: ProcessPoolExecutor, vms: int, cuts: int, frames: int) -> bool:
    """Explore the sound system from every side; whether nothing was found."""
    running: list[tuple[str, Future[Outcome]]] = [
        (check.about, pool.submit(_perform, name, vms, cuts, frames))
        for name, check in checks(vms, cuts, frames).items()
    ]
    print("The rules as they are: nothing may be found.\n")
    outcomes = [_print_outcome(about, future.result()) for about, future in running]
    states, moves = sum(outcome.states for outcome in outcomes), sum(outcome.moves for outcome in outcomes)
    print(f"\n  {states:,} states and {moves:,} steps explored")
    return all(outcome.passed for outcome in outcomes)


def _print_outcome(about: str, outcome: Outcome) -> Outcome:
    print(f"  {about}: {outcome.states:,} states, {outcome.seconds:.1f} s: ", end="")
    print(
        outcome.violation.upper() or (f"NEVER SEEN: {', '.join(outcome.unseen)}" if outcome.unseen else "nothing found")
    )
    _print_story(outcome.story)
    seen = [f"{outcome.kinds[kind]:,} {text}" for text, kind in _SHOWN if outcome.kinds[kind]]
    if seen:
        print(f"      steps among them: {', '.join(seen)}")
    sys.stdout.flush()
    return outcome


def _print_relaxed(name: str, found: Counterexample | None) -> bool:
    """One relaxation and its shortest counterexample; whether there is one."""
    print(f'\n{name}, which breaks: "{RELAXATIONS[name].sentence}"')
    if found is None:
        print("  NO COUNTEREXAMPLE FOUND")
        return False
    _print_story(found.lines)
    print(f"  Harm: {found.harm}.")
    for judgment in found.judgments:
        print(f"  The judge of histories: {judgment}.")
    return True


def _print_story(lines: Sequence[str]) -> None:
    for number, line in enumerate(lines, 1):
        print(f"  {number:2}. {line}")


if __name__ == "__main__":
    sys.exit(main())
