"""The niceness of a process's threads, on a Python process with threads in the place of QEMU's."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from geni_violin.hostagent.qemu_threads import QemuThreads

THREADS = """
import sys, threading, time
def make(count):
    for _ in range(count):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    print("made", flush=True)
make(2)
sys.stdin.readline()
make(1)
time.sleep(60)
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", THREADS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        _until_made(child)
        yield child
    finally:
        child.kill()
        child.communicate()


def _until_made(child: "subprocess.Popen[str]") -> None:
    assert child.stdout is not None
    assert child.stdout.readline() == "made\n"


def _threads(pid: int) -> set[int]:
    return {int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()}


def _niceness(threads: set[int]) -> set[int]:
    return {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}


@pytest.mark.skipif(os.getuid() != 0, reason="only root may be less nice")
def test_all_but_the_guest_hurry_and_a_stream_steps_back(process: "subprocess.Popen[str]") -> None:
    threads = QemuThreads(process.pid)
    before = _threads(process.pid)
    guest = {max(before)}
    threads.hurry_all_but(guest)
    assert _niceness(before - guest) == {-10}
    assert _niceness(guest) == {0}
    threads.stream_steps_back()  # there is none
    assert _niceness(before - guest) == {-10}
    threads.about_to_stream()
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    _until_made(process)
    stream = _threads(process.pid) - before
    assert _niceness(stream) == {-10}, "a thread is as nice as the one that makes it"
    threads.stream_steps_back()
    assert _niceness(stream) == {0}
    assert _niceness(before - guest) == {-10}


def test_a_process_that_is_gone_is_let_be() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    time.sleep(0.01)
    threads = QemuThreads(child.pid)
    threads.hurry_all_but(())
    threads.about_to_stream()
    threads.stream_steps_back()
