"""The coordinator: keeps the slices, and drives the cut of a slice as one durable transaction.

The way of a snapshot: ``api`` accepts it and ``snapshots`` starts a ``driver``, which runs ``core.transaction``: it
writes each new state to the ``journal`` and only then carries out the commands, by way of ``peers``, at the host
agents, the controller and the snapshot server. ``slices`` creates, restores and deletes slices; ``views`` is what
people see.
"""

from geni_violin.coordinator.api import run_coordinator

__all__ = ["run_coordinator"]
