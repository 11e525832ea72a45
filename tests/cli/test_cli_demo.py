"""What the demonstration reads from the guests, how it tells its story, and that it deletes nobody else's state."""

import base64
import gzip
import hashlib
import io
import signal
from pathlib import Path

import pytest
from PIL import Image

from geni_violin.cli.demo import MARKER, _alone, _installation, write_png
from geni_violin.cli.demo_guest import GuestReport, job_of
from geni_violin.cli.narration import Narrator
from geni_violin.core.errors import Conflict, InvalidInput, MachineFault
from geni_violin.core.model import Image as GuestImage
from geni_violin.core.model import VmSpec
from geni_violin.runtime.settings import Settings

PICTURE = b"P6\n2 1\n255\n" + bytes((255, 0, 0, 0, 0, 255))


def result_lines(picture: bytes, checksum_of: bytes | None = None) -> list[str]:
    """What a guest says at the end."""
    text = base64.encodebytes(gzip.compress(picture)).decode().split()
    checksum = hashlib.sha256(picture if checksum_of is None else checksum_of).hexdigest()
    return [f"GV-RESULT-BEGIN {checksum}", *text, "GV-RESULT-END"]


def report_of(*lines: str) -> GuestReport:
    """The report after these lines."""
    report = GuestReport()
    for line in lines:
        report.take(line)
    return report


def test_progress_and_result_among_other_lines() -> None:
    report = report_of(
        "[ 0.1] Linux", "", "GV-READY n1", "GV-PROGRESS 9 900", "GV-PROGRESS x 900", "GV-PROGRESS 18 900"
    )
    assert (report.ready, report.done, report.rows, report.picture) == (True, 18, 900, None)
    for line in result_lines(PICTURE):
        report.take(line)
    assert report.picture == PICTURE


def test_a_damaged_result_is_refused() -> None:
    with pytest.raises(MachineFault, match="another checksum"):
        report_of(*result_lines(PICTURE, checksum_of=b"other"))
    lines = result_lines(PICTURE)
    with pytest.raises(MachineFault, match="did not come through the console whole"):
        report_of(lines[0], lines[1][:10], lines[-1])


def test_a_program_that_fails() -> None:
    with pytest.raises(MachineFault, match="the program in the guests failed: 3: out of luck"):
        report_of("GV-FAILED 3: out of luck")


def test_the_job_is_read_from_the_kernel_command_line() -> None:
    append = "quiet gv.width=1200 gv.height=900 gv.iterations=11000"
    vm = VmSpec("n1", 1, "h1", "s1", "10.9.0.1/24", "52:54:00:00:00:01", GuestImage("k", "i", append))
    assert job_of(vm) == ("1200", "900", "11000")


def test_the_picture_as_png(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    write_png(PICTURE, path)
    with Image.open(path) as image:
        assert (image.format, image.size, image.convert("RGB").tobytes()) == ("PNG", (2, 1), PICTURE[-6:])


def test_without_a_terminal_the_story_is_plain_lines() -> None:
    out = io.StringIO()
    narrator = Narrator(out)
    narrator.heading("1. A slice")
    narrator.say("[bold]not markup[/bold] " + "x" * 200)
    with narrator.bar("rows") as move:
        for done in range(0, 901, 9):
            move(done, 900)
    text = out.getvalue()
    assert "\x1b" not in text
    assert "  [bold]not markup[/bold] " + "x" * 200 + "\n" in text
    assert [line for line in text.splitlines() if "rows" in line] == [
        f"  rows: {done} of 900" for done in range(0, 901, 90)
    ]


def test_the_demonstration_never_takes_a_real_installations_folder(tmp_path: Path) -> None:
    (tmp_path / "coordinator.sqlite").touch()
    with pytest.raises(InvalidInput, match="is not a demonstration's"), _alone(Settings(state_dir=tmp_path)):
        pass
    assert (tmp_path / "coordinator.sqlite").exists()


def test_one_demonstration_at_a_time(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "demo")
    with _alone(settings), pytest.raises(Conflict, match="another demonstration runs"), _alone(settings):
        pass


def test_it_begins_empty_and_ends_with_logs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geni_violin.cli.demo.take_down", lambda _settings, _say: None)
    settings, before = Settings(state_dir=tmp_path / "demo"), signal.getsignal(signal.SIGTERM)
    for name in ("store", "log"):
        (settings.state_dir / name).mkdir(parents=True)
    (settings.state_dir / MARKER).touch()
    with pytest.raises(MachineFault, match="half-way"), _installation(settings, Narrator(io.StringIO())):
        assert [path.name for path in settings.state_dir.iterdir()] == [MARKER]
        for name in ("store", "log"):
            (settings.state_dir / name).mkdir()
        raise MachineFault("half-way")
    assert sorted(path.name for path in settings.state_dir.iterdir()) == ["log", MARKER]
    assert signal.getsignal(signal.SIGTERM) is before
