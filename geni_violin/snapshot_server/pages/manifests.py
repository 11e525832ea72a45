"""Manifests: a snapshot exists if and only if its manifest does.

They are read once and kept in memory, since nobody else changes them; ``reread`` looks at the object again.
"""

import threading

from geni_violin.core.errors import MachineFault, NotFound
from geni_violin.core.messages import Manifest
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.names import is_identifier
from geni_violin.snapshot_server.pages.documents import decode_document, encode_document
from geni_violin.snapshot_server.store import MANIFEST_VERSION

MANIFESTS = "manifests/"
_SUFFIX = ".json"
_NAME = "manifest"


class Manifests:
    """See the module's theory of operation."""

    def __init__(self, backend: ObjectBackend) -> None:
        self._backend = backend
        self._known: dict[str, Manifest] = {}
        self._mutex = threading.Lock()

    def ids(self) -> list[str]:
        """Of which snapshots there is a manifest, readable or not."""
        return [_id_of(key) for key, _size in self._backend.list(MANIFESTS) if key.endswith(_SUFFIX)]

    def exists(self, snapshot_id: str) -> bool:
        """Whether there is one, readable or not."""
        return self._backend.exists(_key(snapshot_id))

    def get(self, snapshot_id: str) -> Manifest | None:
        """A manifest; None if there is none.

        :raise MachineFault: it is damaged, or of another version.
        """
        if not is_identifier(snapshot_id):
            return None
        with self._mutex:
            if snapshot_id in self._known:
                return self._known[snapshot_id]
        return self.reread(snapshot_id)

    def reread(self, snapshot_id: str) -> Manifest | None:
        """A manifest as the backend has it now.

        :raise MachineFault: it is damaged, or of another version.
        """
        key = _key(snapshot_id)
        try:
            data = self._backend.get(key)
        except NotFound:
            return None
        manifest = decode_document(Manifest, _NAME, data, f"the manifest {key}", MANIFEST_VERSION)
        if manifest.id != snapshot_id:
            raise MachineFault(f"the manifest {key} is that of snapshot {manifest.id}")
        with self._mutex:
            self._known[snapshot_id] = manifest
        return manifest

    def all(self) -> list[Manifest]:
        """All manifests, the oldest first.

        :raise MachineFault: one is damaged, or of another version.
        """
        found = [manifest for snapshot_id in self.ids() if (manifest := self.get(snapshot_id)) is not None]
        return sorted(found, key=lambda manifest: (manifest.created_at, manifest.id))

    def find(self, id_or_name: str) -> Manifest:
        """The snapshot of that id, else of that name.

        :raise NotFound: there is none.
        """
        found = self.get(id_or_name)
        if found is None:
            found = next((manifest for manifest in self.all() if manifest.name == id_or_name), None)
        if found is None:
            raise NotFound(f"there is no snapshot {id_or_name!r}", "geni-violin snapshot list shows those that exist")
        return found

    def id_of(self, id_or_name: str) -> str:
        """The id of the snapshot of that id, whose manifest may be damaged, else of that name.

        :raise NotFound: there is none.
        """
        if is_identifier(id_or_name) and self.exists(id_or_name):
            return id_or_name
        return self.find(id_or_name).id

    def confirm(self, snapshot_id: str) -> None:
        """Have a manifest that exists be durable, though the put that made it may have failed."""
        self._backend.confirm(_key(snapshot_id))

    def put(self, manifest: Manifest) -> None:
        """Have the snapshot exist.

        :raise InvalidInput: it holds a value that JSON cannot keep.
        """
        self._backend.put(_key(manifest.id), encode_document(_NAME, manifest))
        with self._mutex:
            self._known[manifest.id] = manifest

    def delete(self, snapshot_id: str) -> None:
        """Have the snapshot not exist."""
        self._backend.delete(_key(snapshot_id))
        with self._mutex:
            self._known.pop(snapshot_id, None)


def _key(snapshot_id: str) -> str:
    return f"{MANIFESTS}{snapshot_id}{_SUFFIX}"


def _id_of(key: str) -> str:
    return key.removeprefix(MANIFESTS).removesuffix(_SUFFIX)
