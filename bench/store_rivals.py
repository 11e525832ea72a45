"""What the store is measured against: a plain write, zstd, borg; each durable when its time ends.

All read the image from the page cache, as the store gets it from there through a socket.
"""

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BORG_COMPRESSIONS = ("lz4", "zstd,1")
_COPIED_AT_A_TIME = 1 << 20
_FREE_MIB = 2048
"""More than what is measured needs, beside a guest's memory."""
_CLAIM = "import mmap, sys; mmap.mmap(-1, int(sys.argv[1]), flags=int(sys.argv[2]))"
_ZSTD = ("zstd", "-q", "-f", "-1", "-T2")


@dataclass(frozen=True)
class Written:
    """What was written: seconds until durable, bytes."""

    durable_s: float
    size_bytes: int


def into_memory(path: Path) -> None:
    """Read a file, so that it is in the page cache when a time begins."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_COPIED_AT_A_TIME)
        while file.readinto(buffer):
            pass


def claim_memory(guest_mib: int = 0) -> None:
    """Take much memory and give it back, so that none that is measured pays for what was not used for a while.

    Where this machine is a virtual one itself, memory that it uses again after a time must first be found for it by its
    host: the first who uses it is the slower for it, by as much as a half.

    :param guest_mib: the memory of the guest that is to be loaded.
    """
    size = (_FREE_MIB + guest_mib) << 20
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    subprocess.run([sys.executable, "-c", _CLAIM, str(size), str(flags)], check=True)


def plain_write(image: Path, folder: Path) -> Written:
    """Copy an image and fsync it."""
    target = folder / "plain"
    began = time.monotonic()
    buffer = memoryview(bytearray(_COPIED_AT_A_TIME))
    with image.open("rb", buffering=0) as source, target.open("wb", buffering=0) as file:
        while count := source.readinto(buffer):
            file.write(buffer[:count])
        os.fsync(file.fileno())
    elapsed = time.monotonic() - began
    written = Written(elapsed, target.stat().st_size)
    target.unlink()
    return written


def zstd_write(image: Path, folder: Path) -> tuple[Written, Path]:
    """``zstd -1 -T2`` of an image into a file, and fsync it; the file stays."""
    target = folder / "image.zst"
    target.unlink(missing_ok=True)
    began = time.monotonic()
    subprocess.run([*_ZSTD, str(image), "-o", str(target)], check=True)
    _sync(target)
    return Written(time.monotonic() - began, target.stat().st_size), target


@contextmanager
def zstd_image(compressed: Path) -> Iterator[int]:
    """``zstd -d`` of an image; the pipe that it comes through."""
    with subprocess.Popen(["zstd", "-q", "-d", "-c", str(compressed)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout.fileno()
        process.stdout.close()


@contextmanager
def plain_image(image: Path) -> Iterator[int]:
    """``cat`` of an image; the pipe that it comes through."""
    with subprocess.Popen(["cat", str(image)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout.fileno()
        process.stdout.close()


def borg_repository(folder: Path) -> None:
    """A new repository without encryption."""
    _borg(folder, "init", "--encryption", "none", str(folder / "repository"))


def borg_create(folder: Path, archive: str, images: Sequence[Path], compression: str) -> Written:
    """``borg create`` of images, one after the other; the bytes are those that the repository grew by.

    borg fsyncs its segments, and its files cache is off: it would not tell an image that changed from one that did not.
    """
    repository = folder / "repository"
    before = _size(repository)
    began = time.monotonic()
    options = ["--compression", compression, "--files-cache", "disabled"]
    _borg(folder, "create", *options, f"{repository}::{archive}", *map(str, images))
    return Written(time.monotonic() - began, _size(repository) - before)


def _borg(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "BORG_BASE_DIR": str(folder / "borg"), "LC_ALL": "C.UTF-8"}
    environment |= {"BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes", "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes"}
    done = subprocess.run(["borg", *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"borg {arguments[0]} failed: {done.stderr.strip()}")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
