"""GENI-VIOLIN: one consistent snapshot of a whole running network of virtual machines."""

__version__ = "0.1.0"
