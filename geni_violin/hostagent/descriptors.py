"""Duplicates of another process's file descriptors (pidfd_getfd(2)).

What a process leaves undone, or set too small, can be done from outside: a duplicate is the same open file. It takes
the right to trace the process (CAP_SYS_PTRACE; root has it).
"""

import contextlib
import ctypes
import errno
import os
from pathlib import Path

_PIDFD_GETFD = 438
_LIBC = ctypes.CDLL(None, use_errno=True)


def duplicates(pid: int, kind: str) -> list[int]:
    """Duplicates of a process's descriptors whose link in /proc begins with ``kind``; the caller closes them.

    :raise PermissionError: this process may not trace that one.
    """
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in list(Path(f"/proc/{pid}/fd").iterdir()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if str(entry.readlink()).startswith(kind):
                    found.append(duplicate(pid, int(entry.name)))
    return found


def duplicate(pid: int, descriptor: int) -> int:
    """A duplicate of one descriptor of a process; the caller closes it.

    :raise FileNotFoundError: it has none of that number.
    :raise OSError: there is no such process, or this one may not trace it.
    """
    pidfd = os.pidfd_open(pid)
    try:
        copy: int = _LIBC.syscall(_PIDFD_GETFD, pidfd, descriptor, 0)
    finally:
        os.close(pidfd)
    if copy >= 0:
        return copy
    number = ctypes.get_errno()
    if number == errno.EBADF:
        raise FileNotFoundError(number, os.strerror(number))
    raise OSError(number, os.strerror(number))
