"""sigmix.cli.__main__"""

from __future__ import annotations

from sigmix.cli.app import main

main()
