"""What only a folder can do wrong: a crash in the middle, a full disk, a folder without permission."""

import errno
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from geni_violin.core.errors import MachineFault, NoSpace
from geni_violin.snapshot_server.backends.local import LocalBackend

_RUN = """
import sys
from pathlib import Path
from geni_violin.snapshot_server.backends.local import LocalBackend
backend = LocalBackend(Path(sys.argv[1]))
"""
_PUT_WITHOUT_END = (
    _RUN
    + """
with backend.lock("a server that is about to be killed"):
    print("begun", flush=True)
    for number in range(10**6):
        backend.put(f"packs/{number:06}", bytes([number % 256]) * (1 << 20))
        backend.replace("record", bytes([number % 256]) * 1000)
        print(number, flush=True)
"""
)


def test_a_kill_in_the_middle_leaves_whole_objects_and_nothing_else(tmp_path: Path) -> None:
    for run in range(4):
        folder = tmp_path / str(run)
        with subprocess.Popen(
            [sys.executable, "-c", _PUT_WITHOUT_END, str(folder)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            said = [process.stdout.readline() for _ in range(3)]
            time.sleep(0.003 * run)
            process.send_signal(signal.SIGKILL)
            said += process.stdout.readlines()
        assert said[0] == "begun\n"
        backend = LocalBackend(folder)
        with backend.lock("the next server"):
            assert list((folder / ".partial").iterdir()) == []
        promised = [int(line) for line in said[1:] if line.endswith("\n")]
        found = dict(backend.list("packs/"))
        assert found.keys() >= {f"packs/{number:06}" for number in promised}
        assert set(found.values()) == {1 << 20}
        for key in found:
            number = int(key.rpartition("/")[2])
            assert backend.get(key) == bytes([number % 256]) * (1 << 20)
        record = backend.get("record")
        assert record == record[:1] * 1000


def test_what_a_crash_left_unfinished_goes_when_the_store_is_locked(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "store")
    (tmp_path / "store" / ".partial" / "left").write_bytes(b"half of a pack")
    assert list(backend.list()) == []
    with backend.lock("a server"):
        assert list((tmp_path / "store" / ".partial").iterdir()) == []


def test_a_failed_put_leaves_nothing(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path / "store")
    with pytest.raises(MachineFault, match="object a cannot be written"):
        backend.put("a", tmp_path / "no such file")
    assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_everything_is_for_this_user_alone(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        backend = LocalBackend(tmp_path / "new" / "store")
        backend.put("images/a/vm", b"what was in the guest's memory")
    finally:
        os.umask(previous)
    store = tmp_path / "new" / "store"
    assert {path.stat().st_mode & 0o077 for path in [store, *store.rglob("*")]} == {0}


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MachineFault, match="the store cannot be opened"):
        LocalBackend(tmp_path / "file" / "store")


def test_a_folder_without_permission_is_a_machine_fault(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    LocalBackend(folder).put("a", b"1")
    drop = "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    script = f"import os\n{_RUN}\n{drop}\nbackend.put('b', b'2')"
    for path in (folder, folder / ".partial"):
        path.chmod(0o500)
    # pytest's folder is root's alone; what is to be seen is the store's own refusal.
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o711)
    try:
        ended = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    finally:
        for path in (folder, folder / ".partial"):
            path.chmod(0o700)
    assert ended.returncode != 0
    assert "MachineFault" in ended.stderr
    assert "Permission denied" in ended.stderr


def _can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and not subprocess.call(command)


def test_a_full_disk_is_no_space_and_harms_nothing(tmp_path: Path) -> None:
    """The disk is a tmpfs of 4 MiB that only the process under test sees."""
    script = (
        _RUN
        + """
from geni_violin.core.errors import NoSpace
backend.put("small", b"1")
try:
    backend.put("large", bytes(8 << 20))
except NoSpace as error:
    print("no space:", error)
print(list(backend.list()), list((Path(sys.argv[1]) / ".partial").iterdir()))
backend.put("another", b"2" * 1000)
print(backend.get("another") == b"2" * 1000)
"""
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    if not _can_mount():
        pytest.skip("needs root and unshare to mount a small tmpfs; test_a_full_device_is_no_space covers the mapping")
    mount = 'mount -t tmpfs -o size=4m none "$0" && exec "$@"'
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, str(tmp_path), *command], capture_output=True, text=True, check=True
    )
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("no space: object large cannot be written")
    assert lines[1:] == ["[('small', 1)] []", "True"]


def test_a_full_device_is_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full, where the kernel itself answers ENOSPC, takes the place of the file that is being written."""
    backend = LocalBackend(tmp_path)
    original = Path.open

    def to_the_full_device(path: Path, *arguments: object, **options: object) -> object:
        target = Path("/dev/full") if path.parent.name == ".partial" else path
        return original(target, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", to_the_full_device)
    with pytest.raises(NoSpace, match="disk is full"):
        backend.put("a", b"1")
    monkeypatch.undo()
    assert list(backend.list()) == []
    assert list((tmp_path / ".partial").iterdir()) == []


_SIZE = (9 << 20) + 17
"""More than is written at a time, and no whole number of blocks."""


def _aligned() -> memoryview:
    """A buffer that begins at a page, as those of packs do."""
    buffer = mmap.mmap(-1, _SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer[:] = os.urandom(_SIZE)
    return memoryview(buffer)


@pytest.mark.parametrize("refused", ["never", "at once", "after a while"])
def test_a_large_buffer_goes_past_the_cache_as_far_as_the_file_system_lets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    data, opened, written = _aligned(), os.open, os.pwrite
    offsets: list[int] = []

    def opens(path: str, flags: int, *mode: int, **options: int) -> int:
        if flags & os.O_DIRECT and refused == "at once":
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return opened(path, flags & ~os.O_DIRECT, *mode, **options)  # whatever this file system knows of it

    def writes(file: int, part: memoryview, offset: int) -> int:
        offsets.append(offset)
        if refused == "after a while" and len(offsets) > 1:
            raise OSError(errno.EINVAL, "these blocks are too small")
        return written(file, part, offset)

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(os, "pwrite", writes)
    backend = LocalBackend(tmp_path)
    backend.put("packs/a", data)
    assert backend.get("packs/a") == data
    assert offsets == {"never": [0, 4 << 20, 8 << 20], "at once": [], "after a while": [0, 4 << 20]}[refused]


@pytest.mark.parametrize("start", [0, 1])
def test_a_view_is_stored_wherever_it_begins(tmp_path: Path, start: int) -> None:
    data = _aligned()
    backend = LocalBackend(tmp_path)
    backend.put("packs/a", data[start:])
    backend.put("packs/b", data.toreadonly()[start:])
    assert backend.get("packs/a") == backend.get("packs/b") == data[start:]


def test_a_disk_that_fills_past_the_cache_is_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, part: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    backend = LocalBackend(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoSpace, match="disk is full"):
        backend.put("packs/a", _aligned())
    assert list(backend.list()) == []
    assert list((tmp_path / ".partial").iterdir()) == []
