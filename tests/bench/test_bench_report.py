"""How benchmarks show their figures."""

import json
from pathlib import Path

import pytest

from bench.report import Spread, Target, finish, spread, table


def test_a_spread_has_values_that_were_measured() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(3, 1.0, 2.0, 3.0, 3.0)
    assert spread(float(value) for value in range(1, 301)).p99 == 297.0
    assert spread([5.0]) == Spread(1, 5.0, 5.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="nothing was measured"):
        spread([])


def test_columns_are_aligned() -> None:
    text = table("Title", ("", "a", "long name"), [("first row", "1", "2"), ("x", "10,000", "3")])
    assert text == "\n".join(
        [
            "Title",
            "                  a  long name",
            "  first row       1          2",
            "  x          10,000          3",
        ]
    )


def test_targets() -> None:
    assert Target("x", 1.0, 1.0).is_met
    assert not Target("x", 1.1, 1.0).is_met
    assert Target("x", 1.1, 1.0, at_most=False).is_met
    assert str(Target("recolor, median", 2.5, 2.0, "ms")) == "recolor, median: 2.5 ms, at most 2 ms: MISSED"
    assert str(Target("share", 0.98, 0.97, at_most=False)) == "share: 0.98, at least 0.97: met"


def test_a_missed_target_ends_with_1_and_is_in_the_file(tmp_path: Path) -> None:
    met, missed = Target("x", 1.0, 1.0), Target("y", 2.0, 1.0)
    assert finish("name", {}, [met], None) == 0
    assert finish("name", {"a": [1]}, [met, missed], tmp_path / "out.json") == 1
    document = json.loads((tmp_path / "out.json").read_text())
    assert (document["benchmark"], document["figures"]) == ("name", {"a": [1]})
    assert [target["met"] for target in document["targets"]] == [True, False]
