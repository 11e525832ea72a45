"""Programs that share a session."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from geni_violin.core.errors import MachineFault
from geni_violin.runtime.session import NewSession

PATIENCE_S = 10.0


def _until_says(log: Path, words: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while words not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, f"{log} does not say {words!r}"
        time.sleep(0.01)


def test_programs_share_a_session_that_is_not_ours_and_outlive_the_block(tmp_path: Path) -> None:
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    pids: list[int] = []
    with NewSession() as session:
        for log in logs:
            session.spawn(["sh", "-c", "echo $WORD; exec sleep 60"], log, {"WORD": log.name}, pids.append)
        for log in logs:
            _until_says(log, log.name)
    try:
        sessions = {os.getsid(pid) for pid in pids}
        assert len(sessions) == 1
        assert os.getsid(0) not in sessions
        assert [os.getpgid(pid) for pid in pids] == pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def test_a_program_that_is_not_there_is_told_and_the_next_one_starts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with NewSession() as session:
        with pytest.raises(MachineFault, match="cannot start /no/such: No such file"):
            session.spawn(["/no/such"], log, {}, lambda pid: pytest.fail(f"recorded {pid}"))
        session.spawn(["sh", "-c", "echo here"], log, dict(os.environ), lambda pid: None)
        _until_says(log, "here")


def test_a_signal_that_ends_the_starter_waits_until_the_program_is_recorded(tmp_path: Path) -> None:
    """And the program inherits nothing of that."""
    log, recorded = tmp_path / "log", list[int]()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts these tests may have it ignored
    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()  # the kernel may give the signal to any thread

    def record(pid: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        recorded.append(pid)

    words = ["sh", "-c", "grep SigBlk /proc/self/status; exec sleep 60"]
    with NewSession() as session:
        with pytest.raises(KeyboardInterrupt):
            session.spawn(words, log, dict(os.environ), record)
        assert len(recorded) == 1
        _until_says(log, "SigBlk:\t0000000000000000")
    over.set()
    os.kill(recorded[0], signal.SIGTERM)
