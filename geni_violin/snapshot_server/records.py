"""Small JSON records in a folder, whole or absent, and what the disk's errors mean."""

import contextlib
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from geni_violin.core.errors import GeniViolinError, InvalidInput, MachineFault, NoSpace
from geni_violin.runtime.processes import sync_folder, write_atomically
from geni_violin.runtime.wire import decode, encode

PARTIAL_SUFFIX = ".partial"
RECORD_SUFFIX = ".json"
_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


@contextlib.contextmanager
def disk_faults(what_failed: str, folder: Path) -> Iterator[None]:
    """Turn the operating system's errors into the project's.

    :raise NoSpace: the disk is full.
    :raise MachineFault: any other error of the disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            hint = f"free space in {folder}, or delete snapshots that are no longer needed"
            raise NoSpace(f"{what_failed}: the snapshot server's disk is full", hint) from error
        raise MachineFault(f"{what_failed}: {error}", f"look at the disk that holds {folder}") from error


def record_path(folder: Path, name: str) -> Path:
    """Where the record of that name is."""
    return folder / f"{name}{RECORD_SUFFIX}"


def record_names(folder: Path) -> list[str]:
    """The names of all records in a folder, sorted."""
    return sorted(path.name.removesuffix(RECORD_SUFFIX) for path in folder.glob(f"*{RECORD_SUFFIX}"))


def read_record(cls: type[T], path: Path) -> T | None:
    """A record; None if there is none.

    :raise MachineFault: it cannot be read.
    """
    try:
        return decode(cls, json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, InvalidInput) as error:
        raise MachineFault(f"{path} cannot be read: {error}", "put it back from a backup, or remove it") from error


def write_record(path: Path, record: Any) -> None:
    """Put a record in its place, durable when this returns.

    :raise InvalidInput: it holds a value that JSON cannot keep.
    :raise NoSpace: the disk is full.
    :raise MachineFault: the disk failed in another way.
    """
    text = json.dumps(encode(record))
    if decode(type(record), json.loads(text)) != record:
        raise InvalidInput(f"{path.stem} holds a value that JSON cannot keep", "expected finite numbers")
    write_file(path, text.encode())


def write_file(path: Path, data: bytes) -> None:
    """Put a file in its place, whole or not at all, and durable when this returns.

    :raise NoSpace: the disk is full.
    :raise MachineFault: the disk failed in another way.
    """
    try:
        with disk_faults(f"{path.name} could not be written", path.parent):
            write_atomically(path, data)
    except GeniViolinError:
        with contextlib.suppress(OSError):
            path.with_name(path.name + PARTIAL_SUFFIX).unlink(missing_ok=True)
        raise


def remove_file(path: Path) -> None:
    """Have a file be gone, durably; it is fine if there is none."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)
