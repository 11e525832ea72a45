"""How a benchmark shows its figures: aligned tables for people, JSON for programs, and a verdict on each target."""

import argparse
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOAD_AT_START = os.getloadavg()[0]
"""How busy the machine was in the minute before: figures of a busy machine are of little worth."""


@dataclass(frozen=True)
class Spread:
    """What many measurements of one thing come to, in the unit that they were taken in."""

    count: int
    best: float
    median: float
    p99: float
    worst: float


def spread(values: Iterable[float]) -> Spread:
    """Sum measurements up; lower is better. The 99th percentile is a value that was measured (nearest rank).

    :raise ValueError: there is none.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("nothing was measured")
    rank = math.ceil(0.99 * len(ordered))
    return Spread(len(ordered), ordered[0], statistics.median(ordered), ordered[rank - 1], ordered[-1])


@dataclass(frozen=True)
class Target:
    """A figure and the bound that it should keep."""

    what: str
    value: float
    bound: float
    unit: str = ""
    at_most: bool = True

    @property
    def is_met(self) -> bool:
        """Whether it does."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        relation = "at most" if self.at_most else "at least"
        unit = f" {self.unit}" if self.unit else ""
        verdict = "met" if self.is_met else "MISSED"
        return f"{self.what}: {self.value:.4g}{unit}, {relation} {self.bound:g}{unit}: {verdict}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A title and aligned columns: the first to the left, all others to the right."""
    lines = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    aligned = (
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    )
    texts = ("  ".join(cells) for cells in aligned)
    return "\n".join([title, *(f"  {text.rstrip()}" for text in texts)])


def argument_parser(documentation: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; the first line of its documentation says what it is."""
    parser = argparse.ArgumentParser(description=(documentation or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser


def finish(name: str, figures: dict[str, Any], targets: Sequence[Target], json_file: Path | None) -> int:
    """Print the verdicts, write the JSON if wanted, and give back the exit code: 1 if a target is missed."""
    cores = os.cpu_count()
    print("\nTargets\n" + "\n".join(f"  {target}" for target in targets))
    print(f"  (the machine: {cores} cores, load average {LOAD_AT_START:.1f} at the start)")
    if json_file is not None:
        machine = {
            "cores": cores,
            "load_at_start": LOAD_AT_START,
            "kernel": platform.release(),
            "python": platform.python_version(),
        }
        verdicts = [{**asdict(target), "met": target.is_met} for target in targets]
        document = {"benchmark": name, "machine": machine, "figures": figures, "targets": verdicts}
        json_file.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(target.is_met for target in targets) else 1
