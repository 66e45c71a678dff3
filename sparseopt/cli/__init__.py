"""The command line: ``sparseopt`` and ``python -m sparseopt``. Parsing and printing only, one module per group.

Importing this module is cheap: a command imports what it needs (torch included) inside its function.
"""

from sparseopt.cli._main import main

__all__ = ["main"]
