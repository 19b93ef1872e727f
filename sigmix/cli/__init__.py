"""The command line: thin. Every command's work is in the package; heavy imports happen inside the commands.

Exit codes: 0 success, 1 failure of the work, 2 bad input (one line on stderr, no traceback).
"""

from __future__ import annotations

from sigmix.cli.app import main

__all__ = ["main"]
