"""``python -m geni_violin.cli`` is ``geni-violin``."""

from geni_violin.cli import main

main()
