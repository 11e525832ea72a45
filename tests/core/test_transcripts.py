"""The golden transcripts, replayed.

After an intended change: ``UPDATE_TRANSCRIPTS=1 pytest tests/core``, and read the diff.
"""

import os
from pathlib import Path

import pytest
from core_transcript import replay

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_a_transcript_is_what_the_machine_does(path: Path) -> None:
    written = path.read_text()
    replayed = replay(written)
    if os.environ.get("UPDATE_TRANSCRIPTS"):
        path.write_text(replayed)
        return
    assert replayed == written


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 12
