"""Tests with real Open vSwitch, Mininet and QEMU. They need root."""
