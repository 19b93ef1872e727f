"""`Bank`: a folder of experts, each in a folder of its own. A mapping {name: Expert} that loads on first use.

    bank = Bank("experts");  bank.names();  bank["arithmetic"];  "reading" in bank;  bank.add(expert)
    bank = Bank.from_hub("user/skills-0123456789abcdef01234567")      # a collection on the hub
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as replace_
from pathlib import Path

from torch import nn

from sigmix.errors import ExpertError, OutputError, UnknownNameError
from sigmix.experts import hub as remote
from sigmix.experts import serialization as directory
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import name_from_folder


class Bank(Mapping[str, Expert]):
    """Experts by name. Only subfolders with an ``adapter_config.json`` count; none at all is fine.

    Args:
        folder: where they are. Text that is no folder but reads as the slug of a collection on the hub, or as an
            expert "user/name" there, is opened as `from_hub` does.
        create: make the folder if it does not exist, to `add` to it.

    Attributes:
        folder: where the experts' folders lie; of experts on the hub: copies in our cache.
        where: what people know it as: the folder or the collection.

    Raises:
        ExpertError: no such folder, or two experts in it have the same name. HubError: see `from_hub`.
    """

    def __init__(self, folder: str | os.PathLike[str], create: bool = False) -> None:
        if not create and remote.names_repo(folder):
            named = os.fspath(folder)
            folder = remote.gather(named if remote.names_collection(named) else [named])
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir() and (self.folder.exists() or not create):
            what = "is a file, not a folder" if self.folder.exists() else "does not exist"
            raise ExpertError(
                f"the folder of experts {self.folder} {what}",
                remedy="give the folder that holds the experts' folders, or train one: `sigmix train --help`",
            )
        self._loaded: dict[str, Expert] = {}
        self.refresh()

    @classmethod
    def bundled(cls) -> Bank:
        """The experts that come with sigmix, for its default base.

        A wheel carries them as ``sigmix/_experts``; a source checkout has them in ``experts/`` at its root.

        Raises:
            ExpertError: this installation has none.
        """
        package = Path(__file__).resolve().parent.parent
        for folder in (package / "_experts", package.parent / "experts"):
            # beside an installed package a folder "experts" would be somebody else's
            if folder.is_dir() and (folder.parent == package or (folder.parent / "pyproject.toml").is_file()):
                return cls(folder)
        raise ExpertError(
            "this installation of sigmix has no experts with it",
            remedy="install it from a release or a full checkout, or give a folder of experts",
        )

    @classmethod
    def from_hub(cls, source: str | Sequence[str], token: str | None = None) -> Bank:
        """The experts of a collection on the hub, or of several models there, as they are now; nothing can be added.

        They are copied into a folder of our cache that is never changed: `refresh` does not ask the hub, a new bank
        does. Offline, or if the hub cannot be reached, a collection is what it was last.

        Args:
            source: a collection's slug, "user/title-" and an id (the end of its address); or a list of "user/name".
            token: default: whoever is logged in.

        Raises:
            HubError: the hub has it not, refuses, or cannot be reached. ExpertError: there are no experts, one is
            damaged, or two have the same name.
        """
        return cls(remote.gather(source, token))

    def refresh(self) -> None:
        """Look at the folder again; what was loaded before is read anew.

        Raises:
            ExpertError: two experts have the same name.
        """
        self._loaded.clear()
        found: dict[str, Path] = {}
        entries = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        for path in entries:
            if path.name.startswith(".") or not (path / directory.CONFIG).is_file():
                continue
            name = _name(path)
            if name in found:
                raise ExpertError(
                    f"two experts in {self.folder} are called {name!r}: {found[name].name} and {path.name}",
                    remedy="remove one, or give it another 'name' in its sigmix.json",
                )
            found[name] = path
        self._paths = {name: found[name] for name in sorted(found)}
        self._hub = remote.note(self.folder)
        self.where = str(self._hub.get("source") or self.folder)

    def names(self) -> list[str]:
        """All names, sorted."""
        return list(self._paths)

    def path(self, name: str) -> Path:
        """An expert's folder.

        Raises:
            UnknownNameError: no such expert; lists the nearest names.
        """
        if name not in self._paths:
            where = f"there are none in {self.where}" if not self._paths else f"they are in {self.where}"
            raise UnknownNameError("expert", name, self._paths, remedy=f"`sigmix experts list` shows them; {where}")
        return self._paths[name]

    def __getitem__(self, name: str) -> Expert:
        """The expert, loaded on first use.

        Raises:
            UnknownNameError: no such expert. ExpertError: its directory is damaged.
        """
        path = self.path(name)
        if name not in self._loaded:
            expert = Expert.from_pretrained(path)
            if self._hub:
                expert = replace_(expert, origin="{repo}@{revision}".format(**self._hub["experts"][name]))
            self._loaded[name] = expert
        return self._loaded[name]

    def get(self, name: str, default: Expert | None = None) -> Expert | None:  # type: ignore[override]
        """The expert, or ``default`` if there is none of that name."""
        if name not in self:
            return default
        return self[name]

    __eq__ = object.__eq__  # Mapping's own would load all experts
    __hash__ = object.__hash__

    def __contains__(self, name: object) -> bool:
        return name in self._paths  # Mapping's own would load the expert

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __repr__(self) -> str:
        return f"Bank({self.where!r}: {', '.join(self._paths) or 'empty'})"

    def add(self, expert: Expert, replace: bool = False) -> Path:
        """Save an expert in the folder under its name; returns where.

        Raises:
            OutputError: the name is taken and ``replace`` is False, the folder cannot be written, or the experts are
            on the hub.
        """
        if self._hub:
            raise OutputError(
                f"{self.where} is on the hub, so {expert.name!r} cannot be added here",
                remedy="push it there, or copy the experts to a folder first: sigmix experts pull",
            )
        path = self._paths.get(expert.name, self.folder / expert.name)
        if (expert.name in self._paths or path.exists()) and not replace:
            raise OutputError(
                f"{self.folder} already has {expert.name!r}", remedy="choose another name, or replace it on purpose"
            )
        expert.save_pretrained(path)
        self._paths = dict(sorted({**self._paths, expert.name: path}.items()))
        self._loaded[expert.name] = expert
        return path

    def domains(self) -> dict[str, list[str]]:
        """{domain: [names]}, sorted; an expert without a domain stands under its own name.

        Raises:
            ExpertError: an expert is damaged.
        """
        found: dict[str, list[str]] = {}
        for name in self._paths:
            found.setdefault(self[name].meta.get("domain") or name, []).append(name)
        return dict(sorted(found.items()))

    def check(self, base: nn.Module, *, sketches: bool = True) -> None:
        """`Expert.check` of every expert; raises the first error."""
        for name in self._paths:
            self[name].check(base, sketches=sketches)


def _name(path: Path) -> str:
    """The name in ``sigmix.json``, else one made of the folder's; damage shows when the expert is loaded."""
    try:
        name = directory.read_json(path / directory.META).get("name")
    except ExpertError:
        name = None
    return name if isinstance(name, str) else name_from_folder(path.name)
