"""Programs that share a session."""

import os
import signal
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
    with NewSession() as session:
        pids = [session.spawn(["sh", "-c", "echo $WORD; exec sleep 60"], log, {"WORD": log.name}) for log in logs]
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
            session.spawn(["/no/such"], log, {})
        session.spawn(["sh", "-c", "echo here"], log, dict(os.environ))
        _until_says(log, "here")
