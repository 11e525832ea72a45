"""The OpenFlow controller: ``ryu-manager geni_violin.controller``.

Theory of operation. Colors frames where they enter the network, admits or drops them where they leave it (see
docs/architecture.md). This module is Ryu's entrance and does no more than hand on: what switches say goes to
:class:`Operations`, requests come in by :mod:`.rest`. The way of a request::

    rest -> operations -> fabric (validation, rules, diff: pure) -> plan -> connection -> of13 -> switch

Ryu runs on eventlet's green threads: nothing here may use asyncio. Handlers run one after another in Ryu's event
loop for this app, so none may wait; reading a new switch's rules has a green thread of its own.
"""

from collections.abc import Callable
from typing import Any

from ryu.app.wsgi import WSGIApplication
from ryu.base.app_manager import RyuApp
from ryu.controller import ofp_event
from ryu.controller.handler import DEAD_DISPATCHER, MAIN_DISPATCHER, set_ev_cls
from ryu.lib import hub

from geni_violin.controller import of13, rest
from geni_violin.controller.operations import Operations
from geni_violin.runtime.scheduling import forget_garbage

Handler = Callable[[Any, Any], None]


def _on(event_class: type, *states: str) -> Callable[[Handler], Handler]:
    """Ryu's ``set_ev_cls``, typed."""
    decorate: Callable[[Handler], Handler] = set_ev_cls(event_class, list(states))
    return decorate


class Controller(RyuApp):  # type: ignore[misc]
    """The Ryu application."""

    OFP_VERSIONS = (of13.VERSION,)
    _CONTEXTS = {"wsgi": WSGIApplication}  # noqa: RUF012 (Ryu's way to ask for it)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.operations = Operations()
        rest.register(kwargs["wsgi"], self.operations)
        forget_garbage()

    @_on(ofp_event.EventOFPStateChange, MAIN_DISPATCHER, DEAD_DISPATCHER)
    def on_state(self, event: Any) -> None:
        """A switch has finished its handshake, or is gone."""
        if event.state == DEAD_DISPATCHER:
            self.operations.switch_left(event.datapath)
        else:
            hub.spawn(self.operations.synchronize, self.operations.switch_arrived(event.datapath))

    @_on(ofp_event.EventOFPBarrierReply, MAIN_DISPATCHER)
    def on_barrier_reply(self, event: Any) -> None:
        """A switch has done all that came before a barrier."""
        self.operations.barrier_replied(event.msg)

    @_on(ofp_event.EventOFPFlowStatsReply, MAIN_DISPATCHER)
    def on_flow_stats(self, event: Any) -> None:
        """A switch reports rules."""
        self.operations.flows_reported(event.msg)

    @_on(ofp_event.EventOFPMeterStatsReply, MAIN_DISPATCHER)
    def on_meter_stats(self, event: Any) -> None:
        """A switch reports what its meters have counted."""
        self.operations.meters_reported(event.msg)

    @_on(ofp_event.EventOFPMeterFeaturesStatsReply, MAIN_DISPATCHER)
    def on_meter_features(self, event: Any) -> None:
        """A switch tells what meters it can have."""
        self.operations.meter_features_reported(event.msg)

    @_on(ofp_event.EventOFPPortStateChange, MAIN_DISPATCHER)
    def on_port(self, event: Any) -> None:
        """A switch has a port more or less, or one of them has changed. Ryu has brought its list up to date."""
        self.operations.port_changed(event.datapath)
        hub.spawn(self.operations.reroute)

    @_on(ofp_event.EventOFPErrorMsg, MAIN_DISPATCHER)
    def on_error(self, event: Any) -> None:
        """A switch refuses something."""
        self.operations.refused(event.msg)
