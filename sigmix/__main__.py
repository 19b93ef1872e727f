"""``python -m sigmix``."""

from sigmix.cli.app import main

if __name__ == "__main__":
    main()
