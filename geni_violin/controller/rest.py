"""The controller's REST interface on Ryu's WSGI; ``docs/protocol.md`` is its reference.

Theory of operation. A route decodes, delegates to :class:`Operations` and encodes. Every error, a wrong path included,
is a problem document.
"""

import functools
import json
import logging
from collections.abc import Callable
from typing import Any

from ryu.app.wsgi import ControllerBase, Response, WSGIApplication, route

from geni_violin.controller.operations import LOG, Operations
from geni_violin.core.errors import GeniViolinError, InvalidInput, NotFound
from geni_violin.core.messages import ArmRequest, DisarmRequest, Recolored, RecolorRequest
from geni_violin.core.model import NetworkSlice
from geni_violin.runtime.problems import PROBLEM_MEDIA_TYPE, problem_document
from geni_violin.runtime.wire import decode, encode

Handler = Callable[..., Any]


def _answer(status: int, value: Any, content_type: str = "application/json") -> Any:
    return Response(status=status, content_type=content_type, body=json.dumps(value).encode())


def _problem(error: GeniViolinError) -> Any:
    document = problem_document(error)
    return _answer(document["status"], document, PROBLEM_MEDIA_TYPE)


def _serves(path: str, *methods: str) -> Callable[[Handler], Handler]:
    """Make a method the handler of a route (of any HTTP method if none is given); what it returns or raises is the
    response."""

    def decorate(handler: Handler) -> Handler:
        @functools.wraps(handler)
        def respond(self: Any, request: Any, **names: str) -> Any:
            try:
                return _answer(200, handler(self, request, **names))
            except GeniViolinError as error:
                return _problem(error)
            except Exception as error:
                LOG.exception("%s %s failed", request.method, request.path)
                text = f"{type(error).__name__}: {error}"
                return _problem(GeniViolinError(text, "this is a defect; see the controller's log"))

        routed: Handler = route(handler.__name__, path, methods=methods or None)(respond)
        return routed

    return decorate


def _body(request: Any) -> Any:
    try:
        return json.loads(request.body)
    except ValueError as error:
        raise InvalidInput(f"the body is not JSON: {error}", "docs/protocol.md tells what it should be") from error


class SliceRoutes(ControllerBase):  # type: ignore[misc]
    """Slices, their colors and counters."""

    def __init__(self, request: Any, link: Any, data: dict[str, Operations], **config: Any) -> None:
        super().__init__(request, link, data, **config)
        self.operations = data["operations"]

    @_serves("/healthz", "GET")
    def health(self, _request: Any) -> Any:
        return {
            "healthy": True,
            "instance": self.operations.instance,
            "switches": self.operations.fabric.connected(),
        }

    @_serves("/v1/slices", "GET")
    def list_slices(self, _request: Any) -> Any:
        return encode(tuple(self.operations.fabric.slices()))

    @_serves("/v1/slices", "PUT")
    def replace_slices(self, request: Any) -> Any:
        networks = decode(tuple[NetworkSlice, ...], _body(request))
        return {"installed": self.operations.replace_all(networks)}

    @_serves("/v1/slices/{name}", "GET")
    def show_slice(self, _request: Any, name: str) -> Any:
        fabric = self.operations.fabric
        return {**encode(fabric.slice(name)), "tree": encode(fabric.tree(name)), "parts": fabric.parts(name)}

    @_serves("/v1/slices/{name}", "PUT")
    def put_slice(self, request: Any, name: str) -> Any:
        network = decode(NetworkSlice, _body(request))
        if network.name != name:
            raise InvalidInput(f"the path names slice {name!r}, the body {network.name!r}")
        return encode(self.operations.put(network))

    @_serves("/v1/slices/{name}", "DELETE")
    def delete_slice(self, _request: Any, name: str) -> Any:
        return encode(self.operations.delete(name))

    @_serves("/v1/slices/{name}/recolor", "POST")
    def recolor_slice(self, request: Any, name: str) -> Any:
        return encode(self.operations.recolor(name, decode(RecolorRequest, _body(request))))

    @_serves("/v1/slices/{name}/arm", "POST")
    def arm_slice(self, request: Any, name: str) -> Any:
        return encode(self.operations.arm(name, decode(ArmRequest, _body(request))))

    @_serves("/v1/slices/{name}/disarm", "POST")
    def disarm_slice(self, request: Any, name: str) -> Any:
        return encode(self.operations.disarm(name, decode(DisarmRequest, _body(request))))

    @_serves("/v1/slices/{name}/colors", "GET")
    def count_colors(self, _request: Any, name: str) -> Any:
        return encode(tuple(self.operations.colors(name)))

    @_serves("/v1/slices/{name}/counters", "GET")
    def count(self, _request: Any, name: str) -> Any:
        return encode(tuple(self.operations.counters(name)))


class OtherRoutes(ControllerBase):  # type: ignore[misc]
    """Whatever no other route took."""

    @_serves("/{path:.*}")
    def refuse(self, request: Any, path: str) -> Any:
        raise NotFound(f"there is no request {request.method} /{path}", "docs/protocol.md lists them")


def register(wsgi: WSGIApplication, operations: Operations) -> None:
    """Add all routes to Ryu's WSGI application. Routes are tried in the order of registration."""
    logging.getLogger("ryu.lib.hub").setLevel(logging.WARNING)  # else a line in the log for every request
    _warm_up()
    wsgi.register(SliceRoutes, {"operations": operations})
    wsgi.register(OtherRoutes)


def _warm_up() -> None:
    """Build the checkers of message bodies now: the first recolor is as urgent as any other."""
    decode(RecolorRequest, encode(RecolorRequest(0)))
    decode(NetworkSlice, encode(NetworkSlice("none", 1, ())))
    for message in (ArmRequest(1, ()), DisarmRequest(0)):
        decode(type(message), encode(message))
    encode(Recolored(0.0))
