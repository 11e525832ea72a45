"""One contract for every home of objects: in this process, in a folder, in a real Swift through its S3 interface."""

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from backend_harness import Home, local_home, memory_home, s3_home, with_bucket
from swift_harness import Swift, swift_in

from geni_violin.core.errors import AlreadyExists, InvalidInput, MachineFault, NotFound


@pytest.fixture(scope="module")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swift]:
    """A Swift for all tests of this module."""
    with swift_in(tmp_path_factory.mktemp("swift")) as running, with_bucket(running) as ready:
        yield ready


@pytest.fixture(params=["memory", "local", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    """Each kind of store, empty."""
    if request.param == "memory":
        return memory_home()
    if request.param == "local":
        return local_home(tmp_path / "store")
    return s3_home(request.getfixturevalue("swift"), f"tests/{uuid.uuid4().hex}")


def test_what_was_put_is_there_for_everybody(home: Home) -> None:
    home.backend.put("packs/0001", b"pages")
    again = home.open_again()
    assert again.get("packs/0001") == b"pages"
    assert again.size("packs/0001") == 5
    assert again.exists("packs/0001")
    assert not again.exists("packs/0002")


def test_an_object_is_written_once(home: Home) -> None:
    home.backend.put("manifests/a", b"first")
    with pytest.raises(AlreadyExists, match="manifests/a"):
        home.backend.put("manifests/a", b"second")
    assert home.backend.get("manifests/a") == b"first"


def test_of_many_who_put_at_once_the_bytes_of_one_that_succeeded_stay(home: Home) -> None:
    barrier = threading.Barrier(6)

    def put(number: int) -> bool:
        barrier.wait()
        try:
            home.backend.put("one", bytes([number]) * 10_000)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = [number for number, success in enumerate(pool.map(put, range(6))) if success]
    assert len(won) == 1 or (home.kind == "s3" and won)  # Swift lets more than one believe that it was the first
    assert home.backend.get("one") in [bytes([number]) * 10_000 for number in won]


def test_put_takes_a_view_and_a_file(home: Home, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    file = tmp_path / "pack"
    file.write_bytes(data)
    home.backend.put("from-a-file", file)
    home.backend.put("from-a-view", memoryview(data)[1:])
    file.write_bytes(b"changed")
    assert home.backend.get("from-a-file") == data
    assert home.backend.get("from-a-view") == data[1:]


def test_what_exists_can_be_confirmed(home: Home) -> None:
    home.backend.put("manifests/a", b"first")
    home.backend.confirm("manifests/a")
    with pytest.raises(NotFound):
        home.backend.confirm("manifests/b")


def test_an_empty_object_is_an_object(home: Home) -> None:
    home.backend.put("empty", b"")
    assert home.backend.get("empty") == b""
    assert list(home.backend.list()) == [("empty", 0)]


def test_replace_creates_and_overwrites(home: Home) -> None:
    home.backend.replace("quotas", b"old and longer")
    home.backend.replace("quotas", b"new")
    assert home.open_again().get("quotas") == b"new"


def test_a_reader_sees_the_old_or_the_new_bytes_of_a_replaced_object(home: Home) -> None:
    versions = [bytes([number]) * 50_000 for number in range(8)]
    home.backend.replace("record", versions[0])

    def replace_by_each() -> None:
        for data in versions:
            home.backend.replace("record", data)

    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(replace_by_each)
        while not writing.done():
            assert home.backend.get("record") in versions
        writing.result()


@pytest.mark.parametrize(("start", "length"), [(0, 10), (3, 4), (9, 1), (0, 0), (10, 0)])
def test_a_range_is_exactly_that(home: Home, start: int, length: int) -> None:
    home.backend.put("digits", b"0123456789")
    assert home.backend.get_range("digits", start, length) == b"0123456789"[start : start + length]


@pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (100, 1)])
def test_a_range_beyond_the_end_is_a_fault(home: Home, start: int, length: int) -> None:
    home.backend.put("digits", b"0123456789")
    with pytest.raises(MachineFault, match="digits"):
        home.backend.get_range("digits", start, length)


def test_a_range_before_the_beginning_is_refused(home: Home) -> None:
    home.backend.put("digits", b"0123456789")
    for start, length in ((-1, 2), (5, -1)):
        with pytest.raises(InvalidInput, match="no range"):
            home.backend.get_range("digits", start, length)


def test_what_is_absent_is_not_found(home: Home) -> None:
    for ask in (home.backend.get, home.backend.size, lambda key: home.backend.get_range(key, 0, 1)):
        with pytest.raises(NotFound, match="packs/none"):
            ask("packs/none")
    with pytest.raises(NotFound):
        home.backend.get_range("packs/none", 0, 0)


def test_list_gives_what_is_below_a_prefix_by_key(home: Home) -> None:
    for key in ("b/2", "b/10", "b-1", "b.1", "b/1/x", "a", "bb/1"):
        home.backend.put(key, key.encode())
    assert list(home.backend.list("b/")) == [("b/1/x", 5), ("b/10", 4), ("b/2", 3)]
    assert [key for key, _ in home.backend.list()] == sorted(["b/2", "b/10", "b-1", "b.1", "b/1/x", "a", "bb/1"])
    assert list(home.backend.list("none/")) == []


def test_delete_is_for_good_and_may_be_repeated(home: Home) -> None:
    home.backend.put("images/a/vm", b"1")
    home.backend.delete("images/a/vm")
    home.backend.delete("images/a/vm")
    assert not home.open_again().exists("images/a/vm")
    home.backend.put("images/a/vm", b"2")
    assert home.backend.get("images/a/vm") == b"2"


def test_objects_of_one_folder_come_and_go_at_once(home: Home) -> None:
    """A folder that becomes empty may be removed just when another object is put into it."""

    def come_and_go(number: int) -> None:
        for turn in range(5):
            home.backend.put(f"images/x/{number}", bytes([turn]))
            assert home.backend.get(f"images/x/{number}") == bytes([turn])
            home.backend.delete(f"images/x/{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    assert list(home.backend.list()) == []


@pytest.mark.parametrize(
    "key", ["", "/", "/etc/passwd", "..", "a/../b", "a//b", "a/", ".hidden", "a/.b", "a\nb", "a b", "é", "a/" * 9 + "a"]
)
def test_a_key_that_could_leave_the_store_is_refused(home: Home, key: str) -> None:
    for act in (
        home.backend.get,
        home.backend.size,
        home.backend.exists,
        home.backend.delete,
        lambda key: home.backend.put(key, b""),
        lambda key: home.backend.replace(key, b""),
        lambda key: home.backend.get_range(key, 0, 1),
    ):
        with pytest.raises(InvalidInput, match="cannot be an object's key"):
            act(key)
    assert list(home.backend.list()) == []


@pytest.mark.parametrize("prefix", ["a", "../", "/", "a//", ".lock/"])
def test_a_prefix_of_half_a_name_is_refused(home: Home, prefix: str) -> None:
    with pytest.raises(InvalidInput, match="prefix"):
        home.backend.list(prefix)


def test_one_server_a_store(home: Home) -> None:
    other = home.open_again()
    with (
        home.backend.lock("the first server"),
        pytest.raises(MachineFault, match="the first server"),
        other.lock("the second server"),
    ):
        pytest.fail("two servers are in")
    with other.lock("the second server"):
        home.backend.put("a", b"1")
    with home.backend.lock("the first server, again"):
        assert [key for key, _ in home.backend.list()] == ["a"]


def test_of_several_servers_that_start_at_once_one_at_most_gets_in(home: Home) -> None:
    backends = [home.open_again() for _ in range(3)]
    barrier, done = threading.Barrier(3), threading.Barrier(3)

    def get_in(number: int) -> bool:
        barrier.wait()
        try:
            with backends[number].lock(f"server {number}"):
                done.wait()
                return True
        except MachineFault:
            done.wait()
            return False

    with ThreadPoolExecutor(3) as pool:
        inside = sum(pool.map(get_in, range(3)))
    assert inside == 1 or (home.kind == "s3" and inside == 0)


def test_free_bytes_is_a_number_or_unknown(home: Home) -> None:
    free = home.backend.free_bytes()
    assert free is None if home.kind == "s3" else free is not None and free > 0
