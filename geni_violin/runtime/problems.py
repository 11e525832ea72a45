"""The one place that maps errors to exit codes and to HTTP problem documents (RFC 9457), and back.

A part that fails answers with ``{"type", "title", "status", "detail", "hint"}``; the part that asked raises the same
class again, so that an error keeps its meaning, and whose fault it is, across the network.
"""

from dataclasses import dataclass
from typing import Any

from geni_violin.core.errors import (
    AlreadyExists,
    Conflict,
    ConsistencyViolation,
    GeniViolinError,
    InvalidInput,
    MachineFault,
    NoSpace,
    NotFound,
    PeerFault,
)

PROBLEM_MEDIA_TYPE = "application/problem+json"
UNEXPECTED_EXIT_CODE = 70


@dataclass(frozen=True)
class Mapping:
    """How one class of errors is shown outside."""

    slug: str
    status: int
    exit_code: int


MAPPINGS: dict[type[GeniViolinError], Mapping] = {
    InvalidInput: Mapping("invalid-input", 422, 2),
    NotFound: Mapping("not-found", 404, 3),
    AlreadyExists: Mapping("already-exists", 409, 4),
    Conflict: Mapping("conflict", 409, 5),
    MachineFault: Mapping("machine-fault", 503, 6),
    NoSpace: Mapping("no-space", 507, 7),
    PeerFault: Mapping("peer-fault", 502, 8),
    ConsistencyViolation: Mapping("consistency-violation", 500, UNEXPECTED_EXIT_CODE),
    GeniViolinError: Mapping("internal-error", 500, UNEXPECTED_EXIT_CODE),
}
_CLASS_BY_SLUG = {mapping.slug: cls for cls, mapping in MAPPINGS.items()}


def mapping_of(error: GeniViolinError) -> Mapping:
    """The mapping of an error's nearest mapped class."""
    return next(MAPPINGS[cls] for cls in type(error).__mro__ if cls in MAPPINGS)


def problem_document(error: GeniViolinError) -> dict[str, Any]:
    """The problem document of an error."""
    mapping = mapping_of(error)
    return {
        "type": f"urn:geni-violin:problem:{mapping.slug}",
        "title": mapping.slug.replace("-", " "),
        "status": mapping.status,
        "detail": error.message,
        "hint": error.hint,
    }


def error_from_problem(document: dict[str, Any], status: int) -> GeniViolinError:
    """The error that a problem document stands for; a plain :class:`PeerFault` if it is none of ours."""
    slug = str(document.get("type", "")).rpartition(":")[2]
    message = str(document.get("detail", f"the answer was HTTP status {status}"))
    return _CLASS_BY_SLUG.get(slug, PeerFault)(message, str(document.get("hint", "")))
