"""Measurements, each beside its baseline in the same run. ``docs/benchmarks.md`` has what they gave.

Run them from the project's folder: ``.venv/bin/python -m bench.NAME``.
"""
