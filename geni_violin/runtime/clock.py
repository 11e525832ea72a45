"""The one module that reads a clock. Everything else gets the time as an argument."""

import time


def wall_s() -> float:
    """Seconds since 1970, for what people read."""
    return time.time()


def monotonic_ms() -> float:
    """Milliseconds on a clock that never jumps, for deadlines and durations."""
    return time.monotonic() * 1000.0
