"""Programs that share one session, so that the kernel weighs them against one another by their niceness.

Theory of operation. With autogroups (sched(7); Debian has them) each session gets an equal part of the processors, and
niceness counts only within a session. If every part and every VM were a session of its own, a VM that computes would
keep its own monitor, and the agent that wants it cut, waiting; measured, that doubles the time that frames wait at a
cut. So the parts that one ``up`` starts are started by one short-lived process, this module, which leads a new session;
what the parts start stays in it. A session goes on without its leader. Each program is the leader of a process group,
so that no signal from a terminal reaches it.

This process speaks in lines of JSON: a request on stdin for each program, and on stdout its id, or why there is none.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from geni_violin.core.errors import MachineFault
from geni_violin.runtime.scheduling import set_session_niceness

_SESSION_NICENESS = -5
"""Towards all other sessions: at a cut frames wait."""
_SIGNALS_THAT_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class NewSession:
    """A session in which programs can be started until the block ends; they outlive it."""

    def __init__(self) -> None:
        self._leader: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._leader is not None:
            self._leader.communicate()

    def spawn(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], record: Callable[[int], None]
    ) -> None:
        """Start a program that appends what it says to ``log``.

        :param record: writes its process id down. A signal that ends this process waits until that is done, so that no
            program runs that nobody knows of.
        :raise MachineFault: it cannot be started.
        """
        leader = self._leading()
        with _no_end():
            record(_started(leader, command, log, environment))

    def _leading(self) -> "subprocess.Popen[str]":
        """The process that leads the session: made when it is first needed."""
        if self._leader is None:
            self._leader = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],  # nothing is imported from the folder that `up` is typed in
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        return self._leader


@contextlib.contextmanager
def _no_end() -> Iterator[None]:
    """Signals that end this process wait meanwhile.

    They are caught, not blocked: a thread's mask does not keep the others from being given them, and then it is the
    main thread all the same that Python interrupts. Any other thread is interrupted by none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in _SIGNALS_THAT_END}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for one in came:
            signal.raise_signal(one)


def _started(leader: "subprocess.Popen[str]", command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """The process id of a program that the leader has started."""
    assert leader.stdin is not None
    assert leader.stdout is not None
    request = {"command": list(command), "log": str(log), "environment": dict(environment)}
    try:
        leader.stdin.write(json.dumps(request) + "\n")
        leader.stdin.flush()
        answer = json.loads(leader.stdout.readline() or '{"error": "its session has ended"}')
    except BrokenPipeError:
        answer = {"error": "its session has ended"}
    if "error" in answer:
        raise MachineFault(f"cannot start {command[0]}: {answer['error']}")
    return int(answer["pid"])


def _start(request: dict[str, object]) -> dict[str, object]:
    """What a request comes to."""
    try:
        with Path(str(request["log"])).open("ab") as log:
            child = subprocess.Popen(
                request["command"],  # type: ignore[call-overload]
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=request["environment"],
                cwd="/",
                process_group=0,
            )
    except OSError as error:
        return {"error": error.strerror or str(error)}
    return {"pid": child.pid}


def _lead() -> None:
    set_session_niceness(os.getpid(), _SESSION_NICENESS)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_start(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _lead()
