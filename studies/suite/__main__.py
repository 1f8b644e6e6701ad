"""``python -m studies.suite``."""

from studies.suite.cli import main

main()
