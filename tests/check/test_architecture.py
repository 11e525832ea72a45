"""docs/architecture.md and docs/hold-invariants.md show the counterexamples as the explorer prints them today."""

from pathlib import Path

import pytest

from geni_violin.check.bounds import LosslessBounds
from geni_violin.check.relaxations import RELAXATIONS, counterexample

DOCS = Path(__file__).parents[2] / "docs"
ARCHITECTURE = (DOCS / "architecture.md").read_text()
HOLD_INVARIANTS = (DOCS / "hold-invariants.md").read_text()


@pytest.mark.parametrize("name", RELAXATIONS)
def test_the_documented_counterexample_is_the_real_one(name: str) -> None:
    relaxation = RELAXATIONS[name]
    found = counterexample(relaxation)
    assert found is not None
    story = "\n".join(f"  {number:2}. {line}" for number, line in enumerate(found.lines, 1))
    told = f"(`--relax {name}`):\n\n```\n{story}\n  Harm: {found.harm}.\n```"
    if isinstance(relaxation.bounds, LosslessBounds):
        assert told in HOLD_INVARIANTS
        assert f"| `{name}` | {found.harm} |" in ARCHITECTURE
    else:
        assert told in ARCHITECTURE
