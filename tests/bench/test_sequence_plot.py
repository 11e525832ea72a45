"""The figure of TCP streams through a snapshot."""

import itertools
from pathlib import Path

import pytest
from PIL import Image

from bench.sequence_plot import MAX_POINTS, curve_of, draw, label_of, main, visible
from bench.tcp_trace import Trace, write_trace

STEP_S, STEP_BYTES = 0.0001, 1448
CUT_S = 2.0


def trace(name: str, stall_s: float = 0.0, again: int = 0, cut_s: float | None = CUT_S) -> Trace:
    """Six seconds of a stream at a steady rate, which stands still at the cut for a while."""
    count = round((6.0 - stall_s) / STEP_S)
    times = (index * STEP_S for index in range(count))
    points = tuple((t if t <= CUT_S else t + stall_s, (index + 1) * STEP_BYTES) for index, t in enumerate(times))
    return Trace(
        name=name,
        began_at=0.0,
        points=points,
        stream_bytes=count * STEP_BYTES,
        longest_stall_s=stall_s or STEP_S,
        longest_stall_from_s=CUT_S,
        segments=count,
        segments_sent_again=again,
        cut_s=cut_s,
    )


THREE = (
    trace("no snapshot", cut_s=None),
    trace("stop, drop", stall_s=0.9, again=37),
    trace("background, hold", stall_s=0.006),
)


def test_the_figure_is_a_small_png_that_shows_all_three(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    draw(THREE, path, before_s=2.0, after_s=4.0, near_s=0.15)
    assert path.stat().st_size < 150_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width <= 1000
        colors = image.convert("RGB").getcolors(maxcolors=1 << 20)
    assert colors is not None
    by_color = {color: count for count, color in colors}
    assert all(by_color.get(wanted, 0) > 300 for wanted in ((0x9A, 0xA0, 0xA6), (0xC5, 0x22, 0x1F), (0x1A, 0x73, 0xE8)))


def test_streams_meet_at_the_cut() -> None:
    for one in THREE[1:]:
        curve = curve_of(one)
        assert min(curve.points, key=lambda point: abs(point[0])) == pytest.approx((0.0, 0.0), abs=1e-6)
    no_cut = curve_of(THREE[0])
    assert no_cut.points[0][0] == pytest.approx(-3.0, abs=0.001)


def test_the_legend_tells_the_stall_and_what_was_sent_again() -> None:
    assert [label_of(one) for one in THREE] == [
        "no snapshot: longest stall 0.1 ms, no segment sent again",
        "stop, drop: longest stall 900 ms, 37 segments sent again",
        "background, hold: longest stall 6.0 ms, no segment sent again",
    ]
    assert label_of(trace("x", stall_s=1.234, again=1)) == "x: longest stall 1.23 s, 1 segment sent again"


def test_thinning_keeps_the_stall_and_single_old_segments() -> None:
    points = list(curve_of(THREE[1]).points)
    points.insert(50_000, (points[50_000][0], -7.0))
    kept = visible(points, -2.0, 4.0)
    assert len(kept) <= MAX_POINTS + 8
    assert kept == sorted(kept, key=lambda point: point[0])
    assert (points[50_000][0], -7.0) in kept
    gap_s = max(later[0] - earlier[0] for earlier, later in itertools.pairwise(kept))
    assert gap_s == pytest.approx(0.9, abs=0.01)


def test_a_window_without_points_is_empty_and_a_small_one_whole() -> None:
    points = [(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    assert visible(points, 5.0, 6.0) == []
    assert visible(points, 0.5, 1.5) == points[:3]


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    late = trace("x", cut_s=-100.0)
    with pytest.raises(ValueError, match="no trace has anything"):
        draw([late], tmp_path / "figure.png", before_s=2.0, after_s=4.0, near_s=0.15)


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{index}.json" for index in range(3)]
    for one, path in zip(THREE, paths, strict=True):
        write_trace(one, path)
    assert main([str(tmp_path / "out.png"), *map(str, paths)]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(tmp_path / "out.png"), str(tmp_path / "missing.json")]) == 2
    assert "missing.json" in capsys.readouterr().err
