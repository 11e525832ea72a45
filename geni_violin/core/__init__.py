"""The algorithm: pure, standard library only.

No module here does I/O, reads a clock, draws a random number, logs or awaits. The services, the exhaustive
explorer (``geni_violin.check``) and the property tests all run this same code.
"""
