"""The environment variables with which torchrun and accelerate launch tell a process which of how many it is."""

from __future__ import annotations

import os

from sigmix.errors import ConfigError

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
REMEDY = "start the processes with torchrun or accelerate launch, or for one process unset WORLD_SIZE"


def launched() -> bool:
    """Whether a launcher started several processes, this one among them.

    Raises:
        ConfigError: its variables are not complete, as where another program has set WORLD_SIZE, or no numbers.
    """
    count = number("WORLD_SIZE", 1)
    if count < 2:
        return False
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        raise ConfigError(
            f"the environment variable WORLD_SIZE says that this is one of {count} processes, but {', '.join(missing)} "
            "of a launcher's variables are not set",
            remedy=REMEDY,
        )
    for name in NEEDED:
        if name != "MASTER_ADDR":
            number(name, 0)
    if not 0 <= (rank := number("RANK", 0)) < count:
        raise ConfigError(f"the environment variable RANK is {rank}, and WORLD_SIZE {count}", remedy=REMEDY)
    return True


def number(name: str, default: int) -> int:
    """The value of a variable, or the default where it is not set.

    Raises:
        ConfigError: it is no whole number.
    """
    given = os.environ.get(name) or str(default)
    try:
        return int(given)
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {given!r}, not a whole number", remedy=REMEDY) from None
