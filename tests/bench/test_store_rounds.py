"""A round of bench/store.py over a small image that no QEMU made: which parts measure what. No guest runs."""

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from pages_harness import image_with, seeds

from bench import store, store_figures
from bench.store import GROWTH, INGEST, RESTORE, measure_four, measure_one
from bench.store_slice import VMS, Taken

PAGES = 300
pytestmark = pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")


def _read_s(_memory_mib: int, source: AbstractContextManager[int]) -> float:
    """In the place of a QEMU that loads an image: it is read to its end, or to what is there of it."""
    with source as descriptor, contextlib.closing(open(descriptor, "rb", closefd=False)) as image:
        return float(len(image.read()))


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "image"
    path.write_bytes(image_with(seeds(1, PAGES)))
    monkeypatch.setattr(store, "captured", lambda _memory_mib, _version: path)
    monkeypatch.setattr(store, "load_s", _read_s)
    yield path


@pytest.mark.parametrize(
    ("parts", "ways"),
    [
        ({INGEST}, {*store_figures.WAYS_IN}),
        ({RESTORE}, {*store_figures.WAYS_OUT}),
        ({GROWTH}, {*store_figures.WAYS_IN, *store_figures.WAYS_OUT}),
    ],
)
def test_each_part_measures_its_ways(image: Path, tmp_path: Path, parts: set[str], ways: set[str]) -> None:
    one = measure_one(1024, "version", parts, 2, tmp_path)
    assert one.seconds.keys() == ways
    assert all(len(values) == 2 for values in one.seconds.values())
    assert one.content.pages == PAGES
    if store_figures.INGEST in ways:
        assert one.stored_bytes > 0
        assert one.again_bytes < one.stored_bytes
        assert one.zstd_bytes > 0
    if store_figures.RESTORE in ways:
        assert one.seconds[store_figures.PLAIN_RESTORE] == [image.stat().st_size] * 2
        assert min(one.seconds[store_figures.RESTORE]) >= PAGES * 4096, "the store gives all pages back"
    store.show([one], [])


def test_four_guests_come_at_once(image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    for number in range(2):
        for vm in VMS:
            shutil.copy(image, folder / f"{number}-{vm}.stream")
    snapshot = {"vms": [{"stored_bytes": 1}] * len(VMS)}
    four = measure_four(Taken(str(folder), 1024, 5.0, (snapshot, snapshot)), False, 1, tmp_path)
    assert four.content.pages == len(VMS) * PAGES
    assert four.share < 1 / len(VMS) + 0.2, "like pages are kept once"
    assert four.peak_bytes[0] > 1 << 20
    assert four.borg_s == {}
    store.show([], [four])
