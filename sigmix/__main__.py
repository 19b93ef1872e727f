"""``python -m sigmix``."""

from sigmix.cli import main

if __name__ == "__main__":
    main()
