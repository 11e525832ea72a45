"""The image store: images in, images out, bytes kept, memory used; beside zstd, a plain write and borg.

Real images of real guests. One guest of 256 MiB to 4 GiB, whose memory is filled with what a busy machine's memory is
made of: files, copies of them, a heap of small objects, log text, numbers, some that does not compress
(``store_content`` has the shares). And two snapshots of four guests that run the causality workload, as
``topologies/causality.yaml`` has them, and with 1 GiB that is filled likewise, but with nothing random in it. The
images are captured once, below ``.cache/bench-store``.

In each round, in turn, with the image in the page cache and free memory at hand: a plain copy and fsync; ``zstd -1
-T2`` into a file and fsync; a new snapshot server, a process of its own with an empty store, that takes the image over
TCP, from the first byte to *durable*, and then once more, as a second snapshot in which nothing has changed; QEMU that
loads the image from the server, from ``zstd -d`` and from ``cat``, from the moment that the image is asked for to the
one that QEMU says it is loaded. QEMU's process is there when that time begins.

Then the four guests: both snapshots into an empty store, four streams at once, and by ``borg create`` into an empty
repository. Bytes are the sizes of all files in the store's folder, whatever the server says.

Usage: ``python -m bench.store [--only PART …] [--quick] [--rounds 5] [--sizes 256 512 1024 2048 4096] [--folder DIR]
[--json FILE]``. Root; some half an hour, more when the images are to be captured. ``--quick``: one round, two sizes,
smaller guests. Ends with 1 if a target is missed. The parts, all of them unless some are chosen:

=========  ============================================================================================================
ingest     one image of 1 GiB in: the store, zstd, a plain write
restore    the same image out: the store, zstd, cat
bytes      two snapshots of four guests, of both sizes, beside borg
memory     two snapshots of the larger four guests, without borg
growth     ingest and restore for all sizes
=========  ============================================================================================================
"""

import argparse
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from bench import store_figures as figures
from bench.report import LOAD_AT_START, argument_parser, finish
from bench.store_client import running_server
from bench.store_content import content_version
from bench.store_figures import FourImages, OneImage
from bench.store_guest import captured, load_s
from bench.store_rivals import (
    BORG_COMPRESSIONS,
    borg_create,
    borg_repository,
    claim_memory,
    into_memory,
    plain_image,
    plain_write,
    zstd_image,
    zstd_write,
)
from bench.store_slice import Taken, taken
from bench.store_stream import Content, count

PLAIN_MIB = 96
"""The guests of the topology as it stands."""
INGEST, RESTORE, BYTES, MEMORY, GROWTH = PARTS = ("ingest", "restore", "bytes", "memory", "growth")


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """An empty folder; what was written before is on the disk, and free memory at hand: it costs no one else's time."""
    with tempfile.TemporaryDirectory(prefix="gvb-", dir=parent) as folder:
        os.sync()
        claim_memory()
        yield Path(folder)


def content_of(*images: Path) -> Content:
    """What images have in them, together."""
    with ExitStack() as stack:
        files = [stack.enter_context(image.open("rb")) for image in images]
        maps = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for file in files]
        return count(*(memoryview(one) for one in maps))


def measure_one(memory_mib: int, version: str, parts: set[str], rounds: int, parent: Path) -> OneImage:
    """One guest's image, the ways in or out or both."""
    image = captured(memory_mib, version)
    into_memory(image)
    one = OneImage(memory_mib, image.stat().st_size, content_of(image))
    for number in range(rounds):
        _progress(f"{memory_mib} MiB: round {number + 1} of {rounds}")
        if parts & {INGEST, GROWTH}:
            with work_folder(parent) as folder:
                one.note(figures.PLAIN, plain_write(image, folder).durable_s)
        _round_of_rivals(one, image, parts, parent)
        _round_of_store(one, image, parts, parent)
        if parts & {RESTORE, GROWTH}:
            one.note(figures.PLAIN_RESTORE, _load_s(one, plain_image(image)))
    return one


def _load_s(one: OneImage, source: AbstractContextManager[int]) -> float:
    claim_memory(one.memory_mib)
    return load_s(one.memory_mib, source)


def _round_of_rivals(one: OneImage, image: Path, parts: set[str], parent: Path) -> None:
    """zstd, in and out."""
    with work_folder(parent) as folder:
        written, compressed = zstd_write(image, folder)
        if parts & {INGEST, GROWTH}:
            one.note(figures.ZSTD, written.durable_s)
            one.zstd_bytes = written.size_bytes
        if parts & {RESTORE, GROWTH}:
            one.note(figures.ZSTD_RESTORE, _load_s(one, zstd_image(compressed)))


def _round_of_store(one: OneImage, image: Path, parts: set[str], parent: Path) -> None:
    """The store, in and out, and in once more."""
    with work_folder(parent) as folder, running_server(folder / "store") as server:
        images = {"n1": image}
        before_s = server.processor_s()
        durable_s = server.ingest("first", images).durable_s
        server.publish("first", images)
        if parts & {INGEST, GROWTH}:
            one.note(figures.INGEST, durable_s)
            one.processor_s.append(server.processor_s() - before_s)
            one.peak_bytes.append(server.peak_memory_bytes())
            one.stored_bytes = server.stored_bytes()
        if parts & {RESTORE, GROWTH}:
            one.note(figures.RESTORE, _load_s(one, server.image("first", "n1")))
        if parts & {INGEST, GROWTH}:
            one.note(figures.AGAIN, server.ingest("again", images).durable_s)
            server.publish("again", images)
            one.again_bytes = server.stored_bytes() - one.stored_bytes


def measure_four(snapshots: Taken, beside_borg: bool, rounds: int, parent: Path) -> FourImages:
    """Two snapshots of four guests, in the store and, if wanted, in borg's repositories."""
    pairs = (snapshots.images(0), snapshots.images(1))
    sizes = [sum(path.stat().st_size for path in images.values()) for images in pairs]
    four = FourImages(
        snapshots.memory_mib, snapshots.between_cuts_s, (sizes[0], sizes[1]), content_of(*pairs[0].values())
    )
    live = [sum(vm["stored_bytes"] for vm in snapshot["vms"]) for snapshot in snapshots.snapshots]
    four.live_stored_bytes = (live[0], live[1])
    for images in pairs:
        for path in images.values():
            into_memory(path)
    for number in range(rounds):
        _progress(f"four guests of {four.memory_mib} MiB: round {number + 1} of {rounds}")
        _round_of_four(four, pairs, parent)
        if beside_borg:
            _round_of_borg(four, pairs, parent)
    return four


def _round_of_four(four: FourImages, pairs: tuple[dict[str, Path], dict[str, Path]], parent: Path) -> None:
    with work_folder(parent) as folder, running_server(folder / "store") as server:
        before = 0
        for number, images in enumerate(pairs):
            four.store_s[number].append(server.ingest(f"s{number}", images).durable_s)
            server.publish(f"s{number}", images)
            after = server.stored_bytes()
            four.store_bytes[number].append(after - before)
            before = after
        four.peak_bytes.append(server.peak_memory_bytes())


def _round_of_borg(four: FourImages, pairs: tuple[dict[str, Path], dict[str, Path]], parent: Path) -> None:
    for compression in BORG_COMPRESSIONS:
        with work_folder(parent) as folder:
            borg_repository(folder)
            written = [
                borg_create(folder, f"s{number}", list(images.values()), compression)
                for number, images in enumerate(pairs)
            ]
        seconds = four.borg_s.setdefault(compression, ([], []))
        for times, one in zip(seconds, written, strict=True):
            times.append(one.durable_s)
        four.borg_bytes[compression] = (written[0].size_bytes, written[1].size_bytes)


def _progress(text: str) -> None:
    if sys.stdout.isatty():
        print(f"\r\033[K  {text}", end="", flush=True)
    else:
        print(f"  {text}", flush=True)


def show(ones: list[OneImage], fours: list[FourImages]) -> None:
    """All figures, for people."""
    tables = [figures.content_table(ones)] if ones else []
    for title, ways in (("In", figures.WAYS_IN), ("Out", figures.WAYS_OUT)):
        if ones and (one := figures.judged(ones)).has(*ways):
            tables.append(figures.ways_table(one, title, ways))
    tables += [figures.growth_table(ones)] if len(ones) > 1 else []
    tables += [figures.four_table(four) for four in fours]
    print("\n" + "\n\n".join(tables))


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; what ``--quick`` leaves open is filled in."""
    parser = argument_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--quick", action="store_true", help="one round, two sizes, smaller guests: a short look")
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="MIB", help="default 256 512 1024 2048 4096")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where to write (default %(default)s)")
    arguments = parser.parse_args(words)
    arguments.parts = set(arguments.only or PARTS)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
    arguments.sizes = sorted(arguments.sizes or _sizes(arguments.parts, arguments.quick))
    arguments.four_mib = 256 if arguments.quick else figures.JUDGED_MIB
    return arguments


def _sizes(parts: set[str], quick: bool) -> list[int]:
    """The guests whose images are measured one by one."""
    if GROWTH in parts:
        return [256, 1024] if quick else [256, 512, 1024, 2048, 4096]
    return [figures.JUDGED_MIB] if parts & {INGEST, RESTORE} else []


def main() -> int:
    """Capture what is not there yet, measure, show, judge."""
    arguments = arguments_of()
    for program in ("zstd", "borg"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not installed; scripts/bootstrap installs it")
    print(f"load average {LOAD_AT_START:.1f} at the start", flush=True)
    version = content_version()
    parts, rounds, folder = arguments.parts, arguments.rounds, arguments.folder
    filled = taken(arguments.four_mib, version) if parts & {BYTES, MEMORY} else None
    plain = taken(PLAIN_MIB, version) if BYTES in parts else None
    ones = [measure_one(size, version, parts, rounds, folder) for size in arguments.sizes]
    pair = [measure_four(one, BYTES in parts, rounds, folder) if one else None for one in (filled, plain)]
    fours = [four for four in pair if four is not None]
    show(ones, fours)
    judgment = figures.targets(ones, pair[0], pair[1])
    measured = {"ones": [asdict(one) for one in ones], "fours": [asdict(four) for four in fours]}
    return finish("store", measured, judgment, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
