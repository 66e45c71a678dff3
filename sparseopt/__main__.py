"""``python -m sparseopt`` is ``sparseopt``."""

from sparseopt.cli import main

main()
