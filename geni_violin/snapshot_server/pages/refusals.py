"""What is refused of a staging when the store is looked at. Pure."""

from collections.abc import Iterable

from geni_violin.core.errors import AlreadyExists, NoSpace
from geni_violin.core.messages import Manifest, StageRequest


def check_names_free(request: StageRequest, snapshots: Iterable[Manifest], stagings: Iterable[StageRequest]) -> None:
    """Check that neither the name nor the id is a name or an id already: both are looked up by the same word.

    :raise AlreadyExists: one is.
    """
    taken = {text: "exists" for manifest in snapshots for text in (manifest.id, manifest.name)}
    for staged in stagings:
        taken |= {staged.snapshot_id: "is being taken", staged.name: "is being taken"}
    for text in (request.name, request.snapshot_id):
        if text in taken:
            raise AlreadyExists(f"a snapshot {text!r} {taken[text]} already", "choose another name")


def check_room(what: str, needed_bytes: int, free_bytes: int, reserved_bytes: int, where: str) -> None:
    """Check that there is room.

    :param what: what it is for.
    :param reserved_bytes: how much of what is free was promised.
    :param where: what people call the place.
    :raise NoSpace: there is none.
    """
    if needed_bytes > free_bytes - reserved_bytes:
        figures = (
            f"it may need {needed_bytes} bytes, {free_bytes} are free, {reserved_bytes} of them reserved by snapshots"
        )
        hint = f"free space in {where}, or delete snapshots that are no longer needed"
        raise NoSpace(f"no room for {what}: {figures}", hint)
