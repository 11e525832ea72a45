"""What ``bench/store.py`` measured, what it comes to, and the targets. Pure.

Every list has one value a round, in the order of the rounds. A figure is a median, a ratio is one of medians.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
MAX_MEMORY_MIB = 300.0
"""What the server may have resident at most, however large and however many images come."""


@dataclass
class OneImage:
    """One guest's image: seconds of each way in and out that was measured, and bytes."""

    memory_mib: int
    stream_bytes: int
    content: Content
    seconds: dict[str, list[float]] = field(default_factory=dict)
    processor_s: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    zstd_bytes: int = 0
    stored_bytes: int = 0
    again_bytes: int = 0

    def note(self, what: str, elapsed_s: float) -> None:
        """One more measurement."""
        self.seconds.setdefault(what, []).append(elapsed_s)

    def median_s(self, what: str) -> float:
        """The median of what was measured under this name."""
        return median(self.seconds[what])

    def has(self, *ways: str) -> bool:
        """Whether all of these were measured."""
        return self.seconds.keys() >= set(ways)


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


def targets(ones: Sequence[OneImage], filled: FourImages | None, plain: FourImages | None) -> list[Target]:
    """What was to be shown, as far as it was measured.

    :param ones: the smallest and the largest tell the growth, the one of 1 GiB all else.
    :param filled: four guests that are filled.
    :param plain: four guests as the topology stands.
    """
    return [
        *(_image_targets(judged(ones)) if ones else []),
        *(_four_targets("four like guests", filled) if filled else []),
        *(_four_targets("four guests as the topology stands", plain) if plain else []),
        *(_growth_targets(ones) if len(ones) > 1 else []),
    ]


def _image_targets(one: OneImage) -> list[Target]:
    not_zero = one.content.nonzero_bytes / MIB
    found = [Target("pages that are not zero in the image", not_zero, 400.0, "MiB", at_most=False)]
    for what, rival, words in (
        (INGEST, ZSTD, "ingest to durable, time to zstd's"),
        (RESTORE, ZSTD_RESTORE, "restore, time to zstd's"),
    ):
        if one.has(what, rival):
            found.append(Target(words, one.median_s(what) / one.median_s(rival), 1.0))
    return found


def _four_targets(who: str, four: FourImages) -> list[Target]:
    return [
        Target(f"{who}, bytes stored to bytes not zero", four.share, 0.35),
        Target(f"{who}, second snapshot's bytes to the first's", four.second_to_first, 0.10),
        Target(f"{who} at once, the server's memory", max(four.peak_bytes) / MIB, MAX_MEMORY_MIB, "MiB"),
    ]


def _growth_targets(ones: Sequence[OneImage]) -> list[Target]:
    found = [
        Target(f"{name}, factor a doubling", overall_growth(_by_size(ones, value)), MAX_FACTOR)
        for name, what, value in (
            ("ingest", INGEST, lambda one: one.median_s(INGEST)),
            ("restore", RESTORE, lambda one: one.median_s(RESTORE)),
            ("bytes stored", INGEST, lambda one: float(one.stored_bytes)),
        )
        if all(one.has(what) for one in ones)
    ]
    if all(one.peak_bytes for one in ones):
        largest = max(ones, key=lambda one: one.memory_mib)
        words = f"one guest of {largest.memory_mib} MiB, the server's memory"
        found.append(Target(words, max(largest.peak_bytes) / MIB, MAX_MEMORY_MIB, "MiB"))
    return found


def _by_size(ones: Sequence[OneImage], value: Callable[[OneImage], float]) -> dict[int, float]:
    return {one.memory_mib: value(one) for one in ones}


def judged(ones: Sequence[OneImage]) -> OneImage:
    """The image that the targets speak of, or the largest that there is."""
    return next((one for one in ones if one.memory_mib == JUDGED_MIB), ones[-1])


# --- tables -----------------------------------------------------------------------------------------------------------


def content_table(ones: Sequence[OneImage]) -> str:
    """What is in the images, and what the store makes of them, where it took them in."""
    rows = []
    for one in ones:
        cells = [f"{one.memory_mib} MiB", f"{one.stream_bytes / MIB:.0f}", f"{one.content.nonzero_bytes / MIB:.0f}"]
        cells.append(f"{one.content.duplicate_share:.1%}")
        if one.has(INGEST):
            cells += [f"{one.zstd_bytes / one.stream_bytes:.2f}", f"{one.stored_bytes / one.stream_bytes:.2f}"]
            cells += [f"{one.again_bytes / MIB:.1f}", f"{median(one.processor_s):.2f}"]
            cells.append(f"{max(one.peak_bytes) / MIB:.0f}")
        else:
            cells += ["-"] * 5
        rows.append(cells)
    columns = ("a guest of", "stream, MiB", "not zero, MiB", "duplicates", "zstd", "stored", "once more, MiB")
    more = ("server's CPU, s", "memory, MiB")
    return table("Images (zstd and stored: bytes to the stream's)", (*columns, *more), rows)


def ways_table(one: OneImage, title: str, ways: Mapping[str, str]) -> str:
    """Times of some ways in or out of one image, each also as a multiple of the first way's."""
    rows = []
    base = one.median_s(next(iter(ways)))
    for what, name in ways.items():
        middle, worst = one.median_s(what), max(one.seconds[what])
        rates = (f"{one.stream_bytes / MIB / middle:.0f}", f"{middle / base:.2f}")
        rows.append((name, f"{middle:.2f}", f"{worst:.2f}", *rates))
    columns = ("", "median, s", "worst, s", "MiB/s", f"to {next(iter(ways.values())).split(',')[0]}")
    return table(f"{title}, a guest of {one.memory_mib} MiB", columns, rows)


def growth_table(ones: Sequence[OneImage]) -> str:
    """Medians by size, and the factor from each size to the next."""
    measured = {
        name: {one.memory_mib: one.median_s(what) for one in ones}
        for what, name in {**WAYS_IN, **WAYS_OUT}.items()
        if all(one.has(what) for one in ones)
    }
    if all(one.has(INGEST) for one in ones):
        measured["bytes stored, MiB"] = _by_size(ones, lambda one: one.stored_bytes / MIB)
        measured["server's memory, MiB"] = _by_size(ones, lambda one: max(one.peak_bytes) / MIB)
    rows = []
    for name, values in measured.items():
        cells = [f"{value:.2f}" for value in values.values()] + [f"{factor:.2f}" for factor in factors(values)]
        rows.append((name, *cells))
    sizes = [f"{one.memory_mib} MiB" for one in ones]
    columns = ("", *sizes, *(f"x to {size}" for size in sizes[1:]))
    return table("Growth: medians in s, bytes, memory; then the factor of a doubling", columns, rows)


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
