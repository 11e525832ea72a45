"""The command line ``geni-violin``.

Theory of operation. Each command is a thin function in a ``*_commands`` module: it reads its arguments, asks the
coordinator (:mod:`~geni_violin.cli.client`) or handles this machine's parts (:mod:`~geni_violin.cli.parts`), and prints
the answer as a table or, with ``--json``, as one JSON value. Whatever goes wrong comes out in one place,
:mod:`~geni_violin.cli.outcome`: one line on stderr and an exit code. What is heavy is imported only by the command that
needs it, so ``--help`` is quick and an agent's machine needs no Ryu.
"""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from geni_violin.cli.app import app  # noqa: PLC0415  (keeps the import of this package light)
    from geni_violin.cli.outcome import run  # noqa: PLC0415

    sys.exit(run(app, sys.argv[1:]))
