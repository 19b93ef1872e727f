"""What requests can name: experts of the bank, experts loaded while serving, saved mixes, `base` and `auto`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sigmix.errors import ConfigError, ExpertError, UnknownNameError
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import check_name
from sigmix.experts.mix import Mix
from sigmix.serve.store import State

AUTO, BASE = "auto", "base"


EACH = 100
"""Saved mixes of one client."""


class Catalogue(Mapping[str, Expert]):
    """Experts by name, as an engine's bank, and mixes by name.

    Args:
        bank: experts that are there from the start. state: keeps mixes. folders: that experts may be loaded from.
    """

    def __init__(self, bank: Mapping[str, Expert], state: State, folders: Sequence[Path] = ()) -> None:
        self.state = state
        self.folders = [Path(folder).expanduser().resolve() for folder in folders]
        self.folder = getattr(bank, "folder", None)  # where strategies look for what was fitted for the bank
        self._lock = threading.Lock()
        self._experts: dict[str, Expert] = {name: bank[name] for name in bank}
        self._mixes = state.mixes()

    # ------------------------------------------------------------------ experts

    def __getitem__(self, name: str) -> Expert:
        try:
            return self._experts[name]
        except KeyError:
            raise UnknownNameError("expert", name, self._experts, remedy="GET /v1/models lists them") from None

    def __contains__(self, name: object) -> bool:
        return name in self._experts

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._experts))

    def __len__(self) -> int:
        return len(self._experts)

    def read(self, given: str) -> Expert:
        """An expert's folder, if it lies in one of the allowed ones and no part of the way is a link.

        Raises:
            ExpertError: it does not, or is no expert. ConfigError: no folders are allowed.
        """
        if not self.folders:
            raise ConfigError(
                "this server loads no experts while it runs", remedy="start it with --expert-folder FOLDER"
            )
        wanted = Path(given)
        if ".." in wanted.parts or "\0" in given:
            raise ExpertError(f"the path {given!r} must not go up", remedy="name a folder inside an allowed one")
        for root in self.folders:
            path = wanted if wanted.is_absolute() else root / wanted
            if path != root and path.is_relative_to(root) and path.is_dir():
                inside = [*path.iterdir()]
                way = [parent for parent in [path, *path.parents] if parent != root and parent.is_relative_to(root)]
                if any(part.is_symlink() for part in [*way, *inside]):
                    raise ExpertError(f"the path {given!r} holds a link", remedy="copy the expert's files themselves")
                return Expert.from_pretrained(path)
        raise ExpertError(
            f"{given!r} is not a folder inside those that this server loads experts from",
            remedy="name a folder inside an allowed one, by its name alone or in full",
        )

    def add(self, expert: Expert) -> None:
        """Take an expert in; it must have been checked against the base.

        Raises:
            ConfigError: its name is taken.
        """
        with self._lock:
            if expert.name in self._experts or expert.name in self._mixes or expert.name in (AUTO, BASE):
                raise ConfigError(f"the name {expert.name!r} is taken", remedy="unload the other one first")
            self._experts = {**self._experts, expert.name: expert}

    def remove(self, name: str) -> None:
        """Take an expert out; nobody may be using it.

        Raises:
            UnknownNameError: there is none of that name.
        """
        with self._lock:
            self[name]
            self._experts = {other: expert for other, expert in self._experts.items() if other != name}

    # ------------------------------------------------------------------ mixes

    def mixes(self) -> dict[str, tuple[Mix, dict[str, Any]]]:
        """Saved mixes: {name: (mix, what is known about it)}."""
        return dict(self._mixes)

    def check_free(self, name: str, client: str | None = None) -> None:
        """Raise `ConfigError` or `ExpertError` if a client (None: an administrator) cannot call a mix so."""
        if check_name(name) in self._experts or name in (AUTO, BASE):
            raise ConfigError(f"the name {name!r} is an expert's or has a meaning of its own", remedy="give another")
        if client is None:
            return
        if name in self._mixes and self._mixes[name][1].get("client") != client:
            raise ConfigError(f"the name {name!r} is taken by a mix of somebody else", remedy="give another")
        if sum(about.get("client") == client for _, about in self._mixes.values()) >= EACH:
            raise ConfigError(f"{client} has {EACH} saved mixes already", remedy="have an administrator remove some")

    def save_mix(self, name: str, mix: Mix, about: Mapping[str, Any], client: str | None = None) -> None:
        """Save a mix under a name, replacing an older one of the same client (None: an administrator, any).

        Raises:
            ConfigError, ExpertError: see `check_free`. OutputError: it cannot be written.
        """
        with self._lock:
            self.check_free(name, client)
            about = {**about, "client": client} if client is not None else dict(about)
            self.state.save_mix(name, mix, about)
            self._mixes = {**self._mixes, name: (mix, about)}

    def drop_mix(self, name: str) -> None:
        """Forget a saved mix.

        Raises:
            UnknownNameError: there is none of that name.
        """
        with self._lock:
            if name not in self._mixes:
                raise UnknownNameError("mix", name, self._mixes)
            self.state.drop_mix(name)
            self._mixes = {other: found for other, found in self._mixes.items() if other != name}

    # ------------------------------------------------------------------ what a request asks for

    def resolve(self, model: str) -> Mix | None:
        """The mix that a request's ``model`` names; None for `auto`.

        Raises:
            UnknownNameError: a name that nothing has. ConfigError: no mix can be read from it.
        """
        if model == AUTO:
            return None
        if model in self._mixes:
            mix = self._mixes[model][0]
        else:
            mix = Mix.parse(model)
        for name in mix.weights:
            if name not in self._experts:
                known = [*self._experts, *self._mixes, AUTO, BASE]
                raise UnknownNameError("model", name, known, remedy="GET /v1/models lists them")
        return mix

    def usable(self, mix: Mix) -> bool:
        """Whether all experts of a mix are there."""
        return all(name in self._experts for name in mix.weights)
