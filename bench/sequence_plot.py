"""Draw TCP streams through a snapshot: time to the right, sequence number up, as in the papers' figures.

Theory of operation. Each stream is drawn from its trace (``bench/tcp_trace.py``). Streams whose cut is known are laid
over one another at it: it is second 0, marked by a line, and the sequence number counts from there, so that whoever
lost time or bytes is below the others afterwards. A stream without a snapshot is laid so that its middle is there. The
lower panel is the same, nearer. Traces have many more points than the figure has pixels; those that would fall onto
the same are left out before drawing.

Usage: ``python -m bench.sequence_plot OUT.png TRACE.json… [--before 2] [--after 4] [--near-ms 150]``.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.tcp_trace import Trace, read_trace

WIDTH_IN, HEIGHT_IN, DOTS_PER_INCH = 8.0, 6.4, 100
STYLES = (("#9aa0a6", "-", 3.0), ("#c5221f", "-", 1.6), ("#1a73e8", "-", 1.6), ("#188038", "-", 1.6))
"""Color, dashes and width of each stream in turn. The first is the one to compare with: broad, gray, behind."""
MAX_POINTS = 4 * round(WIDTH_IN * DOTS_PER_INCH)


@dataclass(frozen=True)
class Curve:
    """A stream as it is drawn: seconds and megabytes from the cut."""

    label: str
    points: list[tuple[float, float]]


def curve_of(trace: Trace) -> Curve:
    """Lay a trace so that its cut (its middle, if it has none) is at the origin."""
    zero_s = trace.cut_s if trace.cut_s is not None else trace.points[-1][0] / 2
    reached = max((seq for t, seq in trace.points if t <= zero_s), default=0)
    points = [(t - zero_s, (seq - reached) / 1e6) for t, seq in trace.points]
    return Curve(label_of(trace), points)


def label_of(trace: Trace) -> str:
    """What the legend says of a stream."""
    again = trace.segments_sent_again
    segments = "no segment" if again == 0 else "1 segment" if again == 1 else f"{again:,} segments"
    return f"{trace.name}: longest stall {_duration(trace.longest_stall_s)}, {segments} sent again"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{1000 * seconds:.0f} ms"
        if seconds >= 0.01
        else f"{1000 * seconds:.1f} ms"
    )


def visible(points: Sequence[tuple[float, float]], left: float, right: float) -> list[tuple[float, float]]:
    """The points between two times, and one to each side for the line; at most about ``MAX_POINTS`` of them.

    Of those in one narrow slot of time, the first, lowest, highest and last are kept, so that steps and segments that
    were sent again look as they would with all points.
    """
    inside = [index for index, (t, _) in enumerate(points) if left <= t <= right]
    if not inside:
        return []
    window = points[max(0, inside[0] - 1) : inside[-1] + 2]
    if len(window) <= MAX_POINTS:
        return list(window)
    slot_s = (right - left) / (MAX_POINTS / 4)
    slots: dict[int, list[int]] = {}
    for index, (t, _) in enumerate(window):
        slots.setdefault(int((t - left) // slot_s), []).append(index)
    kept: set[int] = set()
    for indices in slots.values():
        by_height = sorted(indices, key=lambda index: window[index][1])
        kept |= {indices[0], by_height[0], by_height[-1], indices[-1]}
    return [window[index] for index in sorted(kept)]


def draw(traces: Sequence[Trace], path: Path, before_s: float, after_s: float, near_s: float) -> None:
    """Write the figure as PNG.

    :raise ValueError: no trace, or none has a point in the time that is to be drawn.
    """
    curves = [curve_of(trace) for trace in traces]
    if not any(visible(curve.points, -before_s, after_s) for curve in curves):
        raise ValueError("no trace has anything in the time that is to be drawn")
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DOTS_PER_INCH, layout="constrained")
    whole, near = figure.subplots(2, 1, height_ratios=(3, 2))
    _panel(whole, curves, -before_s, after_s, unit_s=1.0)
    _panel(near, curves, -near_s, near_s, unit_s=0.001)
    whole.set_xlabel("seconds from the receiver's cut")
    near.set_xlabel("milliseconds from the receiver's cut")
    whole.legend(loc="upper left", fontsize=9, frameon=True, framealpha=0.9)
    figure.savefig(path, pil_kwargs={"optimize": True})


def _panel(axes: Axes, curves: Sequence[Curve], left_s: float, right_s: float, unit_s: float) -> None:
    heights: list[float] = []
    for curve, (color, dashes, width) in zip(curves, STYLES, strict=False):
        points = visible(curve.points, left_s, right_s)
        heights += [height for t, height in points if left_s <= t <= right_s]
        times = [t / unit_s for t, _ in points]
        axes.plot(times, [height for _, height in points], dashes, color=color, linewidth=width, label=curve.label)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("cut", (0, 0.02), xycoords=("data", "axes fraction"), xytext=(4, 2), textcoords="offset points")
    axes.set_xlim(left_s / unit_s, right_s / unit_s)
    if heights:
        margin = 0.05 * (max(heights) - min(heights) or 1.0)
        axes.set_ylim(min(heights) - margin, max(heights) + margin)
    axes.set_ylabel("sequence number, MB")
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the PNG to write")
    parser.add_argument("traces", type=Path, nargs="+", help="at most four; the one to compare with first")
    parser.add_argument("--before", type=float, default=2.0, help="seconds before the cut")
    parser.add_argument("--after", type=float, default=4.0, help="seconds after it")
    parser.add_argument("--near-ms", type=float, default=150.0, help="how far the lower panel goes to both sides")
    arguments = parser.parse_args(argv)
    if len(arguments.traces) > len(STYLES):
        parser.error(f"{len(arguments.traces)} traces; expected at most {len(STYLES)}")
    try:
        traces = [read_trace(path) for path in arguments.traces]
        draw(traces, arguments.out, arguments.before, arguments.after, arguments.near_ms / 1000)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
