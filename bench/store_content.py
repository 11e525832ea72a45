"""What is in the memory of the guests that ``bench/store.py`` takes images of.

Theory of operation. The guest is the project's own (``topologies/build-images``): kernel, modules, busybox. A second
archive behind its initramfs adds files of this machine, a first process and ``store_filler.c``. Because the root is a
ramfs, the files *are* memory, as a page cache is. The rest the program makes. In shares of the guest's memory:

========  =====  ======================================================================================================
files     0.12   programs, libraries and texts below /usr, chosen by their paths' hashes: the same in all guests
copies    0.05   some of these files once more, as processes have them that read them
records   0.14   a heap of small objects: sizes, pointers, counters, times, short names, hashes
text      0.08   lines of a log
numbers   0.03   floating-point values that change slowly, with noise in the last digits
random    0.04   what is compressed or encrypted already; a guest can be made without
========  =====  ======================================================================================================

All that the program makes depends on a seed: guests with different seeds have like memory, not equal memory. With what
Linux itself needs, more than half of the memory is not zero; what is free *is* zero, nearly all of it, because the
program sees to it.
"""

import hashlib
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mininet_tests.slice_harness import REPOSITORY

IMAGES = REPOSITORY / ".cache" / "images"
BUILDER = REPOSITORY / "topologies" / "build-images"
KERNEL = IMAGES / "vmlinuz"
FILLED = "GV-FILLED"
"""What a guest says on its console once its memory is full."""

_FILLER = Path(__file__).with_name("store_filler.c")
_CAUSALITY_INIT = REPOSITORY / "topologies" / "guest" / "causality-init"
_COMPILER = ("gcc", "-std=gnu11", "-O2", "-static", "-Wall", "-Wextra", "-Werror")
_SOURCES = ("/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/lib/gcc", "/usr/lib/python3.11", "/usr/share")
_SMALLEST_FILE, _LARGEST_FILE = 4 << 10, 16 << 20
_SHARES = (0.12, 0.05, 0.14, 0.08, 0.03, 0.04)
_FILE, _PROGRAM, _FOLDER = 0o100644, 0o100755, 0o040755

_INIT = f"""#!/bin/sh
. /lib/gv/common.sh
mount_all
for word in $(cat /proc/cmdline); do
    case $word in
    fill=*) fill=${{word#fill=}} ;;
    esac
done
store_filler "$fill" >/filled 2>&1 &
while ! grep -q {FILLED} /filled; do
    kill -0 $! 2>/dev/null || fail 1 "$(cat /filled)"
    sleep 0.2
done
echo {FILLED}
case $(cat /proc/cmdline) in
*gv.peers=*) exec sh /bin/causality-init ;;
esac
rest
"""


@dataclass(frozen=True)
class Recipe:
    """How much of each kind a guest's memory has, in MiB."""

    files: int
    copies: int
    records: int
    text: int
    numbers: int
    random: int

    def argument(self, seed: int | str) -> str:
        """The word of the kernel command line that tells the guest."""
        parts = (self.copies, self.records, self.text, self.numbers, self.random)
        return f"fill={seed}:{':'.join(map(str, parts))}"


def recipe(memory_mib: int, with_random: bool = True) -> Recipe:
    """The recipe for a guest of so much memory."""
    made = Recipe(*(round(share * memory_mib) for share in _SHARES))
    return made if with_random else replace(made, random=0)


def chosen_files(sizes: Iterable[tuple[str, int]], wanted_bytes: int) -> list[str]:
    """As many files as it takes to have so many bytes, or all. Which ones depends on their paths alone.

    :param sizes: paths and sizes in bytes.
    """
    ordered = sorted(sizes, key=lambda entry: hashlib.sha256(entry[0].encode()).digest())
    chosen, total = [], 0
    for path, size in ordered:
        if total >= wanted_bytes:
            break
        chosen.append(path)
        total += size
    return chosen


def machine_files() -> Iterator[tuple[str, int]]:
    """Ordinary files of this machine that are neither tiny nor huge, with their sizes."""
    for source in _SOURCES:
        for folder, _, names in os.walk(source):
            if folder.endswith("__pycache__"):  # Python adds to it whenever it likes
                continue
            for name in names:
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                    size = path.stat().st_size
                    if _SMALLEST_FILE <= size <= _LARGEST_FILE:
                        yield str(path), size


def cpio_record(inode: int, path: str, mode: int, data: bytes) -> bytes:
    """One record of an archive in the ``newc`` format: 13 hexadecimal fields, name and data padded to 4 bytes each."""
    name = path.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in fields) + name
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def archive(program: bytes, files: Iterable[str]) -> Iterator[bytes]:
    """The records of the second archive."""
    entries = [
        ("init", _PROGRAM, _INIT.encode()),
        ("bin/causality-init", _PROGRAM, _CAUSALITY_INIT.read_bytes()),
        ("bin/store_filler", _PROGRAM, program),
        ("data", _FOLDER, b""),
    ]
    inode = 0
    for inode, (path, mode, data) in enumerate(entries, 1):
        yield cpio_record(inode, path, mode, data)
    for number, file in enumerate(files):
        yield cpio_record(inode + 1 + number, f"data/{number}", _FILE, Path(file).read_bytes())
    yield cpio_record(0, "TRAILER!!!", 0, b"")


def build_initrd(path: Path, files_mib: int) -> None:
    """Write the guest's initramfs. Builds the project's images first if they are not there.

    :raise SystemExit: this machine has not enough files.
    """
    subprocess.run([str(BUILDER)], check=True, stdout=subprocess.DEVNULL)
    sizes = list(machine_files())
    if sum(size for _, size in sizes) < files_mib << 20:
        raise SystemExit(f"this machine has less than {files_mib} MiB of files in {', '.join(_SOURCES)}")
    program = path.with_suffix(".program")
    subprocess.run([*_COMPILER, str(_FILLER), "-o", str(program)], check=True)
    with path.open("wb") as file:
        file.write((IMAGES / "causality.initrd").read_bytes())
        file.flush()
        compressor = subprocess.Popen(["zstd", "-q", "-3", "-T2", "-c"], stdin=subprocess.PIPE, stdout=file)
        assert compressor.stdin is not None
        for record in archive(program.read_bytes(), chosen_files(sizes, files_mib << 20)):
            compressor.stdin.write(record)
        compressor.stdin.close()
        if compressor.wait() != 0:
            raise SystemExit("zstd cannot compress the guest's files")
    program.unlink()


def content_version() -> str:
    """Twelve hexadecimal digits that change with whatever decides what a captured image has in it.

    Files below /usr are told by their paths and sizes.
    """
    said = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    inputs = (said.splitlines()[0], _INIT, repr(_SHARES), _FILLER.read_text(), (IMAGES / "stamp").read_text())
    digest = hashlib.sha256(repr(inputs).encode())
    for entry in sorted(machine_files()):
        digest.update(repr(entry).encode())
    return digest.hexdigest()[:12]
