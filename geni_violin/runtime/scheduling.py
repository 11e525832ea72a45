"""What lets a process run when it is needed: niceness, that of its session, and no pauses of its garbage collector."""

import contextlib
import gc
import os
import threading
from pathlib import Path


def with_niceness(niceness: int, command: list[str]) -> list[str]:
    """A command that runs with this niceness, whatever that of this process is (nice(1)); as it is if they are equal.

    Without the right to be less nice it runs all the same, as nice as it is.
    """
    relative = niceness - os.getpriority(os.PRIO_PROCESS, 0)
    return ["nice", "-n", str(relative), *command] if relative else command


def set_session_niceness(pid: int, niceness: int) -> None:
    """Have a process's session be that nice to other sessions.

    With autogroups (sched(7); Debian has them) the niceness of processes is compared only within a session, and that of
    sessions among one another is what their /proc/PID/autogroup says. Nothing happens without autogroups, the right to
    do it, or the process.
    """
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))


def let_others_go_first(by: int) -> None:
    """Have the calling thread be nicer by so much than it is: on Linux niceness is each thread's own (sched(7))."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + by)


def forget_garbage() -> None:
    """Keep the garbage collector from ever looking again at what is loaded by now: measured, 60 ms at a time."""
    gc.collect()
    gc.freeze()
