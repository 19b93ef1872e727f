"""What the name of an expert on the command line means."""

from __future__ import annotations

from pathlib import Path

from sigmix.cli.opening import open_bank


def folder_of(name: str, bank: Path | None) -> Path | str:
    """What `Expert.load` takes for it: an expert's folder if it is a path, a model on the hub, or a name in the bank.

    Raises:
        UnknownNameError: neither. ExpertError: a folder without an expert.
    """
    from sigmix.errors import ExpertError
    from sigmix.experts.remote import names_repo

    path = Path(name).expanduser()
    if names_repo(name):
        return name
    if (path / "adapter_config.json").is_file():
        return path
    if path.is_absolute() or len(path.parts) > 1 or name.startswith("."):
        what = "has no adapter_config.json" if path.is_dir() else "does not exist"
        raise ExpertError(f"there is no expert at {path}: it {what}", remedy="give an expert's folder, or a name")
    return open_bank(bank).path(name)
