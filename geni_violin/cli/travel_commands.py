"""``snapshot export``, ``import`` and ``verify``: snapshots that travel in files.

A file is written under a name of its own beside FILE, made durable, and only then gets FILE's name; so whatever ends
the command early (Ctrl-C, a full disk, a coordinator that goes away) leaves FILE as it was and nothing beside it.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from geni_violin.cli.client import SLOW_S, connect, path, understood
from geni_violin.cli.printing import Json, line, print_json, print_snapshot, size
from geni_violin.cli.snapshot_commands import SnapshotName, check_choice
from geni_violin.core.errors import AlreadyExists, InvalidInput, MachineFault, NoSpace, NotFound
from geni_violin.core.messages import SnapshotView
from geni_violin.runtime.processes import sync_folder

FORMATS = ("archive", "libvirt", "qemu")
_FULL = (errno.ENOSPC, errno.EDQUOT)


def export_snapshot(
    name: SnapshotName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            help="archive: all of it, for snapshot import. libvirt: one VM, for virsh restore. qemu: for -incoming.",
        ),
    ] = "archive",
    vm: Annotated[str, typer.Option("--vm", metavar="VM", help="Which VM, for libvirt and qemu.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a snapshot into one file."""
    check_choice("--format", form, FORMATS)
    pieces = connect().download_pieces(path("snapshots", name, "export", format=form, vm=vm))
    with new_file(file, force) as target:
        for piece in pieces:
            target.write(piece)
        count = target.tell()
    if as_json:
        print_json({"snapshot": name, "file": str(file), "format": form, "bytes": count})
    else:
        line(f"snapshot {name} is in {file}: {size(count)}, format {form}")


@contextlib.contextmanager
def new_file(file: Path, force: bool) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and durable, and leaves nothing otherwise.

    :param force: whether it may take the place of one that is there.
    :raise AlreadyExists: there is one.
    :raise NoSpace: the disk is full.
    :raise MachineFault: it cannot be written.
    """
    target = file.absolute()
    if not force and os.path.lexists(target):
        raise AlreadyExists(f"{file} exists already", "choose another FILE, or say --force")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        try:
            # It holds what was in the guests' memory.
            partial.touch(mode=0o600, exist_ok=False)
            with partial.open("wb") as opened:
                yield opened
                opened.flush()
                os.fsync(opened.fileno())
            _give_name(partial, target, force)
            sync_folder(target.parent)
        finally:
            partial.unlink(missing_ok=True)
    except FileExistsError as error:
        raise AlreadyExists(f"{file} exists already", "choose another FILE, or say --force") from error
    except OSError as error:
        kind = NoSpace if error.errno in _FULL else MachineFault
        raise kind(f"cannot write {file}: {error.strerror}", "choose another FILE") from error


def _give_name(partial: Path, target: Path, force: bool) -> None:
    if force:
        partial.replace(target)
    else:
        os.link(partial, target)  # unlike a rename it fails if somebody else was faster


def import_snapshot(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What snapshot export wrote, in the format archive.")],
    as_json: Json = False,
) -> None:
    """Take a snapshot in from a file; everything in it is checked before it exists here."""
    with opened(file) as source:
        length = os.fstat(source.fileno()).st_size
        view = understood(SnapshotView, connect().upload(path("snapshots"), source, length))
    print_json(view) if as_json else print_snapshot(view)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A file to read.

    :raise NotFound: there is none.
    :raise InvalidInput: it is something else.
    :raise MachineFault: it cannot be read.
    """
    try:
        with file.open("rb") as source:
            if not file.is_file():
                raise InvalidInput(f"{file} is no file", "expected what geni-violin snapshot export wrote")
            yield source
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {file}") from error
    except OSError as error:
        raise MachineFault(f"cannot read {file}: {error.strerror}") from error


def verify_snapshot(name: SnapshotName, as_json: Json = False) -> None:
    """Read everything of a snapshot back and compare it with its checksums."""
    answer = connect().request("POST", path("snapshots", name, "verify"), timeout_s=SLOW_S)
    view = understood(SnapshotView, answer)
    print_json(view) if as_json else line(f"snapshot {view.name} is whole: {len(view.vms)} images")
