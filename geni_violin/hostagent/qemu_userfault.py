"""Letting go of a guest's memory after a background snapshot that did not complete.

Theory of operation. For ``background-snapshot`` QEMU write-protects the guest's memory with userfaultfd(2), and its
migration thread answers the write faults. When such a migration is cancelled or fails, QEMU 7.2 ends that thread
without undoing the protection: it never calls UFFDIO_UNREGISTER (seen with strace). The next write of a virtual CPU, or
of QEMU's main loop, then waits for ever: the VM hangs though its status is "running", often the monitor with it, and
no later background snapshot is possible. The same writes wait for as long as the receiver does not read.

What QEMU leaves undone can be done from outside. pidfd_getfd(2) gives a duplicate of QEMU's userfaultfd, and its ioctls
work on the memory of the process that made it (ioctl_userfaultfd(2)): removing the protection wakes all who wait,
unregistering makes the next snapshot possible. It also gives a duplicate of the socket that the image goes through, and
shutting that down ends a migration that a hanging monitor cannot be told to cancel. It takes the right to trace the
process (CAP_SYS_PTRACE; root has it).

The protection may only be removed from a migration whose image cannot become complete any more.
"""

import contextlib
import fcntl
import os
import socket
import struct
from pathlib import Path

from geni_violin.hostagent.descriptors import duplicate, duplicates

_UFFDIO_WRITEPROTECT = 0xC018AA06
_UFFDIO_UNREGISTER = 0x8010AA01
_USERFAULTFD = "anon_inode:[userfaultfd]"


def undo_write_protection(pid: int) -> int:
    """Remove all userfaultfd protection from a process's memory. It may be called at any time after the failure, often.

    :return: how many ranges of memory were protected.
    :raise PermissionError: this process may not trace that one.
    """
    released = 0
    for descriptor in duplicates(pid, _USERFAULTFD):
        try:
            released += sum(_release(descriptor, start, length) for start, length in _anonymous_ranges(pid))
        finally:
            os.close(descriptor)
    return released


def break_streams(pid: int) -> int:
    """Shut down the TCP connections of a process: an outgoing migration fails, its receiver sees the end of the stream.

    :return: how many connections there were.
    :raise PermissionError: this process may not trace that one.
    """
    broken = 0
    for descriptor in duplicates(pid, "socket:"):
        with socket.socket(fileno=descriptor) as stream, contextlib.suppress(OSError):
            if stream.family in (socket.AF_INET, socket.AF_INET6):
                stream.shutdown(socket.SHUT_RDWR)
                broken += 1
    return broken


def has_userfaultfd(pid: int) -> bool:
    """Whether a process has a userfaultfd: a background snapshot is under way, or one failed earlier."""
    descriptors = duplicates(pid, _USERFAULTFD)
    for descriptor in descriptors:
        os.close(descriptor)
    return bool(descriptors)


def undo_refusal(pid: int) -> str:
    """Why :func:`undo_write_protection` would fail on this process; empty if it would not."""
    try:
        os.close(duplicate(pid, 0))
    except OSError as error:
        return f"a failed background snapshot could not be undone: pidfd_getfd: {error.strerror}"
    return ""


def _anonymous_ranges(pid: int) -> list[tuple[int, int]]:
    """Start and length of each private, writable mapping without a file or a name (proc(5), maps)."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    ranges = []
    for fields in map(str.split, lines):
        if fields[1] == "rw-p" and len(fields) == 5:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            ranges.append((start, end - start))
    return ranges


def _release(descriptor: int, start: int, length: int) -> bool:
    """Whether the range was registered with this userfaultfd; it is no longer."""
    try:
        fcntl.ioctl(descriptor, _UFFDIO_WRITEPROTECT, struct.pack("QQQ", start, length, 0))
        fcntl.ioctl(descriptor, _UFFDIO_UNREGISTER, struct.pack("QQ", start, length))
    except OSError:  # ENOENT: not registered; ESRCH: the process is gone meanwhile
        return False
    return True
