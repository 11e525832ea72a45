"""What the measurements of bench/store.py come to."""

import pytest

from bench import store_figures as figures
from bench.store import PARTS, arguments_of
from bench.store_figures import FourImages, OneImage, factors, growth, overall_growth
from bench.store_stream import Content

MIB = 1 << 20


def one_image(memory_mib: int, ingest_s: float, restore_s: float) -> OneImage:
    """An image for which zstd takes 2 s in and 1 s out."""
    one = OneImage(memory_mib, 450 * MIB, Content(memory_mib * MIB, 1, 1, 400 * MIB // 4096, 100))
    for what in (*figures.WAYS_IN, *figures.WAYS_OUT):
        one.note(what, 1.0)
    for what, values in {
        figures.ZSTD: (2.0, 2.0, 2.0),
        figures.INGEST: (ingest_s, 90.0, ingest_s),
        figures.RESTORE: (restore_s, restore_s, 90.0),
    }.items():
        one.seconds[what] = list(values)
    one.processor_s, one.peak_bytes, one.stored_bytes = [1.0], [200 * MIB], memory_mib * MIB // 5
    return one


def four_images(second_mib: int = 10, peak_mib: int = 200) -> FourImages:
    """Four images with 1,000 MiB that are not zero; the first snapshot takes 200 MiB."""
    four = FourImages(1024, 5.0, (0, 0), Content(4096 * MIB, 1, 1, 1000 * MIB // 4096, 0))
    four.store_s = ([1.0], [1.0])
    four.store_bytes = ([200 * MIB], [second_mib * MIB])
    four.peak_bytes = [peak_mib * MIB, (peak_mib - 50) * MIB]
    four.borg_s = {"lz4": ([3.0], [2.0])}
    four.borg_bytes = {"lz4": (300 * MIB, 30 * MIB)}
    return four


def missed(ones: list[OneImage], four: FourImages) -> list[str]:
    """The targets that are missed."""
    return [target.what for target in figures.targets(ones, four, four_images()) if not target.is_met]


def test_growth_is_told_for_a_doubling() -> None:
    assert growth(2, 2) == pytest.approx(2)
    assert growth(16, 16) == pytest.approx(2)
    assert growth(4, 16) == pytest.approx(4)
    assert factors({1024: 4.0, 256: 1.0, 512: 3.0}) == pytest.approx([3.0, 4 / 3])
    assert overall_growth({1024: 4.0, 256: 1.0, 512: 3.0}) == pytest.approx(2)


def test_medians_are_judged() -> None:
    assert missed([one_image(1024, 2.0, 1.0)], four_images()) == []
    assert missed([one_image(1024, 2.1, 1.0)], four_images()) == ["ingest to durable, time to zstd's"]
    assert missed([one_image(1024, 2.0, 1.1)], four_images()) == ["restore, time to zstd's"]


def test_the_guest_of_1_gib_is_judged() -> None:
    sizes = [one_image(512, 9.0, 9.0), one_image(1024, 2.0, 1.0), one_image(2048, 9.0, 9.0)]
    assert figures.judged(sizes) is sizes[1]
    assert missed(sizes, four_images()) == []
    assert figures.judged(sizes[:1]) is sizes[0]


def test_growth_beyond_linear_is_missed() -> None:
    sizes = [one_image(1024, 1.0, 1.0), one_image(2048, 2.0, 3.0)]
    assert missed(sizes, four_images()) == ["restore, factor a doubling"]


def test_bytes_and_memory_are_judged() -> None:
    ones = [one_image(1024, 1.0, 1.0)]
    assert four_images().share == pytest.approx(0.2)
    assert missed(ones, four_images(second_mib=21)) == ["four like guests, second snapshot's bytes to the first's"]
    assert missed(ones, four_images(peak_mib=301)) == ["four like guests at once, the server's memory"]


def test_bytes_that_grow_faster_than_memory_and_memory_that_grows_are_missed() -> None:
    sizes = [one_image(1024, 2.0, 1.0), one_image(4096, 8.0, 4.0)]
    sizes[1].stored_bytes *= 4
    sizes[1].peak_bytes = [100 * MIB, 301 * MIB]
    words = ["bytes stored, factor a doubling", "one guest of 4096 MiB, the server's memory"]
    assert missed(sizes, four_images()) == words


def test_what_was_not_measured_is_not_judged() -> None:
    assert figures.targets([], None, None) == []
    assert [target.what for target in figures.targets([], four_images(), None)] == [
        "four like guests, bytes stored to bytes not zero",
        "four like guests, second snapshot's bytes to the first's",
        "four like guests at once, the server's memory",
    ]
    one = one_image(1024, 2.1, 1.1)
    for what in figures.WAYS_OUT:
        del one.seconds[what]
    judged = figures.targets([one], None, None)
    assert [target.what for target in judged if not target.is_met] == ["ingest to durable, time to zstd's"]
    assert "restore" not in " ".join(target.what for target in judged)


def test_the_parts_of_a_run() -> None:
    everything = arguments_of([])
    assert (everything.parts, everything.rounds) == (set(PARTS), 5)
    assert everything.sizes == [256, 512, 1024, 2048, 4096]
    assert arguments_of(["--only", "ingest"]).sizes == [1024]
    assert arguments_of(["--only", "memory", "bytes"]).sizes == []
    assert arguments_of(["--only", "restore", "--sizes", "512", "256"]).sizes == [256, 512]
    assert arguments_of(["--quick"]).rounds == 1
    with pytest.raises(SystemExit):
        arguments_of(["--only", "nothing"])


def test_tables_have_every_way() -> None:
    one = one_image(1024, 2.0, 1.0)
    text = figures.ways_table(one, "In", figures.WAYS_IN)
    assert "store, durable           2.00     90.00    225            2.00" in text
    growth_text = figures.growth_table([one_image(512, 1.0, 1.0), one])
    assert all(name in growth_text for name in (*figures.WAYS_IN.values(), *figures.WAYS_OUT.values()))
    assert "0.200" in figures.four_table(four_images())
    assert "borg, lz4" in figures.four_table(four_images())
    assert "450" in figures.content_table([one])
