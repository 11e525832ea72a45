"""Files of the command line: whole or absent, never in the place of another by accident."""

from pathlib import Path

import pytest

from geni_violin.cli.travel_commands import new_file, opened
from geni_violin.core.errors import AlreadyExists, InvalidInput, MachineFault, NoSpace, NotFound


def test_a_file_is_whole_and_for_this_user_alone(tmp_path: Path) -> None:
    with new_file(tmp_path / "out", force=False) as file:
        file.write(b"archive")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").read_bytes() == b"archive"
    assert (tmp_path / "out").stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MachineFault("the snapshot server went away")])
def test_whatever_ends_it_early_leaves_nothing(tmp_path: Path, error: BaseException | type[BaseException]) -> None:
    with pytest.raises(BaseException) as caught, new_file(tmp_path / "out", force=False) as file:
        file.write(b"half")
        raise error
    assert isinstance(caught.value, KeyboardInterrupt | MachineFault)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(AlreadyExists, match="--force"), new_file(tmp_path / "out", force=False):
        pytest.fail("it was opened")
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "out", force=True) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "out").read_bytes() == b"mine"
    with new_file(tmp_path / "out", force=True) as file:
        file.write(b"new")
    assert (tmp_path / "out").read_bytes() == b"new"


def test_a_file_that_comes_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(AlreadyExists), new_file(tmp_path / "out", force=False) as file:
        file.write(b"new")
        (tmp_path / "out").write_bytes(b"somebody else's")
    assert (tmp_path / "out").read_bytes() == b"somebody else's"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineFault, match="none/out"), new_file(tmp_path / "none" / "out", force=False):
        pytest.fail("it was opened")


def test_a_full_disk_is_no_space(tmp_path: Path) -> None:
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    with full, pytest.raises(NoSpace, match="cannot write"), new_file(tmp_path / "out", force=False):
        full.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no file"), opened(tmp_path / "none"):
        pytest.fail("it was opened")
    with pytest.raises((InvalidInput, MachineFault)), opened(tmp_path):
        pytest.fail("it was opened")
