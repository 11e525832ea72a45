"""What ``bench/store.py`` measured, what it comes to, and the targets. Pure.

Every list has one value a round, in the order of the rounds. A figure is a median, a ratio is one of medians.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from bench.report import Target, table
from bench.store_stream import Content

MIB = float(1 << 20)
JUDGED_MIB = 1024
"""The guest that the targets speak of."""
MAX_FACTOR = 2.2
"""How much twice the memory may cost at most; 2 is linear."""


@dataclass
class OneImage:
    """One guest's image: seconds of each way in and out, and bytes."""

    memory_mib: int
    stream_bytes: int
    content: Content
    seconds: dict[str, list[float]] = field(default_factory=dict)
    processor_s: list[float] = field(default_factory=list)
    zstd_bytes: int = 0
    stored_bytes: int = 0
    again_bytes: int = 0

    def note(self, what: str, elapsed_s: float) -> None:
        """One more measurement."""
        self.seconds.setdefault(what, []).append(elapsed_s)

    def median_s(self, what: str) -> float:
        """The median of what was measured under this name."""
        return median(self.seconds[what])


@dataclass
class FourImages:
    """Two snapshots of four like guests, in the store and in borg's repositories (by their compression).

    Each pair is of the first and the second snapshot.
    """

    memory_mib: int
    between_cuts_s: float
    stream_bytes: tuple[int, int]
    content: Content
    store_s: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    store_bytes: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    peak_bytes: list[int] = field(default_factory=list)
    live_stored_bytes: tuple[int, int] = (0, 0)
    borg_s: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    borg_bytes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The first snapshot's bytes in the store to the bytes of its pages that are not zero."""
        return median(self.store_bytes[0]) / self.content.nonzero_bytes

    @property
    def second_to_first(self) -> float:
        """What the second snapshot added to the store, to what the first did."""
        return median(self.store_bytes[1]) / median(self.store_bytes[0])


INGEST, AGAIN, ZSTD, PLAIN = "ingest", "ingest again", "zstd -1 -T2", "plain write"
RESTORE, ZSTD_RESTORE, PLAIN_RESTORE = "restore", "zstd -d", "cat"
WAYS_IN = {PLAIN: "plain write, fsync", ZSTD: "zstd -1 -T2, fsync", INGEST: "store, durable", AGAIN: "store, once more"}
WAYS_OUT = {PLAIN_RESTORE: "cat | QEMU", ZSTD_RESTORE: "zstd -d | QEMU", RESTORE: "store -> QEMU"}


def factors(seconds: Mapping[int, float]) -> list[float]:
    """From each size to the next one, by how much the time grows for each doubling.

    :param seconds: by size; sizes in any order and of any ratio.
    """
    return [growth(large / small, seconds[large] / seconds[small]) for small, large in pairwise(sorted(seconds))]


def growth(times_larger: float, times_longer: float) -> float:
    """What a doubling costs, if something so much larger takes so much longer: 2 is linear, 4 is quadratic."""
    return float(times_longer ** (1 / math.log2(times_larger)))


def overall_growth(seconds: Mapping[int, float]) -> float:
    """What a doubling costs, from the smallest size to the largest."""
    small, large = min(seconds), max(seconds)
    return growth(large / small, seconds[large] / seconds[small])


def targets(ones: Sequence[OneImage], filled: FourImages, plain: FourImages) -> list[Target]:
    """What was to be shown. The smallest and the largest image tell the growth, the one of 1 GiB all else."""
    one = judged(ones)
    found = [
        Target("pages that are not zero in the image", one.content.nonzero_bytes / MIB, 400.0, "MiB", at_most=False),
        Target("ingest to durable, time to zstd's", one.median_s(INGEST) / one.median_s(ZSTD), 1.0),
        Target("restore, time to zstd's", one.median_s(RESTORE) / one.median_s(ZSTD_RESTORE), 1.0),
        Target("four like guests, stored to not zero", filled.share, 0.35),
        Target("second snapshot to the first", filled.second_to_first, 0.10),
        Target("server's memory, four guests at once", max(filled.peak_bytes) / MIB, 300.0, "MiB"),
        Target("four guests as the topology stands, stored to not zero", plain.share, 0.35),
        Target("their second snapshot to the first", plain.second_to_first, 0.10),
    ]
    if len(ones) > 1:
        for what, name in ((INGEST, "ingest"), (RESTORE, "restore")):
            seconds = {image.memory_mib: image.median_s(what) for image in ones}
            found.append(Target(f"{name}, factor a doubling", overall_growth(seconds), MAX_FACTOR))
    return found


def judged(ones: Sequence[OneImage]) -> OneImage:
    """The image that the targets speak of, or the largest that there is."""
    return next((one for one in ones if one.memory_mib == JUDGED_MIB), ones[-1])


# --- tables -----------------------------------------------------------------------------------------------------------


def content_table(ones: Sequence[OneImage]) -> str:
    """What is in the images."""
    rows = [
        (
            f"{one.memory_mib} MiB",
            f"{one.stream_bytes / MIB:.0f}",
            f"{one.content.nonzero_bytes / MIB:.0f}",
            f"{one.content.duplicate_share:.1%}",
            f"{one.zstd_bytes / one.stream_bytes:.2f}",
            f"{one.stored_bytes / one.stream_bytes:.2f}",
            f"{one.again_bytes / MIB:.1f}",
        )
        for one in ones
    ]
    columns = ("a guest of", "stream, MiB", "not zero, MiB", "duplicates", "zstd", "stored", "once more, MiB")
    return table("Images (zstd and stored: bytes to the stream's)", columns, rows)


def ways_table(one: OneImage, title: str, ways: Mapping[str, str]) -> str:
    """Times of some ways in or out of one image."""
    rows = []
    for what, name in ways.items():
        middle, worst = one.median_s(what), max(one.seconds[what])
        rows.append((name, f"{middle:.2f}", f"{worst:.2f}", f"{one.stream_bytes / MIB / middle:.0f}"))
    return table(f"{title}, a guest of {one.memory_mib} MiB", ("", "median, s", "worst, s", "MiB/s"), rows)


def growth_table(ones: Sequence[OneImage]) -> str:
    """Medians by size, and the factor from each size to the next."""
    rows = []
    for what, name in {**WAYS_IN, **WAYS_OUT}.items():
        seconds = {one.memory_mib: one.median_s(what) for one in ones}
        cells = [f"{value:.2f}" for value in seconds.values()] + [f"{factor:.2f}" for factor in factors(seconds)]
        rows.append((name, *cells))
    sizes = [f"{one.memory_mib} MiB" for one in ones]
    columns = ("", *sizes, *(f"x to {size}" for size in sizes[1:]))
    return table("Growth: medians in s, then what a doubling costs", columns, rows)


def four_table(four: FourImages) -> str:
    """Four guests, in the store and in borg's repository."""
    first, second = (median(sizes) for sizes in four.store_bytes)
    rows = [_four_row("store", four.store_s, (first, second), four.content.nonzero_bytes)]
    for compression, seconds in four.borg_s.items():
        sizes = four.borg_bytes[compression]
        rows.append(_four_row(f"borg, {compression}", seconds, sizes, four.content.nonzero_bytes))
    columns = ("", "1st, s", "worst", "MiB", "of not zero", "2nd, s", "worst", "MiB", "of 1st")
    title = (
        f"Two snapshots of four guests of {four.memory_mib} MiB, {four.between_cuts_s:.1f} s apart: "
        f"{four.content.nonzero_bytes / MIB:.0f} MiB not zero, {four.content.duplicate_share:.0%} duplicates; "
        f"the server's memory at most {max(four.peak_bytes) / MIB:.0f} MiB"
    )
    return table(title, columns, rows)


def _four_row(
    name: str, seconds: tuple[list[float], list[float]], sizes: tuple[float, float], nonzero_bytes: int
) -> tuple[str, ...]:
    cells = [name]
    for times, size, whole in zip(seconds, sizes, (nonzero_bytes, sizes[0]), strict=True):
        cells += [f"{median(times):.2f}", f"{max(times):.2f}", f"{size / MIB:.1f}", f"{size / whole:.3f}"]
    return tuple(cells)
