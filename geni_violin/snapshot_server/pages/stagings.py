"""What is staged, in a local folder: one record for each snapshot that is being taken.

It is local because it is of no use to another server: the streams come to this one. Beside the record of one that a
restart should end (an import's) there is an empty file ``ID.passing``, from before the record is there until after it
is gone.
"""

from pathlib import Path

from geni_violin.core.errors import NotFound
from geni_violin.core.messages import StageRequest
from geni_violin.runtime.processes import sync_folder
from geni_violin.snapshot_server.names import checked_identifier
from geni_violin.snapshot_server.records import (
    PARTIAL_SUFFIX,
    disk_faults,
    read_record,
    record_names,
    record_path,
    remove_file,
    write_record,
)

_MARK = ".passing"


class Stagings:
    """Stagings in a folder, which exists."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, snapshot_id: str) -> StageRequest | None:
        """What is staged under this id.

        :raise InvalidInput: no snapshot can have that id.
        """
        checked_identifier(snapshot_id, "snapshot id")
        return read_record(StageRequest, record_path(self._folder, snapshot_id))

    def get(self, snapshot_id: str) -> StageRequest:
        """What is staged under this id.

        :raise NotFound: nothing.
        """
        staged = self.find(snapshot_id)
        if staged is None:
            raise NotFound(f"no snapshot is staged under the id {snapshot_id}", "it may have been discarded")
        return staged

    def all(self) -> list[StageRequest]:
        """All that is staged."""
        found = (self.find(snapshot_id) for snapshot_id in self.ids())
        return [staged for staged in found if staged is not None]

    def ids(self) -> set[str]:
        """The ids of all that is staged."""
        return set(record_names(self._folder))

    def put(self, request: StageRequest, lasting: bool) -> None:
        """Keep a staging, over a restart if it is a lasting one; durable when this returns."""
        if not lasting:
            with disk_faults(f"the staging of snapshot {request.snapshot_id} cannot be kept", self._folder):
                self._mark(request.snapshot_id).touch()
                sync_folder(self._folder)
        write_record(record_path(self._folder, request.snapshot_id), request)

    def remove(self, snapshot_id: str) -> None:
        """Forget a staging, durably; it is fine if there is none."""
        with disk_faults(f"the staging of snapshot {snapshot_id} cannot be removed", self._folder):
            remove_file(record_path(self._folder, snapshot_id))
            if (mark := self._mark(snapshot_id)).exists():
                mark.unlink()

    def recover(self, published: set[str]) -> None:
        """After a crash: what is half written goes, what was published, and what does not outlive its server."""
        for path in self._folder.glob(f"*{PARTIAL_SUFFIX}"):
            path.unlink()
        for snapshot_id in published:
            record_path(self._folder, snapshot_id).unlink(missing_ok=True)
        for mark in self._folder.glob(f"*{_MARK}"):
            record_path(self._folder, mark.name.removesuffix(_MARK)).unlink(missing_ok=True)
        sync_folder(self._folder)
        for mark in self._folder.glob(f"*{_MARK}"):
            mark.unlink()

    def _mark(self, snapshot_id: str) -> Path:
        return self._folder / f"{snapshot_id}{_MARK}"
