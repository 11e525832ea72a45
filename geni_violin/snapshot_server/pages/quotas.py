"""How many bytes the snapshots of a slice may have added to the store.

What counts is ``stored_bytes`` of the manifests: what a snapshot shares with earlier ones costs nothing. The limits are
one small object, which is overwritten as a whole.
"""

import json
import math
import threading
from collections.abc import Callable, Iterable

from geni_violin.core.errors import InvalidInput, MachineFault, NoSpace, NotFound
from geni_violin.core.messages import Manifest, Quota
from geni_violin.snapshot_server.backends import ObjectBackend
from geni_violin.snapshot_server.names import checked_identifier

_KEY = "quotas.json"
_HINT = "delete snapshots of the slice, or raise its quota"


class Quotas:
    """See the module's theory of operation."""

    def __init__(self, backend: ObjectBackend) -> None:
        self._backend = backend
        self._mutex = threading.Lock()
        self._limits = self._read()

    def all(self, manifests: Iterable[Manifest]) -> list[Quota]:
        """The quotas that are set, by slice."""
        used = list(manifests)
        return [Quota(name, limit, used_bytes(name, used)) for name, limit in sorted(self._limits.items())]

    def set(self, slice_name: str, limit_bytes: int | None) -> None:
        """Set a slice's quota; None: it has none any more.

        :raise InvalidInput: no slice can have that name, or it is negative.
        """
        checked_identifier(slice_name, "slice name")
        if limit_bytes is not None and limit_bytes < 0:
            raise InvalidInput(f"a quota of {limit_bytes} bytes cannot be", "expected 0 or more")
        with self._mutex:
            limits = {name: limit for name, limit in self._limits.items() if name != slice_name}
            if limit_bytes is not None:
                limits[slice_name] = limit_bytes
            self._backend.replace(_KEY, json.dumps(limits, sort_keys=True).encode())
            self._limits = limits

    def left_bytes(self, slice_name: str, manifests: Callable[[], Iterable[Manifest]]) -> float:
        """How much the slice's next snapshot may add; infinite where there is no quota.

        :param manifests: gives all; called only where there is a quota.
        :raise NoSpace: nothing is left.
        """
        limit = self._limits.get(slice_name)
        if limit is None:
            return math.inf
        used = used_bytes(slice_name, manifests())
        if used >= limit:
            raise NoSpace(f"the quota of slice {slice_name} is used up: {used} of {limit} bytes", _HINT)
        return limit - used

    def _read(self) -> dict[str, int]:
        try:
            limits = json.loads(self._backend.get(_KEY))
            if not all(isinstance(limit, int) for limit in limits.values()):
                raise ValueError("expected whole numbers")
        except NotFound:
            return {}
        except (ValueError, AttributeError, RecursionError) as error:
            raise MachineFault(f"the quotas in {_KEY} cannot be read: {error}", "put it right, or remove it") from error
        return dict(limits)


def used_bytes(slice_name: str, manifests: Iterable[Manifest]) -> int:
    """How many bytes a slice's snapshots have added."""
    return sum(vm.stored_bytes for manifest in manifests if manifest.slice.name == slice_name for vm in manifest.vms)
