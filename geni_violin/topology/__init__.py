"""Readers of topology files: what a person wrote becomes ``core.model.SliceSpec``, or an error with file and line."""

from geni_violin.topology.yaml_reader import read_topology

__all__ = ["read_topology"]
